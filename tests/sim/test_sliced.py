"""Sliced rounds under virtual time: each member aggregates for all, some lie, some are silent."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import looptime
import msgspec
import numpy as np
import pytest

from potluck.errors import BlobUnavailable
from potluck.net.blobs import BlobRef
from potluck.net.host import PeerId
from potluck.net.pace import SLOW_WINDOW, WINDOW
from potluck.swarm import sliced
from potluck.swarm.codecs import int8, none, segments
from potluck.swarm.codecs.frame import MAX_MAGNITUDE
from potluck.swarm.codecs.none import NoneCodec
from potluck.swarm.phases import Round
from potluck.swarm.slices import Accusation, assign

sys.path.insert(0, str(Path(__file__).parent))

from test_gossip import LAYOUT, RULES, Swarm

import fake_exchange
from fake_exchange import FakeExchange

RAW = replace(RULES, clip=False)
#: Of the tests' layout, 647 values: six segments of `none`, three of `int8`.
SMALL = 512


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (segments, none, int8, sliced):
        monkeypatch.setattr(module, "SEGMENT_BYTES", SMALL)
    monkeypatch.setattr(fake_exchange, "CHUNK_BYTES", SMALL)
    monkeypatch.setattr(sliced, "CHECK_SHARE", 1.0)
    monkeypatch.setattr(NoneCodec, "segment_values", SMALL // 4)


def simulate(body: Callable[[Swarm], Awaitable[None]], **made: Any) -> None:
    async def main() -> None:
        swarm = Swarm(**made)
        dice = random.Random(0)
        swarm.draw = dice.randrange
        try:
            await body(swarm)
        finally:
            for task in swarm.tasks.values():
                task.cancel()
            await asyncio.gather(*swarm.tasks.values(), return_exceptions=True)

    loop = looptime.new_event_loop(start=0)
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def opposite(blob: bytes) -> bytes:
    """What a liar makes of a segment of `none`."""
    return (-np.frombuffer(blob, dtype="<f4")).tobytes()


def ends(codec: str, exchange_sliced: bool, clip: bool) -> tuple[str, np.ndarray, float]:
    """(digest after four rounds of four peers, parameters, chunks that a peer received per round)."""
    found: list[Any] = []

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        await swarm.until(45.0)
        assert all(swarm.applied(peer)[round_]["group"] == tuple(peers) for peer in peers for round_ in range(4))
        (digest,) = swarm.digests(3)
        found.extend([digest, swarm.thetas()[0], sum(swarm.world.received.values()) / 4 / 4])

    simulate(body, rules=replace(RULES, sliced=exchange_sliced, clip=clip), codec=codec)
    return found[0], found[1], found[2]


def test_unclipped_float32_is_the_same_bits_whoever_aggregates() -> None:
    whole, _, _ = ends("none", False, False)
    in_slices, _, received = ends("none", True, False)
    assert in_slices == whole
    # Of six segments: those that others aggregated, three of each of one's own, and three for the check.
    assert received <= 6 * (2 * 3 / 4) + 3


@pytest.mark.parametrize("codec", ["int8", "int4", "none"])
def test_all_hold_one_state_close_to_that_of_whole_rounds(codec: str) -> None:
    _, whole, _ = ends(codec, False, True)
    _, in_slices, _ = ends(codec, True, True)
    assert np.linalg.norm(in_slices - whole) < 0.15 * np.linalg.norm(whole)


@pytest.mark.parametrize("windows", [[4], [1], [4, 1, 3, 2]])
def test_however_many_segments_are_asked_for_at_once_all_come(
    windows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it changes while they come."""
    of_each, most = Counter[tuple[PeerId, PeerId]](), 0
    told_slice, at_once = FakeExchange.told_slice, cycle(windows)

    async def counted(exchange: FakeExchange, peer: PeerId, *rest: Any) -> Any:
        nonlocal most
        pair = exchange.peer, peer
        of_each[pair] += 1
        most = max(most, of_each[pair])
        try:
            return await told_slice(exchange, peer, *rest)
        finally:
            of_each[pair] -= 1

    monkeypatch.setattr(FakeExchange, "told_slice", counted)
    monkeypatch.setattr(FakeExchange, "window", lambda exchange, peer: next(at_once))

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(2)]
        await swarm.until(45.0)
        for round_ in range(4):
            assert len(swarm.digests(round_)) == 1
        said = {event["event"] for peer in peers for event in swarm.events[peer]}
        assert not said & {"swarm.slices.raw", "swarm.slices.failed", "swarm.slices.late"}

    simulate(body, rules=replace(RULES, sliced=True), codec="none")
    assert most == min(max(windows), 3)  # of six segments each has three


