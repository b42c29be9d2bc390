"""`potluck validate`: score what every peer of a run contributes."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli.daemon import hand_over
from potluck.cli.options import (
    AnnounceOption,
    DataOption,
    DeviceOption,
    DownloadOption,
    HomeOption,
    JsonOption,
    ListenOption,
    LoopbackOption,
    NameOption,
    OfDaemonOption,
    QuotaOption,
    RoundsOption,
    TelemetryOption,
    ThreadsOption,
    UploadOption,
    VramOption,
)


def validate(
    invite: Annotated[str, typer.Argument(help="potluck:<run id>?peer=<address>&...")],
    home: HomeOption = None,
    name: NameOption = "",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    data: DataOption = None,
    archive: Annotated[str, typer.Option("--archive", help="Disk space for what audits need, e.g. 20GB.")] = "20GB",
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    disk_quota: QuotaOption = "10GB",
    upload_limit: UploadOption = None,
    download_limit: DownloadOption = None,
    vram_limit: VramOption = None,
    rounds: RoundsOption = None,
    loopback: LoopbackOption = False,
    telemetry: TelemetryOption = True,
    of_daemon: OfDaemonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a run's contributions and write the ledger, until you leave (Ctrl-C, or `potluck leave`).

    Scores count if the run's manifest names this peer: `potluck identity show` prints its id, and the organizer puts
    it into incentives.validators before the run starts. A validator trains nothing, and needs room for the whole model.
    Look at the result with `potluck ledger show`.

    Example:  potluck validate --home ~/validator 'potluck:abc...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...'
    """
    from potluck.cli.session import run_peer

    if of_daemon is None and hand_over(home, "validate", invite):
        return
    run_peer(
        lambda peer: peer.join(invite),
        home=home,
        name=name,
        device=device,
        threads=threads,
        data=data,
        stage=None,
        validate=True,
        archive=archive,
        listen=listen,
        announce=announce,
        disk_quota=disk_quota,
        upload_limit=upload_limit,
        download_limit=download_limit,
        vram_limit=vram_limit,
        rounds=rounds,
        loopback=loopback,
        telemetry=telemetry,
        halvings=of_daemon or 0,
        as_json=as_json,
    )
