"""`potluck demo`: a whole run on this machine, with everything that may go wrong on the way."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.display import megabytes, spark_line
from potluck.cli.options import JsonOption
from potluck.errors import LedgerError, NetworkError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from potluck.incentives.report import Row
    from potluck.peer.demo import Demo
    from potluck.peer.party import Member

    Board = list[tuple[str, Row]]


def demo(
    fast: Annotated[bool, typer.Option("--fast", help="A shorter run, at most 90 seconds.")] = False,
    stages: Annotated[
        int, typer.Option("--stages", min=1, max=4, help="Cut the model into so many stages, two peers to each.")
    ] = 1,
    validate: Annotated[
        bool, typer.Option("--validate", help="With a validator, which scores what each peer contributes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the exported model: new, or an earlier demo's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small model with an organizer and workers on this machine: see a whole run in minutes.

    A worker joins late, one is killed and comes back, the organizer is killed for good. Ends with the loss curve, a
    sample and the exported model; with --validate also with who earned how much, by a ledger that was verified and
    audited. With --json the last line is one JSON object.

    Example:  potluck demo --fast

    Example:  potluck demo --validate
    """
    out = (out or Path("demo-output")).absolute()
    _check_out(out)
    from potluck.peer.demo import FAST, FULL, Demo, of_stages, validated

    script = FAST if fast else FULL
    if stages > 1:
        script = of_stages(script, stages)
    if validate:
        script = validated(script)

    live = not as_json and sys.stdout.isatty()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        if not live:
            print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    # A polite kill is a Ctrl-C: asyncio cancels what runs. Raising KeyboardInterrupt right here, between the fork
    # of a peer and the line that notes it, would leave that peer behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # The peers' homes lie in a short path of their own: unix sockets allow 107 characters.
    homes = Path(tempfile.mkdtemp(prefix="potluck-demo-"))
    try:
        figures, board = asyncio.run(_run(homes, out / "model", script, Demo, say, live, lines))
        sample = _sample(out / "model")
    except KeyboardInterrupt:
        print("demo interrupted; all its processes are gone", file=sys.stderr)
        sys.exit(130)
    finally:
        shutil.rmtree(homes, ignore_errors=True)
    if as_json:
        print(json.dumps({**figures, "model": str(out / "model"), "sample": sample}))
    else:
        _summary(out, figures, sample, board)
    if not (figures["recovered"] and figures["survived_organizer"]):
        raise NetworkError("the demo's peers did not recover from its faults (see the figures above)")
    if validate and not (figures["ledger_verified"] and figures["ledger_audited"]):
        raise LedgerError("the demo's ledger does not hold (see the figures above)")


def _check_out(out: Path) -> None:
    """Only what an earlier demo left there may be written over."""
    try:
        there = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: choose another folder") from None
    is_model = (out / "model" / "potluck-manifest.json").is_file()
    if others := there - ({"model", "validator.ledger"} if is_model else set()):
        raise UserError(f"--out {out}: {min(others)!r} in it is no demo's output: choose a new or an empty folder")


async def _run(
    root: Path, out: Path, script: Any, kind: type[Demo], say: Any, live: bool, lines: list[str]
) -> tuple[dict[str, Any], Board]:
    from rich.live import Live

    shown = Live(refresh_per_second=4) if live else nullcontext()
    printed: set[int] = set()

    def on_change() -> None:
        if isinstance(shown, Live):
            shown.update(_table(party, lines))
        else:
            _print_rounds(party, printed, say)

    party = kind(root, out, script, on_change, say)
    with shown:
        return await party.run(), party.board


def _print_rounds(party: Demo, printed: set[int], say: Any) -> None:
    """Without a terminal: one line for each round, when the first peer has applied it."""
    for member in party.members:
        last = member.last
        if last and last["round"] not in printed:
            printed.add(last["round"])
            say(f"  round {last['round']:>3}  loss {last['loss']:.4f}  group of {len(last['group'])}")


