"""Caps of whole peers: real RPC and transfers over simulated lines, measured where the line is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from potluck.net.blobs import CHUNK_BYTES, BlobRef, BlobService, BlobStore, ChunkList
from potluck.net.fetch import FetchReport, fetch
from potluck.net.host import PeerId
from potluck.net.hosts.memory import Lan, MemoryHost
from potluck.net.pace import OVERHEAD
from potluck.net.rpc import Reply, Rpc
from potluck.sim.loop import VirtualLoop, run
from potluck.sim.network import Line, Network, Weather
from potluck.sim.peer import identity_of

CAP = 200_000.0
EVERY = 0.1

Body = Callable[[VirtualLoop, "Meter", list[Rpc]], Coroutine[Any, Any, None]]


class Meter:
    """Looks at what passed the first peer's line, every tenth of a second."""

    def __init__(self, network: Network, peer: PeerId) -> None:
        self._network, self._peer = network, peer
        self.sent: list[int] = []
        self.received: list[int] = []

    async def run(self) -> None:
        while True:
            traffic = self._network.traffic(self._peer)
            self.sent.append(traffic.sent)
            self.received.append(traffic.received)
            await asyncio.sleep(EVERY)


def most(counts: list[int], seconds: float = 10.0) -> float:
    """Bytes on the line in any window, with what libp2p, TCP and IP would have added."""
    steps = round(seconds / EVERY)
    return OVERHEAD * max(after - before for before, after in zip(counts, counts[steps:], strict=False))


def with_peers(number: int, **caps: Any) -> Callable[[Body], None]:
    """The first of them has the caps."""

    def go(body: Body) -> None:
        async def main(loop: VirtualLoop) -> None:
            network = Network(loop, 1, Weather(spread=0.0, jitter=0.1))
            peers = [identity_of(0, n).peer_id for n in range(number)]
            for peer in peers:
                network.add(peer, Line(up=1e8, down=1e8))
            lan = Lan(network)
            rpcs = [Rpc(MemoryHost(lan, peer), **(caps if not n else {})) for n, peer in enumerate(peers)]
            for rpc in rpcs:
                await rpc.start()
            meter = Meter(network, peers[0])
            looking = asyncio.create_task(meter.run())
            await body(loop, meter, rpcs)
            looking.cancel()
            for rpc in rpcs:
                await rpc.close()

        run(main)

    return go


def stored(folder: Path, rpc: Rpc, *contents: bytes) -> tuple[BlobStore, list[BlobRef]]:
    store = BlobStore(folder / rpc.peer_id, 1 << 30)
    BlobService(rpc, store)
    return store, [store.put(content) for content in contents]


