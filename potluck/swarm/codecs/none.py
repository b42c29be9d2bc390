"""`none`: float32 as it is. The reference that the others are compared with."""

from __future__ import annotations

import numpy as np

from potluck.swarm.aggregate import Contribution, Dense
from potluck.swarm.codecs.frame import HEADER_BYTES, Reader, check_bounded, header
from potluck.swarm.layout import Flat, Layout


class NoneCodec:
    name = "none"
    has_residual = False

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        return b"".join([header(self.name, layout), np.ascontiguousarray(delta, dtype="<f4").data])

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        values = Reader(blob, self.name, layout, 4 * layout.size).take("<f4", layout.size)
        check_bounded(self.name, values)
        return Dense(values)

    def max_bytes(self, layout: Layout) -> int:
        return HEADER_BYTES + 4 * layout.size
