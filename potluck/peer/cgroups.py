"""What a container may use of its machine: Linux control groups (v2, and v1 where that is what there is).

Docs: https://docs.kernel.org/admin-guide/cgroup-v2.html, sections "CPU" and "Memory".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
SELF: Final = Path("/proc/self/cgroup")
#: v1 says "no limit" with a number near 2^63.
_NO_LIMIT: Final = 2**60


@dataclass(frozen=True)
class Allowed:
    """`memory_bytes`, of which `free_bytes` are left; `cores` of CPU time. None: no limit of its own."""

    memory_bytes: int | None = None
    free_bytes: int | None = None
    cores: float | None = None


def allowed(root: Path = ROOT, own: Path = SELF) -> Allowed:
    """The narrowest limits of this process's group and those around it."""
    memory, free, cores = list[int](), list[int](), list[float]()
    for kind, folder in _folders(root, own):
        names = ("memory.max", "memory.current", "inactive_file ")
        if kind == "v1":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        limit = _number(folder / names[0])
        if limit is not None and limit < _NO_LIMIT:
            # Pages of files that nobody uses now are given back when they are needed.
            used = (_number(folder / names[1]) or 0) - _in_stat(folder / "memory.stat", names[2])
            memory.append(limit)
            free.append(max(0, limit - max(0, used)))
        if (share := _cores(folder, kind)) is not None:
            cores.append(share)
    return Allowed(min(memory, default=None), min(free, default=None), min(cores, default=None))


def _folders(root: Path, own: Path) -> Iterator[tuple[str, Path]]:
    """Of this process's groups and all around them. Inside of a container its own group is the root that it sees."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            if name not in ("", "memory", "cpu"):
                continue
            base = root / controllers if name and (root / controllers).is_dir() else root / name
            parts = path.strip("/").split("/")
            for depth in range(len(parts), -1, -1) if ".." not in parts else (0,):
                group = base.joinpath(*parts[:depth])
                if group.is_dir():
                    yield ("v1" if name else "v2"), group


def _cores(folder: Path, kind: str) -> float | None:
    with suppress(OSError, ValueError):
        if kind == "v2":
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0 and int(period) > 0:
            return int(quota) / int(period)
    return None


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _in_stat(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line.removeprefix(name))
    return 0
