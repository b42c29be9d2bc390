"""The DHT on three real libp2p daemons: what holds in `tests/unit/dht` holds on the wire."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hivemind.proto import dht_pb2

from potluck.dht.directory import Directory
from potluck.dht.manifest import RunId
from potluck.dht.node import add_peers, peers_known, start_dht, stop_dht
from potluck.dht.records import Commit, encode, key_id, key_name
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity

RUN, OTHER_RUN = RunId("a" * 52), RunId("b" * 52)
AHEAD_SECONDS = 600.0


def commit() -> Commit:
    return Commit(
        module="stage.0",
        round=3,
        shard=0,
        blob="ab" * 32,
        size=1000,
        tokens=2000,
        steps=10,
        loss_before=2.5,
        loss_after=2.25,
        digest="cd" * 32,
        replicas_estimate=3.0,
        session=b"s" * 16,
        committed_at=1e9,
    )


class Peers:
    """Three peers, each with a daemon, a node and a directory; all connected to the first."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.expires = time.time() + 300
        self.identities = [Identity.create(home / f"key{number}") for number in range(4)]
        self.hosts: list[GoHost] = []
        self.nodes: list[Any] = []
        self.directories: list[Directory] = []

    async def start_host(self, number: int) -> GoHost:
        host = await GoHost.start(self.identities[number], self.home / str(number))
        for other in self.hosts[:1]:
            await host.connect(str((await other.get_visible_maddrs())[0]), 10.0)
        return host

    async def start_node(self, number: int) -> Any:
        others = [identity.peer_id for identity in self.identities[:3]]
        return await start_dht(
            self.hosts[number],
            RUN,
            initial_peers=[peer for peer in others[: len(self.hosts)] if peer != others[number]],
            max_ahead_seconds=AHEAD_SECONDS,
            wait_timeout_seconds=5.0,
        )

    async def read(self, number: int) -> set[str]:
        view = await self.directories[number].commits("stage.0", 3, 0, timeout_seconds=20.0)
        assert view.complete
        return {signed.peer for signed in view.records}

    async def send(self, source: int, target: int, value: bytes, subkey: str, run: RunId = RUN) -> Any:
        """A raw store request, as a hostile node would make it."""
        request = dht_pb2.StoreRequest(
            keys=[key_id(key_name(run, commit().path()))],
            subkeys=[msgspec.msgpack.encode(subkey)],
            values=[msgspec.msgpack.encode(value)],
            expiration_time=[self.expires],
            in_cache=[False],
            peer=self.nodes[source].protocol.node_info,
        )
        stub = self.nodes[source].protocol.get_stub(self.hosts[target].peer_id)
        return list((await stub.rpc_store(request, 20.0)).store_ok)


@asynccontextmanager
async def three_peers() -> AsyncIterator[Peers]:
    async with AsyncExitStack() as stack:
        # Short: a unix socket's path has at most 107 bytes.
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="pl", dir="/tmp"))
        peers = Peers(Path(home))
        for number in range(3):
            host = await peers.start_host(number)
            stack.push_async_callback(host.shutdown)
            peers.hosts.append(host)
        for number in range(3):
            node = await peers.start_node(number)
            peers.nodes.append(node)
            peers.directories.append(Directory(node, peers.identities[number], RUN))
        try:
            yield peers
        finally:
            for node in peers.nodes:
                await stop_dht(node)


def play(scene: Callable[[Peers], Awaitable[None]]) -> None:
    async def main() -> None:
        async with three_peers() as peers:
            await asyncio.wait_for(scene(peers), 120)

    asyncio.run(main())


def test_each_reads_what_each_published_and_a_restarted_node_reads_it_again() -> None:
    async def scene(peers: Peers) -> None:
        everyone = {identity.peer_id for identity in peers.identities[:3]}
        for directory in peers.directories:
            assert await directory.publish(commit(), peers.expires, 20.0)
        for number in range(3):
            assert await peers.read(number) == everyone
        place = peers.nodes[1].node_id
        await stop_dht(peers.nodes[1])
        peers.nodes[1] = await peers.start_node(1)
        peers.directories[1] = Directory(peers.nodes[1], peers.identities[1], RUN)
        assert peers.nodes[1].node_id == place
        assert await peers.read(1) == everyone

    play(scene)


def test_every_node_refuses_forged_and_foreign_records() -> None:
    async def scene(peers: Peers) -> None:
        signer = peers.identities[3]
        good = encode(commit(), signer, RUN, peers.expires)
        forged = good[:-1] + bytes([good[-1] ^ 1])
        foreign = encode(commit(), signer, OTHER_RUN, peers.expires)
        for target in (1, 2):
            assert await peers.send(0, target, forged, signer.peer_id) == [False]
            assert await peers.send(0, target, foreign, signer.peer_id) == [False]
            assert await peers.send(0, target, foreign, signer.peer_id, OTHER_RUN) == [False]
            assert await peers.send(0, target, good, peers.identities[2].peer_id) == [False]
            rejected = peers.nodes[target].protocol.record_validator.rejected
            assert rejected == {"bad_signature": 2, "wrong_key": 1, "wrong_subkey": 1}
            assert await peers.send(0, target, good, signer.peer_id) == [True]

    play(scene)


@pytest.mark.parametrize("size", [100_000, 900_000, 1_500_000, 10_000_000])
def test_a_huge_record_is_refused_and_nothing_dies(size: int) -> None:
    async def scene(peers: Peers) -> None:
        for target in (1, 2):
            try:
                assert await peers.send(0, target, bytes(size), peers.identities[0].peer_id) == [False]
            except AssertionError:
                raise
            except Exception:
                pass  # refused by the daemon, by hivemind's client, or by our bound on requests
        assert await peers.directories[1].publish(commit(), peers.expires, 20.0)
        for number in (1, 2):
            assert peers.identities[1].peer_id in await peers.read(number)
        assert [host.restarts for host in peers.hosts[1:]] == [0, 0]

    play(scene)


def test_a_run_goes_on_when_its_first_peer_has_died() -> None:
    async def scene(peers: Peers) -> None:
        await peers.directories[0].publish(commit(), peers.expires, 20.0)
        await peers.hosts[0].shutdown()
        assert await peers.directories[1].publish(commit(), peers.expires, 20.0)
        wanted = {identity.peer_id for identity in peers.identities[:2]}
        assert await peers.read(2) == wanted
        assert peers.identities[2].peer_id in peers_known(peers.nodes[1])
        assert await add_peers(peers.nodes[1], [peers.identities[2].peer_id]) == 1

    play(scene)
