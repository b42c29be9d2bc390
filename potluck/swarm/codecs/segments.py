"""Dense codecs' payloads: segments that are fetched, checked and decoded one by one (sliced exchange, `rounds.md`).

Segment i lies at byte i * `CHUNK_BYTES` of the blob, where chunk i of a transfer is, and has the next `segment_values`
values of the flat vector in itself. Each but the last is padded with zeros to the chunk's end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

import numpy as np

from potluck.errors import CodecError
from potluck.net.blobs import CHUNK_BYTES
from potluck.swarm.codecs import Codec
from potluck.swarm.codecs.bits import Bytes
from potluck.swarm.codecs.frame import TRAILER_BYTES, payload, trailer
from potluck.swarm.contribution import Contribution, Dense, Quantized
from potluck.swarm.layout import Flat, Layout, slabs
from potluck.swarm.recycled import Recycled

SEGMENT_BYTES: Final = CHUNK_BYTES


class DenseCodec(Codec, ABC):
    """A codec with a value for every parameter. Equal values give equal bytes on every machine."""

    name: str
    has_residual = False
    #: Values in each segment but the last.
    segment_values: int

    def __init__(self) -> None:
        #: Memory of blobs, by their size.
        self._room: dict[int, Recycled] = {}

    @abstractmethod
    def encode_into(self, data: Bytes, values: Flat) -> None:
        """Writes a segment's `segment_bytes(values)`. Raises ValueError for values that are not finite, where it looks
        at them."""

    @abstractmethod
    def decode_segment(self, data: bytes | memoryview, values: int) -> Dense | Quantized:
        """`data`: exactly `segment_bytes(values)`. Raises CodecError."""

    @abstractmethod
    def segment_bytes(self, values: int) -> int: ...

    @abstractmethod
    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution: ...

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> memoryview:
        size = self.max_bytes(layout)
        blob: Bytes = self._room.setdefault(size, Recycled(size, np.uint8)).any()
        for number, part in enumerate(self.parts(layout.size)):
            start = number * SEGMENT_BYTES
            end = start + self.segment_bytes(part.stop - part.start)
            self.encode_into(blob[start:end], delta[part])
            blob[end : start + SEGMENT_BYTES] = 0
        blob[-TRAILER_BYTES:] = np.frombuffer(trailer(self.name, layout), dtype=np.uint8)
        return blob.data

    def encode_segment(self, values: Flat) -> memoryview:
        """Without padding."""
        data = np.empty(self.segment_bytes(values.size), dtype=np.uint8)
        self.encode_into(data, values)
        return data.data

    def segments(self, blob: bytes | memoryview, layout: Layout) -> Iterator[tuple[memoryview, int]]:
        """Each segment's bytes, and how many values it has. Raises CodecError if what is around them is not as it must
        be."""
        view = payload(blob, self.name, layout, self.max_bytes(layout) - TRAILER_BYTES)
        for number, part in enumerate(self.parts(layout.size)):
            values, start = part.stop - part.start, number * SEGMENT_BYTES
            end = start + self.segment_bytes(values)
            if any(view[end : start + SEGMENT_BYTES]) and part.stop < layout.size:
                raise CodecError(f"{self.name}: padding is not zero")
            yield view[start:end], values

    def max_bytes(self, layout: Layout) -> int:
        full = max(0, layout.size - 1) // self.segment_values
        last = layout.size - full * self.segment_values
        return full * SEGMENT_BYTES + self.segment_bytes(last) + TRAILER_BYTES

    def check_length(self, data: bytes | memoryview, values: int) -> None:
        """Raises CodecError."""
        if len(data) != self.segment_bytes(values):
            raise CodecError(f"{self.name}: a segment of {len(data)} bytes, expected {self.segment_bytes(values)}")

    def parts(self, size: int) -> Iterator[slice]:
        """The values of each segment, of `size` in all."""
        return slabs(0, size, self.segment_values)
