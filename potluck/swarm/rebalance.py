"""Adaptive stage assignment: who moves to which stage in a period. Pure; every peer decides from the same table.

After SWARM (Ryabinin et al. 2023): each period the stage with the least load gives its least loaded peer to the stage
with the most. One move per period is far too slow for 64 stages and 1,000 peers, so here every peer computes the same
plan, the moves that level the stages' throughputs (highest gives to lowest until that lifts nothing), and half of it is
carried out per period.

Damping: the whole plan must lift the slowest stage by `Rules.gain`, those on their way count where they go, who has
moved rests, and at most half moves, so that the plans of an old and a new table together do not overshoot. From any
start it ends within `ceil(log2(peers)) + 2` periods for equal peers, `rest` more for unlike ones, and some more where
tables are old (all three tested, not proved); each move raises the lower of its two stages, so with constant
throughputs it does end. Loads, which are noisy and (as queue lengths) not proportional to anything, choose among equal
peers and can forbid a move, but never call for one: whether a plan is worth it does not hang on noise.

A stage is never emptied, however old and unlike the tables are: the `floor` lowest peer ids of a stage stay, so the
lowest id that ever settled there has no reason to leave. (Who dies is another matter: snapshots heal that.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from potluck.net.host import PeerId


@dataclass(frozen=True)
class PeerLoad:
    """What a peer publishes of the last period, under the stage that it serves or is on its way to."""

    load: float
    """Mean queue length or utilization, at least 0."""
    throughput: float
    """Samples per second that it can serve, measured or estimated, for a stage of work 1."""
    moving: bool = False
    """On its way here, or here for fewer than `Rules.rest` periods: it counts here and stays."""
    bound: bool = False
    """Serves here for good: one of those who never leave."""

    def __post_init__(self) -> None:
        if not (0 <= self.load < math.inf and 0 <= self.throughput < math.inf):
            raise ValueError(f"load {self.load}, throughput {self.throughput}: allowed are finite values from 0")


#: Between decisions. The paper compares 300 s and 60 s; what limits a pipeline is how long a hole stays open.
PERIOD_SECONDS: Final = 60.0

Stages = Sequence[Mapping[PeerId, PeerLoad]]


@dataclass(frozen=True)
class Rules:
    """A run's damping; all peers must use the same."""

    gain: float = 1.15
    """Move only if all moves together multiply the slowest stage's throughput by this."""
    share: float = 0.5
    """Part of the moves carried out per period."""
    floor: int = 1
    """Settled replicas that never leave a stage."""
    rest: int = 3
    """Periods from one move of a peer to its next."""
    contradiction: float = 1.25
    """A stage this much more loaded than another gives it nothing (noise of 10 % on both sides makes 1.22)."""

    def resting(self, moved: int | None, period: int) -> bool:
        """Whether a peer that last moved in period `moved` publishes itself as `moving` still."""
        return moved is not None and period - moved < self.rest


RULES = Rules()


def newcomer(me: PeerId, stages: Stages, work: Sequence[float] | None = None, able: Sequence[int] | None = None) -> int:
    """The stage to join, of those that it is `able` to serve (default: all): the slowest, of equals the most loaded. A
    crowd of newcomers spreads over equal stages."""
    table = _Table(stages, work)
    return min(
        range(len(stages)) if able is None else able,
        key=lambda stage: (table.throughput[stage], -table.load[stage], _dice(me, stage), stage),
    )


def decide(
    me: PeerId,
    stage: int,
    stages: Stages,
    period: int,
    moved: int | None = None,
    work: Sequence[float] | None = None,
    rules: Rules = RULES,
) -> int | None:
    """The stage to which this peer, serving `stage` since its last move in period `moved`, moves now; None: it stays.

    `period` counts equally for all. Nobody moves on the word of a table that has it in another stage.
    """
    if me not in stages[stage] or rules.resting(moved, period):
        return None
    return plan(stages, period, work, rules).get(me)


def plan(stages: Stages, period: int, work: Sequence[float] | None = None, rules: Rules = RULES) -> dict[PeerId, int]:
    """All who move in this period, and where to. `work`: the stages' relative compute per sample, equal by default."""
    table = _Table(stages, work)
    free = [
        sorted(
            sorted(peer for peer, seen in stage.items() if not (seen.moving or seen.bound))[
                max(0, rules.floor - sum(seen.bound for seen in stage.values())) :
            ],
            key=lambda peer: (stage[peer].load, _dice(peer, period)),
        )
        for stage in table.stages
    ]
    before = lowest = min(table.throughput)
    moves: list[tuple[PeerId, int]] = []
    useful = 0  # moves up to the last that lifted the slowest stage
    while found := table.best_move(free, rules):
        peer, giver, taker = found
        free[giver].remove(peer)
        table.move(peer, giver, taker)
        moves.append((peer, taker))
        if min(table.throughput) > lowest:
            lowest, useful = min(table.throughput), len(moves)
    if lowest < before * rules.gain:
        return {}
    return dict(moves[: math.ceil(rules.share * useful)])


class _Table:
    """The published table, each peer in one stage, and the stages' throughputs as a plan goes on."""

    def __init__(self, stages: Stages, work: Sequence[float] | None) -> None:
        self.work = work or [1.0] * len(stages)
        # Who moves still serves, and may be listed by, the stage that it leaves.
        movers = {peer for stage in stages for peer, seen in stage.items() if seen.moving}
        self.stages = [{p: seen for p, seen in stage.items() if seen.moving or p not in movers} for stage in stages]
        self.throughput = [
            sum(seen.throughput for seen in stage.values()) / work
            for stage, work in zip(self.stages, self.work, strict=True)
        ]
        self.load = [  # per replica; nothing is missed more than the first
            sum(seen.load for seen in stage.values()) / len(stage) if stage else math.inf for stage in self.stages
        ]

    def move(self, peer: PeerId, giver: int, taker: int) -> None:
        throughput = self.stages[giver][peer].throughput
        for stage, change in ((giver, -throughput), (taker, throughput)):
            before = self.throughput[stage]
            self.throughput[stage] += change / self.work[stage]
            if before > 0:  # the same requests for other peers
                self.load[stage] *= before / self.throughput[stage]

    def best_move(self, free: Sequence[Sequence[PeerId]], rules: Rules) -> tuple[PeerId, int, int] | None:
        """(peer, giver, taker): for the slowest stage, from the fastest that has somebody to spare.

        `free`: who may leave each stage, the least loaded first.
        """
        order = sorted(range(len(self.stages)), key=lambda stage: (self.throughput[stage], -self.load[stage], stage))
        taker = order[0]
        for giver in reversed(order[1:]):
            if self.load[giver] > rules.contradiction * self.load[taker]:
                continue
            lifts = [self._lift(peer, giver, taker) for peer in free[giver]]
            best = max(lifts, default=0.0)
            if best > 1e-9 * self.throughput[taker]:
                return free[giver][lifts.index(best)], giver, taker
        return None

    def _lift(self, peer: PeerId, giver: int, taker: int) -> float:
        """By how much a move raises the lower of the two stages' throughputs."""
        throughput = self.stages[giver][peer].throughput
        left = self.throughput[giver] - throughput / self.work[giver]
        return min(left - self.throughput[taker], throughput / self.work[taker])


def _dice(peer: PeerId, salt: int) -> bytes:
    """Equal for all who look, unlike in each period: of equal peers not always the same one is asked."""
    return hashlib.sha256(b"potluck.rebalance.1" + salt.to_bytes(8, "big", signed=True) + peer.encode()).digest()
