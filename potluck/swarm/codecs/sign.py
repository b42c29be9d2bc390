"""`sign`: 1 bit per parameter, the sign of Lion's update (Distributed Lion, arXiv 2404.00438; Lion, arXiv 2302.06675).

c = beta1 * m + (1 - beta1) * delta; sent is sign(c), and per tensor the mean of |c|, by which the signs are multiplied:
so a mean over peers is a vote whose outcome has the size that the peers' updates have. m = beta2 * m + (1 - beta2) *
delta is the replica's residual; without one c is delta.

Payload: a float32 per tensor in name order, then a bit for each parameter of all tensors (1: negative), padded to a
whole byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from potluck.errors import CodecError
from potluck.swarm.blocks import Blocks
from potluck.swarm.codecs import Codec
from potluck.swarm.codecs.bits import bits_bytes, check_padding
from potluck.swarm.codecs.frame import MAX_MAGNITUDE, TRAILER_BYTES, Reader, payload, trailer
from potluck.swarm.codecs.residual import blend
from potluck.swarm.contribution import SLAB_VALUES, Contribution, Quantized
from potluck.swarm.layout import Flat, Layout, slabs


class SignCodec(Codec):
    name = "sign"
    has_residual = True

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99) -> None:
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError("beta1 and beta2 must be 0 to less than 1")
        self.beta1, self.beta2 = float(beta1), float(beta2)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        negative, sizes = np.empty(layout.size, dtype=np.bool_), np.zeros(len(layout.slots))
        scratch = np.empty(SLAB_VALUES, dtype=np.float32)
        for number, slot in enumerate(layout.slots):
            for part in slabs(slot.range.start, slot.range.stop, SLAB_VALUES):
                update = scratch[: part.stop - part.start]
                np.copyto(update, (delta if residual is None else residual)[part])
                if residual is not None:
                    blend(update, self.beta1, delta[part], 1 - self.beta1)
                np.less(update, 0, out=negative[part])
                sizes[number] += float(np.abs(update, out=update).sum()) / slot.size
        if not np.isfinite(sizes).all():
            raise ValueError("cannot encode values that are not finite")
        if residual is not None:
            blend(residual, self.beta2, delta, 1 - self.beta2)
        return b"".join([sizes.astype("<f4").data, np.packbits(negative).data, trailer(self.name, layout)])

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        reader = Reader(payload(blob, self.name, layout, self.max_bytes(layout) - TRAILER_BYTES))
        sizes = reader.take(np.float32, len(layout.slots))
        if not bool(((sizes >= 0) & (sizes <= MAX_MAGNITUDE)).all()):
            raise CodecError("sign: a tensor's size is not finite, negative or too large")
        packed = reader.take(np.uint8, bits_bytes(layout.size))
        check_padding(packed, layout.size)
        return Quantized(
            [
                Blocks(
                    slot.size, slot.size, sizes[number : number + 1], Signs(packed, slot.offset), np.array([slot.size])
                )
                for number, slot in enumerate(layout.slots)
            ]
        )

    def max_bytes(self, layout: Layout) -> int:
        return 4 * len(layout.slots) + bits_bytes(layout.size) + TRAILER_BYTES


@dataclass(frozen=True)
class Signs:
    """A tensor's codes, 1 and -1, unpacked where they are looked at."""

    packed: npt.NDArray[np.uint8]
    offset: int

    def __getitem__(self, part: slice) -> npt.NDArray[np.int8]:
        first, skipped = divmod(self.offset + part.start, 8)
        count = part.stop - part.start
        negative = np.unpackbits(self.packed[first : first + bits_bytes(skipped + count)], count=skipped + count)
        codes = negative[skipped:].view(np.int8)
        np.add(codes, codes, out=codes)
        return np.subtract(1, codes, out=codes)
