"""Ledgers as pages need them: read once, verified, and indexed; then rounds of one peer and proofs without a second
pass. Reading takes time (some seconds for 100,000 entries): it belongs into a thread.
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from pathlib import Path
from typing import Final, NamedTuple

from potluck.errors import PotluckError
from potluck.incentives.accounts import Accounts
from potluck.incentives.entries import AnyEntry, ScoreEntry
from potluck.incentives.ledger import Head, Ledger, check_inclusion
from potluck.incentives.report import (
    CURVES,
    PeerRound,
    Row,
    credit_over_time,
    explain,
    history,
    leaderboard,
    round_line,
)
from potluck.peer.web.models import LedgerHead, Proof, Scored

#: Of a peer's rounds, so many are looked at; proofs are checked of the latest ones.
ROUNDS: Final = 200
PROOFS: Final = 25
#: Reading again costs at most this part of a core.
MOST_WORK: Final = 0.05
#: What nobody looked at for so long is closed.
IDLE_SECONDS: Final = 120.0


class Stamp(NamedTuple):
    """Changes when the file does."""

    size: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        try:
            # What a validator writes into its own store lands in the log beside it first.
            files = [path.stat(), *(log.stat() for log in (path.with_name(f"{path.name}-wal"),) if log.exists())]
        except OSError:
            return None
        return cls(sum(f.st_size for f in files), max(f.st_mtime_ns for f in files), files[0].st_ino)


class Book:
    """One verified ledger with its leaderboard. For one thread at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: Entries by what they are: scores of each peer, and everything else.
        self._scores: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
        self._others = array("Q")
        self._accounts = Accounts()
        self.rows: list[Row] = leaderboard(self._indexed(ledger.entries()))
        self._credit_of = {account.account: account.credit for account in self._accounts.rows()}
        self.places = {row.peer: place for place, row in enumerate(self.rows, 1)}
        others = (self._entry(number) for number in self._others)
        paid = [row.peer for row in self.rows[:CURVES] if row.credit > 0]
        self.curves = credit_over_time(others, paid)

    @classmethod
    def read(cls, path: Path) -> Book:
        """Raises LedgerError, UserError."""
        ledger = Ledger.read(path)
        try:
            return cls(ledger)
        except BaseException:
            ledger.close()
            raise

    def close(self) -> None:
        self._ledger.close()

    @property
    def head(self) -> Head:
        return self._ledger.head

    def row(self, peer: str) -> Row | None:
        place = self.places.get(peer)
        return None if place is None else self.rows[place - 1]

    def account(self, peer: str) -> tuple[str, float]:
        """(the key that its credit counts for, all credit that counts for that one)"""
        account = self._accounts.account_of(peer)
        return account, self._credit_of.get(account, 0.0)

    def scored(self, peer: str) -> list[Scored]:
        """A peer's last rounds, the latest first, those with a proof in front."""
        numbers = self._scores.get(peer, array("Q"))[-ROUNDS:]
        at = {(entry.module, entry.round): n for n in numbers if isinstance(entry := self._entry(n), ScoreEntry)}
        rounds = self.rounds(peer)[::-1][:ROUNDS]
        return [
            self._scored(one, at.get((one.module, one.round)), prove=place < PROOFS) for place, one in enumerate(rounds)
        ]

    def rounds(self, peer: str) -> list[PeerRound]:
        """The last of them, the oldest first."""
        numbers = self._scores.get(peer, array("Q"))[-ROUNDS:]
        first = self._before(numbers[0]) if numbers else 0
        others = [n for n in self._others[-4 * ROUNDS :] if not numbers or n >= first]
        return history((self._entry(n) for n in merge(numbers, others)), peer)

    def why(self, peer: str) -> list[str]:
        row = self.row(peer)
        account = self.account(peer)[0]
        other = account if account != peer else None
        return explain(row, self.places[peer], self.rounds(peer), 0, other) if row else []

    def _before(self, number: int) -> int:
        """Where the round of a score begins: its own entry stands in front of all its scores."""
        return next((n for n in reversed(self._others) if n < number), 0)

    def _entry(self, number: int) -> AnyEntry:
        return next(self._ledger.entries(number, number + 1))

    def _indexed(self, entries: Iterable[AnyEntry]) -> Iterator[AnyEntry]:
        for number, entry in enumerate(entries):
            self._accounts.add(entry)
            (self._scores[entry.peer] if isinstance(entry, ScoreEntry) else self._others).append(number)
            yield entry

    def _scored(self, one: PeerRound, number: int | None, prove: bool) -> Scored:
        return Scored(
            round=one.round,
            module=one.module,
            outcome=one.outcome,
            words=round_line(one),
            reason=one.reason,
            tokens=one.tokens,
            alignment=one.alignment,
            random_delta=one.random_delta,
            own_delta=one.own_delta,
            score=one.score,
            share=one.share,
            paid=one.paid,
            factors=dict(one.factors),
            proof=self._proof(number, one) if prove and number is not None else None,
        )

    def _proof(self, number: int, one: PeerRound) -> Proof:
        """Made from the file, and checked against the head's signature as a stranger would."""
        path: list[str] = []
        try:
            proof = self._ledger.prove(number)
            path, entry = proof.path, check_inclusion(proof)
        except PotluckError as error:
            return Proof(entry=number, holds=False, path=path, problem=str(error))
        same = isinstance(entry, ScoreEntry) and (entry.round, entry.module, entry.score) == (
            one.round,
            one.module,
            one.score,
        )
        return Proof(entry=number, holds=same, path=path, problem="" if same else "another entry than is shown")


