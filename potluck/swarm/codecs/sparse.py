"""`sparse`: top-k of each chunk, 2 bits a value, error feedback (SparseLoCo; Covenant-72B report, eq. 1-2).

acc = beta * residual + delta; the k largest of each chunk of C values are sent; residual = acc - what was sent.
A tensor is cut into flat chunks of C; its last, shorter chunk keeps its share of k (at least 1). Kept values are
quantized per tensor: shift = their mean, scale = 6 std / 4, bin = clamp(round((v - shift) / scale + 2), 0, 3), and a
bin decodes as the mean of the values that fell into it. Four float32 levels travel with each tensor.

Indices are sorted within their chunk and written as Elias and Fano do (P. Elias, 1974): of each index the l =
floor(log2(C / k)) low bits as they are, and the rest as gaps in a bitmap of k + ((C - 1) >> l) bits per chunk, whose
n-th one stands at (index >> l) + n. That is 7.98 bits an index for k = 64 of 4096, where 7.36 is the least possible;
the size is known before a blob is read.

Payload, per tensor in name order: 4 levels (float32), then for its full chunks, and for the shorter one: of each kept
value code * 2^l + low bits, which are whole bytes for k = 64 of 4096 (`bits.py`); bitmaps of all chunks one after
another, padded to a whole byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.codecs import Codec
from potluck.swarm.codecs.bits import bits_bytes, check_padding, pack_planes, planes_bytes, unpack_planes
from potluck.swarm.codecs.frame import TRAILER_BYTES, Reader, check_bounded, payload, trailer
from potluck.swarm.codecs.residual import blend
from potluck.swarm.codecs.top_k import top_k
from potluck.swarm.compiled import INT, TO_INT32S, TO_INT64S, TO_UINT8S, UINT8S, UINT32S, compiled
from potluck.swarm.contribution import Contribution, Leveled
from potluck.swarm.layout import Flat, Layout, Slot

SIGMAS = 6.0
CODE_BITS: Final = 2
LEVELS: Final = 2**CODE_BITS
MAX_INT32: Final = 2**31 - 1


@dataclass(frozen=True)
class Chunks:
    """A run of equal chunks inside one tensor: `count` chunks of `width` values from flat index `offset`."""

    offset: int
    count: int
    width: int
    keep: int

    @property
    def range(self) -> slice:
        return slice(self.offset, self.offset + self.count * self.width)

    @property
    def kept(self) -> int:
        return self.count * self.keep

    @property
    def low_bits(self) -> int:
        return (self.width // self.keep).bit_length() - 1

    @property
    def map_bits(self) -> int:
        """Of one chunk."""
        return self.keep + (self.width - 1 >> self.low_bits)

    @property
    def word_bits(self) -> int:
        """Of a code and the low bits of an index."""
        return self.low_bits + CODE_BITS

    @property
    def bytes(self) -> tuple[int, int]:
        """Of words, and of bitmaps."""
        return planes_bytes(self.kept, self.word_bits), bits_bytes(self.count * self.map_bits)


class SparseCodec(Codec):
    name = "sparse"
    has_residual = True

    def __init__(self, chunk: int = 4096, k: int = 64, beta: float = 0.95) -> None:
        if not 16 <= chunk <= 65536:
            raise ValueError("chunk must be 16 to 65536 values")
        if not 1 <= k <= chunk:
            raise ValueError(f"k must be 1 to {chunk}, the values of a chunk")
        if not 0.0 <= beta <= 1.0:
            raise ValueError("beta must be 0 to 1")
        self.chunk, self.k, self.beta = int(chunk), int(k), float(beta)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        acc, parts = delta if residual is None else residual, []
        for slot in layout.slots:
            if residual is not None:
                blend(residual[slot.range], self.beta, delta[slot.range])
            parts.append(self._encode(acc, list(self._groups(slot)), keep_rest=residual is not None))
        return b"".join([*parts, trailer(self.name, layout)])

    def _encode(self, acc: Flat, groups: Sequence[Chunks], keep_rest: bool) -> bytes:
        """One tensor. `keep_rest`: what is sent is taken off `acc`."""
        inside = [top_k(acc[group.range], group.width, group.keep) for group in groups]
        where = np.concatenate([indices + group.offset for indices, group in zip(inside, groups, strict=True)])
        values = acc[where]
        codes = self._codes(values)
        levels = _means(values, codes)
        if keep_rest:
            acc[where] = values - levels[codes]
        parts, at = [levels.astype("<f4").tobytes()], 0
        for indices, group in zip(inside, groups, strict=True):
            parts.append(_pack(indices, codes[at : at + group.kept], group))
            at += group.kept
        return b"".join(parts)

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        tensors = [list(self._groups(slot)) for slot in layout.slots]
        reader = Reader(payload(blob, self.name, layout, sum(map(_tensor_bytes, tensors))))
        begins = list(accumulate((sum(group.kept for group in groups) for groups in tensors), initial=0))
        indices = np.empty(begins[-1], dtype=np.int32 if layout.size <= MAX_INT32 else np.int64)
        codes, levels, at = np.empty(begins[-1], dtype=np.uint8), np.empty((len(tensors), LEVELS), dtype=np.float32), 0
        for number, groups in enumerate(tensors):
            levels[number] = reader.take(np.float32, LEVELS)
            for group in groups:
                part = slice(at, at + group.kept)
                words, bitmap = (reader.take(np.uint8, count) for count in group.bytes)
                _unpack(words, bitmap, group, indices[part], codes[part])
                at = part.stop
        check_bounded(self.name, levels)
        return Leveled(indices, codes, levels, begins)

    def max_bytes(self, layout: Layout) -> int:
        return sum(_tensor_bytes(list(self._groups(slot))) for slot in layout.slots) + TRAILER_BYTES

    def _codes(self, values: Flat) -> np.ndarray:
        """Of each value 0 to 3: bins a quarter of six standard deviations wide."""
        scale = SIGMAS * values.std() / LEVELS
        if not scale > 0:
            return np.zeros(values.size, dtype=np.uint8)
        codes: np.ndarray = np.rint((values - values.mean()) / scale + 2).clip(0, LEVELS - 1).astype(np.uint8)
        return codes

    def _groups(self, slot: Slot) -> Iterator[Chunks]:
        full, rest = divmod(slot.size, self.chunk)
        if full:
            yield Chunks(slot.offset, full, self.chunk, self.k)
        if rest:
            keep = min(rest, max(1, round(self.k * rest / self.chunk)))
            yield Chunks(slot.offset + full * self.chunk, 1, rest, keep)


def _tensor_bytes(groups: Sequence[Chunks]) -> int:
    return 4 * LEVELS + sum(sum(group.bytes) for group in groups)


def _pack(indices: np.ndarray, codes: np.ndarray, group: Chunks) -> bytes:
    """`indices`: ascending, (kept,), counted from the group's first value."""
    inside = indices.reshape(group.count, group.keep) - group.width * np.arange(group.count)[:, None]
    words = (codes.astype(np.int64) << group.low_bits) + (inside.reshape(-1) & (1 << group.low_bits) - 1)
    bitmap = np.zeros((group.count, group.map_bits), dtype=np.uint8)
    np.put_along_axis(bitmap, (inside >> group.low_bits) + np.arange(group.keep), 1, axis=1)
    return pack_planes(words, group.word_bits) + np.packbits(bitmap).tobytes()


