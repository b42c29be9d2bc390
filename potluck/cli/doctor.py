"""`potluck doctor`: whether this machine, and with an invite its line, can take part, and what to mend."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.options import (
    AnnounceOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    HomeOption,
    JsonOption,
    ListenOption,
    LoopbackOption,
    QuotaOption,
    ThreadsOption,
    UploadOption,
)
from potluck.cli.session import network_settings
from potluck.errors import UserError

if TYPE_CHECKING:
    from potluck.peer.checkup import Benchmark, Report

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    invite: Annotated[
        str | None, typer.Argument(help="Check joining this run, too: potluck:<run id>?peer=<address>&...")
    ] = None,
    home: HomeOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    disk_quota: QuotaOption = "10GB",
    upload_limit: UploadOption = None,
    download_limit: DownloadOption = None,
    loopback: LoopbackOption = False,
    benchmark: Annotated[
        bool, typer.Option("--benchmark/--no-benchmark", help="Measure the training speed, if it is not known yet.")
    ] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the training speed again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine before anything large is downloaded, and print the fix beside each finding.

    With an invite also its peers, the clock, how others reach this machine, and whether the run fits. Take the options
    that you would give `join`. Exit code 0 if nothing failed, else that of the first failure; a warning is no failure.

    Example:  potluck doctor

    Example:  potluck doctor 'potluck:abc...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...' --disk-quota 2GB
    """
    if fresh and not benchmark:
        raise UserError("--fresh and --no-benchmark exclude each other")
    network = network_settings(listen, announce, disk_quota, upload_limit, loopback, download_limit)
    from potluck.dht.invite import Invite
    from potluck.peer.checkup import check_up
    from potluck.peer.home import Home, default_home
    from potluck.peer.settings import PeerSettings

    parsed = Invite.parse(invite) if invite is not None else None
    settings = PeerSettings(device=device, threads=threads, data=data, network=network)
    speed: Benchmark = "fresh" if fresh else "measured" if benchmark else "cached"
    with ExitStack() as stack:
        from rich.console import Console

        shown = stack.enter_context(Console(stderr=True).status("")) if sys.stderr.isatty() and not as_json else None
        report = check_up(
            Home(home or default_home()), parsed, settings, speed, lambda doing: shown.update(doing) if shown else None
        )
    if as_json:
        import msgspec

        print(msgspec.json.encode(json_of(report)).decode(), flush=True)
    else:
        _show(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def json_of(report: Report) -> dict[str, Any]:
    facts = report.facts
    findings = [{"name": f.name, "status": f.status, "seen": f.seen, "fix": f.fix} for f in report.findings]
    return {
        "ok": report.exit_code == 0,
        "findings": findings,
        "machine": {
            **asdict(facts.machine),
            "python": facts.python,
            "device": facts.device,
            "peer": facts.home.peer,
            "home": facts.home.path,
            "disk_free_bytes": facts.home.free_bytes,
            "open_files": facts.open_files,
            "speed": asdict(facts.speed) if facts.speed else None,
        },
        "recommendation": asdict(report.recommendation) if report.recommendation else None,
    }


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    fixes = any(one.fix for one in report.findings)
    for title in ("", "check", "seen", *(["fix"] if fixes else [])):
        table.add_column(title, overflow="fold")
    for one in report.findings:
        fix = [Text(one.fix, style="cyan")] if fixes else []
        table.add_row(Text(one.status, style=_COLOURS[one.status]), Text(one.name), Text(one.seen), *fix)
    console = Console(highlight=False)
    console.print(table)
    if report.recommendation is not None:
        best = report.recommendation
        console.print(Text(f"\n{best.why}" + (f":\n  {best.command}" if best.command else "")), soft_wrap=True)
