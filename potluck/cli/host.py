"""`potluck host`: start a run from a manifest, and take part in it."""

from __future__ import annotations

from pathlib import Path
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
    UploadOption,
    VramOption,
)


def host(
    manifest: Annotated[Path, typer.Argument(help="Manifest TOML, as `potluck run new` writes it.")],
    home: HomeOption = None,
    name: NameOption = "organizer",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    data: DataOption = None,
    stage: StageOption = None,
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
    """Start a run: sign the manifest, print the invite, and train as its first peer.

    A manifest that this home already started is resumed, not started again. Once others have joined, the run no
    longer needs this peer.

    Example:  potluck host my-run.toml --listen /ip4/0.0.0.0/tcp/4001
    """
    from potluck.cli.session import run_peer

    if of_daemon is None and hand_over(home, "host", str(manifest)):
        return
    run_peer(
        lambda peer: peer.host(manifest),
        home=home,
        name=name,
        device=device,
        threads=threads,
        data=data,
        stage=stage,
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
