"""Aggregation: a round's contributions and their weights -> one update. Pure and deterministic.

The same set of contributions gives the same bits on every peer: contributions are taken in peer-id order, and only
elementwise float32 operations and the exact reductions of `exact.py` are used.
Clipping: each tensor of each contribution is scaled by min(1, median norm / norm), with the lower median of the group
(Gauntlet / SparseLoCo; `rounds.md` step 5).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from potluck.net.host import PeerId
from potluck.swarm.exact import norm
from potluck.swarm.layout import Flat, Layout

#: Declared tokens are believed only up to this multiple of the group's median (`rounds.md` step 5).
MAX_TOKENS_OF_MEDIAN = 2.0


@dataclass(frozen=True)
class Dense:
    """A decoded contribution with a value for every parameter, shape (layout.size,)."""

    values: Flat


@dataclass(frozen=True)
class Sparse:
    """A decoded contribution with values at strictly increasing flat `indices` (int64), zero elsewhere."""

    indices: np.ndarray
    values: Flat


Contribution = Dense | Sparse


def token_weights(tokens: Mapping[PeerId, int], ledger: Mapping[PeerId, float] | None = None) -> dict[PeerId, float]:
    """Aggregation weights that sum to 1: tokens (at most twice the group's median) x ledger weight (1 without one).

    All zero where nobody trained a token.
    """
    if not tokens:
        return {}
    # The lower median: of two, the mean would let the larger one set its own limit.
    cap = MAX_TOKENS_OF_MEDIAN * statistics.median_low(tokens.values())
    raw = {
        peer: min(count, cap) * (1.0 if ledger is None else ledger.get(peer, 0.0))
        for peer, count in sorted(tokens.items())
    }
    total = math.fsum(raw.values())
    return {peer: (value / total if total > 0 else 0.0) for peer, value in raw.items()}


def aggregate(
    contributions: Mapping[PeerId, Contribution],
    weights: Mapping[PeerId, float],
    layout: Layout,
    *,
    clip: bool = True,
) -> Flat:
    """The weighted mean of the contributions, per-tensor norm-clipped, shape (layout.size,).

    The mean divides by all contributions' weights, not by how many kept a coordinate: a zero is a statement too.
    """
    update = layout.zeros()
    order = sorted(peer for peer in contributions if weights.get(peer, 0.0) > 0.0)
    for peer, factors in zip(order, _clip_factors([contributions[p] for p in order], layout, clip), strict=True):
        scale = np.float32(weights[peer])
        contribution = contributions[peer]
        for slot, values, where in _by_tensor(contribution, layout):
            factor = scale * factors[slot]
            if isinstance(contribution, Sparse):
                update[where] += values * factor  # indices are unique: a plain add is exact
            else:
                target = update[where]
                np.add(target, values * factor, out=target)
    return update


def _clip_factors(contributions: Sequence[Contribution], layout: Layout, clip: bool) -> list[list[np.float32]]:
    """Per contribution, per tensor: min(1, median norm / norm)."""
    one = np.float32(1.0)
    if not clip or len(contributions) < 2:
        return [[one] * len(layout.slots) for _ in contributions]
    norms = [[norm(values) for _, values, _ in _by_tensor(c, layout)] for c in contributions]
    medians = [statistics.median_low(column) for column in zip(*norms, strict=True)]
    return [[np.float32(m / n) if n > m else one for n, m in zip(row, medians, strict=True)] for row in norms]


def _by_tensor(contribution: Contribution, layout: Layout) -> list[tuple[int, Flat, slice | np.ndarray]]:
    """(slot number, values in it, where they lie in the flat vector) for every tensor of the layout."""
    if isinstance(contribution, Dense):
        return [(i, contribution.values[s.range], s.range) for i, s in enumerate(layout.slots)]
    bounds = np.searchsorted(contribution.indices, [s.offset for s in layout.slots] + [layout.size])
    return [(i, contribution.values[a:b], contribution.indices[a:b]) for i, (a, b) in enumerate(pairwise(bounds))]
