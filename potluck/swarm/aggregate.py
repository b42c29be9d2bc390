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
from functools import partial
from typing import Final

import numpy as np

from potluck.net.host import PeerId
from potluck.swarm.contribution import Contribution, Dense, Sparse
from potluck.swarm.layout import Flat, Layout, slabs
from potluck.swarm.robust import RULES, Rows

#: What a manifest's `aggregation.rule` may be.
RULE_NAMES = ("mean", *RULES)
#: Declared tokens are believed only up to this multiple of the group's median (`rounds.md` step 5).
MAX_TOKENS_OF_MEDIAN = 2.0
#: Values of the update that all contributions are added to before the next ones: they stay in the processor's cache.
#: Sparse ones are so few that calls would take longer than what they do.
SLAB_VALUES: Final = 1 << 17
SPARSE_SLAB_VALUES: Final = 1 << 19


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
    out: Flat | None = None,
) -> Flat:
    """The contributions, per-tensor norm-clipped, by a rule of `RULE_NAMES`: one update, shape (layout.size,).
    `steered`: weights are validators'. `liars`: the share of members that a robust rule stands. `out`: memory
    of an update, in which a mean may be made.

    The mean divides by all contributions' weights, not by how many kept a coordinate: a zero is a statement too.
    """
    order = sorted(peer for peer in contributions if weights.get(peer, 0.0) > 0.0)
    group = [contributions[peer] for peer in order]
    factors = [[np.float32(1.0)] * len(layout.slots)] * len(group)
    if clip and len(group) > 1:
        norms = [_norms(one, layout) for one in group]
        medians = _medians(norms, [weights[peer] if steered else 1.0 for peer in order])
        factors = [_factors(of, medians) for of in norms]
    if rule != "mean" and group:
        rows = partial(_rows, group, factors, layout)
        return RULES[rule](rows, layout.size, [weights[peer] for peer in order], liars)
    scales = [[np.float32(weights[peer]) * factor for factor in of] for peer, of in zip(order, factors, strict=True)]
    update = layout.zeros() if out is None else out
    slab = SPARSE_SLAB_VALUES if all(isinstance(one, Sparse) for one in group) else SLAB_VALUES
    for number, slot in enumerate(layout.slots):
        for part in slabs(slot.range.start, slot.range.stop, slab):
            if out is not None:
                update[part] = 0
            for one, of in zip(group, scales, strict=True):
                one.add_to(update[part], part, of[number])
    return update


def _rows(group: Sequence[Contribution], factors: Sequence[Sequence[np.float32]], layout: Layout, part: slice) -> Rows:
    """A part of all contributions, clipped, as rows: none of them is ever there as a whole."""
    rows = np.zeros((len(group), part.stop - part.start), dtype=np.float32)
    for number, slot in enumerate(layout.slots):
        inside = slice(max(part.start, slot.offset), min(part.stop, slot.offset + slot.size))
        if inside.start < inside.stop:
            for row, one, of in zip(rows, group, factors, strict=True):
                one.add_to(row[inside.start - part.start : inside.stop - part.start], inside, of[number])
    return rows


def clipped(contribution: Contribution, medians: Sequence[float] | None, layout: Layout) -> Contribution:
    """The contribution as `aggregate` takes it in, less its weight. `medians`: of `median_norms`."""
    if medians is None:
        return contribution
    factors = _factors(_norms(contribution, layout), medians)
    if all(factor == 1 for factor in factors):
        return contribution
    if isinstance(contribution, Sparse):
        values = contribution.values.copy()
        for slot, factor in zip(layout.slots, factors, strict=True):
            values[contribution.inside(slot.range)] *= factor
        return Sparse(contribution.indices, values)
    values = layout.zeros()
    for slot, factor in zip(layout.slots, factors, strict=True):
        contribution.add_to(values[slot.range], slot.range, factor)
    return Dense(values)


def median_norms(
    contributions: Mapping[PeerId, Contribution], weights: Mapping[PeerId, float], layout: Layout, steered: bool
) -> list[float] | None:
    """Per tensor, the lower median of the norms of contributions with weight; None of fewer than two."""
    order = sorted(peer for peer in contributions if weights.get(peer, 0.0) > 0.0)
    if len(order) < 2:
        return None
    norms = [_norms(contributions[peer], layout) for peer in order]
    return _medians(norms, [weights[peer] if steered else 1.0 for peer in order])


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The lowest value such that those up to it have half of the weight; of equal weights the lower median."""
    half, reached = 0.5 * math.fsum(weights), 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= half * (1 - 1e-12):  # equal weights need not add up to exactly a half
            return value
    raise ValueError("no values")


def _medians(norms: Sequence[Sequence[float]], votes: Sequence[float]) -> list[float]:
    return [weighted_median(column, votes) for column in zip(*norms, strict=True)]


def _factors(norms: Sequence[float], medians: Sequence[float]) -> list[np.float32]:
    one = np.float32(1.0)
    return [np.float32(m / n) if n > m else one for n, m in zip(norms, medians, strict=True)]


def _norms(contribution: Contribution, layout: Layout) -> list[float]:
    return [math.sqrt(contribution.square_sum(slot.range)) for slot in layout.slots]
