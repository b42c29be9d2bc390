"""Robust rules: one update from a group of which some members lie. Pure, and the same bits on every machine.

Each works on slabs of the flat vector, with a row for every contribution in peer-id order, so that no sparse
contribution is ever made dense as a whole. What decides (which rows are near, how much is clipped) follows from
distances that are sums in a fixed order (`exact.py`); what is decided is applied by elementwise float32 operations.

- `nearest`: the mean of the n - b contributions nearest to a centre (MoNNA; Farhadkhani et al., arXiv 2210.10339).
  MoNNA's centre is each peer's own; peers must come to the same update here, so it is the contribution whose n - b
  nearest are nearest (Krum's choice; Blanchard et al., NeurIPS 2017).

The others see mixed contributions: in the place of each the mean of the n - b nearest to it (nearest-neighbour mixing;
Allouah et al., arXiv 2302.01772). Honest ones become nearly alike; without it b with the other sign shorten what these
rules give so much that a run ends 8 to 10 % worse (`benchmarks/byzantine.py`).

- `trimmed_mean`: of each coordinate without its b largest and b smallest values (Yin et al., arXiv 1803.01498).
- `median`: of each coordinate (same).
- `geometric_median`: smoothed Weiszfeld (RFA; Pillutla et al., arXiv 1912.13445).
- `centered_clip`: v + mean of (x - v), each clipped to the median distance, from the coordinate-wise median on
  (Karimireddy et al., arXiv 2012.10333).

b is the share of liars that a rule stands, of n contributions, rounded down, but one at least (unless there are fewer
than three, or the share is 0: then every rule gives the mean). Weights count where a mean is taken; a median counts
heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from potluck.swarm.contribution import Dense
from potluck.swarm.exact import square_distance
from potluck.swarm.layout import Flat, slabs

#: Weiszfeld's and centered clipping's steps: after so few the update hardly moves any more.
STEPS: Final = 4
#: Of Weiszfeld: a distance counts as this part of the median one at least.
SMOOTHING: Final = 1e-3

#: Values of all contributions that are worked on together: they stay in the processor's cache.
SLAB_VALUES: Final = 1 << 15

#: (contributions, slab), float32.
Rows = npt.NDArray[np.float32]
#: Gives the rows of one slab of the flat vector.
Slab = Callable[[slice], Rows]
Rule = Callable[[Slab, int, Sequence[float], float], Flat]


def mean_of(rows: Rows, weights: Sequence[float]) -> Flat:
    """Weighted; the weights are made to sum to 1. Row after row, which gives the same bits everywhere."""
    total = math.fsum(weights)
    update = np.zeros(rows.shape[1], dtype=np.float32)
    for row, weight in zip(rows, weights, strict=True):
        if weight > 0:
            Dense(row).add_to(update, slice(None), np.float32(weight / total))
    return update


def trimmed_mean(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    """Counts heads: who is trimmed differs from coordinate to coordinate."""
    n, update = len(weights), np.empty(size, dtype=np.float32)
    b = stood(liars, n)
    for part in slabs(0, size, SLAB_VALUES):
        rows = np.sort(slab(part), axis=0)[b : n - b]
        update[part] = mean_of(rows, [1.0] * len(rows))
    return update


def median(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    """Of an even number the mean of both middle ones."""
    n, update = len(weights), np.empty(size, dtype=np.float32)
    for part in slabs(0, size, SLAB_VALUES):
        middle = np.sort(slab(part), axis=0)[(n - 1) // 2 : n // 2 + 1]
        update[part] = mean_of(middle, [1.0] * len(middle))
    return update


def geometric_median(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    """The point with the least weighted sum of distances; from the coordinate-wise median on."""
    update = median(slab, size, weights, liars)
    for _ in range(STEPS):
        away = distances(slab, size, len(weights), update)
        least = SMOOTHING * _lower_median(away)
        if least == 0.0:  # most are where we are
            return update
        factors = [weight / max(distance, least) for weight, distance in zip(weights, away, strict=True)]
        for part in slabs(0, size, SLAB_VALUES):
            update[part] = mean_of(slab(part), factors)
    return update


def centered_clip(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    update, total = median(slab, size, weights, liars), math.fsum(weights)
    for _ in range(STEPS):
        away = distances(slab, size, len(weights), update)
        most = _lower_median(away)
        factors = [
            weight / total * (most / distance if distance > most else 1.0)
            for weight, distance in zip(weights, away, strict=True)
        ]
        for part in slabs(0, size, SLAB_VALUES):
            centre = update[part].copy()
            for row, factor in zip(slab(part), factors, strict=True):
                update[part] += (row - centre) * np.float32(factor)
    return update


def nearest(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    near, spreads = neighbours(slab, size, len(weights), liars)
    centre = min(range(len(weights)), key=lambda one: (spreads[one], one))
    chosen, update = _only(near[centre], weights), np.empty(size, dtype=np.float32)
    for part in slabs(0, size, SLAB_VALUES):
        update[part] = mean_of(slab(part), chosen)
    return update


def mixed(rule: Rule) -> Rule:
    """The rule, of nearest neighbours' means."""

    def of_means(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
        near, _ = neighbours(slab, size, len(weights), liars)

        def means(part: slice) -> Rows:
            rows = slab(part)
            found = {those: mean_of(rows, _only(those, weights)) for those in dict.fromkeys(near)}
            return np.stack([found[those] for those in near])

        return rule(means, size, weights, liars)

    return of_means


RULES: Final[Mapping[str, Rule]] = {
    "trimmed_mean": mixed(trimmed_mean),
    "median": mixed(median),
    "geometric_median": mixed(geometric_median),
    "centered_clip": mixed(centered_clip),
    "nearest": nearest,
}


def stood(liars: float, n: int) -> int:
    """b, of n contributions."""
    return min(max(1, int(liars * n)), (n - 1) // 2) if liars > 0 else 0


def neighbours(slab: Slab, size: int, n: int, liars: float) -> tuple[list[tuple[int, ...]], list[float]]:
    """Of each contribution, the n - b nearest, itself or its like among them (of equally near ones the first), and the
    sum of their squared distances."""
    kept = n - stood(liars, n)
    away = np.zeros((n, n))
    for part in slabs(0, size, SLAB_VALUES):
        rows = slab(part)
        for one in range(n):
            for other in range(one):
                away[one, other] += square_distance(rows[one], rows[other])
    away += away.T
    order = np.argsort(away, axis=1, kind="stable")[:, :kept]
    return [tuple(sorted(near)) for near in order.tolist()], [math.fsum(away[one, order[one]]) for one in range(n)]


def distances(slab: Slab, size: int, n: int, point: Flat) -> list[float]:
    """Euclidean, of each contribution from a point."""
    squares = [0.0] * n
    for part in slabs(0, size, SLAB_VALUES):
        for number, row in enumerate(slab(part)):
            squares[number] += square_distance(row, point[part])
    return [math.sqrt(one) for one in squares]


def _only(those: Collection[int], weights: Sequence[float]) -> list[float]:
    return [weight if one in those else 0.0 for one, weight in enumerate(weights)]


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
