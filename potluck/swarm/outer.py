"""The outer step: what an aggregated pseudo-gradient does to the parameters that the group shares.

SGD with Nesterov momentum as in DiLoCo (Douillard et al., 2023), plain averaging when momentum is 0 and the learning
rate 1. Momentum warms up linearly over the first rounds, so that early, large pseudo-gradients do not overshoot.
Separate elementwise float32 operations only: equal inputs give equal bits on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        rate = np.float32(self.learning_rate)
        if self.momentum == 0.0 or velocity is None:
            np.multiply(update, rate, out=update)
            return np.subtract(theta, update, out=update), velocity
        mu = np.float32(self.momentum_at(round_))
        velocity = np.multiply(velocity, mu)
        np.add(velocity, update, out=velocity)
        if self.nesterov:
            np.add(update, velocity * mu, out=update)
            np.multiply(update, rate, out=update)
        else:
            np.multiply(velocity, rate, out=update)
        return np.subtract(theta, update, out=update), velocity
