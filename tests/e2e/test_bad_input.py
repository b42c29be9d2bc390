"""Bad input: each gets one clear line that names the setting and the fix, the right exit code, and leaks nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from pathlib import Path

import pytest

from potluck.dht.invite import Invite
from potluck.dht.manifest import SignedManifest, sign
from potluck.dht.template import preset_draft
from potluck.errors import ClockError, ManifestError, NetworkError
from potluck.net.clock import RunClock
from potluck.net.identity import Identity
from potluck.peer.home import Home
from potluck.peer.node import NetworkSettings, Node

from real import potluck, run_party, short_folder, write_manifest

LOOPBACK = NetworkSettings(listen=("/ip4/127.0.0.1/tcp/0",), nat_port_map=False)
SOMEBODY = "12D3KooWCHA12mx7eyUNJDQNmAoz4n2ds3sLWmpNzPhTgciM4uPR"


def refused(code: int, *arguments: str, says: str) -> str:
    """Run a command that must fail with one clear line. Returns it."""
    done = potluck(*arguments)
    assert done.returncode == code, (done.returncode, done.stderr, done.stdout[-500:])
    assert "Traceback" not in done.stderr
    assert says in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    return line


@pytest.mark.parametrize(
    ("invite", "says"),
    [
        ("http://example.org", "potluck:"),
        ("potluck:tooshort", "run id"),
        ("potluck:" + "a" * 52 + "?peer=/ip4/127.0.0.1/tcp/1", "p2p"),
        ("potluck:" + "a" * 52 + "?pear=x", "peer="),
    ],
)
def test_corrupt_invite_exits_4(invite: str, says: str) -> None:
    with short_folder() as folder:
        refused(4, "join", invite, "--home", str(folder / "h"), "--loopback", says=says)


def test_unreachable_bootstrap_exits_6_and_names_the_address() -> None:
    with short_folder() as folder:
        invite = f"potluck:{'a' * 52}?peer=/ip4/127.0.0.1/tcp/9/p2p/{SOMEBODY}"
        refused(6, "join", invite, "--home", str(folder / "h"), "--loopback", says="/ip4/127.0.0.1/tcp/9")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "int8"', 'name = "zip"', "codec.name"),
        ("num_hidden_layers = 2", "num_hidden_layers = 1000000", "num_hidden_layers"),
        ('family = "llama"', 'family = "no_such_family"', "model.family"),
        ("hidden_size = 64", "hidden_size = 64\nno_such_key = 1", "no_such_key"),
        ("steps = 10", "stepz = 10", "stepz"),
        ("version = 1", "version = 7", "version"),
        ("seconds = 4.0", "seconds = nan", "seconds"),
    ],
)
def test_bad_manifest_exits_4_and_names_the_field(old: str, new: str, says: str) -> None:
    with short_folder() as folder:
        path = write_manifest(folder)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        refused(4, "host", str(path), "--home", str(folder / "h"), "--loopback", says=says)


def test_a_gpu_that_is_not_there_exits_5() -> None:
    with short_folder() as folder:
        path = write_manifest(folder)
        line = refused(
            5, "host", str(path), "--home", str(folder / "h"), "--loopback", "--device", "mps", says="--device mps"
        )
        assert "--device auto" in line


def test_port_in_use_exits_6_and_names_it() -> None:
    with short_folder() as folder, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        home = str(folder / "h")
        refused(6, "host", str(write_manifest(folder)), "--home", home, "--listen", listen, says=str(port))


def test_no_disk_space_exits_2_and_names_the_quota() -> None:
    with short_folder() as folder:
        path = write_manifest(folder)
        home = str(folder / "h")
        refused(2, "host", str(path), "--home", home, "--loopback", "--disk-quota", "10KB", says="--disk-quota")


def test_identity_readable_by_others_exits_3() -> None:
    with short_folder() as folder:
        home = folder / "h"
        home.mkdir()
        Identity.create(home / "identity.key")
        (home / "identity.key").chmod(0o644)
        refused(3, "host", str(write_manifest(folder)), "--home", str(home), "--loopback", says="chmod 600")


def test_a_strangers_manifest_does_not_read_local_files() -> None:
    async def body(party: object) -> None:
        root: Path = party.root  # type: ignore[attr-defined]
        secret = root / "secret.txt"
        secret.write_text("not for you " * 10_000)
        manifest = write_manifest(root, data__source=f"text:{secret}")
        organizer = await party.start("org", "host", str(manifest))  # type: ignore[attr-defined]
        done = await asyncio.to_thread(
            refused, 4, "join", organizer.status["invite"], "--home", str(root / "w"), "--loopback", says="--data"
        )
        assert str(secret) in done

    run_party(body)  # type: ignore[arg-type]


def test_json_errors_are_one_object_on_stdout() -> None:
    done = potluck("join", "garbage", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout) == {
        "error": done.stderr.removeprefix("error: ").strip(),
        "kind": "ManifestError",
        "exit_code": 4,
    }


async def open_node(folder: Path, name: str, clock: RunClock | None = None) -> Node:
    home = Home(folder / name).open()
    run = home.run(a_run_id())
    run.path.mkdir(parents=True)
    return Node(home.identity(), run, clock or RunClock(), lambda *a, **k: None, LOOPBACK)


def a_run_id() -> str:  # type: ignore[return]
    return "a" * 52  # type: ignore[return-value]


def signed_by(identity: Identity) -> SignedManifest:
    draft = preset_draft("demo", "test")
    return sign(draft.finish(identity.peer_id, created=1e9, genesis=1e9), identity)


def test_a_clock_far_off_refuses_and_one_slightly_off_is_corrected() -> None:
    async def go(folder: Path) -> None:
        wrong, slightly = RunClock(), RunClock()
        wrong.offset, slightly.offset = 100.0, 5.0
        async with await open_node(folder, "a") as a, await open_node(folder, "b", wrong) as b:
            await a.dial([str(m) for m in await b.host.get_visible_maddrs()])
            measured = await a.clock.measure(a.rpc, await a.connected())
            assert measured is not None and abs(measured - 100.0) < 1.0
            with pytest.raises(ClockError, match="set it"):
                a.clock.correct(measured)
            b.clock.offset = slightly.offset
            measured = await a.clock.measure(a.rpc, await a.connected())
            assert measured is not None and a.clock.correct(measured)
            assert abs(a.clock.offset - 5.0) < 1.0

    with short_folder() as folder:
        asyncio.run(go(folder))


def test_a_manifest_of_another_run_or_with_a_bad_signature_is_refused() -> None:
    async def go(folder: Path) -> None:
        async with await open_node(folder, "a") as a, await open_node(folder, "b") as b:
            signed = signed_by(b.identity)
            forged = SignedManifest(signed.manifest, signed.envelope[:-1] + bytes([signed.envelope[-1] ^ 1]))
            await a.dial([str(m) for m in await b.host.get_visible_maddrs()])
            b.publish_manifest(signed)
            assert (await a.fetch_manifest(Invite(signed.run_id, ()))).envelope == signed.envelope
            with pytest.raises(NetworkError, match="that run"):
                await a.fetch_manifest(Invite(a_run_id(), ()))  # type: ignore[arg-type]
            b.publish_manifest(forged)
            with pytest.raises(ManifestError, match="signature"):
                await a.fetch_manifest(Invite(forged.run_id, ()))

    with short_folder() as folder:
        asyncio.run(go(folder))


@pytest.mark.privileged
@pytest.mark.slow
def test_a_full_disk_ends_with_one_clear_line_and_keeps_what_was_there() -> None:
    with short_folder() as folder:
        small = folder / "small"
        small.mkdir()
        try:
            mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if mount.returncode != 0:
            pytest.skip("mounting a small disk needs root")
        try:
            manifest = str(write_manifest(folder, model__config__intermediate_size=2048))
            refused(11, "host", manifest, "--home", str(small / "h"), "--loopback", says="the disk is full")
            assert not list(small.rglob(".partial*")) and not list(small.rglob("*.tmp"))
        finally:
            subprocess.run(["umount", str(small)], check=False)
