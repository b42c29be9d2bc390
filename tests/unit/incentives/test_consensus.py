"""Yuma consensus against its definition, and what a minority of the stake can do to others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.incentives.consensus import ROUNDING, yuma

KINDS = st.sampled_from([0.3, 0.5, 0.6, 1.0])


@st.composite
def opinions(draw: st.DrawFn) -> tuple[list[float], list[list[float]]]:
    """(stake, weights) of validators who are no peers, or of peers who are all validators."""
    validators = draw(st.integers(1, 6))
    peers = draw(st.one_of(st.just(validators), st.integers(1, 7)))
    numbers = st.floats(0, 10, allow_subnormal=False)
    stake = draw(st.lists(numbers, min_size=validators, max_size=validators))
    rows = st.lists(numbers, min_size=peers, max_size=peers)
    return stake, draw(st.lists(rows, min_size=validators, max_size=validators))


def shares(values: list[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total if total > 0 else 0.0 for value in values]


def masked(weights: list[list[float]]) -> list[list[float]]:
    square = len(weights) == len(weights[0])
    return [shares([0.0 if square and i == j else w for j, w in enumerate(row)]) for i, row in enumerate(weights)]


@given(opinions(), KINDS)
def test_consensus_is_the_most_that_kappa_of_the_stake_gives(
    given_: tuple[list[float], list[list[float]]], kappa: float
) -> None:
    stake, weights = given_
    found = yuma(stake, weights, kappa=kappa)
    S, W = shares(stake), masked(weights)
    for j, consensus in enumerate(found.consensus):
        column = [row[j] for row in W]
        enough = kappa - ROUNDING
        able = [w for w in column if math.fsum(s for s, v in zip(S, column, strict=True) if v >= w) >= enough]
        assert consensus == pytest.approx(max(able, default=0.0), abs=1e-9)
        for i in range(len(S)):
            assert found.clipped[i, j] == pytest.approx(min(W[i][j], consensus), abs=1e-9)


@given(opinions(), st.booleans())
def test_shares_add_up_and_nobody_counts_for_itself(
    given_: tuple[list[float], list[list[float]]], two_sided: bool
) -> None:
    stake, weights = given_
    found = yuma(stake, weights, two_sided=two_sided)
    for part in (found.incentive, found.dividends, *found.bonds.T):
        assert part.sum() == pytest.approx(1.0) or not part.any()
        assert (part >= 0).all() and np.isfinite(part).all()
    assert (found.trust <= 1 + 1e-9).all() or two_sided
    assert (found.validator_trust <= 1 + 1e-9).all()
    if len(weights) == len(weights[0]):
        assert not found.clipped.diagonal().any() and not found.bonds.diagonal().any()


@given(opinions(), st.floats(0.1, 100))
def test_scale_of_stake_and_of_weights_does_not_matter(
    given_: tuple[list[float], list[list[float]]], factor: float
) -> None:
    stake, weights = (np.array(part) for part in given_)
    one, other = yuma(stake, weights), yuma(factor * stake, factor * weights)
    assert np.allclose(one.incentive, other.incentive) and np.allclose(one.dividends, other.dividends)


def test_bonds_are_a_moving_average_by_column() -> None:
    first = yuma([1, 1], [[1, 0, 0], [1, 0, 0]])
    assert np.allclose(first.bonds, [[0.5, 0, 0], [0.5, 0, 0]])
    second = yuma([3, 1], [[0, 1, 0], [1, 0, 0]], first.bonds, kappa=0.2, alpha=0.1)
    fresh = np.array([[0, 1, 0], [1, 0, 0]])
    wanted = 0.1 * fresh + 0.9 * first.bonds
    assert np.allclose(second.bonds, wanted / np.maximum(wanted.sum(0), 1e-300))


def test_with_nothing_to_reward_active_stake_is_paid() -> None:
    found = yuma([3, 1, 4], [[0, 0, 0, 0]] * 3, active=[True, True, False])
    assert not found.incentive.any() and np.allclose(found.dividends, [0.75, 0.25, 0])


def test_who_is_not_active_has_no_say() -> None:
    found = yuma([1, 9], [[1, 0, 0], [0, 1, 0]], active=[True, False])
    assert np.allclose(found.incentive, [1, 0, 0])


#: Two honest validators with 55 % of the stake between them, one colluder with 45 %; 8 honest peers and 2 friends.
STAKE = [0.275, 0.275, 0.45]
HONEST = np.array([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0])


def incentive_moved(colluder: np.ndarray, two_sided: bool) -> float:
    """By how much an honest peer's incentive moves at most, relative to what all honest validators would give."""
    opinions = [HONEST * [1.02] * 10, HONEST * np.linspace(0.99, 1.01, 10), colluder]
    truth = yuma(STAKE, [*opinions[:2], HONEST]).incentive[:8]
    return float(np.abs(yuma(STAKE, opinions, two_sided=two_sided).incentive[:8] / truth - 1).max())


def test_a_large_minority_moves_honest_peers_by_at_most_five_percent() -> None:
    friends = np.array([0.0] * 8 + [1.0, 1.0])
    assert incentive_moved(friends, two_sided=True) < 0.05
    foe = HONEST.copy()
    foe[0] = 0.0  # the best is given nothing
    assert incentive_moved(foe, two_sided=True) < 0.05
    assert incentive_moved(foe, two_sided=False) > 0.05  # as published, only over-weighting is cut
    favourite = HONEST.copy()
    favourite[7] = 100.0
    assert incentive_moved(favourite, two_sided=True) < 0.05


@pytest.mark.parametrize(
    ("stake", "weights", "settings", "says"),
    [
        ([1.0], [[1.0], [1.0]], {}, "2 validators"),
        ([1.0], [1.0], {}, "dimensions"),
        ([-1.0], [[1.0]], {}, "negative"),
        ([1.0], [[float("nan")]], {}, "finite"),
        ([1.0], [[1.0, 1.0]], {"kappa": 0.0}, "kappa"),
        ([1.0], [[1.0, 1.0]], {"bonds": [[1.0]]}, "bonds"),
    ],
)
def test_what_cannot_be_is_refused(stake: list[float], weights: list, settings: dict, says: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=says):
        yuma(stake, weights, **settings)