@pytest.mark.parametrize("window", [SLOW_WINDOW, WINDOW])
def test_of_a_full_line_raw_segments_come_first(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others wait for what is made of them."""
    raw, told_meanwhile = Counter[tuple[PeerId, PeerId]](), list[bool]()
    fetch_chunks, told_slice = FakeExchange.fetch_chunks, FakeExchange.told_slice

    async def fetch(exchange: FakeExchange, ref: BlobRef, holder: PeerId, *rest: Any) -> None:
        pair = exchange.peer, holder
        raw[pair] += 1
        try:
            await fetch_chunks(exchange, ref, holder, *rest)
        finally:
            raw[pair] -= 1

    async def told(exchange: FakeExchange, peer: PeerId, *rest: Any) -> Any:
        told_meanwhile.append(raw[exchange.peer, peer] > 0)
        return await told_slice(exchange, peer, *rest)

    monkeypatch.setattr(FakeExchange, "fetch_chunks", fetch)
    monkeypatch.setattr(FakeExchange, "told_slice", told)
    monkeypatch.setattr(FakeExchange, "window", lambda exchange, peer: window)

    async def body(swarm: Swarm) -> None:
        for number in range(3):
            swarm.world.of(swarm.start(number)).latency_seconds = 0.2
        await swarm.until(45.0)
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(4))

    simulate(body, rules=replace(RULES, sliced=True), codec="none")
    assert told_meanwhile and any(told_meanwhile) == (window == WINDOW)


def test_segments_of_who_is_silent_are_pulled_raw() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        swarm.world.of(peers[2]).mute = True
        await swarm.until(45.0)
        for round_ in range(4):
            assert len(swarm.digests(round_)) == 1
            assert all(swarm.applied(peer)[round_]["group"] == tuple(peers) for peer in peers)
        assert any(event["event"] == "swarm.slices.raw" for event in swarm.events[peers[0]])

    simulate(body, rules=replace(RULES, sliced=True), codec="none")


def test_a_line_too_slow_for_the_deadline_costs_local_steps_and_no_state() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        slow = peers[3]
        for other in peers[:3]:
            swarm.world.of(other).latency_seconds = 0.05
        # Its own segments came, the others tell theirs a moment later: those take until the next round has begun.
        await swarm.until(48.82)
        swarm.world.of(slow).latency_seconds = 1.2
        await swarm.until(50.0)
        swarm.world.of(slow).latency_seconds = 0.01
        await swarm.until(95.0)
        (late,) = [e for e in swarm.events[slow] if e["event"] == "swarm.slices.late"]
        assert late["round"] == 4
        assert late["segments"] == late["of"] - assign(late["of"], peers, Round(4)).count(slow)
        assert not [e for e in swarm.events[slow] if e["event"] == "swarm.state.loaded"]
        for round_ in range(9):
            assert len(swarm.digests(round_)) == 1, round_
            assert swarm.applied(slow)[round_]["group"] == tuple(peers)

    simulate(body, rules=replace(RULES, sliced=True), codec="none")


@pytest.mark.parametrize("two_faced", [False, True])
def test_who_lies_is_named_by_all_and_aggregates_no_more(two_faced: bool) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        liar = peers[1]
        swarm.world.of(liar).lie, swarm.world.of(liar).two_faced = opposite, two_faced
        await swarm.until(205.0)
        honest = [peer for peer in peers if peer != liar]
        named = {
            peer: {event["peer"] for event in swarm.events[peer] if event["event"] == "swarm.slices.lied"}
            for peer in honest
        }
        assert named == {peer: {liar} for peer in honest}
        assert len({swarm.applied(peer)[19]["digest"] for peer in honest}) == 1
        if not two_faced:  # who finds a lie that all were told has applied it with them
            found = min(e["round"] for peer in honest for e in swarm.events[peer] if e["event"] == "swarm.slices.lied")
            assert len({swarm.applied(peer)[found]["digest"] for peer in honest}) == 1

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_no_round_waits_for_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[float] = []
    evidence = sliced.SlicedPuller._raw_of_told

    async def slowly(self: Any, *arguments: Any) -> Any:
        await asyncio.sleep(1.5)  # longer than a round has to pull
        checks.append(self._now())
        return await evidence(self, *arguments)

    monkeypatch.setattr(sliced.SlicedPuller, "_raw_of_told", slowly)

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        await swarm.until(105.0)
        assert len(checks) >= 20
        for peer in peers:
            for report in swarm.applied(peer).values():
                assert report["seconds"]["pull"] < 1.0

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_a_fault_in_a_check_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(sliced.SlicedPuller, "_raw_of_told", broken)

    async def body(swarm: Swarm) -> None:
        for number in range(4):
            swarm.start(number)
        with pytest.raises(AssertionError, match="died") as raised:
            await swarm.until(105.0)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_who_hides_its_own_part_of_what_it_lied_about_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        liar, fetch = peers[1], fake_exchange.FakeExchange.fetch_chunks
        swarm.world.of(liar).lie = opposite

        async def hidden(self: Any, ref: Any, holder: PeerId, indexes: Any, timeout_seconds: float, *rest: Any) -> None:
            theirs = set(swarm.replicas[liar]._exchange._aggregates)  # type: ignore[attr-defined]
            if holder == liar != self.peer and set(indexes) & theirs:
                await asyncio.sleep(timeout_seconds)
                raise BlobUnavailable("no")
            await fetch(self, ref, holder, indexes, timeout_seconds, *rest)

        monkeypatch.setattr(fake_exchange.FakeExchange, "fetch_chunks", hidden)
        await swarm.until(405.0)
        for peer in (peers[0], *peers[2:]):
            assert swarm.replicas[peer]._puller.distrusted == {liar}  # type: ignore[attr-defined]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


@pytest.mark.parametrize("shows", [True, False])
def test_who_lies_and_counts_an_accomplice_that_hides_is_named_by_all(shows: bool) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        liar, accomplice = peers[1], peers[3]
        honest = [peer for peer in peers if peer not in (liar, accomplice)]
        swarm.world.of(liar).lie = opposite
        swarm.world.of(liar).shows = shows
        swarm.world.of(accomplice).hides_from = set(honest)
        await swarm.until(405.0)
        for peer in honest:
            distrusted = swarm.replicas[peer]._puller.distrusted  # type: ignore[attr-defined]
            assert {liar} <= distrusted <= {liar, accomplice}
        assert len({swarm.applied(peer)[39]["digest"] for peer in honest}) == 1

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_who_lies_to_one_only_is_named_by_that_one_as_soon_as_its_state_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sliced, "CHECK_SHARE", 1e-9)

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        liar, victim = peers[1], peers[3]
        await swarm.until(29.0)
        swarm.world.of(liar).lie = opposite
        swarm.world.of(liar).victims = {victim}
        # It checks nothing by chance, and asks the last of the others what it was told.
        monkeypatch.setattr(swarm.replicas[victim]._puller, "_draw", lambda n: n - 1)
        await swarm.until(105.0)
        (named,) = [event for event in swarm.events[victim] if event["event"] == "swarm.slices.lied"]
        lied = min(round_ for round_ in range(10) if len(swarm.digests(round_)) > 1)
        assert (named["peer"], named["round"]) == (liar, lied) and named["at"] < (lied + 2) * 10
        assert all(len(swarm.digests(round_)) == 1 for round_ in range(lied + 1, 10))
        loaded = [event for event in swarm.events[victim] if event["event"] == "swarm.state.loaded"]
        assert len(loaded) == 1

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_who_counts_one_that_hides_from_all_others_shows_that_and_is_not_named() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        hiding = peers[3]
        swarm.world.of(hiding).hides_from = set(peers) - {peers[1], hiding}
        await swarm.until(205.0)
        named = [
            (event["event"], event["peer"])
            for peer in peers
            for event in swarm.events[peer]
            if event["event"] in ("swarm.slices.lied", "swarm.slices.unproved") and event["peer"] != hiding
        ]
        assert not named
        # It was shown in place of who hides; and nobody shows what is older than two rounds.
        assert swarm.world.shown_to_others > 0
        for peer in peers:
            blobs = {blob for (blob, _), times in swarm.world.shown[peer].items() if times}
            assert len(blobs) <= sliced.SHOWN_ROUNDS * (len(peers) - 1)

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


@pytest.mark.parametrize("seconds", [0.75, 30.0])
def test_two_who_are_late_or_silent_leave_the_others_with_one_state_and_nothing_raw(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a robust rule, which stands an eighth that is missing of those who answered us."""

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(10)]
        late, fetch = set(peers[8:]), fake_exchange.FakeExchange.fetch_chunks

        async def slowly(self: Any, ref: Any, holder: PeerId, indexes: Any, timeout_seconds: float, *rest: Any) -> None:
            if holder in late and holder != self.peer:
                wait = max(0.0, swarm.now() // 10 * 10 + 8.7 + seconds - swarm.now())  # from the commit deadline on
                await asyncio.sleep(min(wait, timeout_seconds))
                if wait > timeout_seconds:
                    raise BlobUnavailable("late")
                timeout_seconds -= wait
            await fetch(self, ref, holder, indexes, timeout_seconds, *rest)

        monkeypatch.setattr(fake_exchange.FakeExchange, "fetch_chunks", slowly)
        await swarm.until(35.0)
        for round_ in range(3):
            assert len({swarm.applied(peer)[round_]["digest"] for peer in peers[:8]}) == 1
        assert not any(event["event"] == "swarm.slices.raw" for peer in peers[:8] for event in swarm.events[peer])

    simulate(body, rules=replace(RULES, sliced=True, rule="trimmed_mean", liars=0.3), codec="none")


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_values_at_a_codecs_bound_end_nobody(codec: str) -> None:
    largest = np.full(LAYOUT.size, np.float32(MAX_MAGNITUDE * (1 - 2**-20)))

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(6)]
        for peer in peers:
            swarm.replicas[peer].trainer.delta = lambda theta: largest  # type: ignore[method-assign]
        await swarm.until(25.0)
        assert all(len(swarm.applied(peer)[1]["group"]) == 6 for peer in peers)

    simulate(body, rules=replace(RAW, sliced=True), codec=codec)


