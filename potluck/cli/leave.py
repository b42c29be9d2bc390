"""`potluck leave`: finish the round, then stop."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.daemon import ask_daemon
from potluck.cli.options import HomeOption, JsonOption, RunOption
from potluck.errors import NetworkError

if TYPE_CHECKING:
    from potluck.peer.home import Home

#: Times in a row that a peer may not answer within five seconds before `--wait` gives up.
MAX_HANGS = 12


def leave(
    home: HomeOption = None,
    run: RunOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return only when the peer is gone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Leave the run after the round in progress, so that its contribution still counts.

    Example:  potluck leave --wait
    """
    from potluck.peer.control import PeerHangs, ask
    from potluck.peer.home import Home, default_home

    where = Home(home or default_home())
    if (removed := _remove_idle(where, run)) is not None:
        answer = {"leaving_after_round": None, "left": True, **removed}
        print(json.dumps(answer) if as_json else "left: it was not working")
        return
    socket = where.find_run(run).control_socket
    answer = asyncio.run(ask(socket, "leave"))
    if not as_json:
        after = answer["leaving_after_round"]
        print("leaving as soon as it has joined" if after is None else f"leaving after round {after}")
    hangs = 0
    while wait and socket.exists():
        try:
            asyncio.run(ask(socket, "why"))
        except PeerHangs:
            hangs += 1  # busy, not gone
            if hangs > MAX_HANGS:
                raise
            continue
        except NetworkError:
            break
        time.sleep(0.2)
    if as_json:
        print(json.dumps({**answer, "left": wait}))


def _remove_idle(home: Home, run: str | None) -> dict[str, Any] | None:
    """Of a home with a daemon: take off its list what has no process now. None where there is a peer to ask."""
    daemon = ask_daemon(home, "status")
    if daemon is None:
        return None
    kept = [one for one in daemon["runs"] if run is None or (one["run"] or "").startswith(run)]
    if not kept or any(one["pid"] for one in kept):
        return None
    return ask_daemon(home, "remove", run=kept[0]["run"] if len(kept) == 1 and kept[0]["run"] else run)
