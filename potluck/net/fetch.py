"""Fetching a blob: verified chunks, from several holders in parallel, resumed where an earlier fetch stopped.

A single loop decides who is asked for what; requests only carry bytes and check hashes. A holder that lies is dropped
at its first chunk; one that is busy or has the blob not yet is asked again later; near the end the slow are overtaken.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from potluck.errors import BlobError, BlobUnavailable, PotluckError, RpcRefused, RpcRemoteError
from potluck.net.blobs import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    BlobId,
    BlobNotFound,
    BlobNotRevealed,
    BlobRef,
    BlobStore,
    ChunkList,
    chunk_count,
    chunk_span,
)
from potluck.net.host import PeerId
from potluck.net.ranges import call_by_ranges
from potluck.net.rpc import Rpc, short

log = logging.getLogger(__name__)


@dataclass
class FetchReport:
    """What happened during a fetch, also when it failed."""

    bytes_by_holder: dict[PeerId, int] = field(default_factory=dict)
    resumed_bytes: int = 0
    """Found on disk from an earlier, interrupted fetch."""
    retries: int = 0
    """Requests that failed and were made again."""
    liars: list[PeerId] = field(default_factory=list)
    """Holders that sent bytes which are not what the id commits to."""
    reasons: dict[PeerId, str] = field(default_factory=dict)
    """The last failure of each holder that had one."""


#: Chunks of others' blobs that a store serves: (blob, index).
Kept = list[tuple[BlobId, int]]
#: (bytes done, bytes in total)
OnProgress = Callable[[int, int], None]

#: A holder whose stream breaks, or whose handler fails, this often in a row is given up.
_MAX_FAILURES = 4
_MIN_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 1.0
#: Near the end, a chunk that takes this many times longer than the others is asked of an idle holder too.
_SLOW_FACTOR = 3.0
_SLOW_MIN_SECONDS = 0.25
_SLOW_FIRST_SECONDS = 1.0
#: A request for the chunk list goes by this index.
_LIST = -1


async def fetch(
    rpc: Rpc,
    ref: BlobRef,
    holders: Sequence[PeerId],
    *,
    timeout_seconds: float,
    max_bytes: int,
    store: BlobStore | None = None,
    into: memoryview | None = None,
    on_progress: OnProgress | None = None,
    window: int = 4,
    report: FetchReport | None = None,
    may_come: bool = True,
) -> memoryview:
    """The blob's bytes, every chunk verified, from all holders in parallel (`window` requests each).

    With `store` the chunks are kept on disk as they come, so that a later fetch resumes, and the blob is in
    the store afterwards. `into` (exactly `ref.size` bytes) receives the data. `report` is filled in, also when
    the fetch fails. `may_come`: a holder that does not have it yet is asked again; without,
    its word is final. Raises BlobError if `ref.size` exceeds `max_bytes`; BlobUnavailable, with each holder's
    reason, if nobody delivers in time; UserError if the store is full. A retry is safe, and resumes with
    `store`.
    """
    if not 0 <= ref.size <= max_bytes:
        raise BlobError(f"blob {ref.id[:12]} has {ref.size} bytes; at most {max_bytes} are expected here")
    if into is not None and len(into) != ref.size:
        raise ValueError(f"a buffer of {len(into)} bytes for a blob of {ref.size}")
    if store is not None and _is_here(store, ref):
        return _deliver(store.open(ref.id), into)
    if ref.size == 0:
        if ChunkList(0, b"").blob_id != ref.id:
            raise BlobError(f"blob {ref.id[:12]} is not empty")
        return memoryview(b"")
    report = report or FetchReport()
    job = _Fetch(rpc, ref, holders, timeout_seconds, lambda _: window, on_progress, report, may_come)
    try:
        if ref.size <= CHUNK_BYTES:
            data = into if into is not None else memoryview(bytearray(ref.size))
            await job.receive([0], data.__getitem__)
            if store is not None:
                store.put(data)
            return data
        if (chunks := store.partial_chunks(ref.id) if store is not None else None) is None:
            chunks = await job.learn_list()
        job.chunks = chunks
        target = store.begin_partial(chunks) if store is not None else None
        if store is None or target is None:
            data = into if into is not None else memoryview(bytearray(ref.size))
            await job.receive(range(chunk_count(ref.size)), data.__getitem__)
            return data
        try:
            missing = await asyncio.to_thread(_missing_chunks, chunks, target)
            job.resumed(missing)
            await job.receive(missing, target.__getitem__)
            return _deliver(store.finish_partial(ref.id), into)
        finally:
            store.pause_partial(ref.id)
    finally:
        await job.cancel(list(job.requests))


async def fetch_chunks(
    rpc: Rpc,
    ref: BlobRef,
    holder: PeerId,
    indexes: Sequence[int],
    *,
    timeout_seconds: float,
    on_chunk: Callable[[int, memoryview], None],
    room: Callable[[int], memoryview],
    store: BlobStore,
    kept: Kept | None = None,
) -> None:
    """Some chunks of a blob, asked for in the order of `indexes`, if it is not in `store`.
    `on_chunk(index, data)` has each as soon as it was verified. `room(size)`: where one is received. With `kept`,
    where they are noted, the store serves them, too, until its `drop_chunk`. Raises BlobUnavailable or BlobError."""
    if _is_here(store, ref):
        for index in indexes:
            on_chunk(index, store.chunk(ref.id, index))
        return
    job = _Fetch(rpc, ref, [holder], timeout_seconds, rpc.window, None, FetchReport(), True, alone=True)
    try:
        if ref.size > CHUNK_BYTES:
            await job.learn_list()

        def came(index: int, data: memoryview) -> None:
            if kept is not None:
                store.add_chunk(job.chunks or ChunkList.of([data]), index, data)
                kept.append((ref.id, index))
            on_chunk(index, data)

        await job.receive(indexes, lambda span: room(span.stop - span.start), came)
    finally:
        await job.cancel(list(job.requests))


def _is_here(store: BlobStore, ref: BlobRef) -> bool:
    """Raises BlobError if the blob of this id has another size."""
    if not store.has(ref.id):
        return False
    if store.chunk_list(ref.id).size != ref.size:
        raise BlobError(f"blob {ref.id[:12]} does not have {ref.size} bytes")
    return True


def _deliver(data: memoryview, into: memoryview | None) -> memoryview:
    if into is None:
        return data
    into[:] = data
    return into


def _missing_chunks(chunks: ChunkList, data: memoryview) -> list[int]:
    """By hash, not by a record of what was received: after a power failure only the bytes count."""
    found = ChunkList.of([data])
    return [index for index in range(chunk_count(chunks.size)) if found.digest(index) != chunks.digest(index)]


class _Holder:
    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.in_flight = 0
        self.failures = 0  # in a row
        self.backoff_seconds = _MIN_BACKOFF_SECONDS
        self.retry_at = 0.0
        self.dropped = False


@dataclass(eq=False)
class _Request:
    holder: _Holder
    index: int
    buffer: memoryview
    direct: bool
    """Whether `buffer` is the chunk's final place. Only one request at a time may write there."""
    started_at: float


