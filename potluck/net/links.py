"""Links: from now on a peer's credit counts for an account, and both keys say so.

An account is a key like any other. A link is signed by the peer and by the account, so that nobody can claim another's
credit, nor leave his own at somebody's door. It holds until the account ends it, alone: neither who finds a lost
machine nor who has a key that was rotated away can turn what it earns elsewhere. Three statements, each of which
travels as one line of text:

    potluck-offer:...   the account takes a peer in; that means nothing until the peer has signed as well
    potluck-link:...    an offer that its peer accepted
    potluck-end:...     the account ends a link

They are bound to no run: a person is the same in all of them. What is signed: `potluck.link.1` (of an end
`potluck.link.end.1`), the two public keys, the peer's first, and `made_at` as 8 bytes, big-endian. A line has the name
above, a colon and base64url without padding of: version (1 byte), the statement in msgpack, and the first 4 bytes of
the SHA-256 of both, which only tell a line that was damaged on the way.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta

from potluck.errors import IdentityError
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of, public_key_of, verify

#: Of a line, checked before anything of it is looked at.
MAX_LINE: Final = 1024
#: Statements about one peer that count, and links from one to the next: what strangers can make others keep is bounded.
MAX_CHANGES: Final = 8
MAX_CHAIN: Final = 16

_LINK: Final = b"potluck.link.1"
_END: Final = b"potluck.link.end.1"
_VERSION: Final = b"\x01"
_CHECKSUM_BYTES: Final = 4
#: The end of the year 9999: every date can be shown.
_MAX_TIME: Final = 253_402_300_799

_Peer = Annotated[str, Meta(pattern=r"\A12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\Z")]
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="statement"):
    """Base of the three. Whoever has one from elsewhere calls `check` before he believes it."""

    line_name: ClassVar[str]

    peer: _Peer
    account: _Peer
    #: Unix time in seconds. Of two statements about a peer the later one counts.
    made_at: Annotated[int, Meta(ge=0, le=_MAX_TIME)]
    account_signature: _Signature

    def check(self) -> None:
        """Raises IdentityError unless those whom it takes have signed it."""
        if self.peer == self.account:
            raise IdentityError(f"{self.peer} is linked to itself")
        _check_signed(self.account, self._message(_LINK), self.account_signature)

    def line(self) -> str:
        body = _VERSION + msgspec.msgpack.encode(self)
        return f"{self.line_name}:{urlsafe_b64encode(body + _checksum(body)).rstrip(b'=').decode()}"

    def _message(self, domain: bytes) -> bytes:
        return _message(domain, self.peer, self.account, self.made_at)


class Offer(Statement, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="offer"):
    """The account's half of a link."""

    line_name: ClassVar[str] = "potluck-offer"


class Link(Statement, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="link"):
    """From now on what `peer` earns counts for `account`, and so does what it earned for nobody else before."""

    line_name: ClassVar[str] = "potluck-link"

    peer_signature: _Signature

    def check(self) -> None:
        super().check()
        _check_signed(self.peer, self._message(_LINK), self.peer_signature)


class End(Statement, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="end"):
    """From now on `peer` counts for itself. What it earned before stays with `account`."""

    line_name: ClassVar[str] = "potluck-end"

    def check(self) -> None:
        _check_signed(self.account, self._message(_END), self.account_signature)


_NAMES: Final = tuple(kind.line_name for kind in (Offer, Link, End))
_decoder: Final = msgspec.msgpack.Decoder(Offer | Link | End)


def make_offer(account: Identity, peer: PeerId, made_at: int) -> Offer:
    """Raises IdentityError for what is no peer id, or the account's own."""
    peer = peer_id_of(public_key_of(peer))  # as everybody spells it
    signature = account.sign(_message(_LINK, peer, account.peer_id, made_at))
    made = Offer(peer=peer, account=account.peer_id, made_at=made_at, account_signature=signature)
    made.check()
    return made


def make_link(offer: Offer, peer: Identity) -> Link:
    """The offer, accepted. Raises IdentityError if it is for another peer, or not signed by its account."""
    if offer.peer != peer.peer_id:
        raise IdentityError(f"this offer is for {offer.peer}, and this is {peer.peer_id}")
    offer.check()
    return Link(
        peer=offer.peer,
        account=offer.account,
        made_at=offer.made_at,
        account_signature=offer.account_signature,
        peer_signature=peer.sign(_message(_LINK, offer.peer, offer.account, offer.made_at)),
    )


