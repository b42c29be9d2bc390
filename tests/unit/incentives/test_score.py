"""Ratings, standings and scores: what a peer's rounds come to."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.incentives.entries import Standing
from potluck.incentives.rating import Rating, rate
from potluck.incentives.score import (
    FALSE_ALARM,
    FALSE_PASS,
    FORGOTTEN,
    PLACES,
    Observation,
    advance,
    computation_evidence,
    fits_well,
    likelihood_ratio,
    remembered,
    score,
    shares,
)
from potluck.net.host import PeerId

GOOD = Observation(alignment=0.01, relative=1.0, place=1, among=8, in_sync=True)


def live(rounds: list[Observation], standing: Standing | None = None, first: int = 0) -> Standing:
    standing = standing or Standing()
    for round_, seen in enumerate(rounds, first):
        standing = advance(standing, seen, round_, Rating(standing.mu, standing.sigma))
    return standing


# ---- ratings ------------------------------------------------------------------------------------------------


def test_who_does_better_every_time_is_rated_higher() -> None:
    peers = [PeerId(name) for name in "abcdefgh"]
    dice, ratings = np.random.default_rng(0), {}
    for _ in range(20):
        ratings |= rate(ratings, {p: n + dice.normal() for n, p in enumerate(peers)})
    mus = [ratings[p].mu for p in peers]
    assert mus == sorted(mus) and ratings[peers[-1]].sigma < Rating().sigma
    assert ratings[peers[-1]].ordinal > 0 > ratings[peers[0]].ordinal


def test_one_alone_is_not_rated() -> None:
    assert rate({}, {PeerId("a"): 1.0}) == {PeerId("a"): Rating()}
    assert rate({}, {}) == {}


def test_the_order_in_which_peers_are_named_changes_nothing() -> None:
    results = {PeerId("a"): 1.0, PeerId("b"): 0.5, PeerId("c"): 0.1}
    assert rate({}, results) == rate({}, dict(reversed(results.items())))


# ---- the test of computation --------------------------------------------------------------------------------


@given(among=st.integers(2, 500))
def test_places_of_one_who_trained_are_a_distribution(among: int) -> None:
    ratios = [likelihood_ratio(place, among) for place in range(1, among + 1)]
    assert math.fsum(ratios) / among == pytest.approx(1.0)
    assert ratios == sorted(ratios, reverse=True) or among > 12  # of many, the first place alone is rare
    assert ratios[0] > 1 > ratios[-1]


def decided(dice: np.random.Generator, among: int, trained: bool) -> int:
    evidence, verdict = 0.0, 0
    ends = (1, max(1, among // 4), max(1, among // 2), among)
    while verdict == 0:
        if trained:
            kind = dice.choice(4, p=PLACES)
            begin = (0, *ends)[kind]
            place = int(dice.integers(min(begin, ends[kind] - 1), ends[kind])) + 1
        else:
            place = int(dice.integers(among)) + 1
        evidence, verdict = computation_evidence(evidence, verdict, place, among)
    return verdict


@pytest.mark.parametrize("among", [4, 8, 20])
def test_the_rates_of_error_are_those_that_are_stated(among: int) -> None:
    """Wald's bounds, with twice the stated rate and three sigma of room."""
    dice, tries = np.random.default_rng(among), 4000
    passed = sum(decided(dice, among, trained=False) > 0 for _ in range(tries)) / tries
    failed = sum(decided(dice, among, trained=True) < 0 for _ in range(tries)) / tries
    for seen, stated in ((passed, FALSE_PASS), (failed, FALSE_ALARM)):
        assert seen <= 2 * stated + 3 * math.sqrt(stated / tries)


def test_who_stops_training_after_passing_is_found() -> None:
    passed = live([GOOD] * 10)
    assert passed.verdict == 1 and score(passed).factors == {}
    lazy = replace(GOOD, place=8)
    rounds = next(n for n in range(30) if live([lazy] * n, passed, 10).verdict == -1)
    assert rounds <= 7
    assert score(live([lazy] * rounds, passed, 10)).score == 0
    assert live([GOOD] * 10, live([lazy] * rounds, passed, 10)).verdict == 1, "nobody is found for ever"


def test_one_bad_look_is_bad_luck() -> None:
    passed = live([GOOD] * 10)
    assert score(advance(passed, replace(GOOD, place=8), 10, Rating())).factors == {}


@pytest.mark.parametrize(("place", "among", "well"), [(1, 2, True), (2, 2, False), (2, 8, True), (3, 8, False)])
def test_fitting_well_is_the_first_quarter(place: int, among: int, well: bool) -> None:
    assert fits_well(place, among) is well
    assert not fits_well(None, among)


