"""Structured events with stable names: one stream for the log file, the live table, `--json` and the tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from potluck.errors import UserError

#: The log is rotated once at this size, so that it never takes more than twice as much.
MAX_LOG_BYTES = 16 * 2**20

Event = dict[str, Any]


def encode_event(event: Event) -> bytes:
    """One line of JSON. Numbers that are not finite become null, as JSON has none."""
    return msgspec.json.encode(event)


def counted(contribution_bytes: int, contributed: bool) -> bool:
    """Whether a round counted what this peer committed to; of a round to which it committed nothing, also true."""
    return contributed or contribution_bytes == 0


class Twentieths:
    """Long work tells its progress at each twentieth, not more often. Work may begin again."""

    def __init__(self) -> None:
        self._last = 0

    def passed(self, done: int, total: int) -> bool:
        part = 20 * done // max(1, total)
        if part == self._last:
            return False
        self._last = part
        return True


class EventLog:
    """Writes each event as one JSON line to `path` and hands it to every subscriber, in order."""

    def __init__(self, path: Path, **common: Any) -> None:
        self._path, self._common = path, common
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"--home: cannot write {path}: {error.strerror}") from None
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, subscriber: Callable[[Event], None]) -> None:
        self._subscribers.append(subscriber)

    def emit(self, name: str, **fields: Any) -> None:
        event: Event = {"event": name, "time": time.time(), **self._common, **fields}
        try:
            self._file.write(encode_event(event) + b"\n")
            self._file.flush()
            if self._file.tell() > MAX_LOG_BYTES:
                self._rotate()
        except (OSError, ValueError):
            pass  # a full disk must not stop training; it is reported by what needs the space
        for subscriber in self._subscribers:
            subscriber(event)

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        try:
            self._path.replace(self._path.with_suffix(".jsonl.1"))
        finally:
            self._file = self._path.open("ab")
