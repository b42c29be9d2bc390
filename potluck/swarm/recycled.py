"""Large vectors that are used again: new memory is cleared page by page, which costs more than the arithmetic."""

from __future__ import annotations

import sys
from typing import Final

import numpy as np

from potluck.swarm.layout import Flat

#: States that are served, and those about to be.
MOST: Final = 16
#: References to a vector that nobody else has: the list's, the loop's and the count's own.
UNUSED: Final = 3


class Recycled:
    """Gives vectors of one size. One is given again when nothing refers to it any more: no view, no buffer, no tensor
    (each of them holds a reference to the array that its memory is of)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._given: list[Flat] = []

    def zeros(self) -> Flat:
        for vector in self._given:
            if sys.getrefcount(vector) == UNUSED:
                vector.fill(0.0)
                return vector
        new = np.empty(self._size, dtype=np.float32)
        new.fill(0.0)
        if len(self._given) < MOST:
            self._given.append(new)
        return new