# ---- scores -------------------------------------------------------------------------------------------------


def test_a_newcomer_reaches_its_fair_share_within_ten_rounds() -> None:
    old, new = live([GOOD] * 100), live([GOOD] * 10)
    assert score(new).score >= 0.95 * score(old).score
    assert score(live([GOOD])).score < 0.15 * score(old).score


def test_usefulness_is_the_mean_of_the_first_ten_rounds_and_then_moves_by_a_tenth() -> None:
    rounds = [replace(GOOD, relative=float(value)) for value in np.random.default_rng(0).uniform(0.5, 1.5, 10)]
    ten = live(rounds)
    assert ten.usefulness == pytest.approx(np.mean([one.relative for one in rounds]))
    later = advance(ten, replace(GOOD, relative=2.0), 10, Rating())
    assert later.usefulness == pytest.approx(0.9 * ten.usefulness + 0.1 * 2.0)


def test_what_is_refused_was_worth_nothing() -> None:
    good, refused = live([GOOD] * 20), Observation(refused=True)
    assert advance(good, refused, 20, Rating()).usefulness == pytest.approx(0.7)
    assert live([refused] * 5).usefulness == 0.0 and live([refused] * 5).seen == 5
    assert live([refused] * 5, good, 20).missed == 0, "it came"


def test_who_turns_useless_or_harmful_has_a_tenth_of_its_weight_after_four_rounds() -> None:
    for turned in (replace(GOOD, relative=0.0), replace(GOOD, relative=-1.0, alignment=-0.01)):
        after = score(live([turned] * 4, live([GOOD] * 20), 20)).score
        assert after**2 < 0.1


@pytest.mark.parametrize("shards", [1, 4])
def test_who_was_not_seen_for_long_is_forgotten_in_whatever_group_it_was(shards: int) -> None:
    standing = live([GOOD])
    assert remembered(standing, 2 * FORGOTTEN * shards - 1, shards)
    assert not remembered(standing, 2 * FORGOTTEN * shards, shards)
    assert not remembered(replace_missed(standing, FORGOTTEN), 1, shards)


def replace_missed(standing: Standing, missed: int) -> Standing:
    return msgspec.structs.replace(standing, missed=missed)


def test_an_ex_top_peer_that_left_decays_within_ten_rounds() -> None:
    top = live([replace(GOOD, relative=2.0)] * 50)
    gone = live([Observation(away=True)] * 10, top, 50)
    both = shares({PeerId("gone"): score(gone).score, PeerId("here"): score(live([GOOD] * 50)).score})
    assert both[PeerId("gone")] < 0.02


def test_who_comes_back_has_lost_nothing_but_the_rounds() -> None:
    before = live([GOOD] * 30)
    back = live([Observation(away=True)] * 3 + [GOOD], before, 30)
    assert score(back).score == pytest.approx(score(before).score, rel=0.01)


def test_an_outage_of_the_network_costs_no_score() -> None:
    before = live([GOOD] * 30)
    assert score(live([Observation()] * 5, before, 30)).score == score(before).score


def test_one_round_out_of_sync_is_a_bad_link_and_two_are_not() -> None:
    before, out = live([GOOD] * 30), replace(GOOD, in_sync=False)
    assert "sync" not in score(live([out], before, 30)).factors
    assert score(live([out, out], before, 30)).score == 0
    assert score(live([out, out, GOOD], before, 30)).score > 0


def test_more_than_four_harmful_rounds_of_eight_are_no_bad_luck() -> None:
    bad = replace(GOOD, alignment=-0.01, relative=0.5)
    assert "harmful" not in score(live([GOOD] * 8 + [bad] * 4)).factors
    assert score(live([GOOD] * 8 + [bad] * 5)).factors["harmful"] == 0.25


@given(st.dictionaries(st.text(min_size=1, max_size=4).map(PeerId), st.floats(0, 100), max_size=20))
def test_shares_add_up_to_one_or_to_nothing(scores: dict[PeerId, float]) -> None:
    total = math.fsum(shares(scores).values())
    assert total == pytest.approx(1.0) or (total == 0 and sum(v * v for v in scores.values()) == 0)


def test_splitting_one_machine_into_ten_identities_earns_less_than_one() -> None:
    """A tenth of the steps goes more than a tenth of the way, but is weighted by a tenth of the tokens."""
    one = score(live([GOOD] * 30)).score
    tenth = score(live([replace(GOOD, relative=0.1 * 0.3)] * 30)).score
    parts = shares({PeerId("honest"): one, PeerId("one"): one, **{PeerId(f"sybil {n}"): tenth for n in range(10)}})
    assert sum(share for peer, share in parts.items() if peer.startswith("sybil")) < 0.1 * parts[PeerId("one")]
