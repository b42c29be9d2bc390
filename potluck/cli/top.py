"""`potluck top`: a run and its peers in the terminal, from what was heard of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from potluck.peer.home import RunFolder
    from potluck.peer.web.models import Peer, RunState
    from potluck.peer.web.watch import Watch

REFRESH_SECONDS = 1.0
WhichArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="An invite, or the first characters of a run id.")
]
OnceOption = Annotated[bool, typer.Option("--once", help="Print it once, and end.")]


def top(
    which: WhichArgument = None, home: HomeOption = None, once: OnceOption = False, as_json: JsonOption = False
) -> None:
    """Show a run that this home takes part in, or monitors: loss, speed, stages, and its peers.

    Example:  potluck top --once
    """
    from rich.console import Console
    from rich.live import Live

    from potluck.peer.home import default_home
    from potluck.peer.web.watch import Watch

    folder = find_folder(home or default_home(), which)
    signed = folder.manifest()
    assert signed is not None, "a run is found by its manifest"
    watch = Watch(folder, signed.manifest, None)
    try:
        if as_json:
            state, peers = look(watch)
            told = {"run": state.model_dump(mode="json"), "peers": [one.model_dump(mode="json") for one in peers]}
            print(json.dumps(told))
            return
        console = Console()
        if once or not console.is_terminal:
            console.print(drawn(watch, 500))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(drawn(watch, max(1, console.height - 14)), refresh=True)
                time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        watch.close()


def find_folder(home: Path, which: str | None) -> RunFolder:
    """Of a peer's home, or of one of its monitors: the latest that was heard of. Raises UserError, ManifestError."""
    from potluck.dht.invite import Invite
    from potluck.peer.home import Home

    prefix = Invite.parse(which).run_id if which and which.lower().startswith("potluck:") else (which or "")
    folders = [run for place in (home, home / "monitors") for run in Home(place).runs()]
    found = [run for run in folders if run.run_id.startswith(prefix)]
    if not found:
        raise UserError(
            f"RUN {which!r}: not known in {home}: join it, or watch it with `potluck monitor INVITE`"
            if which
            else f"no run yet in {home}: join one with `potluck join`, or watch one with `potluck monitor INVITE`"
        )
    if prefix and len({run.run_id for run in found}) > 1:
        raise UserError(f"RUN {which!r} fits several runs: give more characters of the run id")
    return max(found, key=lambda run: run.history.stat().st_mtime if run.history.exists() else 0.0)


def look(watch: Watch) -> tuple[RunState, Sequence[Peer]]:
    watch.look()
    return watch.state(), watch.peers(500, 0).peers


def drawn(watch: Watch, rows: int) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from potluck.cli.display import spark_line

    state, peers = look(watch)
    loss = "-" if state.loss is None else f"{state.loss:.4f}"
    heard = "nothing was heard of it yet" if state.heard_at is None else f"heard {_ago(state.heard_at)}"
    losses = [value for value in watch.curve(0, 60).loss if value is not None]
    head = Text.assemble(
        (f"{state.name} ({state.run[:8]})", "bold"),
        f"   round {'-' if state.round is None else state.round}   loss {loss}   {state.peers} peers   "
        f"{state.tokens_per_second:,.0f} tokens/s   {heard}",
    )
    table = Table(box=None, pad_edge=False)
    for title, width in (("peer", 8), ("name", 4), ("module", 7), ("phase", 5)):
        table.add_column(title, no_wrap=True, overflow="ellipsis", min_width=width, max_width=24)
    for title, width in (("loss", 7), ("tokens/s", 8), ("load", 4), ("rounds", 6), ("heard", 10)):
        table.add_column(title, justify="right", no_wrap=True, min_width=width)
    for one in peers[:rows]:
        table.add_row(
            *(Text(text) for text in (one.peer[-8:], one.name, one.module or "-", one.phase if one.here else "away")),
            "-" if one.loss is None else f"{one.loss:.4f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.load:.2f}",
            str(one.contributed),
            _ago(one.last),
            style=None if one.here else "dim",
        )
    lines: list[RenderableType] = [head, Text(spark_line(losses))]
    if len(state.modules) > 1:
        stages = [f"{one.module}: {one.replicas} replicas, load {one.load:.2f}" for one in state.modules[:8]]
        lines.append(Text("   ".join(stages)))
    if state.unserved:
        lines.append(Text(f"nobody serves {', '.join(state.unserved[:8])}", style="bold red"))
    lines += [Text(""), table]
    if len(peers) > rows:
        lines.append(Text(f"and {len(peers) - rows} more", style="dim"))
    return Group(*lines)


def _ago(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
