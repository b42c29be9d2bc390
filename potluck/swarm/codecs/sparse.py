"""`sparse`: top-k of each chunk, 2 bits a value, error feedback (SparseLoCo; Covenant-72B report, eq. 1-2).

acc = beta * residual + delta; the k largest of each chunk of C values are sent; residual = acc - what was sent.
A tensor is cut into flat chunks of C; its last, shorter chunk keeps its share of k (at least 1). Kept values are
quantized per tensor: shift = their mean, scale = 6 std / 4, bin = clamp(round((v - shift) / scale + 2), 0, 3), and a
bin decodes as the mean of the values that fell into it. Four float32 levels travel with each tensor.

Indices are sorted within their chunk and written as Elias and Fano do (P. Elias, 1974): of each index the l =
floor(log2(C / k)) low bits as they are, and the rest as gaps in a bitmap of k + ((C - 1) >> l) bits per chunk, whose
n-th one stands at (index >> l) + n. That is 7.98 bits an index for k = 64 of 4096, where 7.36 is the least possible;
the size is known before a blob is read.

Payload, per tensor in name order: 4 levels (float32), 2-bit codes as planes (`bits.py`), then for its full chunks, and
for the shorter one: low bits as planes, bitmaps of all chunks one after another, padded to a whole byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from potluck.errors import CodecError
from potluck.swarm.aggregate import Contribution, Sparse
from potluck.swarm.codecs.bits import bits_bytes, pack_planes, planes_bytes, unpack_bits, unpack_planes
from potluck.swarm.codecs.frame import HEADER_BYTES, Reader, check_bounded, header
from potluck.swarm.codecs.top_k import top_k
from potluck.swarm.layout import Flat, Layout, Slot

SIGMAS = 6.0
LEVELS = 4


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
    def index_bytes(self) -> int:
        return planes_bytes(self.kept, self.low_bits) + bits_bytes(self.count * self.map_bits)


class SparseCodec:
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
        acc = torch.from_numpy(delta)
        if residual is not None:
            acc = torch.from_numpy(residual).mul_(self.beta).add_(acc)
        parts = [header(self.name, layout)]
        for slot in layout.slots:
            groups = list(self._groups(slot))
            inside = [top_k(acc[group.range].view(group.count, group.width), group.keep).numpy() for group in groups]
            where = torch.from_numpy(
                np.concatenate([i + group.offset for i, group in zip(inside, groups, strict=True)])
            )
            levels, codes = _quantize(acc[where].numpy())
            parts += [levels.astype("<f4").tobytes(), pack_planes(codes, 2)]
            parts += [_pack_indices(indices, group) for indices, group in zip(inside, groups, strict=True)]
            if residual is not None:
                acc[where] -= torch.from_numpy(levels[codes])
        return b"".join(parts)

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        reader = Reader(blob, self.name, layout, self.max_bytes(layout) - HEADER_BYTES)
        total = sum(group.kept for slot in layout.slots for group in self._groups(slot))
        indices, values, at = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.float32), 0
        for slot in layout.slots:
            groups = list(self._groups(slot))
            kept = sum(group.kept for group in groups)
            levels = reader.take("<f4", LEVELS)
            check_bounded(self.name, levels)
            codes = unpack_planes(reader.take("u1", planes_bytes(kept, 2)), kept, 2)
            np.take(levels, codes, out=values[at : at + kept], mode="clip")  # two bits are in range: nothing is clipped
            for group in groups:
                low = reader.take("u1", planes_bytes(group.kept, group.low_bits))
                bitmap = reader.take("u1", bits_bytes(group.count * group.map_bits))
                _unpack_indices(low, bitmap, group, indices[at : at + group.kept])
                at += group.kept
        return Sparse(indices, values)

    def max_bytes(self, layout: Layout) -> int:
        payload = 0
        for slot in layout.slots:
            groups = list(self._groups(slot))
            kept = sum(group.kept for group in groups)
            payload += 4 * LEVELS + planes_bytes(kept, 2) + sum(group.index_bytes for group in groups)
        return HEADER_BYTES + payload

    def _groups(self, slot: Slot) -> Iterator[Chunks]:
        full, rest = divmod(slot.size, self.chunk)
        if full:
            yield Chunks(slot.offset, full, self.chunk, self.k)
        if rest:
            keep = min(rest, max(1, round(self.k * rest / self.chunk)))
            yield Chunks(slot.offset + full * self.chunk, 1, rest, keep)


def _pack_indices(indices: np.ndarray, group: Chunks) -> bytes:
    """`indices`: ascending, (kept,), counted from the group's first value."""
    inside = indices.reshape(group.count, group.keep) - group.width * np.arange(group.count)[:, None]
    low = inside & (1 << group.low_bits) - 1
    bitmap = np.zeros((group.count, group.map_bits), dtype=np.uint8)
    np.put_along_axis(bitmap, (inside >> group.low_bits) + np.arange(group.keep), 1, axis=1)
    return pack_planes(low.reshape(-1), group.low_bits) + np.packbits(bitmap).tobytes()


def _unpack_indices(low: np.ndarray, bitmap: np.ndarray, group: Chunks, into: np.ndarray) -> None:
    """Writes flat indices in the layout, (kept,), int64. Raises CodecError unless each chunk has its k, ascending and
    in range."""
    bits = unpack_bits(bitmap, group.count * group.map_bits)
    ones = np.flatnonzero(bits.view(np.bool_))
    if ones.size != group.kept:
        raise CodecError("sparse: not as many indices as there are values")
    starts = np.arange(group.count)[:, None]
    inside = into.reshape(group.count, group.keep)
    np.subtract(ones.reshape(inside.shape), group.map_bits * starts + np.arange(group.keep), out=inside)
    # A one that belongs to the chunk before or after shows as an index out of range.
    below = bool((inside[:, 0] < 0).any())
    np.left_shift(inside, group.low_bits, out=inside)
    np.bitwise_or(inside, unpack_planes(low, group.kept, group.low_bits).reshape(inside.shape), out=inside)
    if below or bool((inside[:, -1] >= group.width).any()):
        raise CodecError("sparse: indices out of range")
    if bool((inside[:, 1:] <= inside[:, :-1]).any()):
        raise CodecError("sparse: indices are not increasing")
    inside += group.offset + group.width * starts


def _quantize(values: Flat) -> tuple[np.ndarray, np.ndarray]:
    """(levels (4,), code of each value): bins a quarter of six standard deviations wide, decoded as their means."""
    shift = values.mean()
    scale = SIGMAS * values.std() / LEVELS
    if not scale > 0:
        return np.full(LEVELS, shift, dtype=np.float32), np.zeros(values.size, dtype=np.uint8)
    codes = np.rint((values - shift) / scale + 2).clip(0, LEVELS - 1).astype(np.uint8)
    counts = np.bincount(codes, minlength=LEVELS)
    sums = np.bincount(codes, weights=values, minlength=LEVELS)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.0).astype(np.float32), codes
