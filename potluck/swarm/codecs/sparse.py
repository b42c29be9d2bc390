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
from functools import lru_cache
from itertools import accumulate
from typing import Final

import numpy as np
import torch

from potluck.errors import CodecError
from potluck.swarm.codecs import Codec
from potluck.swarm.codecs.bits import bits_bytes, pack_planes, planes_bytes, unpack_bits, unpack_planes
from potluck.swarm.codecs.frame import TRAILER_BYTES, Reader, check_bounded, payload, trailer
from potluck.swarm.codecs.top_k import top_k
from potluck.swarm.contribution import Contribution, Leveled
from potluck.swarm.layout import Flat, Layout, Slot

SIGMAS = 6.0
CODE_BITS: Final = 2
LEVELS: Final = 2**CODE_BITS
#: About so many indices are decoded together.
SLAB_KEPT: Final = 1 << 14
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
            raise ValueError("k must be 1 to chunk")
        if not 0.0 <= beta <= 1.0:
            raise ValueError("beta must be 0 to 1")
        self.chunk, self.k, self.beta = int(chunk), int(k), float(beta)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        acc, parts = delta if residual is None else residual, []
        for slot in layout.slots:
            if residual is not None:
                here = residual[slot.range]
                np.multiply(here, np.float32(self.beta), out=here)
                np.add(here, delta[slot.range], out=here)
            parts.append(self._encode(acc, list(self._groups(slot)), keep_rest=residual is not None))
        return b"".join([*parts, trailer(self.name, layout)])

    def _encode(self, acc: Flat, groups: Sequence[Chunks], keep_rest: bool) -> bytes:
        """One tensor. `keep_rest`: what is sent is taken off `acc`."""
        rows = (torch.from_numpy(acc[group.range]).view(group.count, group.width) for group in groups)
        inside = [top_k(row, group.keep).numpy() for row, group in zip(rows, groups, strict=True)]
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
    and in range. Chunks are taken in eights (whole bytes of bitmap), as many as stay in the processor's cache."""
    words = unpack_planes(words, group.kept, group.word_bits)
    np.right_shift(words, group.low_bits, out=codes, casting="unsafe")
    step = max(8, SLAB_KEPT // group.keep // 8 * 8)
    for first in range(0, group.count, step):
        count = min(step, group.count - first)
        kept, of_map = first * group.keep, first * group.map_bits
        bits = unpack_bits(bitmap[of_map // 8 : bits_bytes(of_map + count * group.map_bits)], count * group.map_bits)
        ones = bits.view(np.bool_).nonzero()[0]
        if ones.size != count * group.keep:
            raise CodecError("sparse: not as many indices as there are values")
        found = indices[kept : kept + ones.size]
        np.left_shift(ones.astype(found.dtype), group.low_bits, out=found)
        np.bitwise_or(found, words[kept : kept + ones.size] & ((1 << group.low_bits) - 1), out=found)
        np.add(found, _shifts(count, group.width, group.keep, found.dtype), out=found)
        if (found[1:] <= found[:-1]).any():
            raise CodecError("sparse: indices are not increasing")
        # A one that belongs to the chunk before or after shows as an index out of range.
        starts = np.arange(0, count * group.width, group.width)
        if (found[:: group.keep] < starts).any() or (found[group.keep - 1 :: group.keep] >= starts + group.width).any():
            raise CodecError("sparse: indices out of range")
        np.add(found, group.offset + first * group.width, out=found)


@lru_cache(maxsize=16)
def _shifts(count: int, width: int, keep: int, dtype: np.dtype[np.integer]) -> np.ndarray:
    """By how much (place in the bitmaps << low bits) is less than an index without its low bits: (count * keep,)."""
    group = Chunks(0, count, width, keep)
    of_chunk = np.arange(count) * (width - (group.map_bits << group.low_bits))
    return (of_chunk[:, None] - (np.arange(keep) << group.low_bits)).reshape(-1).astype(dtype)


def _means(values: Flat, codes: np.ndarray) -> Flat:
    """What each code decodes as, (4,): the mean of the values that have it."""
    counts = np.bincount(codes, minlength=LEVELS)
    sums = np.bincount(codes, weights=values, minlength=LEVELS)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.0).astype(np.float32)
