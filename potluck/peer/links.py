"""What a home keeps of links (`net/links.py`), in `links.json`: which account this machine counts for, whom it took in
as an account, the keys that it had before; and how a run's validators come to know.

Keys that were rotated away lie in `retired/<peer id>.key`. While a key is rotated, the next one lies in
`identity.key.next`, so that whenever this is interrupted both keys are there, and `rotate` goes on where it was.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from potluck.dht.records import MAX_LINKS, Links
from potluck.errors import IdentityError, PotluckError, StateError, UserError
from potluck.net.host import PeerId
from potluck.net.identity import Identity, sync_directory, write_private
from potluck.net.links import End, Link, LinkBook, Offer, make_end, make_link, make_offer
from potluck.peer.home import Home

if TYPE_CHECKING:  # not for commands that only want the notes: it brings hivemind along
    from potluck.dht.directory import Directory

#: Of `links.json`, checked before it is read whole: some thousand statements.
MAX_FILE_BYTES: Final = 2**20
#: In a run they are shown in every second round, for four, as replicas are.
SHOWN_EVERY: Final = 2
LASTS_ROUNDS: Final = 4
_PUBLISH_SECONDS: Final = 5.0


class LinkNotes(msgspec.Struct, forbid_unknown_fields=True):
    """`offers` of this home's key as an account; `links`: its own, those that it ended, those that it was given."""

    offers: list[Offer] = []
    links: list[Link | End] = []

    @classmethod
    def load(cls, home: Home) -> LinkNotes:
        """Raises StateError, with the fix, if they are damaged."""
        path = path_of(home)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
            return msgspec.json.decode(content, type=cls)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise StateError(
                f"{path} cannot be used ({error}): remove it, then take the lines of `potluck identity` in again"
            ) from None

    def save(self, home: Home) -> None:
        """On the disk when this returns. Raises UserError where that cannot be; then the old ones stay."""
        path = path_of(home)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            try:
                write_private(partial, msgspec.json.format(msgspec.json.encode(self)))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            sync_directory(home.path)
        except OSError as error:
            raise UserError(f"--home: cannot write {path}: {error.strerror or error}") from None

    @property
    def book(self) -> LinkBook:
        """What is in force by these notes; a ledger may not know all of it yet."""
        book = LinkBook()
        for link in sorted(self.links, key=lambda link: link.made_at):
            if book.refusal(link) is None:
                book.add(link)
        return book

    def newest(self, peer: str) -> int:
        """When the newest statement about a peer was made, offers included; -1 if there is none."""
        return max((one.made_at for one in (*self.offers, *self.links) if one.peer == peer), default=-1)

    def open_offers(self) -> list[Offer]:
        """Those that may have been accepted: this home need not know."""
        return [offer for offer in self.offers if offer.made_at == self.newest(offer.peer)]

    def keep(self, link: Link | End) -> bool:
        """False if it is here already."""
        if link in self.links:
            return False
        self.links.append(link)
        return True

    def shown(self, peer: PeerId) -> list[Link | End]:
        """What fits into a record: its own, then the newest."""
        newest = sorted(self.links, key=lambda link: -link.made_at)
        return sorted(newest, key=lambda link: link.peer != peer)[:MAX_LINKS]


def path_of(home: Home) -> Path:
    return home.path / "links.json"


def retired_path(home: Home, peer: str) -> Path:
    """Of a key that was rotated away."""
    return home.path / "retired" / f"{peer}.key"


def next_key_path(home: Home) -> Path:
    return home.path / "identity.key.next"


# ---- one account on several machines ------------------------------------------------------------------------


def offer(home: Home, account: Identity, peer: PeerId, now: float) -> Offer:
    """Take `peer` in, as the account that this home is. Raises IdentityError for what is no peer id."""
    notes = LinkNotes.load(home)
    made = make_offer(account, peer, _after(notes, peer, now))
    notes.offers = [one for one in notes.offers if one.peer != made.peer] + [made]
    notes.save(home)
    return made


