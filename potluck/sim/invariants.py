"""What must hold after every simulated event. A violation is a bug, and the seed replays it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from potluck.errors import PotluckError
from potluck.net.host import PeerId
from potluck.swarm.waits import WaitBoard

#: Seconds that a wait may outlast its deadline: two more messages of the slowest path.
SLACK_SECONDS = 2.0
MAX_WAITS = 16


class Violation(PotluckError):
    """An invariant does not hold."""


class Watch:
    """Follows every peer's events. `strict`: raise at the first violation; else they are collected."""

    def __init__(self, now: Callable[[], float], strict: bool = False) -> None:
        self._now, self._strict = now, strict
        self.violations: list[str] = []
        #: Per peer: the round that its state is at, and what it counted of each.
        self._next: dict[PeerId, int] = {}
        self._counted: dict[tuple[PeerId, int], int] = defaultdict(int)

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
            if name == "swarm.round.applied":
                self._group(peer, fields)
        elif name == "swarm.round.missed":
            self._next.pop(peer, None)  # it may carry its own state to the present, if nobody gives another

    def _applied(self, peer: PeerId, round_: int) -> None:
        expected = self._next.get(peer)
        if expected is not None and round_ != expected:
            self.say(peer, f"round {round_} was applied where {expected} was next")
        self._next[peer] = round_ + 1

    def _group(self, peer: PeerId, fields: Mapping[str, Any]) -> None:
        group = fields["group"]
        if len(set(group)) != len(group):
            self.say(peer, f"a contribution counted twice in round {fields['round']}")

    @property
    def now(self) -> Callable[[], float]:
        return self._now


class WatchedWaits(WaitBoard):
    """Nothing waits past its deadline. `excused`: whether this peer was frozen, so that it could not know."""

    def __init__(self, now: Callable[[], float], peer: PeerId, watch: Watch, excused: Callable[[float], bool]) -> None:
        super().__init__(now)
        self._peer, self._watch, self._clock, self._excused = peer, watch, now, excused

    @contextmanager
    def waiting(self, what: str, until: float, then: str) -> Iterator[None]:
        since = self._clock()
        with super().waiting(what, until, then):
            if len(self._waits) > MAX_WAITS:
                self._watch.say(self._peer, f"{len(self._waits)} waits at once")
            yield
        late = self._clock() - max(until, since)
        if late > SLACK_SECONDS and not self._excused(since):
            self._watch.say(self._peer, f"waited {late:.1f} s past the deadline for {what}")
