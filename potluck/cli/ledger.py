"""`potluck ledger`: what a validator scored and paid, why, and whether its ledger is what it signed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.display import spark_line
from potluck.cli.options import HomeOption, JsonOption, RunOption
from potluck.errors import UserError

if TYPE_CHECKING:
    import msgspec

    from potluck.incentives.ledger import Head
    from potluck.incentives.report import PeerRound

FileArgument = Annotated[
    Path | None,
    typer.Argument(help="A ledger, as a validator keeps or exports it (default: of this home's run).", metavar="FILE"),
]
LedgerOption = Annotated[
    Path | None,
    typer.Option("--ledger", help="A ledger, as a validator keeps or exports it (default: of this home's run)."),
]
PeerArgument = Annotated[str, typer.Argument(help="A peer id, or its first characters (12D3KooW may be left out).")]


def show(
    file: FileArgument = None, home: HomeOption = None, run: RunOption = None, as_json: JsonOption = False
) -> None:
    """Who earned what: credit, rounds, last score, and whether it was found to train.

    Where machines count for an account of their owner's (`potluck identity delegate`), also each account's sum.

    Example:  potluck ledger show

    Example:  potluck ledger show validator.ledger --json
    """
    from potluck.incentives.accounts import Accounts
    from potluck.incentives.ledger import Ledger
    from potluck.incentives.report import leaderboard, validators

    with Ledger.read(_path(file, home, run)) as ledger:
        rows, scoring = leaderboard(ledger.entries()), validators(ledger.entries())
        accounts = Accounts.of(ledger.entries()).rows()
        head = ledger.head
    if as_json:
        print(_encoded({**_fields(head), "peers": rows, "validators": scoring, "accounts": accounts}))
        return
    print(_text(head))
    table = [("peer", "credit", "share", "rounds", "refused", "missed", "score", "verdict")]
    for row in rows:
        done = str(row.contributed), str(row.refused), str(row.missed)
        table.append((row.peer, f"{row.credit:.6g}", f"{row.share:.1%}", *done, f"{row.score:.4g}", row.verdict))
    _print_table(table)
    if scoring:
        print()
        checked = [(one.peer, f"{one.earned:.6g}", str(one.passed), str(one.failed)) for one in scoring]
        _print_table([("validator", "earned", "checks passed", "failed"), *checked])
    if shared := [account for account in accounts if [one.peer for one in account.machines] != [account.account]]:
        print()
        sums = [("account", "credit", "")]
        for account in shared:
            sums.append((account.account, f"{account.credit:.6g}", ""))
            for one in account.machines:
                sums.append((f"  {one.peer}", f"{one.credit:.6g}", "" if one.linked else "until it was revoked"))
        _print_table(sums)


def peer(
    peer: PeerArgument,
    ledger: LedgerOption = None,
    home: HomeOption = None,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """One peer's rounds: what it sent, what that did to the loss, its score and its credit.

    Example:  potluck ledger peer 12D3KooWAbc

    Example:  potluck ledger peer Abc --ledger validator.ledger
    """
    from potluck.incentives.accounts import Accounts
    from potluck.incentives.ledger import Ledger
    from potluck.incentives.report import find_peer, history, leaderboard

    with Ledger.read(_path(ledger, home, run)) as opened:
        row = find_peer(leaderboard(opened.entries()), peer)
        rounds = history(opened.entries(), row.peer)
        account = Accounts.of(opened.entries()).account_of(row.peer)
    if as_json:
        for one in rounds:
            print(_encoded({"peer": row.peer, "account": account, **_fields(one)}))
        return
    counts = "" if account == row.peer else f", which counts for {account}"
    print(f"peer {row.peer}: credit {row.credit:.6g}, {row.share:.1%} of all{counts}")
    columns = ("round", "outcome", "module", "weight", "alignment", "random", "own", "factor", "score", "share", "paid")
    _print_table([columns, *map(_cells, rounds)])


def explain(
    peer: PeerArgument,
    ledger: LedgerOption = None,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="Show so many of the last rounds one by one.")] = 20,
    home: HomeOption = None,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Why a peer's score and credit are what they are: each factor, each penalty, each missed round.

    Example:  potluck ledger explain 12D3KooWAbc

    Example:  potluck ledger explain Abc --ledger validator.ledger --rounds 100
    """
    from potluck.incentives.accounts import Accounts
    from potluck.incentives.ledger import Ledger
    from potluck.incentives.report import credit_over_time, find_peer, history, leaderboard
    from potluck.incentives.report import explain as explained

    with Ledger.read(_path(ledger, home, run)) as opened:
        rows = leaderboard(opened.entries())
        row = find_peer(rows, peer)
        account = Accounts.of(opened.entries()).account_of(row.peer)
        lines = explained(row, rows.index(row) + 1, history(opened.entries(), row.peer), rounds, account)
        curve = credit_over_time(opened.entries(), [row.peer])[row.peer]
    if as_json:
        print(_encoded({"peer": row.peer, "account": account, "lines": lines, "credit": curve}))
        return
    print("\n".join(lines))
    if curve:
        print(f"credit    {spark_line([credit for _, credit in curve if math.isfinite(credit)][-60:])}")


