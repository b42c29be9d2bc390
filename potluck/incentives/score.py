"""From what a peer did in a round to its score: standings, penalties with their fault, normalization. Pure.

PeerScore = usefulness x computation x sync x penalties; a peer's weight is its share of the squared scores. Usefulness
is a moving average of path credit: Gauntlet pays by rank (`rating.py`), which starves every slow but honest volunteer
(`docs/decisions/0016`). What happens to a peer is told apart from what it does: a round that it misses costs the round,
not its score; only while it stays away its weight decays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from potluck.incentives.entries import Standing
from potluck.incentives.rating import Rating
from potluck.net.host import PeerId

#: Exponent of the scores' normalization.
POWER: Final = 2
#: Weight that is left after each round away.
ABSENT: Final = 0.75
#: Rounds away after which a peer is forgotten: should it come back, it begins anew.
FORGOTTEN: Final = 25
#: Of the last 8 contributions, so many that made the loss worse are more than bad luck.
HARMFUL: Final = 4
HARMED_FACTOR: Final = 0.25
HISTORY: Final = 8
#: Weight of the newest round in a peer's usefulness, once it has come so often that this is less than an equal part:
#: until then usefulness is the plain mean, so that a newcomer waits for nothing but the test of computation.
RATE: Final = 0.1
#: The same of a round that was worth nothing, or less: who turns is found out before its past is spent.
BAD_RATE: Final = 0.3
#: Relative alignments beyond this are luck.
MOST_USEFUL: Final = 2.0

#: The test of computation goes by the place of a peer's contribution in fitting its own samples: of one who trained on
#: them it is the best, in the first quarter, in the first half or behind with these probabilities (seen with sparse
#: contributions of 8 to 32 samples: 0.8, 0.1, 0.05, 0.05; dense ones fit better); of one who did not, each place is as
#: likely. Decided at these rates of error (Wald's sequential probability ratio test).
PLACES: Final = (0.60, 0.25, 0.09, 0.06)
FALSE_ALARM: Final = 0.001
FALSE_PASS: Final = 0.01
PASSED_AT: Final = math.log((1 - FALSE_ALARM) / FALSE_PASS)
FAILED_AT: Final = math.log(FALSE_ALARM / (1 - FALSE_PASS))


@dataclass(frozen=True)
class Observation:
    """One peer in one round. `alignment` (path credit for a weight of 1) is None where nothing of it came or counted;
    `relative`: weighted by its tokens, beside what is usual. `refused`: it came, and was worth nothing.

    `place`: of `among` contributions, in fitting its own samples; None where that was not tested.
    `away`: nothing came, and it is not the network's fault. `in_sync`: whether it began with the run's parameters; None
    where that cannot be told.
    """

    alignment: float | None = None
    relative: float = 0.0
    refused: bool = False
    place: int | None = None
    among: int = 0
    away: bool = False
    in_sync: bool | None = None


@dataclass(frozen=True)
class Score:
    standing: Standing
    score: float
    factors: dict[str, float] = field(default_factory=dict)


def fits_well(place: int | None, among: int) -> bool:
    """Whether it fits its own samples as one who trained on them would: in the first quarter."""
    return place is not None and place <= max(1, among // 4)


def likelihood_ratio(place: int, among: int) -> float:
    """How much likelier a place is of one who trained than of one who did not."""
    probabilities: dict[int, float] = {}  # by the last place of a class; of few contributions some fall together
    for end, probability in zip((1, max(1, among // 4), max(1, among // 2), among), PLACES, strict=True):
        probabilities[end] = probabilities.get(end, 0.0) + probability
    begin = 0
    for end, probability in probabilities.items():
        if place <= end:
            return probability * among / (end - begin)
        begin = end
    raise ValueError(f"place {place} among {among}")


def computation_evidence(evidence: float, verdict: int, place: int, among: int) -> tuple[float, int]:
    """(log-likelihood ratio, verdict) after one more look. A decided test begins anew, so that a change is found."""
    if among < 2:
        return evidence, verdict
    evidence += math.log(likelihood_ratio(place, among))
    if evidence >= PASSED_AT:
        return 0.0, 1
    if evidence <= FAILED_AT:
        return 0.0, -1
    return evidence, verdict


def advance(standing: Standing, seen: Observation, round_: int, rating: Rating) -> Standing:
    """The standing after a round, its rating taken as given."""
    evidence, verdict = standing.evidence, standing.verdict
    if seen.place is not None:
        evidence, verdict = computation_evidence(evidence, verdict, seen.place, seen.among)
    came = seen.alignment is not None or seen.refused
    harmed, usefulness = standing.harmed, standing.usefulness
    if came:
        worth = 0.0 if seen.refused else max(-MOST_USEFUL, min(MOST_USEFUL, seen.relative))
        rate = BAD_RATE if worth <= 0 < usefulness else RATE
        usefulness += max(rate, 1 / (standing.seen + 1)) * (worth - usefulness)
    if seen.alignment is not None:
        harmed = [seen.alignment <= 0, *harmed][:HISTORY]
    return Standing(
        mu=rating.mu,
        sigma=rating.sigma,
        usefulness=usefulness,
        evidence=evidence,
        verdict=verdict,
        seen=standing.seen + came,
        last=round_ if came else standing.last,
        missed=standing.missed + 1 if seen.away else 0 if came else standing.missed,
        harmed=harmed,
        unsynced=standing.unsynced if seen.in_sync is None else 0 if seen.in_sync else standing.unsynced + 1,
    )


def remembered(standing: Standing, round_: int, shards: int) -> bool:
    """Whether a peer still has a standing after a round, of which `shards` groups each saw a part of the peers."""
    return standing.missed < FORGOTTEN and round_ - standing.last < 2 * FORGOTTEN * shards


def score(standing: Standing, testable: bool = True) -> Score:
    """A peer's score by its standing, and every factor in it that is not 1. `testable`: whether computation is."""
    factors = {
        "computation": _computation(standing) if testable else 1.0,
        # Once is a bad link: who then loads the group's state is in sync in the next round.
        "sync": 1.0 if standing.unsynced < 2 else 0.0,
        "harmful": HARMED_FACTOR if sum(standing.harmed) > HARMFUL else 1.0,
        "away": ABSENT**standing.missed,
    }
    total = max(0.0, standing.usefulness) * math.prod(factors.values())
    return Score(standing, total, {name: factor for name, factor in factors.items() if factor != 1.0})


def _computation(standing: Standing) -> float:
    """1 of one who passed, 0 of one who failed last or has shown nothing yet: identities cost nothing. What speaks
    against it since it passed counts from half of a failure on: a single bad look is bad luck."""
    against = max(0.0, standing.evidence / FAILED_AT)
    doubt = min(1.0, max(0.0, 2.0 * against - 1.0))
    match standing.verdict:
        case 1:
            return 1.0 - doubt
        case -1:
            return 0.0
        case _:
            return max(0.0, standing.evidence / PASSED_AT) ** 2  # of one lucky look next to nothing


def shares(scores: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """A validator's weights: scores to the power of 2, normalized. All zero where nobody has a score."""
    powers = {peer: value**POWER for peer, value in sorted(scores.items())}
    total = math.fsum(powers.values())
    return {peer: (power / total if total > 0 else 0.0) for peer, power in powers.items()}
