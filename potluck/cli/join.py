"""`potluck join`: take part in a run."""

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
    StageOption,
    TelemetryOption,
    ThreadsOption,
    TrainOnlyOption,
    UploadOption,
    VramOption,
)


def join(
    invite: Annotated[str, typer.Argument(help="potluck:<run id>?peer=<address>&...")],
    home: HomeOption = None,
    name: NameOption = "",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    data: DataOption = None,
    stage: StageOption = None,
    train_only: TrainOnlyOption = False,
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
    """Join a run and train until you leave (Ctrl-C, or `potluck leave` to finish the round first).

    Joining again with the same home resumes: same identity, last checkpoint.

    Example:  potluck join 'potluck:abc...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...'
    """
    from potluck.cli.session import run_peer

    if of_daemon is None and hand_over(home, "join", invite):
        return
    run_peer(
        lambda peer: peer.join(invite),
        home=home,
        name=name,
        device=device,
        threads=threads,
        data=data,
        stage=stage,
        train_only=train_only,
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
