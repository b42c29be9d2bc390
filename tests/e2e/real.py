"""What the end-to-end tests share: short folders, and the promise that nothing is left behind."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from potluck.dht.template import template_toml
from potluck.peer.party import Member, Party

#: Small and quick: a third of the demo's model, so that a round fits into a few seconds on busy cores.
TINY = {
    "model.config.hidden_size": 64,
    "model.config.num_hidden_layers": 2,
    "model.config.intermediate_size": 128,
    "data.sequence_length": 64,
    "training.batch_size": 4,
    "rounds.seconds": 4.0,
    "rounds.exchange_seconds": 1.6,
    "rounds.steps": 10,
}


@contextmanager
def short_folder() -> Iterator[Path]:
    """Unix sockets allow 107 characters of path: pytest's own folders are too long."""
    folder = Path(tempfile.mkdtemp(prefix="pl", dir="/tmp"))
    try:
        yield folder
        deadline = time.monotonic() + 10
        while processes_of(folder):  # a daemon is killed when its peer has died: the kernel may still be at it
            assert time.monotonic() < deadline, [process.cmdline() for process in processes_of(folder)]
            time.sleep(0.05)
    finally:
        for process in processes_of(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Live processes whose command line names the folder: peers and their libp2p daemons."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in part for part in line):
            found.append(process)
    return found


def sockets_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


def write_manifest(folder: Path, **changed: Any) -> Path:
    """`changed`: settings with __ for the dot."""
    settings = TINY | {name.replace("__", "."): value for name, value in changed.items()}
    path = folder / "run.toml"
    path.write_text(template_toml("demo", "test", settings))
    return path


def digests(member: Member) -> dict[int, str]:
    """What a member held after each round, when it applied that first."""
    return {event["round"]: event["digest"] for event in reversed(member.applied)}


def run_party(body: Callable[[Party], Awaitable[None]]) -> None:
    """Run a test's body with real peers in a folder of their own."""

    async def go(folder: Path) -> None:
        async with Party(folder) as party:
            await body(party)

    with short_folder() as folder:
        asyncio.run(go(folder))


def potluck(*arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "potluck", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
