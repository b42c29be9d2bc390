"""When this peer may work on its machine, and how much of it: a volunteer's limits, and the decision. Pure.

`limits.toml` in the home holds what differs from the defaults. `sensors.py` looks at the machine, `decide` says whether
work goes on, and by which rule it does not. A rule that cannot be sensed on this machine never pauses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from potluck.errors import UserError
from potluck.peer.home import write_atomically
from potluck.toml import toml_value

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SPAN = re.compile(r"(?:(?P<days>[a-z,\- ]+?)\s+)?(?P<start>\d\d?:\d\d)\s*-\s*(?P<stop>\d\d?:\d\d)", re.IGNORECASE)
_DAY_MINUTES: Final = 24 * 60


Rate = Annotated[int, Meta(ge=10_000)]
Disk = Annotated[int, Meta(ge=1_000_000)]
Threads = Annotated[int, Meta(ge=1, le=4096)]
#: The first characters of a run's id.
RunPrefix = Annotated[str, Meta(pattern="^[a-z0-9]{1,64}$")]


class RunLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of one run, within the machine's, in the same units. None: no such limit."""

    upload: Rate | None = None
    download: Rate | None = None
    disk_quota: Disk | None = None
    threads: Threads | None = None


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes are bytes, rates bytes per second, temperatures degrees Celsius. None: no such limit. All are the
    machine's: its runs share them."""

    schedule: list[str] = []
    """Local times at which it works, such as "22:00-07:00" or "sat,sun 00:00-24:00"; empty: always."""
    battery: bool = False
    """Whether it works on battery."""
    idle_minutes: Annotated[float, Meta(ge=0, le=1440)] = 0.0
    """Works only while nobody used keyboard, mouse or a terminal for so long; 0: also beside somebody."""
    programs: list[str] = []
    """Pauses while a program of such a name runs."""
    fullscreen: bool = False
    """Whether it works while a program fills the screen, such as a game or a film."""
    shared_gpu: bool = False
    """Whether it works while other programs compute on the GPU."""
    load: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Pauses while others take more than this part of all CPU cores."""
    temperature: Annotated[float, Meta(ge=30, le=120)] = 90.0
    """Pauses while the hottest sensor shows more."""
    gpu_power: Annotated[float, Meta(ge=1, le=100_000)] | None = None
    """Pauses while the GPUs draw more watts."""
    settle_minutes: Annotated[float, Meta(ge=0, le=60)] = 1.0
    """For so long must load, heat, a program or another's GPU work be over before it goes on."""
    memory: Annotated[int, Meta(ge=100_000_000)] | None = None
    """Main memory; beyond it, the largest worker begins again with half the micro-batch."""
    vram: Annotated[int, Meta(ge=100_000_000)] | None = None
    """Memory of a GPU; a worker that would take more runs out of it."""
    threads: Threads | None = None
    """CPU threads for training."""
    niceness: Annotated[int, Meta(ge=0, le=19)] = 10
    """0: as important as everything else; 19: only what nobody else wants."""
    upload: Rate | None = None
    """Cap on what is sent."""
    download: Rate | None = None
    """Cap on what is received."""
    upload_month: Annotated[int, Meta(ge=1_000_000)] | None = None
    """Bytes sent in a calendar month after which it pauses until the next one."""
    download_month: Annotated[int, Meta(ge=1_000_000)] | None = None
    """The same of bytes received."""
    disk_quota: Disk = 10 * 10**9
    """Disk for contributions."""
    runs: dict[RunPrefix, RunLimits] = {}
    """Of single runs."""


@dataclass(frozen=True)
class Sensed:
    """What the sensors see at `now` (local time); None where this machine cannot tell."""

    now: datetime
    on_battery: bool | None = None
    idle_seconds: float | None = None
    programs: Sequence[str] = ()
    """Names of the running programs that `Limits.programs` lists."""
    on_gpu: Sequence[str] = ()
    """Other programs that compute on a GPU."""
    fullscreen: str | None = None
    """The program that fills the screen."""
    load: float | None = None
    """Part of all CPU cores that others take, averaged over some seconds."""
    temperature: float | None = None
    gpu_watts: float | None = None
    sent_this_month: int = 0
    received_this_month: int = 0


@dataclass(frozen=True)
class Decision:
    """`rule` is empty while work may go on; else the setting, or "you", and `text` says why. `until`: local time, where
    it is known. `settled`: since when a rule that must settle no longer holds."""

    rule: str = ""
    text: str = ""
    until: datetime | None = None
    settled: datetime | None = None

    @property
    def works(self) -> bool:
        return not self.rule


