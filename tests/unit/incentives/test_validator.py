"""What is paid for a round, to peers and to validators. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from potluck.incentives.entries import Claim, ScoreEntry, Standing
from potluck.incentives.validator import CHECK_ROUNDS, Paid, Terms, credit, payable
from potluck.net.host import PeerId
from potluck.net.identity import peer_id_of
from potluck.swarm.phases import Round

ANNA, BORIS, CARLA, DORA = (PeerId(peer_id_of(bytes([n]) * 32)) for n in range(1, 5))
ME, OTHER, THIRD = (PeerId(peer_id_of(bytes([n]) * 32)) for n in range(5, 8))
TERMS = Terms({ME: 1.0, OTHER: 1.0, THIRD: 1.0}, emission=100.0, validator_emission=9.0)
WEIGHTS = {ANNA: 0.5, BORIS: 0.3, CARLA: 0.2}


def score(peer: PeerId, verdict: int, came: bool = True, refused: str = "", **factors: float) -> ScoreEntry:
    standing = Standing(verdict=verdict)
    return ScoreEntry(module="m", round=1, peer=peer, came=came, refused=refused, standing=standing, factors=factors)


def claim(validator: PeerId, passed: bool) -> Claim:
    return Claim(validator=validator, claimed=1.0, found=1.0 if passed else 2.0, passed=passed)


def test_who_has_shown_little_is_paid_little_of_its_share() -> None:
    scores = [
        score(ANNA, 1, computation=0.5),  # it passed; what speaks against it since then is in its share already
        score(BORIS, 0, computation=0.25),
        score(CARLA, 0),  # nothing to test there
        score(DORA, -1, computation=0.0),
        score(ME, 1, came=False),
        score(OTHER, 1, refused="a copy of another contribution"),
    ]
    peers = payable(scores)
    assert peers == {ANNA: 1.0, BORIS: 0.25, CARLA: 1.0, DORA: 0.0}
    opinions = {one: {**WEIGHTS, DORA: 0.0} for one in TERMS.stake}
    entry, _ = credit("m", Round(1), ME, opinions, peers, TERMS, Paid(), None, [])
    assert entry.paid == pytest.approx({ANNA: 50.0, BORIS: 7.5, CARLA: 20.0})


def test_nobody_is_paid_more_because_another_is_not_known_yet() -> None:
    passed = Standing(verdict=1, usefulness=1.0)
    new = Standing(verdict=0, usefulness=1.0)
    known = ScoreEntry(module="m", round=1, peer=ANNA, came=True, standing=passed, score=1.0)
    unknown = ScoreEntry(
        module="m", round=1, peer=BORIS, came=True, standing=new, score=0.25, factors={"computation": 0.25}
    )
    opinions = {one: {ANNA: 1 / 1.0625, BORIS: 0.0625 / 1.0625} for one in TERMS.stake}
    entry, _ = credit("m", Round(1), ME, opinions, payable([known, unknown]), TERMS, Paid(), None, [])
    assert entry.paid == pytest.approx({ANNA: 50.0, BORIS: 50.0 * 0.0625 * 0.25})


def pay(rounds: Iterable[tuple[int, Claim | None, list[PeerId]]]) -> list[dict[str, float]]:
    """What validators earn: (round, check, who claims to have evaluated), one after another."""
    opinions = {one: WEIGHTS for one in TERMS.stake}
    before, earned = Paid(), []
    for number, one, claimants in rounds:
        entry, before = credit("m", Round(number), ME, opinions, payable([]), TERMS, before, one, claimants)
        earned.append({peer: round(amount, 3) for peer, amount in entry.earned.items()})
    return earned


ALL_OTHERS = [OTHER, THIRD]
ONE, TWO, THREE = {ME: 9.0}, {ME: 4.5, OTHER: 4.5}, {ME: 3.0, OTHER: 3.0, THIRD: 3.0}


def test_a_validator_earns_from_its_first_passed_check_to_a_failed_one_and_then_after_two() -> None:
    passes, fails = claim(OTHER, True), claim(OTHER, False)
    checks = [None, passes, None, claim(THIRD, True), fails, None, passes, passes]
    without = {ME: 4.5, THIRD: 4.5}
    earned = pay((number, one, ALL_OTHERS) for number, one in enumerate(checks))
    assert earned == [ONE, TWO, TWO, THREE, without, without, without, THREE]


def test_who_passed_once_and_then_claims_nothing_earns_nothing() -> None:
    rounds = [(1, claim(OTHER, True), ALL_OTHERS), (2, claim(THIRD, True), ALL_OTHERS), (3, None, [THIRD])]
    assert pay(rounds) == [TWO, THREE, {ME: 4.5, THIRD: 4.5}]


def test_a_check_is_not_good_for_ever() -> None:
    late = CHECK_ROUNDS * 3
    rounds = [(1, claim(OTHER, True), ALL_OTHERS), (1 + late, None, ALL_OTHERS), (2 + late, None, ALL_OTHERS)]
    assert pay(rounds) == [TWO, TWO, ONE]
