"""The Go host with real p2pd processes on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hivemind")

from hivemind.dht.node import DHTNode
from hivemind.utils.timed_storage import get_dht_time

from potluck.errors import DaemonError, NetworkError, RpcClosed, UserError
from potluck.net.blobs import CHUNK_BYTES, BlobService, BlobStore
from potluck.net.fetch import FetchReport, fetch
from potluck.net.host import Host, PeerId
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity
from potluck.net.pubsub import Message, publish, subscribe
from potluck.net.rpc import Reply, Rpc


@pytest.fixture
def short_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="pl"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def hosts(directory: Path, *names: str, **options: Any) -> AsyncIterator[list[GoHost]]:
    """Hosts that all know the first one."""
    started: list[GoHost] = []
    try:
        for name in names:
            identity = Identity.load_or_create(directory / f"{name}.key")
            started.append(await GoHost.start(identity, directory / name, **options))
        address = str((await started[0].get_visible_maddrs())[0])
        for host in started[1:]:
            assert await host.connect(address, 10) == started[0].identity.peer_id
        yield started
    finally:
        pids = [host.pid for host in started]
        await asyncio.gather(*(host.shutdown() for host in started))
        assert not any(pid is not None and alive(pid) for pid in pids)


async def echo(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
    return Reply({**head, "from": peer}, bytes(body))


def test_what_one_peer_publishes_all_subscribers_hear_also_after_a_daemon_died(short_dir: Path) -> None:
    async def main() -> None:
        async with hosts(short_dir, "a", "b", "c") as (a, b, c):
            heard: dict[str, list[Message]] = {"a": [], "c": []}

            async def listen(host: GoHost, said: list[Message]) -> None:
                async for message in subscribe(host.control, "topic", max_bytes=100):
                    if message is not None:
                        said.append(message)

            async def heard_by_all(text: bytes) -> None:
                async with asyncio.timeout(30):
                    while not all(any(m.data == text for m in said) for said in heard.values()):
                        await publish(b.control, "topic", text)
                        await asyncio.sleep(0.2)

            listening = [asyncio.create_task(listen(a, heard["a"])), asyncio.create_task(listen(c, heard["c"]))]
            try:
                await heard_by_all(b"one")
                await publish(b.control, "topic", b"x" * 5000)  # more than these subscribers take
                await publish(b.control, "other", b"other")
                assert c.pid is not None
                os.kill(c.pid, signal.SIGKILL)
                await until(lambda: c.restarts == 1)
                await c.connect(str((await a.get_visible_maddrs())[0]), 10)
                await heard_by_all(b"two")
                said = [*heard["a"], *heard["c"]]
                assert {message.data for message in said} == {b"one", b"two"}
                assert {message.sender for message in said} == {b.identity.peer_id}
            finally:
                for task in listening:
                    task.cancel()
                await asyncio.gather(*listening, return_exceptions=True)

    asyncio.run(main())


def test_calls_cross_two_daemons_and_nothing_is_left(short_dir: Path) -> None:
    async def main() -> None:
        async with hosts(short_dir, "a", "b") as (a, b):
            assert isinstance(a, Host)
            assert stat.S_IMODE((short_dir / "a").stat().st_mode) == 0o700
            rpc_a, rpc_b = Rpc(a), Rpc(b)
            await rpc_a.start()
            rpc_a.register("echo", echo, max_request_bytes=1 << 22)
            for size in (0, 10, 2_000_000):
                reply = await rpc_b.call(
                    rpc_a.peer_id, "echo", {}, bytes(size), timeout_seconds=20, max_response_bytes=1 << 22
                )
                assert reply.head["from"] == b.identity.peer_id and len(reply.body) == size
            assert {peer.peer_id.to_base58() for peer in await a.list_peers()} == {b.identity.peer_id}
            await rpc_a.close()
            await rpc_b.close()
            await a.shutdown()
            await a.shutdown()
            assert os.listdir(short_dir / "a") == ["lock"]
            with pytest.raises(DaemonError, match="shut down"):
                await a.list_peers()

    asyncio.run(main())


def test_peers_find_each_other_by_id_through_a_third(short_dir: Path) -> None:
    async def main() -> None:
        async with hosts(short_dir, "a", "b", "c") as (_, b, c):
            rpc_b, rpc_c = Rpc(b), Rpc(c)
            await rpc_b.start()
            rpc_b.register("echo", echo)
            # The libp2p DHT takes a neighbour in a moment after the connection, when it has identified it.
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(RpcClosed):
                        reply = await rpc_c.call(rpc_b.peer_id, "echo", {"x": 1}, timeout_seconds=30)
                        break
                    await asyncio.sleep(0.1)
            assert reply.head["x"] == 1
            await rpc_b.close()
            await rpc_c.close()

    asyncio.run(main())


def test_fetch_survives_the_kill_of_a_holders_daemon(short_dir: Path) -> None:
    async def main() -> None:
        async with hosts(short_dir, "a", "b", "c") as (a, b, c):
            rpcs = [Rpc(host) for host in (a, b, c)]
            data = os.urandom(CHUNK_BYTES) * 60
            for index in (0, 1):
                await rpcs[index].start()
                store = BlobStore(short_dir / f"blobs{index}", 1 << 30)
                BlobService(rpcs[index], store)
                ref = store.put(data)
            report, killed = FetchReport(), False

            def progress(done: int, total: int) -> None:
                nonlocal killed
                if done > 10 * CHUNK_BYTES and not killed:
                    killed = True
                    assert a.pid is not None
                    os.kill(a.pid, signal.SIGKILL)

            peers = [rpc.peer_id for rpc in rpcs[:2]]
            got = await fetch(
                rpcs[2], ref, peers, timeout_seconds=60, max_bytes=1 << 30, report=report, on_progress=progress
            )
            assert killed and got == data and not report.liars
            assert report.bytes_by_holder[rpcs[1].peer_id] > 0
            for rpc in rpcs:
                await rpc.close()

    asyncio.run(main())


def test_dht_node_survives_the_kill_of_its_daemon(short_dir: Path) -> None:
    async def main() -> None:
        events: list[str] = []
        async with hosts(short_dir, "a", "b", on_event=lambda name, **fields: events.append(name)) as (a, b):
            node_a = await DHTNode.create(p2p=a)
            seeds = [str(maddr) for maddr in await a.get_visible_maddrs()]
            node_b = await DHTNode.create(p2p=b, initial_peers=[])
            await b.connect(seeds[0], 10)
            await node_b.protocol.call_ping(a.peer_id)
            assert await node_b.store("key", b"before", get_dht_time() + 60)
            before = [str(maddr) for maddr in await b.get_visible_maddrs()]
            assert b.pid is not None
            os.kill(b.pid, signal.SIGKILL)
            await until(lambda: b.restarts == 1)
            assert events == ["net.daemon.died", "net.daemon.restarted"]
            assert [str(maddr) for maddr in await b.get_visible_maddrs(latest=True)] == before
            assert await node_b.protocol.call_ping(a.peer_id) is not None
            assert await node_a.protocol.call_ping(b.peer_id) is not None  # handlers are registered again
            assert await node_b.store("key2", b"after", get_dht_time() + 60)
            found = await node_a.get("key2", latest=True)
            assert found is not None and found.value == b"after"
            await node_a.shutdown()
            await node_b.shutdown()

    asyncio.run(main())


def test_pending_unary_calls_fail_when_the_daemon_dies(short_dir: Path) -> None:
    async def main() -> None:
        from hivemind.proto import dht_pb2

        async with hosts(short_dir, "a", "b") as (a, b):
            asked = asyncio.Event()

            async def never(request: Any, context: Any) -> Any:
                asked.set()
                await asyncio.Future()

            await a.add_protobuf_handler("never", never, dht_pb2.PingRequest)
            call = asyncio.create_task(
                b.call_protobuf_handler(a.peer_id, "never", dht_pb2.PingRequest(), dht_pb2.PingResponse)
            )
            await asyncio.wait_for(asked.wait(), 20)
            assert b.pid is not None
            os.kill(b.pid, signal.SIGKILL)
            with pytest.raises(DaemonError):
                await asyncio.wait_for(call, 20)

    asyncio.run(main())


@pytest.mark.parametrize("ours_dials", [True, False])
def test_a_daemon_as_hivemind_launches_it_is_understood(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, ours_dials: bool
) -> None:
    """It offers Noise first, which ours does not speak."""
    from hivemind.p2p import P2P
    from hivemind.proto import dht_pb2

    monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{short_dir}/")

    async def ping(request: Any, context: Any) -> Any:
        return dht_pb2.PingResponse(available=True)

    async def main() -> None:
        async with hosts(short_dir, "a") as (a,):
            dialled = [] if ours_dials else await a.get_visible_maddrs()
            theirs = await P2P.create(initial_peers=dialled, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
            try:
                if ours_dials:
                    await a.connect(str((await theirs.get_visible_maddrs())[0]), 10)
                await theirs.add_protobuf_handler("ping", ping, dht_pb2.PingRequest)
                answer = await a.call_protobuf_handler(
                    theirs.peer_id, "ping", dht_pb2.PingRequest(), dht_pb2.PingResponse
                )
                assert answer.available
            finally:
                await theirs.shutdown()

    asyncio.run(main())


def test_port_in_use_is_named(short_dir: Path) -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(NetworkError, match=f"port {port} is in use.*--listen"):
                async with hosts(short_dir, "a", listen=[f"/ip4/127.0.0.1/tcp/{port}"]):
                    pass

    asyncio.run(main())


def test_two_hosts_cannot_share_a_port_or_a_directory(short_dir: Path) -> None:
    async def main() -> None:
        async with hosts(short_dir, "a") as (a,):
            # p2pd itself would share the port silently, through SO_REUSEPORT.
            listen = [str((await a.get_visible_maddrs())[0]).partition("/p2p/")[0]]
            with pytest.raises(NetworkError, match="in use"):
                await GoHost.start(Identity.create(short_dir / "x.key"), short_dir / "x", listen=listen)
            with pytest.raises(UserError, match=r"another peer runs.*--home"):
                await GoHost.start(a.identity, short_dir / "a")
            await a.list_peers()

    asyncio.run(main())


def test_directory_too_deep_for_a_socket_names_the_setting(short_dir: Path) -> None:
    async def main() -> None:
        with pytest.raises(UserError, match=r"too long.*--home"):
            await GoHost.start(Identity.create(short_dir / "key"), short_dir / ("d" * 100))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("maddr", "why"),
    [
        ("garbage", "not a peer's address"),
        ("/ip4/127.0.0.1/tcp/1", "does not end in /p2p/"),
        ("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWNLV7PCxNLPTPuPK9U3aZqMZBdkgDXGZbAZjHZvduvyme", "refused|dial"),
    ],
)
def test_failed_connect_says_why(short_dir: Path, maddr: str, why: str) -> None:
    async def main() -> None:
        async with hosts(short_dir, "a") as (a,):
            with pytest.raises(NetworkError, match=why):
                await a.connect(maddr, 10)

    asyncio.run(main())


_PARENT = """
import asyncio, sys
from pathlib import Path
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity

