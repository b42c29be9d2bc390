"""`potluck daemon`, and `pause`, `resume`, `finish` of a running one."""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import NetworkError

if TYPE_CHECKING:
    from potluck.peer.home import Home
    from potluck.peer.supervisor import Supervisor

#: Of a command that may end workers, one after another.
COMMAND_SECONDS = 15.0

OfRunOption = Annotated[str | None, typer.Option("--run", help="First characters of the run id (default: all runs).")]


#: Of the page, where nobody else has it.
PAGE_PORT = 7770

#: glibc's M_ARENA_MAX, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (malloc.h).
_MALLOC = {-8: 1, -1: 128 * 1024, -3: 64 * 1024}

PageOption = Annotated[bool, typer.Option("--page/--no-page", help="Serve this home's own page, on this machine only.")]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="Of the page; a free one if it is taken, or for 0.")
]


def daemon(
    home: HomeOption = None, page: PageOption = True, port: PortOption = PAGE_PORT, as_json: JsonOption = False
) -> None:
    """Keep this home's runs going while its limits allow it (foreground; `potluck service install` for every day).

    `potluck join INVITE` in the same home then hands the run over to the daemon. Limits: `potluck limits`. Its page in
    a browser: `potluck page`.

    Example:  potluck daemon
    """
    from potluck.peer.home import Home, default_home
    from potluck.peer.supervisor import Supervisor, make_log

    where = Home(home or default_home()).open()
    log = make_log(where)
    log.subscribe(lambda event: print(json.dumps(event) if as_json else _line(event), flush=True))

    _be_light()

    async def run() -> None:
        supervisor = Supervisor(where, log.emit)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(_page(supervisor, port)) if page else None
            supervisor.commands["page"] = lambda: _told(url)
            if url is not None:
                log.emit("daemon.page", url=url)
            await supervisor.run()

    asyncio.run(run())


def _be_light() -> None:
    """glibc gives each thread a heap of its own, and keeps what is freed: a daemon gives it back."""
    with suppress(OSError, AttributeError):
        for setting, value in _MALLOC.items():
            ctypes.CDLL(None).mallopt(setting, value)


@asynccontextmanager
async def _page(supervisor: Supervisor, port: int) -> AsyncIterator[str]:
    """Its URL. In the daemon's own process: nothing of it needs torch or the network."""
    from potluck.peer.web.app import create_app
    from potluck.peer.web.machine import DaemonMachine
    from potluck.peer.web.serve import room_for_viewers, serve
    from potluck.peer.web.token import token_of

    home = supervisor.home
    viewers = min(100, room_for_viewers())
    app = create_app(home.runs, machine=DaemonMachine(supervisor), token=token_of(home.path), max_viewers=viewers)
    async with serve(app, "127.0.0.1", port, any_port=True) as url:
        yield url


async def _told(url: str | None) -> dict[str, Any]:
    return {"url": url}


def pause(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Give the machine back within two seconds, all of the GPU's memory too, until `potluck resume`.

    The round at hand is lost; `potluck finish` completes it first.

    Example:  potluck pause
    """
    answer = _ask(home, "pause")
    print(json.dumps(answer) if as_json else "paused: `potluck resume` goes on")


def resume(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Go on after `pause` or `finish`, and try again what had stopped with an error.

    Example:  potluck resume
    """
    answer = _ask(home, "resume")
    if as_json:
        print(json.dumps(answer))
    elif answer["works"]:
        print("working")
    else:
        until = f" until {answer['until']}" if answer["until"] else ""
        print(f"resumed, but its limits say no: {answer['rule']}: {answer['reason']}{until}")


def finish(home: HomeOption = None, run: OfRunOption = None, as_json: JsonOption = False) -> None:
    """Complete the round at hand, so that its contribution counts, then stop until `potluck resume`.

    Example:  potluck finish
    """
    answer = _ask(home, "finish", run=run)
    rounds = answer["finishing"].values()
    done = ", ".join("the one at hand" if n is None else str(n) for n in rounds)
    print(json.dumps(answer) if as_json else f"finishing round {done}" if rounds else "stopped: no round was under way")


def _ask(home: Path | None, command: str, **arguments: Any) -> dict[str, Any]:
    from potluck.peer.home import Home, default_home

    where = Home(home or default_home())
    answer = ask_daemon(where, command, **arguments)
    if answer is None:
        raise NetworkError(
            f"no daemon runs in {where.path}: start it with `potluck daemon` (a peer without one is ended with "
            "`potluck leave` or Ctrl-C)"
        )
    return answer


def ask_daemon(home: Home, command: str, **arguments: Any) -> dict[str, Any] | None:
    """What the home's daemon answers; None if there is none. Raises UserError where it refuses."""
    from potluck.peer.control import PeerHangs, ask

    if not home.daemon_socket.exists():
        return None
    try:
        return asyncio.run(ask(home.daemon_socket, command, COMMAND_SECONDS, **arguments))
    except PeerHangs:
        raise
    except NetworkError:  # of one that was killed
        return None


def hand_over(home: Path | None, command: str, what: str) -> bool:
    """Whether this home has a daemon, which takes over what this command line says. `what`: an invite, or a file.

    Raises ManifestError for what is no invite: nobody looks at a daemon to find it out."""
    from potluck.dht.invite import Invite
    from potluck.peer.home import Home, default_home

    where = Home(home or default_home())
    if not where.daemon_socket.exists():
        return False
    if command != "host":
        Invite.parse(what)
    words = sys.argv[sys.argv.index(command) + 1 :]
    options = [_absolute(word) for word in _without(words, {"--home": 1, "--json": 0, what: 0})]
    first = str(Path(what).absolute()) if command == "host" else what
    answer = ask_daemon(where, "add", arguments=[command, first, *options])
    if answer is None:
        return False
    if "--json" in words:
        print(json.dumps(answer))
    elif answer["had"]:
        print(f"the daemon of {where.path} has it already: see `potluck status`")
    else:
        held = f"; it waits now: {answer['reason']}" if answer["reason"] else ""
        again = ", instead of what it did for this run" if answer["replaced"] else ""
        print(f"handed to the daemon of {where.path}{again}{held}")
        print("`potluck status` shows it, and an invite for others; `potluck leave` ends it")
    return True


def _absolute(word: str) -> str:
    """A daemon works in another folder."""
    before, text, path = word.rpartition("text:")
    return f"{before}text:{Path(path).absolute()}" if text and before in ("", "--data=") else word


def _without(words: list[str], values: Mapping[str, int]) -> list[str]:
    """A command line without some of its words; `values`: how many others go with each."""
    kept, skip = [], 0
    for word in words:
        name = word if word in values else word.partition("=")[0]
        if skip:
            skip -= 1
        elif name in values:
            skip = values[name] if word == name else 0
        else:
            kept.append(word)
    return kept


def _line(event: dict[str, Any]) -> str:
    """For people: the name's last words, and what it says."""
    told = {k: v for k, v in event.items() if k not in ("event", "time") and v not in (None, "", [], 0)}
    if event["event"] == "daemon.limits.read":
        told = {}
    words = " ".join(f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in told.items())
    return f"{event['event'].removeprefix('daemon.').replace('.', ' ')}  {words}".rstrip()
