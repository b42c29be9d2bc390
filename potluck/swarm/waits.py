"""Never silently stuck: everything that a peer waits for, since when, until when, and what happens then."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Wait:
    """`since` and `until` in UTC seconds."""

    what: str
    since: float
    until: float
    then: str


class WaitBoard:
    """The waits in progress, newest last. `potluck why` prints it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._numbers = itertools.count()
        self._waits: dict[int, Wait] = {}

    @contextmanager
    def waiting(self, what: str, until: float, then: str) -> Iterator[None]:
        number = next(self._numbers)
        self._waits[number] = Wait(what, self._now(), until, then)
        try:
            yield
        finally:
            del self._waits[number]

    def current(self) -> list[dict[str, str | float]]:
        return [asdict(wait) for wait in self._waits.values()]
