"""A run as it was left, written once for all tests of the pages; a machine that only remembers what it was told."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3]))
from sample_run import peer, write_run

from potluck.peer.home import RunFolder
from potluck.peer.limits import Limits, read_limits
from potluck.peer.web.machine import change_limits

TOKEN = "t" * 43


class FakeMachine:
    """A `Machine` without a daemon: what was asked of it is in `asked`."""

    def __init__(self, home: Path, run: str) -> None:
        self.home, self.run, self.asked, self.paused, self.peer = home, run, [], False, peer(0)  # type: ignore[var-annotated]

    async def status(self) -> dict[str, Any]:
        state = "paused" if self.paused else "working"
        now = {"phase": "training", "now": 1.0, "waits": [], "alone": False, "rounds_alone": 0, "missing": {}}
        run = {"run": self.run, "state": state, "reason": "", "phase": None, "round": 3, "contributed_rounds": 2}
        rule = {"rule": "you", "reason": "`potluck resume` goes on"} if self.paused else {"rule": None, "reason": None}
        told = {"daemon": 1, "works": not self.paused, **rule, "until": None, "limits_error": None, "peer": self.peer}
        runs = [{**run, "restarts": 1, "now": None if self.paused else now}]
        return {**told, "sent_this_month": 5_000_000, "received_this_month": 9, "runs": runs}

    async def pause(self) -> dict[str, Any]:
        return await self._do("pause", True)

    async def resume(self) -> dict[str, Any]:
        return await self._do("resume", False)

    async def finish(self, run: str | None) -> dict[str, Any]:
        return await self._do("finish", self.paused)

    async def _do(self, what: str, paused: bool) -> dict[str, Any]:
        self.asked.append(what)
        self.paused = paused
        return await self.status()

    def limits(self) -> Limits:
        return read_limits(self.home)

    def set_limits(self, changes: dict[str, Any]) -> Limits:
        return change_limits(self.home, changes)


@pytest.fixture(scope="module")  # its peers were heard just now: minutes later they are away
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    yield write_run(tmp_path_factory.mktemp("home"), time.time(), rounds=60, peers=8, stages=2)


@pytest.fixture
def machine(tmp_path: Path, folder: RunFolder) -> FakeMachine:
    return FakeMachine(tmp_path, folder.run_id)
