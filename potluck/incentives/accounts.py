"""Whose account credit counts for: sums over a ledger's entries, by the links (`net/links.py`) that are among them.

What a peer earns counts for the key at the end of its links, at that place of the ledger. What it earned while it was
linked to nobody goes along when it is linked, and so does all that counted for it; what it earned before a link ended
stays where it is. Pure. Scores, weights and what is paid do not depend on any of this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain

import msgspec

from potluck.incentives.entries import AnyEntry, CreditEntry, LinkEntry, ScoreEntry
from potluck.net.links import End, Link, LinkBook


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A key, and what of its credit counts for an account. `linked`: whether what it earns now does, too."""

    peer: str
    credit: float
    linked: bool


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """`credit`: of all machines together, paid for contributions or earned as a validator. Its own key comes first."""

    account: str
    credit: float
    machines: list[Machine]


class Accounts:
    """After the entries that were added so far, in their order."""

    def __init__(self) -> None:
        self.book = LinkBook()
        #: Account -> key -> credit.
        self._credit: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        #: Who took part here, or is an account of somebody who did: statements about others are nothing to keep.
        self._known: set[str] = set()

    @classmethod
    def of(cls, entries: Iterable[AnyEntry]) -> Accounts:
        accounts = cls()
        for entry in entries:
            accounts.add(entry)
        return accounts

    def add(self, entry: AnyEntry) -> None:
        """A link that counts for nothing changes nothing."""
        match entry:
            case ScoreEntry():
                self._known.add(entry.peer)
            case CreditEntry():
                for peer, amount in chain(entry.paid.items(), entry.earned.items()):
                    self._known.add(peer)
                    self._credit[self.account_of(peer)][peer] += amount
            case LinkEntry() if self.refusal(entry.link) is None:
                self._turn(entry.link)

    def refusal(self, link: Link | End) -> str | None:
        """Why a statement counts for nothing; None: it counts."""
        if link.peer not in self._known:
            return "nobody who takes part here"
        return self.book.refusal(link)

    def account_of(self, peer: str) -> str:
        return self.book.account_of(peer)

    def rows(self) -> list[Account]:
        """All to whom something counts, the most credit first."""
        machines = {account: dict(credit) for account, credit in self._credit.items()}
        for link in self.book.links():
            machines.setdefault(self.account_of(link.peer), {}).setdefault(link.peer, 0.0)
        rows = []
        for account, credit in machines.items():
            keys = sorted(credit.items(), key=lambda item: (item[0] != account, -item[1], item[0]))
            counted = [
                Machine(peer=peer, credit=amount, linked=self.account_of(peer) == account) for peer, amount in keys
            ]
            rows.append(Account(account=account, credit=sum(credit.values()), machines=counted))
        return sorted(rows, key=lambda row: (-row.credit, row.account))

    def _turn(self, link: Link | End) -> None:
        self.book.add(link)
        if isinstance(link, End):
            return
        self._known.add(link.account)
        account = self.account_of(link.peer)
        for peer, amount in self._credit.pop(link.peer, {}).items():
            self._credit[account][peer] += amount
