"""`int8`: linear 8 bit with one float32 scale (absmax / 127) per block of values.

Decoding is one float32 multiply per value, so it gives the same bits everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.blocks import Blocks, Codes, Int8s, dequantized, squares_of
from potluck.swarm.codecs.bits import Bytes
from potluck.swarm.codecs.frame import MAX_MAGNITUDE
from potluck.swarm.codecs.segments import SEGMENT_BYTES, DenseCodec
from potluck.swarm.compiled import (
    FLOAT,
    FLOATS,
    INFINITE,
    INT,
    INT32S,
    MAGNITUDE,
    TO_FLOATS,
    TO_INT8S,
    TO_INT32S,
    compiled,
)
from potluck.swarm.contribution import SLAB_VALUES, Quantized
from potluck.swarm.layout import Flat, Layout

INT8_LEVELS: Final = 127


class BlockCodec(DenseCodec):
    """Codes with one scale per block of values. Each segment has its scales first, then its codes."""

    levels: int
    #: Codes in a byte.
    packed: int

    def __init__(self, block: int) -> None:
        super().__init__()
        if not 16 <= block <= 65536:
            raise ValueError("block must be 16 to 65536 values")
        self.block = int(block)
        self.segment_values = SEGMENT_BYTES * self.packed // (4 * self.packed + self.block) * self.block

    @abstractmethod
    def quantize_into(self, packed: Bytes, scales: Flat, values: Flat) -> None: ...

    @abstractmethod
    def unpack(self, packed: Bytes, values: int) -> Codes:
        """Raises CodecError for padding that is set. Codes may still be out of range."""

    def encode_into(self, data: Bytes, values: Flat) -> None:
        scale_bytes = 4 * -(-values.size // self.block)
        self.quantize_into(data[scale_bytes:], data[:scale_bytes].view("<f4"), values)

    def decode_segment(self, data: bytes | memoryview, values: int) -> Quantized:
        return Quantized([self._blocks(data, values)])

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Quantized:
        return Quantized([self._blocks(data, values) for data, values in self.segments(blob, layout)])

    def _blocks(self, data: bytes | memoryview, values: int) -> Blocks:
        self.check_length(data, values)
        blocks = -(-values // self.block)
        scales = np.frombuffer(data, dtype="<f4", count=blocks)
        check_scales(scales, self.levels)
        packed = np.frombuffer(data, dtype=np.uint8, offset=4 * blocks)
        codes = self.unpack(packed, values)
        squares, least = squares_of(codes, values, self.block, SLAB_VALUES)
        if least < -self.levels:
            raise CodecError(f"{self.name}: a code is out of range")
        return Blocks(values, self.block, scales, codes, squares)

    def segment_bytes(self, values: int) -> int:
        return 4 * -(-values // self.block) + -(-values // self.packed)


class Int8Codec(BlockCodec):
    name = "int8"
    levels = INT8_LEVELS
    packed = 1

    def __init__(self, block: int = 256) -> None:
        super().__init__(block)

    def quantize_into(self, packed: Bytes, scales: Flat, values: Flat) -> None:
        quantize_into(scales, packed.view(np.int8), values, self.block)

    def unpack(self, packed: Bytes, values: int) -> Int8s:
        return packed.view(np.int8)


def quantize(values: Flat, block: int, levels: int = INT8_LEVELS) -> tuple[Flat, Int8s]:
    """(scales float32 (ceil(n / block),), codes int8 (n,) of -levels to levels). Raises ValueError for
    values that are not finite."""
    scales, codes = np.empty(-(-values.size // block), dtype=np.float32), np.empty(values.size, dtype=np.int8)
    quantize_into(scales, codes, values, block, levels)
    return scales, codes


def quantize_into(scales: Flat, codes: Int8s, values: Flat, block: int, levels: int = INT8_LEVELS) -> None:
    """Writes what `quantize` gives. Non-finite input is our own bug and raises ValueError."""
    if codes.size != values.size or scales.size != -(-values.size // block):
        raise IndexError(f"{scales.size} scales and {codes.size} codes for {values.size} values")
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits, largest = values.view(np.int32), scales.view(np.int32)
    if not _quantize(codes, scales, largest, values, bits, np.float32(1 / levels), block):
        raise ValueError("cannot quantize values that are not finite")


def dequantize(scales: Flat, codes: Int8s, block: int, levels: int = INT8_LEVELS) -> Flat:
    """Inverse of `quantize`, for untrusted input: raises CodecError on a scale that is not finite or out of bounds."""
    check_scales(scales, levels)
    return dequantized(codes, scales, block)


def check_scales(scales: Flat, levels: int) -> None:
    """Raises CodecError unless no value that is decoded with them can be out of bounds (NaN fails the comparison)."""
    if scales.size and not (scales.min() >= 0 and scales.max() <= MAX_MAGNITUDE / levels):
        raise CodecError("a block's scale is not finite, negative or too large")


@compiled((TO_INT8S, TO_FLOATS, TO_INT32S, FLOATS, INT32S, FLOAT, INT))
def _quantize(
    codes: Int8s, scales: Flat, largest: np.ndarray, values: Flat, bits: np.ndarray, step: np.float32, block: int
) -> bool:
    """False for values that are not finite. `bits` and `largest`: `values` and `scales` as integers. `step`: a scale
    for 1."""
    worst = np.int32(0)
    for number in range(scales.size):
        begin, end = number * block, (number + 1) * block
        part, part_bits, into, most = values[begin:end], bits[begin:end], codes[begin:end], np.int32(0)
        for i in range(part_bits.size):
            most = max(most, part_bits[i] & np.int32(MAGNITUDE))
        worst, largest[number] = max(worst, most), most
        scales[number] *= step
        inverse = np.float32(1) / scales[number]
        if inverse == np.inf:  # of nothing, or of less than float32 can divide by
            inverse = np.float32(0)
        for i in range(part.size):
            into[i] = np.int32(np.rint(part[i] * inverse))
    return bool(worst < INFINITE)