#: Rules that come and go quickly: they must be over for a while.
_SETTLING: Final = ("programs", "fullscreen", "shared_gpu", "load", "temperature", "gpu_power")
PAUSED_BY_HAND: Final = "you"


def decide(limits: Limits, sensed: Sensed, before: Decision = Decision(), *, paused: bool = False) -> Decision:
    """Whether it may work now. `before`: the last decision; `paused`: by `potluck pause`."""
    if paused:
        return Decision(PAUSED_BY_HAND, "`potluck resume` goes on")
    found = _broken(limits, sensed)
    if not found.works or before.rule not in _SETTLING:
        return found
    since = before.settled or sensed.now
    over = since + timedelta(minutes=limits.settle_minutes)
    if sensed.now >= over:
        return found
    return Decision(before.rule, f"{_plain(before.text)} (over, if it stays so)", over, since)


def _plain(text: str) -> str:
    return text.removesuffix(" (over, if it stays so)")


def _broken(limits: Limits, sensed: Sensed) -> Decision:
    """The first rule that forbids work."""
    opens = next_opening(limits.schedule, sensed.now)
    if opens is not None:
        return Decision("schedule", f"outside of its hours ({', '.join(limits.schedule)})", opens)
    for rule, did, count, cap in (
        ("upload_month", "sent", sensed.sent_this_month, limits.upload_month),
        ("download_month", "received", sensed.received_this_month, limits.download_month),
    ):
        if cap is not None and count >= cap:
            text = f"{did} {count / 1e9:,.3g} GB this month, the cap is {cap / 1e9:,.3g} GB"
            return Decision(rule, text, _next_month(sensed.now))
    if sensed.on_battery and not limits.battery:
        return Decision("battery", "the machine runs on battery")
    wait = timedelta(minutes=limits.idle_minutes)
    if sensed.idle_seconds is not None and sensed.idle_seconds < wait.total_seconds():
        left = wait - timedelta(seconds=sensed.idle_seconds)
        return Decision("idle_minutes", "somebody uses the machine", sensed.now + left)
    if sensed.programs:
        return Decision("programs", f"{', '.join(sorted(sensed.programs))} runs")
    if sensed.fullscreen is not None and not limits.fullscreen:
        return Decision("fullscreen", f"{sensed.fullscreen or 'a program'} fills the screen")
    if sensed.on_gpu and not limits.shared_gpu:
        return Decision("shared_gpu", f"{', '.join(sorted(sensed.on_gpu))} computes on the GPU")
    if sensed.temperature is not None and sensed.temperature > limits.temperature:
        return Decision("temperature", f"{sensed.temperature:.0f} °C, more than {limits.temperature:.0f}")
    if limits.gpu_power is not None and sensed.gpu_watts is not None and sensed.gpu_watts > limits.gpu_power:
        return Decision("gpu_power", f"the GPU draws {sensed.gpu_watts:.0f} W, more than {limits.gpu_power:g}")
    if limits.load is not None and sensed.load is not None and sensed.load > limits.load:
        return Decision("load", f"others take {sensed.load:.0%} of the cores, more than {limits.load:.0%}")
    return Decision()


# ---- sharing --------------------------------------------------------------------------------------------------------


def of_run(limits: Limits, run: str) -> RunLimits:
    """By the longest prefix of its id that there is a table for."""
    found = max((prefix for prefix in limits.runs if run.startswith(prefix)), key=len, default=None)
    return limits.runs[found] if found is not None else RunLimits()


def divide(limits: Limits, runs: Sequence[str]) -> list[RunLimits]:
    """What each of the runs that work at once may have: even shares, and what one may not use is the others'."""
    own = [of_run(limits, run) for run in runs]
    parts = {
        name: shares(getattr(limits, name), [getattr(one, name) for one in own]) for name in RunLimits.__struct_fields__
    }
    return [RunLimits(**{name: part[n] for name, part in parts.items()}) for n in range(len(runs))]


def shares(total: int | None, own: Sequence[int | None]) -> list[int | None]:
    """`own`: what each may have at most, None for no limit."""
    if total is None:
        return list(own)
    parts: list[int | None] = [None] * len(own)
    left = total
    for done, n in enumerate(sorted(range(len(own)), key=lambda n: (own[n] is None, own[n] or 0))):
        most, even = own[n], left // (len(own) - done)
        part = even if most is None else min(most, even)
        parts[n], left = max(1, part), left - part
    return parts


