"""The largest magnitudes of each chunk, exactly.

Magnitudes compare as their bits do as an integer. The least one that is kept is found bit by bit from the highest on:
the number of values that reach it decides on each. A chunk's passes stay in the processor's nearest cache, and end when
as many values are left as are wanted (after about half of 31).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from potluck.swarm.compiled import INFINITE, INT, INT32S, MAGNITUDE, TO_INT32S, TO_INT64S, compiled
from potluck.swarm.layout import Flat

#: Bit of a float32 after its sign.
HIGHEST: Final = 1 << 30


def top_k(values: Flat, width: int, keep: int) -> npt.NDArray[np.int64]:
    """Flat indices (chunks * keep,), ascending, of each chunk's `keep` largest magnitudes; of equal ones the first.
    `values`: (chunks * width,). Raises ValueError for values that are not finite."""
    if values.size % width or not 0 < keep <= width:
        raise ValueError(f"{keep} of {width} from {values.size} values")
    found = np.empty(values.size // width * keep + 1, dtype=np.int64)
    if not _top_k(found, np.empty(width, dtype=np.int32), values.view(np.int32), width, keep):
        raise ValueError("cannot encode values that are not finite")
    return found[:-1]


@compiled((TO_INT64S, TO_INT32S, INT32S, INT, INT))
def _top_k(found: np.ndarray, sizes: np.ndarray, bits: np.ndarray, width: int, keep: int) -> bool:
    """False for values that are not finite. The last of `found` is scratch, as is `sizes`, (width,)."""
    n = 0
    for start in range(0, bits.size, width):
        row, most = bits[start : start + width], np.int32(0)
        for i in range(row.size):
            sizes[i] = row[i] & np.int32(MAGNITUDE)
            most = max(most, sizes[i])
        if most >= INFINITE:
            return False
        least, count, bit = np.int32(0), width, np.int32(HIGHEST)
        while bit and count > keep:
            higher = np.int32(least | bit)
            if higher <= most:
                reaching = np.int32(0)
                for i in range(sizes.size):
                    reaching = np.int32(reaching + (sizes[i] >= higher))  # a sum would be 64 bits wide
                if reaching >= keep:
                    least, count = higher, int(reaching)
            bit >>= 1
        if count == keep:
            for i in range(sizes.size):  # without a branch that the processor would have to guess
                found[n] = start + i
                n += sizes[i] >= least
            continue
        for i in range(sizes.size):
            count -= sizes[i] == least
        spare = keep - count  # of those equal to the least one
        for i in range(sizes.size):
            if sizes[i] > least or (sizes[i] == least and spare > 0):
                found[n] = start + i
                n += 1
                spare -= sizes[i] == least
    return True
