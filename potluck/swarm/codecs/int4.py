"""`int4`: linear 4 bit with one float32 scale (absmax / 7) per block of values.

Of a segment's codes, each plus 8, the first half lies in the low bits of its bytes and the second in the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.blocks import Int8s
from potluck.swarm.codecs.bits import Bytes
from potluck.swarm.codecs.int8 import BlockCodec, quantize_into
from potluck.swarm.compiled import INT8S, TO_INT8S, TO_UINT8S, UINT8S, compiled
from potluck.swarm.layout import Flat
from potluck.swarm.recycled import Recycled

INT4_LEVELS = 7
#: Added to a code: a nibble is 1 to 15, and never 0.
OFFSET = 8


class Int4Codec(BlockCodec):
    name = "int4"
    levels = INT4_LEVELS
    packed = 2

    def __init__(self, block: int = 128) -> None:
        super().__init__(block)
        self._codes = Recycled(self.segment_values, np.int8)

    def quantize_into(self, packed: Bytes, scales: Flat, values: Flat) -> None:
        codes = self._codes.any()[: values.size]
        quantize_into(scales, codes, values, self.block, self.levels)
        _pack(packed, codes[: packed.size], codes[packed.size :])

    def unpack(self, packed: Bytes, values: int) -> Nibbles:
        if values % 2 and packed[-1] >> 4:
            raise CodecError("int4: padding is set")
        return Nibbles(packed)


@dataclass(frozen=True)
class Nibbles:
    """Codes, unpacked where they are looked at."""

    packed: Bytes

    def __getitem__(self, part: slice) -> Int8s:
        half, codes = self.packed.size, np.empty(part.stop - part.start, dtype=np.int8)
        low = self.packed[min(part.start, half) : min(part.stop, half)]
        high = self.packed[max(part.start - half, 0) : max(part.stop - half, 0)]
        _unpack(codes[: low.size], codes[low.size :], low, high)
        return codes


@compiled((TO_UINT8S, INT8S, INT8S))
def _pack(packed: Bytes, low: Int8s, high: Int8s) -> None:
    """`high` has as many as `low`, or one less."""
    for i in range(low.size):
        packed[i] = np.uint8(low[i] + OFFSET)
    for i in range(high.size):
        packed[i] |= np.uint8(high[i] + OFFSET << 4)


@compiled((TO_INT8S, TO_INT8S, UINT8S, UINT8S))
def _unpack(from_low: Int8s, from_high: Int8s, low: Bytes, high: Bytes) -> None:
    for i in range(low.size):
        from_low[i] = np.int8((low[i] & 15) - OFFSET)
    for i in range(high.size):
        from_high[i] = np.int8((high[i] >> 4) - OFFSET)
