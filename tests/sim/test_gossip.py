"""Gossip rounds under virtual time: several real replicas, a fake network, staged faults, exact outcomes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import looptime
import numpy as np
import pytest
import torch

from potluck.net.host import PeerId
from potluck.swarm.codecs import CODEC_NAMES
from potluck.swarm.follower import Follower, RoundRules
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.rounds import GossipReplica
from potluck.swarm.state import ReplicaState

sys.path.insert(0, str(Path(__file__).parent))

from virtual_swarm import MODULE, VirtualSwarm

from fake_exchange import FakeExchange

LAYOUT = Layout.of([("bias", (7,)), ("weight", (40, 16))])
RULES = RoundRules(
    clock=RoundClock(genesis=0.0, seconds=10.0, exchange_seconds=2.0),
    steps=5,
    step_tokens=0,
    group_size=16,
    retain=6,
    fragments=4,
    sync_limit=3.0,
    clip=True,
)


class Quadratic:
    """Stands in for LocalTrainer: each peer pulls the parameters towards a target of its own."""

    def __init__(self, seed: int, step_seconds: float = 0.5) -> None:
        self.layout = LAYOUT
        self.target = np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32)
        self.theta: Flat = LAYOUT.zeros()
        self.rate = np.float32(0.1)

    def load(self, theta: Flat) -> None:
        self.theta = theta.copy()

    def train(
        self, batches: Iterator[torch.Tensor], max_steps: int, first_step: int, may_start: Callable[[float], bool]
    ) -> LocalResult:
        steps = 0
        while steps < max_steps and may_start(0.0):
            self.theta += self.rate * (self.target - self.theta)
            steps += 1
        return LocalResult(steps, 100 * steps, 1.0, 0.5, 0.0)

    def forget(self) -> None:
        pass

    def delta(self, theta: Flat) -> Flat:
        return theta - self.theta

    def evaluate(self, tokens: torch.Tensor) -> float:
        return float(np.mean((self.theta - self.target) ** 2))


class Swarm(VirtualSwarm):
    layout = LAYOUT

    def __init__(self, rules: RoundRules = RULES, codec: str = "int8", momentum: float = 0.0) -> None:
        super().__init__(rules, codec, momentum)
        self.followers: dict[PeerId, Follower] = {}
        self.frozen: set[PeerId] = set()
        self.draw: Callable[[int], int] = lambda n: 0

    def start(self, number: int, keeper: bool = False, state: ReplicaState | None = None) -> PeerId:
        peer = PeerId(f"peer-{number:02d}")
        following = self.following(peer, bytes([number]) * 16)
        following["draw"] = self.draw
        if keeper:
            follower = self.followers[peer] = Follower(LAYOUT, **following)
            self.tasks[peer] = asyncio.create_task(follower.follow(self.theta_0()))
        else:
            replica = self.followers[peer] = self.replicas[peer] = GossipReplica(
                trainer=Quadratic(number),
                batches=lambda round_: iter(()),
                held_out=torch.zeros(1, 2, dtype=torch.int64),
                **following,
            )
            self.tasks[peer] = asyncio.create_task(replica.run(state or self.theta_0()))
        return peer

    def thetas(self) -> list[Flat]:
        return [r.state.theta for p, r in self.replicas.items() if r.state and not self.world.of(p).down]

    async def end(self) -> None:
        for follower in self.followers.values():
            follower.stop()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def simulate(body: Callable[[Swarm], Any], **settings: Any) -> None:
    """Run a body in virtual time."""

    async def go() -> None:
        swarm = Swarm(**settings)
        try:
            await body(swarm)
        finally:
            await swarm.end()

    loop = looptime.new_event_loop(end=1e6)
    try:
        loop.run_until_complete(go())
    finally:
        loop.close()


@pytest.mark.parametrize("codec", ["none", "int8", "sparse"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_replicas_of_one_group_are_bit_identical_after_every_round(codec: str, momentum: float) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(100.0)
        for round_ in range(9):
            assert len(swarm.digests(round_)) == 1, round_
            assert swarm.applied(peers[0])[round_]["group"] == tuple(peers)

    simulate(body, codec=codec, momentum=momentum)


def test_the_mean_of_all_targets_is_approached() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(200.0)
        wanted = np.mean([Quadratic(i).target for i in range(4)], axis=0)
        for theta in swarm.thetas():
            assert np.abs(theta - wanted).mean() < 0.25 * np.abs(wanted).mean()
        assert len(peers) == 4

    simulate(body, codec="none")


@pytest.mark.parametrize("moment", [52.0, 57.9, 58.5, 58.9, 59.3, 59.6, 59.95, 60.05])
def test_a_late_joiner_loads_the_groups_state_and_agrees_from_its_first_round(moment: float) -> None:
    async def body(swarm: Swarm) -> None:
        for i in range(3):
            swarm.start(i)
        await swarm.until(moment)
        late = swarm.start(9)
        await swarm.until(100.0)
        mine = swarm.applied(late)
        assert min(mine) <= 6
        assert not any(e["alone"] for e in mine.values())
        assert any(e["event"] == "swarm.state.loaded" for e in swarm.events[late])
        for round_ in mine:
            assert len(swarm.digests(round_)) == 1
        assert mine[max(mine)]["contributed"]

    simulate(body)


@pytest.mark.parametrize("moment", [43.0, 47.9, 48.5, 48.75, 49.2])
def test_a_crash_at_any_moment_costs_the_others_at_most_that_round(moment: float) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(moment)
        swarm.crash(peers[3])
        await swarm.until(100.0)
        for peer in peers[:3]:
            assert sorted(swarm.applied(peer)) == list(range(max(swarm.applied(peer)) + 1))
        for round_ in range(6, 9):
            assert len(swarm.digests(round_)) == 1
            assert swarm.applied(peers[0])[round_]["group"] == tuple(peers[:3])

    simulate(body)


def test_one_that_missed_a_blob_shows_in_the_digests_and_is_identical_again_a_round_later() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(41.0)
        # Peer 3 can fetch peer 0's contribution of round 4 from nobody.
        for other in peers[:3]:
            swarm.world.of(other).hides_from = {peers[3]}
        await swarm.until(51.0)
        for other in peers[:3]:
            swarm.world.of(other).hides_from = set()
        await swarm.until(100.0)
        assert len(swarm.digests(4)) == 2
        assert swarm.applied(peers[3])[4]["missing"]
        assert not swarm.applied(peers[0])[5]["agree"]
        for round_ in range(5, 9):
            assert len(swarm.digests(round_)) == 1, round_

    simulate(body)


def test_the_next_round_tells_who_was_late_from_who_is_gone() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(41.0)
        for other in peers[:3]:
            swarm.world.of(other).hides_from = {peers[3]}
        pull_by = RULES.clock.window(Round(4)).pull_by
        await swarm.until(pull_by - 0.005)
        for other in peers[1:3]:
            swarm.world.of(other).hides_from = set()
        await swarm.until(75.0)
        assert swarm.applied(peers[3])[4]["missing"].keys() == set(peers[:3])
        late = swarm.applied(peers[3])[5]["late"]
        assert late.keys() == set(peers[1:3]) and all(0 < seconds < 1 for seconds in late.values())
        assert swarm.applied(peers[3])[6]["late"].keys() <= {peers[0]}

    simulate(body)


@pytest.mark.parametrize("garbage", [b"", b"x", b"\x00" * 700, b"\xff" * 2000 + b"PLC3"])
def test_garbage_is_left_out_and_named(garbage: bytes) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(4)]
        await swarm.until(31.0)
        swarm.world.of(peers[2]).garbage = garbage
        await swarm.until(60.0)
        mine = swarm.applied(peers[0])[4]
        assert peers[2] not in mine["group"] and peers[2] in mine["missing"]

    simulate(body)


def test_a_commit_stamped_after_the_deadline_counts_for_nobody() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(48.6)
        key = (MODULE, 4, 0)
        signed = swarm.world.commits[key][peers[1]]
        late = replace(signed, record=type(signed.record)(**{**asdict(signed.record), "committed_at": 48.71}))
        swarm.world.commits[key][peers[1]] = late
        await swarm.until(60.0)
        assert swarm.applied(peers[0])[4]["group"] == (peers[0], peers[2])
        assert swarm.applied(peers[2])[4]["group"] == (peers[0], peers[2])

    simulate(body)


def test_who_sees_nobody_says_it_is_alone_and_keeps_its_clock() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(31.0)
        swarm.world.of(peers[0]).blind = True
        for other in peers[1:]:
            swarm.crash(other)
        await swarm.until(100.0)
        rounds = swarm.applied(peers[0])
        assert all(rounds[r]["alone"] for r in range(4, 9))
        assert sorted(rounds) == list(range(max(rounds) + 1))
        alone = [e for e in swarm.events[peers[0]] if e["event"] == "swarm.round.alone"]
        assert alone[-1]["rounds_alone"] >= 5

    simulate(body)


@pytest.mark.parametrize("frozen_rounds", [3, 12])
def test_who_was_frozen_comes_back_to_the_same_bits(frozen_rounds: int) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(33.0)
        replica = swarm.replicas[peers[2]]
        thaw = asyncio.Event()
        real = replica._sleep_until

        async def frozen(when: float, what: str, then: str) -> None:
            await thaw.wait()
            await real(when, what, then)

        replica._sleep_until = frozen  # type: ignore[method-assign]
        await swarm.until(33.0 + 10 * frozen_rounds)
        thaw.set()
        replica._sleep_until = real  # type: ignore[method-assign]
        end = 33.0 + 10 * (frozen_rounds + 6)
        await swarm.until(end)
        names = [e["event"] for e in swarm.events[peers[2]]]
        assert ("swarm.round.replayed" in names) or ("swarm.state.loaded" in names)
        last = int(end // 10) - 1
        for round_ in range(last - 2, last):
            assert len(swarm.digests(round_)) == 1, (round_, names[-30:])

    simulate(body)


def test_a_full_disk_costs_the_rounds_that_it_lasts() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(2)]
        await swarm.until(31.0)
        swarm.world.of(peers[1]).disk_full = True
        await swarm.until(51.0)
        swarm.world.of(peers[1]).disk_full = False
        await swarm.until(81.0)
        skipped = [e for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"]
        assert {event["reason"] for event in skipped} == {"disk_full"}
        assert list(swarm.applied(peers[0])[7]["group"]) == sorted(peers)
        assert len(swarm.digests(7)) == 1

    simulate(body, codec="sparse")


def test_contributions_are_on_disk_before_others_may_have_them() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(2)]
        for round_ in (3, 4):
            await swarm.until(swarm.replicas[peers[0]].rules.clock.window(Round(round_)).read_from)
            (commits,) = [found for key, found in swarm.world.commits.items() if key[1] == round_]
            assert commits.keys() == set(peers)
            assert {signed.record.blob for signed in commits.values()} <= swarm.world.settled

    simulate(body)


def test_a_disk_that_is_full_after_all_when_a_contribution_is_written_costs_no_round() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(2)]
        await swarm.until(31.0)
        settle = FakeExchange.settle

        async def full(exchange: FakeExchange) -> None:
            swarm.world.of(exchange.peer).disk_full = exchange.peer == peers[1]
            try:
                await settle(exchange)
            finally:
                swarm.world.of(exchange.peer).disk_full = False

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeExchange, "settle", full)
            await swarm.until(51.0)
        assert [e for e in swarm.events[peers[1]] if e["event"] == "peer.disk.full"]
        assert not [e for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"]
        assert all(len(swarm.digests(round_)) == 1 for round_ in (3, 4))

    simulate(body)


def test_what_was_not_published_stays_in_the_error_feedback() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(2)]
        await swarm.until(31.0)
        swarm.world.of(peers[1]).cannot_publish = True
        await swarm.until(50.0)
        replica = swarm.replicas[peers[1]]
        assert replica.residual is not None
        skipped = [e for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"]
        assert skipped and skipped[-1]["reason"] == "not_stored"
        # Round 4's whole pseudo-gradient is still there: nothing of it was sent.
        assert float(np.abs(replica.residual).sum()) > 0
        assert peers[1] not in swarm.applied(peers[0])[4]["group"]
        assert len(swarm.digests(4)) == 1

    simulate(body, codec="sparse")


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_peer_whose_training_diverges_sits_out_and_comes_back(codec: str) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(31.0)
        trainer = swarm.replicas[peers[1]].trainer
        trainer.rate = np.float32(np.nan)  # type: ignore[attr-defined]
        await swarm.until(49.9)
        trainer.rate = np.float32(0.1)  # type: ignore[attr-defined]
        await swarm.until(90.0)
        skipped = [e for e in swarm.events[peers[1]] if e["event"] == "swarm.round.skipped"]
        assert skipped and {e["reason"] for e in skipped} == {"diverged"}
        assert peers[1] not in swarm.applied(peers[0])[4]["group"]
        assert peers[1] in swarm.applied(peers[0])[7]["group"]
        assert all(len(swarm.digests(r)) == 1 for r in range(8))

    simulate(body, codec=codec)


def test_when_the_odd_majority_vanishes_training_goes_on_and_can_be_left() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(2)]
        await swarm.until(48.6)
        key = (MODULE, 4, 0)
        signed = swarm.world.commits[key][peers[1]]
        lie = {**asdict(signed.record), "digest": "f" * 64, "history": 2**40}
        swarm.world.commits[key][peers[1]] = replace(signed, record=type(signed.record)(**lie))
        swarm.crash(peers[1])
        await swarm.until(400.0)
        rounds = swarm.applied(peers[0])
        assert max(rounds) >= 36 and rounds[max(rounds)]["alone"]
        assert len(swarm.events[peers[0]]) < 1000
        swarm.replicas[peers[0]].finish()
        await swarm.until(430.0)
        assert swarm.tasks[peers[0]].done()

    simulate(body)


def test_leaving_lets_the_last_contribution_count() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(42.0)
        swarm.replicas[peers[1]].finish()
        await swarm.until(60.0)
        assert swarm.tasks[peers[1]].done()
        assert peers[1] in swarm.applied(peers[0])[4]["group"]
        assert peers[1] not in swarm.applied(peers[0])[5]["group"]

    simulate(body)


def test_with_several_groups_fragments_contract_the_drift() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(8)]
        await swarm.until(200.0)
        assert all(swarm.replicas[p].shards > 1 for p in peers)
        before = drift(swarm)
        assert before > 0.01
        for replica in swarm.replicas.values():
            replica.trainer.rate = np.float32(0.0)  # type: ignore[attr-defined]
        # Updates are zero from here on: only fragments can bring the replicas together.
        await swarm.until(200.0 + 10 * 8 * RULES.fragments)
        assert drift(swarm) < 0.1 * before

    simulate(body, rules=replace(RULES, group_size=3, sync_limit=1e6), codec="none")


def test_a_replica_far_beyond_the_sync_limit_loads_the_groups_state() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(8)]
        await swarm.until(200.0)
        assert not any(e["event"] == "swarm.drift.beyond" for p in peers for e in swarm.events[p])
        lost = swarm.replicas[peers[3]]
        assert lost.state and lost.shards > 1
        lost.state = replace(lost.state, theta=lost.state.theta + np.float32(50.0))
        await swarm.until(300.0)
        events = [e["event"] for e in swarm.events[peers[3]]]
        assert "swarm.drift.beyond" in events and "swarm.state.loaded" in events
        assert np.abs(lost.state.theta).max() < 10
        others = [e for p in peers if p != peers[3] for e in swarm.events[p]]
        assert not any(e["event"] == "swarm.drift.beyond" for e in others)

    simulate(body, rules=replace(RULES, group_size=3, sync_limit=20.0), codec="none")


def test_a_flood_of_commits_leaves_a_bounded_group_that_is_the_same_for_all() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(9)]
        for replica in swarm.replicas.values():
            replica._puller._most = 4
        await swarm.until(45.0)
        for round_ in (1, 2, 3):
            groups = {swarm.applied(p)[round_]["group"] for p in peers}
            assert len(groups) == 1 and len(groups.pop()) == 4
            assert len(swarm.digests(round_)) == 1

    simulate(body)


def drift(swarm: Swarm) -> float:
    return float(np.std(np.stack(swarm.thetas()), axis=0).mean())


def asdict(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_a_commit_whose_blob_nobody_has_does_not_keep_a_laggard_behind() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(25.0)
        swarm.world.of(peers[2]).hides_from = set(peers)  # it commits, but nobody can read it
        late = swarm.start(3)
        swarm.world.of(peers[2]).hides_from.add(late)
        await swarm.until(95.0)
        assert len([r for r, e in swarm.applied(late).items() if e["contributed"]]) >= 3

    simulate(body)


def test_a_joiner_believes_a_round_only_after_its_deadline() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        await swarm.until(41.0)
        odd = swarm.replicas[peers[0]]
        assert odd.state
        # The quickest committer of the round in progress holds another state than all the others.
        odd.state = replace(odd.state, theta=odd.state.theta + np.float32(9.0))
        key = (MODULE, 4, 0)
        assert set(swarm.world.commits.get(key, {}))  # commits of the round in progress are there already
        late = swarm.start(5)
        await swarm.until(75.0)
        loaded = [e for e in swarm.events[late] if e["event"] == "swarm.state.loaded"]
        assert loaded and loaded[0]["round"] == 3

    simulate(body)


@pytest.mark.parametrize("silence", [15.0, 75.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_module_whose_replicas_all_die_comes_back_from_a_keeper(silence: float, momentum: float) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        keeper = swarm.start(8, keeper=True)
        await swarm.until(62.0)
        last = swarm.replicas[peers[0]].state
        kept = swarm.followers[keeper].state
        assert last and kept
        assert kept.round == last.round == 6
        assert kept.digest == last.digest
        for peer in peers:
            swarm.crash(peer)
        await swarm.until(62.0 + silence)
        healer = swarm.start(5)
        await swarm.until(62.0 + silence + 320.0)
        joined = [e for e in swarm.events[healer] if e["event"] == "swarm.join.done"]
        assert joined, [e for e in swarm.events[healer] if "join" in e["event"]]
        after = swarm.replicas[healer].state
        assert after
        assert after.history > last.history  # went on from what was there

    simulate(body, momentum=momentum)


def test_who_has_trained_more_takes_no_older_snapshot() -> None:
    async def body(swarm: Swarm) -> None:
        keeper = swarm.start(8, keeper=True)
        old = ReplicaState(MODULE, LAYOUT, Round(9), LAYOUT.zeros() + 7, None, history=2)
        FakeExchange(swarm.world, keeper).offer_state(old)
        mine = ReplicaState(MODULE, LAYOUT, Round(3), LAYOUT.zeros() + 1, None, history=30)
        await swarm.until(105.0)
        peer = swarm.start(1, state=mine)
        await swarm.until(115.0)
        theta = swarm.replicas[peer].state
        assert theta and theta.history >= 30

    simulate(body)


def test_announcements_from_the_far_future_neither_win_nor_hide_real_ones() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(i) for i in range(3)]
        swarm.start(8, keeper=True)
        await swarm.until(62.0)
        last = swarm.replicas[peers[0]].state
        assert last
        for peer in peers:
            swarm.crash(peer)
        for number in range(30, 40):
            liar = FakeExchange(swarm.world, PeerId(f"peer-{number}"))
            liar.offer_state(ReplicaState(MODULE, LAYOUT, Round(10**6 + number), LAYOUT.zeros(), None, history=10**6))
        await swarm.until(137.0)
        healer = swarm.start(5)
        await swarm.until(300.0)
        after = swarm.replicas[healer].state
        assert after and after.round < 100 and after.history > last.history

    simulate(body)
