"""`int8`: linear 8 bit with one float32 scale (absmax / 127) per block of values.

Decoding is one float32 multiply per value, so it gives the same bits everywhere. Values are gone through in slabs that
stay in the processor's cache (each pass over all of them would cost as much as a copy), and that torch does not share
out (`contribution.py`).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from potluck.errors import CodecError
from potluck.swarm.codecs.frame import MAX_MAGNITUDE
from potluck.swarm.codecs.segments import SEGMENT_BYTES, DenseCodec
from potluck.swarm.contribution import UNSHARED_VALUES, Blocks, Codes, Quantized
from potluck.swarm.layout import Flat, Layout

INT8_LEVELS: Final = 127

Int8s = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]

# What was received is only read.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)


class BlockCodec(DenseCodec):
    """Codes with one scale per block of values. Each segment has its scales first, then its codes."""

    levels: int
    #: Codes in a byte.
    packed: int

    def __init__(self, block: int) -> None:
        if not 16 <= block <= 65536:
            raise ValueError("block must be 16 to 65536 values")
        self.block = int(block)
        self.segment_values = SEGMENT_BYTES * self.packed // (4 * self.packed + self.block) * self.block

    @abstractmethod
    def pack(self, codes: Int8s) -> Bytes: ...

    @abstractmethod
    def unpack(self, packed: Bytes, values: int) -> Codes:
        """Raises CodecError for codes that `quantize` never gives."""

    def encode_parts(self, values: Flat) -> list[Any]:
        scales, codes = quantize(values, self.block, self.levels)
        return [scales.data, self.pack(codes).data]

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
        return Blocks(values, self.block, scales, self.unpack(packed, values))

    def segment_bytes(self, values: int) -> int:
        return 4 * -(-values // self.block) + -(-values // self.packed)


class Int8Codec(BlockCodec):
    name = "int8"
    levels = INT8_LEVELS
    packed = 1

    def __init__(self, block: int = 256) -> None:
        super().__init__(block)

    def pack(self, codes: Int8s) -> Bytes:
        return codes.view(np.uint8)

    def unpack(self, packed: Bytes, values: int) -> Int8s:
        codes = packed.view(np.int8)
        if codes.size and codes.min() < -INT8_LEVELS:
            raise CodecError("int8: a code is out of range")
        return codes


def quantize(values: Flat, block: int, levels: int = INT8_LEVELS) -> tuple[Flat, Int8s]:
    """(scales float32 (ceil(n / block),), codes int8 (n,) of -levels to levels). Non-finite input is our own bug and
    raises ValueError."""
    source = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    scales, codes = torch.empty(-(-values.size // block)), np.empty(values.size, dtype=np.int8)
    step = max(1, UNSHARED_VALUES // block)
    scratch, at = torch.empty(step * block), 0
    while at < values.size:
        rows = min(step, (values.size - at) // block) or 1  # the last one may be shorter
        part = source[at : at + rows * block].view(rows, -1)
        work, of = scratch[: part.numel()].view(rows, -1), scales[at // block : at // block + rows]
        torch.abs(part, out=work)
        torch.amax(work, 1, out=of).mul_(1.0 / levels)
        inverse = of.reciprocal().nan_to_num_(posinf=0.0)  # of nothing, or of less than float32 can divide by
        flat = torch.mul(part, inverse[:, None], out=work).numpy().reshape(-1)
        np.rint(flat, out=flat)  # torch's starts threads for so few, too
        np.copyto(codes[at : at + flat.size], flat, casting="unsafe")
        at += flat.size
    if not bool(scales.isfinite().all()):
        raise ValueError("cannot quantize values that are not finite")
    return scales.numpy().astype("<f4", copy=False), codes


def dequantize(scales: Flat, codes: Int8s, block: int, levels: int = INT8_LEVELS) -> Flat:
    """Inverse of `quantize`, for untrusted input: raises CodecError on a scale that is not finite or out of bounds."""
    check_scales(scales, levels)
    return Quantized([Blocks(codes.size, block, scales, codes)]).values


def check_scales(scales: Flat, levels: int) -> None:
    """Raises CodecError unless no value that is decoded with them can be out of bounds (NaN fails the comparison)."""
    if scales.size and not (scales.min() >= 0 and scales.max() <= MAX_MAGNITUDE / levels):
        raise CodecError("a block's scale is not finite, negative or too large")
