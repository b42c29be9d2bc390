"""The daemon as a service of this user: a systemd user unit, or a launchd agent on macOS."""

from __future__ import annotations

import hashlib
import os
import plistlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from potluck.errors import UserError
from potluck.peer.home import Home, default_home, write_atomically

LABEL = "org.potluck.daemon"


@dataclass(frozen=True)
class Service:
    """What is written to `path`, and the commands that start and end it."""

    path: Path
    text: str
    start: Sequence[Sequence[str]]
    end: Sequence[Sequence[str]]

    @classmethod
    def of(cls, home: Home, platform: str = sys.platform) -> Self:
        """For this user and home. Each home but the default one has a service of its own name."""
        own = "" if home.path == Home(default_home()).path else f"-{_short_name(home.path)}"
        command = [sys.executable, "-m", "potluck", "daemon", "--home", str(home.path)]
        if platform == "darwin":
            label = LABEL + own
            path = Path.home() / "Library" / "LaunchAgents" / f"{label}.plist"
            log = str(home.path / "service.log")
            content = {"Label": label, "ProgramArguments": command, "RunAtLoad": True, "KeepAlive": True}
            content |= {"ProcessType": "Background", "StandardOutPath": log, "StandardErrorPath": log}
            load = ["launchctl", "load", "-w", str(path)]
            return cls(path, plistlib.dumps(content).decode(), [load], [["launchctl", "unload", "-w", str(path)]])
        unit = f"potluck{own}.service"
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        systemctl = ["systemctl", "--user"]
        return cls(
            config / "systemd" / "user" / unit,
            _unit(command),
            [[*systemctl, "daemon-reload"], [*systemctl, "enable", "--now", unit]],
            [[*systemctl, "disable", "--now", unit]],
        )

    def install(self) -> None:
        """Raises UserError where this machine has no such services, or refuses."""
        if shutil.which(self.start[0][0]) is None:
            raise UserError(
                f"this machine has no {self.start[0][0]}: run `potluck daemon` from what starts programs here"
            )
        write_atomically(self.path, self.text.encode())
        for command in self.start:
            _run(command)

    def remove(self) -> bool:
        """Whether there was one. Raises UserError if it cannot be ended."""
        if not self.path.exists():
            return False
        for command in self.end:
            _run(command)
        self.path.unlink(missing_ok=True)
        return True


def _short_name(path: Path) -> str:
    """Of a home: what of its name may stand in a unit's, and enough to tell it from others of that name."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", path.name).strip("-")
    return f"{plain}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}".lstrip("-")


def _unit(command: Sequence[str]) -> str:
    return "\n".join(
        [
            "[Unit]",
            "Description=Potluck: volunteer training, within this user's limits",
            "After=network-online.target",
            "",
            "[Service]",
            f"ExecStart={' '.join(map(_quoted, command))}",
            "Restart=on-failure",
            "RestartSec=10",
            "KillSignal=SIGINT",
            "TimeoutStopSec=10",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def _quoted(word: str) -> str:
    """As systemd reads it: % and $ stand for something there."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if any(c in word for c in " \t'\";") else word


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"`{' '.join(command)}` failed: {error}") from None
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
