"""Links: signed by both sides or by nobody, in one line of text, and which of them are in force."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import IdentityError
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.links import (
    MAX_CHAIN,
    MAX_CHANGES,
    MAX_LINE,
    End,
    Link,
    LinkBook,
    Offer,
    make_end,
    make_link,
    make_offer,
    parse_line,
)


def identity(number: int) -> Identity:
    return Identity(Path("/nowhere"), Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


ANNA, LAPTOP, DESKTOP, THIEF = map(identity, range(1, 5))
NOW = 1_700_000_000


def link(peer: Identity, account: Identity, at: int = NOW) -> Link:
    return make_link(make_offer(account, peer.peer_id, at), peer)


def end(peer: Identity, account: Identity, at: int) -> End:
    return make_end(account, peer.peer_id, at)


def book(*statements: Link | End) -> LinkBook:
    made = LinkBook()
    for one in statements:
        made.add(one)
    return made


def line_of(body: bytes, name: str = "potluck-link") -> str:
    return f"{name}:{urlsafe_b64encode(body + sha256(body).digest()[:4]).rstrip(b'=').decode()}"


STATEMENTS = [make_offer(ANNA, LAPTOP.peer_id, NOW), link(LAPTOP, ANNA), end(LAPTOP, ANNA, NOW)]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_survives_being_copied_by_hand(statement: Offer | Link | End) -> None:
    line = statement.line()
    assert parse_line(line) == statement and len(line) <= MAX_LINE and line.isprintable() and " " not in line
    wrapped = "\n  ".join(line[at : at + 72] for at in range(0, len(line), 72))
    assert parse_line(f"  {wrapped}\n") == statement


@given(st.sampled_from(STATEMENTS), st.data())
def test_a_line_that_was_damaged_is_never_another_statement(statement: Offer | Link | End, data: st.DataObject) -> None:
    line = statement.line()
    where = data.draw(st.integers(0, len(line) - 1))
    for damaged in (line[:where], line[:where] + data.draw(st.characters()) + line[where + 1 :]):
        try:
            assert parse_line(damaged) == statement  # the bits of its last character that mean nothing
        except IdentityError:
            pass


@given(st.text(max_size=80) | st.sampled_from(["potluck-link:", "potluck-link:AAAA", "potluck:abc"]))
def test_any_text_is_a_statement_or_an_identity_error(text: str) -> None:
    with pytest.raises(IdentityError):
        parse_line(text)


def test_what_is_wrong_with_a_line_is_said() -> None:
    good = link(LAPTOP, ANNA)
    body = b"\x01" + msgspec.msgpack.encode(good)
    assert parse_line(line_of(body)) == good
    for text, says in (
        ("x" * (MAX_LINE + 1), "fewer than"),
        ("potluck-gift:" + good.line().partition(":")[2], "they begin with"),
        (good.line()[:-9], "cut short"),
        (line_of(b"\x02" + body[1:]), "version 2"),
        (line_of(body, "potluck-offer"), "is a potluck-link"),
        (line_of(body[:-1]), "malformed"),
    ):
        with pytest.raises(IdentityError, match=says):
            parse_line(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"account": THIEF.peer_id},  # another's credit
        {"peer": THIEF.peer_id},  # at somebody's door
        {"made_at": NOW + 1},
        {"account_signature": bytes(64)},
        {"peer_signature": bytes(64)},
        {"peer_signature": link(LAPTOP, ANNA).account_signature},
    ],
)
def test_a_forged_or_one_sided_link_is_refused(changes: dict[str, object]) -> None:
    good = link(LAPTOP, ANNA)
    good.check()
    forged = msgspec.structs.replace(good, **changes)
    with pytest.raises(IdentityError, match="has not signed"):
        forged.check()
    with pytest.raises(IdentityError, match="has not signed"):
        parse_line(forged.line())


def test_neither_half_of_a_link_ends_it() -> None:
    good = link(LAPTOP, ANNA)
    fields = {"peer": good.peer, "account": good.account, "made_at": good.made_at}
    for signature in (good.account_signature, good.peer_signature):
        with pytest.raises(IdentityError, match="has not signed"):
            End(account_signature=signature, **fields).check()
    ended = end(LAPTOP, ANNA, NOW)
    with pytest.raises(IdentityError, match="has not signed"):
        Offer(account_signature=ended.account_signature, **fields).check()


def test_an_offer_is_for_one_peer_and_no_key_is_linked_to_itself() -> None:
    with pytest.raises(IdentityError, match=f"for {LAPTOP.peer_id}"):
        make_link(make_offer(ANNA, LAPTOP.peer_id, NOW), THIEF)
    with pytest.raises(IdentityError, match="itself"):
        make_offer(ANNA, ANNA.peer_id, NOW)
    for made in (make_offer, make_end):
        with pytest.raises(IdentityError, match="not a"):
            made(ANNA, PeerId("12D3KooWnobody"), NOW)
        assert made(ANNA, PeerId(f"{LAPTOP.peer_id}\n"), NOW).peer == LAPTOP.peer_id


def test_credit_counts_for_the_key_at_the_end_of_the_links() -> None:
    made = book(link(LAPTOP, ANNA), link(ANNA, DESKTOP))
    assert [made.account_of(one.peer_id) for one in (LAPTOP, ANNA, DESKTOP, THIEF)] == [
        *[DESKTOP.peer_id] * 3,
        THIEF.peer_id,
    ]


def test_a_link_holds_until_its_account_ends_it() -> None:
    """So that who finds a lost machine, or a key that was rotated away, cannot turn it elsewhere."""
    made = book(link(LAPTOP, ANNA, NOW))
    for other in (link(LAPTOP, THIEF, NOW + 1), end(LAPTOP, THIEF, NOW + 1), end(LAPTOP, LAPTOP, NOW + 1)):
        assert made.refusal(other)
        with pytest.raises(ValueError):
            made.add(other)
    assert made.account_of(LAPTOP.peer_id) == ANNA.peer_id
    made.add(end(LAPTOP, ANNA, NOW + 1))
    assert made.account_of(LAPTOP.peer_id) == LAPTOP.peer_id
    made.add(link(LAPTOP, DESKTOP, NOW + 2))
    assert made.account_of(LAPTOP.peer_id) == DESKTOP.peer_id


def test_after_a_rotation_only_the_new_key_ends_links() -> None:
    made = book(link(LAPTOP, ANNA, NOW), link(ANNA, DESKTOP, NOW))
    assert made.refusal(end(LAPTOP, ANNA, NOW + 1)) and made.refusal(link(ANNA, THIEF, NOW + 1))
    made.add(end(LAPTOP, DESKTOP, NOW + 1))
    assert made.account_of(LAPTOP.peer_id) == LAPTOP.peer_id and made.account_of(ANNA.peer_id) == DESKTOP.peer_id


def test_a_replayed_older_statement_changes_nothing() -> None:
    first, ended = link(LAPTOP, ANNA, NOW), end(LAPTOP, ANNA, NOW + 1)
    made = book(first, ended)
    assert made.refusal(first) and made.refusal(link(LAPTOP, THIEF, NOW + 1))
    made.add(link(LAPTOP, ANNA, NOW + 2))
    assert made.refusal(ended) and made.refusal(first)
    assert book().refusal(ended)  # there is nothing to end


def test_links_never_lead_in_a_circle() -> None:
    made = book(link(LAPTOP, ANNA), link(ANNA, DESKTOP))
    for peer, account in ((DESKTOP, ANNA), (DESKTOP, LAPTOP)):
        assert "circle" in (made.refusal(link(peer, account)) or "")


@pytest.mark.parametrize("upwards", [True, False])
def test_a_chain_of_links_and_the_changes_of_one_peer_are_bounded(upwards: bool) -> None:
    keys = [identity(number) for number in range(10, 12 + MAX_CHAIN)]
    links = [link(peer, account) for peer, account in pairwise(keys)]
    made = LinkBook()
    ordered = links if upwards else links[::-1]
    for one in ordered[:-1]:
        made.add(one)
    assert len(links) == MAX_CHAIN + 1 and str(MAX_CHAIN) in (made.refusal(ordered[-1]) or "")

    made = LinkBook()
    for at in range(MAX_CHANGES):
        made.add(end(LAPTOP, ANNA, NOW + at) if at % 2 else link(LAPTOP, ANNA, NOW + at))
    assert made.refusal(link(LAPTOP, ANNA, NOW + MAX_CHANGES))
