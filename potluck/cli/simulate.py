"""`potluck simulate`: a swarm in virtual time, with its faults, from one seed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli.options import JsonOption
from potluck.errors import UserError


def simulate(
    plan: Annotated[Path, typer.Argument(help="Plan TOML, as in docs/plans/; or seed:N for a random one.")],
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Another seed than the plan's.")] = None,
    peers: Annotated[int | None, typer.Option("--peers", min=1, help="Another number of peers.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Another number of rounds.")] = None,
    dht: Annotated[
        str | None, typer.Option("--dht", help="real, or model: the DHT's calibrated cost, many times as fast.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("simulations"),
    as_json: JsonOption = False,
) -> None:
    """Run a plan: the real round, DHT and transfer code on a simulated network, thousands of peers in one process.

    Writes an HTML report with plots, and JSON, named after the plan. The same plan and seed give the same run, byte for
    byte. --peers and --rounds leave the faults as they are. Exit code 1 if an invariant was violated.

    Example:  potluck simulate docs/plans/blackout.toml --peers 100
    """
    import msgspec

    from potluck.sim.plan import Plan, random_plan
    from potluck.sim.report import figures, usable, write
    from potluck.sim.world import simulate as run

    text = str(plan)
    chosen = random_plan(_seed_of(text)) if text.startswith("seed:") else Plan.load(plan)
    changed = {"seed": seed, "peers": peers, "rounds": rounds, "dht": dht}
    chosen = Plan.of({**chosen.model_dump(), **{k: v for k, v in changed.items() if v is not None}}, text)
    if not as_json:
        print(f"{chosen.name}: {chosen.peers} peers, {chosen.rounds} rounds, seed {chosen.seed}", flush=True)
    usable(out)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a polite kill is a Ctrl-C
    report = run(chosen, on_round=None if as_json and not sys.stderr.isatty() else _say)
    report.replay = " ".join(
        ["potluck simulate", text, *(f"--{name} {value}" for name, value in changed.items() if value is not None)]
    )
    page, _ = write(report, out)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(msgspec.json.encode({**figures(report), "report": str(page)}).decode())
    else:
        for name, value in figures(report).items():
            print(f"{name:36} {value}")
        print(f"report: {page}")
    for violation in report.violations[:20]:
        print(f"VIOLATION {violation}", file=sys.stderr)
    if report.violations:
        print(f"replay it: {report.replay}", file=sys.stderr)
        raise typer.Exit(1)
    if report.interrupted:
        raise KeyboardInterrupt


def _seed_of(text: str) -> int:
    number = text.removeprefix("seed:")
    if not number.isdecimal() or int(number) >= 2**63:
        raise UserError(f"{text}: seed:N takes a whole number from 0 to 2^63 - 1")
    return int(number)


def _say(row: dict[str, Any]) -> None:
    loss = "   -   " if row["loss"] is None else f"{row['loss']:7.4f}"
    print(
        f"round {row['round']:>4}  loss {loss}  peers {row['peers']:>5}  applied {row['applied']:>5}  "
        f"contributed {row['contributed']:>5}  states {row['digests']:>4}  drift {row['drift']:.4f}  "
        f"{row['bytes_median'] / 1000:.0f} kB/peer",
        file=sys.stderr,
        flush=True,
    )
