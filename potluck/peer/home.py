"""A peer's home folder: everything it keeps, in one place.

identity.key                 the Ed25519 key (mode 0600)
runs/<run id>/               one folder per run
    manifest.bin             the signed manifest
    lock                     held by the process that trains
    checkpoints/<module>/    complete checkpoints
    blobs/                   contributions, bounded by --disk-quota
    ledger.sqlite            of a validator: its ledger
    peers.json, listen.json  addresses that answered last time, and our own
    events.jsonl             the log (rotated at 16 MB)
s/<8 characters of run id>/  control sockets (mode 0700), gone when the process ends
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import platformdirs

from potluck.dht.manifest import RunId, SignedManifest, parse_run_id
from potluck.errors import ManifestError, StateError, UserError
from potluck.net.identity import Identity


def default_home() -> Path:
    return Path(os.environ.get("POTLUCK_HOME") or platformdirs.user_data_dir("potluck"))


class RunFolder:
    """One run's part of a home."""

    def __init__(self, home: Path, run_id: RunId) -> None:
        self.run_id = run_id
        self.path = home / "runs" / run_id
        self.sockets = home / "s" / run_id[:8]
        self.manifest_path = self.path / "manifest.bin"
        self.events_path = self.path / "events.jsonl"
        self.blobs = self.path / "blobs"

    def checkpoints(self, module: str) -> Path:
        return self.path / "checkpoints" / module.replace("/", "_")

    @property
    def control_socket(self) -> Path:
        return self.sockets / "control.sock"

    @property
    def ledger(self) -> Path:
        """Of a validator: what it scored and paid (`incentives/ledger.py`)."""
        return self.path / "ledger.sqlite"

    @property
    def archive(self) -> Path:
        """Of a validator: the blobs that its scores follow from."""
        return self.path / "archive"

    def save_manifest(self, signed: SignedManifest) -> None:
        write_atomically(self.manifest_path, signed.envelope)

    def manifest(self) -> SignedManifest | None:
        """Of the run, as it was joined. Raises StateError if the file is damaged."""
        try:
            return SignedManifest.decode(self.manifest_path.read_bytes(), self.run_id)
        except FileNotFoundError:
            return None
        except (OSError, ManifestError) as error:
            raise StateError(
                f"{self.manifest_path} cannot be used ({error}): remove it, then join again with an invite"
            ) from None

    @property
    def is_new(self) -> bool:
        """Nothing of the run is known yet: joining it has never come so far."""
        return not self.manifest_path.exists()

    def save_listen(self, addresses: Sequence[str]) -> None:
        write_atomically(self.path / "listen.json", msgspec.json.encode(list(addresses)))

    def listen(self) -> list[str]:
        """Where this peer listened last time: old invites stay good."""
        return self._texts("listen.json")

    def remove(self) -> None:
        """Everything of this run."""
        shutil.rmtree(self.path, ignore_errors=True)

    def save_peers(self, addresses: list[str]) -> None:
        write_atomically(self.path / "peers.json", msgspec.json.encode(addresses))

    def peers(self) -> list[str]:
        return self._texts("peers.json")

    def _texts(self, name: str) -> list[str]:
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=list[str])
        except (FileNotFoundError, msgspec.MsgspecError):
            return []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held while a process trains this run. Raises UserError if another one does."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(f"--home: cannot use {self.path}: {error.strerror}") from None
        with file as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another potluck process already takes part in run {self.run_id[:8]} with this home; "
                    "see `potluck status`, or use another --home"
                ) from None
            yield


class Home:
    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()

    def open(self) -> Home:
        """Create the folder. Raises UserError where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"--home {self.path}: cannot be created: {error.strerror}") from None
        if not os.access(self.path, os.W_OK):
            raise UserError(f"--home {self.path}: not writable; choose another folder")
        return self

    def identity(self) -> Identity:
        return Identity.load_or_create(self.path / "identity.key")

    def run(self, run_id: RunId) -> RunFolder:
        return RunFolder(self.path, run_id)

    def runs(self) -> list[RunFolder]:
        """All runs this home ever joined, most recently used first."""
        found = []
        for path in (self.path / "runs").glob("*/manifest.bin"):
            try:
                lock = path.parent / "lock"  # opened anew by every process that takes part
                used = max(file.stat().st_mtime for file in (path, lock) if file.exists())
                found.append((used, self.run(parse_run_id(path.parent.name))))
            except (ManifestError, OSError):
                continue
        return [run for _, run in sorted(found, key=lambda item: -item[0])]

    def find_run(self, prefix: str | None = None) -> RunFolder:
        """The run whose id begins with `prefix`; without one, the only or the most recent. Raises UserError."""
        runs = [run for run in self.runs() if run.run_id.startswith(prefix or "")]
        if not runs:
            what = f"no run whose id begins with {prefix!r}" if prefix else "no run yet"
            raise UserError(f"{what} in {self.path}: join one with `potluck join INVITE`, or name another --home")
        if prefix and len(runs) > 1:
            raise UserError(f"{prefix!r} fits {len(runs)} runs: give more characters of the run id")
        return runs[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Raises UserError where the disk is full or the folder not writable; then the old content stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--home: cannot write {path}: {error.strerror}; free some space or choose another") from None
