"""Small unsigned integers as bit planes: the first bit of all of them, then the second of all, the least significant
first. Each plane is padded to whole bytes with zeros. So packing and unpacking is a few passes over whole arrays.
Integers of eight bits are bytes as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from potluck.errors import CodecError

Bytes = npt.NDArray[np.uint8]


def planes_bytes(count: int, bits: int) -> int:
    return count if bits == 8 else bits * bits_bytes(count)


def bits_bytes(count: int) -> int:
    return -(-count // 8)


def pack_planes(values: npt.NDArray[np.integer], bits: int) -> bytes:
    """`values`: shape (n,), 0 <= v < 2^bits."""
    if bits == 8:
        return values.astype(np.uint8).tobytes()
    return b"".join(np.packbits((values >> plane & 1).astype(np.uint8)).tobytes() for plane in range(bits))


def unpack_planes(packed: Bytes, count: int, bits: int) -> npt.NDArray[np.unsignedinteger]:
    """Inverse of `pack_planes`; `packed` has `planes_bytes(count, bits)` bytes. Raises CodecError if padding is set."""
    if bits == 8:
        return packed
    dtype: Any = np.uint8 if bits < 8 else np.uint32
    values = np.zeros(count, dtype=dtype)
    if bits:
        rows = packed.reshape(bits, bits_bytes(count))
        check_padding(np.bitwise_or.reduce(rows[:, -1:]), count)
        for row in np.unpackbits(rows, axis=1, count=count)[::-1]:
            np.add(values, values, out=values)
            np.bitwise_or(values, row, out=values)
    return values


def check_padding(packed: Bytes, count: int) -> None:
    """Raises CodecError if the last byte has a bit set after the first `count` of all."""
    if count % 8 and int(packed[-1]) & (0xFF >> count % 8):
        raise CodecError("padding is not zero")
