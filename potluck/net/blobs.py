"""Content-addressed blobs: named by hash, fetched in verified chunks from any peers that hold them.

    blob id = BLAKE3("potluck.blob.1" | u64 size | u32 chunk bytes | BLAKE3 of each chunk)     (big-endian)

The id commits to the list of chunk hashes (a Merkle tree of depth one), so each chunk is checked when it
comes, a liar is found at its first chunk, chunks come from many holders at once, and an interrupted fetch
resumes.
A blob of one chunk takes one round trip: its only hash is computed from what came.
"""

from __future__ import annotations

import asyncio
import bisect
import errno
import logging
import math
import mmap
import os
import secrets
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NewType

import msgspec
from blake3 import blake3

from potluck.errors import (
    BlobError,
    BlobUnavailable,
    NetworkError,
    PotluckError,
    ProtocolError,
    RpcRefused,
    RpcRemoteError,
    StateError,
    UserError,
)
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc, short
from potluck.net.wire import Buffer

log = logging.getLogger(__name__)

#: Hex BLAKE3 that names a blob.
BlobId = NewType("BlobId", str)

CHUNK_BYTES = 1 << 20
_DIGEST_BYTES = 32
_ID_PREFIX = b"potluck.blob.1"
_ID_HEADER = struct.Struct(">QI")
#: From this size on hashing is worth threads.
_PARALLEL_HASH_BYTES = 8 * CHUNK_BYTES
#: Open maps kept for serving; a map is address space, not memory.
_MAX_MAPS = 64


class BlobNotFound(NetworkError):
    """This peer does not hold that blob."""


class BlobNotRevealed(NetworkError):
    """This peer holds the blob and serves it later: commit first, reveal after everyone has committed."""


class BlobRef(NamedTuple):
    """What one has to know to fetch a blob."""

    id: BlobId
    size: int


def chunk_count(size: int) -> int:
    return -(-size // CHUNK_BYTES)


def chunk_span(size: int, index: int) -> slice:
    """Where chunk `index` lies in a blob of `size` bytes."""
    return slice(index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, size))


def bytes_view(buffer: Any) -> memoryview:
    """A flat read-only view of bytes on anything with a C-contiguous buffer, a NumPy array for example."""
    return memoryview(buffer).cast("B").toreadonly()


