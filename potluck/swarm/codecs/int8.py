"""`int8`: linear 8 bit with one float32 scale (absmax / 127) per block of values.

Decoding is one float32 multiply per value, so it gives the same bits everywhere. Values are gone through in slabs that
stay in the processor's cache: each pass over all of them would cost as much as a copy.
"""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from potluck.errors import CodecError
from potluck.swarm.aggregate import Contribution, Dense
from potluck.swarm.codecs.frame import HEADER_BYTES, MAX_MAGNITUDE, Reader, header
from potluck.swarm.layout import Flat, Layout

#: About so many values are worked on together, a whole number of blocks.
SLAB_VALUES: Final = 1 << 18
INT8_LEVELS: Final = 127

Codes = npt.NDArray[np.int8]

# What was received is only read.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)


class Int8Codec:
    name = "int8"
    has_residual = False

    def __init__(self, block: int = 256) -> None:
        if not 16 <= block <= 65536:
            raise ValueError("block must be 16 to 65536 values")
        self.block = int(block)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        scales, codes = quantize(delta, self.block)
        return b"".join([header(self.name, layout), scales.data, codes.data])

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        blocks = -(-layout.size // self.block)
        reader = Reader(blob, self.name, layout, 4 * blocks + layout.size)
        scales, codes = reader.take("<f4", blocks), reader.take("i1", layout.size)
        return Dense(dequantize(scales, codes, self.block))

    def max_bytes(self, layout: Layout) -> int:
        return HEADER_BYTES + 4 * -(-layout.size // self.block) + layout.size


def quantize(values: Flat, block: int, levels: int = INT8_LEVELS) -> tuple[Flat, Codes]:
    """(scales float32 (ceil(n / block),), codes int8 (n,) of -levels to levels). Non-finite input is our own bug and
    raises ValueError."""
    n = values.size
    source = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    scales, codes = torch.empty(-(-n // block)), torch.empty(n, dtype=torch.int8)
    slab = max(1, SLAB_VALUES // block) * block
    for start in range(0, n, slab):
        part = source[start : start + slab]
        whole = part.numel() // block * block
        for begin, end, width in ((0, whole, block), (whole, part.numel(), part.numel() - whole)):
            if end > begin:
                first = (start + begin) // block
                into = scales[first : first + (end - begin) // width]
                codes[start + begin : start + end] = _quantize(part[begin:end].view(-1, width), into, levels)
    if not bool(scales.isfinite().all()):
        raise ValueError("cannot quantize values that are not finite")
    return scales.numpy().astype("<f4", copy=False), codes.numpy()


def _quantize(rows: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
    """Writes each row's scale; gives the codes as floats, flat."""
    work = rows.abs()
    torch.mul(work.amax(1), 1.0 / levels, out=scales)
    inverse = scales.reciprocal()
    inverse[~inverse.isfinite()] = 0.0  # of nothing, or of less than float32 can divide by
    torch.mul(rows, inverse[:, None], out=work)
    return work.round_().clamp_(-levels, levels).view(-1)


def dequantize(scales: Flat, codes: Codes, block: int, levels: int = INT8_LEVELS) -> Flat:
    """Inverse of `quantize`, for untrusted input: raises CodecError on a scale that is not finite or out of bounds."""
    if not bool(((scales >= 0) & (scales <= MAX_MAGNITUDE / levels)).all()):
        raise CodecError("a block's scale is not finite, negative or too large")
    n, values = codes.size, np.empty(codes.size, dtype=np.float32)
    whole, slab = n // block * block, max(1, 4 * SLAB_VALUES // block) * block
    into, given, factors = torch.from_numpy(values), torch.from_numpy(codes), torch.from_numpy(scales)
    for start in range(0, whole, slab):
        part = slice(start, min(whole, start + slab))
        rows = slice(start // block, part.stop // block)
        torch.mul(given[part].view(-1, block), factors[rows, None], out=into[part].view(-1, block))
    if whole < n:
        torch.mul(given[whole:], factors[-1], out=into[whole:])
    return values
