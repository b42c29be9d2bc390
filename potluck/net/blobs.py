"""Content-addressed blobs: named by hash, stored up to a quota, served in chunks (`fetch.py` gets them).

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
import io
import logging
import math
import mmap
import os
import secrets
import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NewType

import msgspec
from blake3 import blake3

from potluck.errors import (
    DiskFull,
    NetworkError,
    PotluckError,
    ProtocolError,
    StateError,
    UserError,
)
from potluck.net.host import PeerId
from potluck.net.ranges import asked_range
from potluck.net.rpc import Reply, Rpc

log = logging.getLogger(__name__)

#: Hex BLAKE3 that names a blob.
BlobId = NewType("BlobId", str)

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 32
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

    @cached_property
    def blob_id(self) -> BlobId:
        header = _ID_HEADER.pack(self.size, self.chunk_size)
        return BlobId(blake3(_ID_PREFIX + header + self.digests).hexdigest())

    @property
    def ref(self) -> BlobRef:
        return BlobRef(self.blob_id, self.size)

    def digest(self, index: int) -> bytes:
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    @classmethod
    def of(cls, buffers: Sequence[Any], known: Mapping[int, bytes] | None = None) -> ChunkList:
        """Of the buffers' concatenation, which is never made. `known`: digests of some of its chunks. Takes about 0.15
        s per GB and core of the others; blocks."""
        pieces, digests = Pieces(buffers), dict(known or {})
        indexes = range(chunk_count(pieces.size))
        unknown = [index for index in indexes if index not in digests]
        if len(unknown) * CHUNK_BYTES < _PARALLEL_HASH_BYTES:
            digests.update((index, pieces.digest(index)) for index in unknown)
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # blake3 lets go of the GIL
                digests.update(zip(unknown, pool.map(pieces.digest, unknown), strict=True))
        return cls(pieces.size, b"".join(digests[index] for index in indexes))


class Pieces:
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

    def digest(self, index: int) -> bytes:
        """Of a chunk."""
        hasher = blake3()
        for view in self.views(chunk_span(self.size, index)):
            hasher.update(view)
        return hasher.digest()

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
    """Blobs in a directory, up to a quota; and in memory what somebody lent (`add_memory`), and chunks (`add_chunk`).

    `<id>.blob` beside `<id>.meta`; `<id>.part` (beside its meta too) is a fetch that has not ended. A blob's
    name appears only when all of it is there. Safe to use from several threads, by one process.
    """

    def __init__(self, root: Path, quota_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self.quota_bytes = quota_bytes
        self._clock = clock
        self._lock = threading.RLock()
        #: Writers take turns; readers and servers never wait for their disk.
        self._writing = threading.Lock()
        self._being_written = 0
        self._metas: OrderedDict[BlobId, _Meta] = OrderedDict()  # oldest first
        self._complete_bytes = 0  # of them all
        self._partial: dict[BlobId, int] = {}  # sizes; oldest first
        #: Where in memory blobs that are held will be written.
        self._unwritten: dict[BlobId, Path] = {}
        self._receiving: set[BlobId] = set()
        self._memory: dict[BlobId, tuple[ChunkList, Pieces]] = {}
        #: Of blobs that are not here as a whole.
        self._loose: dict[BlobId, tuple[ChunkList, dict[int, memoryview]]] = {}
        self._loose_added: Counter[tuple[BlobId, int]] = Counter()
        self._added: Counter[BlobId] = Counter()
        self._last_read: dict[BlobId, float] = {}
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
                self._add(blob_id, meta)
            else:
                self._partial[blob_id] = meta.size
        for path in [*self.root.glob("*.blob"), *self.root.glob("*.part")]:
            if path.stem not in self._metas and path.stem not in self._partial:
                path.unlink(missing_ok=True)

    def _map(self, blob_id: BlobId, size: int) -> memoryview:
        return _map(self._path(blob_id, "blob"), size)

    def _add(self, blob_id: BlobId, meta: _Meta) -> None:
        self._metas[blob_id] = meta
        self._complete_bytes += meta.size

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
            return self._complete_bytes + sum(self._partial.values()) + self._being_written

    def has(self, blob_id: BlobId) -> bool:
        with self._lock:
            return blob_id in self._metas or blob_id in self._memory

    def idle_seconds(self, blob_id: BlobId) -> float:
        """Since a blob in memory was last read; infinite if never."""
        with self._lock:
            return self._clock() - self._last_read.get(blob_id, -math.inf)

    def is_lent(self, blob_id: BlobId) -> bool:
        """Whether it is another's memory (`add_memory`)."""
        with self._lock:
            return blob_id in self._memory and blob_id not in self._unwritten

    def ids(self) -> list[BlobId]:
        """On disk, oldest first."""
        with self._lock:
            return list(self._metas)

    def chunk_list(self, blob_id: BlobId) -> ChunkList:
        """Also of a blob of which there are only some chunks. Raises BlobNotFound."""
        with self._lock:
            if blob_id in self._memory:
                return self._memory[blob_id][0]
            if blob_id in self._metas:
                return self._metas[blob_id].chunks
            if blob_id in self._loose:
                return self._loose[blob_id][0]
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
                view = self._maps[blob_id] = self._map(blob_id, meta.size)
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
                self._last_read[blob_id] = self._clock()
                return self._memory[blob_id][1].read(span)
            if blob_id not in self._metas and index in (loose := self._loose.get(blob_id, (None, {}))[1]):
                return loose[index]
            return self.open(blob_id)[span]

    def seconds_until_revealed(self, blob_id: BlobId) -> float:
        """0 if the blob may be served to others now."""
        with self._lock:
            meta = self._metas.get(blob_id)
            return max(0.0, meta.reveal_at - self._clock()) if meta and meta.reveal_at is not None else 0.0

    # --- changing it

    def put(self, *data: Any, reveal_at: float | None = None, pin: bool = False, sync: bool = False) -> BlobRef:
        """Store `data` (bytes or C-contiguous arrays, one behind the other); others get it from `reveal_at` (Unix
        seconds) on.

        `sync` makes it survive a power failure. Storing the same again is free, and never makes its reveal
        earlier or unpins it. Raises UserError when quota or disk are full; then nothing is left behind.
        Blocks for hashing and writing: about a second per GB.
        """
        chunks = ChunkList.of(data)
        blob_id = chunks.blob_id
        with self._writing:
            with self._lock:
                known = self._metas.get(blob_id)
                if known is not None:
                    if pin and not known.pinned:
                        self.pin(blob_id)
                    return chunks.ref
                self._make_room(chunks.size, keep=blob_id)
                self._being_written = chunks.size
            meta = _Meta(chunks.size, chunks.digests, reveal_at, pin)
            try:
                self._write(self._path(blob_id, "blob"), data, sync)
                with self._lock:
                    self._write(self._path(blob_id, "meta"), [msgspec.msgpack.encode(meta)], sync)
                    self._forget_partial(blob_id)
                    self._add(blob_id, meta)
            except BaseException:
                with self._lock:
                    if blob_id in self._partial:
                        self._path(blob_id, "blob").unlink(missing_ok=True)
                    else:
                        self._unlink(blob_id)
                raise
            finally:
                self._being_written = 0
            return chunks.ref

    def hold(self, *data: Any, reveal_at: float | None = None) -> BlobRef:
        """As `put`, but takes only the room on the disk: `data` is served from memory, and must not change, until
        `write_held` has written it. What is held is gone after a crash. Blocks for hashing."""
        chunks = ChunkList.of(data)
        blob_id = chunks.blob_id
        with self._lock:
            if blob_id in self._metas:
                return chunks.ref
            self._make_room(chunks.size, keep=blob_id)
            path = self._temporary(self._path(blob_id, "blob"))
            try:
                _reserve(path, chunks.size)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise _disk_error(error, path) from error
            self._forget_partial(blob_id)
            self.add_memory(chunks, data)
            self._unwritten[blob_id] = path
            self._add(blob_id, _Meta(chunks.size, chunks.digests, reveal_at))
        return chunks.ref

    def write_held(self) -> None:
        """To disk, and out of memory. Raises DiskFull and StateError; what could not be written is still held."""
        with self._writing:
            with self._lock:
                unwritten = list(self._unwritten.items())
            for blob_id, path in unwritten:
                self._write_held(blob_id, path)

    def _write_held(self, blob_id: BlobId, path: Path) -> None:
        try:
            with self._lock:
                if self._unwritten.get(blob_id) != path:  # it was removed
                    return
                chunks, pieces = self._memory[blob_id]
                file = path.open("r+b", buffering=0)
            with file:
                _write_views(file, pieces.views(slice(0, chunks.size)))
            with self._lock:
                if self._unwritten.get(blob_id) != path:
                    return
                self._write(self._path(blob_id, "meta"), [msgspec.msgpack.encode(self._metas[blob_id])], False)
                path.rename(self._path(blob_id, "blob"))
                del self._unwritten[blob_id]
                self.drop_memory(blob_id)
        except OSError as error:
            raise _disk_error(error, path) from error

    def _forget_partial(self, blob_id: BlobId) -> None:
        """A fetch of the same that goes on keeps its file, and finds the blob here when it ends."""
        if self._partial.pop(blob_id, None) is not None:
            self._path(blob_id, "part").unlink(missing_ok=True)

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
                if blob_id in self._unwritten:
                    return
                self._write(self._path(blob_id, "meta"), [msgspec.msgpack.encode(meta)], False)

    def remove(self, blob_id: BlobId) -> None:
        """Pinned or not; nothing happens if it is not here. Maps of it stay valid."""
        with self._lock:
            meta = self._metas.pop(blob_id, None)
            self._complete_bytes -= meta.size if meta else 0
            self._partial.pop(blob_id, None)
            self._maps.pop(blob_id, None)
            if (unwritten := self._unwritten.pop(blob_id, None)) is not None:
                unwritten.unlink(missing_ok=True)
                self.drop_memory(blob_id)
            self._unlink(blob_id)

    def remove_older(self, seconds: float) -> None:
        """Remove unpinned blobs, whole or not, last written before that: what an earlier session left behind."""
        before = time.time() - seconds
        with self._lock:
            written = self._metas.keys() - self._unwritten.keys()
            unpinned = [blob_id for blob_id in written if not self._metas[blob_id].pinned]
            for blob_id, suffix in [(b, "blob") for b in unpinned] + [(b, "part") for b in self._partial]:
                try:
                    old = self._path(blob_id, suffix).stat().st_mtime < before
                except OSError:
                    old = True
                if old and blob_id not in self._receiving:
                    self.remove(blob_id)

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
        already = self._partial.get(keep, 0)
        if self.used_bytes + size - already <= self.quota_bytes:
            return
        # Looked at first, so that nothing is thrown away for a blob that does not fit anyway.
        pinned = sum(meta.size for meta in self._metas.values() if meta.pinned)
        pinned += sum(self._partial[blob_id] for blob_id in self._receiving & self._partial.keys() - {keep})
        if size + pinned > self.quota_bytes:
            raise UserError(
                f"no room for a blob of {size} bytes in {self.root}: {pinned} of {self.quota_bytes} bytes "
                "are in use and must stay; raise --disk-quota"
            )
        self._evict_down_to(self.quota_bytes - size + already, keep)

    def _write(self, path: Path, data: Sequence[Any], sync: bool) -> None:
        temporary = self._temporary(path)
        try:
            with temporary.open("xb", buffering=0) as file:
                _write_views(file, map(bytes_view, data))
                if sync:
                    os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _disk_error(error, path) from error
            raise

    def _temporary(self, path: Path) -> Path:
        """Beside it; what of that an earlier process left is removed at the start."""
        return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")

    # --- memory

    def add_memory(self, chunks: ChunkList, buffers: Sequence[Any]) -> BlobRef:
        """Serve `buffers` as they are, without a copy. They must not change until `drop_memory`, once for each add."""
        pieces = Pieces(buffers)
        if pieces.size != chunks.size:
            raise ValueError(f"{pieces.size} bytes of buffers for a blob of {chunks.size}")
        with self._lock:
            self._memory.setdefault(chunks.blob_id, (chunks, pieces))
            self._added[chunks.blob_id] += 1
        return chunks.ref

    def drop_memory(self, blob_id: BlobId) -> None:
        with self._lock:
            self._added[blob_id] -= 1
            if self._added[blob_id] <= 0:
                del self._added[blob_id]
                self._memory.pop(blob_id, None)
                self._last_read.pop(blob_id, None)

    def add_chunk(self, chunks: ChunkList, index: int, data: memoryview) -> None:
        """Serve one chunk, verified, of a blob that is not here. It must not change until `drop_chunk`, once for each
        add."""
        with self._lock:
            self._loose.setdefault(chunks.blob_id, (chunks, {}))[1].setdefault(index, data)
            self._loose_added[chunks.blob_id, index] += 1

    def drop_chunk(self, blob_id: BlobId, index: int) -> None:
        with self._lock:
            self._loose_added[blob_id, index] -= 1
            if self._loose_added[blob_id, index] <= 0:
                del self._loose_added[blob_id, index]
                loose = self._loose.get(blob_id, (None, {}))[1]
                loose.pop(index, None)
                if not loose:
                    self._loose.pop(blob_id, None)

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
                    self._write(self._path(blob_id, "meta"), [meta], False)
                    _reserve(path, chunks.size)  # a full disk must be an error here, not a SIGBUS in the map later
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
            self._add(blob_id, meta)
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


