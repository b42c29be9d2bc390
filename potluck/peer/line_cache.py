"""What a machine's line was measured to carry, by the last `potluck doctor INVITE`: kept in its home."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

import msgspec

from potluck.peer.home import write_atomically

_FILE: Final = "line.json"


class Line(msgspec.Struct, frozen=True):
    """Bytes per second, None where nothing could be told; `nat`: its mapping, as `net/nat.py` has it. `measured_at` in
    UTC seconds."""

    upload: float | None
    download: float | None
    nat: str | None
    measured_at: float


class LineCache:
    """By the machine's name: homes travel."""

    def __init__(self, home: Path) -> None:
        self._path = home / _FILE

    def get(self) -> Line | None:
        return self._all().get(platform.node())

    def put(self, line: Line) -> None:
        """Raises UserError where it cannot be written."""
        write_atomically(self._path, msgspec.json.encode({**self._all(), platform.node(): line}))

    def _all(self) -> dict[str, Line]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Line])
        except (OSError, msgspec.MsgspecError):
            return {}
