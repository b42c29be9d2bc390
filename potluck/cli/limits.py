"""`potluck limits`: when, and how much of the machine, this home's daemon may use."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption, parse_bytes
from potluck.errors import UserError

#: Settings that are sizes in bytes, or bytes per second.
_SIZES = ("upload", "upload_month", "disk_quota")


def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print every limit, and which of them are yours.

    Example:  potluck limits show
    """
    from msgspec.structs import asdict

    from potluck.peer.home import Home, default_home
    from potluck.peer.limits import Limits, read_limits

    limits = asdict(read_limits(Home(home or default_home()).path))
    if as_json:
        print(json.dumps(limits))
        return
    for name, value in limits.items():
        own = "" if value == getattr(Limits(), name) else "   (yours)"
        print(f"{name:<16}{_shown(name, value)}{own}")


def set_(
    changes: Annotated[list[str], typer.Argument(help="NAME=VALUE ..., for example 'schedule=22:00-07:00'.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change limits; a running daemon follows within seconds. `NAME=` sets the default again.

    Lists are divided by semicolons, sizes may have units. Caps of uploads, threads and niceness hold from the next
    start of a worker on (`potluck pause && potluck resume`).

    Example:  potluck limits set 'schedule=mon-fri 22:00-07:00; sat,sun 00:00-24:00' idle_minutes=10 upload=2MB
    """
    from msgspec.structs import asdict

    from potluck.peer.home import Home, default_home, write_atomically
    from potluck.peer.limits import FILE, Limits, limits_toml, parse_limits, read_limits

    where = Home(home or default_home()).open()
    values = asdict(read_limits(where.path))
    default = asdict(Limits())
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in default:
            raise UserError(f"{change!r}: give NAME=VALUE; names are {', '.join(default)}")
        values[name] = _value(name, text.strip(), default[name]) if text.strip() else default[name]
    text = limits_toml(Limits(**values))
    limits = parse_limits(text.encode())  # types, bounds and times
    write_atomically(where.path / FILE, text.encode())
    print(json.dumps(asdict(limits)) if as_json else text or "all limits are the defaults")


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
        number = int(text) if isinstance(default, int) or name == "threads" else float(text)
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
