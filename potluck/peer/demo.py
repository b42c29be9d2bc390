"""The demo: a public run in small. Real processes, each with its own libp2p daemon, on loopback.

An organizer and three workers train a byte-level Llama. On the way a fourth worker joins late, one is killed with -9
and comes back, and the organizer is killed for good: the run goes on. Everything told at the end is read off the
peers' own events.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck.dht.template import template_toml
from potluck.errors import NetworkError
from potluck.peer.control import ask
from potluck.peer.home import Home

Event = dict[str, Any]

#: A peer that has not joined by then is reported instead of waited for: importing torch on busy cores takes long.
JOIN_SECONDS = 120.0
LEAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Script:
    """What happens when, in rounds. `rounds`: rounds in all."""

    round_seconds: float
    exchange_seconds: float
    steps: int
    rounds: int
    late_join_at: int
    kill_at: int
    organizer_dies_at: int


FULL = Script(5.0, 1.6, 12, rounds=32, late_join_at=4, kill_at=9, organizer_dies_at=16)
FAST = Script(4.0, 1.4, 8, rounds=13, late_join_at=1, kill_at=4, organizer_dies_at=8)


@dataclass
class Member:
    """One peer process and what it said."""

    name: str
    home: Path
    process: asyncio.subprocess.Process | None = None
    reader: asyncio.Task[None] | None = None
    started: float = 0.0
    joined: asyncio.Event = field(default_factory=asyncio.Event)
    status: Event = field(default_factory=dict)
    last: Event = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    state: str = "starting"
    stderr: bytes = b""

    def applied(self) -> list[Event]:
        return [e for e in self.events if e["event"] == "swarm.round.applied"]


class Demo:
    """Runs the script; `on_change` is called whenever a peer said something, `say` with each thing that happens."""

    def __init__(self, root: Path, script: Script, on_change: Callable[[], None], say: Callable[[str], None]) -> None:
        self.root, self.script = root, script
        self.members: list[Member] = []
        self.round = asyncio.Condition()
        self._on_change, self.say = on_change, say

    async def run(self) -> dict[str, Any]:
        """The figures of the issue, as one dict. Raises NetworkError if a peer cannot join."""
        try:
            return await self._act()
        finally:
            await self._end_all()

    async def _act(self) -> dict[str, Any]:
        script = self.script
        manifest = self._write_manifest()
        organizer = await self._start("organizer", ["host", str(manifest)])
        invite = str(organizer.status["invite"])
        workers = [Member(f"worker-{i}", self.root / f"w{i}") for i in (1, 2, 3)]
        await asyncio.gather(*(self._launch(w, ["join", invite]) for w in workers))
        self.say("the organizer and three workers train together")

        await self._until_round(script.late_join_at)
        late = Member("latecomer", self.root / "late")
        self.say("a fourth worker joins late")
        await self._launch(late, ["join", invite], wait=False)

        await self._until_round(script.kill_at)
        victim = workers[1]
        await self._kill(victim)
        self.say(f"{victim.name} is killed with -9; it comes back with the same home")
        rounds_before = len(victim.applied())
        await self._launch(victim, ["join", invite], wait=False)

        await self._until_round(script.organizer_dies_at)
        await self._kill(organizer)
        organizer.state = "dead for good"
        died_at = max(e["round"] for e in organizer.applied())
        self.say("the organizer is killed for good: the run goes on")

        await self._until_round(script.rounds)
        survivors = [m for m in self.members if m is not organizer]
        await asyncio.gather(*(self._leave(m) for m in survivors))
        self.say("all have left")
        return self._figures(organizer, victim, late, survivors, rounds_before, died_at)

    # ---- processes ------------------------------------------------------------------------------------------

    def _write_manifest(self) -> Path:
        script = self.script
        path = self.root / "demo.toml"
        overrides = {
            "rounds.seconds": script.round_seconds,
            "rounds.exchange_seconds": script.exchange_seconds,
            "rounds.steps": script.steps,
            "training.total_steps": script.steps * script.rounds,
        }
        path.write_text(template_toml("demo", "demo", overrides))
        return path

    async def _start(self, name: str, arguments: list[str]) -> Member:
        member = Member(name, self.root / name[:3])
        await self._launch(member, arguments)
        return member

    async def _launch(self, member: Member, arguments: list[str], wait: bool = True) -> None:
        if member not in self.members:
            self.members.append(member)
        member.state, member.started = "starting", time.monotonic()
        member.joined.clear()
        command = [sys.executable, "-m", "potluck", *arguments, "--home", str(member.home)]
        command += ["--name", member.name, "--threads", "1", "--device", "cpu", "--loopback", "--json"]
        member.process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=1 << 22
        )
        member.reader = asyncio.create_task(self._read(member, member.process))
        if wait:
            await self._joined(member)

    async def _joined(self, member: Member) -> None:
        process = member.process
        assert process
        gone = asyncio.create_task(process.wait())
        joined = asyncio.create_task(member.joined.wait())
        done, pending = await asyncio.wait([gone, joined], timeout=JOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if joined not in done:
            assert member.reader
            await asyncio.wait([member.reader], timeout=1)
            lines = member.stderr.decode(errors="replace").strip().splitlines()
            raise NetworkError(f"{member.name} did not join: {lines[-1] if lines else 'no word from it'}")

    async def _read(self, member: Member, process: asyncio.subprocess.Process) -> None:
        assert process.stdout and process.stderr

        async def drain() -> None:
            while chunk := await process.stderr.read(4096):  # type: ignore[union-attr]
                member.stderr = (member.stderr + chunk)[-8192:]

        draining = asyncio.create_task(drain())
        async for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            event["seen"] = time.monotonic()
            member.events.append(event)
            match event.get("event"):
                case "peer.joined":
                    member.status, member.state = event, "training"
                    member.joined.set()
                case "swarm.round.applied":
                    member.last = event
                    async with self.round:
                        self.round.notify_all()
            self._on_change()
        await draining
        if member.state == "training":
            member.state = "left"
        self._on_change()

    async def _until_round(self, number: int) -> None:
        """Until some peer has applied that many rounds; a swarm that stands still is an error, not a wait."""
        limit = 3 * self.script.round_seconds * (number + 2) + JOIN_SECONDS
        try:
            async with asyncio.timeout(limit), self.round:
                await self.round.wait_for(lambda: max(m.last.get("round", -1) for m in self.members) + 1 >= number)
        except TimeoutError:
            raise NetworkError(f"no peer reached round {number} within {limit:.0f} s") from None
        # Into the training part of the next round: a kill in the exchange is what the fault tests are for.
        await asyncio.sleep(0.25 * self.script.round_seconds)

    async def _kill(self, member: Member) -> None:
        assert member.process and member.reader
        member.process.send_signal(signal.SIGKILL)
        await member.process.wait()
        await member.reader
        member.state = "killed"

    async def _leave(self, member: Member) -> None:
        """As `potluck leave` does: the round in progress is finished, then the process ends by itself."""
        assert member.process
        if member.process.returncode is not None:
            return
        await ask(Home(member.home).find_run().control_socket, "leave")
        try:
            await asyncio.wait_for(member.process.wait(), LEAVE_SECONDS)
        except TimeoutError:
            raise NetworkError(f"{member.name} did not leave within {LEAVE_SECONDS:.0f} s") from None

    async def _end_all(self) -> None:
        for member in self.members:
            if member.process and member.process.returncode is None:
                member.process.kill()
                await member.process.wait()
            if member.reader:
                await asyncio.gather(member.reader, return_exceptions=True)

    # ---- figures --------------------------------------------------------------------------------------------

    def _figures(
        self,
        organizer: Member,
        victim: Member,
        late: Member,
        survivors: list[Member],
        victim_rounds_before: int,
        organizer_died_at: int,
    ) -> dict[str, Any]:
        digests: dict[int, set[str]] = defaultdict(set)
        loss: dict[int, list[float]] = defaultdict(list)
        received: list[float] = []
        for member in self.members:
            for event in member.applied():
                digests[event["round"]].add(event["digest"])
                loss[event["round"]].append(event["loss"])
                received.append(event["bytes_received"])
        # A newcomer's first own round may be incomplete on its side until it has caught up: that is drift too.
        disagreeing = sorted(r for r, seen in digests.items() if len(seen) > 1)
        curve = [sum(v) / len(v) for _, v in sorted(loss.items())]
        last_round = max(loss)
        parameters = self._parameters()
        first_late = next((e for e in late.applied() if e["contributed"]), None)
        survived = sum(any(e["round"] > organizer_died_at + 1 for e in m.applied()) for m in survivors)
        return {
            "loss_start": round(curve[0], 4),
            "loss_end": round(curve[-1], 4),
            "rounds": last_round + 1,
            "peers": len(self.members),
            "digests_agree": not disagreeing,
            "bytes_per_param_per_round": round(sum(received) / len(received) / parameters, 4),
            "late_join_seconds": round(first_late["seen"] - late.started, 1) if first_late else None,
            "recovered": len(victim.applied()) > victim_rounds_before,
            "survived_organizer": survived == len(survivors),
            "parameters": parameters,
            "rounds_disagreeing": disagreeing,
            "overhead_share": self._overhead(),
            "loss_curve": [round(v, 4) for v in curve],
        }

    def _overhead(self) -> float:
        """Share of a round outside training: encode, commit, wait for the deadline, pull, aggregate, apply."""
        shares = []
        for member in self.members:
            for event in member.applied():
                if event["contributed"]:
                    seconds = event["seconds"]
                    outside = sum(seconds[k] for k in ("commit", "wait", "pull", "apply"))
                    shares.append(outside / (outside + seconds["train"] + seconds["evaluate"]))
        return round(sorted(shares)[len(shares) // 2], 4) if shares else 0.0

    def _parameters(self) -> int:
        from potluck.swarm.layout import Layout
        from potluck.swarm.model import build_module

        signed = Home(self.members[0].home).find_run().manifest()
        assert signed
        return Layout.of_module(build_module(signed.manifest.model)).size


def quiet_environment() -> None:
    """One training thread per process; libraries are told too, before they start pools of their own."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
