"""Yuma consensus: one opinion from many validators' weights, and what each validator earns for its own. Pure.

After Bittensor's Yuma consensus with bonds, as `gauntlet.md` states it. A weight above what validators with `kappa` of
the stake would give is cut to it. As published only over-weighting is cut; `two_sided` also lifts what is below what
`kappa` of the stake would at most give, so that a minority takes nothing from those whom it dislikes either.

Shapes: V validators, P peers. Where the two are the same list, nobody's opinion of itself counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Sums of shares of stake are compared with `kappa` to this.
ROUNDING: Final = 1e-12


@dataclass(frozen=True)
class Consensus:
    """What a round's weights come to."""

    consensus: Floats
    """(P,) the most that validators with `kappa` of the stake give a peer."""
    clipped: Floats
    """(V, P) weights after clipping."""
    rank: Floats
    """(P,) stake-weighted sum of the clipped weights."""
    incentive: Floats
    """(P,) rank, normalized: shares of the peers' reward."""
    trust: Floats
    """(P,) the part of a peer's rank that clipping left; 0 where nobody gave it weight."""
    validator_trust: Floats
    """(V,) the part of a validator's weights that consensus covers."""
    dividends: Floats
    """(V,) shares of the validators' reward."""
    bonds: Floats
    """(V, P) columns add up to 1, or to 0 where nobody is bonded: the next round's `bonds`."""


def yuma(
    stake: npt.ArrayLike,
    weights: npt.ArrayLike,
    bonds: npt.ArrayLike | None = None,
    *,
    kappa: float = 0.5,
    beta: float = 1.0,
    alpha: float = 0.1,
    active: npt.ArrayLike | None = None,
    two_sided: bool = False,
    mask_self: bool | None = None,
) -> Consensus:
    """`stake` (V,), `weights` (V, P), `bonds` (V, P) of the round before, `active` (V,) of bool: whose stake counts.

    `kappa`: the share of the stake that decides, in (0, 1]. `beta`: how much of what is cut is lost for bonds.
    `mask_self`: row and column of one number are one peer (None: where V = P).
    `alpha`: weight of this round's bonds in their moving average. Raises ValueError for other shapes, negative or
    non-finite values.
    """
    S, W = _checked("stake", stake, 1), _checked("weights", weights, 2)
    if W.shape[0] != S.shape[0]:
        raise ValueError(f"weights of {W.shape[0]} validators, stake of {S.shape[0]}")
    if not (0 < kappa <= 1 and 0 <= beta <= 1 and 0 <= alpha <= 1):
        raise ValueError(f"kappa {kappa}, beta {beta}, alpha {alpha}: allowed are (0, 1], [0, 1], [0, 1]")
    if active is not None:
        S = np.where(np.asarray(active, dtype=bool), S, 0.0)
    S = _normalized(S)
    W = W.copy()
    masked = W.shape[0] == W.shape[1] if mask_self is None else mask_self
    if masked:
        np.fill_diagonal(W, 0.0)
    W = _normalized(W, axis=1)

    C = _upper(S, W, kappa)
    cut = np.minimum(W, C)
    clipped = np.maximum(cut, np.minimum(C, _lower(S, W, kappa))) if two_sided else cut
    if two_sided and masked:
        np.fill_diagonal(clipped, 0.0)

    R = S @ clipped
    incentive, given = _normalized(R), S @ W
    trust = np.divide(R, given, out=np.zeros_like(R), where=given > 0)
    fresh = _normalized(S[:, None] * ((1 - beta) * W + beta * clipped), axis=0)
    if bonds is None:
        B = fresh
    else:
        old = _checked("bonds", bonds, 2)
        if old.shape != W.shape:
            raise ValueError(f"bonds of shape {old.shape}, weights of {W.shape}")
        B = _normalized(alpha * fresh + (1 - alpha) * old, axis=0)
    dividends = _normalized(B @ incentive)
    if not incentive.any() and not dividends.any():
        dividends = S  # nobody is worth anything yet: validators are paid for being there
    return Consensus(C, clipped, R, incentive, trust, cut.sum(axis=1), dividends, B)


def _upper(S: Floats, W: Floats, kappa: float) -> Floats:
    """(P,) the largest w such that validators with `kappa` of the stake give at least w."""
    return _quantile(S, W, kappa, np.argsort(-W, axis=0, kind="stable"))


def _lower(S: Floats, W: Floats, kappa: float) -> Floats:
    """(P,) the smallest w such that validators with `kappa` of the stake give at most w."""
    return _quantile(S, W, kappa, np.argsort(W, axis=0, kind="stable"))


def _quantile(S: Floats, W: Floats, kappa: float, order: npt.NDArray[np.intp]) -> Floats:
    """The weight at which the stake, in this order, reaches `kappa`; 0 where there is not so much."""
    reached = np.cumsum(S[order], axis=0) >= kappa - ROUNDING
    first = reached.argmax(axis=0)
    values = np.take_along_axis(W, np.take_along_axis(order, first[None, :], axis=0), axis=0)[0]
    found: Floats = np.where(reached.any(axis=0), values, 0.0)
    return found


def _normalized(values: Floats, axis: int | None = None) -> Floats:
    """Divided by their sum; zeros where that is zero."""
    total = values.sum(axis=axis, keepdims=axis is not None)
    shares: Floats = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    return shares


def _checked(name: str, values: npt.ArrayLike, dimensions: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} has {array.ndim} dimensions, not {dimensions}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} has values that are negative or not finite")
    return array