def _reserve(path: Path, size: int) -> None:
    """A new file, for which the disk has room. Raises OSError."""
    with path.open("xb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


def _write_views(file: io.RawIOBase, views: Iterable[memoryview]) -> None:
    for view in views:
        # One call for much more than a mebibyte makes the kernel look for huge pages: ten times as slow.
        for start in range(0, len(view), CHUNK_BYTES):
            left = view[start : start + CHUNK_BYTES]
            while len(left):
                left = left[file.write(left) :]


def _disk_error(error: OSError, path: Path) -> PotluckError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"the disk is full: cannot write {path}; free some space or choose another --home")
    return StateError(f"cannot write {path}: {error.strerror or error}")


# --- serving


class _Turns:
    """Of those who want one blob."""

    #: Peers that it is sent to at once.
    MOST = 2

    def __init__(self) -> None:
        self._had: Counter[PeerId] = Counter()
        #: Answers under way, by peer.
        self._busy: Counter[PeerId] = Counter()
        self._waiting: list[tuple[PeerId, asyncio.Future[None]]] = []

    async def take(self, peer: PeerId) -> None:
        if self._busy[peer] or len(self._busy) < self.MOST:
            self._busy[peer] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((peer, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(peer, 0)
            raise
        finally:
            self._waiting = [one for one in self._waiting if one[1] is not turn]

    @property
    def idle(self) -> bool:
        """Nobody is served or waits."""
        return not self._busy and not self._waiting

    def give_back(self, peer: PeerId, size: int) -> None:
        self._had[peer] += size
        self._busy[peer] -= 1
        if not self._busy[peer]:
            del self._busy[peer]
        while self._waiting and len(self._busy) < self.MOST:
            chosen = max(self._waiting, key=lambda one: self._had[one[0]])[0]
            for one in [one for one in self._waiting if one[0] == chosen]:
                self._waiting.remove(one)
                if not one[1].done():
                    self._busy[chosen] += 1
                    one[1].set_result(None)


class BlobService:
    """Answers `blob.list` (a blob's chunk hashes) and `blob.get` (one chunk, or a part of it) from a store.

    A round's contributions, which have a deadline, are urgent; states that joiners load are not. A contribution is sent
    to two peers at once, first to those who have most of it: over a slow line they have it early, and give it to the
    others while it goes out to the next. Who asks for chunks that nobody else needs (`alone`) takes no turns."""

    def __init__(self, rpc: Rpc, store: BlobStore) -> None:
        self._store = store
        self._turns: dict[BlobId, _Turns] = {}
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
        chunk = asked_range(chunk, head)
        if self._store.is_lent(blob_id):
            return Reply({}, chunk, urgent=False)
        if head.get("alone"):
            return Reply({}, chunk)
        turns = self._turns.setdefault(blob_id, _Turns())
        try:
            await turns.take(peer)
        finally:
            self._forget_idle(blob_id)

        def sent() -> None:
            turns.give_back(peer, len(chunk))
            self._forget_idle(blob_id)

        return Reply({}, chunk, on_sent=sent)

    def _forget_idle(self, blob_id: BlobId) -> None:
        if blob_id in self._turns and self._turns[blob_id].idle:
            del self._turns[blob_id]

    def _revealed(self, head: dict[str, Any]) -> BlobId:
        blob_id = head.get("id")
        if not isinstance(blob_id, str):
            raise ProtocolError("a blob request without an id")
        seconds = self._store.seconds_until_revealed(BlobId(blob_id))
        if seconds > 0:
            raise BlobNotRevealed(f"blob {blob_id[:12]} is revealed in {seconds:.3f} s")
        return BlobId(blob_id)
