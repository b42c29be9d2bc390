"""What every codec's blob ends with, and how arrays are cut out of the rest without trusting a length.

The payload comes first, so that a dense codec's segments lie on the chunks that a blob is fetched in (`segments.py`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from potluck.errors import CodecError
from potluck.swarm.exact import all_within
from potluck.swarm.layout import Layout

MAGIC = b"PLC3"
NAME_BYTES = 12
TRAILER_BYTES = len(MAGIC) + NAME_BYTES + 16

#: Largest magnitude that a decoded value may have (Gauntlet's fast check allows scales up to 1e4).
MAX_MAGNITUDE = 1e4


def trailer(codec: str, layout: Layout) -> bytes:
    return MAGIC + codec.encode().ljust(NAME_BYTES, b"\0") + layout.digest


def payload(blob: bytes | memoryview, codec: str, layout: Layout, payload_bytes: int) -> memoryview:
    """What comes before the trailer. Raises CodecError unless the blob has exactly this size, codec and layout."""
    view = memoryview(blob)
    if len(view) != payload_bytes + TRAILER_BYTES:
        raise CodecError(f"{codec}: {len(view)} bytes, expected {payload_bytes + TRAILER_BYTES}")
    if bytes(view[payload_bytes:]) != trailer(codec, layout):
        raise CodecError(f"{codec}: the trailer names another codec, version or layout")
    return view[:payload_bytes]


class Reader:
    """Cuts arrays out of a payload whose exact length was checked first. No copies."""

    def __init__(self, view: memoryview, at: int = 0) -> None:
        self._view, self._at = view, at

    def take(self, dtype: npt.DTypeLike, count: int) -> np.ndarray:
        out = np.frombuffer(self._view, dtype=dtype, count=count, offset=self._at)
        self._at += out.nbytes
        return out


def check_bounded(codec: str, values: np.ndarray) -> None:
    """Raises CodecError unless every value is finite and at most MAX_MAGNITUDE."""
    if not all_within(values.reshape(-1), MAX_MAGNITUDE):
        raise CodecError(f"{codec}: a value is not finite or larger than {MAX_MAGNITUDE:g}")
