"""The bucket alone, in virtual time: caps hold over any ten seconds, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.net.pace import (
    AHEAD_ROUND_TRIPS,
    AHEAD_SECONDS,
    LARGE_ASK_BYTES,
    LEAST_ASK_BYTES,
    OVERHEAD,
    SLOW_WINDOW,
    USUAL_RATE,
    Flow,
    Pace,
)
from potluck.sim.loop import VirtualLoop, run

WINDOW = 10.0


def most_in_a_window(passed: Sequence[tuple[float, float]], seconds: float = WINDOW) -> float:
    """Of (time, bytes), in the order of time."""
    most = total = 0.0
    first = 0
    for at, size in passed:
        total += size
        while passed[first][0] <= at - seconds:
            total -= passed[first][1]
            first += 1
        most = max(most, total)
    return most


class Lane:
    """Sends a body piece by piece, as a stream does; then the next one."""

    def __init__(self, pace: Pace, log: list[tuple[float, float]], bodies: int, patience: float = 0.0) -> None:
        self.pace, self.log, self.left, self.patience = pace, log, bodies, patience
        self.at: list[float] = []

    def pump(self) -> None:
        now = asyncio.get_running_loop().time
        while self.left > 0 and self.pace.ask(self.pump, self.patience):
            size = min(self.left, self.pace.piece_bytes)
            self.left -= size
            self.pace.charge(size)
            self.log.append((now(), size * OVERHEAD))
            self.at.append(now())


@settings(max_examples=15, deadline=None)
@given(
    st.floats(10_000, 1e9),
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 20), st.sampled_from([0.0, 5.0])), min_size=1, max_size=8),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 1000)), max_size=200),
)
def test_any_ten_seconds_stay_within_five_percent_whatever_is_sent_when(
    rate: float, bodies: list[tuple[float, float, float]], small: list[tuple[float, int]]
) -> None:
    log: list[tuple[float, float]] = []

    async def scene(loop: VirtualLoop) -> None:
        pace = Pace(rate)

        def little(size: int) -> None:
            if pace.ask(lambda: little(size), small=True):
                pace.charge(size)
                log.append((loop.time(), size * OVERHEAD))

        for at, seconds, patience in bodies:
            loop.call_at(at, Lane(pace, log, int(seconds * rate), patience).pump)
        for at, size in small:
            loop.call_at(at, little, size)
        await asyncio.sleep(300)

    run(scene)
    total = sum(int(seconds * rate) for _, seconds, _ in bodies) + sum(size for _, size in small)
    assert sum(size for _, size in log) == pytest.approx(total * OVERHEAD)
    assert most_in_a_window(log) <= 1.05 * rate * WINDOW


@pytest.mark.parametrize("rate", [10_000.0, 1e6, 1e9])
def test_a_cap_is_used_up(rate: float) -> None:
    async def scene(loop: VirtualLoop) -> None:
        pace, log = Pace(rate), list[tuple[float, float]]()
        for _ in range(5):
            Lane(pace, log, int(20 * rate)).pump()
        await asyncio.sleep(30)
        assert 0.99 * 30 * rate <= sum(size for _, size in log) <= 1.01 * 30 * rate

    run(scene)


def test_what_is_urgent_goes_first_and_the_rest_does_not_stand_still() -> None:
    async def scene(loop: VirtualLoop) -> None:
        pace, log = Pace(1e5), list[tuple[float, float]]()
        relaxed = Lane(pace, log, 10**6, patience=5.0)
        relaxed.pump()
        await asyncio.sleep(1)
        urgent = Lane(pace, log, 20 * 10**5)
        urgent.pump()
        began = loop.time()
        await asyncio.sleep(60)
        assert urgent.at[-1] - began == pytest.approx(20 * OVERHEAD, rel=0.03)
        waits = [after - before for before, after in zip(relaxed.at, relaxed.at[1:], strict=False)]
        assert 4.0 < max(waits) < 6.0

    run(scene)


def test_questions_are_paid_for_in_the_order_in_which_they_were_asked() -> None:
    async def scene(loop: VirtualLoop) -> None:
        pace, paid = Pace(1000.0), list[tuple[int, float]]()

        async def take(number: int) -> None:
            await pace.take(1000)
            paid.append((number, loop.time()))

        tasks = [asyncio.create_task(take(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [number for number, _ in paid] == [0, 1, 3]
        assert [at for _, at in paid] == pytest.approx([0.0, OVERHEAD - 0.2, 2 * OVERHEAD - 0.2], abs=0.01)

    run(scene)


def test_a_question_that_is_given_up_costs_nothing() -> None:
    async def scene(loop: VirtualLoop) -> None:
        pace = Pace(1000.0)
        await pace.take(1000)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await pace.take(10**6)
        await pace.take(1)
        assert loop.time() == pytest.approx(OVERHEAD - 0.2, abs=0.01)

    run(scene)


def test_a_cap_that_changes_holds_at_once_and_none_lets_everything_pass() -> None:
    async def scene(loop: VirtualLoop) -> None:
        pace, log = Pace(1000.0), list[tuple[float, float]]()
        lane = Lane(pace, log, 10**9)
        lane.pump()
        await asyncio.sleep(10)
        slow = sum(size for _, size in log)
        pace.rate = 10_000.0
        await asyncio.sleep(10)
        fast = sum(size for _, size in log) - slow
        assert slow == pytest.approx(10_200, rel=0.12) and fast == pytest.approx(100_000, rel=0.03)
        pace.rate = None
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert not lane.left and not pace.behind()
        pace.rate = 1000.0
        assert pace.seconds(1000) == OVERHEAD

    run(scene)


def test_no_cap_costs_nothing() -> None:
    async def scene(loop: VirtualLoop) -> None:
        pace: Any = Pace()
        assert pace.ask(lambda: None) and pace.seconds(10**9) == 0 and pace.piece_bytes == pace.ask_bytes == 1 << 20
        await pace.take(10**12)
        pace.charge(10**12)
        assert not pace.behind() and loop.time() == 0

    run(scene)


@given(st.floats(1e5, 1e9), st.floats(0, 0.3), st.integers(1, 30))
def test_what_is_asked_for_at_once_comes_within_the_time_ahead(rate: float, latency: float, bodies: int) -> None:
    flow = Flow()
    assert flow.ask_bytes == 1 << 20, "nothing is known"
    flow.answered(latency + 0.5)
    flow.answered(latency)
    flow.answered(latency + 0.1)
    for _ in range(bodies):
        flow.came(flow.ask_bytes, flow.ask_bytes / rate)
    ahead = AHEAD_SECONDS * math.sqrt(USUAL_RATE / rate) + AHEAD_ROUND_TRIPS * latency
    soon = rate * ahead / SLOW_WINDOW
    assert flow.ask_bytes == LEAST_ASK_BYTES or flow.ask_bytes <= 1.001 * soon or soon >= 0.999 * LARGE_ASK_BYTES
    assert flow.ask_bytes == 1 << 20 or flow.ask_bytes >= 0.999 * soon - 1


@given(st.floats(2e5, 5e6), st.floats(1.1, 10))
def test_who_is_slower_is_asked_for_less_but_for_a_longer_time(rate: float, times: float) -> None:
    slow, fast = Flow(), Flow()
    for flow, its in ((slow, rate), (fast, rate * times)):
        flow.answered(0.0)
        flow.came(1 << 20, (1 << 20) / its)
    assert slow.ask_bytes <= fast.ask_bytes and slow.ask_bytes / rate >= fast.ask_bytes / (rate * times)


def test_a_stream_that_becomes_slower_is_asked_for_less_and_a_faster_one_for_more() -> None:
    flow = Flow()
    flow.answered(0.001)
    for _ in range(10):
        flow.came(1 << 20, 0.002)
    assert flow.ask_bytes == 1 << 20
    for _ in range(3):
        flow.came(1 << 20, 0.25)
    assert flow.ask_bytes < 1 << 17
    flow.came(1000, 60.0)  # one read, whatever it waited for
    assert flow.ask_bytes < 1 << 17
    for _ in range(20):
        flow.came(flow.ask_bytes, flow.ask_bytes / 200e6)
    assert flow.ask_bytes == 1 << 20
