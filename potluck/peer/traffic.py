"""Bytes sent and received by the calendar month, kept in a file: what monthly limits go by."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from potluck.errors import UserError
from potluck.peer.home import write_atomically

SAVE_SECONDS: Final = 60.0
#: A clock that is wrong for a while, as that of a machine that has just started, must not forget the month at hand.
KEPT_MONTHS: Final = 3


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Month, such as 2026-11 -> (sent, received)."""

    months: dict[str, tuple[int, int]] = {}


class Traffic:
    """Counts by the local calendar."""

    def __init__(self, path: Path) -> None:
        self._path, self._saved_at = path, 0.0
        self._months: dict[str, tuple[int, int]] = {}
        with suppress(OSError, msgspec.MsgspecError):  # damaged: the month is counted anew
            kept = msgspec.json.decode(path.read_bytes(), type=_File).months
            self._months = {month: (max(0, sent), max(0, received)) for month, (sent, received) in kept.items()}

    def add(self, sent: int, received: int) -> None:
        before = self.this_month()
        month = _month()
        self._months.pop(month, None)
        self._months[month] = before[0] + sent, before[1] + received
        for old in list(self._months)[:-KEPT_MONTHS]:
            del self._months[old]

    def this_month(self) -> tuple[int, int]:
        """(sent, received)"""
        return self._months.get(_month(), (0, 0))

    def save_now_and_then(self, now: float) -> None:
        """`now`: monotonic."""
        if now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            self.save()

    def save(self) -> None:
        with suppress(UserError):  # a full disk must not stop the daemon
            write_atomically(self._path, msgspec.json.encode(_File(self._months)))


def _month() -> str:
    return datetime.now().strftime("%Y-%m")
