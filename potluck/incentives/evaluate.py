"""What contributions did to the loss: path credit of a whole round, exact deltas of some, and whose data they fit.

Path credit (Aumann-Shapley; `gauntlet.md`): a round moves the parameters from theta to theta - step, where the
contributions are a weighted sum within the step. The loss drop along that straight path is the integral of
<gradient, step>, so each contribution's share of it is its weight times the integral of <gradient, contribution>, and
the shares add up to the drop that happened. Two gradients, at both ends, give the integral by the trapezoid rule
whatever the number of peers; where their sum misses the drop, points are added between (composite Simpson).

Losses are mean nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import nn

from potluck.net.host import PeerId
from potluck.swarm.contribution import Contribution, Dense, Sparse
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.model import next_token_loss

#: Path credit should add up to the measured drop within this part of it.
TOLERANCE: Final = 0.05
#: Drops below this (nats per token) are rounding and noise: errors are not measured against less.
SMALLEST_DROP: Final = 1e-4
WORST_LOSS: Final = 1e6
ROUNDING: Final = 1e-5
#: Standard deviations above the others' mean that one part of a peer's samples may count for.
ENOUGH: Final = 1.0
#: Gradients along the path at most: 2, 3, 5.
MAX_POINTS: Final = 5
#: A contribution is tried out at this part of its length (`gauntlet.md`: lr * 0.2 * delta).
TRIAL_STEP: Final = 0.2


class Evaluator(Protocol):
    """A model whose loss can be taken anywhere in the index space of one module."""

    @property
    def layout(self) -> Layout: ...
    def loss(self, theta: Flat, tokens: torch.Tensor) -> float:
        """Mean loss over windows (B, T + 1) with the module at `theta`."""
        ...

    def gradient(self, theta: Flat, tokens: torch.Tensor) -> tuple[float, Flat]:
        """(loss, gradient over the module), shape (layout.size,)."""
        ...


class ModelEvaluator:
    """Evaluates one module of `model`: the whole of it, or (with `layout` of a stage) that stage with the rest of the
    chain held fixed at what `model` has for it. Parameters of a stage bear the names that they have in the whole."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        layout: Layout | None = None,
        micro_batch: int = 16,
        loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = next_token_loss,
    ) -> None:
        self.layout = layout or Layout.of_module(model)
        self._model, self._device, self._micro_batch, self._loss = model.to(device).eval(), device, micro_batch, loss
        parameters = dict(model.named_parameters())
        self._inside = [parameters[slot.name] for slot in self.layout.slots]

    @torch.no_grad()
    def loss(self, theta: Flat, tokens: torch.Tensor) -> float:
        self.layout.scatter(theta, self._model)
        return sum(float(self._forward(part)) * part.shape[0] for part in self._parts(tokens)) / tokens.shape[0]

    def gradient(self, theta: Flat, tokens: torch.Tensor) -> tuple[float, Flat]:
        self.layout.scatter(theta, self._model)
        self._model.zero_grad(set_to_none=True)
        self._model.requires_grad_(False)  # several evaluators may share a model
        for parameter in self._inside:
            parameter.requires_grad_(True)
        total = 0.0
        for part in self._parts(tokens):
            loss = self._forward(part) * (part.shape[0] / tokens.shape[0])
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        gradient = self.layout.zeros()
        for slot, parameter in zip(self.layout.slots, self._inside, strict=True):
            if parameter.grad is not None:
                gradient[slot.range] = parameter.grad.reshape(-1).cpu().numpy()
        self._model.zero_grad(set_to_none=True)
        return total, gradient

    def _parts(self, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split(tokens, self._micro_batch)

    def _forward(self, part: torch.Tensor) -> torch.Tensor:
        return self._loss(self._model, part.to(self._device))


@dataclass(frozen=True)
class PathCredit:
    """`alignment`: each contribution's credit for a weight of 1. `credit`: what the whole step's sums to, beside the
    measured drop `before` - `after`. `error`: |credit - drop| as a part of the drop."""

    alignment: dict[PeerId, float]
    credit: float
    before: float
    after: float
    points: int
    error: float
    #: Gradient at the path's beginning.
    gradient: Flat
    #: By how much the first of the `proof` windows give the step more credit than the last, at both ends of the path:
    #: only who evaluates on these data knows it, whereas the credit itself is much the same on any.
    contrast: float


def path_credit(
    evaluator: Evaluator,
    tokens: torch.Tensor,
    theta: Flat,
    next_theta: Flat,
    contributions: Mapping[PeerId, Contribution],
    *,
    tolerance: float = TOLERANCE,
    max_points: int = MAX_POINTS,
    proof: int = 0,
) -> PathCredit:
    """`contributions` as they were taken in (clipped), from `theta` to `next_theta`, by the loss on `tokens`.

    `proof`: of how many windows the contrast is, one half of them the first and one the last ones; 0: all."""
    step = theta - next_theta
    before, first, more = _ends(evaluator, theta, tokens, step, proof)
    after, last, still = _ends(evaluator, next_theta, tokens, step, proof)
    if after >= WORST_LOSS:  # the round ruined the model: go by where it began
        last, max_points = first, 2
    drop = before - after
    ends = first.astype(np.float64) + last
    inner: dict[int, np.ndarray] = {}  # sums of gradients between, by how often the path was halved for them
    halvings = 0
    while True:
        mean = _quadrature(ends, inner, halvings)
        credit = bounded_credit(_dot(mean, step))
        error = min(WORST_LOSS, abs(credit - drop) / max(abs(drop), SMALLEST_DROP))
        points = 2**halvings + 1
        if error <= tolerance or 2 * points - 1 > max_points:
            break
        halvings += 1
        shares = [(2 * k + 1) / 2**halvings for k in range(2 ** (halvings - 1))]
        between = (_gradient(evaluator, theta - np.float32(t) * step, tokens)[1].astype(np.float64) for t in shares)
        inner[halvings] = np.sum(list(between), axis=0)
    alignment = {peer: dot(mean, one) for peer, one in sorted(contributions.items())}
    return PathCredit(alignment, credit, before, after, points, error, first, bounded_credit(0.25 * (more + still)))


def _ends(evaluator: Evaluator, theta: Flat, tokens: torch.Tensor, step: Flat, proof: int) -> tuple[float, Flat, float]:
    """(loss, gradient, <gradient on the first windows of the proof - on the last, step>)."""
    count = len(tokens)
    if count < 2:
        return *_gradient(evaluator, theta, tokens), 0.0
    end = min(proof or count, count) // 2
    parts = [part for part in torch.tensor_split(tokens, [end, count - end]) if len(part)]
    found = [_gradient(evaluator, theta, part) for part in parts]
    gradient, loss = np.zeros_like(step), 0.0
    for part, (value, slope) in zip(parts, found, strict=True):
        gradient += np.float32(len(part) / count) * slope
        loss += len(part) / count * value
    return loss, gradient, _dot(found[0][1], step) - _dot(found[-1][1], step)


def bounded(loss: float) -> float:
    """A loss that is no number, or beyond any that a model has, is the worst."""
    return max(-WORST_LOSS, min(WORST_LOSS, loss)) if math.isfinite(loss) else WORST_LOSS


def _gradient(evaluator: Evaluator, theta: Flat, tokens: torch.Tensor) -> tuple[float, Flat]:
    loss, gradient = evaluator.gradient(theta, tokens)
    if not np.isfinite(gradient).all():
        return WORST_LOSS, np.zeros_like(gradient)
    return bounded(loss), gradient


def _quadrature(ends: np.ndarray, inner: Mapping[int, np.ndarray], halvings: int) -> Flat:
    """The mean gradient along the path: trapezoid rule of two points, composite Simpson of more."""
    if halvings == 0:
        return np.asarray(0.5 * ends, dtype=np.float32)
    intervals = 2**halvings
    total = ends + 4.0 * inner[halvings]
    for halving in range(1, halvings):
        total = total + 2.0 * inner[halving]
    return np.asarray(total / (3.0 * intervals), dtype=np.float32)


def dot(gradient: Flat, contribution: Contribution) -> float:
    """<gradient, contribution>, in float64."""
    if isinstance(contribution, Sparse):
        return bounded_credit(_dot(gradient[contribution.indices], contribution.values))
    return bounded_credit(_dot(gradient, contribution.values))


def bounded_credit(value: float) -> float:
    """Beyond any loss there is no credit to give or to take."""
    return max(-WORST_LOSS, min(WORST_LOSS, value)) if math.isfinite(value) else -WORST_LOSS


def _dot(a: Flat, b: Flat) -> float:
    return float(np.dot(a.astype(np.float64), b.astype(np.float64)))


def trial_delta(evaluator: Evaluator, tokens: torch.Tensor, theta: Flat, one: Contribution, before: float) -> float:
    """The exact drop of the loss on `tokens` from `before` (at theta) when a part of this contribution is applied."""
    moved = theta.copy()
    step = np.float32(TRIAL_STEP)
    if isinstance(one, Sparse):
        moved[one.indices] -= step * one.values
    else:
        moved -= step * one.values
    return before - bounded(evaluator.loss(moved, tokens))


def place_by_fit(gradients_PN: np.ndarray, own_N: Flat, rivals_RN: np.ndarray) -> int:
    """The place of a contribution among its rivals (1 is the best) in following the gradients on parts of its samples.

    P parts, R rivals, N parameters. On each part they are compared by standard deviations from their mean; what is
    beyond `ENOUGH` does not make up for another part: who trained on a few of its samples fits the rest like anybody.
    Who did not train on them fits them like anybody else: every place is equally likely. Equals share the better place,
    so that a copy does not push away what it copied.
    """
    rows = np.vstack([own_N[None, :], rivals_RN])
    lengths = np.linalg.norm(rows, axis=1)
    fits = (gradients_PN @ rows.T).astype(np.float64) / np.where(lengths > 0, lengths, 1.0)
    spread = fits.std(axis=1, keepdims=True)
    deviations = np.divide(fits - fits.mean(axis=1, keepdims=True), spread, out=np.zeros_like(fits), where=spread > 0)
    total = np.minimum(deviations, ENOUGH).mean(axis=0)
    return 1 + int(np.count_nonzero(total > total[0] + ROUNDING))


def at(one: Contribution, where_N: np.ndarray, size: int) -> Flat:
    """A contribution's values at increasing places of a module with `size` parameters."""
    if isinstance(one, Sparse):
        dense = np.zeros(size, dtype=np.float32)
        dense[one.indices] = one.values
        one = Dense(dense)
    values: Flat = one.values[where_N]
    return values


def similarity(one: Contribution, others: Mapping[PeerId, Contribution], layout: Layout) -> dict[PeerId, float]:
    """Cosine of one contribution with each of the others."""
    dense = layout.zeros()
    if isinstance(one, Sparse):
        dense[one.indices] = one.values
    else:
        dense = one.values
    return {peer: dot(dense, other) / (one.length * other.length or 1.0) for peer, other in others.items()}
