"""A monitor of a real run: it hears the peers, keeps what it heard, and serves it."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from potluck.peer.party import Party

from real import run_party, sockets_of, write_manifest

pytestmark = pytest.mark.slow


class Monitor:
    """`potluck monitor`, on a free port."""

    def __init__(self, home: Path) -> None:
        self.home, self.url = home, ""
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, invite: str) -> None:
        options = ("--loopback", "--port", "0", "--home", str(self.home), "--json")
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "potluck", "monitor", invite, *options), stdout=asyncio.subprocess.PIPE
        )
        await self.said("monitor.joined")

    async def said(self, name: str) -> dict[str, Any]:
        assert self.process and self.process.stdout
        while line := await self.process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            self.url = event.get("url", self.url)
            if event["event"] == name:
                return event
        raise AssertionError(f"the monitor ended before {name}")

    async def get(self, path: str) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            with urllib.request.urlopen(f"{self.url}/api/v1{path}", timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
                return found

        return await asyncio.to_thread(ask)

    async def until(self, path: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                with suppress(HTTPError):  # the run is listed a moment after it was joined
                    if holds(found := await self.get(path)):
                        return found
                await asyncio.sleep(0.2)

    async def stop(self) -> int:
        assert self.process
        if self.process.returncode is None:
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 20)


def test_a_monitor_shows_the_peers_of_a_run_and_what_it_heard_outlives_it() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root)
        organizer = await party.start("org", "host", str(manifest))
        worker = await party.start("w1", "join", organizer.status["invite"])
        monitor = Monitor(party.root / "m")
        try:
            await monitor.start(worker.status["invite"])
            run = f"/runs/{worker.folder.run_id}"
            state = await monitor.until(run, lambda state: state["peers"] == 2 and state["loss"] is not None)
            assert state["tokens_per_second"] > 0 or state["round"] == 0
            assert {one["module"]: one["replicas"] for one in state["modules"]} == {"stage.0": 2}
            found = await monitor.get(f"{run}/peers")
            assert {one["peer"] for one in found["peers"]} == {m.status["peer"] for m in (organizer, worker)}
            assert await monitor.stop() == 0
            await monitor.start(worker.status["invite"])
            curve = await monitor.until(f"{run}/curve", lambda curve: bool(curve["round"]))
            assert curve["round"][0] <= state["round"]
        finally:
            assert await monitor.stop() == 0
        await party.leave_all([organizer, worker])
        assert sockets_of(party.root) == []

    run_party(body)
