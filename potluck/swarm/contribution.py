"""A decoded contribution, of one of three kinds. What aggregation asks of each gives the same bits on every machine:
elementwise float32 operations, one at a time, and sums in a fixed order or of integers that are exact in any order.

None of it starts threads: they would wait for each other, for milliseconds where somebody else (training, for example)
has the processor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from potluck.swarm.blocks import Blocks
from potluck.swarm.compiled import FLOAT, FLOATS, INT, INT32S, INT64S, TO_FLOATS, UINT8S, compiled
from potluck.swarm.exact import square_sum, tree_sum
from potluck.swarm.layout import Flat, slabs

#: Values that are worked on together: they stay in the processor's cache.
SLAB_VALUES: Final = 1 << 18

#: Counts as a float32.
Factor = float | np.float32


@dataclass(frozen=True)
class Dense:
    """A value for every parameter, shape (layout.size,)."""

    values: Flat

    @cached_property
    def length(self) -> float:
        return _length(self.values)

    def add_to(self, update: Flat, part: slice, factor: Factor) -> None:
        """Adds this contribution's `part`, times a factor, to `update`, (part's size,)."""
        values = self.values[part]
        if update.size != values.size:
            raise IndexError(f"{values.size} values for {update.size}")
        _add(update, values, np.float32(factor))

    def read(self, part: slice, into: Flat) -> None:
        into[:] = self.values[part]

    def square_sum(self, part: slice) -> float:
        return square_sum(self.values[part])


class Sparse:
    """Values at strictly increasing flat `indices` (integers), zero elsewhere."""

    def __init__(self, indices: np.ndarray, values: Flat) -> None:
        self.indices, self._values = indices, values

    @property
    def values(self) -> Flat:
        """(len(indices),)"""
        return self._values

    @cached_property
    def length(self) -> float:
        return _length(self.values)

    def add_to(self, update: Flat, part: slice, factor: Factor) -> None:
        inside = self.inside(part)
        update[self.indices[inside] - part.start] += self._values[inside] * factor  # no index comes twice

    def square_sum(self, part: slice) -> float:
        return square_sum(self._values[self.inside(part)])

    def inside(self, part: slice) -> slice:
        """Where in `indices` those of a part of the flat vector are."""
        bounds = np.array([part.start, part.stop], dtype=self.indices.dtype)  # of another type, all indices are copied
        begin, end = self.indices.searchsorted(bounds)
        return slice(int(begin), int(end))


class Leveled(Sparse):
    """One of which each tensor has a few levels. `codes`: which level each value is, (len(indices),), uint8. `levels`:
    (tensors, levels), float32. `begins`: where in `indices` each tensor's begin, and the last one's end."""

    def __init__(self, indices: np.ndarray, codes: npt.NDArray[np.uint8], levels: Flat, begins: Sequence[int]) -> None:
        self.indices, self._codes, self._levels, self._begins = indices, codes, levels, begins

    @property
    def values(self) -> Flat:
        """Computed anew each time."""
        values = np.empty(len(self.indices), dtype=np.float32)
        for tensor, part in self._tensors(slice(0, values.size)):
            np.take(self._levels[tensor], self._codes[part], out=values[part], mode="clip")  # nothing is clipped
        return values

    def add_to(self, update: Flat, part: slice, factor: Factor) -> None:
        for tensor, inside in self._tensors(self.inside(part)):
            levels = self._levels[tensor] * factor
            if not _scatter(update, self.indices[inside], part.start, self._codes[inside], levels):
                raise IndexError(f"an index outside of {part}, or a code outside of {levels.size} levels")

    def square_sum(self, part: slice) -> float:
        """Each level's square times how often it comes."""
        total = 0.0
        for tensor, inside in self._tensors(self.inside(part)):
            for code, level in enumerate(self._levels[tensor].tolist()):
                total += level * level * _count(self._codes[inside], code)
        return total

    def _tensors(self, inside: slice) -> Iterator[tuple[int, slice]]:
        """(tensor, which of its values) for each that has some there."""
        for tensor in range(bisect_right(self._begins, inside.start) - 1, len(self._begins) - 1):
            begin, end = max(inside.start, self._begins[tensor]), min(inside.stop, self._begins[tensor + 1])
            if self._begins[tensor] >= inside.stop:
                return
            if begin < end:
                yield tensor, slice(begin, end)


