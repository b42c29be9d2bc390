"""When a peer may work: schedules, rules, their order, and what must settle."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from potluck.errors import UserError
from potluck.net.pace import Pace
from potluck.peer.limits import (
    Decision,
    Limits,
    RunLimits,
    Sensed,
    carries,
    decide,
    divide,
    limits_toml,
    next_opening,
    open_minutes,
    parse_limits,
    shares,
)
from potluck.peer.node import Node

MONDAY = datetime(2026, 11, 23, 12, 0)
NOBODY = Sensed(MONDAY, on_battery=False, idle_seconds=1e6, load=0.0, temperature=40.0)

times = st.tuples(st.integers(0, 23), st.integers(0, 59))
moments = st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1))


@given(times, times, moments)
def test_a_span_is_open_from_its_start_to_its_stop_over_midnight_too(
    start: tuple[int, int], stop: tuple[int, int], now: datetime
) -> None:
    begin, end, minute = start[0] * 60 + start[1], stop[0] * 60 + stop[1], now.hour * 60 + now.minute
    inside = begin <= minute < end if begin < end else minute >= begin or minute < end
    opens = next_opening([f"{start[0]}:{start[1]:02}-{stop[0]}:{stop[1]:02}"], now)
    assert (opens is None) == inside
    if opens is not None:
        assert (opens.hour, opens.minute) == start
        assert now < opens <= now + timedelta(days=1)


@given(
    st.lists(st.sampled_from(["22:00-07:00", "sat,sun 00:00-24:00", "mon-fri 1:00-2:30", "sun-mon 23:59-00:01"])),
    moments,
)
def test_what_opens_next_is_open_and_nothing_before_it_is(schedule: list[str], now: datetime) -> None:
    opens = next_opening(schedule, now)
    if opens is None:
        return
    assert next_opening(schedule, opens) is None
    assert next_opening(schedule, opens - timedelta(minutes=1)) == opens


def test_a_span_of_days_goes_on_into_the_next_one() -> None:
    week = open_minutes(["fri 22:00-07:00"])
    assert sum(week) == 9 * 60
    assert week[4 * 1440 + 22 * 60] and week[5 * 1440 + 7 * 60 - 1] and not week[5 * 1440 + 7 * 60]
    assert sum(open_minutes(["sun 23:00-01:00"])[:60]) == 60  # round the end of the week


@pytest.mark.parametrize(
    "span", ["", "22-07", "25:00-07:00", "22:60-07:00", "someday 1:00-2:00", "24:01-01:00", "x" * 99]
)
def test_a_span_that_is_none_is_refused_by_name(span: str) -> None:
    with pytest.raises(UserError, match="schedule"):
        open_minutes([span])


@pytest.mark.parametrize(
    ("limits", "change", "rule"),
    [
        (Limits(), {"on_battery": True}, "battery"),
        (Limits(battery=True), {"on_battery": True}, ""),
        (Limits(), {"on_battery": None}, ""),
        (Limits(idle_minutes=5), {"idle_seconds": 60.0}, "idle_minutes"),
        (Limits(idle_minutes=5), {"idle_seconds": 301.0}, ""),
        (Limits(idle_minutes=5), {"idle_seconds": None}, ""),
        (Limits(), {"idle_seconds": 0.0}, ""),
        (Limits(programs=["game"]), {"programs": ("game",)}, "programs"),
        (Limits(), {"on_gpu": ("blender",)}, "shared_gpu"),
        (Limits(shared_gpu=True), {"on_gpu": ("blender",)}, ""),
        (Limits(load=0.5), {"load": 0.6}, "load"),
        (Limits(load=0.5), {"load": None}, ""),
        (Limits(), {"load": 1.0}, ""),
        (Limits(), {"temperature": 91.0}, "temperature"),
        (Limits(upload_month=10**9), {"sent_this_month": 10**9}, "upload_month"),
        (Limits(upload_month=10**9), {"sent_this_month": 10**9 - 1}, ""),
        (Limits(download_month=10**9), {"received_this_month": 10**9}, "download_month"),
        (Limits(download_month=10**9), {"sent_this_month": 10**10}, ""),
        (Limits(), {"fullscreen": "mpv"}, "fullscreen"),
        (Limits(), {"fullscreen": ""}, "fullscreen"),
        (Limits(fullscreen=True), {"fullscreen": "mpv"}, ""),
        (Limits(gpu_power=200), {"gpu_watts": 201.0}, "gpu_power"),
        (Limits(gpu_power=200), {"gpu_watts": 200.0}, ""),
        (Limits(gpu_power=200), {"gpu_watts": None}, ""),
        (Limits(schedule=["13:00-14:00"]), {}, "schedule"),
        (Limits(schedule=["11:00-14:00"]), {}, ""),
    ],
)
def test_each_rule_pauses_and_names_itself(limits: Limits, change: dict[str, object], rule: str) -> None:
    found = decide(limits, replace(NOBODY, **change))  # type: ignore[arg-type]
    assert found.rule == rule and found.works == (not rule) and bool(found.text) == bool(rule)


def test_you_come_first_and_a_pause_says_until_when() -> None:
    limits = Limits(schedule=["22:00-07:00"], upload_month=10**6)
    assert decide(limits, NOBODY, paused=True).rule == "you"
    assert decide(limits, NOBODY).until == MONDAY.replace(hour=22)
    night = replace(NOBODY, now=MONDAY.replace(hour=23), sent_this_month=10**6)
    assert decide(limits, night).until == datetime(2026, 12, 1)


def test_load_must_be_over_for_a_while_and_a_schedule_need_not() -> None:
    limits = Limits(load=0.5, settle_minutes=2)
    busy = decide(limits, replace(NOBODY, load=0.9))
    after = decide(limits, NOBODY, busy)
    assert after.rule == "load" and after.until == MONDAY + timedelta(minutes=2)
    later = replace(NOBODY, now=MONDAY + timedelta(minutes=1))
    still = decide(limits, later, after)
    assert still.rule == "load" and still.until == after.until and still.text == after.text
    again = decide(limits, replace(later, load=0.9), still)
    assert again.settled is None, "it begins to settle anew"
    assert decide(limits, replace(NOBODY, now=MONDAY + timedelta(minutes=2)), still).works
    assert decide(limits, NOBODY, Decision("schedule", "")).works


def test_a_month_that_is_used_up_says_how_much_and_until_when() -> None:
    found = decide(Limits(download_month=2 * 10**9), replace(NOBODY, received_this_month=2 * 10**9))
    assert "received 2 GB" in found.text and "cap is 2 GB" in found.text and found.until == datetime(2026, 12, 1)


@given(st.integers(10_000, 10**9), st.lists(st.none() | st.integers(10_000, 10**9), min_size=1, max_size=9).filter(len))
def test_shares_keep_the_machines_limit_and_each_runs_own_and_leave_nothing_over(
    total: int, own: list[int | None]
) -> None:
    parts = shares(total, own)
    assert all(part is not None and part > 0 for part in parts)
    given = [part or 0 for part in parts]
    assert sum(given) <= total
    assert all(part <= most for part, most in zip(given, own, strict=True) if most is not None)
    # Who gets less than another has all that it may use.
    assert all(part >= max(given) - 1 or part == most for part, most in zip(given, own, strict=True))
    assert sum(given) == total or all(part == most for part, most in zip(given, own, strict=True))


def test_without_a_limit_of_the_machine_each_run_has_its_own() -> None:
    assert shares(None, [None, 5]) == [None, 5]
    limits = Limits(upload=100_000, runs={"ab": RunLimits(upload=20_000, threads=2), "a": RunLimits(upload=10_000)})
    parts = divide(limits, ["abc", "xyz", "add"])
    assert [part.upload for part in parts] == [20_000, 70_000, 10_000]
    assert [part.threads for part in parts] == [2, None, None] and {part.download for part in parts} == {None}
    assert sum(part.disk_quota or 0 for part in parts) <= limits.disk_quota
    assert divide(limits, []) == []


def test_a_cap_is_enough_for_as_many_runs_as_can_contribute_with_it() -> None:
    assert carries(Limits(upload=25_000)) == 2 and carries(Limits(disk_quota=3_500_000, download=10**6)) == 3
    assert carries(Limits()) == 10_000


def test_limits_are_kept_as_toml_and_defaults_are_left_out() -> None:
    assert limits_toml(Limits()) == ""
    mine = Limits(schedule=["sat 0:00-24:00"], battery=True, load=0.5, upload=20_000, programs=['a "game"'], threads=3)
    mine = msgspec.structs.replace(
        mine, memory=10**9, runs={"ab": RunLimits(upload=10_000), "0c": RunLimits(threads=1)}
    )
    assert parse_limits(limits_toml(mine).encode()) == mine


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\x7f")
def test_a_programs_name_of_any_characters_comes_back(name: str) -> None:
    mine = Limits(programs=[name])
    assert parse_limits(limits_toml(mine).encode()) == mine


@pytest.mark.parametrize(
    "text",
    [
        *("load = 2", "loud = 0.5", "schedule = ['x']", "threads = 0", "upload = 'much'", "= 3", "\xff", "battery = 1"),
        *("download = 1", "memory = 1", "gpu_power = 0", "[runs.A]", "[runs.a]\nload = 0.5", "[runs.a]\nupload = 1"),
    ],
)
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_limits(text.encode("latin-1"))


def test_a_worker_that_is_told_new_caps_keeps_them_and_refuses_what_is_none() -> None:
    async def scene() -> None:
        nothing: Any = None
        node = Node(nothing, nothing, nothing, nothing)
        with pytest.raises(UserError, match="ask again"):
            await node.limit(1, 1, 1)
        rpc: Any = SimpleNamespace(upload=Pace(), download=Pace(5.0))
        store: Any = SimpleNamespace(quota_bytes=1)
        node.rpc, node.store = rpc, store
        await node.limit(upload=20_000, download=None, disk_quota=10**6)
        assert (rpc.upload.rate, rpc.download.rate, store.quota_bytes) == (20_000, None, 10**6)
        for wrong in (0, -1, 1.5, "1", [1]):
            with pytest.raises(UserError, match="positive"):
                await node.limit(wrong, None, None)  # type: ignore[arg-type]
        assert rpc.upload.rate == 20_000

    asyncio.run(scene())