def test_who_commits_twice_with_other_tokens_gets_nobody_named() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        seen = swarm.replicas[peers[0]]._exchange.commits

        async def others(*asked: Any) -> Any:
            signed = await seen(*asked)
            return [replace(one, record=twice(one.record)) if one.peer == peers[3] else one for one in signed]

        swarm.replicas[peers[0]]._exchange.commits = others  # type: ignore[method-assign]
        await swarm.until(85.0)
        for peer in peers:
            assert not any(event["event"] == "swarm.slices.lied" for event in swarm.events[peer])

    def twice(commit: Any) -> Any:
        return msgspec.structs.replace(commit, tokens=2 * commit.tokens)

    simulate(body, rules=replace(RULES, sliced=True), codec="none")


def test_an_honest_one_is_never_named_and_a_false_accusation_harms_nobody() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        await swarm.until(15.0)
        puller: Any = swarm.replicas[peers[0]]._puller
        (first,) = puller._past
        segment, accused = next((number, owner) for number, owner in enumerate(first.owners) if owner != peers[0])
        puller._accusations.append(Accusation(accused, 0, segment))
        await swarm.until(55.0)
        others: list[Any] = [swarm.replicas[peer]._puller for peer in peers[1:] if peer != accused]
        assert all(list(other._looked_into) == [Accusation(accused, 0, segment)] for other in others)
        for peer in peers:
            assert not any(event["event"] == "swarm.slices.lied" for event in swarm.events[peer])
        assert len(swarm.digests(4)) == 1

    simulate(body, rules=replace(RULES, sliced=True), codec="int8")


