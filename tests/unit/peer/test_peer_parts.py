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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from potluck.dht.manifest import Manifest, RunId, sign
from potluck.dht.records import Replica, Signed
from potluck.dht.template import preset_draft
from potluck.errors import ClockError, HardwareError, ManifestError, NetworkError, StateError, UserError
from potluck.net.clock import RunClock
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.peer import events as events_module
from potluck.peer import hardware
from potluck.peer.control import ControlServer, ask
from potluck.peer.events import EventLog, Twentieths
from potluck.peer.home import Home
from potluck.peer.worker import Peer, Run
from potluck.swarm.layout import Layout
from potluck.swarm.phases import Round
from potluck.swarm.presence import Presence
from potluck.swarm.state import ReplicaState

PEER = "12D3KooWCHA12mx7eyUNJDQNmAoz4n2ds3sLWmpNzPhTgciM4uPR"


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
    for wanted in ("tpu", "cuda:99", "cuda:x", "cuda:", "mps"):
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
    needed = 16 * sum(p.numel() for p in module.parameters())
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


def test_a_clock_is_checked_every_half_hour_and_as_soon_as_somebody_sets_it() -> None:
    now, error = 1000.0, 0.0
    clock = RunClock(lambda: 1.7e9 + now + error, lambda: now)
    assert clock.is_due() and not clock.is_due()
    now += 1799.0
    assert not clock.is_due()
    now += 2.0
    assert clock.is_due() and not clock.is_due()
    error = -3.0
    assert clock.is_due() and not clock.is_due()


def test_control_socket_is_private_and_survives_garbage(short: Path) -> None:
    path = short / "s" / "run" / "c.sock"

    async def hello() -> dict[str, Any]:
        return {"hello": 1}

    async def go() -> None:
        async with ControlServer(path, {"hello": hello}):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            # Not only root can go through them.
            assert {stat.S_IMODE(folder.stat().st_mode) for folder in path.parents[:2]} == {0o700}
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


def test_a_model_too_large_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from potluck.peer import build

    def never(*arguments: Any) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr(build, "build_module", never)
    monkeypatch.setattr(hardware, "free_memory", lambda device: 2**20)
    manifest = preset_draft("demo", "x").finish(PeerId(PEER), created=0.0, genesis=0.0)
    with pytest.raises(HardwareError, match="parameters needs about"):
        build.initial_state(manifest)
    with pytest.raises(HardwareError, match="parameters needs about"):
        build.build(manifest, "cpu", None, None, True)


def test_eight_bit_moments_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(hardware, "free_memory", lambda device: 35 * 10**6)
    hardware.check_fits(10**6, "adamw8bit", cpu)
    with pytest.raises(HardwareError):
        hardware.check_fits(10**6, "adamw", cpu)


def test_tokens_without_an_embedding_are_refused() -> None:
    from types import SimpleNamespace

    from potluck.peer.build import check_vocabulary
    from potluck.swarm.data import Corpus

    corpus = Corpus(np.array([1, 2, 300], dtype=np.int32), np.array([5], dtype=np.int32), 1)
    for size, fine in ((301, True), (300, False)):
        text = SimpleNamespace(vocab_size=size)
        module: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda text=text: text))
        if fine:
            check_vocabulary(corpus, module)
        else:
            with pytest.raises(ManifestError, match=r"model\.config\.vocab_size"):
                check_vocabulary(corpus, module)


def test_a_damaged_manifest_and_a_home_that_cannot_be_written_say_what_to_do(tmp_path: Path) -> None:
    home = Home(tmp_path).open()
    run = home.run(joined(home))
    run.manifest_path.write_bytes(b"garbage")
    with pytest.raises(StateError, match="join again"):
        run.manifest()
    (run.path / "lock").mkdir()
    with pytest.raises(UserError, match="--home"), run.locked():
        pass
    (run.path / "peers.json").mkdir()
    with pytest.raises(UserError, match="--home"):
        run.save_peers([])
    assert not list(run.path.glob(".peers*"))
    (tmp_path / "log").mkdir()
    with pytest.raises(UserError, match="--home"):
        EventLog(tmp_path / "log")


def test_progress_is_told_at_each_twentieth_and_again_for_the_next_work() -> None:
    steps = Twentieths()
    told = [done for done in range(1, 1001) if steps.passed(done, 1000)]
    assert len(told) == 20 and told[-1] == 1000
    assert steps.passed(100, 1000)


