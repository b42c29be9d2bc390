"""`potluck leave`: finish the round, then stop."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption, RunOption
from potluck.errors import NetworkError

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

    socket = Home(home or default_home()).find_run(run).control_socket
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
