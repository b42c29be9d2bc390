"""What was heard of a run, kept on disk: who was there, how the loss fell, who said that it contributed.

One SQLite file in the run's folder. One process writes it (a worker, or a monitor), others may read it meanwhile. All
of it is what peers say of themselves, unproved: medians and clipped sums keep one liar from bending the curves; what
counts is in the ledgers. Times are UTC seconds, losses nats per token.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, Final, Self

import msgspec

from potluck.dht.records import Heartbeat, Signed

#: How long each peer's rounds, a peer that is silent, and the run's own curve are kept.
ROUNDS_SECONDS: Final = 7 * 86400.0
PEERS_SECONDS: Final = 30 * 86400.0
CURVE_SECONDS: Final = 2 * 365 * 86400.0
#: Identities are free: so many are kept, those that came first.
MAX_PEERS: Final = 10_000
#: Of peers' rounds in all: about 100 MB.
MAX_ROWS: Final = 500_000
#: Rounds that a heartbeat may last for.
LASTING_ROUNDS: Final = 200
#: The curve is drawn again as often as reading so many rows a second allows.
DRAWN_PER_SECOND: Final = 5000
#: A peer that was silent for longer was away.
AWAY_SECONDS: Final = 900.0
#: One peer's word of its speed counts at most so many medians in the run's sum.
MOST_MEDIANS: Final = 10.0
_PRUNE_SECONDS: Final = 600.0

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS peers (
    peer TEXT PRIMARY KEY, first REAL, last REAL, present REAL, beats INTEGER, latest BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER, peer TEXT, module TEXT, loss REAL, tokens_per_second REAL, contributed INTEGER, at REAL,
    PRIMARY KEY (round, peer)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rounds_of_peer ON rounds (peer, round);
CREATE TABLE IF NOT EXISTS curve (
    round INTEGER PRIMARY KEY, at REAL, peers INTEGER, loss REAL, tokens_per_second REAL
);
PRAGMA user_version = 1;
"""


class Point(msgspec.Struct, frozen=True):
    """One round of the run, as its peers say. `loss`: their median. `tokens_per_second`: their sum; through all of a
    pipeline's stages go the same tokens, so there it is the sum of one stage, on average."""

    round: int
    at: float
    peers: int
    loss: float | None
    tokens_per_second: float


class Heard(msgspec.Struct, frozen=True):
    """One peer. `present`: seconds that it was there since `first`."""

    peer: str
    first: float
    last: float
    present: float
    beats: int
    latest: Heartbeat


class PeerPoint(msgspec.Struct, frozen=True):
    """One round of one peer. `contributed`: its count by then."""

    round: int
    module: str | None
    loss: float | None
    tokens_per_second: float
    contributed: int
    at: float


