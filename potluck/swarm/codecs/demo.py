"""`demo`: the largest DCT coefficients of each block, 2 bits a value, error feedback (DeMo, arXiv 2411.19870).

A tensor of rows and columns is cut into blocks of up to 64x64 (of each side the largest divisor up to 64; a tensor of
one dimension is one row, one of more than two has its first dimension as rows). Each block's orthonormal DCT-II is
taken; acc = beta * residual + coefficients; the k largest of 4096 are sent (smaller blocks keep their share, at least
1); residual = acc - what was sent. Residual and contribution are vectors of coefficients, block after block in the
layout's index space, and packed as `sparse` packs (`sparse.py`) with four other levels. Norms per tensor are the same
as of parameters, so a group is clipped and averaged coefficient by coefficient; `update_of` turns the outcome into
parameters. DeMo's alpha below 1, and the sign of the update instead of the update, measured worse here
(docs/convergence.md).

Peers compare digests of parameters, so `update_of` gives the same bits everywhere, in any order of summation: it
multiplies integers that float64 carries exactly. With basis entries of up to 2^22 and coefficients of up to 2^23 (per
tensor relative to a power of two), a sum over one side is below 2^48, and over both, rounded to 2^26 between, below
2^51: sums of |entries| of a column of the basis are at most sqrt(64) of its length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np

from potluck.swarm.codecs.sparse import Chunks, SparseCodec
from potluck.swarm.contribution import SLAB_VALUES
from potluck.swarm.layout import Flat, Layout, Slot

MOST_SIDE: Final = 64
BASIS_BITS: Final = 22
COEFFICIENT_BITS: Final = 23
#: Two leave 3 % more error than fifty.
LLOYD_STEPS: Final = 2


@dataclass(frozen=True)
class Grid:
    """A tensor as `rows` x `columns` blocks of `height` x `width` values. Blocks of height 1 all count as rows."""

    rows: int
    height: int
    columns: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Grid:
        first = shape[0] if len(shape) > 1 else 1
        second = math.prod(shape) // first
        height, width = largest_divisor(first), largest_divisor(second)
        if height == 1:
            return cls(first * second // width, 1, 1, width)
        return cls(first // height, height, second // width, width)

    def bands(self) -> Iterator[slice]:
        """Rows of blocks that are transformed together."""
        step = max(1, SLAB_VALUES // (self.height * self.columns * self.width))
        return (slice(at, min(at + step, self.rows)) for at in range(0, self.rows, step))


class DemoCodec(SparseCodec):
    name = "demo"
    transforms = True

    def __init__(self, k: int = 32, beta: float = 0.95) -> None:
        super().__init__(chunk=MOST_SIDE**2, k=k, beta=beta)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        return super().encode(coefficients_of(delta, layout), layout, residual)

    def update_of(self, aggregated: Flat, layout: Layout) -> Flat:
        """Inverse DCT of each block, the same bits on every machine."""
        return parameters_of(aggregated, layout)

    def _codes(self, values: Flat) -> np.ndarray:
        """The sign, and on which side of a threshold the magnitude is: where the means of both sides meet (Lloyd-Max).
        Coefficients are close to normal, and none of those kept is near zero: a third of the error of even bins."""
        sizes = np.abs(values)
        threshold = sizes.mean()
        for _ in range(LLOYD_STEPS):
            large = sizes > threshold
            if large.all() or not large.any():
                break
            threshold = (sizes[large].mean() + sizes[~large].mean()) / 2
        codes: np.ndarray = 2 * (values < 0).astype(np.uint8) + (sizes > threshold)
        return codes

    def _groups(self, slot: Slot) -> Iterator[Chunks]:
        grid = Grid.of(slot.shape)
        size = grid.height * grid.width
        keep = min(size, max(1, round(self.k * size / self.chunk)))
        yield Chunks(slot.offset, grid.rows * grid.columns, size, keep)


def coefficients_of(delta: Flat, layout: Layout) -> Flat:
    """DCT-II of each block, in float32. What is sent is decided by one peer: others need not find the same bits."""
    out = layout.empty()
    for slot in layout.slots:
        grid = Grid.of(slot.shape)
        down, across = ((_basis(side) / 2**BASIS_BITS).astype(np.float32) for side in (grid.height, grid.width))
        blocks = out[slot.range].reshape(grid.rows, grid.columns, grid.height, grid.width)
        rows = delta[slot.range].reshape(grid.rows, grid.height, grid.columns, grid.width).transpose(0, 2, 1, 3)
        for band in grid.bands():
            half = rows[band] if grid.height == 1 else np.matmul(down, rows[band])
            blocks[band] = _times(half, across.T)
    return out


def parameters_of(coefficients: Flat, layout: Layout) -> Flat:
    """Inverse of `coefficients_of`, to 2^-22 of a tensor's largest coefficient; exact integers, so equal bits."""
    out = layout.empty()
    for slot in layout.slots:
        grid = Grid.of(slot.shape)
        down, across = _basis(grid.height), _basis(grid.width)
        blocks = coefficients[slot.range].reshape(grid.rows, grid.columns, grid.height, grid.width)
        rows = out[slot.range].reshape(grid.rows, grid.height, grid.columns, grid.width).transpose(0, 2, 1, 3)
        exponent = COEFFICIENT_BITS - math.frexp(float(np.abs(coefficients[slot.range]).max()))[1]
        for band in grid.bands():
            whole = np.rint(blocks[band].astype(np.float64) * 2.0**exponent)
            half = np.rint(_times(whole, across) * 2.0**-BASIS_BITS)
            full = half if grid.height == 1 else np.matmul(down.T, half)
            rows[band] = full * 2.0 ** -(exponent + (0 if grid.height == 1 else BASIS_BITS))
    return out


def _times(blocks: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Each block (…, height, width) times a matrix (width, width). Products are of 64 rows at most: larger ones NumPy's
    library would share out among threads (`contribution.py`)."""
    alone = blocks.shape[-2] == 1
    together = blocks.reshape(-1, largest_divisor(len(blocks)), blocks.shape[-1]) if alone else blocks
    product: np.ndarray = np.matmul(together, matrix)
    return product.reshape(blocks.shape)


def largest_divisor(side: int) -> int:
    return next(d for d in range(min(side, MOST_SIDE), 0, -1) if side % d == 0)


@cache
def _basis(side: int) -> np.ndarray:
    """DCT-II matrix times 2^BASIS_BITS, integers, shape (side, side): coefficient, value. None of them is near a half,
    where machines' cosines could round to either side (checked in the tests)."""
    frequency, place = np.arange(side)[:, None], np.arange(side)[None, :]
    wave = np.cos(np.pi * (2 * place + 1) * frequency / (2 * side)) * math.sqrt(2 / side)
    wave[0] = math.sqrt(1 / side)
    basis: np.ndarray = np.rint(wave * 2**BASIS_BITS)
    return basis
