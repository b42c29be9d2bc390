"""Stochastic wiring: shares by speed, bans, lateness, and bounded memory."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.net.host import PeerId
from potluck.swarm.wiring import LONGEST_BAN_SECONDS, Wiring

A, B, C = (PeerId(name) for name in "abc")


def wired(*peers: PeerId, expiry: float = 1e9) -> Wiring:
    wiring = Wiring()
    wiring.update(dict.fromkeys(peers, expiry), 0.0)
    return wiring


def drive(wiring: Wiring, seconds: dict[PeerId, float], times: int) -> Counter[PeerId]:
    """Choose and answer at once; how often each was chosen."""
    chosen: Counter[PeerId] = Counter()
    for _ in range(times):
        peer = wiring.choose(1.0, 0.0)
        assert peer is not None
        chosen[peer] += 1
        wiring.succeeded(peer, 1.0, seconds[peer])
    return chosen


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8))
def test_servers_are_chosen_in_proportion_to_their_speed(seconds: list[float]) -> None:
    peers = {PeerId(f"p{i}"): s for i, s in enumerate(seconds)}
    wiring = wired(*peers)
    drive(wiring, peers, 50)  # everyone is measured
    chosen = drive(wiring, peers, 2000)
    rate = sum(1 / s for s in seconds)
    for peer, s in peers.items():
        assert chosen[peer] == pytest.approx(2000 / s / rate, abs=0.05 * 2000 / s / rate + 110)


def test_equal_calls_give_equal_choices_and_equal_servers_take_turns() -> None:
    one, two = wired(A, B, C), wired(A, B, C)
    seconds = {A: 0.1, B: 0.1, C: 0.1}
    chosen = [one.choose(1.0, 0.0) for _ in range(9)]
    assert chosen == [two.choose(1.0, 0.0) for _ in range(9)] == [A, B, C] * 3
    assert drive(one, seconds, 50) == drive(two, seconds, 50)  # everyone is measured
    assert drive(one, seconds, 300) == drive(two, seconds, 300) == {A: 100, B: 100, C: 100}


def test_a_newcomer_is_tried_at_once_and_gets_no_credit_for_its_absence() -> None:
    wiring = wired(A, B)
    seconds = {A: 0.1, B: 0.1, C: 0.1}
    drive(wiring, seconds, 1000)
    wiring.update({C: 1e9}, 0.0)
    assert C in {wiring.choose(1.0, 0.0) for _ in range(2)}
    assert drive(wiring, seconds, 30)[C] <= 11


def test_a_size_counts_as_so_many_samples() -> None:
    wiring = wired(A, B)
    drive(wiring, {A: 0.1, B: 0.1}, 20)
    heavy = wiring.choose(10.0, 0.0)
    following = [wiring.choose(1.0, 0.0) for _ in range(10)]
    assert following.count(heavy) <= 1


def test_the_average_is_that_of_hivemind_corrected_for_its_start() -> None:
    wiring = wired(A)
    average = 0.0
    for count, seconds in enumerate([1.0, 2.0, 0.5, 4.0], start=1):
        wiring.succeeded(A, 2.0, seconds)
        average = 0.1 * seconds / 2.0 + 0.9 * average
        assert wiring.expected_seconds(A, 1.0) == pytest.approx(average / (1 - 0.9**count))


def test_an_unmeasured_server_counts_as_the_average_of_the_stage() -> None:
    wiring = Wiring(initial_samples_per_second=4.0)
    wiring.update({A: 1e9, B: 1e9}, 0.0)
    assert wiring.expected_seconds(B, 1.0) == 0.25
    wiring.succeeded(A, 1.0, 3.0)
    assert wiring.expected_seconds(B, 1.0) == pytest.approx(3.0)


def test_a_late_server_grows_unattractive_but_is_not_banned() -> None:
    wiring = wired(A, B)
    seconds = {A: 0.1, B: 0.1}
    drive(wiring, seconds, 20)
    wiring.late(A, 1.0, 30.0)
    assert wiring.expected_seconds(A, 1.0) > 1.0
    assert drive(wiring, seconds, 100)[B] > 90
    assert wiring.retry_at(0.0) is None


def test_lateness_never_makes_a_server_look_faster() -> None:
    wiring = wired(A)
    wiring.succeeded(A, 1.0, 5.0)
    wiring.late(A, 1.0, 1.0)
    assert wiring.expected_seconds(A, 1.0) == pytest.approx(5.0)


def test_a_failed_server_returns_after_a_backoff_that_doubles_until_it_succeeds() -> None:
    wiring, now, waits = wired(A), 0.0, []
    for _ in range(8):
        assert wiring.choose(1.0, now) == A
        wiring.failed(A, now)
        wiring.failed(A, now)  # two microbatches that fail together are one failure
        assert wiring.choose(1.0, now) is None
        back = wiring.retry_at(now)
        assert back is not None and wiring.choose(1.0, back - 0.01) is None
        waits.append(back - now)
        now = back
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, LONGEST_BAN_SECONDS]
    assert wiring.choose(1.0, now) == A
    wiring.succeeded(A, 1.0, 0.1)
    wiring.failed(A, now)
    assert wiring.retry_at(now) == now + 2.0


def test_an_announcement_made_anew_lifts_the_ban() -> None:
    wiring = wired(A, expiry=100.0)
    wiring.failed(A, 0.0)
    wiring.update({A: 100.0}, 0.5)
    assert wiring.choose(1.0, 0.5) is None
    wiring.update({A: 130.0}, 1.0)
    assert wiring.choose(1.0, 1.0) == A


def test_excluded_servers_are_passed_over_and_keep_their_turn() -> None:
    wiring = wired(A, B)
    assert wiring.choose(1.0, 0.0, exclude={A}) == B
    assert wiring.choose(1.0, 0.0) == A
    assert wiring.choose(1.0, 0.0, exclude={A, B}) is None
    assert {wiring.choose(1.0, 0.0) for _ in range(2)} == {A, B}


def test_an_expired_announcement_leaves_and_a_shorter_one_is_not_believed() -> None:
    wiring = wired(A, B, expiry=10.0)
    wiring.update({A: 20.0}, 1.0)
    wiring.update({A: 5.0}, 2.0)
    assert wiring.choose(1.0, 11.0) == A == wiring.choose(1.0, 12.0)
    assert wiring.choose(1.0, 20.0) is None and len(wiring) == 0
    assert wiring.retry_at(20.0) is None


def test_a_ban_that_outlives_the_announcement_is_nothing_to_wait_for() -> None:
    wiring = wired(A, expiry=1.5)
    wiring.failed(A, 0.0)
    assert wiring.retry_at(0.0) is None


def test_memory_is_bounded_by_the_living() -> None:
    wiring = Wiring()
    for t in range(2000):
        peer = PeerId(f"p{t}")
        wiring.update({peer: t + 10.0}, float(t))
        if t % 3 == 0:
            wiring.failed(peer, float(t))
        wiring.choose(1.0, float(t))
        wiring.succeeded(PeerId(f"p{t - 100}"), 1.0, 0.1)  # left long ago
    assert len(wiring) <= 10 and len(wiring._heap) <= 10


calls = st.lists(st.tuples(st.sampled_from(["update", "failed", "succeeded", "late", "choose"]), st.integers(0, 4)))


@given(calls)
def test_whatever_happens_each_available_server_is_in_the_heap_once(calls: list[tuple[str, int]]) -> None:
    wiring = Wiring()
    for now, (call, which) in enumerate(calls):
        peer = PeerId(f"p{which}")
        match call:
            case "update":
                wiring.update({peer: now + 7.0}, now)
            case "failed":
                wiring.failed(peer, now)
            case "choose":
                wiring.choose(1.0, now, exclude={peer})
            case _:
                getattr(wiring, call)(peer, 1.0, 0.5)
        listed = sorted(entry[2] for entry in wiring._heap)
        assert listed == sorted(p for p, server in wiring._servers.items() if server.banned_until is None)