def test_who_is_accused_of_what_it_does_not_have_to_show_any_more_is_not_blamed_for_that() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        accused, hiding, accuser = peers[1], peers[3], peers[4]
        swarm.world.of(hiding).hides_from = set(peers) - {accused, hiding}
        puller: Any = swarm.replicas[accuser]._puller
        for round_ in range(2, 15):
            await swarm.until(10.0 * round_ + 5.0)
            (old,) = [one for one in puller._past if one.number == round_ - 2]
            puller._accusations.extend(Accusation(accused, old.number, segment) for segment in old.of(accused)[:1])
        for peer in peers[:3]:
            assert accused not in swarm.replicas[peer]._puller.distrusted  # type: ignore[attr-defined]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_who_commits_to_the_same_bytes_again_takes_nothing_from_what_others_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It shows them to aggregators only, and accuses one of the round before."""
    monkeypatch.setattr(sliced, "CHECK_SHARE", 1e-9)

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        accused, liar = peers[0], peers[3]
        puller: Any = swarm.replicas[liar]._puller
        exchange: Any = swarm.replicas[liar]._exchange
        offer, fetch = exchange.offer, fake_exchange.FakeExchange.fetch_chunks
        first: list[Any] = []

        async def the_same(buffers: Any, reveal_at: float) -> Any:
            first.append(first[0] if first else await offer(buffers, reveal_at))
            return first[0]

        async def hidden(self: Any, ref: Any, holder: PeerId, indexes: Any, timeout_seconds: float, *rest: Any) -> None:
            aggregated = set(self._aggregates) | set(exchange._aggregates)
            if holder == liar != self.peer and indexes and not set(indexes) <= aggregated:
                await asyncio.sleep(timeout_seconds)
                raise BlobUnavailable("no")
            await fetch(self, ref, holder, indexes, timeout_seconds, *rest)

        monkeypatch.setattr(exchange, "offer", the_same)
        monkeypatch.setattr(fake_exchange.FakeExchange, "fetch_chunks", hidden)
        for round_ in range(1, 20):
            await swarm.until(10.0 * round_ + 5.0)
            (last,) = [one for one in puller._past if one.number == round_ - 1]
            puller._accusations.clear()
            puller._accusations.extend(Accusation(accused, last.number, segment) for segment in last.of(accused)[:1])
        assert len(first) > 15
        for peer in (peers[1], peers[2], peers[4]):
            assert accused not in swarm.replicas[peer]._puller.distrusted  # type: ignore[attr-defined]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_an_accusation_that_stalls_does_not_delay_who_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lies to a victim only; another is accused in each round, and keeps who looks into that waiting."""
    monkeypatch.setattr(sliced, "CHECK_SHARE", 1e-9)

    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(7)]
        liar, victim, staller, accuser = peers[1], peers[3], peers[5], peers[6]
        for peer in peers:
            swarm.world.of(peer).latency_seconds = 0.06
        await swarm.until(29.0)
        swarm.world.of(liar).lie = opposite
        swarm.world.of(liar).victims = {victim}
        fetch = fake_exchange.FakeExchange.fetch_chunks

        async def stalls(self: Any, ref: Any, holder: PeerId, indexes: Any, timeout_seconds: float, *rest: Any) -> None:
            if holder == staller != self.peer and indexes and not set(indexes) <= set(self._aggregates):
                await asyncio.sleep(timeout_seconds)
                raise BlobUnavailable("no")
            await fetch(self, ref, holder, indexes, timeout_seconds, *rest)

        monkeypatch.setattr(fake_exchange.FakeExchange, "fetch_chunks", stalls)
        # It checks nothing by chance, and asks the last of the others what it was told.
        monkeypatch.setattr(swarm.replicas[victim]._puller, "_draw", lambda n: n - 1)
        puller: Any = swarm.replicas[accuser]._puller
        for round_ in range(3, 10):
            await swarm.until(10.0 * round_ + 5.0)
            (last,) = [one for one in puller._past if one.number == round_ - 1]
            puller._accusations.clear()
            puller._accusations.extend(Accusation(staller, last.number, segment) for segment in last.of(staller)[:1])
        lied = [event for event in swarm.events[victim] if event["event"] == "swarm.slices.lied"]
        assert [(event["peer"], event["round"]) for event in lied] == [(liar, 3)] and lied[0]["at"] < 50.0

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def late_words(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, who: PeerId, seconds: float, chunk_seconds: float = 0.0
) -> None:
    """`who` tells its segments so many seconds before they are not waited for any more, and takes so long for a chunk
    of what it has."""
    told, fetch = fake_exchange.FakeExchange.told_slice, fake_exchange.FakeExchange.fetch_chunks

    async def told_late(
        self: Any, peer: PeerId, module: str, round_: Round, segment: int, size: int, timeout_seconds: float
    ) -> Any:
        until = swarm.now() + timeout_seconds
        found = await told(self, peer, module, round_, segment, size, timeout_seconds)
        if peer == who:
            await asyncio.sleep(max(0.0, until - seconds - swarm.now()))
        return found

    async def slowly(self: Any, ref: Any, holder: PeerId, indexes: Any, timeout_seconds: float, *rest: Any) -> None:
        if holder == who != self.peer and indexes:
            await asyncio.sleep(min(chunk_seconds, timeout_seconds))
            if timeout_seconds < chunk_seconds:
                raise BlobUnavailable("late")
            timeout_seconds -= chunk_seconds
        await fetch(self, ref, holder, indexes, timeout_seconds, *rest)

    monkeypatch.setattr(fake_exchange.FakeExchange, "told_slice", told_late)
    monkeypatch.setattr(fake_exchange.FakeExchange, "fetch_chunks", slowly)


