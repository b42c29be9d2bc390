"""`potluck ledger audit`: score rounds again, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli.options import DataOption, DeviceOption, HomeOption, JsonOption, RunOption
from potluck.errors import LedgerError

if TYPE_CHECKING:
    from potluck.incentives.audit import Audit


def audit(
    rounds: Annotated[list[int], typer.Option("--round", min=0, help="A round to score again (repeatable).")],
    file: Annotated[
        Path | None, typer.Argument(help="A ledger (default: of this home's run).", show_default=False)
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", help="Folder of the blobs that it follows from (default: beside the ledger)."),
    ] = None,
    home: HomeOption = None,
    run: RunOption = None,
    device: DeviceOption = "auto",
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score rounds once more from a ledger and the archived contributions, and compare every number.

    Needs the run's manifest, so a --home that joined the run, or the validator's own. Exit code 10 if anything differs.

    Example:  potluck ledger audit --round 40 --home ~/validator
    """
    import msgspec

    from potluck.incentives.ledger import Ledger
    from potluck.peer.home import Home, default_home
    from potluck.peer.validating import audit_rounds

    where = Home(home or default_home())
    path = file or where.find_run(run).ledger
    found: list[Audit] = []

    def tell(one: Audit) -> None:
        found.append(one)
        if as_json:
            print(msgspec.json.encode(one).decode(), flush=True)
            return
        result = f"largest error {one.largest_error:.2g}" if not one.differences else "DIFFERS"
        print(f"round {one.round} of {one.module}: {one.peers} peers, {result}", flush=True)
        for difference in one.differences:
            print(f"  {difference}")

    with Ledger.read(path) as ledger:
        beside = path.parent / "archive"
        given = archive or (beside if beside.is_dir() else None)
        audit_rounds(where.find_run(run or ledger.run), ledger, given, device, data, rounds, tell)
        if any(one.differences for one in found):
            raise LedgerError(f"validator {ledger.head.validator} wrote what does not follow from the rounds")
