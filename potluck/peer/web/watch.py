"""One run as it is watched: its history and its ledgers, opened when they appear, read by one thread at a time."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from potluck.dht.manifest import Manifest
from potluck.errors import PotluckError
from potluck.peer.control import ask
from potluck.peer.history import Heard, History
from potluck.peer.home import RunFolder
from potluck.peer.web.assets import Encoded
from potluck.peer.web.books import Book, Shelf, head_view
from potluck.peer.web.models import Contributor, Contributors, CreditCurve, Curve, PeerPage, Peers, RunState, Said
from potluck.peer.web.views import About, clean, curve_of, here, peer_view, run_state, said_by, uptime

#: Points of a curve, at most.
POINTS: Final = 2000
#: An answer is good for so long even if nothing was heard: who is silent goes away.
STALE_SECONDS: Final = 5.0
#: How often whoever has a network is asked for newer copies of the ledgers, while somebody looks.
LEDGERS_SECONDS: Final = 30.0
_ANSWERS: Final = 128
#: Who is here was heard since then, however many peers there are.
RECENT_SECONDS: Final = 2 * 3600.0


class Watch:
    """Methods without `async` read files: call them in a thread. None of them raises where files are not there yet."""

    def __init__(self, folder: RunFolder, manifest: Manifest, invite: str | None) -> None:
        self.folder, self.about, self._invite = folder, About.of(folder.run_id, manifest), invite
        self._genesis = manifest.genesis
        self._history: History | None = None
        self._inode = 0
        self._shelf = Shelf(folder.ledgers, folder.ledger)
        #: What only reads the history must not wait for who reads a ledger.
        self._lock, self._shelf_lock = threading.Lock(), threading.Lock()
        self._asked = -LEDGERS_SECONDS
        self._told: list[str] = []
        #: What was heard of, and of which ledgers, when `look` was called last.
        self.version: tuple[int, int, int] = (0, 0, 0)
        self._answers: dict[str, tuple[tuple[int, int, int], float, Encoded]] = {}

    def close(self) -> None:
        with self._lock, self._shelf_lock:
            self._shelf.close()
            if self._history:
                self._history.close()
                self._history = None

    # ---- what has changed -----------------------------------------------------------------------------------

    def look(self) -> bool:
        """Whether anything is new since the last look. Takes microseconds."""
        with self._lock:
            self._open()
            heard = 0
            if self._history:
                try:
                    heard = self._history.version()
                except sqlite3.Error:
                    self._inode = 0
            before, self.version = self.version, (self._inode, heard, self._shelf.stamp())
        if self._shelf_lock.acquire(blocking=False):
            try:
                self._shelf.rest()
            finally:
                self._shelf_lock.release()
        return before != self.version

    def _open(self) -> None:
        inode = _inode(self.folder.history)
        if inode == self._inode:
            return
        if self._history:
            self._history.close()
        self._history, self._inode = None, 0
        if inode:
            try:
                self._history, self._inode = History.read(self.folder.history), inode
            except sqlite3.Error:
                pass  # it is just being made

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
        """JSON, made once for all who ask the same, until something changes."""
        with self._lock:
            return self._answered(key, make)

    def answer_from_ledgers(self, key: str, make: Callable[[], BaseModel | None]) -> Encoded | None:
        """The same, for what may take seconds."""
        with self._shelf_lock:
            return self._answered(key, make)

    def _answered(self, key: str, make: Callable[[], BaseModel | None]) -> Encoded | None:
        known, now, version = self._answers.get(key), time.monotonic(), self.version
        if known and known[0] == version and now - known[1] < STALE_SECONDS:
            return known[2]
        try:
            made = make()
        except sqlite3.Error:
            self._inode, made = 0, None  # of another format, or closed just now: opened again at the next look
        if made is None:
            return None
        encoded = Encoded(made.model_dump_json(by_alias=True).encode())
        self._answers[key] = version, now, encoded
        if len(self._answers) > _ANSWERS:
            self._answers.pop(next(iter(self._answers)), None)
        return encoded

    @property
    def round_now(self) -> int:
        """By the clock. What peers say of later rounds is not so."""
        return max(0, int((time.time() - self._genesis) // self.about.round_seconds)) + 1

    def locked_state(self) -> RunState:
        with self._lock:
            return self.state()

    def state(self) -> RunState:
        history, now = self._history, time.time()
        points = history.curve(until_round=self.round_now, at_most=64) if history else []
        heard = (history.peers(now - RECENT_SECONDS) or history.peers()) if history else []
        return run_state(self.about, points, heard, now, self.version[2], self._invite)

    def curve(self, since: int, at_most: int) -> Curve:
        until = self.round_now
        if not self._history or (span := self._history.span(since, until)) is None:
            return curve_of([])
        every = max(1, -(-(span[1] - span[0] + 1) // at_most))
        return curve_of(self._history.curve(since, at_most, until_round=until, every=every), every)

    def peers(self, limit: int, offset: int) -> Peers:
        heard, present = self._heard()
        now = time.time()
        shown = sorted(heard, key=lambda one: (one.peer not in present, -one.latest.tokens_per_second, one.peer))
        return Peers(
            total=len(heard), peers=[peer_view(one, one.peer in present, now) for one in shown[offset : offset + limit]]
        )

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
        one = self._history.peer(peer) if self._history else None
        row = book.row(peer) if book else None
        if one is None and row is None:
            return None
        _, present = self._heard()
        now = time.time()
        return PeerPage(
            run=self.about.run,
            peer=peer,
            heard=peer_view(one, peer in present, now) if one else None,
            said=said_by(self._history.rounds_of(peer)) if self._history else _NOTHING_SAID,
            standing=_contributor(peer, book, one, peer in present, now) if row else None,
            ledger=head_view(book.head) if book else None,
            problems=[*wrong, *self._told],
            why=["".join(filter(str.isprintable, line)) for line in book.why(peer)] if book else [],
            scored=book.scored(peer) if book else [],
        )

    def _heard(self) -> tuple[list[Heard], set[str]]:
        """All peers, and those that are here now."""
        heard = self._history.peers() if self._history else []
        return heard, {one.peer for one in here(heard, self.about.round_seconds, time.time())}


_NOTHING_SAID: Final = Said(round=[], at=[], module=[], loss=[], tokens_per_second=[], contributed=[])


def _name(heard: Heard | None) -> str:
    return clean(heard.latest.name) if heard else ""


def _thinned(book: Book) -> list[tuple[str, list[tuple[int, float]]]]:
    """Curves of credit with at most a few hundred points each, the last one always."""
    return [(peer, curve[::-1][:: max(1, len(curve) // 300)][::-1]) for peer, curve in book.curves.items()]


def _contributor(peer: str, book: Book | None, heard: Heard | None, is_here: bool, now: float) -> Contributor:
    row = book.row(peer) if book else None
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
    )


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
