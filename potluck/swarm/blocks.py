"""Values as small integers, each block of them times a scale of its own: what 8, 4 and 1 bit codecs send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from potluck.swarm.compiled import FLOAT, FLOATS, INT, INT8S, TO_FLOATS, TO_INT32S, compiled
from potluck.swarm.exact import square_sum, tree_sum
from potluck.swarm.layout import Flat

Int8s = npt.NDArray[np.int8]


class Codes(Protocol):
    """Small integers, as int8 where they are looked at."""

    def __getitem__(self, part: slice) -> Int8s: ...


@dataclass(frozen=True)
class Blocks:
    """`size` values, in blocks of `block` (the last may be shorter). Codes from others were checked (`squares_of`)."""

    size: int
    block: int
    #: (ceil(size / block),)
    scales: Flat
    codes: Codes
    #: Of each block the sum of its squared codes, (ceil(size / block),): whole numbers, exact in any order.
    squares: npt.NDArray[np.integer]

    def read(self, begin: int, end: int, into: Flat) -> None:
        """Writes values `begin` to `end`, (end - begin,)."""
        _read(into, self._codes(begin, end, into), self._scales(begin, end), self.block, begin % self.block)

    def add_to(self, update: Flat, begin: int, end: int, factor: float | np.float32) -> None:
        """Adds them times a factor, which the scales are multiplied by first."""
        scales = self._scales(begin, end) * factor
        _add(update, self._codes(begin, end, update), scales, self.block, begin % self.block)

    def move(self, theta: Flat, begin: int, end: int, into: Flat, rate: float | np.float32) -> None:
        """Writes `theta` less them times a rate, which they are multiplied by last."""
        if theta.size != into.size:
            raise IndexError(f"{theta.size} values for {into.size}")
        codes, scales = self._codes(begin, end, into), self._scales(begin, end)
        _move(into, theta, codes, scales, np.float32(rate), self.block, begin % self.block)

    def square_sum(self, begin: int, end: int) -> float:
        first, last = -(-begin // self.block), end // self.block
        if first >= last:
            return self._square_sum(begin, end)
        scales = self.scales[first:last].astype(np.float64)
        whole = tree_sum(scales * scales * self.squares[first:last])
        return self._square_sum(begin, first * self.block) + whole + self._square_sum(last * self.block, end)

    def _square_sum(self, begin: int, end: int) -> float:
        values = np.empty(end - begin, dtype=np.float32)
        self.read(begin, end, values)
        return square_sum(values)

    def _scales(self, begin: int, end: int) -> Flat:
        return self.scales[begin // self.block : -(-end // self.block)]

    def _codes(self, begin: int, end: int, values: Flat) -> Int8s:
        codes = self.codes[begin:end]
        if not codes.size == values.size == end - begin:
            raise IndexError(f"{codes.size} codes, {values.size} values where {end - begin} are wanted")
        return codes


def squares_of(codes: Codes, size: int, block: int, slab: int) -> tuple[npt.NDArray[np.int32], int]:
    """(`Blocks.squares`, the least code), in slabs of about so many values. `block` is at most 2^16."""
    squares, least, step = np.empty(-(-size // block), dtype=np.int32), 0, max(1, slab // block)
    for at in range(0, len(squares), step):
        part = codes[at * block : min(size, (at + step) * block)]
        least = min(least, _square(squares[at : at + step], part, block))
    return squares, least


def dequantized(codes: Int8s, scales: Flat, block: int) -> Flat:
    """Codes times scales, (codes.size,)."""
    values = np.empty(codes.size, dtype=np.float32)
    _read(values, codes, scales, block, 0)
    return values


# Of the first block, `skipped` values come before those that are given.


@compiled((TO_FLOATS, INT8S, FLOATS, INT, INT))
def _read(values: Flat, codes: Int8s, scales: Flat, block: int, skipped: int) -> None:
    for number in range(scales.size):
        begin, end = max(0, number * block - skipped), min(values.size, (number + 1) * block - skipped)
        into, part, scale = values[begin:end], codes[begin:end], scales[number]
        for i in range(part.size):
            into[i] = np.float32(part[i]) * scale


@compiled((TO_FLOATS, FLOATS, INT8S, FLOATS, FLOAT, INT, INT))
def _move(values: Flat, theta: Flat, codes: Int8s, scales: Flat, rate: np.float32, block: int, skipped: int) -> None:
    for number in range(scales.size):
        begin, end = max(0, number * block - skipped), min(values.size, (number + 1) * block - skipped)
        into, before, part, scale = values[begin:end], theta[begin:end], codes[begin:end], scales[number]
        for i in range(part.size):
            into[i] = before[i] - np.float32(part[i]) * scale * rate


@compiled((TO_FLOATS, INT8S, FLOATS, INT, INT))
def _add(values: Flat, codes: Int8s, scales: Flat, block: int, skipped: int) -> None:
    for number in range(scales.size):
        begin, end = max(0, number * block - skipped), min(values.size, (number + 1) * block - skipped)
        into, part, scale = values[begin:end], codes[begin:end], scales[number]
        for i in range(part.size):
            into[i] += np.float32(part[i]) * scale


@compiled((TO_INT32S, INT8S, INT))
def _square(squares: npt.NDArray[np.int32], codes: Int8s, block: int) -> int:
    least = np.int8(0)
    for number in range(squares.size):
        part, total = codes[number * block : (number + 1) * block], np.int32(0)
        for i in range(part.size):
            total += np.int32(part[i]) * np.int32(part[i])
            least = min(least, part[i])
        squares[number] = total
    return int(least)
