"""A volunteer's own choices for one peer; the run's are in the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from potluck.peer.node import NetworkSettings


@dataclass(frozen=True)
class PeerSettings:
    """`stage`: of a pipeline, the one to serve for good; None: where one more is missed most, and it may change.
    `train_only`: serve none, and train through the others' stages. `validate`: train nothing, score the others.
    `halvings`: of the micro-batch that seems to fit, as it turned out not to. `telemetry`: tell how this peer is, and
    hear the others (`peer/telemetry.py`)."""

    name: str = ""
    device: str = "auto"
    threads: int | None = None
    data: str | None = None
    stage: int | None = None
    train_only: bool = False
    validate: bool = False
    archive_bytes: int = 20 * 10**9
    keep_checkpoints: int = 3
    halvings: int = 0
    telemetry: bool = True
    on_event: Callable[[dict[str, Any]], None] | None = None
    network: NetworkSettings = field(default_factory=NetworkSettings)
