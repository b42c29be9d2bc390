"""What every codec's blob begins with, and how arrays are cut out of the rest without trusting a length."""

from __future__ import annotations

from typing import Any

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.layout import Layout

MAGIC = b"PLC2"
NAME_BYTES = 12
HEADER_BYTES = len(MAGIC) + NAME_BYTES + 16

#: Largest magnitude that a decoded value may have (Gauntlet's fast check allows scales up to 1e4).
MAX_MAGNITUDE = 1e4


def header(codec: str, layout: Layout) -> bytes:
    return MAGIC + codec.encode().ljust(NAME_BYTES, b"\0") + layout.digest


class Reader:
    """Cuts arrays out of a blob whose header and exact length were checked first. No copies."""

    def __init__(self, blob: bytes | memoryview, codec: str, layout: Layout, payload_bytes: int) -> None:
        view = memoryview(blob)
        if len(view) != HEADER_BYTES + payload_bytes:
            raise CodecError(f"{codec}: {len(view)} bytes, expected {HEADER_BYTES + payload_bytes}")
        if bytes(view[:HEADER_BYTES]) != header(codec, layout):
            raise CodecError(f"{codec}: the header names another codec, version or layout")
        self._view, self._at = view, HEADER_BYTES

    def take(self, dtype: Any, count: int) -> np.ndarray:
        out = np.frombuffer(self._view, dtype=dtype, count=count, offset=self._at)
        self._at += out.nbytes
        return out


def check_bounded(codec: str, values: np.ndarray) -> None:
    """Raises CodecError unless every value is finite and at most MAX_MAGNITUDE (NaN fails the comparison)."""
    if values.size and not bool((np.abs(values) <= MAX_MAGNITUDE).all()):
        raise CodecError(f"{codec}: a value is not finite or larger than {MAX_MAGNITUDE:g}")
