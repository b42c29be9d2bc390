"""The token of a home's page: whoever has it may look and change, nobody else."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from potluck.errors import UserError
from potluck.net.identity import write_private

FILE: Final = "token"
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{32,128}")


def token_of(home: Path) -> str:
    """Made at the first call, in a file of mode 0600. Raises UserError if others can read it, or it is damaged."""
    path = home / FILE
    try:
        try:
            write_private(path, secrets.token_urlsafe(32).encode())
        except FileExistsError:
            pass
        with path.open("rb") as file:
            text, mode = file.read(256).decode("latin-1").strip(), path.stat().st_mode
    except OSError as error:
        raise UserError(f"--home: cannot use {path}: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"other users can read {path}: remove it, a new one is made at the next start")
    if not _TOKEN.fullmatch(text):
        raise UserError(f"{path} is damaged: remove it, a new one is made at the next start")
    return text