def _table(party: Demo, lines: list[str]) -> Table:
    from rich.table import Table

    table = Table(title="\n".join(lines[-4:]), title_justify="left", title_style="")
    for column in ("peer", "state", "round", "loss", "tokens/s", "up", "down", "group"):
        table.add_column(column, justify="left" if column in ("peer", "state", "group") else "right")
    names = {m.status.get("peer"): m.name for m in party.members}
    for member in party.members:
        last = member.last
        if not last:
            table.add_row(member.name, member.state, *_scored(member))
            continue
        rate = last["tokens"] / max(1e-9, last["seconds"]["train"])
        group = " ".join(sorted(str(names.get(p, p[-6:])).replace("worker-", "w") for p in last["group"]))
        table.add_row(
            member.name,
            member.state,
            str(last["round"]),
            f"{last['loss']:.4f}",
            f"{rate:,.0f}",
            megabytes(last["bytes_sent"]),
            megabytes(last["bytes_received"]),
            "ALONE" if last["alone"] else group,
        )
    return table


def _scored(member: Member) -> list[str]:
    """The other columns of a peer that has applied no round: a validator's say which one it scored."""
    last = member.last_of("incentives.round.scored")
    if not last:
        return [""] * 6
    return [str(last["round"]), "", "", "", "", f"scores {len(last['shares'])}, {last['ledger_size']} ledger entries"]


def _sample(model: Path) -> str:
    """Some of the exported model's text."""
    from transformers import AutoModelForCausalLM

    from potluck.dht.manifest import Manifest
    from potluck.peer.export import generate_text
    from potluck.peer.visitor import Sampling

    manifest = Manifest.model_validate_json((model / "potluck-manifest.json").read_bytes())
    module = AutoModelForCausalLM.from_pretrained(model).eval()
    return generate_text(module, manifest, "def ", Sampling(160, 0.7, seed=0))


def _summary(out: Path, figures: dict[str, Any], sample: str, board: Board) -> None:
    agree = (
        "bit-identical parameters after every round"
        if figures["digests_agree"]
        else f"parameters differed after rounds {figures['rounds_disagreeing']}, and came together again"
    )
    print()
    print(f"loss      {figures['loss_start']:.3f} → {figures['loss_end']:.3f}  {spark_line(figures['loss_curve'])}")
    print(f"rounds    {figures['rounds']} with {figures['peers']} peers")
    print(f"digests   {agree}")
    print(f"traffic   {figures['bytes_per_param_per_round']:.3f} bytes received per parameter, round and peer")
    print(f"late join {figures['late_join_seconds']} s from its start to its first contribution")
    print(f"recovered {figures['recovered']}; survived the organizer: {figures['survived_organizer']}")
    if "stages" in figures:
        twice = figures["microbatches_counted_twice"]
        print(f"pipeline  {figures['stages']} stages, {figures['microbatches']} microbatches, {twice} counted twice")
    if "credit" in figures:
        _credit_summary(out, figures, board)
    print(f"sample    {sample!r}")
    print(f"model     {out / 'model'}  (transformers.AutoModelForCausalLM.from_pretrained loads it)")


def _credit_summary(out: Path, figures: dict[str, Any], board: Board) -> None:
    for name, row in board:
        done = f"{row.contributed} contributed, {row.refused} refused, {row.missed} missed"
        print(f"credit    {row.share:6.1%}  {name:<10}  {row.credit:9.1f}  {done}; {row.verdict}")
    verified = "verified" if figures["ledger_verified"] else "DOES NOT VERIFY"
    audited = "scoring a late round again gives the same" if figures["ledger_audited"] else "THE AUDIT FAILED"
    print(f"ledger    {figures['ledger_entries']} entries, {verified}; {audited}")
    print(f"          {out / 'validator.ledger'}  (potluck ledger show FILE; explain PEER --ledger FILE says why)")
