"""`none`: float32 as it is. The reference that the others are compared with."""

from __future__ import annotations

import numpy as np

from potluck.swarm.codecs.bits import Bytes
from potluck.swarm.codecs.frame import check_bounded, payload
from potluck.swarm.codecs.segments import SEGMENT_BYTES, DenseCodec
from potluck.swarm.contribution import Dense
from potluck.swarm.layout import Flat, Layout


class NoneCodec(DenseCodec):
    name = "none"
    segment_values = SEGMENT_BYTES // 4  # nothing is left to pad

    def encode_into(self, data: Bytes, values: Flat) -> None:
        data.view("<f4")[:] = values

    def decode_segment(self, data: bytes | memoryview, values: int) -> Dense:
        self.check_length(data, values)
        found = np.frombuffer(data, dtype="<f4")
        check_bounded(self.name, found)
        return Dense(found)

    def segment_bytes(self, values: int) -> int:
        return 4 * values

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Dense:
        view = payload(blob, self.name, layout, self.segment_bytes(layout.size))
        return self.decode_segment(view, layout.size)  # segments without padding are as good as one
