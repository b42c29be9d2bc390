"""Ledger entries: one form of bytes for each, bounds, and nothing but LedgerError for anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import LedgerError
from potluck.incentives.entries import (
    AnyEntry,
    CreditEntry,
    LinkEntry,
    RoundEntry,
    ScoreEntry,
    Standing,
    decode,
    encode,
)
from potluck.net.identity import Identity, peer_id_of
from potluck.net.links import make_end, make_link, make_offer

ANNA, LAPTOP = (
    Identity(Path("/nowhere"), Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2)
)
LINK = make_link(make_offer(ANNA, LAPTOP.peer_id, 5), LAPTOP)
PEERS = [peer_id_of(bytes([n]) * 32) for n in range(4)]
HASH = "ab" * 32

peers = st.sampled_from(PEERS)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
rounds = st.integers(0, 2**32 - 1)
modules = st.sampled_from(["model", "stage/0", "expert/3.1"])
numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
credits = st.floats(0, 1e12)

standings = st.builds(
    Standing,
    mu=numbers,
    sigma=numbers,
    usefulness=numbers,
    evidence=numbers,
    verdict=st.integers(-1, 1),
    seen=rounds,
    last=st.integers(-1, 2**32 - 1),
    missed=rounds,
    harmed=st.lists(st.booleans(), max_size=8),
    unsynced=rounds,
)
entries: st.SearchStrategy[AnyEntry] = st.one_of(
    st.builds(
        RoundEntry,
        module=modules,
        round=rounds,
        run=st.just("a" * 52),
        validator=peers,
        state=hashes,
        next_state=hashes,
        beside=st.dictionaries(modules, hashes),
        beacon=hashes,
        loss_before=numbers,
        loss_after=numbers,
        credit=numbers,
        usual=credits,
        windows=st.integers(1, 65536),
        tests=st.integers(0, 65536),
        points=st.integers(0, 1024),
        error=credits,
        network_fault=st.booleans(),
    ),
    st.builds(
        ScoreEntry,
        module=modules,
        round=rounds,
        peer=peers,
        blob=st.none() | hashes,
        size=st.integers(0, 2**40),
        tokens=st.integers(0, 2**40),
        steps=rounds,
        digest=st.none() | hashes,
        witness=st.none() | hashes,
        came=st.booleans(),
        refused=st.text(max_size=200),
        weight=shares,
        alignment=numbers,
        random_delta=st.none() | numbers,
        own_delta=st.none() | numbers,
        place=st.none() | st.integers(1, 2**16 - 1),
        among=st.integers(0, 2**16 - 1),
        standing=standings,
        factors=st.dictionaries(st.text(max_size=32), credits, max_size=16),
        score=credits,
        share=shares,
    ),
    st.builds(
        CreditEntry,
        module=modules,
        round=rounds,
        opinions=st.dictionaries(peers, st.dictionaries(peers, shares)),
        incentive=st.dictionaries(peers, shares),
        dividends=st.dictionaries(peers, shares),
        paid=st.dictionaries(peers, credits),
    ),
    st.builds(
        LinkEntry,
        module=modules,
        round=rounds,
        link=st.sampled_from([LINK, make_end(ANNA, LAPTOP.peer_id, 6)]),
    ),
)


def score(**changes: Any) -> ScoreEntry:
    return ScoreEntry(**{"module": "model", "round": 3, "peer": PEERS[0], "standing": Standing(), **changes})


@given(entries)
def test_an_entry_comes_back_as_it_was(entry: AnyEntry) -> None:
    assert decode(encode(entry)) == entry


@given(st.lists(st.tuples(peers, credits), unique_by=lambda item: item[0]), st.randoms())
def test_the_order_in_which_a_dict_was_filled_does_not_change_the_bytes(
    paid: list[tuple[str, float]], dice: Any
) -> None:
    other = dice.sample(paid, len(paid))
    one, two = (
        CreditEntry(module="model", round=1, opinions={}, incentive={}, paid=dict(pairs)) for pairs in (paid, other)
    )
    assert encode(one) == encode(two)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_entry_or_a_ledger_error(data: bytes) -> None:
    try:
        assert encode(decode(data)) == data
    except LedgerError:
        pass


@given(entries, st.data())
def test_changed_bytes_are_never_taken_for_the_entry(entry: AnyEntry, data: st.DataObject) -> None:
    good = encode(entry)
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode(bytes(bad))
    except LedgerError:
        return
    assert encode(changed) == bad != good


@pytest.mark.parametrize("name", ["peer", "account", "made_at", "peer_signature", "account_signature"])
def test_a_link_that_one_side_did_not_sign_is_no_entry(name: str) -> None:
    """So whoever verifies a ledger has both signatures checked, from the entry alone."""
    fields = msgspec.msgpack.decode(encode(LinkEntry(module="model", round=3, link=LINK)))
    others = {"peer": PEERS[1], "account": PEERS[2], "made_at": 7}
    fields["link"][name] = others.get(name, bytes(64))
    with pytest.raises(LedgerError, match="has not signed"):
        decode(msgspec.msgpack.encode(fields))
    forged = msgspec.structs.replace(LINK, **{name: fields["link"][name]})
    with pytest.raises(ValueError, match="has not signed"):
        LinkEntry(module="model", round=3, link=forged)


@pytest.mark.parametrize("rest", [b"\0", b"\xc0", b"\x80"])
def test_nothing_may_follow_an_entry(rest: bytes) -> None:
    with pytest.raises(LedgerError):
        decode(encode(score()) + rest)


def test_other_encodings_of_an_entry_are_refused() -> None:
    fields = msgspec.msgpack.decode(encode(score(alignment=2.0)))
    assert decode(msgspec.msgpack.encode(fields)) == score(alignment=2.0)
    for changes in ({"alignment": 2}, {"place": None}, {"score": 0}):
        other = {**fields, **changes} if "place" not in changes else dict(reversed(fields.items()))
        with pytest.raises(LedgerError, match="canonical"):
            decode(msgspec.msgpack.encode(other))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    fields = msgspec.msgpack.decode(encode(score()))
    for name in ("alignment", "random_delta", "weight", "score"):
        with pytest.raises(LedgerError):
            decode(msgspec.msgpack.encode({**fields, name: value}))


BEYOND: list[Callable[[], AnyEntry]] = [
    lambda: CreditEntry(module="model", round=1, opinions={}, incentive={}, paid={PEERS[0]: math.inf}),
    lambda: score(factors={"away": math.inf}),
    lambda: score(standing=Standing(mu=math.nan)),
    lambda: score(standing=Standing(evidence=-math.inf)),
]


@pytest.mark.parametrize("entry", BEYOND)
def test_numbers_inside_of_others_that_are_not_finite_are_refused(entry: Callable[[], AnyEntry]) -> None:
    with pytest.raises((LedgerError, ValueError)):
        encode(entry())
