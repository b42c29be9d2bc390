"""What a gossip round needs of the network, as a small protocol, and the real thing behind it.

Tests put a fake behind the protocol; `NetworkExchange` is the DHT directory plus content-addressed blobs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from potluck.dht.directory import Directory
from potluck.dht.records import Commit, Replica, Signed, Weights
from potluck.errors import CapTooLow, PotluckError
from potluck.net.blobs import CHUNK_BYTES, BlobId, BlobRef, BlobStore
from potluck.net.fetch import FetchReport, Kept, fetch, fetch_chunks
from potluck.net.host import PeerId
from potluck.net.pace import Pace
from potluck.net.rpc import Rpc
from potluck.net.wire import Buffer
from potluck.swarm.phases import Round
from potluck.swarm.recycled import Recycled
from potluck.swarm.slice_board import SliceBoard
from potluck.swarm.slices import Aggregated
from potluck.swarm.state import ReplicaState

log = logging.getLogger(__name__)

#: Memory that recent states may take beyond the current and the previous one, which are always served.
STATE_BYTES = 256 * 2**20
#: A state that was asked for within this time is still being downloaded.
WANTED_SECONDS = 30.0
#: Of a chunk each, kept to be received into again.
MOST_BUFFERS = 256

#: (index, data): a chunk that was verified. The data may be kept for as long as it is needed.
OnChunk = Callable[[int, memoryview], None]


class Exchange(Protocol):
    """Times are seconds; `reveal_at` and `expires_at` are UTC."""

    async def publish(self, commit: Commit, expires_at: float, timeout_seconds: float) -> bool:
        """Store a commit where its group looks for it. False if others cannot have seen it."""
        ...

    async def commits(self, module: str, round_: Round, shard: int, timeout_seconds: float) -> list[Signed[Commit]]: ...

    async def replicas(self, module: str, timeout_seconds: float) -> list[Signed[Replica]]:
        """Who announces to have a state of the module."""
        ...

    async def offer(self, buffers: Sequence[Buffer], reveal_at: float) -> BlobRef:
        """Serve a blob, of buffers one behind the other, from `reveal_at` on; they must not change until `settle`.
        Raises DiskFull, and CapTooLow where nobody could have it in time."""
        ...

    async def settle(self) -> None:
        """Write to disk what was offered: a restart will serve it again."""
        ...

    def offer_state(self, state: ReplicaState) -> None:
        """Serve a state whose digest is known; old ones are dropped."""
        ...

    async def fetch(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float, may_come: bool
    ) -> memoryview:
        """A contribution or a fragment. `may_come`: who does not have it may get it later. Raises BlobUnavailable or
        BlobError."""
        ...

    async def fetch_chunks(
        self,
        ref: BlobRef,
        holder: PeerId,
        indexes: Sequence[int],
        timeout_seconds: float,
        on_chunk: OnChunk,
        kept: Kept | None = None,
    ) -> None:
        """Chunks `indexes` of a blob, each told as soon as it was verified. With `kept`, where they are noted, we serve
        them, too, until `drop_chunks`. Raises BlobUnavailable or BlobError."""
        ...

    def drop_chunks(self, kept: Kept) -> None:
        """Serve them no more."""
        ...

    def begin_slices(self, module: str, round_: Round, segments: Sequence[int], members: Collection[PeerId]) -> None:
        """Members who ask for segments that we aggregate in a round are to wait."""
        ...

    def tell_slice(self, module: str, round_: Round, segment: int, told: Aggregated, data: Buffer) -> None:
        """Serve a segment that we aggregated, for as long as contributions."""
        ...

    def end_slices(self, module: str, round_: Round) -> None:
        """Segments that were not told by now will not be."""
        ...

    def window(self, peer: PeerId) -> int:
        """How many of its segments to ask `peer` for at once: from 1 to `WINDOW`."""
        ...

    async def told_slice(
        self, peer: PeerId, module: str, round_: Round, segment: int, size: int, timeout_seconds: float
    ) -> tuple[Aggregated, memoryview]:
        """A segment of `size` bytes that another aggregates, as soon as it has. Raises NetworkError, ProtocolError."""
        ...

    def hear_slices(self, module: str, round_: Round, digests: Sequence[bytes]) -> None:
        """Tell whoever asks what was told to us: a digest for each segment, or NOT_HEARD."""
        ...

    async def heard_slices(
        self, peer: PeerId, module: str, round_: Round, segments: int, timeout_seconds: float
    ) -> list[bytes]:
        """What was told to another. Raises NetworkError, ProtocolError."""
        ...

    async def fetch_state(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float
    ) -> tuple[memoryview, dict[PeerId, int]]:
        """A state, in chunks from several holders at once, and the bytes that each gave."""
        ...

    def network_size(self) -> float:
        """How many peers there are, about: what a replica goes by until it has seen a round."""
        ...

    def check_download(self, size: int, seconds: float) -> None:
        """Raises CapTooLow if so many bytes cannot come in that time under our own cap."""
        ...

    def traffic(self) -> tuple[int, int]:
        """(bytes sent, bytes received) so far, everything counted."""
        ...


class NetworkExchange:
    """`retain_seconds`: how long contributions are kept for those who catch up; `keep_states`: states served.

    `on_progress(bytes done, bytes in all)` follows a state's download. `pull_seconds`: what a round leaves for
    contributions to be pulled; `uploads`: how often as much as one has to pass our uplink in that time. `slices`: where
    a sliced exchange says what it aggregated.
    """

    def __init__(
        self,
        directory: Directory,
        rpc: Rpc,
        store: BlobStore,
        retain_seconds: float,
        keep_states: int,
        on_progress: Callable[[int, int], None] | None = None,
        pull_seconds: float = math.inf,
        uploads: int = 1,
        slices: SliceBoard | None = None,
    ) -> None:
        self._directory, self._rpc, self._store = directory, rpc, store
        self._retain_seconds, self._keep_states = retain_seconds, keep_states
        self._on_progress, self._slices = on_progress, slices
        self._pull_seconds, self._uploads = pull_seconds, uploads
        self._states: list[ReplicaState] = []
        self._kept: deque[tuple[float, BlobId]] = deque()
        #: Rounds of which segments are served.
        self._sliced: deque[tuple[float, str, Round]] = deque()
        #: Chunks of others' blobs that are served.
        self._lent: list[Kept] = []
        self._buffers = Recycled(CHUNK_BYTES, np.uint8, MOST_BUFFERS)
        store.remove_older(retain_seconds)  # of an earlier session

    async def publish(self, commit: Commit, expires_at: float, timeout_seconds: float) -> bool:
        return await self._directory.publish(commit, expires_at, timeout_seconds)

    async def commits(self, module: str, round_: Round, shard: int, timeout_seconds: float) -> list[Signed[Commit]]:
        view = await self._directory.commits(module, round_, shard, timeout_seconds=timeout_seconds)
        return list(view.records)

    async def weights(self, module: str, round_: Round, timeout_seconds: float) -> tuple[list[Signed[Weights]], bool]:
        """Validators' weights for a round, and whether the search for them was complete."""
        view = await self._directory.weights(module, round_, timeout_seconds=timeout_seconds)
        return list(view.records), view.complete

    async def publish_weights(self, weights: Weights, expires_at: float, timeout_seconds: float) -> bool:
        return await self._directory.publish(weights, expires_at, timeout_seconds)

    async def replicas(self, module: str, timeout_seconds: float) -> list[Signed[Replica]]:
        view = await self._directory.replicas(module, timeout_seconds=timeout_seconds)
        return list(view.records)

    async def offer(self, buffers: Sequence[Buffer], reveal_at: float) -> BlobRef:
        size = sum(map(len, buffers))
        # To commit to it all the same would leave the others without it, and us with a state of our own.
        need = "a contribution of {:.2f} MB is to be had"
        if self._uploads > 1:
            need += ", and as much of what is aggregated here,"
        _check_cap("upload", self._rpc.upload, size, self._pull_seconds, need, self._uploads)
        ref = await asyncio.to_thread(self._store.hold, *buffers, reveal_at=reveal_at)
        self._keep(ref.id)
        return ref

    async def settle(self) -> None:
        await asyncio.to_thread(self._store.write_held)

    def offer_state(self, state: ReplicaState) -> None:
        if any(served.digest == state.digest for served in self._states):
            return
        self._states.append(state)
        self._store.add_memory(state.chunks, state.buffers)
        most = min(self._keep_states, 2 + max(0, STATE_BYTES // state.ref.size))
        old = list(self._states)[: max(0, len(self._states) - most)]
        # Who is downloading one now may go on: of those only the newest stays, or joiners could fill our memory.
        wanted = [one.digest for one in old if self._store.idle_seconds(one.digest) < WANTED_SECONDS][-1:]
        for one in old:
            if one.digest not in wanted:
                self._states.remove(one)
                self._store.drop_memory(one.digest)

    async def fetch(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float, may_come: bool
    ) -> memoryview:
        blob = await fetch(
            self._rpc,
            ref,
            holders,
            timeout_seconds=timeout_seconds,
            max_bytes=max_bytes,
            store=self._store,
            may_come=may_come,
        )
        self._keep(ref.id)
        return blob

    async def fetch_chunks(
        self,
        ref: BlobRef,
        holder: PeerId,
        indexes: Sequence[int],
        timeout_seconds: float,
        on_chunk: OnChunk,
        kept: Kept | None = None,
    ) -> None:
        if kept is not None and not any(one is kept for one in self._lent):
            self._lent.append(kept)
        await fetch_chunks(
            self._rpc,
            ref,
            holder,
            indexes,
            timeout_seconds=timeout_seconds,
            on_chunk=on_chunk,
            room=self._room,
            store=self._store,
            kept=kept,
        )

    def drop_chunks(self, kept: Kept) -> None:
        self._lent = [one for one in self._lent if one is not kept]
        for blob, index in kept:
            self._store.drop_chunk(blob, index)
        kept.clear()

    def begin_slices(self, module: str, round_: Round, segments: Sequence[int], members: Collection[PeerId]) -> None:
        now = asyncio.get_running_loop().time()
        self._board.begin(module, round_, segments, members)
        self._sliced.append((now, module, round_))
        while self._sliced[0][0] < now - self._retain_seconds:
            self._board.forget(*self._sliced.popleft()[1:])

    def tell_slice(self, module: str, round_: Round, segment: int, told: Aggregated, data: Buffer) -> None:
        self._board.tell(module, round_, segment, told, data)

    def end_slices(self, module: str, round_: Round) -> None:
        self._board.end(module, round_)

    def window(self, peer: PeerId) -> int:
        return self._rpc.window(peer)

    async def told_slice(
        self, peer: PeerId, module: str, round_: Round, segment: int, size: int, timeout_seconds: float
    ) -> tuple[Aggregated, memoryview]:
        into = self._room(size)
        return await self._board.ask(peer, module, round_, segment, into, timeout_seconds), into

    def hear_slices(self, module: str, round_: Round, digests: Sequence[bytes]) -> None:
        self._board.hear(module, round_, digests)

    async def heard_slices(
        self, peer: PeerId, module: str, round_: Round, segments: int, timeout_seconds: float
    ) -> list[bytes]:
        return await self._board.ask_heard(peer, module, round_, segments, timeout_seconds)

    @property
    def _board(self) -> SliceBoard:
        assert self._slices is not None
        return self._slices

    def _room(self, size: int) -> memoryview:
        return self._buffers.any().data[:size]

    async def fetch_state(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float
    ) -> tuple[memoryview, dict[PeerId, int]]:
        # Page-aligned, so that a state's float32 arrays lie aligned where they were received.
        into = memoryview(bytearray(ref.size))
        report = FetchReport()
        await fetch(
            self._rpc,
            ref,
            holders,
            timeout_seconds=timeout_seconds,
            max_bytes=max_bytes,
            into=into,
            on_progress=self._on_progress,
            report=report,
            may_come=False,  # a state that everybody dropped does not come back: another is asked for
        )
        return into, report.bytes_by_holder

    def close(self) -> None:
        """Serve nothing of this replica any more but what is on disk."""
        for kept in list(self._lent):
            self.drop_chunks(kept)
        for state in self._states:
            self._store.drop_memory(state.digest)
        self._states.clear()
        while self._sliced:
            self._board.forget(*self._sliced.popleft()[1:])
        try:
            self._store.write_held()
        except PotluckError as error:
            log.warning("swarm.exchange.unwritten error=%s", error)

    def _keep(self, blob: BlobId) -> None:
        """Contributions go when nobody can need them any more; the quota is only the last resort."""
        now = asyncio.get_running_loop().time()
        self._kept.append((now, blob))
        while self._kept and self._kept[0][0] < now - self._retain_seconds:
            self._store.remove(self._kept.popleft()[1])

    def network_size(self) -> float:
        return self._directory.network_size()

    def check_download(self, size: int, seconds: float) -> None:
        need = "a round's contributions, {:.2f} MB, are to be had, or the group's state is loaded again and again,"
        _check_cap("download", self._rpc.download, size, seconds, need)

    def traffic(self) -> tuple[int, int]:
        return self._rpc.bytes_sent, self._rpc.bytes_received


def _check_cap(way: str, pace: Pace, size: int, seconds: float, need: str, copies: int = 1) -> None:
    """`need`: a sentence with a place for megabytes."""
    needed, rate = pace.seconds(size), pace.rate
    if rate is not None and copies * needed > seconds:
        enough = 2 * needed / seconds * rate  # also where one copy is needed: others share the line
        raise CapTooLow(
            f"the {way} cap of {rate / 1e3:.0f} kB/s is too low for this run: {need.format(size / 1e6)} "
            f"within {seconds:.1f} s; raise the cap to {math.ceil(enough / 1e3)} kB/s (room for two), or leave"
        )
