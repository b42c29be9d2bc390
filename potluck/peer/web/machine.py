"""What the page may ask of the machine that it runs on: `Machine`, and the daemon's supervisor as one."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, Protocol

import msgspec

from potluck.errors import IdentityError, PotluckError, UserError
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.peer.control import ask
from potluck.peer.limits import Limits, limits_of, read_limits, write_limits
from potluck.peer.supervisor import Supervisor

#: A worker that is busy is not waited for: the page says what the daemon knows.
ASK_SECONDS = 1.0


class Machine(Protocol):
    """One home's daemon, for its own page. All of it raises PotluckError where it cannot."""

    @property
    def peer(self) -> PeerId | None:
        """Who this is; None before the first run."""

    async def status(self) -> dict[str, Any]:
        """The daemon's status as `potluck status --json` has it; each of its `runs` with `now`: what its worker says
        that it waits for, or None."""

    async def pause(self) -> dict[str, Any]:
        """Returns `status` afterwards, as do `resume` and `finish`."""

    async def resume(self) -> dict[str, Any]: ...

    async def finish(self, run: str | None) -> dict[str, Any]:
        """Complete the round at hand, then stop; None: of all runs."""

    def limits(self) -> Limits: ...

    def set_limits(self, changes: dict[str, Any]) -> Limits:
        """Change those that are named; None is the default. Returns all of them."""


class DaemonMachine:
    """A `Machine`: the supervisor that runs in this process."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor, self._home = supervisor, supervisor.home
        self._peer: PeerId | None = None
        #: What is read, changed and written again must be whole: two changes come in two threads.
        self._changing = threading.Lock()

    @property
    def peer(self) -> PeerId | None:
        if self._peer is None and self._home.key_path.exists():
            try:
                self._peer = Identity.load(self._home.key_path).peer_id
            except IdentityError:
                return None
        return self._peer

    async def status(self) -> dict[str, Any]:
        told = await self._supervisor.commands["status"]()
        nows = await asyncio.gather(*(self._now(run["run"]) for run in told["runs"]))
        runs = [{**run, "now": now} for run, now in zip(told["runs"], nows, strict=True)]
        return {**told, "peer": self.peer, "runs": runs}

    async def _now(self, run: str | None) -> dict[str, Any] | None:
        if not run:
            return None
        try:
            return await ask(self._home.find_run(run).control_socket, "why", ASK_SECONDS)
        except PotluckError:
            return None

    async def pause(self) -> dict[str, Any]:
        await self._supervisor.commands["pause"]()
        return await self.status()

    async def resume(self) -> dict[str, Any]:
        await self._supervisor.commands["resume"]()
        return await self.status()

    async def finish(self, run: str | None) -> dict[str, Any]:
        await self._supervisor.commands["finish"](run=run)
        return await self.status()

    def limits(self) -> Limits:
        return read_limits(self._home.path)

    def set_limits(self, changes: dict[str, Any]) -> Limits:
        with self._changing:
            return change_limits(self._home.path, changes)


def change_limits(home: Path, changes: dict[str, Any]) -> Limits:
    """Write a home's limits with `changes`, None being the default. Raises UserError, naming the setting."""
    values, default = msgspec.to_builtins(read_limits(home)), msgspec.to_builtins(Limits())
    for name, value in changes.items():
        if name not in values:
            raise UserError(f"{name}: there is no such limit")
        values[name] = default[name] if value is None else _whole(value)
    limits = limits_of(values)
    write_limits(home, limits)
    return limits


def _whole(value: Any) -> Any:
    """JSON's 1.0 is an integer like 1 (JSON Schema, 6.1.1)."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