class History:
    """`write` or `read` it. Methods raise sqlite3.Error where the file cannot be used (a full disk, another format);
    what was written before stays."""

    def __init__(self, database: sqlite3.Connection, path: Path | None = None) -> None:
        self._path, self._inode = path, path.stat().st_ino if path else 0
        self._db, self._pruned, self._drawn = database, 0.0, 0.0
        self._touched: set[int] = set()
        #: A reader's calls come from several threads, and a writer is closed while it writes.
        self._lock = threading.Lock()

    @classmethod
    def write(cls, path: Path) -> Self:
        """For the one process that hears the run. A damaged file is begun anew: it holds nothing that counts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return cls._opened(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or a full disk
                raise
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
            return cls._opened(path)

    @classmethod
    def _opened(cls, path: Path) -> Self:
        database = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.executescript(_TABLES)
        except BaseException:
            database.close()
            raise
        return cls(database, path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises sqlite3.OperationalError if there is none."""
        return cls(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False))

    def is_there(self) -> bool:
        """Whether what is written can be found: somebody may have removed the file."""
        try:
            return self._path is not None and self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # ---- writing ------------------------------------------------------------------------------------------------

    def hear(
        self,
        beats: Iterable[Signed[Heartbeat]],
        now: float,
        round_now: int | None = None,
        lasting_seconds: float = 0.0,
    ) -> None:
        """Of each peer the newest that came since the last call. All or nothing is written.

        They are written down for the round in which they were heard, `round_now`, whatever round they name (None: that
        one): who is behind is here all the same. A heartbeat lasts for so long in the curve."""
        with self._lock, self._db:
            known = self._db.execute("SELECT count(*) FROM peers").fetchone()[0]
            for signed in beats:
                round_ = signed.record.round if round_now is None else max(0, round_now)
                known += self._hear(signed, round_, now, known < MAX_PEERS)
                self._touched.add(round_)
            if now - self._drawn >= known / DRAWN_PER_SECOND:
                for round_ in self._touched:
                    self._draw(round_, lasting_seconds)
                self._touched, self._drawn = set(), now
            if now - self._pruned >= _PRUNE_SECONDS:
                self._prune(now)

    def _hear(self, signed: Signed[Heartbeat], round_: int, now: float, room: bool) -> bool:
        """Whether it is a new peer."""
        beat, peer = signed.record, signed.peer
        row = self._db.execute("SELECT first, last, present, beats FROM peers WHERE peer = ?", (peer,)).fetchone()
        if row is None and not room:
            return False
        first, last, present, count = row or (now, now, 0.0, 0)
        gap = max(0.0, now - last)
        present += gap if gap <= AWAY_SECONDS else 0.0
        latest = msgspec.msgpack.encode(beat)
        self._db.execute(
            "INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?, ?, ?)", (peer, first, now, present, count + 1, latest)
        )
        told = round_, peer, beat.module, beat.loss, beat.tokens_per_second, beat.contributed, now
        self._db.execute("INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?)", told)
        return row is None

    def _draw(self, round_: int, lasting_seconds: float) -> None:
        """The run's curve at a round, from what its peers said last."""
        newest, began = self._db.execute("SELECT max(at), min(at) FROM rounds WHERE round = ?", (round_,)).fetchone()
        if newest is None:
            return
        rows = self._db.execute(
            "SELECT module, loss, tokens_per_second, max(round) FROM rounds "
            "WHERE round = ? OR (round BETWEEN ? AND ? AND at >= ?) GROUP BY peer",
            (round_, round_ - LASTING_ROUNDS, round_, newest - lasting_seconds),
        ).fetchall()
        losses = [loss for _, loss, _, _ in rows if loss is not None]
        speeds = [speed for _, _, speed, _ in rows if speed > 0]
        most = MOST_MEDIANS * median(speeds) if speeds else 0.0
        modules = {module for module, _, speed, _ in rows if speed > 0}
        told = sum(min(speed, most) for speed in speeds) / max(1, len(modules))
        point = began, len(rows), median(losses) if losses else None, told
        self._db.execute("INSERT OR REPLACE INTO curve VALUES (?, ?, ?, ?, ?)", (round_, *point))

    def _prune(self, now: float) -> None:
        self._pruned = now
        self._db.execute("DELETE FROM rounds WHERE at < ?", (now - ROUNDS_SECONDS,))
        self._db.execute("DELETE FROM peers WHERE last < ?", (now - PEERS_SECONDS,))
        self._db.execute("DELETE FROM curve WHERE at < ?", (now - CURVE_SECONDS,))
        # Made-up peers, which spoke once or twice, make room for those that stay.
        if self._db.execute("SELECT count(*) FROM peers").fetchone()[0] >= MAX_PEERS:
            self._db.execute("DELETE FROM peers WHERE beats < 3 AND last < ?", (now - _PRUNE_SECONDS,))
        for (oldest,) in self._db.execute(
            "SELECT round FROM rounds ORDER BY round DESC LIMIT 1 OFFSET ?", (MAX_ROWS,)
        ).fetchall():
            self._db.execute("DELETE FROM rounds WHERE round <= ?", (oldest,))

    # ---- reading ------------------------------------------------------------------------------------------------

    def version(self) -> int:
        """Another number after each change by another connection (SQLite's data_version)."""
        return int(self._all("PRAGMA data_version")[0][0])

    def curve(
        self, since_round: int = 0, at_most: int = 2000, *, until_round: int = 2**32, every: int = 1
    ) -> list[Point]:
        """The last `at_most` rounds from `since_round` to `until_round`, the oldest first; one in `every` of them."""
        query = "SELECT * FROM curve WHERE round BETWEEN ? AND ? AND round % ? = 0 ORDER BY round DESC LIMIT ?"
        return [Point(*row) for row in reversed(self._all(query, since_round, until_round, every, at_most))]

    def span(self, since_round: int = 0, until_round: int = 2**32) -> tuple[int, int] | None:
        """The curve's first and last round between these."""
        query = "SELECT min(round), max(round) FROM curve WHERE round BETWEEN ? AND ?"
        first, last = self._all(query, since_round, until_round)[0]
        return None if first is None else (first, last)

    def peers(self, since: float = 0.0) -> list[Heard]:
        """All that were heard since then, the latest first."""
        rows = self._all("SELECT * FROM peers WHERE last >= ? ORDER BY last DESC", since)
        return [one for row in rows if (one := _heard(row)) is not None]

    def peer(self, peer: str) -> Heard | None:
        rows = self._all("SELECT * FROM peers WHERE peer = ?", peer)
        return _heard(rows[0]) if rows else None

    def rounds_of(self, peer: str, at_most: int = 500) -> list[PeerPoint]:
        """A peer's last rounds, the oldest first."""
        rows = self._all(
            "SELECT round, module, loss, tokens_per_second, contributed, at FROM rounds WHERE peer = ? "
            "ORDER BY round DESC LIMIT ?",
            peer,
            at_most,
        )
        return [PeerPoint(*row) for row in reversed(rows)]

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()


def _heard(row: Any) -> Heard | None:
    """None for what another version wrote."""
    try:
        latest = msgspec.msgpack.decode(row[5], type=Heartbeat)
    except (msgspec.MsgspecError, ValueError):
        return None
    return Heard(row[0], row[1], row[2], row[3], row[4], latest)
