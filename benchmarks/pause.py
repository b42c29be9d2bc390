"""What a pause gives back, and how soon: a real daemon, a real run, real processes.

    python benchmarks/pause.py [--quick] [--cycles 100]

An organizer and a volunteer's daemon on loopback. In each cycle the daemon is told to pause, and the seconds are
counted from the command until no process of the worker is left (only then is all of its memory, and a GPU's, free
again); then it is told to resume, and the full rounds are counted that pass without a contribution of the volunteer.
Last, how much the daemon's memory and its open files have grown from the first cycle to the last one.

`--quick` (within 50 s): two cycles. The last line is JSON. Goals: pause_seconds <= 2 (the longest), resume_rounds 0:
who resumes contributes in the next full round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from potluck.dht.template import template_toml
from potluck.peer.control import ask
from potluck.peer.home import Home
from potluck.peer.party import Member, Party

ROUND_SECONDS = 8.0
MODEL = {
    "model.config.hidden_size": 64,
    "model.config.num_hidden_layers": 2,
    "model.config.intermediate_size": 128,
    "data.sequence_length": 64,
    "training.batch_size": 4,
    "rounds.steps": 10,
    "rounds.seconds": ROUND_SECONDS,
    "rounds.exchange_seconds": 2.0,
}
console = Console(stderr=True)


async def measure(folder: Path, cycles: int) -> dict[str, Any]:
    (folder / "run.toml").write_text(template_toml("demo", "pause", MODEL))
    async with Party(folder) as party:
        organizer = await party.start("org", "host", str(folder / "run.toml"))
        home = Home(folder / "v").open()
        daemon = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "potluck", "daemon", "--home", str(home.path), "--json"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            return await cycle(home, daemon.pid, organizer, cycles)
        finally:
            if daemon.returncode is None:
                daemon.terminate()
                await daemon.wait()


async def until(holds: Callable[[], bool], look_seconds: float = 0.05) -> None:
    while not holds():  # noqa: ASYNC110 (what is waited for are other processes)
        await asyncio.sleep(look_seconds)


async def first_round_of(peer: str, organizer: Member) -> int:
    """The next round that the organizer applies with a contribution of this peer."""
    since = len(organizer.applied)
    await until(lambda: any(peer in event["group"] for event in organizer.applied[since:]))
    return next(int(event["round"]) for event in organizer.applied[since:] if peer in event["group"])


async def gone(processes: Sequence[psutil.Process]) -> None:
    await until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes), 0.005)


async def cycle(home: Home, pid: int, organizer: Member, cycles: int) -> dict[str, Any]:
    await until(home.daemon_socket.exists)
    arguments = ["join", organizer.status["invite"], "--loopback", "--threads", "1", "--device", "cpu"]
    await ask(home.daemon_socket, "add", 15.0, arguments=arguments)
    volunteer = home.identity().peer_id
    daemon, pauses, waits, held, grown = psutil.Process(pid), [], [], [], []
    for number in range(cycles + 1):
        resumed_in = organizer.last.get("round", -1) + 1  # the round that is under way
        counted = await first_round_of(volunteer, organizer)
        if number:
            waits.append(max(0, counted - resumed_in - 1))
        if number == cycles:
            break
        workers = daemon.children(recursive=True)
        held.append(sum(p.memory_info().rss for p in workers if p.is_running()))
        began = time.monotonic()
        await ask(home.daemon_socket, "pause", 15.0)
        await gone(workers)
        pauses.append(time.monotonic() - began)
        grown.append((daemon.memory_info().rss, daemon.num_fds()))
        await ask(home.daemon_socket, "resume", 15.0)
        console.print(f"cycle {number + 1} of {cycles}: {pauses[-1]:.2f} s, {held[-1] / 1e6:.0f} MB given back")
    return {
        "cycles": cycles,
        "pause_seconds": round(max(pauses), 3),
        "pause_seconds_median": round(statistics.median(pauses), 3),
        "given_back_mb": round(statistics.median(held) / 1e6),
        "resume_rounds": max(waits),
        "resume_rounds_median": statistics.median(waits),
        "leaked_mb": round((grown[-1][0] - grown[0][0]) / 1e6, 2),
        "leaked_files": grown[-1][1] - grown[0][1],
        "daemon_mb": round(grown[-1][0] / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--cycles", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pl", dir="/tmp") as folder:
        found = asyncio.run(measure(Path(folder), 2 if options.quick else options.cycles))
    table = Table(title=f"pausing and resuming, rounds of {ROUND_SECONDS:.0f} s")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:g}")
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
