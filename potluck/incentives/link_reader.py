"""How links come into a validator's ledger: it looks, a few peers a round, at what each of them shows about whose
account its credit counts for, and writes what is new down once, along with a round."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain
from typing import Final

from potluck.dht.records import Links, Signed
from potluck.errors import PotluckError
from potluck.incentives.accounts import Accounts
from potluck.incentives.entries import AnyEntry, LinkEntry, ScoreEntry
from potluck.net.host import PeerId
from potluck.net.links import End, Link

Emit = Callable[..., None]

#: Peers that are looked at in a round, those first who have waited longest.
READS_PER_ROUND: Final = 8
#: Who contributed within so many rounds is looked at.
RECENT_ROUNDS: Final = 16
#: How far ahead of this clock a link may be dated, in seconds.
MAX_AHEAD_SECONDS: Final = 3600.0


class LinkReader:
    """One for a ledger, whatever the number of modules. `read(peer, timeout in seconds)`: what a peer shows, if it can
    be had. `always`: peers who are looked at besides those who contribute, such as validators."""

    def __init__(
        self,
        accounts: Accounts,
        read: Callable[[PeerId, float], Awaitable[Sequence[Signed[Links]]]],
        *,
        always: Collection[PeerId],
        now: Callable[[], float],
        emit: Emit,
    ) -> None:
        self.accounts = accounts
        self._read, self._always, self._now, self._emit = read, always, now, emit
        #: The last round in which a peer contributed, and when it was looked at last, counted in looks.
        self._came: dict[PeerId, int] = {}
        self._looked: dict[PeerId, int] = {}
        self._looks = 0
        #: What the last look at each peer found, until a round takes it along.
        self._found: dict[PeerId, list[Link | End]] = {}

    def along(self, entries: Sequence[AnyEntry]) -> list[LinkEntry]:
        """What goes into the ledger behind these entries of a round, which go into it now."""
        for entry in entries:
            self.accounts.add(entry)
            if isinstance(entry, ScoreEntry) and entry.came:
                self._came[PeerId(entry.peer)] = entry.round
        found, self._found = sorted(chain(*self._found.values()), key=lambda link: link.made_at), {}
        written = []
        for link in found:
            if self.accounts.refusal(link) is not None or link.made_at > self._now() + MAX_AHEAD_SECONDS:
                continue  # mostly because it is written down already
            try:
                entry = LinkEntry(module=entries[0].module, round=entries[0].round, link=link)
            except ValueError as error:  # not signed
                self._emit("incentives.link.refused", peer=link.peer, error=str(error))
                continue
            self.accounts.add(entry)
            written.append(entry)
            account = self.accounts.account_of(link.peer)
            self._emit("incentives.link.written", peer=link.peer, account=account, made_at=link.made_at)
        return written

    async def look(self, timeout_seconds: float) -> None:
        """At the next few. Raises nothing for what others show, or do not."""
        now = max(self._came.values(), default=0)
        self._came = {peer: last for peer, last in self._came.items() if now - last < RECENT_ROUNDS}
        peers = {*self._always, *self._came}
        self._looked = {peer: self._looked.get(peer, -1) for peer in peers}
        self._looks += 1
        next_few = sorted(peers, key=lambda peer: (self._looked[peer], peer))[:READS_PER_ROUND]
        self._looked |= dict.fromkeys(next_few, self._looks)
        views = await asyncio.gather(*(self._shown(peer, timeout_seconds) for peer in next_few))
        self._found |= {peer: links for peer, links in zip(next_few, views, strict=True) if links}

    async def _shown(self, peer: PeerId, timeout_seconds: float) -> list[Link | End]:
        try:
            records = await self._read(peer, timeout_seconds)
        except PotluckError as error:
            self._emit("incentives.link.unread", peer=peer, error=str(error))
            return []
        return [link for signed in records for link in signed.record.links]