async def main():
    home = Path(sys.argv[1])
    host = await GoHost.start(Identity.load_or_create(home / "key"), home / "run")
    print(host.pid, flush=True)
    await asyncio.sleep(120)

asyncio.run(main())
"""


def test_killed_parent_leaves_no_daemon_and_the_next_start_works(short_dir: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(short_dir)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
    # p2pd may have seen its connection close and have tidied up before the signal came: leave a stale socket.
    path = short_dir / "run" / "p2pd.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    async def main() -> None:
        host = await GoHost.start(Identity.load(short_dir / "key"), short_dir / "run")
        await host.shutdown()

    asyncio.run(main())


def test_leftover_daemon_is_ended_but_never_a_stranger(short_dir: Path) -> None:
    async def main() -> None:
        identity = Identity.create(short_dir / "key")
        host = await GoHost.start(identity, short_dir / "run")
        command = Path(f"/proc/{host.pid}/cmdline").read_text().split("\0")[:-1]
        await host.shutdown()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as leftover:  # noqa: ASYNC220
            assert leftover.stdout is not None and leftover.stdout.readline()
            (short_dir / "run" / "p2pd.pid").write_text(str(leftover.pid))
            again = await GoHost.start(identity, short_dir / "run")
            assert await asyncio.to_thread(leftover.wait, 20) == -signal.SIGKILL
            await again.shutdown()
        with subprocess.Popen(["sleep", "60"]) as stranger:  # noqa: ASYNC220
            (short_dir / "run" / "p2pd.pid").write_text(str(stranger.pid))
            again = await GoHost.start(identity, short_dir / "run")
            assert stranger.poll() is None
            await again.shutdown()
            stranger.kill()

    asyncio.run(main())
