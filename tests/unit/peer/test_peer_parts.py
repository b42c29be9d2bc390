"""The peer's small parts: home, events, hardware, clock, control socket."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from potluck.dht.manifest import RunId, sign
from potluck.dht.template import preset_draft
from potluck.errors import ClockError, HardwareError, NetworkError, UserError
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.peer import events as events_module
from potluck.peer import hardware
from potluck.peer.clock import RunClock
from potluck.peer.control import ControlServer, ask
from potluck.peer.events import EventLog
from potluck.peer.home import Home


@pytest.fixture
def short() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pl", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def joined(home: Home) -> RunId:
    identity = home.identity()
    signed = sign(preset_draft("demo", "x").finish(identity.peer_id, created=os.urandom(1)[0], genesis=1.0), identity)
    home.run(signed.run_id).save_manifest(signed)
    return signed.run_id


def test_runs_are_found_by_prefix_or_the_latest(tmp_path: Path) -> None:
    home = Home(tmp_path).open()
    with pytest.raises(UserError, match="potluck join"):
        home.find_run()
    one = joined(home)
    assert home.find_run().run_id == one == home.find_run(one[:5]).run_id
    manifest = home.find_run().manifest()
    assert manifest and manifest.run_id == one
    with pytest.raises(UserError, match="no run whose id"):
        home.find_run("zzzz")


def test_a_second_process_is_refused_the_same_run(tmp_path: Path) -> None:
    home = Home(tmp_path).open()
    run = home.run(joined(home))
    with run.locked(), pytest.raises(UserError, match="--home"), run.locked():
        pass
    with run.locked():  # and it is free again
        pass


def test_an_unusable_home_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--home"):
        Home(tmp_path / "file" / "home").open()


def test_damaged_peer_lists_are_forgotten(tmp_path: Path) -> None:
    run = Home(tmp_path).open().run(RunId("a" * 52))
    run.path.mkdir(parents=True)
    assert run.peers() == []
    run.save_peers(["/ip4/1.2.3.4/tcp/5"])
    assert run.peers() == ["/ip4/1.2.3.4/tcp/5"]
    (run.path / "peers.json").write_bytes(b'{"a": 1')
    assert run.peers() == []


def test_events_reach_subscribers_and_a_log_that_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_LOG_BYTES", 2000)
    seen: list[dict[str, Any]] = []
    log = EventLog(tmp_path / "events.jsonl", peer="p")
    log.subscribe(seen.append)
    for number in range(200):
        log.emit("a.b", number=number, loss=float("nan"))
    log.close()
    assert len(seen) == 200 and seen[-1]["peer"] == "p"
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 3 * 2000
    last = (tmp_path / "events.jsonl").read_text().splitlines() or (
        tmp_path / "events.jsonl.1"
    ).read_text().splitlines()
    assert json.loads(last[-1])["number"] == 199 and json.loads(last[-1])["loss"] is None


def test_devices_that_are_not_there_name_the_setting() -> None:
    assert hardware.choose_device("cpu") == torch.device("cpu")
    assert hardware.choose_device("auto").type in ("cpu", "cuda", "mps")
    for wanted in ("tpu", "cuda:99", "mps"):
        with pytest.raises(HardwareError, match="--device"):
            hardware.choose_device(wanted)


def test_a_model_that_does_not_fit_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    module, cpu = LlamaForCausalLM(config), torch.device("cpu")
    assert hardware.fit_micro_batch(8, 64, module, cpu) == 8
    monkeypatch.setattr(hardware, "free_memory", lambda device: 2**20)
    with pytest.raises(HardwareError, match="GiB"):
        hardware.fit_micro_batch(8, 64, module, cpu)
    needed = 28 * sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(hardware, "free_memory", lambda device: needed + 8 * 2**20)
    assert 1 <= hardware.fit_micro_batch(10_000, 64, module, cpu) < 10_000


class FakeRpc:
    """Peers whose clocks are off by so much; None does not answer."""

    def __init__(self, clock: RunClock, offsets: dict[str, float | None]) -> None:
        self._clock, self._offsets = clock, offsets

    async def call(self, peer: PeerId, method: str, **limits: Any) -> Any:
        from potluck.errors import RpcTimeout
        from potluck.net.rpc import Reply

        offset = self._offsets[peer]
        if offset is None:
            raise RpcTimeout("no answer")
        return Reply({"utc": self._clock.now() + offset})


def measured(offsets: dict[str, float | None]) -> float | None:
    clock = RunClock()
    rpc: Any = FakeRpc(clock, offsets)
    return asyncio.run(clock.measure(rpc, [PeerId(p) for p in offsets]))


def test_one_liar_among_three_does_not_move_the_clock() -> None:
    got = measured({"a": 0.1, "b": -0.1, "liar": 29.0})
    assert got is not None and abs(got) < 0.2
    assert measured({"a": None}) is None


def test_small_offsets_stay_large_ones_are_corrected_and_huge_ones_refuse() -> None:
    clock = RunClock()
    assert not clock.correct(0.9) and clock.offset == 0.0
    assert clock.correct(-5.0) and clock.offset == -5.0
    with pytest.raises(ClockError, match="behind"):
        clock.correct(36.0)
    with pytest.raises(ClockError, match="ahead"):
        RunClock().correct(-31.0)


def test_control_socket_is_private_and_survives_garbage(short: Path) -> None:
    path = short / "c.sock"

    async def hello() -> dict[str, Any]:
        return {"hello": 1}

    async def go() -> None:
        async with ControlServer(path, {"hello": hello}):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert await ask(path, "hello") == {"hello": 1}
            with pytest.raises(NetworkError, match="unknown command"):
                await ask(path, "nothing")
            for garbage in (b"\xff\xfe\n", b"[1,2]\n", b"{" * 100 + b"\n", b""):
                reader, writer = await asyncio.open_unix_connection(str(path))
                writer.write(garbage)
                writer.write_eof()
                await reader.read()
                writer.close()
            assert await ask(path, "hello") == {"hello": 1}
        assert not path.exists()
        with pytest.raises(NetworkError, match="potluck join"):
            await ask(path, "hello")

    asyncio.run(go())


def test_identity_is_created_once(tmp_path: Path) -> None:
    home = Home(tmp_path).open()
    assert home.identity().peer_id == home.identity().peer_id == Identity.load(tmp_path / "identity.key").peer_id
