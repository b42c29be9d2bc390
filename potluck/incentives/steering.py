"""Steering: validators' published weights -> what each member's contribution counts for in a round.

Weights for a round are those that validators published for the round before the last, before this one began: by then
everybody who looks finds them, and whoever found the same takes the same. (Who has not averages to other bits, and then
loads the group's state.) A peer without a score is capped, and so are all of them together. Where validators fall
silent their last weights fade to equal ones.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final, Protocol

import numpy as np

from potluck.dht.records import Signed, Weights
from potluck.errors import NetworkError
from potluck.incentives.consensus import Consensus, yuma
from potluck.net.host import PeerId
from potluck.swarm.aggregate import MAX_TOKENS_OF_MEDIAN
from potluck.swarm.phases import Round, RoundClock

#: A round's weights are made in the next one, and in force in the one after.
LAG_ROUNDS: Final = 2
#: A peer without a score counts for this part of the median one's weight; all of them for this part of the update.
NEWCOMER: Final = 0.5
NEWCOMERS: Final = 0.25

Opinions = Mapping[PeerId, Mapping[PeerId, float]]
Emit = Callable[..., None]


class Records(Protocol):
    """Where validators' records are read."""

    async def weights(
        self, module: str, round_: Round, timeout_seconds: float
    ) -> tuple[Sequence[Signed[Weights]], bool]:
        """What is there, and whether the search was complete."""
        ...


def opinions_of(records: Sequence[Signed[Weights]], stake: Mapping[PeerId, float], before: float) -> Opinions:
    """Trusted validators' weights, published before that time (UTC)."""
    return {
        one.peer: {PeerId(peer): weight for peer, weight in one.record.weights.items()}
        for one in records
        if stake.get(one.peer, 0.0) > 0 and one.record.made_at <= before
    }


def consensus(
    opinions: Opinions, stake: Mapping[PeerId, float], bonds: Opinions | None = None
) -> tuple[dict[PeerId, float], dict[PeerId, float], dict[PeerId, dict[PeerId, float]]]:
    """(peer -> incentive, validator -> dividends, bonds for the next round) of opinions. Clipped on both sides."""
    # A validator that trains, too, has no say about itself.
    opinions = {v: {p: w for p, w in row.items() if p != v} for v, row in opinions.items() if stake.get(v, 0.0) > 0}
    validators = sorted(opinions)
    peers = sorted({peer for row in opinions.values() for peer in row})
    if not validators or not peers:
        return {}, {}, {}

    def table(rows: Opinions) -> np.ndarray:
        return np.array([[rows.get(v, {}).get(p, 0.0) for p in peers] for v in validators])

    before = None if bonds is None else table(bonds)
    result: Consensus = yuma([stake[v] for v in validators], table(opinions), before, two_sided=True, mask_self=False)
    return (
        dict(zip(peers, result.incentive.tolist(), strict=True)),
        dict(zip(validators, result.dividends.tolist(), strict=True)),
        {v: dict(zip(peers, row, strict=True)) for v, row in zip(validators, result.bonds.tolist(), strict=True)},
    )


def member_weights(
    incentive: Mapping[PeerId, float], tokens: Mapping[PeerId, int], faded: float = 0.0
) -> dict[PeerId, float] | None:
    """What each member counts for, adding up to 1; None where nobody has a score, so that tokens alone count.

    Incentives are shares of squared scores: their root is what a peer is worth, per token. Tokens are believed up to
    twice the median of those with a score. `faded` in [0, 1]: towards equal worth.
    """
    members = sorted(tokens)
    scored = {peer: math.sqrt(incentive[peer]) for peer in members if peer in incentive}
    positive = {peer: worth for peer, worth in scored.items() if worth > 0}
    if not positive or faded >= 1:
        return None
    usual = statistics.median(positive.values())
    most = MAX_TOKENS_OF_MEDIAN * statistics.median_low(tokens[peer] for peer in positive)

    def counts(peer: PeerId) -> float:
        return ((1 - faded) * scored.get(peer, NEWCOMER * usual) + faded * usual) * min(tokens[peer], most)

    raw = {peer: counts(peer) for peer in members}
    known, new = (math.fsum(raw[peer] for peer in members if (peer in scored) == which) for which in (True, False))
    share = NEWCOMERS + (1 - NEWCOMERS) * faded
    cut = min(1.0, share / (1 - share) * known / new) if new > 0 else 1.0
    total = known + cut * new
    return (
        {peer: (1.0 if peer in scored else cut) * value / total for peer, value in raw.items()} if total > 0 else None
    )


class Steering:
    """Reads validators' weights for one module. `read` before `weights`; a failed read leaves the last known.

    `fade_rounds`: until old weights are equal ones, and as long as records last (the run's `rounds.retain`)."""

    def __init__(
        self,
        records: Records,
        module: str,
        stake: Mapping[PeerId, float],
        clock: RoundClock,
        fade_rounds: int,
        emit: Emit,
    ) -> None:
        self._records, self._module, self._stake, self._clock, self._emit = records, module, stake, clock, emit
        self._fade = fade_rounds
        self._incentive: dict[Round, dict[PeerId, float]] = {}
        #: Those of which a read was complete.
        self._whole: set[Round] = set()

    async def read(self, round_: Round, timeout_seconds: float) -> None:
        """What is in force in `round_`. Looks further back only for what was not read when its time was."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._read(round_, timeout_seconds)

    async def _read(self, round_: Round, timeout_seconds: float) -> None:
        newest = round_ - LAG_ROUNDS
        for made in range(newest, max(-1, newest - self._fade), -1):
            if Round(made) in self._whole:
                break
            try:
                records, complete = await self._records.weights(self._module, Round(made), timeout_seconds)
            except NetworkError:
                continue
            # Whoever reads them later must count the same.
            before = self._clock.window(Round(made + LAG_ROUNDS)).start
            opinions = opinions_of(records, self._stake, before)
            if opinions:
                self._incentive[Round(made)] = consensus(opinions, self._stake)[0]
                if complete:
                    self._whole.add(Round(made))  # what was read in part is read again
                break
        for old in [one for one in self._incentive if one < newest - self._fade]:
            del self._incentive[old]
        self._whole &= self._incentive.keys()

    def weights(self, round_: Round, tokens: Mapping[PeerId, int]) -> dict[PeerId, float] | None:
        """Of a round's members, adding up to 1; None where tokens alone count."""
        known = [made for made in self._incentive if made <= round_ - LAG_ROUNDS]
        if not known:
            return None
        age = round_ - LAG_ROUNDS - max(known)
        if age > 0:
            self._emit("swarm.weights.stale", round=round_, age_rounds=age, faded=min(1.0, age / self._fade))
        return member_weights(self._incentive[max(known)], tokens, min(1.0, age / self._fade))
