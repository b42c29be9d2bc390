"""When a peer may work: schedules, rules, their order, and what must settle."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import UserError
from potluck.peer.limits import (
    Decision,
    Limits,
    Sensed,
    decide,
    limits_toml,
    next_opening,
    open_minutes,
    parse_limits,
)

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


def test_limits_are_kept_as_toml_and_defaults_are_left_out() -> None:
    assert limits_toml(Limits()) == ""
    mine = Limits(schedule=["sat 0:00-24:00"], battery=True, load=0.5, upload=20_000, programs=['a "game"'], threads=3)
    assert parse_limits(limits_toml(mine).encode()) == mine


@pytest.mark.parametrize(
    "text",
    ["load = 2", "loud = 0.5", "schedule = ['x']", "threads = 0", "upload = 'much'", "= 3", "\xff", "battery = 1"],
)
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_limits(text.encode("latin-1"))
