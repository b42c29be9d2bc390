"""What a replica remembers between rounds, with what is new."""

from __future__ import annotations

import numpy as np

from potluck.swarm.compiled import FLOAT, FLOATS, TO_FLOATS, compiled
from potluck.swarm.layout import Flat


def blend(residual: Flat, beta: float, delta: Flat, share: float = 1.0) -> None:
    """residual = beta * residual + share * delta, in float32; both (n,)."""
    if residual.size != delta.size:
        raise IndexError(f"{residual.size} values and {delta.size}")
    _blend(residual, np.float32(beta), delta, np.float32(share))


@compiled((TO_FLOATS, FLOAT, FLOATS, FLOAT))
def _blend(residual: Flat, beta: np.float32, delta: Flat, share: np.float32) -> None:
    for i in range(delta.size):
        residual[i] = residual[i] * beta + delta[i] * share