@dataclass(frozen=True)
class ChunkList:
    """The hashes of a blob's chunks, which its id commits to."""

    size: int
    digests: bytes
    chunk_size: int = CHUNK_BYTES

    @property
    def blob_id(self) -> BlobId:
        header = _ID_HEADER.pack(self.size, self.chunk_size)
        return BlobId(blake3(_ID_PREFIX + header + self.digests).hexdigest())

    @property
    def ref(self) -> BlobRef:
        return BlobRef(self.blob_id, self.size)

    def digest(self, index: int) -> bytes:
        return self.digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]

    @classmethod
    def of(cls, buffers: Sequence[Any]) -> ChunkList:
        """Of the buffers' concatenation, which is never made. Takes about 0.15 s per GB and core; blocks."""
        pieces = _Pieces(buffers)
        indexes = range(chunk_count(pieces.size))

        def digest(index: int) -> bytes:
            hasher = blake3()
            for view in pieces.views(chunk_span(pieces.size, index)):
                hasher.update(view)
            return hasher.digest()

        if pieces.size < _PARALLEL_HASH_BYTES:
            return cls(pieces.size, b"".join(map(digest, indexes)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # blake3 lets go of the GIL
            return cls(pieces.size, b"".join(pool.map(digest, indexes)))


class _Pieces:
    """Several buffers read as one."""

    def __init__(self, buffers: Sequence[Any]) -> None:
        self._views = [bytes_view(buffer) for buffer in buffers]
        self._starts: list[int] = []
        self.size = 0
        for view in self._views:
            self._starts.append(self.size)
            self.size += len(view)

    def views(self, span: slice) -> list[memoryview]:
        found = []
        position = span.start
        index = max(bisect.bisect_right(self._starts, position) - 1, 0)
        while position < span.stop:
            view, start = self._views[index], self._starts[index]
            piece = view[position - start : span.stop - start]
            if len(piece):
                found.append(piece)
            position += len(piece)
            index += 1
        return found

    def read(self, span: slice) -> memoryview:
        """Without a copy where the span lies in one buffer."""
        found = self.views(span)
        return found[0] if len(found) == 1 else memoryview(b"".join(found))


class _Meta(msgspec.Struct):
    """What lies beside a blob on disk."""

    size: int
    digests: bytes
    reveal_at: float | None = None
    pinned: bool = False

    @property
    def chunks(self) -> ChunkList:
        return ChunkList(self.size, self.digests)


class BlobStore:
    """Blobs in a directory, up to a quota; and blobs in memory that somebody lent (`add_memory`).

    `<id>.blob` beside `<id>.meta`; `<id>.part` (beside its meta too) is a fetch that has not ended. A blob's
    name appears only when all of it is there. Safe to use from several threads, by one process.
    """

    def __init__(self, root: Path, quota_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self.quota_bytes = quota_bytes
        self._clock = clock
        self._lock = threading.RLock()
        self._metas: OrderedDict[BlobId, _Meta] = OrderedDict()  # oldest first
        self._partial: dict[BlobId, int] = {}  # sizes; oldest first
        self._receiving: set[BlobId] = set()
        self._memory: dict[BlobId, tuple[ChunkList, _Pieces]] = {}
        self._maps: OrderedDict[BlobId, memoryview] = OrderedDict()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {root} ({error.strerror}): choose another --home") from error
        self._scan()

    def _scan(self) -> None:
        """Take over what an earlier process left; remove what it did not finish writing."""
        for path in self.root.glob("*.tmp"):
            path.unlink(missing_ok=True)
        found = []
        for path in self.root.glob("*.meta"):
            blob_id = BlobId(path.stem)
            try:
                meta = msgspec.msgpack.decode(path.read_bytes(), type=_Meta)
                data = self._path(blob_id, "blob")
                whole = data.exists()
                stat = (data if whole else self._path(blob_id, "part")).stat()
                if stat.st_size != meta.size or meta.chunks.blob_id != blob_id:
                    raise ValueError("its size or its id is wrong")
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                log.warning("net.blobs.damaged id=%s error=%s", blob_id, error)
                self._unlink(blob_id)
            else:
                found.append((stat.st_mtime_ns, blob_id, meta, whole))
        for _, blob_id, meta, whole in sorted(found, key=lambda each: each[0]):
            if whole:
                self._metas[blob_id] = meta
            else:
                self._partial[blob_id] = meta.size
        for path in [*self.root.glob("*.blob"), *self.root.glob("*.part")]:
            if path.stem not in self._metas and path.stem not in self._partial:
                path.unlink(missing_ok=True)

    def _path(self, blob_id: BlobId, suffix: str) -> Path:
        return self.root / f"{blob_id}.{suffix}"

    def _unlink(self, blob_id: BlobId) -> None:
        for suffix in ("blob", "part", "meta"):
            self._path(blob_id, suffix).unlink(missing_ok=True)

    # --- what is here

    @property
    def used_bytes(self) -> int:
        """On disk, unfinished fetches included."""
        with self._lock:
            return sum(meta.size for meta in self._metas.values()) + sum(self._partial.values())

    def has(self, blob_id: BlobId) -> bool:
        with self._lock:
            return blob_id in self._metas or blob_id in self._memory

    def is_lent(self, blob_id: BlobId) -> bool:
        """Whether it is served from memory (`add_memory`)."""
        with self._lock:
            return blob_id in self._memory

    def ids(self) -> list[BlobId]:
        """On disk, oldest first."""
        with self._lock:
            return list(self._metas)

    def chunk_list(self, blob_id: BlobId) -> ChunkList:
        with self._lock:
            if blob_id in self._memory:
                return self._memory[blob_id][0]
            if blob_id in self._metas:
                return self._metas[blob_id].chunks
        raise BlobNotFound(f"blob {blob_id[:12]} is not here")

    def open(self, blob_id: BlobId) -> memoryview:
        """The blob without reading it: a map of the file, valid as long as it is referenced."""
        with self._lock:
            if blob_id in self._memory:
                chunks, pieces = self._memory[blob_id]
                return pieces.read(slice(0, chunks.size))
            meta = self._metas.get(blob_id)
            if meta is None:
                raise BlobNotFound(f"blob {blob_id[:12]} is not here")
            view = self._maps.get(blob_id)
            if view is None:
                view = self._maps[blob_id] = _map(self._path(blob_id, "blob"), meta.size)
                if len(self._maps) > _MAX_MAPS:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(blob_id)
            return view

    def read(self, blob_id: BlobId) -> bytes:
        return bytes(self.open(blob_id))

    def chunk(self, blob_id: BlobId, index: int) -> memoryview:
        """Raises BlobNotFound; IndexError if there is no such chunk."""
        with self._lock:
            size = self.chunk_list(blob_id).size
            if not 0 <= index < max(chunk_count(size), 1):
                raise IndexError(f"blob {blob_id[:12]} has no chunk {index}")
            span = chunk_span(size, index)
            if blob_id in self._memory:
                return self._memory[blob_id][1].read(span)
            return self.open(blob_id)[span]

    def seconds_until_revealed(self, blob_id: BlobId) -> float:
        """0 if the blob may be served to others now."""
        with self._lock:
            meta = self._metas.get(blob_id)
            return max(0.0, meta.reveal_at - self._clock()) if meta and meta.reveal_at is not None else 0.0

    # --- changing it

    def put(self, data: Any, *, reveal_at: float | None = None, pin: bool = False, sync: bool = False) -> BlobRef:
        """Store `data` (bytes or a C-contiguous array); others get it from `reveal_at` (Unix seconds) on.

        `sync` makes it survive a power failure. Storing the same again is free, and never makes its reveal
        earlier or unpins it. Raises UserError when quota or disk are full; then nothing is left behind.
        Blocks for hashing and writing: about a second per GB.
        """
        view = bytes_view(data)
        chunks = ChunkList.of([view])
        blob_id = chunks.blob_id
        with self._lock:
            known = self._metas.get(blob_id)
            if known is not None:
                if pin and not known.pinned:
                    self.pin(blob_id)
                return chunks.ref
            self._make_room(len(view), keep=blob_id)
            meta = _Meta(chunks.size, chunks.digests, reveal_at, pin)
            try:
                self._write(self._path(blob_id, "meta"), msgspec.msgpack.encode(meta), sync)
                self._write(self._path(blob_id, "blob"), view, sync)
            except BaseException:
                self._unlink(blob_id)
                raise
            # A fetch of the same that goes on keeps its file, and finds the blob here when it ends.
            self._partial.pop(blob_id, None)
            self._path(blob_id, "part").unlink(missing_ok=True)
            self._metas[blob_id] = meta
            return chunks.ref

    def pin(self, blob_id: BlobId) -> None:
        """Never evict it. Raises BlobNotFound."""
        self._set_pinned(blob_id, True)

    def unpin(self, blob_id: BlobId) -> None:
        self._set_pinned(blob_id, False)

    def _set_pinned(self, blob_id: BlobId, pinned: bool) -> None:
        with self._lock:
            meta = self._metas.get(blob_id)
            if meta is None:
                raise BlobNotFound(f"blob {blob_id[:12]} is not here")
            if meta.pinned != pinned:
                meta.pinned = pinned
                self._write(self._path(blob_id, "meta"), msgspec.msgpack.encode(meta), False)

    def remove(self, blob_id: BlobId) -> None:
        """Pinned or not; nothing happens if it is not here. Maps of it stay valid."""
        with self._lock:
            self._metas.pop(blob_id, None)
            self._partial.pop(blob_id, None)
            self._maps.pop(blob_id, None)
            self._unlink(blob_id)

    def evict(self) -> list[BlobId]:
        """Remove interrupted fetches, then the oldest unpinned blobs, until the quota holds; says which."""
        return self._evict_down_to(self.quota_bytes)

    def _evict_down_to(self, allowed_bytes: int, keep: BlobId | None = None) -> list[BlobId]:
        evicted: list[BlobId] = []
        with self._lock:
            used = self.used_bytes
            removable = [item for item in self._partial.items() if item[0] not in self._receiving]
            removable += [(blob_id, meta.size) for blob_id, meta in self._metas.items() if not meta.pinned]
            for blob_id, size in removable:
                if used <= allowed_bytes:
                    break
                if blob_id != keep:
                    self.remove(blob_id)
                    used -= size
                    evicted.append(blob_id)
        return evicted

    def _make_room(self, size: int, keep: BlobId) -> None:
        # Looked at first, so that nothing is thrown away for a blob that does not fit anyway.
        pinned = sum(meta.size for meta in self._metas.values() if meta.pinned)
        pinned += sum(self._partial[blob_id] for blob_id in self._receiving & self._partial.keys() - {keep})
        if size + pinned > self.quota_bytes:
            raise UserError(
                f"no room for a blob of {size} bytes in {self.root}: {pinned} of {self.quota_bytes} bytes "
                "are in use and must stay; raise --disk-quota"
            )
        already = self._partial.get(keep, 0)
        self._evict_down_to(self.quota_bytes - size + already, keep)

    def _write(self, path: Path, data: Buffer, sync: bool) -> None:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            raise _disk_error(error, path) from error
        finally:
            temporary.unlink(missing_ok=True)

    # --- memory

    def add_memory(self, chunks: ChunkList, buffers: Sequence[Any]) -> BlobRef:
        """Serve `buffers` as they are, without a copy. They must not change until `drop_memory`."""
        pieces = _Pieces(buffers)
        if pieces.size != chunks.size:
            raise ValueError(f"{pieces.size} bytes of buffers for a blob of {chunks.size}")
        with self._lock:
            self._memory[chunks.blob_id] = (chunks, pieces)
        return chunks.ref

    def drop_memory(self, blob_id: BlobId) -> None:
        with self._lock:
            self._memory.pop(blob_id, None)

    # --- fetches that have not ended

    def begin_partial(self, chunks: ChunkList) -> memoryview | None:
        """A writable map to receive a blob into: what an earlier fetch left, or room of its size.

        None while another fetch receives the same blob: one must not write into what the other has verified.
        Ends with `finish_partial` or `pause_partial`.
        """
        blob_id, path = chunks.blob_id, self._path(chunks.blob_id, "part")
        with self._lock:
            if blob_id in self._receiving or blob_id in self._metas:
                return None
            if blob_id not in self._partial:
                self._make_room(chunks.size, keep=blob_id)
                meta = msgspec.msgpack.encode(_Meta(chunks.size, chunks.digests))
                try:
                    self._write(self._path(blob_id, "meta"), meta, False)
                    with path.open("xb") as file:
                        # Reserved now: a full disk must be an error here, not a SIGBUS in the map later.
                        os.posix_fallocate(file.fileno(), 0, chunks.size)
                except OSError as error:
                    self._unlink(blob_id)
                    raise _disk_error(error, path) from error
                except BaseException:
                    self._unlink(blob_id)
                    raise
                self._partial[blob_id] = chunks.size
            self._receiving.add(blob_id)
            return _map(path, chunks.size, writable=True)

    def partial_chunks(self, blob_id: BlobId) -> ChunkList | None:
        """The chunk list of a fetch that was begun earlier and is not going on."""
        with self._lock:
            if blob_id not in self._partial or blob_id in self._receiving:
                return None
            try:
                return msgspec.msgpack.decode(self._path(blob_id, "meta").read_bytes(), type=_Meta).chunks
            except (OSError, msgspec.MsgspecError):
                self.remove(blob_id)
                return None

    def pause_partial(self, blob_id: BlobId) -> None:
        """The fetch ended early; what it received stays for the next one. Does nothing after the finish."""
        with self._lock:
            self._receiving.discard(blob_id)

    def finish_partial(self, blob_id: BlobId) -> memoryview:
        """Every chunk was verified: give the blob its name."""
        with self._lock:
            if blob_id in self._metas:  # it was put meanwhile
                self._receiving.discard(blob_id)
                return self.open(blob_id)
            self._path(blob_id, "part").rename(self._path(blob_id, "blob"))
            meta = msgspec.msgpack.decode(self._path(blob_id, "meta").read_bytes(), type=_Meta)
            self._receiving.discard(blob_id)
            self._partial.pop(blob_id, None)
            self._metas[blob_id] = meta
            return self.open(blob_id)


def _map(path: Path, size: int, *, writable: bool = False) -> memoryview:
    if size == 0:
        return memoryview(b"")
    with path.open("r+b" if writable else "rb") as file:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        mapped = mmap.mmap(file.fileno(), size, access=access)
    if not writable and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)  # page faults on a cold disk would stop the loop
    return memoryview(mapped)


def _disk_error(error: OSError, path: Path) -> PotluckError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full: cannot write {path}; free some space or choose another --home")
    return StateError(f"cannot write {path}: {error.strerror or error}")


# --- serving


class BlobService:
    """Answers `blob.list` (a blob's chunk hashes) and `blob.get` (one chunk) from a store."""

    def __init__(self, rpc: Rpc, store: BlobStore, *, max_upload_bytes_per_second: float | None = None) -> None:
        self._store = store
        self._pacer = _Pacer(max_upload_bytes_per_second) if max_upload_bytes_per_second else None
        rpc.register("blob.list", self._list)
        rpc.register("blob.get", self._get)

    async def _list(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        chunks = self._store.chunk_list(self._revealed(head))
        return Reply({"size": chunks.size, "chunk_size": chunks.chunk_size}, chunks.digests)

    async def _get(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        blob_id = self._revealed(head)
        index = head.get("index")
        if not isinstance(index, int):
            raise ProtocolError("blob.get without an index")
        try:
            chunk = self._store.chunk(blob_id, index)
        except IndexError as error:
            raise ProtocolError(str(error)) from error
        if self._pacer is not None:
            await self._pacer.take(len(chunk), urgent=not self._store.is_lent(blob_id))
        return Reply({}, chunk)

    def _revealed(self, head: dict[str, Any]) -> BlobId:
        blob_id = head.get("id")
        if not isinstance(blob_id, str):
            raise ProtocolError("a blob request without an id")
        seconds = self._store.seconds_until_revealed(BlobId(blob_id))
        if seconds > 0:
            raise BlobNotRevealed(f"blob {blob_id[:12]} is revealed in {seconds:.3f} s")
        return BlobId(blob_id)


class _Pacer:
    """Spends at most `rate` bytes per second, with a burst of one second.

    Urgent bytes (a round's contributions, which have a deadline) wait only for other urgent ones; what they take is
    paid for by the rest (states that joiners load), which is served first come, first served.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._paid_until = -math.inf
        self._urgent_until = -math.inf
        self._turn = asyncio.Lock()

    async def take(self, count: int, urgent: bool) -> None:
        clock = asyncio.get_running_loop().time
        if urgent:
            self._pay(count)
            self._urgent_until = max(self._urgent_until, clock() - 1.0) + count / self._rate
            await asyncio.sleep(max(0.0, self._urgent_until - clock()))
            return
        async with self._turn:
            # Urgent ones may prolong it meanwhile, hence the loop.
            while (left := self._paid_until - clock()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(left)
            self._pay(count)

    def _pay(self, count: int) -> None:
        now = asyncio.get_running_loop().time()
        self._paid_until = max(self._paid_until, now - 1.0) + count / self._rate


# --- fetching


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
) -> memoryview:
    """The blob's bytes, every chunk verified, from all holders in parallel (`window` requests each).

    With `store` the chunks are kept on disk as they come, so that a later fetch resumes, and the blob is in
    the store afterwards. `into` (exactly `ref.size` bytes) receives the data. `report` is filled in, also when
    the fetch fails. Raises BlobError if `ref.size` exceeds `max_bytes`; BlobUnavailable, with each holder's
    reason, if nobody delivers in time; UserError if the store is full. A retry is safe, and resumes with
    `store`.
    """
    if not 0 <= ref.size <= max_bytes:
        raise BlobError(f"blob {ref.id[:12]} has {ref.size} bytes; at most {max_bytes} are expected here")
    if into is not None and len(into) != ref.size:
        raise ValueError(f"a buffer of {len(into)} bytes for a blob of {ref.size}")
    if store is not None and store.has(ref.id):
        return _deliver(store.open(ref.id), into)
    if ref.size == 0:
        if ChunkList(0, b"").blob_id != ref.id:
            raise BlobError(f"blob {ref.id[:12]} is not empty")
        return memoryview(b"")
    job = _Fetch(rpc, ref, holders, timeout_seconds, window, on_progress, report or FetchReport())
    try:
        if ref.size <= CHUNK_BYTES:
            data = into if into is not None else memoryview(bytearray(ref.size))
            await job.receive([0], data)
            if store is not None:
                store.put(data)
            return data
        if (chunks := store.partial_chunks(ref.id) if store is not None else None) is None:
            await job.receive([_LIST], memoryview(b""))
            chunks = job.chunks
        assert chunks is not None
        job.chunks = chunks
        target = store.begin_partial(chunks) if store is not None else None
        if store is None or target is None:
            data = into if into is not None else memoryview(bytearray(ref.size))
            await job.receive(range(chunk_count(ref.size)), data)
            return data
        try:
            missing = await asyncio.to_thread(_missing_chunks, chunks, target)
            job.resumed(missing)
            await job.receive(missing, target)
            return _deliver(store.finish_partial(ref.id), into)
        finally:
            store.pause_partial(ref.id)
    finally:
        await job.cancel(list(job.requests))


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
        window: int,
        on_progress: OnProgress | None,
        report: FetchReport,
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
        self._target = memoryview(b"")
        self._waiting: deque[int] = deque()
        self._missing: set[int] = set()
        self._done_bytes = 0
        self._answers = 0
        self._answer_seconds = 0.0

    def resumed(self, missing: Sequence[int]) -> None:
        size = self._ref.size
        self._done_bytes = size - sum(_span_length(size, index) for index in missing)
        self._report.resumed_bytes = self._done_bytes

    async def receive(self, indexes: Sequence[int], target: memoryview) -> None:
        """Until all of `indexes` are in `target`. Raises BlobUnavailable."""
        self._target = target
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
            for task in done:
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
                if not holder.dropped and holder.retry_at <= now and holder.in_flight < self._window
            ]
            asked = False
            for holder in sorted(usable, key=lambda each: each.in_flight):
                index = self._waiting.popleft() if self._waiting else self._slow_index(holder, now)
                if index is not None:
                    self._begin(holder, index, now)
                    asked = True
            if not asked:
                return

    def _slow_index(self, holder: _Holder, now: float) -> int | None:
        """The endgame: what an idle holder could deliver before the one that was asked."""
        if holder.in_flight:
            return None
        patience = self._patience_seconds()
        asked: dict[int, list[_Request]] = {}
        for request in self.requests.values():
            asked.setdefault(request.index, []).append(request)
        for index, requests in asked.items():
            if len(requests) == 1 and now - requests[0].started_at >= patience:
                return index
        return None

    def _patience_seconds(self) -> float:
        if not self._answers:
            return _SLOW_FIRST_SECONDS
        return max(_SLOW_MIN_SECONDS, _SLOW_FACTOR * self._answer_seconds / self._answers)

    def _wake_at(self, now: float) -> float:
        """When something can be decided though no request has ended."""
        times = [self._deadline]
        for holder in self._holders:
            if not holder.dropped and holder.retry_at > now:
                times.append(holder.retry_at)
            elif not holder.dropped and not holder.in_flight and self.requests:
                times.append(now + _SLOW_MIN_SECONDS)
        return max(now, min(times))

    # --- one request

    def _begin(self, holder: _Holder, index: int, now: float) -> None:
        direct = not any(each.index == index and each.direct for each in self.requests.values())
        buffer = memoryview(b"")
        if index != _LIST:
            span = chunk_span(self._ref.size, index)
            buffer = self._target[span] if direct else memoryview(bytearray(span.stop - span.start))
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
            max_response_bytes=chunk_count(self._ref.size) * _DIGEST_BYTES,
            lane="bulk",
        )
        chunks = ChunkList(self._ref.size, bytes(reply.body))
        if chunks.blob_id != self._ref.id:
            raise BlobError("sent a chunk list that does not have this id")
        self.chunks = chunks
        return len(reply.body)

    async def _get_chunk(self, request: _Request) -> int:
        reply = await self._rpc.call(
            request.holder.peer,
            "blob.get",
            {"id": self._ref.id, "index": request.index},
            timeout_seconds=self._deadline - self._loop.time(),
            lane="bulk",
            into=request.buffer,
        )
        if len(reply.body) != len(request.buffer):
            raise BlobError(f"sent {len(reply.body)} bytes for chunk {request.index}")
        # Here and not in a thread: 0.15 ms per chunk, while it is in the cache. Handing it to another core made
        # fetches slower.
        digest = blake3(request.buffer).digest()
        if self.chunks is not None:
            genuine = digest == self.chunks.digest(request.index)
        else:
            genuine = ChunkList(self._ref.size, digest).blob_id == self._ref.id
        if not genuine:
            raise BlobError(f"sent bytes for chunk {request.index} that do not have its hash")
        return len(reply.body)

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
                self._target[chunk_span(self._ref.size, index)] = request.buffer
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
