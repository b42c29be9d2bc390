"""One run as it is watched: its history and its ledgers, opened when they appear.

Three things never wait for each other: the state that live events show, what is asked of the history, and what is asked
of the ledgers, which may take seconds. Each has a lock of its own, and the first two a connection to the history. Who
holds the lock of the ledgers may ask the history, and never the other way round.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec
from pydantic import BaseModel

from potluck.dht.manifest import Manifest
from potluck.errors import PotluckError
from potluck.peer.control import ask
from potluck.peer.history import Heard, History
from potluck.peer.home import RunFolder
from potluck.peer.web.assets import Encoded
from potluck.peer.web.books import IDLE_SECONDS, MOST_WORK, Book, Shelf, head_view
from potluck.peer.web.models import Contributor, Contributors, CreditCurve, Curve, PeerPage, Peers, RunState, Said
from potluck.peer.web.views import About, clean, curve_of, here, peer_view, run_state, said_by, uptime

#: Points of a curve, at most.
POINTS: Final = 2000
#: An answer is good for so long even if nothing was heard: who is silent goes away.
STALE_SECONDS: Final = 5.0
#: How often whoever has a network is asked for newer copies of the ledgers, while somebody looks.
LEDGERS_SECONDS: Final = 30.0
#: Of the history, and as many of the ledgers.
_ANSWERS: Final = 64
#: Who is here was heard since then, however many peers there are.
RECENT_SECONDS: Final = 2 * 3600.0
#: A history that cannot be read now, or was written by another version.
_UNREADABLE: Final = (sqlite3.Error, msgspec.MsgspecError)

#: What was heard of, and of which ledgers: another one after each change.
Version = tuple[int, int, int]
T = TypeVar("T")


class Live(NamedTuple):
    """A run as it is now, and as it is sent."""

    state: RunState
    encoded: Encoded


class Crowd(NamedTuple):
    """All peers, those that are here now first; and who these are."""

    peers: list[Heard]
    present: set[str]


@dataclass(frozen=True)
class Kept(Generic[T]):
    """What was made of a version, and how many seconds it took."""

    value: T
    version: Version
    made_at: float
    took: float

    @classmethod
    def make(cls, version: Version, make: Callable[[], T]) -> Kept[T]:
        began = time.monotonic()
        value = make()
        now = time.monotonic()
        return cls(value, version, now, now - began)

    def good(self, version: Version, patient: bool = False) -> bool:
        """`patient`: an older one does, so that strangers' questions cost a small part of a core, whatever they are."""
        age = time.monotonic() - self.made_at
        return age < STALE_SECONDS and (self.version == version or (patient and age < self.took / MOST_WORK))


class Answers:
    """JSON, made once for all who ask the same, until something changes. They are made one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._kept: dict[str, Kept[Encoded | None]] = {}

    def get(self, key: str, version: Version, make: Callable[[], BaseModel | None]) -> Encoded | None:
        with self.lock:
            known = self._kept.get(key)
            if known and known.good(version):
                return known.value
            try:
                made = Kept.make(version, lambda: _encoded(make()))
            except _UNREADABLE:
                return None
            if made.value is not None:
                self._kept[key] = made
                if len(self._kept) > _ANSWERS:
                    self._kept.pop(next(iter(self._kept)))
            return made.value


def _encoded(made: BaseModel | None) -> Encoded | None:
    return None if made is None else Encoded(made.model_dump_json(by_alias=True).encode())


class Source:
    """A connection to the history, opened when its file appears and again when another takes its place."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._history: History | None = None
        self._closed = False
        #: Of the open file; 0 without one.
        self.inode = 0

    @contextmanager
    def reading(self) -> Iterator[History | None]:
        """One thread at a time has it. None: there is none yet. After an sqlite3.Error it is opened anew."""
        with self._lock:
            self._open()
            try:
                yield self._history
            except sqlite3.Error:
                self._drop()
                raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()

    def _open(self) -> None:
        inode = 0 if self._closed else _inode(self._path)
        if inode == self.inode:
            return
        self._drop()
        if inode:
            try:
                self._history, self.inode = History.read(self._path), inode
            except sqlite3.Error:
                pass  # it is just being made

    def _drop(self) -> None:
        history, self._history, self.inode = self._history, None, 0
        if history:
            history.close()


