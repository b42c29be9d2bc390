"""An in-memory swarm: one shared directory and blob space, with faults for each peer. Virtual time, no sockets."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from potluck.dht.records import Commit, Replica, Signed
from potluck.errors import BlobUnavailable, DiskFull, RpcRemoteError, RpcTimeout
from potluck.net.blobs import CHUNK_BYTES, BlobRef, ChunkList
from potluck.net.fetch import Kept
from potluck.net.host import PeerId
from potluck.net.wire import Buffer
from potluck.swarm.exchange import OnChunk
from potluck.swarm.phases import Round
from potluck.swarm.slices import Aggregated
from potluck.swarm.state import ReplicaState

Told = tuple[Aggregated, bytes]


@dataclass
class Faults:
    """What goes wrong for one peer. `hides_from`: peers that cannot fetch its blobs; `lie`: what it makes of the
    segments that it aggregates; `two_faced`: only to those who have not asked it for its own of that segment, which it
    waits for; `victims`: only to these; `mute`: it says nothing about them. Without `shows` it gives nobody what it
    counted of others."""

    hides_from: set[PeerId] = field(default_factory=set)
    down: bool = False
    cannot_publish: bool = False
    disk_full: bool = False
    blind: bool = False
    garbage: bytes | None = None
    lie: Callable[[bytes], bytes] | None = None
    mute: bool = False
    two_faced: bool = False
    shows: bool = True
    victims: set[PeerId] = field(default_factory=set)
    asked: set[tuple[PeerId, int]] = field(default_factory=set)
    latency_seconds: float = 0.01


@dataclass
class World:
    now: float = 0.0
    commits: dict[tuple[str, int, int], dict[PeerId, Signed[Commit]]] = field(default_factory=dict)
    own: dict[tuple[str, int, int], dict[PeerId, Signed[Commit]]] = field(default_factory=dict)
    announced: dict[str, dict[PeerId, Signed[Replica]]] = field(default_factory=dict)
    blobs: dict[str, dict[PeerId, tuple[bytes, float]]] = field(default_factory=dict)
    #: Blobs on somebody's disk.
    settled: set[str] = field(default_factory=set)
    told: dict[tuple[str, int, PeerId, int], asyncio.Future[Told | None]] = field(default_factory=dict)
    received: Counter[PeerId] = field(default_factory=Counter)
    faults: dict[PeerId, Faults] = field(default_factory=dict)
    #: Chunks of others' blobs, by who serves them: how often they were added.
    shown: defaultdict[PeerId, Counter[tuple[str, int]]] = field(default_factory=lambda: defaultdict(Counter))
    shown_to_others: int = 0
    #: What was told to each, by module, round and peer.
    heard: dict[tuple[str, int, PeerId], list[bytes]] = field(default_factory=dict)

    def of(self, peer: PeerId) -> Faults:
        return self.faults.setdefault(peer, Faults())


class FakeExchange:
    """Implements `swarm.exchange.Exchange` for one peer of a `World`."""

    def __init__(self, world: World, peer: PeerId) -> None:
        self.world, self.peer, self.chunk_bytes = world, peer, CHUNK_BYTES
        self._aggregates: Sequence[int] = ()

    @property
    def faults(self) -> Faults:
        return self.world.of(self.peer)

    async def publish(self, commit: Commit, expires_at: float, timeout_seconds: float) -> bool:
        await asyncio.sleep(self.faults.latency_seconds)
        key = (commit.module, commit.round, commit.shard)
        if self.faults.cannot_publish or self.faults.down:
            # As the real directory: one's own node holds it all the same.
            self.world.own.setdefault(key, {})[self.peer] = Signed(commit, self.peer, expires_at)
            return False
        self.world.commits.setdefault(key, {})[self.peer] = Signed(commit, self.peer, expires_at)
        return True

    async def commits(self, module: str, round_: Round, shard: int, timeout_seconds: float) -> list[Signed[Commit]]:
        await asyncio.sleep(self.faults.latency_seconds)
        key = (module, round_, shard)
        own = {p: s for p, s in self.world.own.get(key, {}).items() if p == self.peer}
        found = {**self.world.commits.get(key, {}), **own}
        return [s for p, s in sorted(found.items()) if p == self.peer or not (self.faults.blind or self.faults.down)]

    async def replicas(self, module: str, timeout_seconds: float) -> list[Signed[Replica]]:
        await asyncio.sleep(self.faults.latency_seconds)
        return [] if self.faults.blind or self.faults.down else list(self.world.announced.get(module, {}).values())

    async def offer(self, buffers: Sequence[Buffer], reveal_at: float) -> BlobRef:
        if self.faults.disk_full:
            raise DiskFull("the disk is full")
        served = b"".join(buffers) if self.faults.garbage is None else self.faults.garbage
        ref = ChunkList.of([served]).ref
        self.world.blobs.setdefault(ref.id, {}).setdefault(self.peer, (served, reveal_at))  # as the real store
        return ref

    async def settle(self) -> None:
        if self.faults.disk_full:
            raise DiskFull("the disk is full")
        self.world.settled |= {blob for blob, served in self.world.blobs.items() if self.peer in served}

    def offer_state(self, state: ReplicaState) -> None:
        blob = b"".join(state.buffers)
        self.world.blobs.setdefault(state.digest, {})[self.peer] = (blob, 0.0)
        record = Replica(
            module=state.module,
            round=state.round,
            digest=bytes.fromhex(state.digest),
            session=bytes(16),
            started=0.0,
            addresses=[],
        )
        self.world.announced.setdefault(state.module, {})[self.peer] = Signed(record, self.peer, 1e9)

    async def fetch(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float, may_come: bool = True
    ) -> memoryview:
        blob, _ = await self._get(ref, holders, timeout_seconds)
        self.world.blobs[ref.id][self.peer] = (blob, 0.0)
        return memoryview(blob)

    async def fetch_chunks(
        self,
        ref: BlobRef,
        holder: PeerId,
        indexes: Sequence[int],
        timeout_seconds: float,
        on_chunk: OnChunk,
        kept: Kept | None = None,
    ) -> None:
        world = self.world
        if holder == self.peer:
            blob = world.blobs[ref.id][holder][0]
        elif indexes and world.of(holder).shows and all(world.shown[holder][ref.id, index] > 0 for index in indexes):
            await asyncio.sleep(min(self.faults.latency_seconds, timeout_seconds))
            if self.faults.latency_seconds > timeout_seconds:
                raise BlobUnavailable("too slow")
            blob = next(iter(world.blobs[ref.id].values()))[0]
            world.shown_to_others += 1
        else:
            blob, _ = await self._get(ref, [holder], timeout_seconds)
            self.world.received[self.peer] += len(indexes)
        if kept is not None and holder != self.peer:
            kept.extend((ref.id, index) for index in indexes)
            world.shown[self.peer].update((ref.id, index) for index in indexes)
        self.world.of(holder).asked |= {(self.peer, index) for index in indexes}
        for index in indexes:
            on_chunk(index, memoryview(blob)[index * self.chunk_bytes : (index + 1) * self.chunk_bytes])

    def drop_chunks(self, kept: Kept) -> None:
        self.world.shown[self.peer].subtract(kept)
        kept.clear()

    def _telling(self, peer: PeerId, module: str, round_: Round, segment: int) -> asyncio.Future[Told | None]:
        return self.world.told.setdefault((module, round_, peer, segment), asyncio.get_running_loop().create_future())

    def begin_slices(self, module: str, round_: Round, segments: Sequence[int], members: Collection[PeerId]) -> None:
        for segment in segments:
            self._telling(self.peer, module, round_, segment)
        self._aggregates = segments
        self.faults.asked.clear()

    def tell_slice(self, module: str, round_: Round, segment: int, told: Aggregated, data: Buffer) -> None:
        if not self.faults.mute:
            to_all = not self.faults.two_faced and not self.faults.victims
            served = self.faults.lie(data) if self.faults.lie and to_all else data
            self._telling(self.peer, module, round_, segment).set_result((told, served))

    def end_slices(self, module: str, round_: Round) -> None:
        for segment in [] if self.faults.mute else self._aggregates:
            telling = self._telling(self.peer, module, round_, segment)
            if not telling.done():
                telling.set_result(None)

    def window(self, peer: PeerId) -> int:
        return 2

    async def told_slice(
        self, peer: PeerId, module: str, round_: Round, segment: int, size: int, timeout_seconds: float
    ) -> tuple[Aggregated, memoryview]:
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.sleep(self.faults.latency_seconds)
                told = await asyncio.shield(self._telling(peer, module, round_, segment))
                await asyncio.sleep(self.faults.latency_seconds)
        except TimeoutError:
            raise RpcTimeout("no answer before the deadline") from None
        if told is None:
            raise RpcRemoteError("NothingTold", "nothing was aggregated")
        self.world.received[self.peer] += 1
        theirs, data = self.world.of(peer), told[1]
        if theirs.two_faced and theirs.lie:
            await asyncio.sleep(0.2)
            data = data if (self.peer, segment) in theirs.asked else theirs.lie(data)
        if theirs.lie and self.peer in theirs.victims:
            data = theirs.lie(data)
        return told[0], memoryview(data)

    def hear_slices(self, module: str, round_: Round, digests: Sequence[bytes]) -> None:
        self.world.heard[module, round_, self.peer] = list(digests)

    async def heard_slices(
        self, peer: PeerId, module: str, round_: Round, segments: int, timeout_seconds: float
    ) -> list[bytes]:
        await asyncio.sleep(min(self.faults.latency_seconds, timeout_seconds))
        if self.faults.latency_seconds > timeout_seconds:
            raise RpcTimeout("no answer before the deadline")
        return self.world.heard[module, round_, peer]

    async def fetch_state(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float
    ) -> tuple[memoryview, dict[PeerId, int]]:
        blob, holder = await self._get(ref, holders, timeout_seconds)
        return memoryview(blob), {holder: len(blob)}

    async def _get(self, ref: BlobRef, holders: Sequence[PeerId], timeout_seconds: float) -> tuple[bytes, PeerId]:
        if self.faults.latency_seconds > timeout_seconds:
            await asyncio.sleep(timeout_seconds)
            raise BlobUnavailable("too slow")
        await asyncio.sleep(self.faults.latency_seconds)
        for holder in holders:
            theirs = self.world.of(holder)
            held = self.world.blobs.get(ref.id, {}).get(holder)
            if held is None or theirs.down or self.faults.down or self.peer in theirs.hides_from:
                continue
            assert held[1] <= self.world.now + 1e-6, "a blob was served before its reveal"
            return held[0], holder
        await asyncio.sleep(timeout_seconds)
        raise BlobUnavailable(f"nobody of {len(holders)} serves {ref.id[:8]}")

    def network_size(self) -> float:
        return 1.0

    def check_download(self, size: int, seconds: float) -> None: ...

    def traffic(self) -> tuple[int, int]:
        return 0, 0