def test_uploads_stay_within_the_cap_and_use_it_whoever_asks(tmp_path: Path) -> None:
    @with_peers(5, upload=CAP)
    async def _(loop: VirtualLoop, meter: Meter, rpcs: list[Rpc]) -> None:
        data = bytes(range(256)) * 8192
        _, [ref] = stored(tmp_path, rpcs[0], data)

        async def small(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
            return Reply({"x": bytes(200)})

        rpcs[0].register("small", small)
        got = asyncio.gather(
            *(fetch(rpc, ref, [rpcs[0].peer_id], timeout_seconds=300, max_bytes=1 << 30) for rpc in rpcs[1:])
        )
        trips = []
        while not got.done():
            before = loop.time()
            await rpcs[1].call(rpcs[0].peer_id, "small", timeout_seconds=30)
            trips.append(loop.time() - before)
            await asyncio.sleep(0.25)
        assert all(bytes(each) == data for each in await got)
        took = 4 * len(data) * OVERHEAD / CAP
        assert took <= loop.time() <= 1.05 * took
        assert most(meter.sent) <= 1.05 * CAP * 10
        assert max(trips) < 0.5, "small answers do not wait for large ones"


def test_downloads_stay_within_the_cap_and_use_it_however_many_give(tmp_path: Path) -> None:
    @with_peers(5, download=CAP)
    async def _(loop: VirtualLoop, meter: Meter, rpcs: list[Rpc]) -> None:
        data, report = bytes(range(256)) * 16384, FetchReport()
        refs = [stored(tmp_path, rpc, data)[1][0] for rpc in rpcs[1:]]
        holders = [rpc.peer_id for rpc in rpcs[1:]]
        got = await fetch(rpcs[0], refs[0], holders, timeout_seconds=300, max_bytes=1 << 30, report=report)
        assert bytes(got) == data and not report.retries
        took = len(data) * OVERHEAD / CAP
        assert took - 0.5 <= loop.time() <= 1.05 * took, "nothing is asked for twice"
        assert most(meter.received) <= 1.05 * CAP * 10


def test_what_is_sent_unasked_is_read_no_faster_than_the_cap() -> None:
    @with_peers(3, download=CAP)
    async def _(loop: VirtualLoop, meter: Meter, rpcs: list[Rpc]) -> None:
        came: list[tuple[float, int]] = []

        async def take(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
            came.append((loop.time(), len(body)))
            return Reply()

        rpcs[0].register("take", take, max_request_bytes=1 << 20)
        size = 50_000

        async def push(rpc: Rpc) -> None:
            for _ in range(40):
                await rpc.call(rpcs[0].peer_id, "take", {}, bytes(size), timeout_seconds=120, lane="bulk")

        await asyncio.gather(*map(push, rpcs[1:]))
        assert 80 * size * OVERHEAD / CAP * 0.95 <= loop.time()
        for at, _ in came:
            within = sum(count for then, count in came if at - 10 < then <= at)
            assert within * OVERHEAD <= 1.05 * CAP * 10 + size  # whose last byte came just now


def test_a_contribution_passes_states_and_both_arrive(tmp_path: Path) -> None:
    @with_peers(4, upload=CAP)
    async def _(loop: VirtualLoop, meter: Meter, rpcs: list[Rpc]) -> None:
        state, contribution = bytes(3 * CHUNK_BYTES), b"c" * 500_000
        store, [urgent] = stored(tmp_path, rpcs[0], contribution)
        lent = BlobStore(tmp_path / "state", 1 << 30).put(state)
        store.add_memory(ChunkList.of([state]), [state])
        holder, options = [rpcs[0].peer_id], {"timeout_seconds": 600.0, "max_bytes": 1 << 30}
        joiners = asyncio.gather(*(fetch(rpc, lent, holder, **options) for rpc in rpcs[1:]))  # type: ignore[arg-type]
        await asyncio.sleep(5)
        before = loop.time()
        assert await fetch(rpcs[1], urgent, holder, **options)  # type: ignore[arg-type]
        # On a line that a state has begun to go over, the chunk of it ends first.
        alone = (len(contribution) + CHUNK_BYTES) * OVERHEAD / CAP
        assert loop.time() - before < alone + 1.0
        before = loop.time()
        assert await fetch(rpcs[2], urgent, holder, **options)  # type: ignore[arg-type]
        assert loop.time() - before < alone + 1.0
        assert [bytes(each) for each in await joiners] == [state] * 3


def test_a_question_that_has_no_room_in_time_is_not_asked(tmp_path: Path) -> None:
    @with_peers(2, download=10_000.0)
    async def _(loop: VirtualLoop, meter: Meter, rpcs: list[Rpc]) -> None:
        _, [ref] = stored(tmp_path, rpcs[1], bytes(100_000))
        with pytest.raises(Exception, match="download cap"):
            for _ in range(5):
                await rpcs[0].call(
                    rpcs[1].peer_id,
                    "blob.get",
                    {"id": ref.id, "index": 0},
                    timeout_seconds=2,
                    into=memoryview(bytearray(100_000)),
                )
        assert rpcs[0].bytes_received < 110_000


def test_a_slow_uplink_does_not_hold_its_group(tmp_path: Path) -> None:
    """One copy takes 10 s, seven at once would take 70: those who have it give it on."""

    @with_peers(8, upload=CAP)
    async def _(loop: VirtualLoop, meter: Meter, rpcs: list[Rpc]) -> None:
        data = bytes(range(256)) * int(10 * CAP / 256 / OVERHEAD)
        stores, refs = zip(
            *(stored(tmp_path, rpc, *([data] if not n else [])) for n, rpc in enumerate(rpcs)), strict=True
        )
        everybody = [rpc.peer_id for rpc in rpcs]

        async def pull(rpc: Rpc, store: BlobStore) -> float:
            others = [peer for peer in everybody if peer != rpc.peer_id]
            got = await fetch(rpc, refs[0][0], others, timeout_seconds=300, max_bytes=1 << 30, store=store)
            assert bytes(got) == data
            return loop.time()

        done = await asyncio.gather(*map(pull, rpcs[1:], stores[1:]))
        assert max(done) < 32, done
        assert meter.sent[-1] < 3.2 * len(data)
