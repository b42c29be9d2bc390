"""Robust rules: one update from a group of which some members lie. Pure, and the same bits on every machine.

Each works on slabs of the flat vector, with a row for every contribution in peer-id order, so that no sparse
contribution is ever made dense as a whole. What decides (which rows are near, how much is clipped) follows from
distances that are sums in a fixed order (`exact.py`); what is decided is applied by elementwise float32 operations.

- `nearest`: the mean of the n - b contributions nearest to a centre (MoNNA; Farhadkhani et al., arXiv 2210.10339).
  MoNNA's centre is each peer's own; peers must come to the same update here, so it is the contribution whose n - b
  nearest are nearest (Krum's choice; Blanchard et al., NeurIPS 2017).

The others see mixed contributions: in the place of each the mean of the n - b nearest to it (nearest-neighbour mixing;
Allouah et al., arXiv 2302.01772), which counts heads. Honest ones become nearly alike; without it b with the other sign
shorten what these rules give so much that a run ends 8 to 10 % worse (`benchmarks/byzantine.py`).

- `trimmed_mean`: of each coordinate without its b largest and b smallest values (Yin et al., arXiv 1803.01498).
- `median`: of each coordinate (same).
- `geometric_median`: smoothed Weiszfeld (RFA; Pillutla et al., arXiv 1912.13445).
- `centered_clip`: v + mean of (x - v), each clipped to the median distance (Karimireddy et al., arXiv 2012.10333).

The last two begin with the one that has the least sum of distances from the others. They, and `nearest`, give weighted
means of the contributions, with weights that follow from the distances of all pairs: whatever their steps, the vectors
are read twice. b is the share of liars that a rule stands, of n contributions, rounded down, but one at least (unless
there are fewer than three, or the share is 0: then every mixed contribution is the mean). Weights count where the rule
itself takes a mean; a median counts heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from potluck.swarm.contribution import Dense
from potluck.swarm.exact import square_distance, tree_sum
from potluck.swarm.layout import Flat, slabs

#: Weiszfeld's and centered clipping's steps: after so few the update hardly moves any more.
STEPS: Final = 4
#: Of Weiszfeld: a distance counts as this part of the median one at least.
SMOOTHING: Final = 1e-3

#: Of each contribution, values that are worked on together: they stay in the processor's cache. Distances are summed
#: slab by slab: peers with other slabs would have other bits.
SLAB_VALUES: Final = 1 << 15

#: (contributions, slab), float32.
Rows = npt.NDArray[np.float32]
#: What each contribution has in a point, (contributions,); of several points; squared distances of all pairs.
Shares = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]
Squares = npt.NDArray[np.float64]
#: Gives the rows of one slab of the flat vector.
Slab = Callable[[slice], Rows]
Rule = Callable[[Slab, int, Sequence[float], float], Flat]


def mean_of(rows: Rows, weights: Sequence[float] | Shares) -> Flat:
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
    """The point with the least weighted sum of distances."""

    def step(point: Shares, points: Points, far: Sequence[float]) -> Shares:
        least = SMOOTHING * _lower_median(far)
        if least == 0.0:  # most are where we are
            return point
        return _mix(points, [weight / max(each, least) for weight, each in zip(weights, far, strict=True)])

    return _settled(slab, size, len(weights), liars, step)


def centered_clip(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    total = math.fsum(weights)

    def step(point: Shares, points: Points, far: Sequence[float]) -> Shares:
        most = _lower_median(far)
        factors = [
            weight / total * (most / each if each > most else 1.0) for weight, each in zip(weights, far, strict=True)
        ]
        return _mix(np.vstack([points, point]), [*factors, max(0.0, 1.0 - math.fsum(factors))])

    return _settled(slab, size, len(weights), liars, step)


def nearest(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
    near, away = neighbours(slab, size, len(weights), liars)
    spreads = [math.fsum(away[one, list(those)]) for one, those in enumerate(near)]
    those = near[min(range(len(weights)), key=lambda one: (spreads[one], one))]
    return combination(slab, size, [weight if one in those else 0.0 for one, weight in enumerate(weights)])


def mixed(rule: Rule) -> Rule:
    """The rule, of nearest neighbours' means."""

    def of_means(slab: Slab, size: int, weights: Sequence[float], liars: float) -> Flat:
        near, _ = neighbours(slab, size, len(weights), liars)
        points = dict(zip(near, shares_of(near), strict=True))  # many have the same neighbours

        def means(part: slice) -> Rows:
            rows = slab(part)
            found = {those: mean_of(rows, point) for those, point in points.items()}
            return np.stack([found[those] for those in near])

        return rule(means, size, weights, liars)

    return of_means


RULES: Final[Mapping[str, Rule]] = {
    "trimmed_mean": mixed(trimmed_mean),
    "median": mixed(median),
    "geometric_median": geometric_median,
    "centered_clip": centered_clip,
    "nearest": nearest,
}


def stood(liars: float, n: int) -> int:
    """b, of n contributions."""
    return min(max(1, int(liars * n)), (n - 1) // 2) if liars > 0 else 0


def neighbours(slab: Slab, size: int, n: int, liars: float) -> tuple[list[tuple[int, ...]], Squares]:
    """Of each contribution, the n - b nearest, itself or its like among them (of equally near ones the first); and the
    squared distances of all pairs."""
    away = np.zeros((n, n))
    for part in slabs(0, size, SLAB_VALUES):
        rows = slab(part)
        for one in range(n):
            for other in range(one):
                away[one, other] += square_distance(rows[one], rows[other])
    away += away.T
    order = np.argsort(away, axis=1, kind="stable")[:, : n - stood(liars, n)]
    return [tuple(sorted(near)) for near in order.tolist()], away


def shares_of(near: Sequence[Collection[int]]) -> Points:
    """Mixed contributions: of each, the shares that all have in it."""
    return np.array([[1.0 / len(those) if one in those else 0.0 for one in range(len(near))] for those in near])


def distance(difference: Shares, away: Squares) -> float:
    """Of two points, from the difference of their shares, whose sum is 0:
    |sum u_i x_i|^2 = - 1/2 sum_ij u_i u_j |x_i - x_j|^2."""
    return math.sqrt(max(0.0, -0.5 * tree_sum((np.outer(difference, difference) * away).ravel())))


def combination(slab: Slab, size: int, shares: Sequence[float] | Shares) -> Flat:
    """Of all contributions; the shares are made to sum to 1."""
    update = np.empty(size, dtype=np.float32)
    for part in slabs(0, size, SLAB_VALUES):
        update[part] = mean_of(slab(part), shares)
    return update


def _settled(
    slab: Slab, size: int, n: int, liars: float, step: Callable[[Shares, Points, Sequence[float]], Shares]
) -> Flat:
    """What a point comes to after some steps among mixed contributions. `step` gets it, them, and its distances."""
    near, away = neighbours(slab, size, n, liars)
    points = shares_of(near)
    point = points[_central(points, away)]
    for _ in range(STEPS):
        point = step(point, points, [distance(point - each, away) for each in points])
    return combination(slab, size, point)


def _central(points: Points, away: Squares) -> int:
    """The point with the least sum of distances from the others."""
    sums = [math.fsum(distance(one - other, away) for other in points) for one in points]
    return min(range(len(sums)), key=lambda one: (sums[one], one))


def _mix(points: Points, factors: Sequence[float]) -> Shares:
    """Their weighted mean."""
    mean, total = np.zeros(points.shape[1]), math.fsum(factors)
    for point, factor in zip(points, factors, strict=True):
        mean += point * (factor / total)
    return mean


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
