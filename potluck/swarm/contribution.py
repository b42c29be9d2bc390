"""A decoded contribution, of one of three kinds. What aggregation asks of each gives the same bits on every machine:
elementwise float32 operations, one at a time, and sums in a fixed order or of integers that are exact in any order.

None of it starts threads. Torch's wait for each other after every operation, for milliseconds where somebody else
(training, for example) has the processor; Python's spend more time on handing over its lock than such short operations
take.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from potluck.swarm.exact import square_sum, tree_sum
from potluck.swarm.layout import Flat

#: Values that are worked on together: they stay in the processor's cache.
SLAB_VALUES: Final = 1 << 18
#: Of 8 bits.
MAX_CODE: Final = 128
#: Operations on so many values torch does not share out among its threads (less than its GRAIN_SIZE).
UNSHARED_VALUES: Final = (1 << 15) - 1

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
        np.add(update, self.values[part] * factor, out=update)

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
        self._add(update, part, inside, self._values[inside] * factor)

    def square_sum(self, part: slice) -> float:
        return square_sum(self._values[self.inside(part)])

    def inside(self, part: slice) -> slice:
        """Where in `indices` those of a part of the flat vector are."""
        bounds = np.array([part.start, part.stop], dtype=self.indices.dtype)  # of another type, all indices are copied
        begin, end = self.indices.searchsorted(bounds)
        return slice(int(begin), int(end))

    def _add(self, update: Flat, part: slice, inside: slice, values: Flat) -> None:
        """`update` has the part's values."""
        where = torch.from_numpy(np.subtract(self.indices[inside], part.start, dtype=np.int64))
        # Twice as fast as NumPy's. No index comes twice, so that there is no order to it.
        torch.from_numpy(update).scatter_add_(0, where, torch.from_numpy(values))


class Leveled(Sparse):
    """One of which each tensor has a few levels. `codes`: which level each value is, (len(indices),), uint8. `levels`:
    (tensors, levels), float32. `begins`: where in `indices` each tensor's begin, and the last one's end."""

    def __init__(self, indices: np.ndarray, codes: npt.NDArray[np.uint8], levels: Flat, begins: Sequence[int]) -> None:
        self.indices, self._codes, self._levels, self._begins = indices, codes, levels, begins

    @property
    def values(self) -> Flat:
        """Computed anew each time."""
        return self._values_of(slice(0, len(self.indices)), self._levels)

    def add_to(self, update: Flat, part: slice, factor: Factor) -> None:
        inside = self.inside(part)
        self._add(update, part, inside, self._values_of(inside, self._levels * factor))

    def square_sum(self, part: slice) -> float:
        """Each level's square times how often it comes."""
        total = 0.0
        for tensor, inside in self._tensors(self.inside(part)):
            codes = self._codes[inside]
            for code, level in enumerate(self._levels[tensor].tolist()):
                total += level * level * np.count_nonzero(codes == code)
        return total

    def _values_of(self, inside: slice, levels: Flat) -> Flat:
        values = np.empty(inside.stop - inside.start, dtype=np.float32)
        for tensor, part in self._tensors(inside):
            out = values[part.start - inside.start : part.stop - inside.start]
            np.take(levels[tensor], self._codes[part], out=out, mode="clip")  # codes are in range: nothing is clipped
        return values

    def _tensors(self, inside: slice) -> Iterator[tuple[int, slice]]:
        """(tensor, which of its values) for each that has some there."""
        for tensor in range(bisect_right(self._begins, inside.start) - 1, len(self._begins) - 1):
            begin, end = max(inside.start, self._begins[tensor]), min(inside.stop, self._begins[tensor + 1])
            if self._begins[tensor] >= inside.stop:
                return
            if begin < end:
                yield tensor, slice(begin, end)


class Codes(Protocol):
    """Small integers, as int8 where they are looked at."""

    def __getitem__(self, part: slice) -> npt.NDArray[np.int8]: ...


