"""Weights in force: the same for all who read the same, capped for newcomers, fading without validators."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.records import Signed, Weights
from potluck.errors import NetworkError
from potluck.incentives.steering import (
    LAG_ROUNDS,
    NEWCOMERS,
    Steering,
    consensus,
    member_weights,
    opinions_of,
)
from potluck.net.host import PeerId
from potluck.sim.loop import VirtualLoop
from potluck.sim.peer import identity_of
from potluck.swarm.phases import Round, RoundClock

PEERS = [identity_of(5, n).peer_id for n in range(40)]
FADE = 6
CLOCK = RoundClock(genesis=1000.0, seconds=10.0, exchange_seconds=3.0)


def weights(
    made: int, shares: dict[PeerId, float], validator: PeerId = PEERS[-1], at: float | None = None
) -> Signed[Weights]:
    when = CLOCK.window(Round(made)).end + 2.0 if at is None else at
    record = Weights(module="m", round=made, made_at=when, weights={str(p): w for p, w in shares.items()})
    return Signed(record, validator, when + 1000)


class Shelf:
    def __init__(self) -> None:
        self.records: dict[int, list[Signed[Weights]]] = {}
        self.reads = 0
        self.broken, self.complete = False, True

    def add(self, one: Signed[Weights]) -> None:
        self.records.setdefault(one.record.round, []).append(one)

    async def weights(self, module: str, round_: Round, timeout_seconds: float) -> tuple[list[Signed[Weights]], bool]:
        self.reads += 1
        if self.broken:
            raise NetworkError("nobody answers")
        return self.records.get(round_, []), self.complete


def tokens(count: int) -> dict[PeerId, int]:
    return dict.fromkeys(PEERS[:count], 100)


def steering(shelf: Shelf, stake: dict[PeerId, float] | None = None) -> tuple[Steering, list[str]]:
    said: list[str] = []
    return Steering(shelf, "m", stake or {PEERS[-1]: 1.0}, CLOCK, FADE, lambda name, **_: said.append(name)), said


def test_weights_are_in_force_two_rounds_later() -> None:
    shelf = Shelf()
    shelf.add(weights(3, {PEERS[0]: 0.8, PEERS[1]: 0.2}))
    steer, said = steering(shelf)
    for round_ in (4, 5):
        asyncio.run(steer.read(Round(round_), 1.0))
        found = steer.weights(Round(round_), tokens(2))
        assert (found is None) == (round_ < 3 + LAG_ROUNDS)
    assert found and found[PEERS[0]] == pytest.approx(2 * found[PEERS[1]]) and not said
    assert math.fsum(found.values()) == pytest.approx(1.0)


def test_what_came_late_counts_for_nobody_whenever_it_is_read() -> None:
    shelf = Shelf()
    shelf.add(weights(2, {PEERS[0]: 1.0}))
    shelf.add(weights(3, {PEERS[1]: 1.0}, at=CLOCK.window(Round(5)).start + 0.1))
    early, late = steering(shelf)[0], steering(shelf)[0]
    for round_ in range(4, 8):
        asyncio.run(early.read(Round(round_), 1.0))
    asyncio.run(late.read(Round(7), 1.0))
    assert early.weights(Round(7), tokens(2)) == late.weights(Round(7), tokens(2))


def test_strangers_have_no_say() -> None:
    shelf = Shelf()
    shelf.add(weights(3, {PEERS[0]: 1.0}, validator=PEERS[7]))
    steer, _ = steering(shelf)
    asyncio.run(steer.read(Round(5), 1.0))
    assert steer.weights(Round(5), tokens(3)) is None


def test_a_round_that_was_read_is_not_read_again() -> None:
    shelf = Shelf()
    for made in range(10):
        shelf.add(weights(made, {PEERS[0]: 1.0}))
    steer, _ = steering(shelf)
    for round_ in range(6, 10):
        asyncio.run(steer.read(Round(round_), 1.0))
        asyncio.run(steer.read(Round(round_), 1.0))
    assert shelf.reads == 4


def test_weights_fade_to_equal_ones_when_validators_fall_silent_and_it_is_said() -> None:
    shelf = Shelf()
    shelf.add(weights(3, {PEERS[0]: 0.9, PEERS[1]: 0.1, PEERS[2]: 0.0}))
    steer, said = steering(shelf)
    spread = []
    for round_ in range(5, 5 + FADE + 1):
        asyncio.run(steer.read(Round(round_), 1.0))
        found = steer.weights(Round(round_), tokens(3))
        spread.append(1.0 if found is None else min(found.values()) / max(found.values()))
    assert spread == sorted(spread) and spread[0] == 0 and spread[-1] == 1.0
    assert said == ["swarm.weights.stale"] * FADE


def test_a_failed_read_leaves_what_is_known() -> None:
    shelf = Shelf()
    shelf.add(weights(3, {PEERS[0]: 0.9, PEERS[1]: 0.1}))
    steer, _ = steering(shelf)
    asyncio.run(steer.read(Round(5), 1.0))
    shelf.broken = True
    asyncio.run(steer.read(Round(6), 1.0))
    assert steer.weights(Round(6), tokens(2)) is not None


def test_reading_ends_by_its_deadline_however_long_the_directory_takes() -> None:
    """Seed 93: each of the older rounds was given the whole time, one after the other."""
    shelf = Shelf()

    async def slow(module: str, round_: Round, timeout_seconds: float) -> tuple[list[Signed[Weights]], bool]:
        await asyncio.sleep(timeout_seconds)
        return [], False

    shelf.weights = slow  # type: ignore[method-assign]
    steer, _ = steering(shelf)

    async def took() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await steer.read(Round(9), 5.0)
        return loop.time() - began

    loop = VirtualLoop()
    try:
        assert loop.run_until_complete(took()) == pytest.approx(5.0)
    finally:
        loop.close()


# ---- pure ---------------------------------------------------------------------------------------------------

shares_of_peers = st.dictionaries(st.sampled_from(PEERS[:20]), st.floats(0, 1), max_size=20)


members_of_a_round = st.dictionaries(st.sampled_from(PEERS[:30]), st.integers(1, 2**40), min_size=1)


@given(shares_of_peers, members_of_a_round, st.floats(0, 1))
def test_members_without_a_score_are_capped_and_so_are_all_of_them(
    incentive: dict[PeerId, float], members: dict[PeerId, int], faded: float
) -> None:
    """Whatever tokens they claim."""
    found = member_weights(incentive, members, faded)
    if found is None:
        assert faded >= 1 or not any(incentive.get(p, 0) > 0 for p in members)
        return
    assert found.keys() == members.keys() and all(math.isfinite(w) and w >= 0 for w in found.values())
    assert math.fsum(found.values()) == pytest.approx(1.0)
    if faded == 0:
        assert math.fsum(found[p] for p in members if p not in incentive) <= NEWCOMERS + 1e-9
        assert all(found[p] == 0 for p in members if incentive.get(p) == 0)


def test_tokens_are_believed_up_to_twice_those_of_peers_with_a_score() -> None:
    members = {PEERS[0]: 100, PEERS[1]: 100, PEERS[2]: 10**9, PEERS[3]: 10**9, PEERS[4]: 10**9}
    found = member_weights({PEERS[0]: 0.3, PEERS[1]: 0.3, PEERS[2]: 0.3}, members)
    assert found and found[PEERS[2]] == pytest.approx(2 * found[PEERS[0]])


def test_what_was_read_in_part_is_read_again() -> None:
    shelf = Shelf()
    shelf.add(weights(3, {PEERS[0]: 0.9, PEERS[1]: 0.1}))
    shelf.complete = False
    steer, _ = steering(shelf, {PEERS[-1]: 1.0, PEERS[-2]: 5.0})
    asyncio.run(steer.read(Round(5), 1.0))
    first = steer.weights(Round(5), tokens(2))
    shelf.add(weights(3, {PEERS[0]: 0.1, PEERS[1]: 0.9}, validator=PEERS[-2]))
    shelf.complete = True
    asyncio.run(steer.read(Round(5), 1.0))
    assert steer.weights(Round(5), tokens(2)) != first


@given(shares_of_peers, shares_of_peers)
def test_consensus_is_a_distribution(one: dict[PeerId, float], other: dict[PeerId, float]) -> None:
    stake = {PEERS[30]: 1.0, PEERS[31]: 2.0}
    incentive, dividends, bonds = consensus({PEERS[30]: one, PEERS[31]: other}, stake)
    for part in (incentive, dividends):
        assert math.fsum(part.values()) == pytest.approx(1.0) or not any(part.values())
    assert consensus({PEERS[31]: other, PEERS[30]: one}, stake)[0] == incentive
    assert bonds.keys() <= stake.keys()


def test_a_validator_that_also_trains_has_no_say_about_itself() -> None:
    incentive, _, _ = consensus({PEERS[30]: {PEERS[30]: 1.0, PEERS[1]: 0.5}}, {PEERS[30]: 1.0})
    assert incentive == {PEERS[1]: 1.0}


def test_opinions_are_those_of_trusted_validators_in_time() -> None:
    records = [weights(1, {PEERS[0]: 1.0}, PEERS[30], at=5.0), weights(1, {PEERS[0]: 1.0}, PEERS[31], at=7.0)]
    stake = {PEERS[30]: 1.0, PEERS[31]: 1.0}
    assert opinions_of(records, stake, 6.0).keys() == {PEERS[30]}
    assert opinions_of(records, {PEERS[31]: 0.0}, 9.0) == {}
