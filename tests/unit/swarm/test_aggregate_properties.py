"""Aggregation and the outer step: deterministic, exact where promised, close to float64 elsewhere."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.agreement import Claim, agreement, network_at_fault
from potluck.swarm.contribution import Dense, Sparse
from potluck.swarm.exact import norm, tree_sum
from potluck.swarm.fragments import blend, decode_fragment, encode_fragment, fragment_range
from potluck.swarm.layout import Layout
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round, RoundClock

LAYOUT = Layout.of([("a", (13, 7)), ("b", (29,)), ("c", (8, 8))])
PEERS = [PeerId(f"p{i}") for i in range(6)]


def some(seed: int, scale: float = 1.0) -> Dense:
    return Dense((scale * np.random.default_rng(seed).standard_normal(LAYOUT.size)).astype(np.float32))


def sparse(seed: int) -> Sparse:
    dice = np.random.default_rng(seed)
    where = np.sort(dice.choice(LAYOUT.size, 20, replace=False)).astype(np.int64)
    return Sparse(where, dice.standard_normal(20).astype(np.float32))


@given(st.permutations(PEERS))
def test_equal_sets_give_equal_bits_in_any_order(order: list[PeerId]) -> None:
    contributions = {p: some(i, 10.0**i) for i, p in enumerate(PEERS)}
    weights = token_weights({p: 100 + 7 * i for i, p in enumerate(PEERS)})
    reference = aggregate(contributions, weights, LAYOUT)
    again = aggregate({p: contributions[p] for p in order}, {p: weights[p] for p in order}, LAYOUT)
    assert reference.tobytes() == again.tobytes()


def test_the_mean_is_the_float64_mean_with_median_norm_clipping() -> None:
    contributions = {p: some(i, 1.0 + 3 * i) for i, p in enumerate(PEERS)}
    weights = token_weights({p: 100 + 10 * i for i, p in enumerate(PEERS)})
    wanted = np.zeros(LAYOUT.size)
    for slot in LAYOUT.slots:
        norms = {p: np.linalg.norm(contributions[p].values[slot.range].astype(np.float64)) for p in PEERS}
        middle = statistics.median_low(norms.values())
        for p in PEERS:
            factor = min(1.0, middle / norms[p])
            wanted[slot.range] += weights[p] * factor * contributions[p].values[slot.range].astype(np.float64)
    got = aggregate(contributions, weights, LAYOUT)
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max() * 10


def test_sparse_and_densified_contributions_aggregate_alike() -> None:
    contributions = {p: sparse(i) for i, p in enumerate(PEERS)}
    weights = token_weights(dict.fromkeys(PEERS, 50))
    full = {}
    for p, c in contributions.items():
        values = LAYOUT.zeros()
        values[c.indices] = c.values
        full[p] = Dense(values)
    assert np.allclose(aggregate(contributions, weights, LAYOUT), aggregate(full, weights, LAYOUT), atol=1e-6)


def test_a_huge_contribution_moves_the_mean_no_further_than_the_median_one() -> None:
    honest = {p: some(i) for i, p in enumerate(PEERS[:5])}
    weights = token_weights(dict.fromkeys(PEERS, 50))
    clipped = aggregate({**honest, PEERS[5]: some(9, 1000.0)}, weights, LAYOUT)
    assert norm(clipped) < 2 * norm(some(0).values)
    assert norm(aggregate({**honest, PEERS[5]: some(9, 1000.0)}, weights, LAYOUT, clip=False)) > 100 * norm(clipped)


@given(st.dictionaries(st.sampled_from(PEERS), st.integers(0, 2**40), min_size=1))
def test_token_weights_sum_to_one_and_are_capped_at_twice_the_median(tokens: dict[PeerId, int]) -> None:
    weights = token_weights(tokens)
    assert set(weights) == set(tokens)
    total = sum(weights.values())
    assert math.isclose(total, 1.0, rel_tol=1e-9) or total == 0.0
    middle = statistics.median_low(tokens.values())
    positive = [w / min(n, 2 * middle) for p, n in tokens.items() if (w := weights[p]) > 0]
    assert not positive or max(positive) <= min(positive) * (1 + 1e-9)


@given(st.lists(st.floats(-1e6, 1e6), max_size=2000))
def test_tree_sum_is_close_to_the_exact_sum(values: list[float]) -> None:
    exact = math.fsum(values)
    bound = 1e-15 * 12 * math.fsum(map(abs, values)) + 1e-300
    assert abs(tree_sum(np.array(values, dtype=np.float64)) - exact) <= bound


@given(st.integers(0, 1000), st.integers(1, 700))
def test_norm_does_not_depend_on_alignment(seed: int, size: int) -> None:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    padded = np.zeros(size + 3, dtype=np.float32)
    padded[3:] = values
    assert norm(values) == norm(padded[3:]) == norm(np.asarray(list(values), dtype=np.float32))
    assert math.isclose(norm(values), float(np.linalg.norm(values.astype(np.float64))), rel_tol=1e-12)


def test_outer_step_is_torchs_nesterov_sgd() -> None:
    theta, velocity = some(0).values, LAYOUT.zeros()
    parameter = torch.nn.Parameter(torch.from_numpy(theta.astype(np.float64)))
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    outer = OuterStep(0.7, 0.9, nesterov=True)
    for round_ in range(20):
        update = some(round_ + 1).values
        parameter.grad = torch.from_numpy(update.astype(np.float64))
        reference.step()
        theta, velocity = outer.apply(theta, velocity, update, round_)  # type: ignore[assignment]
    assert np.abs(theta - parameter.detach().numpy()).max() < 1e-4


def test_plain_averaging_subtracts_the_update() -> None:
    theta, update = some(0).values, some(1).values
    stepped, velocity = OuterStep().apply(theta, None, update.copy(), 3)
    assert velocity is None and np.array_equal(stepped, theta - update)


def test_momentum_warms_up_linearly() -> None:
    outer = OuterStep(1.0, 0.8, momentum_warmup_rounds=4)
    assert [outer.momentum_at(r) for r in (0, 1, 2, 4, 9)] == pytest.approx([0.0, 0.2, 0.4, 0.8, 0.8])


def test_plurality_wins_ties_go_to_the_longer_history_then_the_digest() -> None:
    def of(*claims: tuple[str, int]) -> str:
        found = agreement(Claim(PEERS[i], d, h) for i, (d, h) in enumerate(claims))
        assert found
        return found.digest

    assert of(("a", 1), ("b", 9), ("a", 1)) == "a"
    assert of(("z", 0), ("b", 9)) == "b"
    assert of(("a", 3), ("b", 3)) == "b"
    assert agreement([]) is None
    assert of(("a", 3), ("a", 2**40), ("b", 9), ("b", 9)) == "b"  # who exaggerates lifts nothing
    unanimous = agreement([Claim(PEERS[0], "a", 1), Claim(PEERS[1], "a", 1)])
    assert unanimous and unanimous.unanimous and unanimous.holders == tuple(PEERS[:2])


def test_many_missing_at_once_is_the_networks_fault() -> None:
    assert network_at_fault(PEERS[:4], {PEERS[0]: "x", PEERS[1]: "x", PEERS[2]: "x"})
    assert not network_at_fault(PEERS[:4], {PEERS[0]: "x"})


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(0, 50))
def test_fragments_cover_everything_once_and_blend_to_the_mean(seed: int, fragments: int, first: int) -> None:
    thetas = [some(seed + i).values for i in range(3)]
    for round_ in range(first, first + 3 * fragments):  # twice more for what was clipped
        decoded = [
            decode_fragment(encode_fragment(t, LAYOUT, round_, fragments), LAYOUT, round_, fragments) for t in thetas
        ]
        thetas = [
            blend(t, decoded[i], [d for j, d in enumerate(decoded) if j != i], LAYOUT, round_, fragments)[0]
            for i, t in enumerate(thetas)
        ]
    # Apart only by their own quantization errors now, an 8-bit step or two.
    assert np.std(np.stack(thetas), axis=0).max() < 0.05
    covered = sorted(i for r in range(fragments) for i in range(LAYOUT.size)[fragment_range(LAYOUT, r, fragments)])
    assert covered == list(range(LAYOUT.size))


@given(st.integers(0, 1000), st.floats(1e3, 1e4))
def test_a_lying_fragment_moves_us_little_more_than_an_honest_one_and_does_not_set_our_distance(
    seed: int, far: float
) -> None:
    own, honest, other = (some(seed + i).values for i in range(3))
    liar = np.full_like(own, np.float32(far))
    theta = np.zeros_like(own)
    moved, distance = blend(theta, own, [honest, other, liar], LAYOUT, 0, 1)
    assert np.linalg.norm(moved) <= 4 / 4 * max(np.linalg.norm(honest - own), np.linalg.norm(other - own)) * 1.001
    assert distance < 10


@given(st.floats(0, 2e9), st.floats(2, 86400), st.floats(0.01, 0.49), st.integers(0, 10**6))
def test_phases_are_in_order_and_rounds_follow_each_other(
    genesis: float, seconds: float, share: float, number: int
) -> None:
    clock = RoundClock(genesis, seconds, share * seconds)
    w, after = clock.window(Round(number)), clock.window(Round(number + 1))
    assert w.start < w.train_until < w.commit_by < w.read_from < w.pull_by < w.end
    assert math.isclose(w.end, after.start, rel_tol=1e-9)
    assert clock.round_at((w.start + w.end) / 2) == number
    assert clock.round_at(genesis - 1) == -1


def test_layout_is_in_name_order_whatever_order_it_was_given() -> None:
    pairs = [(f"t{i}", (i + 1, 2)) for i in range(9)]
    shuffled = pairs[:]
    random.Random(0).shuffle(shuffled)
    assert Layout.of(pairs) == Layout.of(shuffled)
    assert Layout.of(pairs).digest == Layout.of(shuffled).digest != Layout.of(pairs[:-1]).digest


def test_of_two_peers_the_larger_cannot_set_its_own_limits() -> None:
    weights = token_weights({PEERS[0]: 100, PEERS[1]: 2**40})
    assert weights[PEERS[0]] >= 0.3
    update = aggregate({PEERS[0]: some(0, 1e-3), PEERS[1]: some(1, 1e4)}, weights, LAYOUT)
    assert norm(update) < 3 * norm(some(0, 1e-3).values)
