"""Checkpoints: a replica's state on disk. Atomic, checksummed, the last few kept.

One directory per round, `round-00000042/`: `state.safetensors` (theta, velocity, residual: flat float32 vectors) and
`meta.json` with the SHA-256 of the tensors' file. The inner optimizer's moments are not kept: they are local, twice
the model's size, and rebuilt within a few steps. A directory is complete or absent: it is written under another name,
synced and renamed. A kill -9 at any instant leaves the previous one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from potluck.errors import StateError
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.phases import Round
from potluck.swarm.state import ReplicaState


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    run: str
    module: str
    round: int
    history: int
    layout: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    state: ReplicaState
    residual: Flat | None


class CheckpointStore:
    """`root`: this module's folder. `keep`: complete checkpoints kept, oldest dropped first."""

    def __init__(self, root: Path, run: str, keep: int = 3) -> None:
        self.root, self.run, self.keep = root, run, keep

    def save(self, state: ReplicaState, residual: Flat | None) -> Path:
        """Write a checkpoint. Raises StateError when the disk is full; the previous ones stay. Blocking."""
        target = self.root / f"round-{state.round:08d}"
        partial = self.root / f".partial-{state.round:08d}"
        tensors = {"theta": np.asarray(state.theta)}
        if state.velocity is not None:
            tensors["velocity"] = np.asarray(state.velocity)
        if residual is not None:
            tensors["residual"] = residual
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(tensors, partial / "state.safetensors")
            meta = Meta(
                version=1,
                run=self.run,
                module=state.module,
                round=state.round,
                history=state.history,
                layout=state.layout.digest.hex(),
                sha256=_file_sha256(partial / "state.safetensors"),
                bytes=(partial / "state.safetensors").stat().st_size,
            )
            (partial / "meta.json").write_bytes(msgspec.json.encode(meta))
            for path in (*partial.iterdir(), partial):
                _sync(path)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _sync(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise StateError(f"cannot write the checkpoint {target}: {error}; free some disk space") from None
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def latest(self, layout: Layout, module: str) -> Checkpoint | None:
        """The newest checkpoint that loads and matches its checksum; damaged ones are passed over. Blocking."""
        for leftover in self.root.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self._complete()):
            try:
                return self.load(path, layout, module)
            except StateError:
                continue
        return None

    def load(self, path: Path, layout: Layout, module: str) -> Checkpoint:
        """Raises StateError that says what is wrong with it."""
        try:
            meta = msgspec.json.decode((path / "meta.json").read_bytes(), type=Meta)
            if _file_sha256(path / "state.safetensors") != meta.sha256:
                raise StateError(f"the checkpoint {path} does not match its checksum")
            tensors = load_file(path / "state.safetensors")
        except (OSError, msgspec.MsgspecError, SafetensorError) as error:
            raise StateError(f"the checkpoint {path} does not load: {error}") from None
        if (meta.run, meta.module, meta.layout) != (self.run, module, layout.digest.hex()):
            raise StateError(f"the checkpoint {path} belongs to another run, module or model")
        if any(t.shape != (layout.size,) or t.dtype != np.float32 for t in tensors.values()):
            raise StateError(f"the checkpoint {path} holds tensors of the wrong size")
        state = ReplicaState(module, layout, Round(meta.round), tensors["theta"], tensors.get("velocity"), meta.history)
        return Checkpoint(state, tensors.get("residual"))

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.root.glob("round-*") if (p / "meta.json").exists())


class CheckpointWriter:
    """Saves in the background. Of the states that come while one is being written, only the newest is written next."""

    #: A disk that hangs may not hold up the end of the process.
    CLOSE_SECONDS = 2.0

    def __init__(self, store: CheckpointStore, on_error: Callable[[StateError], None]) -> None:
        self._store, self._on_error = store, on_error
        self._next: tuple[ReplicaState, Flat | None] | None = None
        self._task: asyncio.Task[None] | None = None

    def save(self, state: ReplicaState, residual: Flat | None) -> None:
        self._next = (state, None if residual is None else residual.copy())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._next is not None:
            (state, residual), self._next = self._next, None
            try:
                await asyncio.to_thread(self._store.save, state, residual)
            except StateError as error:
                self._on_error(error)

    async def close(self) -> None:
        """Wait for what is being written, a little."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self.CLOSE_SECONDS)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
