"""Drift fragments: how replicas that saw different sets come together again (`rounds.md` step 7).

In a round, every replica of a group publishes one of F fragments of its parameters in 8 bits; each then moves its own
fragment by the group's mean minus its own *quantized* value. The quantization error of one's own parameters thus
cancels, and drift contracts across random groups every F rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.codecs.int8 import dequantize, quantize
from potluck.swarm.layout import Flat, Layout

BLOCK = 256
#: Parameters larger than this are refused in fragments (contributions have their own bound).
_MAX_MAGNITUDE = 1e4


def fragment_range(layout: Layout, round_: int, fragments: int) -> slice:
    """The part of the flat vector that is averaged in a round."""
    f = round_ % fragments
    return slice(layout.size * f // fragments, layout.size * (f + 1) // fragments)


def fragment_bytes(layout: Layout, round_: int, fragments: int) -> int:
    """Exact size of a fragment's blob."""
    part = fragment_range(layout, round_, fragments)
    n = int(part.stop - part.start)
    return 4 * -(-n // BLOCK) + n


def encode_fragment(theta: Flat, layout: Layout, round_: int, fragments: int) -> bytes:
    scales, codes = quantize(theta[fragment_range(layout, round_, fragments)], BLOCK)
    return scales.tobytes() + codes.tobytes()


def decode_fragment(blob: bytes | memoryview, layout: Layout, round_: int, fragments: int) -> Flat:
    """Raises CodecError on a wrong length or a scale that is not finite."""
    part = fragment_range(layout, round_, fragments)
    n = part.stop - part.start
    blocks = -(-n // BLOCK)
    if len(blob) != 4 * blocks + n:
        raise CodecError(f"fragment: {len(blob)} bytes, expected {4 * blocks + n}")
    scales = np.frombuffer(blob, dtype="<f4", count=blocks)
    return dequantize(scales, np.frombuffer(blob, dtype="i1", offset=4 * blocks), BLOCK)


def blend(
    theta: Flat, own: Flat, others: Sequence[Flat], layout: Layout, round_: int, fragments: int
) -> tuple[Flat, float]:
    """(theta with its fragment moved to the group's mean, the group's drift).

    `own` and `others` are decoded fragments in peer-id order; drift is the root mean square of (mean - own).
    """
    shift = own.copy()
    for other in others:
        np.add(shift, other, out=shift)
    np.multiply(shift, np.float32(1.0 / (1 + len(others))), out=shift)
    np.subtract(shift, own, out=shift)
    moved = theta.copy()
    part = fragment_range(layout, round_, fragments)
    np.add(moved[part], shift, out=moved[part])
    return moved, float(np.sqrt(np.mean(np.square(shift, dtype=np.float64)))) if shift.size else 0.0