class FakeDirectory:
    def __init__(self, *records: Signed[Replica]) -> None:
        self.records, self.published = records, 0

    async def replicas(self, module: str, shard: int, timeout_seconds: float) -> Any:
        return SimpleNamespace(records=self.records)

    async def publish(self, record: Replica, expires_at: float, timeout_seconds: float) -> bool:
        self.published += 1
        return True


@pytest.mark.parametrize(
    ("session", "started", "round_", "ends"),
    [
        (b"o" * 16, 1.0, 12, True),  # an older process goes on training: we end
        (b"o" * 16, 1.0, 11, False),  # our former self, before it was killed
        (b"o" * 16, 2e9, 12, False),  # a newer process: it ends, not we
        (b"m" * 16, 1.0, 12, False),  # we ourselves
    ],
)
def test_of_two_processes_with_one_identity_the_newer_ends(
    session: bytes, started: float, round_: int, ends: bool
) -> None:
    async def go() -> None:
        layout = Layout.of([("w", (2,))])
        state = ReplicaState("stage.0", layout, Round(12), layout.zeros())
        record = Replica(
            module="stage.0", shard=0, round=round_, digest=bytes(32), session=session, started=started, addresses=[]
        )
        directory: Any = FakeDirectory(Signed(record, PeerId(PEER), 0.0))
        presence = Presence(
            directory, PeerId(PEER), role="worker", name="", session=b"m" * 16, emit=lambda *a, **k: None
        )
        presence.first_round = 10
        await presence.announce(state, 1, 0.0, 1.0)
        assert presence.taken.done() == ends and directory.published == 1

    asyncio.run(go())


def test_a_changed_manifest_is_a_new_run_and_the_old_one_is_named(tmp_path: Path) -> None:
    async def go() -> None:
        peer = Peer.open(tmp_path)
        me = peer.identity.peer_id

        def unsigned(name: str, **changed: Any) -> Manifest:
            return preset_draft("demo", name, changed).finish(me, created=0.0, genesis=0.0)

        signed = sign(unsigned("x"), peer.identity)
        folder = peer.home.run(signed.run_id)
        folder.save_manifest(signed)
        changed = unsigned("x", **{"rounds.steps": 11})
        assert peer._namesake(changed) is None  # it never came to train
        (folder.checkpoints("stage.0") / "round-00000000").mkdir(parents=True)
        assert peer._hosted(changed) is None and peer._namesake(changed) == signed.run_id
        assert peer._namesake(unsigned("y")) is None

    asyncio.run(go())


def test_why_says_that_the_peer_leaves_once_it_was_asked_to(tmp_path: Path) -> None:
    async def go() -> None:
        peer = Peer.open(tmp_path)
        run = Run(peer, peer.home.run(RunId("a" * 52)), None, None)
        assert (await run.why())["leaving"] is False
        replica: Any = SimpleNamespace(
            finish=lambda: None, state=SimpleNamespace(round=Round(7)), last=None, rounds_alone=0
        )
        assert await run._leave() == {"leaving_after_round": None}
        assert (await run.why())["leaving_after_round"] is None  # it has not joined
        seat: Any = SimpleNamespace(replica=replica)
        run.seat = seat
        assert await run._leave() == {"leaving_after_round": 7}
        answer = await run.why()
        assert (answer["leaving"], answer["leaving_after_round"]) == (True, 7)
        run.events.close()

    asyncio.run(go())


def test_a_run_that_never_came_to_train_starts_anew_with_the_next_host(tmp_path: Path) -> None:
    async def go() -> None:
        peer = Peer.open(tmp_path)
        identity = peer.identity
        draft = preset_draft("demo", "x")
        unsigned = draft.finish(identity.peer_id, created=0.0, genesis=0.0)
        signed = sign(draft.finish(identity.peer_id, created=9.0, genesis=10.0), identity)
        folder = peer.home.run(signed.run_id)
        folder.save_manifest(signed)
        (folder.checkpoints("stage.0") / "round-00000000").mkdir(parents=True)
        found = peer._hosted(unsigned)
        assert found and found.run_id == signed.run_id
        (folder.checkpoints("stage.0") / "round-00000000").rmdir()
        assert peer._hosted(unsigned) is None
        assert peer.home.runs() == []

    asyncio.run(go())