class _Fetch:
    """One fetch. A single loop decides who is asked for what; requests only carry bytes and check hashes."""

    def __init__(
        self,
        rpc: Rpc,
        ref: BlobRef,
        holders: Sequence[PeerId],
        timeout_seconds: float,
        window: Callable[[PeerId], int],
        on_progress: OnProgress | None,
        report: FetchReport,
        may_come: bool,
        alone: bool = False,
    ) -> None:
        self.chunks: ChunkList | None = None
        self.requests: dict[asyncio.Task[int], _Request] = {}
        self._rpc = rpc
        self._ref = ref
        self._holders = [_Holder(peer) for peer in dict.fromkeys(holders)]
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_seconds
        self._window = window
        self._on_progress = on_progress
        self._report = report
        self._may_come, self._alone = may_come, alone
        self._place: Callable[[slice], memoryview] = lambda span: memoryview(b"")
        self._on_chunk: Callable[[int, memoryview], None] = lambda index, data: None
        self._waiting: deque[int] = deque()
        self._missing: set[int] = set()
        self._done_bytes = 0
        self._answers = 0
        self._answer_seconds = 0.0

    def resumed(self, missing: Sequence[int]) -> None:
        size = self._ref.size
        self._done_bytes = size - sum(_span_length(size, index) for index in missing)
        self._report.resumed_bytes = self._done_bytes

    async def learn_list(self) -> ChunkList:
        """The blob's chunk list, which requests are checked with from now on. Raises BlobUnavailable."""
        await self.receive([_LIST], lambda span: memoryview(b""))
        assert self.chunks is not None
        return self.chunks

    async def receive(
        self,
        indexes: Sequence[int],
        place: Callable[[slice], memoryview],
        on_chunk: Callable[[int, memoryview], None] = lambda index, data: None,
    ) -> None:
        """Until all of `indexes` are in the places of their spans. Raises BlobUnavailable."""
        self._place, self._on_chunk = place, on_chunk
        self._waiting = deque(indexes)
        self._missing = set(indexes)
        while self._missing:
            now = self._loop.time()
            self._ask(now)
            if now >= self._deadline:
                raise self._unavailable("before the deadline")
            if not self.requests and all(holder.dropped for holder in self._holders):
                raise self._unavailable("any more")
            wake_at = self._wake_at(now)
            if not self.requests:
                await asyncio.sleep(wake_at - now)
                continue
            done, _ = await asyncio.wait(self.requests, timeout=wake_at - now, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self.requests if task in done]:  # in order: a replayed run is the same run
                await self._settle(task)

    async def cancel(self, tasks: list[asyncio.Task[int]]) -> None:
        """When this returns, none of them writes into its buffer any more."""
        for task in tasks:
            self.requests.pop(task).holder.in_flight -= 1
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- deciding

    def _ask(self, now: float) -> None:
        """Give every holder with room something to do, one request at a time, so that the start is even."""
        while True:
            usable = [
                holder
                for holder in self._holders
                if not holder.dropped and holder.retry_at <= now and holder.in_flight < self._window(holder.peer)
            ]
            asked = False
            for holder in sorted(usable, key=lambda each: each.in_flight):
                index = None
                if self._waiting:
                    index = self._waiting.popleft()
                elif not holder.in_flight:
                    index = self._slow_index(now)
                if index is None:
                    break  # idle holders come first: for the others there is nothing either
                self._begin(holder, index, now)
                asked = True
            if not asked:
                return

    def _slow_index(self, now: float) -> int | None:
        """The endgame: what an idle holder could deliver before the one that was asked."""
        patience = self._patience_seconds()
        for request in self._asked_once():
            if now >= request.started_at + patience:  # as `_wake_at` adds: the difference may round below
                return request.index
        return None

    def _asked_once(self) -> list[_Request]:
        counts = Counter(request.index for request in self.requests.values())
        return [request for request in self.requests.values() if counts[request.index] == 1]

    def _patience_seconds(self) -> float:
        # What our own cap makes slow would not come sooner from another holder.
        under_cap = self._rpc.download.seconds(sum(len(request.buffer) for request in self.requests.values()))
        if not self._answers:
            return max(_SLOW_FIRST_SECONDS, _SLOW_FACTOR * under_cap)
        return max(_SLOW_MIN_SECONDS, _SLOW_FACTOR * max(under_cap, self._answer_seconds / self._answers))

    def _wake_at(self, now: float) -> float:
        """When something can be decided though no request has ended."""
        usable = [holder for holder in self._holders if not holder.dropped]
        times = [self._deadline, *(holder.retry_at for holder in usable if holder.retry_at > now)]
        if any(holder.retry_at <= now and not holder.in_flight for holder in usable):
            patience = self._patience_seconds()
            times += [request.started_at + patience for request in self._asked_once()]
        return max(now, min(times))

    # --- one request

    def _begin(self, holder: _Holder, index: int, now: float) -> None:
        direct = not any(each.index == index and each.direct for each in self.requests.values())
        buffer = memoryview(b"")
        if index != _LIST:
            span = chunk_span(self._ref.size, index)
            buffer = self._place(span) if direct else memoryview(bytearray(span.stop - span.start))
        request = _Request(holder, index, buffer, direct, now)
        task = self._loop.create_task(self._get_list(request) if index == _LIST else self._get_chunk(request))
        self.requests[task] = request
        holder.in_flight += 1

    async def _get_list(self, request: _Request) -> int:
        reply = await self._rpc.call(
            request.holder.peer,
            "blob.list",
            {"id": self._ref.id},
            timeout_seconds=self._deadline - self._loop.time(),
            max_response_bytes=chunk_count(self._ref.size) * DIGEST_BYTES,
            lane="bulk",
        )
        chunks = ChunkList(self._ref.size, bytes(reply.body))
        if chunks.blob_id != self._ref.id:
            raise BlobError("sent a chunk list that does not have this id")
        self.chunks = chunks
        return len(reply.body)

    async def _get_chunk(self, request: _Request) -> int:
        head: dict[str, Any] = {"id": self._ref.id, "index": request.index}
        if self._alone:
            head["alone"] = True
        # A whole contribution goes out in turns, each for a chunk: small ranges would give everybody one at once.
        rpc, peer, into = self._rpc, request.holder.peer, request.buffer
        await call_by_ranges(rpc, peer, "blob.get", head, into, self._deadline, measured=self._alone)
        # Here and not in a thread: 0.15 ms per chunk, while it is in the cache. Handing it to another core made
        # fetches slower.
        digest = blake3(request.buffer).digest()
        if self.chunks is not None:
            genuine = digest == self.chunks.digest(request.index)
        else:
            genuine = ChunkList(self._ref.size, digest).blob_id == self._ref.id
        if not genuine:
            raise BlobError(f"sent bytes for chunk {request.index} that do not have its hash")
        return len(request.buffer)

    async def _settle(self, task: asyncio.Task[int]) -> None:
        request = self.requests.pop(task, None)
        if request is None:  # its chunk came from another holder in the same turn
            return
        holder, index = request.holder, request.index
        holder.in_flight -= 1
        try:
            received = task.result()
        except PotluckError as error:
            self._failed(holder, error)
            if index in self._missing and not any(each.index == index for each in self.requests.values()):
                self._waiting.appendleft(index)
            return
        holder.failures = 0
        holder.backoff_seconds = _MIN_BACKOFF_SECONDS
        self._answers += 1
        self._answer_seconds += self._loop.time() - request.started_at
        if index not in self._missing:
            return
        self._missing.discard(index)
        await self.cancel([other for other, each in self.requests.items() if each.index == index])
        by_holder = self._report.bytes_by_holder
        by_holder[holder.peer] = by_holder.get(holder.peer, 0) + received
        if index != _LIST:
            if not request.direct:
                self._place(chunk_span(self._ref.size, index))[:] = request.buffer
            self._on_chunk(index, request.buffer)
            self._done_bytes += received
            if self._on_progress is not None:
                self._on_progress(self._done_bytes, self._ref.size)

    def _failed(self, holder: _Holder, error: PotluckError) -> None:
        now = self._loop.time()
        self._report.reasons[holder.peer] = str(error)
        self._report.retries += 1
        if isinstance(error, BlobError):
            holder.dropped = True
            if holder.peer not in self._report.liars:
                self._report.liars.append(holder.peer)
            log.warning("net.blobs.liar peer=%s blob=%s error=%s", holder.peer, self._ref.id, error)
            return
        if now < holder.retry_at:
            return  # one break ends a whole window of requests: it counts once
        if isinstance(error, RpcRefused):
            holder.retry_at = now + error.retry_after_seconds
            return
        if not (isinstance(error, RpcRemoteError) and error.kind in _MAY_COME):
            holder.failures += 1
            holder.dropped = holder.failures >= _MAX_FAILURES
        elif not self._may_come and error.kind == BlobNotFound.__name__:
            holder.dropped = True
        holder.retry_at = now + holder.backoff_seconds
        holder.backoff_seconds = min(2 * holder.backoff_seconds, _MAX_BACKOFF_SECONDS)

    def _unavailable(self, when: str) -> BlobUnavailable:
        reasons = self._report.reasons
        lines = [f"\n  {short(each.peer)}: {reasons.get(each.peer, 'no answer')}" for each in self._holders]
        missing = f"{self._ref.size - self._done_bytes} of {self._ref.size} bytes missing"
        return BlobUnavailable(
            f"no holder delivers blob {self._ref.id[:12]} {when} ({missing})"
            + ("".join(lines) or ": no holder is known")
        )


#: A holder that says this may have the blob a moment later.
_MAY_COME = (BlobNotFound.__name__, BlobNotRevealed.__name__)


def _span_length(size: int, index: int) -> int:
    span = chunk_span(size, index)
    return int(span.stop - span.start)
