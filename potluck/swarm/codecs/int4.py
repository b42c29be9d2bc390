"""`int4`: linear 4 bit with one float32 scale (absmax / 7) per block of values.

Payload: scales, then two codes a byte, each plus 8: the first half of all codes in the low bits, the second in the
high ones.
"""

from __future__ import annotations

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.aggregate import Contribution, Dense
from potluck.swarm.codecs.frame import HEADER_BYTES, Reader, header
from potluck.swarm.codecs.int8 import dequantize, quantize
from potluck.swarm.layout import Flat, Layout

INT4_LEVELS = 7
#: Added to a code: a nibble is 1 to 15, and never 0.
OFFSET = 8


class Int4Codec:
    name = "int4"
    has_residual = False

    def __init__(self, block: int = 128) -> None:
        if not 16 <= block <= 65536:
            raise ValueError("block must be 16 to 65536 values")
        self.block = int(block)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        scales, codes = quantize(delta, self.block, INT4_LEVELS)
        nibbles = codes.view(np.uint8) + np.uint8(OFFSET)
        half = -(-layout.size // 2)
        packed = nibbles[:half].copy()
        packed[: layout.size - half] |= nibbles[half:] << 4
        return b"".join([header(self.name, layout), scales.data, packed.data])

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        blocks, half = -(-layout.size // self.block), -(-layout.size // 2)
        reader = Reader(blob, self.name, layout, 4 * blocks + half)
        scales, packed = reader.take("<f4", blocks), reader.take("u1", half)
        nibbles = np.empty(2 * half, dtype=np.uint8)
        np.bitwise_and(packed, 15, out=nibbles[:half])
        np.right_shift(packed, 4, out=nibbles[half:])
        if not nibbles[: layout.size].all() or nibbles[layout.size :].any():
            raise CodecError("int4: a code is out of range, or padding is set")
        nibbles -= np.uint8(OFFSET)
        return Dense(dequantize(scales, nibbles.view(np.int8)[: layout.size], self.block, INT4_LEVELS))

    def max_bytes(self, layout: Layout) -> int:
        return HEADER_BYTES + 4 * -(-layout.size // self.block) + -(-layout.size // 2)