def verify(
    file: FileArgument = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Another copy, or a proof, of the same validator: find two histories."),
    ] = None,
    home: HomeOption = None,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every hash and signature of a ledger, or of a proof that an entry is in one.

    With --against also that both come from one history. Exit code 10 if something was changed, is missing, or if the
    validator signed two histories.

    Example:  potluck ledger verify validator.ledger --against older.ledger

    Example:  potluck ledger verify proof.json
    """
    from potluck.incentives.ledger import check_inclusion, compare_files, verify_file

    path = _path(file, home, run)
    found = verify_file(path)
    fields: dict[str, Any] = {"heads": found.heads}
    said = f"verified: {found.head.size} entries, {found.heads} heads"
    if found.proof is not None:
        fields = {"index": found.proof.index, "entry": check_inclusion(found.proof)}
        said = f"verified: entry {found.proof.index} is in it: {_encoded(fields['entry'])}"
    if against is not None:
        compare_files(path, against)
        fields["agrees_with"] = str(against)
        said += f"\none history with {against}"
    if as_json:
        print(_encoded({**_fields(found.head), **fields}))
    else:
        print(_text(found.head))
        print(said)


def prove(
    index: Annotated[int | None, typer.Argument(help="Number of the entry, from 0.", metavar="INDEX")] = None,
    peer: Annotated[
        str | None, typer.Option("--peer", help="Instead of INDEX, with --round: this peer's score.")
    ] = None,
    round_: Annotated[int | None, typer.Option("--round", min=0, help="The round of that score.")] = None,
    ledger: LedgerOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the proof there (default: stdout).")] = None,
    home: HomeOption = None,
    run: RunOption = None,
) -> None:
    """Prove that an entry is in the ledger: JSON that `potluck ledger verify` checks without the ledger.

    Example:  potluck ledger prove 12 -o proof.json

    Example:  potluck ledger prove --peer 12D3KooWAbc --round 7 --ledger validator.ledger -o proof.json
    """
    from potluck.incentives.ledger import Ledger, replacing
    from potluck.incentives.report import find_peer, find_score, leaderboard

    if (index is None) == (peer is None) or (peer is None) != (round_ is None):
        raise UserError("give either INDEX, or --peer with --round")
    with Ledger.read(_path(ledger, home, run)) as opened:
        if index is None:
            assert peer is not None and round_ is not None
            index = find_score(opened.entries(), find_peer(leaderboard(opened.entries()), peer).peer, round_)
        proof = opened.prove(index).encode()
    if out is None:
        print(proof.decode(), end="")
        return
    with replacing(out) as file:
        file.write(proof)
    print(f"wrote {out}: entry {index}; check it with `potluck ledger verify {out}`")


def export(
    file: FileArgument = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="A row for each round, score and payment.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="All entries, and the head that covers them.")] = None,
    ledger: Annotated[Path | None, typer.Option("--file", help="The ledger as one file that others verify.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Credit over time of the ten who earned most: .png, .svg or .pdf.")
    ] = None,
    home: HomeOption = None,
    run: RunOption = None,
) -> None:
    """Write a ledger in other forms; several at once, if wanted.

    Example:  potluck ledger export --csv credit.csv --plot credit.png

    Example:  potluck ledger export --file validator.ledger
    """
    from potluck.incentives.ledger import Ledger, replacing
    from potluck.incentives.report import CURVES, credit_over_time, leaderboard, write_csv, write_json, write_plot

    source = _path(file, home, run)
    outputs = {"--csv": csv, "--json": json_, "--file": ledger, "--plot": plot}
    for option, path in outputs.items():
        if path is not None and path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{option} {path} is the ledger itself: choose another name")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {plot}: choose a name that ends in .png, .svg or .pdf")
    if not any(outputs.values()):
        raise UserError("nothing to write: give --csv, --json, --file or --plot, each with a file name")
    with Ledger.read(source) as opened:
        if ledger is not None:
            opened.export(ledger)
        if csv is not None:
            with replacing(csv) as out:
                write_csv(opened.entries(), out)
        if json_ is not None:
            with replacing(json_) as out:
                write_json(opened.head, opened.entries(), out)
        if plot is not None:
            best = [row.peer for row in leaderboard(opened.entries())[:CURVES]]
            with replacing(plot) as out:
                write_plot(credit_over_time(opened.entries(), best), out, plot.suffix[1:])
        print(f"wrote {', '.join(str(path) for path in outputs.values() if path)}: {opened.size} entries")


def _path(file: Path | None, home: Path | None, run: str | None) -> Path:
    if file is not None:
        return file
    from potluck.peer.home import Home, default_home

    folder = Home(home or default_home()).find_run(run)
    if not folder.ledger.exists():
        raise UserError(f"run {folder.run_id[:8]} has no ledger here: only validators keep one; name a ledger's FILE")
    return folder.ledger


def _encoded(value: object) -> str:
    """JSON, also of numbers that JSON has not."""
    import msgspec

    return msgspec.json.encode(value).decode()


def _fields(one: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__struct_fields__}


def _text(head: Head) -> str:
    from datetime import UTC, datetime

    made = datetime.fromtimestamp(head.made_at, UTC).isoformat(sep=" ", timespec="seconds")
    return f"validator {head.validator}\nrun {head.run}\n{head.size} entries, root {head.root}, signed {made}"


def _cells(one: PeerRound) -> tuple[str, ...]:
    deltas = ("" if delta is None else f"{delta:+.3e}" for delta in (one.random_delta, one.own_delta))
    what = f"{one.weight:.4f}", f"{one.alignment:+.3e}", *deltas, f"{math.prod(one.factors.values()):.3g}"
    return (
        str(one.round),
        one.outcome or "",
        one.module,
        *what,
        f"{one.score:.4g}",
        f"{one.share:.2%}",
        f"{one.paid:.4g}",
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """In columns, however narrow the terminal: peer ids are there to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]))
