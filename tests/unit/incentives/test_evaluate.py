"""Path credit against arithmetic that can be done by hand, and against the loss itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.dht.manifest import ModelPart
from potluck.incentives.evaluate import (
    MAX_POINTS,
    ModelEvaluator,
    dot,
    path_credit,
    place_by_fit,
    similarity,
    trial_delta,
)
from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.contribution import Dense, Sparse
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.model import build_module
from potluck.swarm.stage import stage_layout

NOTHING = torch.empty(0)
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 16, "tie_word_embeddings": False}


def peer(n: int) -> PeerId:
    return PeerId(f"peer-{n}")


class Power:
    """The loss sum |theta|^p / p: the trapezoid rule is exact for p = 2, Simpson's for p = 4."""

    def __init__(self, size: int, power: int) -> None:
        self.layout, self.power, self.gradients = Layout.of([("w", (size,))]), power, 0

    def loss(self, theta: Flat, tokens: torch.Tensor) -> float:
        return float(np.sum(theta.astype(np.float64) ** self.power) / self.power)

    def gradient(self, theta: Flat, tokens: torch.Tensor) -> tuple[float, Flat]:
        self.gradients += 1
        return self.loss(theta, tokens), (theta.astype(np.float64) ** (self.power - 1)).astype(np.float32)


def dense(values: Flat) -> Dense:
    return Dense(values.astype(np.float32))


def sparse(values: Flat, keep: int, dice: np.random.Generator) -> Sparse:
    where = np.sort(dice.choice(values.size, keep, replace=False))
    return Sparse(where, values[where].astype(np.float32))


@given(seed=st.integers(0, 2**32), peers=st.integers(1, 8), sparsely=st.booleans())
@settings(max_examples=50, deadline=None)
def test_shares_add_up_to_the_drop_that_happened(seed: int, peers: int, sparsely: bool) -> None:
    dice = np.random.default_rng(seed)
    loss, theta = Power(40, 2), dice.standard_normal(40).astype(np.float32)
    given = {
        peer(n): sparse(dice.standard_normal(40), 8, dice) if sparsely else dense(dice.standard_normal(40))
        for n in range(peers)
    }
    weights = token_weights({name: int(dice.integers(1, 9)) for name in given})
    after = theta - aggregate(given, weights, loss.layout, clip=False)
    path = path_credit(loss, NOTHING, theta, after, given)
    shares = sum(weights[name] * path.alignment[name] for name in given)
    assert shares == pytest.approx(path.before - path.after, rel=1e-3, abs=1e-4)
    assert path.points == 2 and loss.gradients == 2


def test_points_are_added_along_the_path_until_the_sum_is_right() -> None:
    dice = np.random.default_rng(1)
    loss, theta = Power(30, 4), (2 + dice.random(30)).astype(np.float32)
    one = {peer(0): dense(theta.copy())}
    path = path_credit(loss, NOTHING, theta, np.zeros(30, np.float32), one, tolerance=1e-4)
    assert path.points == 3 and path.error < 1e-4  # Simpson's rule is exact for a cubic gradient
    assert path.alignment[peer(0)] == pytest.approx(path.before, rel=1e-4)


def test_a_sum_that_stays_wrong_is_told() -> None:
    loss, theta = Power(4, 40), np.full(4, 1.2, np.float32)
    path = path_credit(loss, NOTHING, theta, np.zeros(4, np.float32), {peer(0): dense(theta.copy())})
    assert path.points == MAX_POINTS and path.error > 0.05


