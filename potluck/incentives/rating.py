"""Ratings: who does better than whom, round after round. Plackett-Luce after Weng and Lin (2011), by openskill.

Each round is one game of all peers whose contributions were looked at, ranked by what they did to the loss. A rating is
a mean and its uncertainty. They are told, and order peers; they are in no score (`docs/decisions/0016`).
Constants are those of Gauntlet's deployment (`gauntlet.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

from potluck.net.host import PeerId

BETA: Final = 7.0
TAU: Final = 0.1


class Rating(NamedTuple):
    mu: float = 25.0
    sigma: float = 25.0 / 3.0

    @property
    def ordinal(self) -> float:
        return self.mu - 3.0 * self.sigma


def rate(ratings: Mapping[PeerId, Rating], results: Mapping[PeerId, float]) -> dict[PeerId, Rating]:
    """Ratings of those with a result, after a round. Higher results are better. Fewer than two: nothing changes."""
    peers = sorted(results)
    if len(peers) < 2:
        return {peer: ratings.get(peer, Rating()) for peer in peers}
    model = _model()
    before = [ratings.get(peer, Rating()) for peer in peers]
    teams = [[model.rating(mu=one.mu, sigma=one.sigma)] for one in before]
    rated = model.rate(teams, scores=[results[peer] for peer in peers])
    return {peer: Rating(float(team[0].mu), float(team[0].sigma)) for peer, team in zip(peers, rated, strict=True)}


@lru_cache(maxsize=1)
def _model() -> Any:
    from openskill.models import PlackettLuce

    # By default a game of n narrows a rating by 1 / n of what it tells: hundreds of rounds pass before one is known.
    return PlackettLuce(beta=BETA, tau=TAU, gamma=lambda *_: 1.0)
