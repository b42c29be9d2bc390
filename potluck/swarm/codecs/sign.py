"""`sign`: 1 bit per parameter, the sign of Lion's update (Distributed Lion, arXiv 2404.00438; Lion, arXiv 2302.06675).

c = beta1 * m + (1 - beta1) * delta; sent is sign(c), and per tensor the mean of |c|, by which the signs are multiplied:
so a mean over peers is a vote whose outcome has the size that the peers' updates have. m = beta2 * m + (1 - beta2) *
delta is the replica's residual; without one c is delta.

Payload: a float32 per tensor in name order, then a bit for each parameter of all tensors (1: negative), padded to a
whole byte.
"""

from __future__ import annotations

import numpy as np
import torch

from potluck.errors import CodecError
from potluck.swarm.aggregate import Contribution, Dense
from potluck.swarm.codecs.bits import bits_bytes, unpack_bits
from potluck.swarm.codecs.frame import HEADER_BYTES, MAX_MAGNITUDE, Reader, header
from potluck.swarm.codecs.int8 import SLAB_VALUES
from potluck.swarm.layout import Flat, Layout


class SignCodec:
    name = "sign"
    has_residual = True

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99) -> None:
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError("beta1 and beta2 must be 0 to less than 1")
        self.beta1, self.beta2 = float(beta1), float(beta2)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        new, sizes = torch.from_numpy(delta), torch.zeros(len(layout.slots), dtype=torch.float64)
        momentum = new if residual is None else torch.from_numpy(residual)
        negative = torch.empty(layout.size, dtype=torch.bool)
        for number, slot in enumerate(layout.slots):
            for start in range(slot.offset, slot.offset + slot.size, SLAB_VALUES):
                part = slice(start, min(slot.offset + slot.size, start + SLAB_VALUES))
                update = torch.lerp(new[part], momentum[part], self.beta1)
                torch.lt(update, 0, out=negative[part])
                sizes[number] += update.abs_().sum() / slot.size
        if not bool(sizes.isfinite().all()):
            raise ValueError("cannot encode values that are not finite")
        if residual is not None:
            momentum.lerp_(new, 1 - self.beta2)
        bits = np.packbits(negative.numpy())
        return b"".join([header(self.name, layout), sizes.numpy().astype("<f4").data, bits.data])

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        reader = Reader(blob, self.name, layout, self.max_bytes(layout) - HEADER_BYTES)
        sizes = reader.take("<f4", len(layout.slots))
        if not bool(((sizes >= 0) & (sizes <= MAX_MAGNITUDE)).all()):
            raise CodecError("sign: a tensor's size is not finite, negative or too large")
        negative = unpack_bits(reader.take("u1", bits_bytes(layout.size)), layout.size)
        values = np.empty(layout.size, dtype=np.float32)
        for slot, size in zip(layout.slots, sizes, strict=True):
            np.take(np.array([size, -size], dtype=np.float32), negative[slot.range], out=values[slot.range])
        return Dense(values)

    def max_bytes(self, layout: Layout) -> int:
        return HEADER_BYTES + 4 * len(layout.slots) + bits_bytes(layout.size)
