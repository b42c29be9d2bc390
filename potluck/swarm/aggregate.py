"""Aggregation: a round's contributions and their weights -> one update. Pure and deterministic.

The same set of contributions gives the same bits on every peer: contributions are taken in peer-id order, and only
elementwise float32 operations and the exact reductions of `exact.py` are used.
Clipping: each tensor of each contribution is scaled by min(1, median norm / norm), with the lower median of the group
(Gauntlet / SparseLoCo; `rounds.md` step 5). Where validators weigh the members it is the median by those weights: a
crowd of newcomers has little say about the others' lengths. Tokens alone give nobody a larger vote.
Rules for groups of which some members lie, instead of the mean: `robust.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from potluck.net.host import PeerId
from potluck.swarm.exact import norm
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.robust import RULES, Rows, Slab

#: What a manifest's `aggregation.rule` may be.
RULE_NAMES = ("mean", *RULES)
#: Declared tokens are believed only up to this multiple of the group's median (`rounds.md` step 5).
MAX_TOKENS_OF_MEDIAN = 2.0


@dataclass(frozen=True)
class Dense:
    """A decoded contribution with a value for every parameter, shape (layout.size,)."""

    values: Flat

    @cached_property
    def length(self) -> float:
        return _length(self.values)


@dataclass(frozen=True)
class Sparse:
    """A decoded contribution with values at strictly increasing flat `indices` (int64), zero elsewhere."""

    indices: np.ndarray
    values: Flat

    @cached_property
    def length(self) -> float:
        return _length(self.values)


Contribution = Dense | Sparse


def _length(values: Flat) -> float:
    """Euclidean, for judging: need not be the same bits everywhere, as `norm` is."""
    return float(np.linalg.norm(values.astype(np.float64)))


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
    steered: bool = False,
    rule: str = "mean",
    liars: float = 0.0,
) -> Flat:
    """The contributions, per-tensor norm-clipped, by a rule of `RULE_NAMES`: one update, shape (layout.size,).
    `steered`: weights are validators'. `liars`: the share of members that a robust rule stands.

    The mean divides by all contributions' weights, not by how many kept a coordinate: a zero is a statement too.
    """
    update = layout.zeros()
    order = sorted(peer for peer in contributions if weights.get(peer, 0.0) > 0.0)
    medians = median_norms(contributions, weights, layout, steered) if clip else None
    if rule != "mean" and order:
        rows = [clipped(contributions[peer], medians, layout) for peer in order]
        return RULES[rule](_slab_of(rows), layout.size, [weights[peer] for peer in order], liars)
    for peer in order:
        factors = _factors(contributions[peer], medians, layout)
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


def clipped(contribution: Contribution, medians: Sequence[float] | None, layout: Layout) -> Contribution:
    """The contribution as `aggregate` takes it in, less its weight. `medians`: of `median_norms`."""
    factors = np.asarray(_factors(contribution, medians, layout), dtype=np.float32)
    sizes = [values.size for _, values, _ in _by_tensor(contribution, layout)]
    values = contribution.values * np.repeat(factors, sizes)
    return Sparse(contribution.indices, values) if isinstance(contribution, Sparse) else Dense(values)


def _slab_of(contributions: Sequence[Contribution]) -> Slab:
    """A part of all contributions as rows: a sparse one is never made dense as a whole."""

    def slab(part: slice) -> Rows:
        rows = np.zeros((len(contributions), part.stop - part.start), dtype=np.float32)
        for row, one in zip(rows, contributions, strict=True):
            if isinstance(one, Dense):
                row[:] = one.values[part]
            else:
                begin, end = np.searchsorted(one.indices, (part.start, part.stop))
                row[one.indices[begin:end] - part.start] = one.values[begin:end]
        return rows

    return slab


def median_norms(
    contributions: Mapping[PeerId, Contribution], weights: Mapping[PeerId, float], layout: Layout, steered: bool
) -> list[float] | None:
    """Per tensor, the lower median of the norms of contributions with weight; None of fewer than two."""
    order = sorted(peer for peer in contributions if weights.get(peer, 0.0) > 0.0)
    if len(order) < 2:
        return None
    norms = [_norms(contributions[peer], layout) for peer in order]
    votes = [weights[peer] if steered else 1.0 for peer in order]
    return [weighted_median(column, votes) for column in zip(*norms, strict=True)]


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The lowest value such that those up to it have half of the weight; of equal weights the lower median."""
    half, reached = 0.5 * math.fsum(weights), 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= half * (1 - 1e-12):  # equal weights need not add up to exactly a half
            return value
    raise ValueError("no values")


def _factors(contribution: Contribution, medians: Sequence[float] | None, layout: Layout) -> list[np.float32]:
    one = np.float32(1.0)
    if medians is None:
        return [one] * len(layout.slots)
    norms = _norms(contribution, layout)
    return [np.float32(m / n) if n > m else one for n, m in zip(norms, medians, strict=True)]


def _norms(contribution: Contribution, layout: Layout) -> list[float]:
    return [norm(values) for _, values, _ in _by_tensor(contribution, layout)]


def _by_tensor(contribution: Contribution, layout: Layout) -> list[tuple[int, Flat, slice | np.ndarray]]:
    """(slot number, values in it, where they lie in the flat vector) for every tensor of the layout."""
    if isinstance(contribution, Dense):
        return [(i, contribution.values[s.range], s.range) for i, s in enumerate(layout.slots)]
    bounds = np.searchsorted(contribution.indices, [s.offset for s in layout.slots] + [layout.size])
    return [(i, contribution.values[a:b], contribution.indices[a:b]) for i, (a, b) in enumerate(pairwise(bounds))]
