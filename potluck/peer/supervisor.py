"""The daemon: keeps this home's runs going, each in a worker process of its own, while the limits allow it.

It is light (no torch, no hivemind) and holds nothing that a worker could take along when it dies. A pause ends the
workers: only the end of a process gives back all of a GPU's memory (`docs/decisions/0019`). A worker that crashed is
started again, later each time; one that does not answer is killed; an error that only a person can mend waits for one.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from potluck.errors import PotluckError, UserError
from potluck.net.children import die_with
from potluck.peer.control import ControlServer, Handler, PeerHangs, ask
from potluck.peer.events import EventLog
from potluck.peer.home import Home, write_atomically
from potluck.peer.kept_runs import Entry, Kept, checked_entry
from potluck.peer.limits import FILE as LIMITS_FILE
from potluck.peer.limits import Decision, Limits, RunLimits, Sensed, carries, decide, divide, read_limits
from potluck.peer.sensors import Sensors, family, held_bytes, lives
from potluck.peer.traffic import Traffic

Emit = Callable[..., None]

#: How often the sensors and the workers are looked at.
LOOK_SECONDS: Final = 1.0
#: A worker that is asked to end has so long until it is killed: a pause takes two seconds at most.
END_SECONDS: Final = 1.2
#: How often a worker is asked how it is, and how often in a row it may not answer (5 s each).
ASK_SECONDS: Final = 10.0
MAX_HANGS: Final = 6
#: A worker that ran for so long is no longer one that keeps crashing.
STEADY_SECONDS: Final = 600.0
FIRST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 300.0
#: What the kernel may take to end what was killed.
GONE_SECONDS: Final = 0.3
#: What is still in the pipes of a worker that has ended is read for so long.
PIPE_SECONDS: Final = 0.5
#: Of a line that a worker says, no more is kept.
MAX_LINE_BYTES: Final = 1 << 22
#: What a worker that is asked to finish gets to answer: a pause may be waiting behind.
FINISH_SECONDS: Final = 1.5
#: What a worker that is ended gets to say how much it has sent.
LAST_COUNT_SECONDS: Final = 0.3
#: A worker that goes beyond the memory limit so often in a row does not fit into it.
MAX_OVER_MEMORY: Final = 8
#: Errors that trying again does not mend: settings, identity, manifest, hardware, clock, a state that does not load.
NEEDS_YOU: Final = (2, 3, 4, 5, 8, 9)
MAX_RUNS: Final = 64
FINISHED: Final = "finished its round: `potluck resume` goes on"
NO_ROOM: Final = "`upload`, `download` or `disk_quota` is too little for another run: raise it, or leave a run"
_TEXT_BYTES: Final = 4000

State = Literal["starting", "working", "finishing", "paused", "waiting", "stopped"]


@dataclass
class Worker:
    """One run. `state` and `reason` say what it does and why; `wait_until` (monotonic) when it starts again."""

    entry: Entry
    process: asyncio.subprocess.Process | None = None
    state: State = "starting"
    reason: str = ""
    run: str = ""
    phase: str = ""
    round: int | None = None
    contributed: int = 0
    started: float = 0.0
    crashes: int = 0
    restarts: int = 0
    wait_until: float = 0.0
    hangs: int = 0
    asked: float = 0.0
    asking: asyncio.Task[None] | None = None
    sent: int = 0
    received: int = 0
    #: What it may have of the limits now; what it was told; and how often in a row its memory was too much.
    share: RunLimits = field(default_factory=RunLimits)
    told: RunLimits = field(default_factory=RunLimits)
    over_memory: int = 0
    words: deque[str] = field(default_factory=lambda: deque(maxlen=40))
    watching: asyncio.Task[None] | None = None
    #: Resumed while it completes its last round: it is started again.
    again: bool = False

    def __post_init__(self) -> None:
        self.run = self.entry.run
        if self.entry.finished:
            self.state, self.reason = "stopped", FINISHED

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def status(self) -> dict[str, Any]:
        return {
            "arguments": self.entry.arguments,
            "run": self.run or None,
            "state": self.state,
            "reason": self.reason,
            "phase": self.phase or None,
            "round": self.round,
            "contributed_rounds": self.contributed,
            "restarts": self.restarts,
            "halvings": self.entry.halvings,
            "pid": self.process.pid if self.process and self.alive else None,
        }


def wait_seconds(crashes: int) -> float:
    """Before the next start, after so many crashes in a row."""
    return float(min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(crashes - 1, 20)))


def out_of_memory(code: int, words: Sequence[str]) -> bool:
    """Whether a worker died of too little memory: it said so, or the kernel killed it (nobody else sends SIGKILL to it
    but its daemon, which knows)."""
    said = "\n".join(words).lower()
    return code == -signal.SIGKILL or "out of memory" in said or "memoryerror" in said


class Supervisor:
    """`run` until told to stop. `program`: begins a worker's command line."""

    def __init__(
        self,
        home: Home,
        emit: Emit,
        *,
        sensors: Sensors | None = None,
        program: Sequence[str] = (sys.executable, "-m", "potluck"),
        look_seconds: float = LOOK_SECONDS,
        ask_seconds: float = ASK_SECONDS,
    ) -> None:
        self.home, self._emit, self._program = home, emit, program
        self._look_seconds, self._ask_seconds = look_seconds, ask_seconds
        self._sensors = sensors or Sensors()
        self._workers: list[Worker] = []
        self.decision, self.paused = Decision(), False
        self._limits, self._limits_read, self._limits_wrong = Limits(), 0.0, ""
        self._traffic = Traffic(home.path / "traffic.json")
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()
        #: Held by whoever starts and ends workers: the daemon's own looks, and one command at a time.
        self._acting = asyncio.Lock()
        self._sensed: Sensed | None = None
        self._blind = False
        #: For the control socket, and for this home's own page.
        self.commands: dict[str, Handler] = {
            "status": self._status,
            "add": self._add,
            "remove": self._remove,
            "pause": self._pause,
            "resume": self._resume,
            "finish": self._finish,
        }
        #: Bytes of main memory, by process id of the worker.
        self._held: dict[int, int] = {}

    # ---- the life of a daemon -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop`. Raises UserError if another daemon runs in this home, or its files cannot be read."""
        with self.home.locked_daemon():
            self._read_limits()
            kept = self._read_runs()
            self._workers, self.paused = [Worker(entry) for entry in kept.runs], kept.paused
            if self.paused:  # said by `status` before the first look, too
                self.decision = decide(self._limits, Sensed(datetime.now()), paused=True)
            async with ControlServer(self.home.daemon_socket, self.commands):
                self._emit("daemon.started", runs=len(self._workers), pid=os.getpid())
                try:
                    while not self._stopping.is_set():
                        await self._look()
                        self._changed.clear()
                        with suppress(TimeoutError):
                            async with asyncio.timeout(self._look_seconds):
                                await self._changed.wait()
                finally:
                    await self._end_all("the daemon ends")
                    self._traffic.save()
                    self._emit("daemon.stopped")

    def stop(self) -> None:
        self._stopping.set()
        self._changed.set()

    async def _look(self) -> None:
        """One look at machine and workers, and what follows from it."""
        self._read_limits()
        limits = self._limits
        pids = [worker.process.pid for worker in self._workers if worker.process and worker.alive]

        def look() -> tuple[Sensed, dict[int, int]]:
            held = {pid: held_bytes(family(pid)) for pid in pids} if limits.memory else {}
            return self._sensors.look(limits, family(os.getpid())), held

        try:
            sensed, self._held = await asyncio.to_thread(look)
            self._blind = False
        except Exception as error:  # whatever a sensor raises must not end the daemon; it is told once
            if not self._blind:
                self._emit("daemon.sensors.failed", error=repr(error))
            sensed, self._held, self._blind = Sensed(datetime.now()), {}, True
        sent, received = self._traffic.this_month()
        self._sensed = replace(sensed, sent_this_month=sent, received_this_month=received)
        async with self._acting:
            await self._act()
        self._traffic.save_now_and_then(time.monotonic())

    async def _act(self) -> None:
        """What follows from the last look, and from what was asked for since."""
        sensed = self._sensed or Sensed(datetime.now())
        before, self.decision = self.decision, decide(self._limits, sensed, self.decision, paused=self.paused)
        if before.rule != self.decision.rule:
            name = "daemon.resumed" if self.decision.works else "daemon.paused"
            self._emit(name, rule=self.decision.rule, reason=self.decision.text, until=_iso(self.decision.until))
        now = time.monotonic()
        if not self.decision.works:
            await self._end_all(self.decision.text)
        await self._share_limits()
        await self._hold_memory(now)
        for worker in list(self._workers):
            if worker.process is not None:
                await self._check(worker, now)
            elif self.decision.works and worker.state != "stopped" and now >= worker.wait_until:
                await self._start(worker)

    async def _share_limits(self) -> None:
        """Among the runs that are to work; those that they are not enough for wait."""
        sharing = [worker for worker in self._workers if worker.state != "stopped"]
        most = carries(self._limits)
        parts = divide(self._limits, [worker.run for worker in sharing[:most]])
        for worker, part in zip(sharing, parts, strict=False):
            worker.share = part
            if worker.reason == NO_ROOM:
                worker.reason, worker.wait_until = "", 0.0
        for worker in sharing[most:]:
            await self._end(worker, "waiting", NO_ROOM)
            if self.decision.works:
                worker.state, worker.reason, worker.wait_until = "waiting", NO_ROOM, math.inf

    async def _hold_memory(self, now: float) -> None:
        """Where the workers hold more than they may, the largest begins again, with half the micro-batch."""
        most = self._limits.memory
        held = [(self._held.get(w.process.pid, 0), w) for w in self._workers if w.process and w.alive]
        if most is None or sum(size for size, _ in held) <= most:
            return
        largest, worker = max(held, key=lambda one: one[0])
        steady = now - worker.started > STEADY_SECONDS
        finishing = worker.state == "finishing" and not worker.again
        worker.over_memory = 1 if steady else worker.over_memory + 1
        why = f"held {largest / 1e9:.2f} GB, where `memory` allows {most / 1e9:.2f} GB in all"
        self._emit("daemon.worker.over_memory", run=worker.run, held=largest, limit=most)
        self._held.clear()  # seen before the end of one of them
        await self._end(worker, "waiting", why)
        self._halve(worker)
        worker.restarts += 1
        if finishing:
            worker.state, worker.reason = "stopped", f"{FINISHED}. The round was lost: {why}"
        elif worker.over_memory > MAX_OVER_MEMORY:
            worker.state, worker.reason = "stopped", f"{why}: raise it, or leave the run (then `potluck resume`)"
        else:
            worker.crashes = worker.over_memory
            self._wait(worker, f"{why}: again with half the micro-batch")

    def _halve(self, worker: Worker) -> None:
        worker.entry = msgspec.structs.replace(worker.entry, halvings=min(16, worker.entry.halvings + 1))
        self._try_to_save()

    async def _end_all(self, why: str) -> None:
        await asyncio.gather(*(self._end(worker, "paused", why) for worker in self._workers))
        for worker in self._workers:
            if worker.state in ("starting", "waiting", "paused"):
                worker.state, worker.reason, worker.wait_until = "paused", why, 0.0

    # ---- workers ------------------------------------------------------------------------------------------------

    async def _start(self, worker: Worker) -> None:
        limits, entry, share = self._limits, worker.entry, worker.share
        command = [*self._program, *entry.arguments, "--home", str(self.home.path), "--json"]
        command += ["--of-daemon", str(entry.halvings)]
        runs = sum(worker.state != "stopped" for worker in self._workers)
        for option, value in (
            ("--disk-quota", share.disk_quota),
            ("--upload-limit", share.upload),
            ("--download-limit", share.download),
            ("--threads", share.threads),
            ("--vram-limit", limits.vram // max(1, runs) if limits.vram is not None else None),
        ):
            command += [option, str(value)] if value is not None else []
        worker.told = share
        worker.state, worker.reason, worker.phase, worker.again = "starting", "", "", False
        worker.hangs, worker.started, worker.sent, worker.received = 0, time.monotonic(), 0, 0
        worker.words.clear()
        niceness, me = limits.niceness, os.getpid()

        def in_child() -> None:
            os.nice(niceness)
            die_with(me)

        try:
            worker.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the daemon's terminal is for the daemon
                preexec_fn=in_child,
            )
        except (OSError, ValueError) as error:
            self._wait(worker, f"cannot be started: {error}")
            return
        self._emit("daemon.worker.started", run=worker.run, pid=worker.process.pid, arguments=entry.arguments)
        worker.watching = asyncio.create_task(self._watch(worker, worker.process))

    async def _watch(self, worker: Worker, process: asyncio.subprocess.Process) -> None:
        """Reads what the worker says until it ends. What it started may hold its pipes for longer: nobody waits."""
        assert process.stdout and process.stderr
        reading = [
            asyncio.create_task(self._hear_events(worker, process.stdout)),
            asyncio.create_task(_keep_words(worker, process.stderr)),
        ]
        await _exit_of(process, look_seconds=PIPE_SECONDS)
        await asyncio.wait(reading, timeout=PIPE_SECONDS)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        process._transport.close()  # type: ignore[attr-defined]  # our ends of the pipes
        self._changed.set()

    async def _hear_events(self, worker: Worker, stdout: asyncio.StreamReader) -> None:
        """What is no event, as a library may print, is not heard."""
        async for line in _lines(stdout):
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self._hear(worker, event)

    def _hear(self, worker: Worker, event: Mapping[str, Any]) -> None:
        match event.get("event"):
            case "peer.phase":
                worker.phase = str(event.get("phase", ""))
            case "peer.joined":
                worker.run, worker.phase = str(event.get("run", "")), str(event.get("phase", ""))
                worker.state = "finishing" if worker.state == "finishing" else "working"
            case "swarm.round.applied":
                worker.round = event.get("round")
                worker.contributed += bool(event.get("contributed"))

    async def _check(self, worker: Worker, now: float) -> None:
        """A worker that has a process: whether it ended, or hangs."""
        process = worker.process
        assert process is not None
        if worker.watching is not None and worker.watching.done():
            assert process.returncode is not None
            await self._ended(worker, process.returncode, now)
        elif worker.hangs >= MAX_HANGS:
            self._emit("daemon.worker.hangs", run=worker.run, pid=process.pid)
            why, finishing = f"did not answer {MAX_HANGS} times in a row", worker.state == "finishing"
            await self._end(worker, "waiting", why)
            worker.restarts, worker.wait_until = worker.restarts + 1, now
            if finishing and not worker.again:
                worker.state, worker.reason = "stopped", f"{FINISHED}. The round was lost: it {why}"
        elif worker.run and (worker.asking is None or worker.asking.done()):
            new_share = worker.state == "working" and worker.told != worker.share
            if now - worker.asked >= (self._look_seconds if new_share else self._ask_seconds):
                worker.asked = now
                worker.asking = asyncio.create_task(self._ask(worker))

    async def _ask(self, worker: Worker) -> None:
        """How it is, and what has passed; it is told what it may have of the limits, if that is another part now."""
        share = worker.share
        try:
            socket = self.home.find_run(worker.run).control_socket
            self._count(worker, await ask(socket, "status"))
            worker.hangs = 0
            if worker.told != share:
                live = {name: getattr(share, name) for name in ("upload", "download", "disk_quota")}
                await ask(socket, "limit", **live)
                worker.told = share
        except PeerHangs:
            worker.hangs += 1
        except PotluckError:
            pass  # it is just starting or ending

    def _count(self, worker: Worker, status: Mapping[str, Any]) -> None:
        sent, received = (int(status.get(name) or 0) for name in ("bytes_sent", "bytes_received"))
        self._traffic.add(max(0, sent - worker.sent), max(0, received - worker.received))
        worker.sent, worker.received = max(sent, worker.sent), max(received, worker.received)

    async def _ended(self, worker: Worker, code: int, now: float) -> None:
        """What becomes of a worker that ended by itself."""
        said = next((word for word in reversed(worker.words) if word.strip()), "")
        finished, worker.process, worker.watching = worker.state == "finishing", None, None
        self._emit("daemon.worker.ended", run=worker.run, code=code, said=said[:500])
        if code == 0:
            if worker.again:
                worker.state, worker.reason, worker.wait_until = "starting", "", 0.0
            elif finished:
                worker.state, worker.reason = "stopped", FINISHED
            else:
                self._forget(worker)  # `potluck leave`, or as many rounds as it was asked for
            return
        if out_of_memory(code, worker.words) and code != 5:
            self._halve(worker)
            self._emit("daemon.worker.out_of_memory", run=worker.run, halvings=worker.entry.halvings)
        if code in NEEDS_YOU:
            worker.state, worker.reason = "stopped", f"{said} (then `potluck resume`)"
            return
        if finished and not worker.again:
            worker.state, worker.reason = "stopped", f"{FINISHED}. The round was lost: {said or f'code {code}'}"
            return
        worker.crashes = 1 if now - worker.started > STEADY_SECONDS else worker.crashes + 1
        worker.restarts += 1
        self._wait(worker, said or f"ended with code {code}")

    def _wait(self, worker: Worker, why: str) -> None:
        seconds = wait_seconds(max(1, worker.crashes))
        worker.state, worker.reason, worker.wait_until = "waiting", why, time.monotonic() + seconds
        self._emit("daemon.worker.waits", run=worker.run, seconds=seconds, reason=why)

    async def _end(self, worker: Worker, state: State, why: str) -> None:
        """Its process and all that it started are gone when this returns: memory is free again."""
        process = worker.process
        if process is None:
            return
        if worker.state in ("working", "finishing") and worker.alive:
            with suppress(PotluckError):
                socket = self.home.find_run(worker.run).control_socket
                self._count(worker, await ask(socket, "status", LAST_COUNT_SECONDS))
        started = family(process.pid)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(_exit_of(process), END_SECONDS)
        except TimeoutError:
            pass
        for pid in started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        await _exit_of(process)
        until = time.monotonic() + GONE_SECONDS
        while any(map(lives, started)) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # a killed process takes a moment to let go of its memory
        if worker.watching is not None:
            await worker.watching
        worker.process, worker.watching = None, None
        worker.state, worker.reason, worker.phase = state, why, ""

    def _forget(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._try_to_save()
        self._emit("daemon.run.left", run=worker.run)

    # ---- commands -----------------------------------------------------------------------------------------------

    async def _status(self) -> dict[str, Any]:
        decision = self.decision
        return {
            "daemon": os.getpid(),
            "home": str(self.home.path),
            "works": decision.works,
            "rule": decision.rule or None,
            "reason": decision.text or None,
            "until": _iso(decision.until),
            "sent_this_month": self._traffic.this_month()[0],
            "received_this_month": self._traffic.this_month()[1],
            "limits_error": self._limits_wrong or None,
            "runs": [worker.status() for worker in self._workers],
        }

    async def _add(self, arguments: list[str]) -> dict[str, Any]:
        """A run, from now on and at every start of the daemon; the same once more changes its options."""
        entry = checked_entry(arguments)
        answer = {"works": self.decision.works, "reason": self.decision.text or None, "run": entry.run or None}
        async with self._acting:
            same = [
                w for w in self._workers if w.entry.arguments[:2] == arguments[:2] or (w.run and w.run == entry.run)
            ]
            if any(worker.entry.arguments == arguments for worker in same):
                return {"runs": len(self._workers), "had": True, **answer}
            if len(self._workers) >= MAX_RUNS and not same:
                raise UserError(f"this home takes part in {MAX_RUNS} runs already: leave one first")
            kept = [worker for worker in self._workers if worker not in same]
            self._save_runs([*(worker.entry for worker in kept), entry])
            for worker in same:
                await self._end(worker, "starting", "started again with other options")
            self._workers = [*kept, Worker(entry)]
        self._changed.set()
        return {"runs": len(self._workers), "had": False, "replaced": bool(same), **answer}

    async def _remove(self, run: str | None = None) -> dict[str, Any]:
        """Take no part any more, at once (`leave` is after the round)."""
        workers = self._chosen(run)
        async with self._acting:
            for worker in workers:
                await self._end(worker, "stopped", "removed")
                self._forget(worker)
        return {"removed": [worker.run or worker.entry.arguments[1] for worker in workers]}

    async def _pause(self) -> dict[str, Any]:
        self.paused = True
        async with self._acting:
            await self._act()
            self._try_to_save()
        return await self._status()

    async def _resume(self) -> dict[str, Any]:
        self.paused = False
        async with self._acting:
            for worker in self._workers:
                worker.entry, worker.over_memory = msgspec.structs.replace(worker.entry, finished=False), 0
                if worker.state == "finishing":
                    worker.again = True
                elif worker.state in ("stopped", "waiting", "paused"):
                    worker.state, worker.reason, worker.wait_until, worker.crashes = "starting", "", 0.0, 0
            await self._act()
            self._try_to_save()
        return await self._status()

    async def _finish(self, run: str | None = None) -> dict[str, Any]:
        """Complete the round at hand, then stop until `resume`."""
        after: dict[str, Any] = {}
        async with self._acting:
            for worker in self._chosen(run):
                if worker.state == "stopped":
                    continue  # with an error, perhaps, which stays to be read
                if worker.state == "working":
                    socket = self.home.find_run(worker.run).control_socket
                    try:
                        answer = await ask(socket, "leave", FINISH_SECONDS)
                    except PotluckError as error:  # it hangs, or ends just now: there is nothing to wait for
                        await self._end(worker, "stopped", FINISHED)
                        worker.state, worker.reason = "stopped", f"{FINISHED}. The round was lost: {error}"
                        worker.entry = msgspec.structs.replace(worker.entry, finished=True)
                        continue
                    worker.state, worker.reason, worker.again = "finishing", "completes its round", False
                    after[worker.run] = answer.get("leaving_after_round")
                elif worker.state != "finishing":
                    await self._end(worker, "stopped", FINISHED)
                    worker.state, worker.reason = "stopped", FINISHED
                worker.entry = msgspec.structs.replace(worker.entry, finished=True)
            self._try_to_save()
        return {"finishing": after}

    def _chosen(self, run: str | None) -> list[Worker]:
        chosen = [w for w in self._workers if run is None or w.run.startswith(run)]
        if not chosen:
            raise UserError(f"the daemon has no run {run!r}" if run else "the daemon has no runs: join one first")
        return chosen

    # ---- files --------------------------------------------------------------------------------------------------

    def _read_limits(self) -> None:
        """When the file has changed. A wrong one is told, and the limits before it stay."""
        path = self.home.path / LIMITS_FILE
        try:
            changed = path.stat().st_mtime
        except OSError:
            changed = 0.0
        if changed == self._limits_read:
            return
        first, self._limits_read = self._limits_read == 0.0 and not self._workers, changed
        try:
            self._limits = read_limits(self.home.path)
        except UserError as error:
            if first:
                raise
            self._limits_wrong = str(error)
            self._emit("daemon.limits.wrong", error=str(error))
        else:
            self._limits_wrong = ""
            self._emit("daemon.limits.read", **msgspec.to_builtins(self._limits))

    @property
    def _runs_file(self) -> Path:
        return self.home.path / "runs.json"

    def _read_runs(self) -> Kept:
        try:
            kept = msgspec.json.decode(self._runs_file.read_bytes(), type=Kept)
            for entry in kept.runs:
                checked_entry(entry.arguments)
        except FileNotFoundError:
            return Kept()
        except (OSError, msgspec.MsgspecError, UserError) as error:
            raise UserError(f"{self._runs_file} cannot be used ({error}): remove it, then join again") from None
        return kept

    def _save_runs(self, entries: Sequence[Entry] | None = None) -> None:
        """Raises UserError where that fails."""
        runs = [worker.entry for worker in self._workers] if entries is None else list(entries)
        write_atomically(self._runs_file, msgspec.json.encode(Kept(runs, self.paused)))

    def _try_to_save(self) -> None:
        """What is forgotten then is only what a restart of the daemon would have to know."""
        try:
            self._save_runs()
        except UserError as error:
            self._emit("daemon.runs.unsaved", error=str(error))


def _iso(when: datetime | None) -> str | None:
    return when.isoformat(timespec="seconds") if when else None


def make_log(home: Home) -> EventLog:
    return EventLog(home.path / "daemon.jsonl")


async def _exit_of(process: asyncio.subprocess.Process, look_seconds: float = 0.02) -> None:
    """asyncio's own `wait` waits for the pipes as well, which what the process has started may hold."""
    waiting = asyncio.ensure_future(process.wait())
    try:
        while process.returncode is None:
            await asyncio.wait([waiting], timeout=look_seconds)
    finally:
        waiting.cancel()


async def _keep_words(worker: Worker, stderr: asyncio.StreamReader) -> None:
    async for line in _lines(stderr):
        if text := line.decode(errors="replace").rstrip()[:_TEXT_BYTES]:
            worker.words.append(text)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Also those of a progress bar, which ends them with a carriage return. Of one that is too long, its end."""
    rest = b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        for line in lines:
            yield line
        rest = rest[-MAX_LINE_BYTES:]
    yield rest