class Watch:
    """Methods without `async` read files: call them in a thread. None of them raises where files are not there yet."""

    def __init__(self, folder: RunFolder, manifest: Manifest, invite: str | None) -> None:
        self.folder, self.about, self._invite = folder, About.of(folder.run_id, manifest), invite
        self._genesis = manifest.genesis
        #: For live events, and for whatever else is asked.
        self._live, self._history = Source(folder.history), Source(folder.history)
        self._of_history, self._of_ledgers = Answers(), Answers()
        #: For who holds the lock of `_of_ledgers`.
        self._shelf = Shelf(folder.ledgers, folder.ledger)
        self._live_lock = threading.Lock()
        self._shown: Kept[Live] | None = None
        self._crowd: Kept[Crowd] | None = None
        self._asked = -LEDGERS_SECONDS
        self._told: list[str] = []
        #: When `look` was called last.
        self.version: Version = (0, 0, 0)

    def close(self) -> None:
        with self._of_ledgers.lock:
            self._shelf.close()
        self._history.close()
        self._live.close()

    # ---- what has changed -----------------------------------------------------------------------------------

    def look(self) -> bool:
        """Whether anything is new since the last look. Takes microseconds. Raises OSError where no file can be opened
        any more."""
        heard = 0
        try:
            with self._live.reading() as history:
                heard = history.version() if history else 0
        except sqlite3.Error:
            pass
        before, self.version = self.version, (self._live.inode, heard, self._shelf.stamp())
        if self._of_ledgers.lock.acquire(blocking=False):
            try:
                self._shelf.rest()
            finally:
                self._of_ledgers.lock.release()
        if (crowd := self._crowd) and time.monotonic() - crowd.made_at > IDLE_SECONDS:
            self._crowd = None
        return before != self.version

    async def ask_for_ledgers(self) -> None:
        """Lets the process of this run that has a network bring the copies up to date, if there is one."""
        if not self.about.validators or time.monotonic() - self._asked < LEDGERS_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            answer = await ask(self.folder.control_socket, "ledgers", 2.0)
        except PotluckError:
            return
        errors = answer.get("errors")
        self._told = [clean(str(error))[:300] for error in errors.values()] if isinstance(errors, dict) else []

    # ---- answers --------------------------------------------------------------------------------------------

    def answer(self, key: str, make: Callable[[], BaseModel | None]) -> Encoded | None:
        """JSON, made once for all who ask the same, until something changes. None: nothing of the kind is known, or it
        cannot be read now."""
        return self._of_history.get(key, self.version, make)

    def answer_from_ledgers(self, key: str, make: Callable[[], BaseModel | None]) -> Encoded | None:
        """The same, for what may take seconds: `contributors` and `peer`."""
        return self._of_ledgers.get(key, self.version, make)

    def live(self, patient: bool = False) -> Live | None:
        """The run as it is now. `patient`: for who can do with an older one if it takes long. None: it cannot be read
        now."""
        with self._live_lock:
            if not (self._shown and self._shown.good(self.version, patient)):
                try:
                    self._shown = Kept.make(self.version, self._now)
                except _UNREADABLE:
                    return None
            return self._shown.value

    def _now(self) -> Live:
        state = self.state()
        return Live(state, Encoded(state.model_dump_json().encode()))

    @property
    def round_now(self) -> int:
        """By the clock. What peers say of later rounds is not so."""
        return max(0, int((time.time() - self._genesis) // self.about.round_seconds)) + 1

    def state(self) -> RunState:
        now = time.time()
        with self._live.reading() as history:
            points = history.curve(until_round=self.round_now, at_most=64) if history else []
            heard = (history.peers(now - RECENT_SECONDS) or history.peers()) if history else []
        return run_state(self.about, points, heard, now, self.version[2], self._invite)

    def curve(self, since: int, at_most: int) -> Curve:
        until = self.round_now
        with self._history.reading() as history:
            if not history or (span := history.span(since, until)) is None:
                return curve_of([])
            every = max(1, -(-(span[1] - span[0] + 1) // at_most))
            points = history.curve(since, at_most, until_round=until, every=every)
        return curve_of(points, every)

    def peers(self, limit: int, offset: int) -> Peers:
        heard, present = self._heard()
        now = time.time()
        shown = [peer_view(one, one.peer in present, now) for one in heard[offset : offset + limit]]
        return Peers(total=len(heard), peers=shown)

    def contributors(
        self, limit: int, offset: int, validator: str | None = None, only: str | None = None
    ) -> Contributors | None:
        """`only`: one peer's line. None: there is no ledger of that validator."""
        books, wrong = self._shelf.books()
        book = next((b for b in books if validator in (None, b.head.validator)), None)
        if validator is not None and book is None:
            return None
        heard, present = self._heard()
        by_id, now = {one.peer: one for one in heard}, time.time()
        known = set(book.places) if book else set()
        rest = sorted((one for one in heard if one.peer not in known), key=lambda one: -one.latest.contributed)
        ranked = [row.peer for row in book.rows] if book else []
        everybody = [*ranked, *(one.peer for one in rest if one.latest.role in ("worker", "organizer"))]
        everybody = [peer for peer in everybody if only in (None, peer)]
        rows = [
            _contributor(peer, book, by_id.get(peer), peer in present, now)
            for peer in everybody[offset : offset + limit]
        ]
        curves = [
            CreditCurve(
                peer=peer,
                name=_name(by_id.get(peer)),
                round=[round_ for round_, _ in curve],
                credit=[credit for _, credit in curve],
            )
            for peer, curve in (_thinned(book) if book else [])
        ]
        return Contributors(
            ledger=head_view(book.head) if book else None,
            ledgers=[head_view(one.head) for one in books],
            problems=[*wrong, *self._told],
            total=len(everybody),
            rows=rows,
            curves=curves,
        )

    def peer(self, peer: str) -> PeerPage | None:
        """None: nobody has heard of it."""
        books, wrong = self._shelf.books()
        book = next((b for b in books if b.row(peer)), books[0] if books else None)
        with self._history.reading() as history:
            one = history.peer(peer) if history else None
            said = said_by(history.rounds_of(peer)) if history else _NOTHING_SAID
        row = book.row(peer) if book else None
        if one is None and row is None:
            return None
        _, present = self._heard()
        now = time.time()
        return PeerPage(
            run=self.about.run,
            peer=peer,
            heard=peer_view(one, peer in present, now) if one else None,
            said=said,
            standing=_contributor(peer, book, one, peer in present, now) if row else None,
            ledger=head_view(book.head) if book else None,
            problems=[*wrong, *self._told],
            why=["".join(filter(str.isprintable, line)) for line in book.why(peer)] if book else [],
            scored=book.scored(peer) if book else [],
        )

    def _heard(self) -> Crowd:
        """Decoding ten thousand peers takes a tenth of a second: whoever asks shares it."""
        with self._history.reading() as history:
            known = self._crowd
            if not (known and known.good(self.version, patient=True)):
                known = Kept.make(self.version, lambda: self._crowd_of(history.peers() if history else []))
                self._crowd = known
            return known.value

    def _crowd_of(self, heard: list[Heard]) -> Crowd:
        present = {one.peer for one in here(heard, self.about.round_seconds, time.time())}
        heard.sort(key=lambda one: (one.peer not in present, -one.latest.tokens_per_second, one.peer))
        return Crowd(heard, present)


_NOTHING_SAID: Final = Said(round=[], at=[], module=[], loss=[], tokens_per_second=[], contributed=[])


def _name(heard: Heard | None) -> str:
    return clean(heard.latest.name) if heard else ""


def _thinned(book: Book) -> list[tuple[str, list[tuple[int, float]]]]:
    """Curves of credit with at most a few hundred points each, the last one always."""
    return [(peer, curve[::-1][:: max(1, len(curve) // 300)][::-1]) for peer, curve in book.curves.items()]


def _contributor(peer: str, book: Book | None, heard: Heard | None, is_here: bool, now: float) -> Contributor:
    row = book.row(peer) if book else None
    account, total = book.account(peer) if book else (peer, 0.0)
    return Contributor(
        peer=peer,
        name=_name(heard),
        place=book.places[peer] if book and row else None,
        here=is_here,
        last=heard.last if heard else None,
        uptime=uptime(heard, now) if heard else None,
        credit=row.credit if row else 0.0,
        share=row.share if row else 0.0,
        score=row.score if row else None,
        verdict=row.verdict if row else None,
        contributed=row.contributed if row else heard.latest.contributed if heard else None,
        refused=row.refused if row else None,
        missed=row.missed if row else None,
        network=row.network if row else None,
        account=account if account != peer else None,
        account_credit=total,
    )


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