class Shelf:
    """The ledgers at hand of one run: copies in a folder, and a validator's own. For one thread at a time."""

    def __init__(self, folder: Path, own: Path) -> None:
        self._folder, self._own = folder, own
        self._books: dict[Path, tuple[Stamp, Book | str]] = {}
        self._again: dict[Path, float] = {}
        self._used = time.monotonic()

    def stamp(self) -> int:
        """Another number after each change of a file. Cheap."""
        return hash(tuple((path.name, Stamp.of(path)) for path in self._paths())) & 0xFFFF_FFFF

    def books(self) -> tuple[list[Book], list[str]]:
        """The largest first; and what is wrong with others. Reads what has changed."""
        self._used = time.monotonic()
        paths = self._paths()
        for gone in self._books.keys() - set(paths):
            self._drop(gone)
        for path in paths:
            self._refresh(path)
        found = [book for _, book in self._books.values() if isinstance(book, Book)]
        wrong = [book for _, book in self._books.values() if isinstance(book, str)]
        return sorted(found, key=lambda book: (-book.head.size, book.head.validator)), wrong

    def rest(self) -> None:
        """Close what nobody looked at for a while."""
        if self._books and time.monotonic() - self._used > IDLE_SECONDS:
            self.close()

    def close(self) -> None:
        for path in list(self._books):
            self._drop(path)

    def _paths(self) -> Sequence[Path]:
        own = [self._own] if self._own.exists() else []
        return [*own, *sorted(self._folder.glob("*.ledger"))[:16]]

    def _refresh(self, path: Path) -> None:
        stamp, began = Stamp.of(path), time.monotonic()
        known = self._books.get(path)
        if stamp is None or (known and known[0] == stamp) or began < self._again.get(path, 0.0):
            return
        book: Book | str
        try:
            book = Book.read(path)
        except PotluckError as error:
            book = f"a ledger is not used: {error}".replace(str(path), path.name)  # a public page names no folders
        self._drop(path)
        self._books[path] = stamp, book
        now = time.monotonic()
        self._again[path] = now + (now - began) / MOST_WORK

    def _drop(self, path: Path) -> None:
        _, book = self._books.pop(path, (None, None))
        if isinstance(book, Book):
            book.close()


def head_view(head: Head) -> LedgerHead:
    return LedgerHead(validator=head.validator, size=head.size, root=head.root, made_at=float(head.made_at))
