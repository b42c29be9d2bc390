"""What must hold after every simulated event. A violation is a bug, and the seed replays it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from potluck.errors import PotluckError
from potluck.net.host import PeerId
from potluck.swarm.waits import WaitBoard

#: Seconds that a wait may outlast its deadline: two more messages of the slowest path.
SLACK_SECONDS = 2.0
MAX_WAITS = 16
#: Nobody counts contributions to rounds older than this.
REMEMBERED_ROUNDS = 100


class Violation(PotluckError):
    """An invariant does not hold."""


class Watch:
    """Follows every peer's events. `strict`: raise at the first violation; else they are collected."""

    def __init__(self, now: Callable[[], float], strict: bool = False) -> None:
        self._now, self._strict = now, strict
        self.violations: list[str] = []
        #: Per peer: the round that its state is at.
        self._next: dict[PeerId, int] = {}
        #: Per round and contributor: the one contribution that counts, by whoever counted it first.
        self._counted: dict[int, dict[PeerId, str]] = {}

    def say(self, peer: str, what: str) -> None:
        text = f"at {self._now():.3f} s, {peer[-8:]}: {what}"
        self.violations.append(text)
        if self._strict:
            raise Violation(text)

    def started(self, peer: PeerId) -> None:
        """A new process: it goes on from a checkpoint, or begins."""
        self._next.pop(peer, None)

    def event(self, peer: PeerId, name: str, fields: Mapping[str, Any]) -> None:
        if name == "swarm.state.loaded":
            self._next[peer] = fields["round"]
        elif name in ("swarm.round.applied", "swarm.round.replayed"):
            self._applied(peer, fields["round"])
        elif name == "swarm.contributions.counted":
            self._count(peer, fields["round"], fields["blobs"])
        elif name == "swarm.round.missed":
            self._next.pop(peer, None)  # it may carry its own state to the present, if nobody gives another

    def _applied(self, peer: PeerId, round_: int) -> None:
        expected = self._next.get(peer)
        if expected is not None and round_ != expected:
            self.say(peer, f"round {round_} was applied where {expected} was next")
        self._next[peer] = round_ + 1

    def _count(self, peer: PeerId, round_: int, blobs: Mapping[PeerId, str]) -> None:
        counted = self._counted.setdefault(round_, {})
        for contributor, blob in blobs.items():
            if counted.setdefault(contributor, blob) != blob:
                self.say(peer, f"counts a second contribution of {contributor[-8:]} to round {round_}")
        self._counted.pop(round_ - REMEMBERED_ROUNDS, None)


class WatchedWaits(WaitBoard):
    """Nothing waits past its deadline. `excused(began)`: whether this peer could not know, because it was frozen or its
    clock was set since then (loop time)."""

    def __init__(self, now: Callable[[], float], peer: PeerId, watch: Watch, excused: Callable[[float], bool]) -> None:
        super().__init__(now)
        self._peer, self._watch, self._clock, self._excused = peer, watch, now, excused
        self._loop = asyncio.get_running_loop()

    @contextmanager
    def waiting(self, what: str, until: float, then: str) -> Iterator[None]:
        began = self._loop.time()

        timers: list[asyncio.TimerHandle] = []

        def watch(seconds: float) -> None:
            timers[:] = [self._loop.call_later(seconds + SLACK_SECONDS, overdue)]

        def overdue() -> None:
            if self._excused(began):
                watch(0.0)
            else:
                self._watch.say(self._peer, f"waits {SLACK_SECONDS:g} s past the deadline for {what}")

        watch(max(0.0, until - self._clock()))
        try:
            with super().waiting(what, until, then):
                if len(self._waits) > MAX_WAITS:
                    self._watch.say(self._peer, f"{len(self._waits)} waits at once")
                yield
        finally:
            timers[0].cancel()


class Complaints(logging.Handler):
    """What the code under test logs as an error is a bug, too: tasks that died, handlers that raised."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.ERROR)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._watch.say(record.name, f"{record.getMessage()} {error!r}" if error else record.getMessage())
