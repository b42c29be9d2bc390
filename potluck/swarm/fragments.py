"""Drift fragments: how replicas that saw different sets come together again (`rounds.md` step 7).

In a round, every replica of a group publishes one of F fragments of its parameters in 8 bits; each then moves its own
fragment by the group's mean minus its own *quantized* value. The quantization error of one's own parameters thus
cancels, and drift contracts across random groups every F rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from potluck.errors import CodecError
from potluck.swarm.codecs.int8 import dequantize, quantize
from potluck.swarm.exact import norm
from potluck.swarm.layout import Flat, Layout

BLOCK = 256
#: Parameters larger than this are refused in fragments (contributions have their own bound).
_MAX_MAGNITUDE = 1e4
#: A member may be this much farther from us than the median one before its fragment is scaled down.
_MAX_OF_MEDIAN = 2.0


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
    """Raises CodecError on a wrong length, or a scale that is not finite or far too large."""
    part = fragment_range(layout, round_, fragments)
    n = part.stop - part.start
    blocks = -(-n // BLOCK)
    if len(blob) != 4 * blocks + n:
        raise CodecError(f"fragment: {len(blob)} bytes, expected {4 * blocks + n}")
    scales = np.frombuffer(blob, dtype="<f4", count=blocks)
    if not np.all(np.abs(scales) <= _MAX_MAGNITUDE / 127):
        raise CodecError(f"fragment: a scale beyond parameters of {_MAX_MAGNITUDE:g}")
    return dequantize(scales, np.frombuffer(blob, dtype="i1", offset=4 * blocks), BLOCK)


def blend(
    theta: Flat, own: Flat, others: Sequence[Flat], layout: Layout, round_: int, fragments: int
) -> tuple[Flat, float]:
    """(theta with its fragment moved to the group's mean, our distance from the group).

    `own` and `others` are decoded fragments, the others in peer-id order. Each difference from ours is clipped to
    twice the (lower) median of their norms: one that lies moves us little farther than the others do. The distance is
    the root mean square of (coordinate-wise median - own), which a minority cannot set; 0 with fewer than three.
    """
    differences = [np.subtract(other, own) for other in others]
    norms = [norm(difference) for difference in differences]
    limit = _MAX_OF_MEDIAN * statistics.median_low(norms) if norms else 0.0
    shift = np.zeros_like(own)
    for difference, length in zip(differences, norms, strict=True):
        np.add(shift, difference * np.float32(limit / length if length > limit else 1.0), out=shift)
    np.multiply(shift, np.float32(1.0 / (1 + len(others))), out=shift)
    moved = theta.copy()
    part = fragment_range(layout, round_, fragments)
    np.add(moved[part], shift, out=moved[part])
    distance = root_mean_square(np.median([np.zeros_like(own), *differences], axis=0)) if len(others) > 1 else 0.0
    return moved, distance


def root_mean_square(values: Flat) -> float:
    return norm(values) / math.sqrt(values.size) if values.size else 0.0
