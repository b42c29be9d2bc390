"""Reductions that give the same bits on every machine.

Peers compare digests of their parameters, so equal inputs must give equal bits whatever the SIMD width, the thread
count or the library. Elementwise IEEE adds and multiplies do; a library's `sum` or `norm` may not. These reductions
are built of elementwise operations in a fixed order only (`rounds.md`, "Bit-identity across unlike hardware").
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from potluck.swarm.compiled import FLOATS, INFINITE, INT, INT32S, MAGNITUDE, TO_DOUBLES, compiled

#: Sums that are kept side by side: they and their summands stay in the processor's cache.
LANES: Final = 1 << 15
#: Of `square_distance`.
PAIR_LANES: Final = 1 << 10


@compiled((TO_DOUBLES,))
def tree_sum(values: npt.NDArray[np.float64]) -> float:
    """Sum by halving: the upper half is added onto the lower one until one value is left. Destroys `values`."""
    n = values.size
    if n == 0:
        return 0.0
    while n > 1:
        half = n // 2
        lower, upper = values[:half], values[half : 2 * half]
        for i in range(lower.size):
            lower[i] += upper[i]
        if n % 2:
            values[0] += values[n - 1]
        n = half
    return float(values[0])


def square_sum(values: npt.NDArray[np.float32]) -> float:
    """Squares of float32 are exact in float64. They are added up in `LANES` sums, value i in the (i mod LANES)-th, one
    after another; these by halving."""
    lanes = np.zeros(min(values.size, LANES))
    _add_squares(lanes, values, LANES)
    return tree_sum(lanes)


def square_distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Of two points of one size. Their float32 differences are squared and added up as `square_sum` does, but in
    `PAIR_LANES` sums: rules compare many pairs of short slabs."""
    if one.size != other.size:
        raise IndexError(f"{one.size} values and {other.size}")
    lanes = np.zeros(min(one.size, PAIR_LANES))
    _add_square_differences(lanes, one, other, PAIR_LANES)
    return tree_sum(lanes)


def all_finite(values: npt.NDArray[np.float32]) -> bool:
    """Whether none of them, C-contiguous, is infinite or no number."""
    return _largest_magnitude(values.view(np.int32)) < INFINITE


def all_within(values: npt.NDArray[np.float32], most: float) -> bool:
    """Whether the magnitude of each, C-contiguous, is a number, and at most that."""
    return _largest_magnitude(values.view(np.int32)) <= int(np.float32(most).view(np.int32))


def norm(values: npt.NDArray[np.float32]) -> float:
    """Euclidean norm. The square root is correctly rounded (IEEE 754)."""
    return math.sqrt(square_sum(values))


@compiled((INT32S,))
def _largest_magnitude(bits: npt.NDArray[np.int32]) -> int:
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.int32(MAGNITUDE))
    return int(largest)


@compiled((TO_DOUBLES, FLOATS, INT))
def _add_squares(lanes: npt.NDArray[np.float64], values: npt.NDArray[np.float32], most: int) -> None:
    """`lanes`: (min(most, values.size),)."""
    for start in range(0, values.size, most):
        part = values[start : start + most]
        for i in range(part.size):
            lanes[i] += np.float64(part[i]) * np.float64(part[i])


@compiled((TO_DOUBLES, FLOATS, FLOATS, INT))
def _add_square_differences(
    lanes: npt.NDArray[np.float64], one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], most: int
) -> None:
    """`lanes`: (min(most, one.size),)."""
    for start in range(0, one.size, most):
        ours, theirs = one[start : start + most], other[start : start + most]
        for i in range(ours.size):
            difference = np.float64(ours[i] - theirs[i])
            lanes[i] += difference * difference