@dataclass(frozen=True)
class Blocks:
    """Values that are a code times the scale of its block, in blocks of `block` values (the last may be shorter)."""

    size: int
    block: int
    #: (ceil(size / block),)
    scales: Flat
    codes: Codes

    def read(self, begin: int, end: int, factor: Factor = 1.0, into: Flat | None = None) -> Flat:
        """Values `begin` to `end` times a factor, which the scales are multiplied by first."""
        out = np.empty(end - begin, dtype=np.float32) if into is None else into
        np.copyto(out, self.codes[begin:end])
        scales = self.scales[begin // self.block : -(-end // self.block)] * factor
        first, last = -(-begin // self.block), end // self.block
        if first > last:  # inside one block
            np.multiply(out, scales[0], out=out)
            return out
        head, tail = first * self.block - begin, last * self.block - begin
        if head:
            np.multiply(out[:head], scales[0], out=out[:head])
        if last > first:
            at = 1 if head else 0
            _scale(out[head:tail].reshape(-1, self.block), scales[at : at + last - first])
        if tail < out.size:
            np.multiply(out[tail:], scales[-1], out=out[tail:])
        return out

    def square_sum(self, begin: int, end: int) -> float:
        first, last = -(-begin // self.block), end // self.block
        if first >= last:
            return square_sum(self.read(begin, end))
        scales = self.scales[first:last].astype(np.float64)
        head = square_sum(self.read(begin, first * self.block))
        tail = square_sum(self.read(last * self.block, end))
        return head + tree_sum(scales * scales * self._squares[first:last]) + tail

    @cached_property
    def _squares(self) -> np.ndarray:
        """Of each whole block the sum of its squared codes: whole numbers, exact in any order."""
        blocks, step = self.size // self.block, SLAB_VALUES // self.block
        if step == 0:
            return np.array([self._square(row * self.block, (row + 1) * self.block) for row in range(blocks)])
        dtype: type[np.floating] = np.float32 if self.block * MAX_CODE**2 < 2**24 else np.float64
        found, scratch = np.empty(blocks, dtype=dtype), np.empty((min(step, blocks), self.block), dtype=dtype)
        for first in range(0, blocks, step):
            last = min(blocks, first + step)
            codes = scratch[: last - first]
            np.copyto(codes, self.codes[first * self.block : last * self.block].reshape(codes.shape))
            np.einsum("ij,ij->i", codes, codes, out=found[first:last])
        return found

    def _square(self, begin: int, end: int) -> float:
        parts = (self.codes[at : min(end, at + SLAB_VALUES)] for at in range(begin, end, SLAB_VALUES))
        return sum(float(np.square(part, dtype=np.int32).sum(dtype=np.int64)) for part in parts)


def _scale(rows: np.ndarray, scales: Flat) -> None:
    """Multiplies each row. torch is three times as fast as NumPy at this; see above about its threads."""
    together = UNSHARED_VALUES // rows.shape[1] if torch.get_num_threads() > 1 else len(rows)
    if together == 0:
        for row, scale in zip(rows, scales, strict=True):
            np.multiply(row, scale, out=row)
        return
    parts: Iterable[Tensor] = torch.from_numpy(rows).split(together)  # type: ignore[no-untyped-call]
    factors: Iterable[Tensor] = torch.from_numpy(scales)[:, None].split(together)  # type: ignore[no-untyped-call]
    for part, of in zip(parts, factors, strict=True):
        part.mul_(of)


@dataclass(frozen=True)
class Quantized:
    """Codes and scales as they were received, segment after segment. Values are computed a part at a time: as float32,
    a group's would take four to thirty times the memory."""

    segments: Sequence[Blocks]

    @property
    def values(self) -> Flat:
        """All of them, computed anew each time."""
        values = np.empty(sum(one.size for one in self.segments), dtype=np.float32)
        for start in range(0, values.size, SLAB_VALUES):
            part = slice(start, min(values.size, start + SLAB_VALUES))
            for one, begin, end, at in self._inside(part):
                one.read(begin, end, into=values[part][at : at + end - begin])
        return values

    @cached_property
    def length(self) -> float:
        return _length(self.values)

    def add_to(self, update: Flat, part: slice, factor: Factor) -> None:
        for one, begin, end, at in self._inside(part):
            into = update[at : at + end - begin]
            np.add(into, one.read(begin, end, factor), out=into)

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


def _length(values: Flat) -> float:
    """Euclidean, for judging: need not be the same bits everywhere, as `square_sum` is."""
    return float(np.linalg.norm(values.astype(np.float64)))
