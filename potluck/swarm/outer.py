"""The outer step: what an aggregated pseudo-gradient does to the parameters that the group shares.

SGD with Nesterov momentum as in DiLoCo (Douillard et al., 2023), plain averaging when momentum is 0 and the learning
rate 1. Momentum warms up linearly over the first rounds, so that early, large pseudo-gradients do not overshoot.
Separate elementwise float32 operations only: equal inputs give equal bits on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from potluck.swarm.compiled import BOOL, FLOAT, FLOATS, TO_FLOATS, compiled
from potluck.swarm.contribution import Dense, Quantized
from potluck.swarm.layout import Flat


@dataclass(frozen=True)
class OuterStep:
    learning_rate: float = 1.0
    momentum: float = 0.0
    nesterov: bool = True
    momentum_warmup_rounds: int = 0

    def momentum_at(self, round_: int) -> float:
        """Momentum in force in a round."""
        if self.momentum_warmup_rounds <= 0:
            return self.momentum
        return self.momentum * min(1.0, round_ / self.momentum_warmup_rounds)

    def apply(self, theta: Flat, velocity: Flat | None, update: Flat, round_: int) -> tuple[Flat, Flat | None]:
        """(theta, velocity) of the next round. `update` is used up: large modules are short of memory, and new memory
        costs more time than the arithmetic.

        v' = mu v + u;  theta' = theta - lr (u + mu v') with Nesterov, theta - lr v' without.
        """
        faster = velocity.copy() if self.moves(velocity) else velocity
        self.move(theta, faster, update, round_)
        return update, faster

    def moves(self, velocity: Flat | None) -> TypeGuard[Flat]:
        """Whether `move` writes to it."""
        return self.momentum != 0.0 and velocity is not None

    def move(self, theta: Flat, velocity: Flat | None, update: Flat, round_: int) -> None:
        """`apply` to a part of all vectors: theta of the next round is written into `update`, velocity into itself."""
        rate = np.float32(self.learning_rate)
        if not self.moves(velocity):
            _step(theta, update, rate)
        else:
            _step_with_momentum(theta, velocity, update, rate, np.float32(self.momentum_at(round_)), self.nesterov)

    def move_by(
        self, theta: Flat, velocity: Flat | None, piece: Dense | Quantized, part: slice, into: Flat, round_: int
    ) -> None:
        """As `move`, by a `part` of what is decoded on the way; theta of the next round is written into `into`."""
        if isinstance(piece, Quantized) and not self.moves(velocity):
            piece.move(theta, part, into, np.float32(self.learning_rate))
        else:
            piece.read(part, into)
            self.move(theta, velocity, into, round_)


# Both write theta of the next round into `update`.


@compiled((FLOATS, TO_FLOATS, FLOAT))
def _step(theta: Flat, update: Flat, rate: np.float32) -> None:
    for i in range(update.size):
        update[i] = theta[i] - update[i] * rate


@compiled((FLOATS, TO_FLOATS, TO_FLOATS, FLOAT, FLOAT, BOOL))
def _step_with_momentum(
    theta: Flat, velocity: Flat, update: Flat, rate: np.float32, mu: np.float32, nesterov: bool
) -> None:
    for i in range(update.size):
        faster = velocity[i] * mu + update[i]
        velocity[i] = faster
        move = update[i] + faster * mu if nesterov else faster
        update[i] = theta[i] - move * rate
