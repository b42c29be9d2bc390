"""Options that several commands share, and what they mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from potluck.errors import UserError

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="POTLUCK_HOME", help="Folder of this peer: identity, checkpoints, blobs.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable: one JSON object per line on stdout.")]
RunOption = Annotated[
    str | None, typer.Option("--run", help="First characters of the run id (default: the latest run).")
]
NameOption = Annotated[str, typer.Option("--name", help="A name that others see beside your peer id.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:N, mps or cpu.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads for training (default: all cores).")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Train on this source instead: python-stdlib, text:PATH or hf:NAME."),
]
StageOption = Annotated[
    int | None,
    typer.Option("--stage", min=0, help="Of a pipeline: the stage to serve (default: where one more is missed most)."),
]
TrainOnlyOption = Annotated[
    bool,
    typer.Option("--train-only", help="Of a pipeline: serve no stage, only train through others' (a CPU will do)."),
]
ListenOption = Annotated[
    list[str] | None,
    typer.Option("--listen", help="Multiaddr to listen on, e.g. /ip4/0.0.0.0/tcp/4001 (default: any free port)."),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--announce", help="Public multiaddr of this peer, e.g. of its forwarder; it then relays for peers behind NATs."
    ),
]
QuotaOption = Annotated[str, typer.Option("--disk-quota", help="Disk space for contributions, e.g. 10GB.")]
UploadOption = Annotated[
    str | None, typer.Option("--upload-limit", help="Cap on what this peer sends, per second, e.g. 2MB.")
]
DownloadOption = Annotated[
    str | None, typer.Option("--download-limit", help="Cap on what this peer receives, per second, e.g. 10MB.")
]
VramOption = Annotated[
    str | None, typer.Option("--vram-limit", help="Cap on the memory that this peer takes of a GPU, e.g. 8GB.")
]
TelemetryOption = Annotated[
    bool,
    typer.Option(
        "--telemetry/--no-telemetry",
        help="Tell who watches the run how this peer is (round, loss, speed, version), and hear the others.",
    ),
]
RoundsOption = Annotated[int | None, typer.Option("--rounds", min=1, help="Leave after this many rounds.")]
OfDaemonOption = Annotated[
    int | None,
    typer.Option("--of-daemon", min=0, max=16, hidden=True, help="A worker: halve the micro-batch so often."),
]
LoopbackOption = Annotated[
    bool, typer.Option("--loopback", help="Listen on this machine only (for trying things out).")
]

MAX_BYTES = 10**18
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(setting: str, text: str) -> int:
    """`10GB`, `512 MB`, `100K`, `8GiB` (1024 each) or a plain number. Raises UserError that names the setting."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I(?=B))?)?B?\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"{setting} {text[:60]!r}: give a size like 10GB, 512MB, 8GiB or 100000")
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** _POWERS[(unit or "").upper()]
    if size > MAX_BYTES:
        raise UserError(f"{setting} {text[:60]!r}: at most 1000000TB")
    return int(size)
