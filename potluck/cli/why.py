"""`potluck why`: what the peer waits for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from potluck.cli.daemon import ask_daemon
from potluck.cli.display import printable, sat_out_line
from potluck.cli.options import HomeOption, JsonOption, RunOption
from potluck.cli.status import daemon_line, idle_line
from potluck.errors import NetworkError


def why(home: HomeOption = None, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Say what the running peer waits for, since when, until when, and what happens then.

    Example:  potluck why
    """
    from potluck.peer.control import ask
    from potluck.peer.home import Home, default_home

    where = Home(home or default_home())
    daemon = ask_daemon(where, "status")
    if daemon and not daemon["works"]:
        print(json.dumps({"phase": "paused", **daemon}) if as_json else daemon_line(daemon))
        return
    folder = where.find_run(run)
    kept = next((one for one in daemon["runs"] if one["run"] == folder.run_id), None) if daemon else None
    try:
        answer = asyncio.run(ask(folder.control_socket, "why"))
    except NetworkError:
        if kept is None:
            raise
        print(json.dumps({"phase": kept["state"], **kept}) if as_json else idle_line(kept))
        return
    answer["names"] = _names(folder.history, [*answer["missing"], *answer.get("late", {})])
    print(json.dumps(answer) if as_json else _text(answer))


def _names(history: Path, peers: Iterable[str]) -> dict[str, str]:
    """What those who were heard of call themselves."""
    import sqlite3

    from potluck.peer.history import History

    try:
        with closing(History.read(history)) as heard:
            found = {peer: one.latest.name for peer in peers if (one := heard.peer(peer))}
    except sqlite3.Error:  # nothing was heard, as without telemetry
        return {}
    return {peer: name for peer, told in found.items() if (name := printable(told))}


def _text(answer: dict[str, Any]) -> str:
    now, names = answer["now"], answer.get("names", {})
    lines = [f"phase: {answer['phase']}"]
    if answer.get("leaving"):
        after = answer["leaving_after_round"]
        lines.append("leaving as soon as it has joined" if after is None else f"leaving after round {after}")
    for wait in answer["waits"]:
        lines.append(
            f"waiting for {wait['what']}: since {now - wait['since']:.1f} s, "
            f"at most {max(0.0, wait['until'] - now):.1f} s more; then {wait['then']}"
        )
    if not answer["waits"]:
        lines.append("waiting for nothing")
    if answer["alone"]:
        lines.append(f"training alone for {answer['rounds_alone']} rounds: no other peer contributed")

    def shown(peer: str) -> str:
        return f"{peer} {names[peer]}" if peer in names else peer

    lines += [f"missing last round: {shown(peer)}: {reason}" for peer, reason in answer["missing"].items()]
    if answer.get("sat_out"):
        lines.append(sat_out_line(answer["sat_out"]))
    elif answer.get("counted") is False:
        lines.append("your contribution did not count last round: others did not have it in time (an upload cap?)")
    lines += [f"late in the round before: {shown(peer)}: by {by:.1f} s" for peer, by in answer.get("late", {}).items()]
    return "\n".join(lines)