def make_end(account: Identity, peer: PeerId, made_at: int) -> End:
    """Raises IdentityError for what is no peer id."""
    peer = peer_id_of(public_key_of(peer))
    signature = account.sign(_message(_END, peer, account.peer_id, made_at))
    return End(peer=peer, account=account.peer_id, made_at=made_at, account_signature=signature)


def parse_line(text: str) -> Offer | Link | End:
    """A statement that was copied by hand, with whatever line breaks that brought; its signatures are checked.
    Raises IdentityError."""
    if len(text) > MAX_LINE:
        raise IdentityError(f"a line of {len(text)} characters: those of `potluck identity` have fewer than {MAX_LINE}")
    name, _, coded = "".join(text.split()).partition(":")
    if name not in _NAMES:
        raise IdentityError(f"this is no line of `potluck identity`: they begin with {', '.join(_NAMES)}")
    try:
        raw = urlsafe_b64decode(coded + "=" * (-len(coded) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if not body or checksum != _checksum(body):
        raise IdentityError(f"this {name} was cut short or changed on its way: copy the whole line again")
    if body[:1] != _VERSION:
        raise IdentityError(f"this {name} is of version {body[0]}, this program knows {_VERSION[0]}: update Potluck")
    try:
        statement: Offer | Link | End = _decoder.decode(body[1:])
    except (msgspec.MsgspecError, ValueError) as error:
        raise IdentityError(f"this {name} is malformed ({error})") from None
    if statement.line_name != name:
        raise IdentityError(f"this {name} is a {statement.line_name}: copy the whole line again")
    statement.check()
    return statement


class LinkBook:
    """Which links are in force, after the statements so far in the order in which they came. Signatures are the
    caller's to check. Pure."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}
        #: Of each peer the newest statement's time, and how many there were.
        self._said: dict[str, tuple[int, int]] = {}
        #: How long a chain of links ever led up to a key.
        self._below: dict[str, int] = {}

    def refusal(self, statement: Link | End) -> str | None:
        """Why a statement counts for nothing; None: it counts."""
        peer, account = statement.peer, statement.account
        newest, changes = self._said.get(peer, (-1, 0))
        if statement.made_at <= newest:
            return "what was said about this peer before is as new, or newer"
        if changes >= MAX_CHANGES:
            return f"{changes} statements were made about this peer already"
        link = self._links.get(peer)
        if isinstance(statement, End):
            if link is None:
                return "there is no link to end"
            return None if account == self.account_of(peer) else "it is not signed by the account that it counts for"
        if link is not None:
            return f"it counts for {link.account}, which has not ended that"
        above = [account, *self._above(account)]
        if peer in above:
            return "it would lead in a circle"
        if self._below.get(peer, 0) + len(above) > MAX_CHAIN:
            return f"more than {MAX_CHAIN} links would lead from one to the next"
        return None

    def add(self, statement: Link | End) -> None:
        """Raises ValueError for one that counts for nothing."""
        if refusal := self.refusal(statement):
            raise ValueError(refusal)
        peer = statement.peer
        self._said[peer] = statement.made_at, self._said.get(peer, (0, 0))[1] + 1
        if isinstance(statement, End):
            del self._links[peer]
            return
        self._links[peer] = statement
        for steps, key in enumerate(self._above(peer), 1):
            self._below[key] = max(self._below.get(key, 0), self._below.get(peer, 0) + steps)

    def account_of(self, peer: str) -> str:
        """The key at the end of the links that lead on from this one."""
        *_, last = peer, *self._above(peer)
        return last

    def link_of(self, peer: str) -> Link | None:
        return self._links.get(peer)

    def links(self) -> list[Link]:
        return list(self._links.values())

    def newest(self, peer: str) -> int:
        """When the newest statement about a peer was made; -1 if there is none."""
        return self._said.get(peer, (-1, 0))[0]

    def _above(self, peer: str) -> Iterator[str]:
        """It ends: no link leads in a circle."""
        while (link := self._links.get(peer)) is not None:
            peer = link.account
            yield peer


def _message(domain: bytes, peer: str, account: str, made_at: int) -> bytes:
    return domain + public_key_of(PeerId(peer)) + public_key_of(PeerId(account)) + made_at.to_bytes(8, "big")


def _check_signed(signer: str, message: bytes, signature: bytes) -> None:
    if not verify(public_key_of(PeerId(signer)), message, signature):
        raise IdentityError(f"a link that {signer} has not signed")


def _checksum(body: bytes) -> bytes:
    return sha256(body).digest()[:_CHECKSUM_BYTES]
