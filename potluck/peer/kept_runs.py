"""The runs that a home's daemon keeps going, as its file `runs.json` has them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

import msgspec

from potluck.dht.invite import Invite
from potluck.errors import ManifestError, UserError
from potluck.peer.limits import FILE as LIMITS_FILE

#: Options that the daemon gives its workers itself.
_OWN: Final = (
    *("--home", "--json", "--of-daemon"),
    *("--disk-quota", "--upload-limit", "--download-limit", "--vram-limit"),
)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of `runs.json`: a run that this home takes part in, as the command line says it."""

    arguments: list[str]
    """Of `potluck`: `join INVITE`, `host FILE` or `validate INVITE`, and options."""
    halvings: int = 0
    """Of the micro-batch, after the machine ran out of memory."""
    finished: bool = False
    """Stopped by `potluck finish`, until `potluck resume`."""

    @property
    def run(self) -> str:
        """The run's id, as far as an invite says it."""
        try:
            return Invite.parse(self.arguments[1]).run_id
        except ManifestError:
            return ""


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of `runs.json`. `paused`: by `potluck pause`."""

    runs: list[Entry] = []
    paused: bool = False


def checked_entry(arguments: Sequence[str]) -> Entry:
    """Of a command that takes part in a run. Raises UserError for anything else."""
    words = isinstance(arguments, list) and all(
        isinstance(a, str) and len(a) < 4096 and not any(unicodedata.category(c) == "Cc" for c in a) for a in arguments
    )
    if not words or not 2 <= len(arguments) <= 64:
        raise UserError("a daemon takes `join INVITE`, `host FILE` or `validate INVITE`, and options")
    if arguments[0] not in ("join", "host", "validate"):
        raise UserError(f"a daemon cannot {arguments[0]!r}: only join, host and validate")
    if arguments[1].startswith("-"):
        raise UserError(f"{arguments[0]}: give the invite or the file first, then {arguments[1]}")
    for own in _OWN:
        if any(a == own or a.startswith(f"{own}=") for a in arguments):
            raise UserError(f"{own} is the daemon's: leave it out (limits are in {LIMITS_FILE})")
    return Entry(list(arguments))
