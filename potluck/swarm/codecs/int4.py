"""`int4`: linear 4 bit with one float32 scale (absmax / 7) per block of values.

Of a segment's codes, each plus 8, the first half lies in the low bits of its bytes and the second in the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.codecs.int8 import BlockCodec, Bytes, Int8s

INT4_LEVELS = 7
#: Added to a code: a nibble is 1 to 15, and never 0.
OFFSET = 8


class Int4Codec(BlockCodec):
    name = "int4"
    levels = INT4_LEVELS
    packed = 2

    def __init__(self, block: int = 128) -> None:
        super().__init__(block)

    def pack(self, codes: Int8s) -> Bytes:
        nibbles, half = codes.view(np.uint8) + np.uint8(OFFSET), -(-codes.size // 2)
        packed = nibbles[:half].copy()
        packed[: codes.size - half] |= nibbles[half:] << 4
        return packed

    def unpack(self, packed: Bytes, values: int) -> Nibbles:
        low, high = packed & 15, packed >> 4
        if not low.all() or not high[: values - low.size].all() or high[values - low.size :].any():
            raise CodecError("int4: a code is out of range, or padding is set")
        return Nibbles(packed)


@dataclass(frozen=True)
class Nibbles:
    """Codes, unpacked where they are looked at."""

    packed: Bytes

    def __getitem__(self, part: slice) -> Int8s:
        half, codes = self.packed.size, np.empty(part.stop - part.start, dtype=np.uint8)
        low = self.packed[min(part.start, half) : min(part.stop, half)]
        high = self.packed[max(part.start - half, 0) : max(part.stop - half, 0)]
        np.bitwise_and(low, 15, out=codes[: low.size])
        np.right_shift(high, 4, out=codes[low.size :])
        return np.subtract(codes, OFFSET, out=codes).view(np.int8)