def carries(limits: Limits) -> int:
    """How many runs these limits are enough for, each with the least that a run needs."""
    least = ((limits.upload, 10_000), (limits.download, 10_000), (limits.disk_quota, 1_000_000))
    return min(total // each for total, each in least if total is not None)


# ---- schedules ------------------------------------------------------------------------------------------------------


def next_opening(schedule: Sequence[str], now: datetime) -> datetime | None:
    """None while one of the spans holds, or where there are none; else when the next one begins."""
    if not schedule:
        return None
    week = open_minutes(schedule)
    minute = now.weekday() * _DAY_MINUTES + now.hour * 60 + now.minute
    if week[minute]:
        return None
    begin = now.replace(second=0, microsecond=0)
    ahead = next((n for n in range(1, len(week) + 1) if week[(minute + n) % len(week)]), None)
    return begin + timedelta(minutes=ahead) if ahead is not None else begin + timedelta(weeks=52)


def open_minutes(schedule: Sequence[str]) -> list[bool]:
    """Of each minute of a week, from Monday 00:00: whether work is allowed. Raises UserError, naming the span."""
    week = [False] * (7 * _DAY_MINUTES)
    for span in schedule:
        match = _SPAN.fullmatch(span.strip())
        if not match:
            raise UserError(f"schedule {span!r}: give times like 22:00-07:00 or sat,sun 00:00-24:00")
        start, stop = (_minutes(span, match[name]) for name in ("start", "stop"))
        length = (stop - start) % _DAY_MINUTES or _DAY_MINUTES
        for day in _days(span, match["days"]):
            for minute in range(start, start + length):
                week[(day * _DAY_MINUTES + minute) % len(week)] = True
    return week


def _minutes(span: str, text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if minutes > 59 or hours * 60 + minutes > _DAY_MINUTES:
        raise UserError(f"schedule {span!r}: there is no {text}")
    return hours * 60 + minutes


def _days(span: str, text: str | None) -> list[int]:
    if not text:
        return list(range(7))
    days: list[int] = []
    for part in text.lower().replace(" ", "").split(","):
        first, _, last = part.partition("-")
        try:
            begin, end = DAYS.index(first), DAYS.index(last or first)
        except ValueError:
            raise UserError(f"schedule {span!r}: {part!r} is no day; days are {', '.join(DAYS)}") from None
        days += [(begin + n) % 7 for n in range((end - begin) % 7 + 1)]
    return days


def _next_month(now: datetime) -> datetime:
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


# ---- the file -------------------------------------------------------------------------------------------------------

FILE: Final = "limits.toml"


def parse_limits(text: bytes) -> Limits:
    """Of `limits.toml`. Raises UserError, naming the setting."""
    return _checked(lambda: msgspec.toml.decode(text, type=Limits))


def limits_of(values: Mapping[str, Any]) -> Limits:
    """Of plain values by name. Raises UserError, naming the setting."""
    return _checked(lambda: msgspec.convert(values, Limits))


def _checked(decode: Callable[[], Limits]) -> Limits:
    try:
        limits = decode()
    except (msgspec.MsgspecError, ValueError) as error:
        what, _, name = str(error).partition(" - at `$.")
        raise UserError(f"{name.strip('`')}: {what}" if name else what) from None
    open_minutes(limits.schedule)
    return limits


def read_limits(home: Path) -> Limits:
    """Of a home; the defaults where it has none. Raises UserError, naming the setting."""
    try:
        return parse_limits((home / FILE).read_bytes())
    except FileNotFoundError:
        return Limits()
    except UserError as error:
        raise UserError(f"{home / FILE}: {error}; edit it, or remove it for the defaults") from None
    except OSError as error:
        raise UserError(f"{home / FILE} cannot be read: {error.strerror}") from None


def write_limits(home: Path, limits: Limits) -> None:
    """Raises UserError where that fails, or could not be read again; then the old ones stay."""
    text = limits_toml(limits).encode()
    parse_limits(text)
    write_atomically(home / FILE, text)


def limits_toml(limits: Limits) -> str:
    """What differs from the defaults."""
    default, fields = msgspec.structs.asdict(Limits()), msgspec.structs.asdict(limits)
    runs: Mapping[str, RunLimits] = fields.pop("runs")
    lines = [_line(name, value) for name, value in fields.items() if value != default[name]]
    for prefix, own in runs.items():
        lines.append(f"\n[runs.{prefix}]\n")
        lines += [_line(name, value) for name, value in msgspec.structs.asdict(own).items() if value is not None]
    return "".join(lines).lstrip("\n")


def _line(name: str, value: object) -> str:
    return f"{name} = {toml_value(value)}\n"