def test_a_round_that_ruins_the_model_still_has_finite_credit() -> None:
    theta = np.ones(4, np.float32)
    ruin = dense(np.full(4, -3e38, np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        path = path_credit(Power(4, 4), NOTHING, theta, theta - ruin.values, {peer(0): ruin})
    assert np.isfinite([path.credit, path.after, path.error, path.alignment[peer(0)]]).all()


def test_who_follows_its_own_samples_is_in_front() -> None:
    dice = np.random.default_rng(2)
    gradients = dice.standard_normal((8, 500)).astype(np.float32)
    rows = (0.01 * gradients + 0.02 * dice.standard_normal((8, 500))).astype(np.float32)
    for n in range(8):
        assert place_by_fit(gradients[n : n + 1], rows[n], np.delete(rows, n, axis=0)) == 1
    copied = np.vstack([rows[1:], 50 * rows[:1]])  # long, and a copy
    assert place_by_fit(gradients[:1], rows[0], copied) == 1, "a copy pushes away what it copied"
    places = [
        place_by_fit(dice.standard_normal((1, 500)).astype(np.float32), rows[3], np.delete(rows, 3, axis=0))
        for _ in range(200)
    ]
    assert 3 < np.mean(places) < 6
    assert place_by_fit(gradients[:1], rows[0], np.empty((0, 500), np.float32)) == 1


def test_who_trained_on_a_part_of_its_samples_fits_most_of_them_like_anybody() -> None:
    dice, places = np.random.default_rng(3), []
    for _ in range(200):
        parts = dice.standard_normal((4, 500)).astype(np.float32)
        rivals = dice.standard_normal((8, 500)).astype(np.float32)
        places.append(place_by_fit(parts, parts[2], rivals))
        assert place_by_fit(parts, parts.sum(axis=0), rivals) == 1
    assert np.mean(places) > 2.5


def test_similarity_is_the_cosine() -> None:
    layout = Layout.of([("w", (6,))])
    a, b = Sparse(np.array([0, 3]), np.float32([3, 4])), dense(np.float32([3, 0, 0, 4, 0, 12]))
    assert similarity(a, {peer(1): b, peer(2): a}, layout) == pytest.approx({peer(1): 25 / 65, peer(2): 1.0})
    nothing = dense(np.zeros(6))
    assert similarity(nothing, {peer(1): b}, layout) == {peer(1): 0.0}


# ---- a real model -------------------------------------------------------------------------------------------


def spec(stages: int) -> ModelPart:
    return ModelPart(family="llama", config={**SIZES, "num_hidden_layers": 2}, seed=3, stages=stages)


def test_gradients_are_those_of_the_loss() -> None:
    evaluator = ModelEvaluator(build_module(spec(1)), torch.device("cpu"), micro_batch=2)
    dice = np.random.default_rng(0)
    theta = dice.standard_normal(evaluator.layout.size).astype(np.float32) * np.float32(0.05)
    tokens = torch.from_numpy(dice.integers(0, 64, (5, 9)))
    loss, gradient = evaluator.gradient(theta, tokens)
    assert loss == pytest.approx(evaluator.loss(theta, tokens), rel=1e-5)
    way = dice.standard_normal(theta.size).astype(np.float32)
    step = np.float32(2e-3)
    slope = (evaluator.loss(theta + step * way, tokens) - evaluator.loss(theta - step * way, tokens)) / (2 * step)
    assert slope == pytest.approx(dot(gradient, dense(way)), rel=0.02)
    drop = trial_delta(evaluator, tokens, theta, dense(gradient), loss)
    assert drop > 0 and drop == pytest.approx(loss - evaluator.loss(theta - np.float32(0.2) * gradient, tokens))


def test_a_stage_is_swapped_alone_and_the_rest_of_the_chain_stays() -> None:
    whole = build_module(spec(1))
    all_of_it = Layout.of_module(whole)
    layouts = [stage_layout(spec(2), f"stage.{k}") for k in range(2)]
    evaluators = [ModelEvaluator(whole, torch.device("cpu"), layout) for layout in layouts]
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (4, 9)))
    complete = ModelEvaluator(whole, torch.device("cpu"))
    before = all_of_it.gather(whole)
    _, gradient = complete.gradient(before, tokens)
    whole_gradient = all_of_it.tensors(gradient)
    for evaluator, layout in zip(evaluators, layouts, strict=True):
        theta = layout.gather(whole)
        _, part = evaluator.gradient(theta, tokens)
        for name, values in layout.tensors(part).items():
            torch.testing.assert_close(values, whole_gradient[name])
        other = theta + np.float32(0.1)
        assert evaluator.loss(other, tokens) != evaluator.loss(theta, tokens)
    assert {s.name for layout in layouts for s in layout.slots} == {s.name for s in all_of_it.slots}
    np.testing.assert_array_equal(all_of_it.gather(whole), before)