def accept(home: Home, me: Identity, statement: Offer | Link | End) -> tuple[Link | End, bool]:
    """Sign an offer that is for this home's key; keep a link or an end as it is, to show it to validators. Returns it,
    and whether it is new here: to accept again is safe. Its signatures were checked (`parse_line`).

    Raises IdentityError for an offer that is not for this key, or where this key counts for another account.
    """
    notes = LinkNotes.load(home)
    if isinstance(statement, Offer):
        link: Link | End = make_link(statement, me)
        known, refusal = notes.book.link_of(me.peer_id), notes.book.refusal(link)
        # An account that takes a machine in again has ended the link before, whether or not that was heard here.
        again = known is not None and known.account == link.account and known.made_at <= link.made_at
        if refusal and not again:
            raise IdentityError(
                f"this offer cannot be accepted: {refusal}. What that account prints for `potluck identity revoke "
                f"{me.peer_id}` ends it, once it is accepted here. If that account's key is lost, remove "
                f"{path_of(home)}: ledgers that know the old link stay with it, others learn the new one"
            )
    else:
        link = statement
    new = notes.keep(link)
    if new:
        notes.save(home)
    return link, new


def end(home: Home, account: Identity, peer: PeerId, now: float) -> tuple[End, bool]:
    """From now on `peer` counts for this account no more; and whether this home knows that it ever did. Raises
    IdentityError for this key, or one that it had before."""
    if peer == account.peer_id:
        raise IdentityError(f"{peer} is this home's own key: it counts for itself")
    if retired_path(home, peer).exists():
        raise IdentityError(
            f"{peer} is the key that this account had before: what machines that count for it earn would be lost to "
            "this one. Whoever has that key cannot turn its link elsewhere: leave it as it is"
        )
    notes = LinkNotes.load(home)
    known = notes.newest(peer) >= 0
    made = make_end(account, peer, _after(notes, peer, now))
    notes.keep(made)
    notes.save(home)
    return made, known


# ---- rotation -----------------------------------------------------------------------------------------------


def check_rotatable(home: Home, me: Identity) -> None:
    """Raises UserError while a peer runs, IdentityError where this key counts for another account."""
    home.check_idle()
    link = LinkNotes.load(home).book.link_of(me.peer_id)
    if link is not None and (not next_key_path(home).exists() or next_key(home).peer_id != link.account):
        raise IdentityError(
            f"this machine counts for account {link.account}, and its key cannot be linked twice. For a new one: move "
            f"{home.key_path} and {path_of(home)} away, let `potluck identity show` make a key, have the account "
            f"`potluck identity delegate` that one and `potluck identity revoke {me.peer_id}`"
        )


def next_key(home: Home) -> Identity:
    """The one that `rotate` will put in place; the same one again if it was interrupted."""
    return Identity.load_or_create(next_key_path(home))


def rotate(home: Home, old: Identity, now: float) -> tuple[Identity, Link]:
    """Put `next_key` in the place of this home's key, which is linked to it and kept. Returns the new one and the link.

    Whenever it is interrupted, both keys are on the disk, and to call it again finishes it. Raises UserError where the
    disk does not take it.
    """
    new, notes = next_key(home), LinkNotes.load(home)
    link = notes.book.link_of(old.peer_id)
    if link is None:
        link = make_link(make_offer(new, old.peer_id, _after(notes, old.peer_id, now)), old)
        notes.keep(link)
    retired = retired_path(home, old.peer_id)
    try:
        retired.parent.mkdir(mode=0o700, exist_ok=True)
        if not retired.exists():
            os.link(home.key_path, retired)
        sync_directory(retired.parent)
        notes.save(home)
        os.replace(new.path, home.key_path)
        sync_directory(home.path)
    except OSError as error:
        raise UserError(f"--home: cannot write into {home.path}: {error.strerror or error}") from None
    return Identity.load(home.key_path), link


def _after(notes: LinkNotes, peer: str, now: float) -> int:
    """A time at which a statement about a peer is the newest, whatever this clock says."""
    return max(int(now), notes.newest(peer) + 1)


# ---- in a run -----------------------------------------------------------------------------------------------


async def show_links(
    home: Home,
    directory: Directory,
    peer: PeerId,
    round_seconds: float,
    now: Callable[[], float],
    emit: Callable[..., None],
) -> None:
    """Until cancelled: what this home keeps is in the run's directory, and what it takes in meanwhile soon is. `now` in
    UTC seconds."""
    while True:
        try:
            if links := LinkNotes.load(home).shown(peer):
                expires_at = now() + LASTS_ROUNDS * round_seconds
                await directory.publish(Links(peer=peer, links=links), expires_at, _PUBLISH_SECONDS)
        except PotluckError as error:
            emit("peer.links.failed", error=str(error))
        await asyncio.sleep(SHOWN_EVERY * round_seconds)
