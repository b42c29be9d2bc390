"""Large vectors that are used again: new memory is cleared page by page, which costs more than the arithmetic."""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: States that are served, and those about to be.
MOST: Final = 16


def _references_without_users() -> int:
    """To a vector that nobody else has, counted as below: the list's and, on some versions of Python, the loop's and
    the count's own."""
    for vector in [np.empty(1)]:
        found = sys.getrefcount(vector)
    return found


UNUSED: Final = _references_without_users()


class Recycled:
    """Gives vectors of one size, and keeps up to `most`. One is given again when nothing refers to it any more: no
    view, no buffer, no tensor (each of them holds a reference to the array that its memory is of)."""

    def __init__(self, size: int, dtype: npt.DTypeLike = np.float32, most: int = MOST) -> None:
        self._size, self._dtype, self._most = size, dtype, most
        self._given: list[npt.NDArray[Any]] = []

    def any(self) -> npt.NDArray[Any]:
        """With whatever it had in it."""
        for vector in self._given:
            if sys.getrefcount(vector) == UNUSED:
                return vector
        new = np.empty(self._size, dtype=self._dtype)
        if len(self._given) < self._most:
            self._given.append(new)
        return new