@dataclass(frozen=True)
class Quantized:
    """Codes and scales as they were received, segment after segment. Values are computed a part at a time: as float32,
    a group's would take four to thirty times the memory."""

    segments: Sequence[Blocks]

    @property
    def values(self) -> Flat:
        """All of them, computed anew each time."""
        values = np.empty(self._starts[-1], dtype=np.float32)
        for part in slabs(0, values.size, SLAB_VALUES):
            self.read(part, values[part])
        return values

    def read(self, part: slice, into: Flat) -> None:
        """Writes those of a part, (part's size,)."""
        for one, begin, end, at in self._inside(part):
            one.read(begin, end, into[at : at + end - begin])

    @cached_property
    def length(self) -> float:
        return _length(self.values)

    def add_to(self, update: Flat, part: slice, factor: Factor) -> None:
        for one, begin, end, at in self._inside(part):
            one.add_to(update[at : at + end - begin], begin, end, factor)

    def move(self, theta: Flat, part: slice, into: Flat, rate: Factor) -> None:
        """Writes `theta`, (part's size,), less a part of the values times a rate: one pass over memory, not two."""
        for one, begin, end, at in self._inside(part):
            inside = slice(at, at + end - begin)
            one.move(theta[inside], begin, end, into[inside], rate)

    def square_sum(self, part: slice) -> float:
        return tree_sum(np.array([one.square_sum(begin, end) for one, begin, end, _ in self._inside(part)]))

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((one.size for one in self.segments), initial=0))

    def _inside(self, part: slice) -> Iterator[tuple[Blocks, int, int, int]]:
        """(segment, what of it lies in the part, and where there) for each that has some."""
        for number in range(bisect_right(self._starts, part.start) - 1, len(self.segments)):
            start, one = self._starts[number], self.segments[number]
            if start >= part.stop:
                return
            begin, end = max(part.start - start, 0), min(part.stop - start, one.size)
            if begin < end:
                yield one, begin, end, start + begin - part.start


Contribution = Dense | Sparse | Quantized
#: A dense update in parts of the flat vector, one after another; None: zeros.
Segments = Sequence[tuple[slice, Dense | Quantized | None]]


def _length(values: Flat) -> float:
    """Euclidean, for judging: need not be the same bits everywhere, as `square_sum` is."""
    return float(np.linalg.norm(values.astype(np.float64)))


@compiled((TO_FLOATS, FLOATS, FLOAT))
def _add(update: Flat, values: Flat, factor: np.float32) -> None:
    for i in range(values.size):
        update[i] += values[i] * factor


@compiled(*((TO_FLOATS, indices, INT, UINT8S, FLOATS) for indices in (INT32S, INT64S)))
def _scatter(update: Flat, indices: np.ndarray, start: int, codes: npt.NDArray[np.uint8], levels: Flat) -> bool:
    """Adds each code's level at its index, from `start` on. False, with some added, for what is out of range."""
    for i in range(indices.size):
        at, code = np.uint64(indices[i] - start), np.uint64(codes[i])  # negative: very large
        if at >= update.size or code >= levels.size:
            return False
        update[at] += levels[code]
    return True


@compiled((UINT8S, INT))
def _count(codes: npt.NDArray[np.uint8], wanted: int) -> int:
    found, code = np.int32(0), np.uint8(wanted)
    for i in range(codes.size):
        found = np.int32(found + (codes[i] == code))
    return int(found)
