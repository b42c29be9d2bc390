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

#: Sums that are kept side by side: they and their summands stay in the processor's cache.
LANES: Final = 1 << 15


def tree_sum(values: npt.NDArray[np.float64]) -> float:
    """Sum by halving: the upper half is added onto the lower one until one value is left. Destroys `values`."""
    n = values.size
    if n == 0:
        return 0.0
    while n > 1:
        half = n // 2
        lower = values[:half]
        np.add(lower, values[half : 2 * half], out=lower)
        if n % 2:
            values[0] += values[n - 1]
        n = half
    return float(values[0])


def square_sum(values: npt.NDArray[np.float32]) -> float:
    """Squares of float32 are exact in float64. They are added up in `LANES` sums, value i in the (i mod LANES)-th, one
    after another; these by halving."""
    lanes = np.zeros(min(values.size, LANES))
    squares = np.empty_like(lanes)
    for start in range(0, values.size, LANES):
        part = values[start : start + LANES]
        square, into = squares[: part.size], lanes[: part.size]
        np.copyto(square, part)
        np.multiply(square, square, out=square)
        np.add(into, square, out=into)
    return tree_sum(lanes)


def norm(values: npt.NDArray[np.float32]) -> float:
    """Euclidean norm. The square root is correctly rounded (IEEE 754)."""
    return math.sqrt(square_sum(values))
