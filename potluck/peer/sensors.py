"""What `limits.py` decides by, as this machine tells it. Whatever a machine cannot tell is None, and pauses nothing."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import psutil

from potluck.peer.limits import Limits, Sensed

#: Load is averaged over so many looks.
LOOKS: Final = 10
#: What asks another program is looked at not more often than this.
SLOW_SECONDS: Final = 5.0
_COMMAND_SECONDS: Final = 2.0


@dataclass
class Sensors:
    """`look` takes some milliseconds; every `SLOW_SECONDS` as long as `nvidia-smi` takes. Not thread-safe."""

    _others: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKS))
    _slow_at: float = -SLOW_SECONDS
    _on_gpu: tuple[str, ...] = ()
    _idle: float | None = None
    _temperature: float | None = None
    _programs: tuple[str, ...] = ()
    _fullscreen: str | None = None
    _gpu_watts: float | None = None
    #: CPU seconds of the machine and of ours, as counted at the last look.
    _counted: tuple[float, float, float] | None = None

    def look(self, limits: Limits, ours: Collection[int]) -> Sensed:
        """`ours`: process ids of the daemon and its workers, whose work is nobody else's. Traffic is the daemon's to
        know."""
        now = time.monotonic()
        if now - self._slow_at >= SLOW_SECONDS:
            self._slow_at = now
            self._on_gpu = tuple(others_on_gpu(ours)) if not limits.shared_gpu else ()
            self._idle = idle_seconds() if limits.idle_minutes else None
            gpu_celsius, self._gpu_watts = gpu_heat_and_power()
            self._temperature = max((one for one in (hottest(), gpu_celsius) if one is not None), default=None)
            self._programs = tuple(running(limits.programs)) if limits.programs else ()
            self._fullscreen = on_full_screen() if not limits.fullscreen else None
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return Sensed(
            now=datetime.now(),
            on_battery=None if battery is None else not battery.power_plugged,
            idle_seconds=self._idle,
            programs=self._programs,
            on_gpu=self._on_gpu,
            load=self._load(now, ours),
            temperature=self._temperature,
            fullscreen=self._fullscreen,
            gpu_watts=self._gpu_watts,
        )

    def _load(self, now: float, ours: Collection[int]) -> float | None:
        """What others took of all cores since the last looks."""
        times = psutil.cpu_times()
        # Niced work of others counts as well; waiting for a disk does not.
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        own = sum(map(_cpu_seconds, ours))
        before, self._counted = self._counted, (now, busy, own)
        if before is None or now <= before[0]:
            return None
        # A worker that ended takes its seconds along: then ours seem to shrink.
        used = (busy - before[1]) - max(0.0, own - before[2])
        self._others.append(min(1.0, max(0.0, used / (now - before[0]) / (psutil.cpu_count() or 1))))
        return sum(self._others) / len(self._others)


def family(pid: int) -> set[int]:
    """A process and all that it started; none where it has ended."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.Error:
        return set()


def lives(pid: int) -> bool:
    """Whether a process still has memory: one that ended and was not yet buried has none."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def held_bytes(pids: Iterable[int]) -> int:
    """Main memory that these processes have for themselves: pages of files, which the system takes back when it needs
    them, are left out where it tells them apart (Linux)."""
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            total += int(memory.rss - getattr(memory, "shared", 0))
    return total


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def running(names: Iterable[str]) -> list[str]:
    """Of these program names those that run."""
    wanted = {name.lower(): name for name in names}
    seen = set[str]()
    for process in psutil.process_iter(["name"]):
        name = (process.info["name"] or "").lower().removesuffix(".exe")
        seen |= {name} & wanted.keys()
    return [wanted[name] for name in sorted(seen)]


def hottest() -> float | None:
    """Degrees Celsius of the hottest sensor."""
    read = getattr(psutil, "sensors_temperatures", None)
    try:
        values = [one.current for group in read().values() for one in group] if read else []
    except OSError:
        return None
    # Broken sensors show nothing at all, or more than any chip survives.
    return max((value for value in values if 0 < value < 150), default=None)


def gpu_heat_and_power() -> tuple[float | None, float | None]:
    """Degrees Celsius of the hottest NVIDIA GPU, and the watts that all of them draw; None where nothing tells."""
    heat, power = list[float](), list[float]()
    answer = _ask("nvidia-smi", "--query-gpu=temperature.gpu,power.draw", "--format=csv,noheader,nounits")
    for line in answer.splitlines():
        for values, text in zip((heat, power), line.split(","), strict=False):
            with suppress(ValueError):  # "[N/A]", of a GPU without such a sensor
                value = float(text)
                if math.isfinite(value):
                    values.append(value)
    return max(heat, default=None), sum(power) if power else None


def on_full_screen() -> str | None:
    """The program whose window has the focus and fills the screen, under X11 (EWMH, as nearly all window managers have
    it). None where there is none or it cannot be told: Wayland tells no program about another's windows."""
    if not os.environ.get("DISPLAY"):
        return None
    window = re.search(r"0x[0-9a-f]+", _ask("xprop", "-root", "_NET_ACTIVE_WINDOW"))
    if window is None or int(window[0], 16) == 0:
        return None
    told = _ask("xprop", "-id", window[0], "_NET_WM_STATE", "WM_CLASS")
    if "_NET_WM_STATE_FULLSCREEN" not in told:
        return None
    name = re.search(r'^WM_CLASS.*"([^"]*)"\s*$', told, re.MULTILINE)
    return name[1] if name else ""


def others_on_gpu(ours: Collection[int]) -> list[str]:
    """Names of other programs that compute on an NVIDIA GPU; none where that cannot be asked."""
    answer = _ask("nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader")
    found = set[str]()
    for line in answer.splitlines():
        pid, _, name = line.partition(",")
        if pid.strip().isdigit() and int(pid) not in ours:
            found.add(os.path.basename(name.strip()) or pid.strip())
    return sorted(found)


def idle_seconds() -> float | None:
    """Since somebody last used the keyboard, the mouse or a terminal; None where nothing tells."""
    found = []
    for user in psutil.users():
        if user.terminal:
            with suppress(OSError):
                found.append(time.time() - os.stat(f"/dev/{user.terminal}").st_atime)
    if sys.platform == "darwin":
        for line in _ask("ioreg", "-c", "IOHIDSystem", "-d", "4").splitlines():
            if "HIDIdleTime" in line and (digits := line.rpartition("=")[2].strip()).isdigit():
                found.append(int(digits) / 1e9)
    elif os.environ.get("DISPLAY") and (text := _ask("xprintidle").strip()).isdigit():
        found.append(int(text) / 1e3)
    return max(0.0, min(found)) if found else None


def _ask(program: str, *arguments: str) -> str:
    """What a program prints; nothing where there is no such program, or it fails."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
