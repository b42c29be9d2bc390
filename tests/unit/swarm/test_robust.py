"""Robust rules: the same bits in any order, near the honest ones whatever a few others say."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.net.host import PeerId
from potluck.swarm import robust
from potluck.swarm.aggregate import RULE_NAMES, aggregate
from potluck.swarm.contribution import Contribution, Dense, Sparse
from potluck.swarm.layout import Layout

LAYOUT = Layout.of([("a", (40,)), ("b", (3, 7))])
ROBUST = [name for name in RULE_NAMES if name != "mean"]


def peer(number: int) -> PeerId:
    return PeerId(f"peer-{number:02}")


def group(seed: int, peers: int, sparsely: bool = False) -> dict[PeerId, Contribution]:
    dice = np.random.default_rng(seed)
    found: dict[PeerId, Contribution] = {}
    for number in range(peers):
        values = (1.0 + 0.1 * dice.standard_normal(LAYOUT.size)).astype(np.float32)
        where = np.sort(dice.choice(LAYOUT.size, 20, replace=False))
        found[peer(number)] = Sparse(where, values[where]) if sparsely else Dense(values)
    return found


def even(peers: int) -> dict[PeerId, float]:
    return {peer(number): 1 / peers for number in range(peers)}


@pytest.mark.parametrize("rule", RULE_NAMES)
@given(seed=st.integers(0, 1000), peers=st.integers(1, 9), sparsely=st.booleans())
def test_the_order_of_arrival_changes_no_bit(rule: str, seed: int, peers: int, sparsely: bool) -> None:
    contributions = group(seed, peers, sparsely)
    shuffled = list(contributions.items())
    random.Random(seed).shuffle(shuffled)
    one = aggregate(contributions, even(peers), LAYOUT, rule=rule, liars=0.3)
    other = aggregate(dict(shuffled), even(peers), LAYOUT, rule=rule, liars=0.3)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_slabs_change_nothing_but_the_last_bits(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contributions = group(1, 7, sparsely=True)
    whole = aggregate(contributions, even(7), LAYOUT, rule=rule, liars=0.3)
    monkeypatch.setattr(robust, "SLAB_VALUES", 7)
    np.testing.assert_allclose(aggregate(contributions, even(7), LAYOUT, rule=rule, liars=0.3), whole, rtol=1e-5)


@pytest.mark.parametrize("rule", ROBUST)
@given(seed=st.integers(0, 1000), lie=st.sampled_from([-1000.0, -1.0, 0.0, 30.0, 1e4]), clip=st.booleans())
def test_three_liars_of_ten_move_the_update_no_farther_than_the_honest_ones_differ(
    rule: str, seed: int, lie: float, clip: bool
) -> None:
    contributions = group(seed, 10)
    honest = np.stack([one.values for one in contributions.values()][3:])
    for number in range(3):
        contributions[peer(number)] = Dense(np.full(LAYOUT.size, lie, dtype=np.float32))
    update = aggregate(contributions, even(10), LAYOUT, rule=rule, liars=0.3, clip=clip)
    mean = honest.mean(axis=0)
    differ = float(np.linalg.norm(honest - mean, axis=1).max())
    assert float(np.linalg.norm(update - mean)) <= 2.0 * differ


@pytest.mark.parametrize("rule", ROBUST)
def test_without_liars_it_is_about_the_mean(rule: str) -> None:
    contributions = group(3, 10)
    mean = aggregate(contributions, even(10), LAYOUT)
    update = aggregate(contributions, even(10), LAYOUT, rule=rule, liars=0.3)
    assert float(np.linalg.norm(update - mean) / np.linalg.norm(mean)) < 0.1


@given(seed=st.integers(0, 1000), peers=st.integers(1, 8))
def test_median_and_trimmed_mean_are_numpys(seed: int, peers: int) -> None:
    rows = np.stack([one.values for one in group(seed, peers).values()])
    ones, size = [1.0] * peers, LAYOUT.size
    median = robust.median(lambda part: rows[:, part], size, ones, 0.0)
    np.testing.assert_allclose(median, np.median(rows, axis=0), rtol=1e-6)
    trimmed = robust.trimmed_mean(lambda part: rows[:, part], size, ones, 0.3)
    b = robust.stood(0.3, peers)
    np.testing.assert_allclose(trimmed, np.sort(rows, axis=0)[b : peers - b].mean(axis=0), rtol=1e-5)


@given(seed=st.integers(0, 1000), peers=st.integers(1, 9), liars=st.sampled_from([0.0, 0.2, 0.4]))
def test_neighbours_are_those_at_the_least_distance(seed: int, peers: int, liars: float) -> None:
    rows = np.stack([one.values for one in group(seed, peers).values()])
    near, found = robust.neighbours(lambda part: rows[:, part], LAYOUT.size, peers, liars)
    away = np.square(rows[:, None] - rows[None], dtype=np.float64).sum(axis=2)
    np.testing.assert_allclose(found, away, rtol=1e-9)
    kept = peers - robust.stood(liars, peers)
    for one in range(peers):
        assert one in near[one] and len(near[one]) == kept
        np.testing.assert_allclose(sorted(away[one, list(near[one])]), np.sort(away[one])[:kept], rtol=1e-6)


@given(seed=st.integers(0, 1000), peers=st.integers(2, 9))
def test_distances_of_mixed_contributions_follow_from_those_of_pairs(seed: int, peers: int) -> None:
    rows = np.stack([one.values for one in group(seed, peers).values()]).astype(np.float64)
    away = np.square(rows[:, None] - rows[None]).sum(axis=2)
    one, other = np.random.default_rng(seed).dirichlet(np.ones(peers), 2)
    wanted = float(np.linalg.norm(one @ rows - other @ rows))
    assert robust.distance(one - other, away) == pytest.approx(wanted, rel=1e-6)
    assert robust.distance(one - one, away) == 0.0


@given(seed=st.integers(0, 1000))
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int) -> None:
    rows = np.stack([one.values for one in group(seed, 9).values()])
    rows[0] += 30.0
    near, _ = robust.neighbours(lambda part: rows[:, part], LAYOUT.size, 9, 0.3)
    points = robust.shares_of(near).astype(np.float32) @ rows
    found = robust.geometric_median(lambda part: rows[:, part], LAYOUT.size, [1.0] * 9, 0.3)

    def sum_of_distances(point: np.ndarray) -> float:
        return float(np.linalg.norm(points - point, axis=1).sum())

    assert sum_of_distances(found) <= 1.01 * min(sum_of_distances(each) for each in [*points, points.mean(axis=0)])


@pytest.mark.parametrize(("liars", "n", "b"), [(0.25, 10, 2), (0.25, 3, 1), (0.25, 2, 0), (0.49, 9, 4), (0.0, 9, 0)])
def test_how_many_liars_a_rule_stands(liars: float, n: int, b: int) -> None:
    assert robust.stood(liars, n) == b


@pytest.mark.parametrize("rule", ROBUST)
def test_one_liar_of_three_does_not_steer(rule: str) -> None:
    contributions = group(2, 3)
    honest = np.stack([one.values for one in contributions.values()][1:])
    contributions[peer(0)] = Dense(np.full(LAYOUT.size, -50.0, dtype=np.float32))
    update = aggregate(contributions, even(3), LAYOUT, rule=rule, liars=0.25, clip=False)
    assert float(np.abs(update - honest.mean(axis=0)).max()) < 1.0


@pytest.mark.parametrize("rule", ROBUST)
def test_liars_who_all_send_the_same_opposite_do_not_shorten_the_update(rule: str) -> None:
    contributions = group(5, 10)
    honest = np.stack([one.values for one in contributions.values()][3:]).mean(axis=0)
    for number in range(3):
        contributions[peer(number)] = Dense(-contributions[peer(number + 3)].values)
    update = aggregate(contributions, even(10), LAYOUT, rule=rule, liars=0.3)
    assert float(np.linalg.norm(update)) >= 0.98 * float(np.linalg.norm(honest))


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_of_nobody_and_of_one_the_update_is_nothing_and_its_own(rule: str) -> None:
    assert not aggregate({}, {}, LAYOUT, rule=rule, liars=0.3).any()
    alone = group(1, 1)
    update = aggregate(alone, even(1), LAYOUT, rule=rule, liars=0.3)
    np.testing.assert_allclose(update, next(iter(alone.values())).values, rtol=1e-6)