def test_who_lies_at_the_last_moment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        liar = peers[1]
        for peer in peers:
            swarm.world.of(peer).latency_seconds = 0.06
        swarm.world.of(liar).shows = False
        swarm.world.of(liar).lie = opposite
        late_words(swarm, monkeypatch, liar, 0.03)
        await swarm.until(205.0)
        for peer in set(peers) - {liar}:
            assert swarm.replicas[peer]._puller.distrusted == {liar}  # type: ignore[attr-defined]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


@pytest.mark.parametrize("seed", range(4))
def test_who_leaves_with_a_round_is_not_blamed_for_what_it_shows_no_more(seed: int) -> None:
    async def body(swarm: Swarm) -> None:
        swarm.draw = random.Random(seed).randrange
        peers = [swarm.start(number) for number in range(3)]
        for number in range(3, 6):
            leaves = swarm.start(number)
            await swarm.until(20.0 * number + 5.0)
            swarm.replicas[leaves].finish()
            await swarm.tasks[leaves]
            swarm.crash(leaves)
            await swarm.until(20.0 * number + 15.0)
            assert leaves in swarm.applied(peers[0])[2 * number]["group"]
        for peer in peers:
            assert not [e for e in swarm.events[peer] if e["event"] == "swarm.slices.unproved"]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


