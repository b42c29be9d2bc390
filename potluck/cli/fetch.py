"""`potluck ledger fetch`: copies of validators' ledgers, over the network."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import LedgerError, NetworkError, PotluckError, UserError

if TYPE_CHECKING:
    from potluck.peer.ledgers import Copy


def fetch(
    run: Annotated[
        str,
        typer.Argument(help="An invite, or the first characters of the id of a run of this home.", metavar="INVITE"),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write it there (default: a file for each validator, named after it)."),
    ] = None,
    validator: Annotated[
        str | None,
        typer.Option("--validator", help="This one's, trusted or not: a peer id, or its first characters."),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download the ledgers of a run's validators, each verified on the way.

    Of the validators that the run's manifest trusts, unless --validator names one. A file that is there already is
    brought up to date. Exit code 10 if a ledger does not verify, contradicts what its validator published, or does not
    continue that file, which then stays as it is.

    Example:  potluck ledger fetch 'potluck:abc...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...'

    Example:  potluck ledger fetch abc123 --validator 12D3KooWAbc -o validator.ledger
    """
    from potluck.peer.export import Source
    from potluck.peer.home import default_home
    from potluck.peer.ledgers import fetch_from, validators_of
    from potluck.peer.visitor import addresses_of

    failures: list[PotluckError] = []

    async def go() -> None:
        source = await Source.of(run, home or default_home())
        if source.folder and not source.addresses:
            source = replace(source, addresses=await addresses_of(source.folder))
        async with source.visit() as visitor:
            peers = await validators_of(visitor.around, validator)
            if out is not None and len(peers) > 1:
                raise UserError(
                    f"--out: this run has {len(peers)} validators: choose with --validator: {', '.join(peers)}"
                )
            for peer in peers:
                path = out or Path(f"{source.run_id[:8]}-{peer[-8:]}.ledger")
                try:
                    with _progress_bar(f"ledger of ..{peer[-8:]}", not as_json) as on_progress:
                        done = await fetch_from(visitor.around, peer, path, on_progress)
                    _tell(done, as_json)
                except (LedgerError, NetworkError, UserError) as error:  # the others' may be had
                    failures.append(error)

    asyncio.run(go())
    failures.sort(key=lambda error: isinstance(error, LedgerError))
    for error in failures[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if failures:
        raise failures[-1]


def _tell(done: Copy, as_json: bool) -> None:
    head, rounds = done.head, [claim.round for claim in done.claims]
    if as_json:
        said = {"path": str(done.path), "validator": head.validator, "run": head.run, "size": head.size}
        said |= {"root": head.root, "made_at": head.made_at, "new": head.size - done.old}
        print(json.dumps({**said, "published_round": max(rounds, default=None)}), flush=True)
        return
    print(f"wrote {done.path}: {head.size} entries of validator {head.validator}, {head.size - done.old} new; verified")
    if rounds:
        print(f"it agrees with what was published with the weights of round {max(rounds)}")
    else:
        print("its validator has published nothing lately to compare it with")


@contextmanager
def _progress_bar(what: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """On stderr, if that is a terminal. Gives a function that hears (entries done, entries in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("entries"))
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
