"""`int8`: linear 8 bit with one float32 scale (absmax / 127) per block of values.

Decoding is one float32 multiply per value, so it gives the same bits everywhere.
"""

from __future__ import annotations

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.aggregate import Contribution, Dense
from potluck.swarm.codecs.frame import HEADER_BYTES, MAX_MAGNITUDE, Reader, header
from potluck.swarm.layout import Flat, Layout


class Int8Codec:
    name = "int8"
    has_residual = False

    def __init__(self, block: int = 256) -> None:
        if not 16 <= block <= 65536:
            raise ValueError("block must be 16 to 65536 values")
        self.block = int(block)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        scales, codes = quantize(delta, self.block)
        return header(self.name, layout) + scales.tobytes() + codes.tobytes()

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        blocks = -(-layout.size // self.block)
        reader = Reader(blob, self.name, layout, 4 * blocks + layout.size)
        scales, codes = reader.take("<f4", blocks), reader.take("i1", layout.size)
        return Dense(dequantize(scales, codes, self.block))

    def max_bytes(self, layout: Layout) -> int:
        return HEADER_BYTES + 4 * -(-layout.size // self.block) + layout.size


def quantize(values: Flat, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(scales float32 (ceil(n / block),), codes int8 (n,)). Non-finite input is our own bug and raises ValueError."""
    n = values.size
    padded = np.zeros(-(-n // block) * block, dtype=np.float32)
    padded[:n] = values
    rows = padded.reshape(-1, block)
    scales = (np.abs(rows).max(axis=1) / np.float32(127)).astype("<f4")
    if not np.isfinite(scales).all():
        raise ValueError("cannot quantize values that are not finite")
    divisor = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(rows / divisor[:, None]).clip(-127, 127).astype(np.int8)
    return scales, codes.reshape(-1)[:n]


def dequantize(scales: np.ndarray, codes: np.ndarray, block: int) -> Flat:
    """Inverse of `quantize`, for untrusted input: raises CodecError on a scale that is not finite or out of bounds."""
    if not bool(((scales >= 0) & (scales <= MAX_MAGNITUDE / 127)).all()):
        raise CodecError("int8: a block's scale is not finite, negative or too large")
    n = codes.size
    values = codes.astype(np.float32)
    full = n // block * block
    if full:
        body = values[:full].reshape(-1, block)
        np.multiply(body, scales[: full // block, None], out=body)
    if full < n:
        np.multiply(values[full:], scales[-1], out=values[full:])
    return values
