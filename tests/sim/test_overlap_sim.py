"""Overlapped rounds and rounds of parts, in virtual time: real replicas, a fake network, steps that take time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potluck.net.host import PeerId
from potluck.sim.loop import Compute, run
from potluck.sim.stand_in import Pace
from potluck.swarm.follower import RoundRules
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult
from potluck.swarm.overlap import OverlappedReplica
from potluck.swarm.phases import RoundClock
from potluck.swarm.rounds import GossipReplica
from potluck.swarm.state import ReplicaState

sys.path.insert(0, str(Path(__file__).parent))

from virtual_swarm import VirtualSwarm

LAYOUT = Layout.of([("a", (9,)), ("b", (20, 16)), ("c", (3, 50)), ("d", (14, 10))])
#: Rounds of 10 s, of which 4 s go into the exchange while the next ten steps of 0.95 s are made.
RULES = RoundRules(
    clock=RoundClock(genesis=0.0, seconds=10.0, exchange_seconds=4.0),
    steps=10,
    step_tokens=0,
    group_size=16,
    retain=6,
    fragments=4,
    sync_limit=3.0,
    clip=True,
)
STEP_SECONDS = 0.95


class Pulling:
    """Each peer pulls the parameters towards a target of its own. Steps take virtual time, which the machine pays."""

    def __init__(self, seed: int, step_seconds: float) -> None:
        self.layout, self.pace = LAYOUT, Pace(step_seconds)
        self.target = np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)
        self.theta: Flat = LAYOUT.zeros()
        self.rate, self.steps = np.float32(0.05), 0

    def cost(self) -> float:
        return self.pace.paid()

    def when_awake(self, then: Callable[[], None]) -> None:
        then()

    def load(self, theta: Flat) -> None:
        self.theta = theta.copy()

    def train(
        self, batches: Iterator[torch.Tensor], max_steps: int, first_step: int, may_start: Callable[[float], bool]
    ) -> LocalResult:
        steps = self.pace.steps_until(max_steps, lambda seconds: may_start(seconds - 1e-6))
        for _ in range(steps):
            self.theta += self.rate * (self.target - self.theta)
        self.steps += steps
        return LocalResult(steps, 100 * steps, 1.0, 0.5, 0.0)

    def forget(self) -> None:
        pass

    def delta(self, theta: Flat) -> Flat:
        return theta - self.theta

    def evaluate(self, tokens: torch.Tensor) -> float:
        return float(np.mean((self.theta - self.target) ** 2))


class Swarm(VirtualSwarm):
    layout = LAYOUT

    def __init__(
        self,
        rules: RoundRules = RULES,
        codec: str = "int8",
        momentum: float = 0.0,
        replica: type[GossipReplica] = OverlappedReplica,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        super().__init__(rules, codec, momentum)
        self.kind, self.step_seconds = replica, step_seconds
        self.trainers: dict[PeerId, Pulling] = {}
        self.states: dict[PeerId, dict[int, ReplicaState]] = {}

    def start(self, number: int) -> PeerId:
        peer = PeerId(f"peer-{number:02d}")
        self.world.of(peer).down = False
        states, trainer = self.states.setdefault(peer, {}), Pulling(number, self.step_seconds)

        async def on_state(state: ReplicaState, residual: Flat | None) -> None:
            states[state.round] = state

        following = self.following(peer, bytes([number, len(self.tasks)]) * 8)
        following["on_state"], following["compute"] = on_state, Compute(trainer)
        self.trainers[peer] = trainer
        replica = self.replicas[peer] = self.kind(
            trainer=trainer,
            batches=lambda round_: iter(()),
            held_out=torch.zeros(1, 2, dtype=torch.int64),
            **following,
        )
        self.tasks[peer] = asyncio.create_task(replica.run(self.theta_0()))
        return peer

    def names(self, peer: PeerId) -> list[str]:
        return [e["event"] for e in self.events[peer]]


def simulate(body: Callable[[Swarm], Any], **settings: Any) -> None:
    """Run a body in virtual time. When all have stopped, nothing is left under way."""

    async def go(loop: object) -> None:
        swarm = Swarm(**settings)
        try:
            await body(swarm)
        finally:
            for replica in swarm.replicas.values():
                replica.stop()
            await asyncio.gather(*swarm.tasks.values(), return_exceptions=True)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run(go)


@pytest.mark.parametrize("codec", ["none", "int8", "sparse"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stream", [1, 3])
@pytest.mark.parametrize("replica", [GossipReplica, OverlappedReplica])
def test_all_states_are_bit_identical(codec: str, momentum: float, stream: int, replica: type[GossipReplica]) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(105.0)
        for round_ in range(9):
            assert len(swarm.digests(round_)) == 1, round_
            assert swarm.applied(peers[0])[round_]["group"] == tuple(peers)

    simulate(body, codec=codec, momentum=momentum, rules=replace(RULES, stream=stream), replica=replica)


def test_the_time_of_the_exchange_goes_into_steps() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(125.0)
        for peer in peers:
            rounds = list(swarm.applied(peer).values())[1:]
            assert len(rounds) == 11 and all(one["steps"] == 10 and one["contributed"] for one in rounds)
            # Ten steps of 0.95 s in rounds of 10 s; the first ones begin a little sooner.
            assert all(one["utilization"] == pytest.approx(0.95) for one in rounds[2:])
            assert all(sum(one["seconds"].values()) == pytest.approx(10.0) for one in rounds[2:])
            assert all(one["seconds"]["wait"] == 0 for one in rounds)
            assert all(one["beside"]["wait"] > 0 for one in rounds)

    simulate(body)


def test_whoever_trains_alone_just_goes_on() -> None:
    async def body(swarm: Swarm) -> None:
        peer = swarm.start(0)
        await swarm.until(75.0)
        alone, steps = Pulling(0, 1.0), 0
        for round_, report in swarm.applied(peer).items():
            steps += report["steps"]
            alone.load(LAYOUT.zeros())
            alone.train(iter(()), steps, 0, lambda seconds: True)
            assert np.abs(swarm.states[peer][round_ + 1].theta - alone.theta).max() < 1e-5
        assert steps == 6 + 6 * 10

    simulate(body, codec="none")


def test_the_mean_of_all_targets_is_approached() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(305.0)
        wanted = np.mean([swarm.trainers[p].target for p in peers], axis=0)
        assert np.abs(swarm.states[peers[0]][29].theta - wanted).mean() < 0.05 * np.abs(wanted).mean()

    simulate(body, codec="none")


def test_who_has_time_to_spare_begins_with_the_state_itself() -> None:
    """So quick peers, who could wait all the same, lose nothing to staleness: their states are the blocking ones."""
    states: dict[type, list[str]] = {}
    for kind in (GossipReplica, OverlappedReplica):

        async def body(swarm: Swarm, kind: type = kind) -> None:
            peers = [swarm.start(i) for i in range(3)]
            await swarm.until(65.0)
            states[kind] = [swarm.applied(peers[0])[round_]["digest"] for round_ in range(5)]

        simulate(body, replica=kind, step_seconds=0.3)
    assert states[GossipReplica] == states[OverlappedReplica]


@pytest.mark.parametrize("moment", [53.0, 57.0, 59.9, 45.2, 47.0])
def test_a_crash_costs_the_others_at_most_that_round_and_who_returns_agrees(moment: float) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(moment)
        swarm.crash(peers[3])
        await swarm.until(85.0)
        swarm.start(3)
        await swarm.until(145.0)
        for peer in peers[:3]:
            assert sorted(swarm.applied(peer)) == list(range(14))
        for round_ in (*range(4), *range(6, 14)):
            assert len(swarm.digests(round_)) == 1, round_
        assert swarm.applied(peers[0])[6]["group"] == tuple(peers[:3])
        assert swarm.applied(peers[0])[12]["group"] == tuple(peers)

    simulate(body)


def test_a_late_member_agrees_from_its_first_round() -> None:
    async def body(swarm: Swarm) -> None:
        for i in range(3):
            swarm.start(i)
        await swarm.until(52.0)
        late = swarm.start(9)
        await swarm.until(125.0)
        mine = swarm.applied(late)
        assert min(mine) <= 6 and "swarm.state.loaded" in swarm.names(late)
        assert all(len(swarm.digests(round_)) == 1 for round_ in mine)
        assert mine[max(mine)]["contributed"]

    simulate(body)


@pytest.mark.parametrize("moment", [41.0, 45.7, 47.5, 49.0])
def test_whoever_finishes_leaves_when_its_last_contribution_has_counted(moment: float) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(moment)
        swarm.replicas[peers[1]].finish()
        await swarm.until(75.0)
        assert swarm.tasks[peers[1]].done()
        last = max(swarm.applied(peers[1]))
        assert last == (4 if moment < 46 else 5)
        for other in (peers[0], peers[2]):
            assert peers[1] in swarm.applied(other)[last]["group"]
            assert peers[1] not in swarm.applied(other)[last + 1]["group"]

    simulate(body)


@pytest.mark.parametrize("moment", [41.0, 46.5, 47.5, 49.0])
def test_whoever_stops_leaves_nothing_under_way(moment: float) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(moment)
        swarm.replicas[peers[1]].stop()
        await swarm.until(moment + 11.0)  # a simulated thread cannot be told to stop in the middle of its steps
        assert swarm.tasks[peers[1]].done()
        await swarm.until(95.0)
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(8))

    simulate(body)


def test_who_missed_a_blob_is_identical_again_a_round_later() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(45.0)
        for other in peers[:3]:
            swarm.world.of(other).hides_from = {peers[3]}
        await swarm.until(52.0)
        for other in peers[:3]:
            swarm.world.of(other).hides_from = set()
        await swarm.until(105.0)
        assert len(swarm.digests(4)) == 2
        assert not swarm.applied(peers[0])[5]["agree"]
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(5, 9))

    simulate(body)


@pytest.mark.parametrize("codec", ["none", "sparse"])
@pytest.mark.parametrize("stream", [1, 3])
def test_whose_training_diverges_sits_out_and_comes_back(codec: str, stream: int) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(37.0)
        trainer = swarm.trainers[peers[1]]
        trainer.rate = np.float32(np.nan)
        await swarm.until(47.0)
        trainer.rate = np.float32(0.05)
        await swarm.until(125.0)
        skipped = [e for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"]
        assert skipped and {e["reason"] for e in skipped} == {"diverged"}
        assert peers[1] not in swarm.applied(peers[0])[4]["group"]
        assert peers[1] in swarm.applied(peers[0])[8]["group"]
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(11))
        assert all(np.isfinite(swarm.states[peers[1]][round_].theta).all() for round_ in range(11))

    simulate(body, codec=codec, rules=replace(RULES, stream=stream))


def test_what_cannot_be_encoded_is_forgotten_with_what_was_trained_from_it() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(37.0)
        trainer = swarm.trainers[peers[1]]
        trainer.target = trainer.target + np.float32(1e30)  # finite, but beyond what a contribution may hold
        await swarm.until(47.0)
        trainer.target = np.random.default_rng(1).standard_normal(LAYOUT.size).astype(np.float32)
        await swarm.until(105.0)
        skipped = [e["round"] for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"]
        assert skipped == [4, 5]
        assert np.abs(swarm.states[peers[0]][9].theta).max() < 10

    simulate(body)


def test_what_was_not_published_stays_in_the_error_feedback() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(2)]
        await swarm.until(43.0)
        swarm.world.of(peers[1]).cannot_publish = True
        await swarm.until(50.0)
        residual = swarm.replicas[peers[1]].residual
        assert residual is not None and float(np.abs(residual).sum()) > 0
        assert [e["reason"] for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"] == ["not_stored"]
        assert peers[1] not in swarm.applied(peers[0])[4]["group"]
        assert len(swarm.digests(4)) == 1

    simulate(body, codec="sparse")


@pytest.mark.parametrize("rounds", [2, 12])
def test_who_was_frozen_comes_back_to_the_same_bits(rounds: int) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(41.0)
        swarm.trainers[peers[2]].pace._owed += 10.0 * rounds  # its next work takes so much longer
        end = 41.0 + 10 * (rounds + 6)
        await swarm.until(end)
        assert {"swarm.round.replayed", "swarm.state.loaded"} & set(swarm.names(peers[2]))
        last = int(end // 10) - 1
        for round_ in range(last - 2, last):
            assert len(swarm.digests(round_)) == 1, round_

    simulate(body)


WAYS = pytest.mark.parametrize(
    ("replica", "codec", "sliced"),
    [
        (GossipReplica, "int8", False),
        (GossipReplica, "int8", True),
        (GossipReplica, "sparse", False),
        (OverlappedReplica, "int8", False),
        (OverlappedReplica, "sparse", False),
    ],
)


@WAYS
@pytest.mark.parametrize("late", [3.0, 6.0, 9.0, 12.0, 17.0, 24.0])
def test_who_trains_beyond_a_rounds_end_loads_no_state(
    replica: type[GossipReplica], codec: str, sliced: bool, late: float
) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(41.0)
        swarm.trainers[peers[2]].pace._owed += late
        await swarm.until(119.0)
        assert "swarm.state.loaded" not in swarm.names(peers[2]), swarm.names(peers[2])
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(11))
        assert all(peers[2] in swarm.applied(peers[0])[round_]["group"] for round_ in range(8, 11))
        assert all(swarm.applied(peers[2])[r]["group"] for r in swarm.applied(peers[2]))

    simulate(body, codec=codec, replica=replica, rules=replace(RULES, sliced=sliced))


@WAYS
@pytest.mark.parametrize("asleep", [5.0, 12.0, 23.0])
@pytest.mark.parametrize("served", [False, True])
def test_who_sleeps_from_its_commit_on_loads_no_state(
    replica: type[GossipReplica], codec: str, sliced: bool, asleep: float, served: bool
) -> None:
    """`served`: it falls asleep when the others have its contribution already."""

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(41.0)
        one, faults = swarm.replicas[peers[2]], swarm.world.of(peers[2])
        what: Any = one._puller if served else one
        name = "pull" if served else "_sleep_until"
        awake = getattr(what, name)

        async def sleep(*args: Any, **settings: Any) -> Any:
            if served or "commit deadline" in args[1]:
                setattr(what, name, awake)
                faults.hides_from = set() if served else set(peers[:2])
                await asyncio.sleep(asleep)
                faults.hides_from = set()
            return await awake(*args, **settings)

        setattr(what, name, sleep)
        await swarm.until(119.0)
        assert "swarm.state.loaded" not in swarm.names(peers[2]), swarm.names(peers[2])
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(11))
        assert all(peers[2] in swarm.applied(peers[0])[round_]["group"] for round_ in range(8, 11))

    simulate(body, codec=codec, replica=replica, rules=replace(RULES, sliced=sliced))


# ---- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replica", [GossipReplica, OverlappedReplica])
def test_a_round_moves_only_its_part(replica: type[GossipReplica]) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(95.0)
        parts = swarm.replicas[peers[0]].parts
        assert len(parts) == 3
        for round_ in range(8):
            before, after = (swarm.states[peers[0]][number].theta for number in (round_, round_ + 1))
            moved = np.flatnonzero(before != after)
            part = parts[round_ % 3].range
            assert len(moved) and part.start <= moved.min() and moved.max() < part.stop
            largest = max(one.layout.size for one in parts)
            assert swarm.applied(peers[0])[round_]["contribution_bytes"] < 4 * largest + 300

    simulate(body, codec="none", rules=replace(RULES, stream=3), replica=replica)


def test_what_is_not_exchanged_yet_is_trained_on() -> None:
    """Alone, a part that is exchanged every third round comes out as far as one that is exchanged in each."""

    async def body(swarm: Swarm) -> None:
        peer = swarm.start(0)
        await swarm.until(95.0)
        steps = [report["steps"] for report in swarm.applied(peer).values()]
        for round_ in range(2, len(steps)):
            alone = Pulling(0, 1.0)
            alone.train(iter(()), sum(steps[: round_ + 1]), 0, lambda seconds: True)
            part = swarm.replicas[peer].parts[round_ % 3].range
            assert np.abs(swarm.states[peer][round_ + 1].theta[part] - alone.theta[part]).max() < 1e-5

    simulate(body, codec="none", rules=replace(RULES, stream=3))