@pytest.mark.parametrize("seed", range(4))
def test_who_is_lost_right_after_a_round_is_not_blamed_for_what_it_shows_no_more(seed: int) -> None:
    async def body(swarm: Swarm) -> None:
        swarm.draw = random.Random(seed).randrange
        peers = [swarm.start(number) for number in range(3)]
        for number in range(3, 9):
            lost, round_ = swarm.start(number), 2 * number
            await swarm.until(10.0 * round_ + 5.0)
            while round_ not in swarm.applied(lost):
                await swarm.until(swarm.now() + 0.05)
            swarm.crash(lost)
            await swarm.until(10.0 * round_ + 15.0)
            assert lost in swarm.applied(peers[0])[round_]["group"]
        await swarm.until(205.0)
        for peer in peers:
            assert not [e for e in swarm.events[peer] if e["event"] == "swarm.slices.unproved"]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


@pytest.mark.parametrize("members", [2, 3, 5])
def test_an_honest_one_with_a_slow_line_is_not_blamed_for_what_came_too_late(
    members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(members)]
        late_words(swarm, monkeypatch, peers[1], 0.15, chunk_seconds=0.3)
        await swarm.until(205.0)
        for peer in peers:
            assert not swarm.replicas[peer]._puller.distrusted  # type: ignore[attr-defined]

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


@pytest.mark.parametrize("seed", range(4))
def test_who_replays_rounds_blames_nobody_for_a_member_that_is_gone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(swarm: Swarm) -> None:
        swarm.draw = random.Random(seed).randrange
        peers = [swarm.start(number) for number in range(5)]
        await swarm.until(33.0)
        sleeper, awake = swarm.replicas[peers[4]], asyncio.Event()
        sleep = sleeper._sleep_until

        async def frozen(*arguments: Any) -> None:
            await awake.wait()
            await sleep(*arguments)

        monkeypatch.setattr(sleeper, "_sleep_until", frozen)
        await swarm.until(79.0)
        swarm.crash(peers[3])
        await swarm.until(83.0)
        awake.set()
        await swarm.until(150.0)
        assert any(event["event"] == "swarm.round.replayed" for event in swarm.events[peers[4]])
        assert not any(event["event"] == "swarm.slices.unproved" for event in swarm.events[peers[4]])

    simulate(body, rules=replace(RAW, sliced=True), codec="none")


