"""`sparse`: top-k of each chunk, 2 bits a value, error feedback (SparseLoCo; Covenant-72B report, eq. 1-2).

acc = beta * residual + delta; the k largest of each chunk of C values are sent; residual = acc - what was sent.
A tensor is cut into flat chunks of C; its last, shorter chunk keeps its share of k (at least 1). Kept values are
quantized per tensor: shift = their mean, scale = 6 std / 4, bin = clamp(round((v - shift) / scale + 2), 0, 3), and a
bin decodes as the mean of the values that fell into it. Four float32 levels travel with each tensor.

Payload, per tensor in name order: 4 levels (float32), 2-bit codes, then indices within their chunk, sorted,
ceil(log2 C) bits each, every part padded to a whole byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from potluck.errors import CodecError
from potluck.swarm.aggregate import Contribution, Sparse
from potluck.swarm.codecs.frame import HEADER_BYTES, Reader, check_bounded, header
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
    def kept(self) -> int:
        return self.count * self.keep

    @property
    def index_bits(self) -> int:
        return max(1, (self.width - 1).bit_length())

    @property
    def index_bytes(self) -> int:
        return -(-self.kept * self.index_bits // 8)


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
        acc = delta if residual is None else np.float32(self.beta) * residual + delta
        if not np.isfinite(acc).all():
            raise ValueError("cannot encode values that are not finite")
        parts = [header(self.name, layout)]
        if residual is not None:
            residual[:] = acc
        for slot in layout.slots:
            groups = list(self._groups(slot))
            picked = [_top_k(acc, group) for group in groups]
            where = np.concatenate([_flat_index(g, i).reshape(-1) for g, i in zip(groups, picked, strict=True)])
            levels, codes = _quantize(acc[where])
            parts += [levels.astype("<f4").tobytes(), _pack(codes, 2)]
            parts += [_pack(i.reshape(-1), g.index_bits) for g, i in zip(groups, picked, strict=True)]
            if residual is not None:
                residual[where] -= levels[codes]
        return b"".join(parts)

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        reader = Reader(blob, self.name, layout, self.max_bytes(layout) - HEADER_BYTES)
        indices, values = [], []
        for slot in layout.slots:
            groups = list(self._groups(slot))
            kept = sum(group.kept for group in groups)
            levels = reader.take("<f4", LEVELS)
            check_bounded(self.name, levels)
            values.append(levels[_unpack(reader.take("u1", _bytes(kept, 2)), kept, 2)])
            for group in groups:
                packed = reader.take("u1", group.index_bytes)
                inside = _unpack(packed, group.kept, group.index_bits).reshape(group.count, group.keep)
                if bool((inside[:, -1] >= group.width).any()) or bool((np.diff(inside, axis=1) <= 0).any()):
                    raise CodecError("sparse: indices out of range or not increasing")
                indices.append(_flat_index(group, inside).reshape(-1))
        return Sparse(np.concatenate(indices), np.concatenate(values).astype(np.float32, copy=False))

    def max_bytes(self, layout: Layout) -> int:
        payload = 0
        for slot in layout.slots:
            groups = list(self._groups(slot))
            payload += 4 * LEVELS + _bytes(sum(g.kept for g in groups), 2) + sum(g.index_bytes for g in groups)
        return HEADER_BYTES + payload

    def _groups(self, slot: Slot) -> Iterator[Chunks]:
        full, rest = divmod(slot.size, self.chunk)
        if full:
            yield Chunks(slot.offset, full, self.chunk, self.k)
        if rest:
            keep = min(rest, max(1, round(self.k * rest / self.chunk)))
            yield Chunks(slot.offset + full * self.chunk, 1, rest, keep)


def _top_k(acc: Flat, group: Chunks) -> np.ndarray:
    """Indices within each chunk of its largest magnitudes, sorted, shape (count, keep)."""
    rows = acc[group.offset : group.offset + group.count * group.width].reshape(group.count, group.width)
    top = torch.from_numpy(rows).abs().topk(group.keep, dim=1, sorted=False).indices
    return top.sort(dim=1).values.numpy()


def _flat_index(group: Chunks, inside: np.ndarray) -> np.ndarray:
    starts = group.offset + group.width * np.arange(group.count, dtype=np.int64)
    return starts[:, None] + inside.astype(np.int64)


def _quantize(values: Flat) -> tuple[np.ndarray, np.ndarray]:
    """(levels (4,), code of each value): bins a quarter of six standard deviations wide, decoded as their means."""
    shift = values.mean()
    scale = SIGMAS * values.std() / LEVELS
    if not scale > 0:
        return np.full(LEVELS, shift, dtype=np.float32), np.zeros(values.size, dtype=np.int64)
    codes = np.rint((values - shift) / scale + 2).clip(0, LEVELS - 1).astype(np.int64)
    counts = np.bincount(codes, minlength=LEVELS)
    sums = np.bincount(codes, weights=values, minlength=LEVELS)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.0).astype(np.float32), codes


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _pack(values: np.ndarray, bits: int) -> bytes:
    """Unsigned integers as `bits` bits each, most significant bit first, padded to whole bytes."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(((values[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()


def _unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    rows = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    powers = (1 << np.arange(bits - 1, -1, -1)).astype(np.int32)
    return rows @ powers
