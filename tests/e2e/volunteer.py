"""A volunteer: a home with a daemon, driven from outside."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from potluck.peer.control import ask
from potluck.peer.home import Home

from real import processes_of


class Volunteer:
    """A home with a daemon."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "potluck", "daemon", "--home", str(self.home.path), "--json"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        while not await self.answers():
            assert self.process.returncode is None
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """At once, if it still runs."""
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def answers(self) -> bool:
        try:
            await self.ask("status")
        except Exception:
            return False
        return True

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return await ask(self.home.daemon_socket, command, 15.0, **arguments)

    async def until(self, holds: Callable[[dict[str, Any]], bool], seconds: float = 90) -> dict[str, Any]:
        """Of the only run."""
        runs: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    runs = (await self.ask("status"))["runs"]
                    if runs and holds(runs[0]):
                        return runs[0]
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"not within {seconds:g} s: {runs}") from None

    def workers(self) -> list[psutil.Process]:
        assert self.process
        return [p for p in processes_of(self.home.path) if p.pid != self.process.pid]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.home.path / "daemon.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]