def test_who_commits_to_anothers_bytes_is_left_out_and_the_other_counts() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        thief, robbed = peers[3], peers[0]
        publish = swarm.replicas[thief]._exchange.publish

        async def stolen(commit: Any, *rest: Any) -> bool:
            theirs = swarm.world.commits.get((commit.module, commit.round, commit.shard), {}).get(robbed)
            if theirs is not None:
                commit = replace_commit(commit, theirs.record)
            return bool(await publish(commit, *rest))

        swarm.replicas[thief]._exchange.publish = stolen  # type: ignore[method-assign]
        swarm.world.of(thief).latency_seconds = 0.2
        await swarm.until(35.0)
        for peer in peers[:3]:
            assert swarm.applied(peer)[1]["group"] == tuple(peers[:3])
            assert thief in swarm.applied(peer)[1]["missing"]
            assert not any(event["event"] == "swarm.slices.raw" for event in swarm.events[peer])

    def replace_commit(commit: Any, other: Any) -> Any:
        return msgspec.structs.replace(commit, blob=other.blob, size=other.size)

    simulate(body, rules=replace(RULES, sliced=True), codec="none")


def test_views_that_differ_by_a_member_still_give_everybody_an_update() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        hidden, blind = peers[4], peers[0]
        swarm.world.of(hidden).hides_from.add(blind)
        await swarm.until(45.0)
        for round_ in range(1, 4):
            for peer in peers:
                assert len(swarm.applied(peer)[round_]["group"]) >= 4
        assert LAYOUT.size == swarm.thetas()[0].size

    simulate(body, rules=replace(RULES, sliced=True), codec="none")


def test_crash_between_commit_and_aggregation_costs_nobody_the_round() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(4)]
        await swarm.until(18.75)  # committed to round 1, nothing revealed yet
        swarm.crash(peers[2])
        await swarm.until(45.0)
        left = [PeerId(peer) for number, peer in enumerate(peers) if number != 2]
        for round_ in (1, 2, 3):
            assert len({swarm.applied(peer)[round_]["digest"] for peer in left}) == 1
            assert set(left) <= set(swarm.applied(left[0])[round_]["group"])

    simulate(body, rules=replace(RULES, sliced=True), codec="int8")


def test_who_is_left_by_all_after_the_commits_goes_on_with_what_it_has() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(3)]
        await swarm.until(18.75)
        swarm.crash(peers[1])
        swarm.crash(peers[2])
        await swarm.until(45.0)
        last = swarm.applied(peers[0])
        assert last[1]["group"] == (peers[0],) and last[1]["contributed"] and last[1]["at"] <= 20.0 + 2.5 + 0.1
        assert last[2]["contributed"] and last[3]["contributed"]

    simulate(body, rules=replace(RULES, sliced=True), codec="int8")


def test_who_commits_and_withholds_costs_a_part_of_one_round_and_not_of_all() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(2)]
        withholding = swarm.world.of(peers[1])
        withholding.mute, withholding.hides_from = True, {peers[0]}
        await swarm.until(75.0)
        late = [event["round"] for event in swarm.events[peers[0]] if event["event"] == "swarm.slices.late"]
        assert late == [0] and swarm.applied(peers[0])[0]["at"] <= 10.0 + 0.25 * 8.0 + 0.1

    simulate(body, rules=replace(RULES, sliced=True), codec="int8")


def test_the_next_round_tells_who_was_late_from_who_is_gone() -> None:
    async def body(swarm: Swarm) -> None:
        peers = [swarm.start(number) for number in range(5)]
        await swarm.until(41.0)
        slow, gone = (swarm.world.of(peer) for peer in peers[3:])
        slow.hides_from = gone.hides_from = set(peers[:3])
        window = RULES.clock.window(Round(4))
        given_up = window.read_from + sliced.RAW_SHARE * (window.pull_by - window.read_from)
        await swarm.until(given_up - 0.01)
        slow.hides_from = set()
        await swarm.until(61.0)
        for peer in peers[:3]:
            assert swarm.applied(peer)[4]["missing"].keys() == set(peers[3:])
            late = swarm.applied(peer)[5]["late"]
            assert late.keys() == {peers[3]} and late[peers[3]] == 0  # of what is left of the round's time

    simulate(body, rules=replace(RULES, sliced=True), codec="int8")
