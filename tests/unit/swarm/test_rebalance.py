"""Adaptive stage assignment: it converges from anywhere, then rests, and never empties a stage."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.net.host import PeerId
from potluck.swarm.rebalance import RULES, PeerLoad, Rules, Stages, decide, newcomer, plan

STAGES = [3, 4, 8, 16, 32, 64]


class Swarm:
    """Peers of constant throughput in a saturated pipeline; loads are utilizations with noise."""

    def __init__(self, at: Sequence[int], throughput: Sequence[float], stages: int, seed: int = 0) -> None:
        self.stages, self.dice = stages, random.Random(seed)
        self.work = [1.0] * stages
        self.names = [PeerId(f"p{i:04}") for i in range(len(at))]
        self.dice.shuffle(self.names)
        self.at = dict(zip(self.names, at, strict=True))
        self.throughput = dict(zip(self.names, throughput, strict=True))
        self.moved: dict[PeerId, int] = {}
        self.period = 0

    def capacity(self) -> list[float]:
        total = [0.0] * self.stages
        for peer, stage in self.at.items():
            total[stage] += self.throughput[peer] / self.work[stage]
        return total

    def table(self, noise: float = 0.0) -> list[dict[PeerId, PeerLoad]]:
        capacity = self.capacity()
        stages: list[dict[PeerId, PeerLoad]] = [{} for _ in capacity]
        for peer, stage in self.at.items():
            load = min(capacity) / capacity[stage] * self.dice.uniform(1 - noise, 1 + noise)
            moving = RULES.resting(self.moved.get(peer), self.period)
            stages[stage][peer] = PeerLoad(load, self.throughput[peer], moving)
        return stages

    def step(self, *tables: Stages) -> int:
        """One period in which each peer believes one of the tables; how many moved."""
        plans = [plan(table, self.period, self.work) for table in tables]
        moves: dict[PeerId, int] = {}
        for peer in self.names:
            which = self.dice.randrange(len(tables))
            # `decide` without computing the same plan anew for each peer.
            known = peer in tables[which][self.at[peer]]
            if known and not RULES.resting(self.moved.get(peer), self.period) and peer in plans[which]:
                moves[peer] = plans[which][peer]
        self.at.update(moves)
        self.moved.update(dict.fromkeys(moves, self.period))
        self.period += 1
        return len(moves)

    def converge(self, noise: float = 0.0, limit: int = 100) -> int:
        """Periods until nobody has moved for as long as movers rest."""
        quiet = last = 0
        for period in range(limit):
            if self.step(self.table(noise)):
                last, quiet = period + 1, 0
            else:
                quiet += 1
            if quiet > RULES.rest:
                return last
        raise AssertionError("does not converge")


def worst(stages: int, peers: int) -> list[int]:
    """All in one stage but one in each other."""
    return [*range(1, stages), *[0] * (peers - stages + 1)]


def bound(peers: int) -> int:
    return math.ceil(math.log2(peers)) + 2


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("peers", [200, 1000])
def test_the_worst_start_is_levelled_in_logarithmically_many_periods(stages: int, peers: int) -> None:
    swarm = Swarm(worst(stages, peers), [1.0] * peers, stages)
    assert swarm.converge() <= bound(peers)
    assert min(swarm.capacity()) * RULES.gain >= peers // stages
    assert not any(swarm.step(swarm.table()) for _ in range(10))


@settings(max_examples=60)
@given(st.integers(2, 16), st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_any_start_of_unlike_peers_converges_and_noise_moves_nobody_after(
    stages: int, replicas: int, seed: int, bad: bool
) -> None:
    dice, peers = random.Random(seed), stages * replicas
    at = worst(stages, peers) if bad else [*range(stages), *dice.choices(range(stages), k=peers - stages)]
    swarm = Swarm(at, [dice.lognormvariate(0, 0.7) for _ in at], stages, seed)
    # Who moved rests; rested, unlike peers may find one more worthwhile move.
    assert swarm.converge(noise=0.1) <= bound(peers) + RULES.rest
    assert not any(swarm.step(swarm.table(0.1)) for _ in range(30))


@settings(max_examples=60)
@given(st.integers(2, 12), st.integers(2, 8), st.integers(0, 10**6))
def test_peers_that_read_the_last_periods_table_still_converge_and_empty_no_stage(
    stages: int, replicas: int, seed: int
) -> None:
    dice, peers = random.Random(seed), stages * replicas
    swarm = Swarm(worst(stages, peers), [dice.lognormvariate(0, 0.5) for _ in range(peers)], stages, seed)
    old = swarm.table(0.1)
    moves = []
    for _ in range(3 * bound(peers) + 30):
        new = swarm.table(0.1)
        moves.append(swarm.step(old, new))
        old = new
        assert set(swarm.at.values()) == set(range(stages))
    assert not any(moves[-30:])


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_tables_however_old_never_empty_a_stage(stages: int, seed: int) -> None:
    dice, peers = random.Random(seed), 5 * stages
    swarm = Swarm(worst(stages, peers), [dice.lognormvariate(0, 1.0) for _ in range(peers)], stages, seed)
    seen = [swarm.table(0.5)]
    for _ in range(30):
        swarm.step(*seen)
        seen.append(swarm.table(0.5))
        assert set(swarm.at.values()) == set(range(stages))


def of(*stages: dict[str, PeerLoad]) -> Stages:
    return [{PeerId(peer): load for peer, load in stage.items()} for stage in stages]


SLOW = {"z": PeerLoad(1.0, 1.0)}


def test_the_least_loaded_of_the_least_loaded_stage_goes_to_the_most_loaded_and_everyone_agrees() -> None:
    idle = {"a": PeerLoad(0.2, 1.0), "b": PeerLoad(0.4, 1.0), "c": PeerLoad(0.3, 1.0)}
    middle = {"f": PeerLoad(0.5, 1.0), "g": PeerLoad(0.5, 1.0)}
    stages = of(middle, SLOW, idle)
    answers = {p: decide(p, s, stages, period=7) for s, stage in enumerate(stages) for p in stage}
    assert {p: to for p, to in answers.items() if to is not None} == {"c": 1}  # a, the lowest id, keeps its stage


def test_the_last_replica_never_leaves_nor_those_of_the_floor() -> None:
    assert plan(of({"a": PeerLoad(0.0, 9.0)}, {}), 0) == {}
    three = {p: PeerLoad(0.1, 1.0) for p in "abc"}
    assert plan(of(three, {}), 0)
    assert plan(of(three, {}), 0, rules=Rules(floor=3)) == {}


def test_a_small_gain_moves_nobody() -> None:
    tens = {f"a{i}": PeerLoad(0.8, 1.0) for i in range(12)}
    nines = {f"b{i}": PeerLoad(1.0, 1.0) for i in range(10)}
    assert plan(of(tens, nines), 0) == {}
    assert len(plan(of(tens, nines), 0, rules=Rules(gain=1.05))) == 1


def test_movers_in_flight_count_where_they_go() -> None:
    idle = {p: PeerLoad(0.3, 1.0) for p in "abc"}
    assert plan(of(idle, SLOW), 0)
    arriving = {**SLOW, "c": PeerLoad(0.0, 1.0, moving=True)}
    assert plan(of(idle, arriving), 0) == {}
    assert newcomer(PeerId("n"), of(idle, SLOW)) == 1
    assert newcomer(PeerId("n"), of({"a": PeerLoad(0.5, 1.0)}, arriving)) == 0


def test_who_moved_rests_and_an_old_table_moves_nobody() -> None:
    stages = of({p: PeerLoad(0.3, 1.0) for p in "abc"}, SLOW)
    (peer, to), *_ = plan(stages, 9).items()
    assert decide(peer, 0, stages, 9) == to == 1
    assert decide(peer, 0, stages, 9, moved=9 - RULES.rest) == 1
    assert decide(peer, 0, stages, 9, moved=8) is None
    assert decide(peer, 1, stages, 9) is None  # it is in stage 1 by now; the table has it in 0


def test_a_loaded_stage_gives_nothing_whatever_throughput_it_claims() -> None:
    boasting = {p: PeerLoad(5.0, 10.0) for p in "abc"}
    assert plan(of(boasting, {"z": PeerLoad(0.1, 1.0)}), 0) == {}


def test_stages_of_unlike_work_get_peers_in_proportion() -> None:
    swarm = Swarm(worst(3, 40), [1.0] * 40, 3)
    swarm.work = [1.0, 1.0, 2.0]
    assert swarm.converge() <= bound(40)
    assert min(swarm.capacity()) >= 10 / RULES.gain


def test_newcomers_go_where_they_are_missed_and_spread_over_equals() -> None:
    assert newcomer(PeerId("n"), of({"a": PeerLoad(0.5, 2.0)}, SLOW, {"c": PeerLoad(0.5, 2.0)})) == 1
    assert newcomer(PeerId("n"), of(SLOW, {"y": PeerLoad(3.0, 1.0)})) == 1  # equal throughput: the more loaded
    assert newcomer(PeerId("n"), of(SLOW, {})) == 1
    assert {newcomer(PeerId(f"n{i}"), of({}, {}, {})) for i in range(50)} == {0, 1, 2}
    assert {newcomer(PeerId(f"n{i}"), of({}, {}, {}), able=[0, 2]) for i in range(50)} == {0, 2}  # what fits


def test_a_period_asks_another_peer_when_several_would_do() -> None:
    stages = of({p: PeerLoad(0.3, 1.0) for p in "abcdef"}, SLOW)
    assert len({frozenset(plan(stages, period)) for period in range(20)}) > 1


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_loads_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="allowed"):
        PeerLoad(bad, 1.0)
    with pytest.raises(ValueError, match="allowed"):
        PeerLoad(1.0, bad)


def test_a_bound_replica_lets_the_other_one_go_where_nobody_is() -> None:
    """Found by a user: a peer with `--stage 1` and one without sat in stage 1 for good, and nobody in stage 0."""
    bound, free = PeerId("a"), PeerId("b")
    for names in ((bound, free), (free, bound)):
        stage = {names[0]: PeerLoad(0.1, 1.0, bound=True), names[1]: PeerLoad(0.1, 1.0)}
        assert plan([{}, stage], 1) == {names[1]: 0}
    assert plan([{}, {free: PeerLoad(0.1, 1.0)}], 1) == {}  # the last one stays
