"""A volunteer's daemon under random faults: does it come back by itself, does it say what happened, does it leak?

    python benchmarks/soak.py [--quick] [--minutes 30] [--seed 1]

An organizer, another volunteer, and the daemon that is tormented, on loopback. One fault after another, drawn from a
seed; each ends when the others have used a contribution of the volunteer again, and the seconds until then are counted:

    killed        kill -9 of the worker
    memory        the worker's address space is limited to what it has: its next allocation fails
    hung          the worker is stopped (SIGSTOP), until the daemon finds out
    p2pd          kill -9 of the libp2p daemon
    silent        the libp2p daemon is stopped (SIGSTOP) for a minute
    network       the volunteer's line is down for a minute (needs root, ip and nft: it has a network of its own then)
    suspended     daemon, worker and libp2p daemon are stopped for 45 s, as when a lid is closed
    disk          the disk is full for 20 s (needs root: a small tmpfs)
    clock         the worker's clock jumps by 90 s, and back (needs libfaketime)
    paused        `potluck pause`, and `resume` ten seconds later

Last, what has grown between the first recovery and the end: memory and descriptors of the daemon and of the organizer,
and the files of the volunteer's home. `--quick` (within 50 s): one kill of the worker. The last line is JSON. Goals:
contributing is true (else the exit code is 1), never_recovered and untold are 0, nothing grows.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

from potluck.dht.template import template_toml
from potluck.errors import PotluckError
from potluck.peer.control import ask
from potluck.peer.home import Home
from potluck.peer.party import Member, Party

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lab"))
from network import Lab, Site, missing

ROUND_SECONDS: Final = 6.0
MODEL: Final = {
    "model.config.hidden_size": 64,
    "model.config.num_hidden_layers": 2,
    "model.config.intermediate_size": 128,
    "data.sequence_length": 64,
    "training.batch_size": 8,
    "rounds.steps": 8,
    "rounds.seconds": ROUND_SECONDS,
    "rounds.exchange_seconds": 2.0,
}
#: Of the small disk: a run's files are some 20 MB.
DISK_BYTES: Final = 300 * 2**20
RECOVERY_SECONDS: Final = 300.0
FAKETIME: Final = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
#: Events of the volunteer's own that say nothing of a fault.
ORDINARY: Final = (
    *("swarm.round.", "swarm.state.", "swarm.join.", "swarm.contributions.", "peer.phase", "peer.joined", "data.read"),
    *("peer.clock.checked", "peer.checkpoint.loaded", "daemon.limits", "daemon.started"),
)
console = Console(stderr=True)


@contextmanager
def two_sites() -> Iterator[tuple[Lab, Site, Site] | None]:
    """(lab, where the others are, where the volunteer is); None where that cannot be made."""
    if missing():
        yield None
        return
    with Lab() as lab:
        yield lab, lab.host("hub"), lab.host("home")


@contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """Whether `path` is a small disk now."""
    path.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = os.geteuid() == 0 and libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, f"size={DISK_BYTES}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            libc.umount2(bytes(path), 2)


class Volunteer:
    """The daemon, and its only worker."""

    def __init__(self, folder: Path, clock_file: Path, lab: Lab | None, site: Site | None) -> None:
        self.home, self.clock_file, self.lab, self.site = Home(folder).open(), clock_file, lab, site
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, invite: str) -> None:
        environment = dict(os.environ)
        if FAKETIME:
            self.clock_file.write_text("+0\n")
            environment |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(self.clock_file)}
            environment |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        self.process = await asyncio.create_subprocess_exec(
            *(self.site.enter if self.site else ()),
            *(sys.executable, "-m", "potluck", "daemon", "--home", str(self.home.path), "--json"),
            stdout=asyncio.subprocess.DEVNULL,
            env=environment,
        )
        while not self.home.daemon_socket.exists():  # noqa: ASYNC110 (another process makes it)
            await asyncio.sleep(0.05)
        join = ["join", invite, *network_of(self.site), "--threads", "1", "--device", "cpu"]
        await self.ask("add", arguments=join)

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return await ask(self.home.daemon_socket, command, 30.0, **arguments)

    async def run(self) -> dict[str, Any]:
        """How the daemon says that its run is."""
        found: dict[str, Any] = (await self.ask("status"))["runs"][0]
        return found

    async def worker(self) -> psutil.Process:
        """Once there is one."""
        while True:
            if pid := (await self.run())["pid"]:
                with suppress(psutil.NoSuchProcess):
                    return psutil.Process(pid)
            await asyncio.sleep(0.1)

    async def p2pd(self) -> psutil.Process:
        while True:
            for child in (await self.worker()).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if child.name() == "p2pd":
                        return child
            await asyncio.sleep(0.1)

    def logs(self) -> dict[Path, int]:
        """Size of each of its logs."""
        paths = (self.home.path / "daemon.jsonl", *self.home.path.glob("runs/*/events.jsonl"))
        return {path: path.stat().st_size for path in paths if path.exists()}

    def said(self, since: dict[Path, int]) -> list[str]:
        """Names of what daemon and worker told of faults since the logs had these sizes, in order."""
        names: dict[str, None] = {}
        for path in self.logs():
            for line in path.read_bytes()[since.get(path, 0) :].splitlines():
                with suppress(ValueError, KeyError):
                    event = json.loads(line)
                    if not event["event"].startswith(ORDINARY):
                        names[event["event"]] = None
        return list(names)

    async def stop(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


def network_of(site: Site | None) -> tuple[str, ...]:
    return ("--listen", f"/ip4/{site.address}/tcp/0") if site else ("--loopback",)


# ---- faults ----------------------------------------------------------------------------------------------------


async def killed(volunteer: Volunteer) -> None:
    (await volunteer.worker()).kill()


async def memory(volunteer: Volunteer) -> None:
    worker = await volunteer.worker()
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (worker.memory_info().vms, resource.RLIM_INFINITY))


async def hung(volunteer: Volunteer) -> None:
    (await volunteer.worker()).suspend()


async def p2pd(volunteer: Volunteer) -> None:
    (await volunteer.p2pd()).kill()


async def network(volunteer: Volunteer) -> None:
    assert volunteer.lab and volunteer.site
    volunteer.lab.down(volunteer.site)
    await asyncio.sleep(60)
    volunteer.lab.up(volunteer.site)


async def silent(volunteer: Volunteer) -> None:
    process = await volunteer.p2pd()
    process.suspend()
    await asyncio.sleep(60)
    with suppress(psutil.NoSuchProcess):
        process.resume()


async def suspended(volunteer: Volunteer) -> None:
    assert volunteer.process
    daemon = psutil.Process(volunteer.process.pid)
    stopped = [daemon, *daemon.children(recursive=True)]
    for process in stopped:
        process.suspend()
    await asyncio.sleep(45)
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.resume()


async def disk(volunteer: Volunteer) -> None:
    ballast = volunteer.home.path / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(2**20))
            file.flush()
    await asyncio.sleep(20)
    ballast.unlink()


async def clock(volunteer: Volunteer) -> None:
    volunteer.clock_file.write_text("+90\n")
    await asyncio.sleep(30)
    volunteer.clock_file.write_text("+0\n")


async def paused(volunteer: Volunteer) -> None:
    await volunteer.ask("pause")
    await asyncio.sleep(10)
    await volunteer.ask("resume")


FAULTS: Final[tuple[Callable[[Volunteer], Awaitable[None]], ...]] = (
    killed,
    memory,
    hung,
    p2pd,
    silent,
    network,
    suspended,
    disk,
    clock,
    paused,
)


# ---- the soak --------------------------------------------------------------------------------------------------


async def contributes(volunteer: Volunteer, organizer: Member, seconds: float = RECOVERY_SECONDS) -> bool:
    """Whether others use a contribution of the volunteer, made from now on, in time."""
    peer, since = volunteer.home.identity().peer_id, organizer.last.get("round", -1) + 1
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(peer in event["group"] for event in organizer.applied if event["round"] >= since):
            return True
        await asyncio.sleep(0.1)
    return False


def held(volunteer: Volunteer, organizer: Member) -> dict[str, float]:
    assert volunteer.process and organizer.process
    daemon, other = psutil.Process(volunteer.process.pid), psutil.Process(organizer.process.pid)
    files = [path for path in volunteer.home.path.rglob("*") if path.is_file()]
    return {
        "daemon_mb": daemon.memory_info().rss / 1e6,
        "daemon_files": daemon.num_fds(),
        "organizer_mb": other.memory_info().rss / 1e6,
        "organizer_files": other.num_fds(),
        "home_files": len(files),
        "home_mb": sum(path.stat().st_size for path in files) / 1e6,
    }


async def soak(folder: Path, minutes: float, seed: int, quick: bool) -> dict[str, Any]:
    dice, home = random.Random(seed), folder / "v"
    (folder / "run.toml").write_text(template_toml("demo", "soak", MODEL))
    with small_disk(home) as has_disk, two_sites() as sites:
        lab, hub, line = sites or (None, None, None)
        can = {disk: has_disk, clock: bool(FAKETIME), network: bool(sites)}
        faults = [one for one in FAULTS if can.get(one, True)]
        console.print("left out here: " + (", ".join(one.__name__ for one in FAULTS if one not in faults) or "nothing"))
        async with Party(folder) as party:
            there = {"enter": hub.enter if hub else (), "network": network_of(hub)}
            organizer = await party.start("org", "host", str(folder / "run.toml"), **there)
            await party.start("other", "join", organizer.status["invite"], **there)
            volunteer = Volunteer(home, folder / "clock", lab, line)
            try:
                await volunteer.start(organizer.status["invite"])
                assert await contributes(volunteer, organizer), "it never contributed"
                return await torment(volunteer, organizer, [killed] if quick else faults, minutes, dice, quick)
            finally:
                await volunteer.stop()


async def torment(
    volunteer: Volunteer,
    organizer: Member,
    faults: list[Callable[[Volunteer], Awaitable[None]]],
    minutes: float,
    dice: random.Random,
    quick: bool,
) -> dict[str, Any]:
    until, told = time.monotonic() + minutes * 60, Table(title="faults, and how the volunteer came back")
    for column in ("fault", "seconds", "halvings", "said"):
        told.add_column(column, justify="left" if column in ("fault", "said") else "right")
    seconds: dict[str, list[float]] = {}
    before: dict[str, float] = {}
    lost, untold, order = 0, 0, []
    while time.monotonic() < until and not (quick and seconds):
        order = order or dice.sample(faults, len(faults))  # each of them, before one comes again
        fault = order.pop()
        console.print(f"{fault.__name__} ...", end=" ")
        began, since = time.monotonic(), volunteer.logs()
        await fault(volunteer)
        ended = time.monotonic()
        back = await contributes(volunteer, organizer)
        spent = time.monotonic() - ended
        lost += not back
        seconds.setdefault(fault.__name__, []).append(spent)
        said = " ".join(volunteer.said(since))
        untold += not said
        state = await volunteer.run()
        console.print(f"{spent:.1f} s after {ended - began:.0f} s" if back else "DID NOT COME BACK")
        told.add_row(fault.__name__, f"{spent:.1f}" if back else "never", str(state["halvings"]), said)
        before = before or held(volunteer, organizer)
        await asyncio.sleep(dice.uniform(0, 2 * ROUND_SECONDS))
    contributing = False
    with suppress(PotluckError):
        contributing = await contributes(volunteer, organizer)
    console.print(told)
    after = held(volunteer, organizer)
    growth = Table("", "first", "last")
    for name in before:
        growth.add_row(name, f"{before[name]:.1f}", f"{after[name]:.1f}")
    console.print(growth)
    every = [one for many in seconds.values() for one in many]
    return {
        "minutes": round(minutes if not quick else sum(every) / 60, 1),
        "faults": {name: len(many) for name, many in seconds.items()},
        "recovery_seconds": {name: round(statistics.median(many), 1) for name, many in seconds.items()},
        "longest_recovery_seconds": round(max(every), 1),
        "never_recovered": lost,
        "untold": untold,
        "contributing": contributing,
        "grown": {name: round(after[name] - before[name], 1) for name in before},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the small disk is taken away again
    with tempfile.TemporaryDirectory(prefix="pl", dir="/tmp") as folder:
        found = asyncio.run(soak(Path(folder), options.minutes, options.seed, options.quick))
    print(json.dumps(found))
    sys.exit(0 if found["contributing"] and not found["never_recovered"] else 1)


if __name__ == "__main__":
    main()
