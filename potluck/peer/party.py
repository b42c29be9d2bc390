"""Several real peers on this machine, each its own process, driven by a script. For the demo, tests and benchmarks.

Everything known about a peer is read off its own events (`--json`), as an operator's tools would.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from potluck.errors import NetworkError
from potluck.peer.control import ask
from potluck.peer.home import Home, RunFolder

Event = dict[str, Any]

#: A peer that has not joined by then is reported instead of waited for: importing torch on busy cores takes long.
JOIN_SECONDS = 120.0
LEAVE_SECONDS = 40.0
APPLIED = "swarm.round.applied"


@dataclass
class Member:
    """One peer, over all the processes it had, and what they said. `seen` in events is monotonic seconds."""

    name: str
    home: Path
    #: Beginning of its command line (`ip netns exec ...`), and options of its network.
    enter: Sequence[str] = ()
    network: Sequence[str] = ("--loopback",)
    process: asyncio.subprocess.Process | None = None
    reader: asyncio.Task[None] | None = None
    started: float = 0.0
    joined: asyncio.Event = field(default_factory=asyncio.Event)
    status: Event = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    state: str = "starting"
    stderr: bytes = b""

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.get("event") == name]

    @property
    def applied(self) -> list[Event]:
        """Its rounds, oldest first."""
        return self.of(APPLIED)

    @property
    def last(self) -> Event:
        """Its latest round; empty before the first."""
        rounds = self.applied
        return rounds[-1] if rounds else {}

    def last_of(self, name: str) -> Event:
        """Its latest event of this name; empty before the first."""
        return next((event for event in reversed(self.events) if event.get("event") == name), {})

    @property
    def module(self) -> str:
        """What it serves; in a pipeline a stage."""
        return str(self.last_of("peer.stage.chosen").get("module", "stage.0"))

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def folder(self) -> RunFolder:
        return Home(self.home).find_run()

    def error_line(self) -> str:
        lines = self.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word from it"


class Party:
    """Use as a context manager: no process outlives it."""

    def __init__(self, root: Path, on_change: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self.members: list[Member] = []
        self._changed = asyncio.Condition()
        self._on_change = on_change

    async def __aenter__(self) -> Self:
        # One training thread per process; libraries are told before they start pools of their own.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            if member.process and member.process.returncode is None:
                member.process.kill()
                await member.process.wait()
            if member.reader:
                await asyncio.gather(member.reader, return_exceptions=True)

    async def start(
        self,
        name: str,
        *arguments: str,
        wait: bool = True,
        enter: Sequence[str] = (),
        network: Sequence[str] = ("--loopback",),
    ) -> Member:
        """A new peer: `arguments` as for the command line, `host FILE` or `join INVITE` first."""
        member = Member(name, self.root / name, enter, network)
        self.members.append(member)
        await self.restart(member, *arguments, wait=wait)
        return member

    async def restart(self, member: Member, *arguments: str, wait: bool = True) -> None:
        """The same home again, in a new process."""
        member.state, member.started = "starting", time.monotonic()
        member.joined.clear()
        command = [*member.enter, sys.executable, "-m", "potluck", *arguments, "--home", str(member.home)]
        command += ["--name", member.name, "--threads", "1", "--device", "cpu", *member.network, "--json"]
        member.process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=1 << 22
        )
        member.reader = asyncio.create_task(self._read(member, member.process))
        if wait:
            await self.joined(member)

    async def joined(self, member: Member) -> None:
        """Until it has joined. Raises NetworkError with its own last word if it ended or took too long."""
        assert member.process
        gone = asyncio.create_task(member.process.wait())
        joined = asyncio.create_task(member.joined.wait())
        done, pending = await asyncio.wait([gone, joined], timeout=JOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if joined not in done:
            assert member.reader
            await asyncio.wait([member.reader], timeout=1)
            raise NetworkError(f"{member.name} did not join: {member.error_line()}")

    async def until(self, what: str, condition: Callable[[], bool], timeout_seconds: float) -> None:
        """Until the members' events make `condition` true. Raises NetworkError naming `what` after the timeout."""
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            raise NetworkError(f"{what}: not within {timeout_seconds:.0f} s ({self._whereabouts()})") from None

    def _whereabouts(self) -> str:
        """Where each member stands, for an error."""
        return "; ".join(
            f"{member.name} {member.state}, round {member.last.get('round', '-')}"
            f" in a group of {len(member.last.get('group', ()))}"
            for member in self.members
        )

    async def kill(self, member: Member) -> None:
        """kill -9, and wait until it is gone."""
        assert member.process and member.reader
        if member.process.returncode is None:
            member.process.send_signal(signal.SIGKILL)
        await member.process.wait()
        await member.reader
        member.state = "killed"

    async def leave(self, member: Member) -> None:
        """As `potluck leave` does: the round in progress is finished, then the process ends by itself."""
        assert member.process
        if member.process.returncode is not None:
            return
        await ask(member.folder.control_socket, "leave")
        try:
            await asyncio.wait_for(member.process.wait(), LEAVE_SECONDS)
        except TimeoutError:
            raise NetworkError(f"{member.name} did not leave within {LEAVE_SECONDS:.0f} s") from None

    async def leave_all(self, members: Sequence[Member]) -> None:
        await asyncio.gather(*map(self.leave, members))

    async def _read(self, member: Member, process: asyncio.subprocess.Process) -> None:
        assert process.stdout and process.stderr
        draining = asyncio.create_task(_drain(member, process.stderr))
        async for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            event["seen"] = time.monotonic()
            member.events.append(event)
            if event.get("event") == "peer.joined":
                member.status, member.state = event, "training"
                member.joined.set()
            await self._tell()
        await draining
        if member.state == "training":
            member.state = "left"
        await self._tell()

    async def _tell(self) -> None:
        self._on_change()
        async with self._changed:
            self._changed.notify_all()


async def _drain(member: Member, stderr: asyncio.StreamReader) -> None:
    while chunk := await stderr.read(4096):
        member.stderr = (member.stderr + chunk)[-8192:]


def counted_microbatches(members: Sequence[Member]) -> Counter[tuple[str, str]]:
    """How often each (stage, microbatch) was counted, over all members and rounds: more than once is a bug."""
    counted: Counter[tuple[str, str]] = Counter()
    for member in members:
        for event in member.events:
            if event.get("event") == "swarm.stage.counted":
                counted.update((event["module"], id_) for id_ in event["ids"])
    return counted


def overhead_share(rounds: Sequence[Event]) -> float:
    """Median share of a round spent outside training: encode, commit, wait for the deadline, pull, aggregate, apply.

    Rounds in which the peer did not contribute are left out, and so is time it idled with all its steps done.
    """
    shares = []
    for event in rounds:
        if event["contributed"]:
            seconds = event["seconds"]
            outside = sum(seconds[phase] for phase in ("commit", "wait", "pull", "apply"))
            shares.append(outside / (sum(seconds.values()) or 1.0))
    return sorted(shares)[len(shares) // 2] if shares else 0.0
