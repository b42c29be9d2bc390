"""`potluck limits`: when, and how much of the machine, this home's daemon may use."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption, parse_bytes
from potluck.errors import UserError

#: Settings that are sizes in bytes, or bytes per second.
_SIZES = ("upload", "upload_month", "download", "download_month", "disk_quota", "memory", "vram")
_WHOLE = ("threads", *_SIZES)


def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print every limit, and which of them are yours.

    Example:  potluck limits show
    """
    from msgspec import to_builtins

    from potluck.peer.home import Home, default_home
    from potluck.peer.limits import Limits, read_limits

    limits = to_builtins(read_limits(Home(home or default_home()).path))
    if as_json:
        print(json.dumps(limits))
        return
    runs = limits.pop("runs")
    for name, value in limits.items():
        own = "" if value == getattr(Limits(), name) else "   (yours)"
        print(f"{name:<16}{_shown(name, value)}{own}")
    for prefix, own_limits in runs.items():
        for name, value in own_limits.items():
            if value is not None:
                print(f"runs.{prefix}.{name}  {_shown(name, value)}")


def set_(
    changes: Annotated[list[str], typer.Argument(help="NAME=VALUE ..., for example 'schedule=22:00-07:00'.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change limits; a running daemon follows within seconds. `NAME=` sets the default again.

    Lists are divided by semicolons, sizes may have units. All limits are the machine's, and shared by its runs; one run
    can have less: runs.PREFIX.NAME, with the first characters of its id (upload, download, disk_quota, threads).
    Threads, niceness and vram hold from the next start of a worker on (`potluck pause && potluck resume`).

    Example:  potluck limits set 'schedule=mon-fri 22:00-07:00; sat,sun 00:00-24:00' idle_minutes=10 upload=2MB

    Example:  potluck limits set download=10MB runs.k3f9.download=2MB
    """
    from msgspec import to_builtins

    from potluck.peer.home import Home, default_home
    from potluck.peer.limits import Limits, RunLimits, limits_of, limits_toml, read_limits, write_limits

    where = Home(home or default_home()).open()
    values = to_builtins(read_limits(where.path))
    default, default_of_run = to_builtins(Limits()), to_builtins(RunLimits())
    for change in changes:
        name, equals, text = (part.strip() for part in change.partition("="))
        prefix, _, of_run = name.removeprefix("runs.").partition(".")
        if name.startswith("runs.") and (of_run in default_of_run or not (of_run or text)):
            own = values["runs"].setdefault(prefix, {})
            own |= {of_run: _value(of_run, text, None) if text else None} if of_run else dict.fromkeys(own)
            if not any(own.values()):
                del values["runs"][prefix]
        elif equals and name in default and name != "runs":
            values[name] = _value(name, text, default[name]) if text else default[name]
        else:
            names = [*default, *(f"runs.PREFIX.{one}" for one in default_of_run)]
            names.remove("runs")
            raise UserError(f"{change!r}: give NAME=VALUE; names are {', '.join(names)}")
    limits = limits_of(values)
    write_limits(where.path, limits)
    print(json.dumps(to_builtins(limits)) if as_json else limits_toml(limits) or "all limits are the defaults")


def _value(name: str, text: str, default: object) -> object:
    if isinstance(default, list):
        return [part.strip() for part in text.split(";") if part.strip()]
    if name in _SIZES:
        return parse_bytes(name, text)
    if isinstance(default, bool):
        if text.lower() not in ("yes", "no", "true", "false"):
            raise UserError(f"{name}={text}: give yes or no")
        return text.lower() in ("yes", "true")
    try:
        number = int(text) if isinstance(default, int) or name in _WHOLE else float(text)
    except ValueError:
        raise UserError(f"{name}={text}: give a number") from None
    if not math.isfinite(number):
        raise UserError(f"{name}={text}: give a number")
    return number


def _shown(name: str, value: object) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value)
    return f"{value / 1e6:,g} MB" if name in _SIZES and isinstance(value, int) else f"{value}"
