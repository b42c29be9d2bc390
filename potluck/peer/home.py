"""A peer's home folder: everything it keeps, in one place.

identity.key                 the Ed25519 key (mode 0600)
backups.json                 when and where backups of it were made from here
links.json, retired/         whose account it counts for, and keys that it replaced (`peer/links.py`)
runs/<run id>/               one folder per run
    manifest.bin             the signed manifest
    lock                     held by the process that trains
    checkpoints/<module>/    complete checkpoints
    blobs/                   contributions, bounded by --disk-quota
    ledger.sqlite            of a validator: its ledger
    history.sqlite           what was heard of the run, for its pages
    ledgers/                 copies of validators' ledgers, for its pages
    peers.json, listen.json  addresses that answered last time, and our own
    events.jsonl             the log (rotated at 16 MB)
limits.toml                  when, and how much of the machine, the daemon may use
runs.json, traffic.json      of the daemon: the runs that it keeps going, and bytes sent this month
daemon.jsonl, daemon.lock    its log, and what only one process holds
s/daemon/, s/<8 characters of run id>/   control sockets (mode 0700), gone when the process ends
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import platformdirs

from potluck.dht.manifest import RunId, SignedManifest, parse_run_id
from potluck.errors import DiskFull, IdentityError, ManifestError, StateError, UserError
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

    def held(self, modules: Sequence[str]) -> set[str]:
        """Those of which a checkpoint lies here."""
        return {module for module in modules if any(self.checkpoints(module).glob("round-*"))}

    @property
    def control_socket(self) -> Path:
        return self.sockets / "control.sock"

    @property
    def ledger(self) -> Path:
        """Of a validator: what it scored and paid (`incentives/ledger.py`)."""
        return self.path / "ledger.sqlite"

    @property
    def history(self) -> Path:
        """What was heard of the run (`peer/history.py`)."""
        return self.path / "history.sqlite"

    @property
    def ledgers(self) -> Path:
        """Copies of validators' ledgers, to be looked at: <peer id>.ledger."""
        return self.path / "ledgers"

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
        taken = (
            f"another potluck process already takes part in run {self.run_id[:8]} with this home; "
            "see `potluck status`, or use another --home"
        )
        with _lock(self.path / "lock", taken):
            yield

    @contextmanager
    def left_alone(self) -> Iterator[bool]:
        """False if a process takes part in this run with this home. While this lasts, none begins to."""
        with ExitStack() as stack:
            try:
                lock = stack.enter_context((self.path / "lock").open())
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # it never took part
            yield True


class BackupNote(msgspec.Struct):
    """The latest backups of a key that were made from this home, in UTC seconds; they may be gone by now."""

    peer: str
    file: str | None = None
    file_at: float | None = None
    phrase_at: float | None = None


class Home:
    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.key_path = self.path / "identity.key"
        self.daemon_socket = self.path / "s" / "daemon" / "control.sock"

    @contextmanager
    def locked_daemon(self) -> Iterator[None]:
        """Held by the home's daemon. Raises UserError if there is one already."""
        with _lock(self.path / "daemon.lock", f"a daemon runs in {self.path} already: see `potluck status`"):
            yield

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
        return Identity.load_or_create(self.key_path)

    def restore_identity(self, seed: bytes) -> tuple[Identity, bool]:
        """Make the key of `seed` this home's. Returns it, and whether it is new here: to restore it again is safe.
        Raises IdentityError if there is another key, UserError if the home cannot be used."""
        self.open()
        try:
            return Identity.restore(self.key_path, seed), True
        except IdentityError:
            if not self.key_path.exists():
                raise
        found = Identity.load(self.key_path)
        if found.seed != seed:
            raise IdentityError(
                f"{self.key_path} holds another key ({found.peer_id}), which is not replaced: move it away first, or "
                "restore into another --home"
            )
        return found, False

    def check_idle(self) -> None:
        """Raises UserError if a daemon runs here, or a process takes part in a run with this home."""
        for path in (self.path / "daemon.lock", *(self.path / "runs").glob("*/lock")):
            try:
                with path.open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise UserError(
                    f"a peer is running in {self.path} (it holds {path.relative_to(self.path)}): stop it first "
                    "(`potluck leave`; of a daemon Ctrl-C or `potluck service remove`), or name another --home"
                ) from None
            except OSError as error:
                raise UserError(f"--home: cannot use {path}: {error.strerror}") from None

    def backups(self, peer: str) -> BackupNote:
        """What backups of this peer's key were made from here. Blank if none was, or the note is damaged."""
        try:
            note = msgspec.json.decode((self.path / "backups.json").read_bytes(), type=BackupNote)
        except (OSError, msgspec.MsgspecError):
            return BackupNote(peer)
        return note if note.peer == peer else BackupNote(peer)

    def note_backup(self, note: BackupNote) -> None:
        """Raises UserError where it cannot be written."""
        write_atomically(self.path / "backups.json", msgspec.json.encode(note))

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


@contextmanager
def _lock(path: Path, taken: str) -> Iterator[None]:
    """Raises UserError, saying `taken`, if another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"--home: cannot use {path.parent}: {error.strerror}") from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(taken) from None
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Raises UserError where the disk is full or the folder not writable; then the old content stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"--home: cannot write {path}: {error.strerror}; free some space or choose another") from None