def _unpack(words: np.ndarray, bitmap: np.ndarray, group: Chunks, indices: np.ndarray, codes: np.ndarray) -> None:
    """Writes flat indices in the layout and codes, (kept,). Raises CodecError unless each chunk has its k, ascending
    and in range."""
    check_padding(bitmap, group.count * group.map_bits)
    words = unpack_planes(words, group.kept, group.word_bits).astype(np.uint32, copy=False)
    scratch = np.empty(8 * group.keep + 9, dtype=np.int32)
    sizes = (group.offset, group.width, group.keep, group.low_bits, group.map_bits)
    if not _read_indices(indices, codes, scratch, words, bitmap, *sizes):
        raise CodecError("sparse: not as many indices as there are values, or not increasing, or out of range")


def _means(values: Flat, codes: np.ndarray) -> Flat:
    """What each code decodes as, (4,): the mean of the values that have it."""
    counts = np.bincount(codes, minlength=LEVELS)
    sums = np.bincount(codes, weights=values, minlength=LEVELS)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.0).astype(np.float32)


@compiled(
    *((indices, TO_UINT8S, TO_INT32S, UINT32S, UINT8S, INT, INT, INT, INT, INT) for indices in (TO_INT32S, TO_INT64S))
)
def _read_indices(
    indices: np.ndarray,
    codes: np.ndarray,
    ones: np.ndarray,
    words: np.ndarray,
    bitmap: np.ndarray,
    offset: int,
    width: int,
    keep: int,
    low_bits: int,
    map_bits: int,
) -> bool:
    """False, with anything written, unless each chunk has its `keep` indices, ascending, and within its `width`. The
    arrays' sizes fit, their values may be any. Chunks are taken in eights, whose bitmaps are whole bytes. `ones` is
    scratch, (8 * keep + 9,). Integers are unsigned where numba would ask whether they count from an array's end."""
    chunks, low, mask = words.size // keep, np.int32(low_bits), np.int32((1 << low_bits) - 1)
    at, wrong = np.uint64(0), np.int32(0)
    for first in range(0, chunks, 8):
        last = min(first + 8, chunks)
        wanted, n, place = (last - first) * keep, np.uint64(0), np.int32(0)
        part = bitmap[first * map_bits // 8 : -(-last * map_bits // 8)]
        for i in range(part.size):
            if n > wanted:
                return False
            for bit in range(8):  # without a branch that the processor would have to guess
                ones[n] = place + bit
                n += np.uint64(part[i]) >> np.uint64(7 - bit) & np.uint64(1)
            place = np.int32(place + 8)
        if n != wanted:
            return False
        n = np.uint64(0)
        for chunk in range(first, last):
            # A one that belongs to the chunk before or after shows as an index out of range.
            start, begin, before = offset + chunk * width, np.int32((chunk - first) * map_bits), np.int32(-1)
            for i in range(np.uint64(keep)):
                high, word = np.int32(ones[n + i] - begin - i), np.int32(words[at + i])
                index = np.int32((high << low) | (word & mask))
                wrong = np.int32(wrong | (index <= before))
                before = index
                indices[at + i] = start + index
            wrong = np.int32(wrong | (before >= width))
            n += np.uint64(keep)
            at += np.uint64(keep)
    for i in range(words.size):
        codes[i] = words[i] >> low_bits
    return bool(wrong == 0)
