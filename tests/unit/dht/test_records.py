from __future__ import annotations

import math
import time

import msgspec
import pytest
from hivemind.dht.routing import DHTID
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.records import (
    MAX_LINKS,
    MAX_RECORD_BYTES,
    MAX_WEIGHTS,
    Links,
    RejectedRecord,
    Weights,
    decode,
    encode,
    key_id,
    key_name,
)
from potluck.errors import RecordError
from potluck.net.links import make_end, make_link, make_offer

from dht_world import AHEAD_SECONDS, OTHER_RUN, RUN, commit, identity, replica

NOW = 1e9
EXPIRES = NOW + 50


def read(data: bytes, run=RUN, now=NOW, **where):
    return decode(data, run, now=now, max_ahead_seconds=AHEAD_SECONDS, **where)


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(RejectedRecord) as caught:
        read(data, **options)
    return caught.value.reason


def unsealed(**changes) -> bytes:
    """A commit's envelope with fields replaced after signing."""
    names = ["version", "kind", "signer", "payload", "expires_at", "signature"]
    envelope = dict(zip(names, msgspec.msgpack.decode(encode(commit(), identity(0), RUN, EXPIRES)), strict=True))
    return msgspec.msgpack.encode(list((envelope | changes).values()))


finite = st.floats(allow_nan=False, allow_infinity=False)
commits = st.builds(
    commit,
    module=st.from_regex(r"\A[a-z0-9./_-]{1,64}\Z"),
    round=st.integers(0, 2**32 - 1),
    shard=st.integers(0, 2**16 - 1),
    size=st.integers(0, 2**40),
    tokens=st.integers(0, 2**40),
    loss_before=finite,
    loss_after=finite,
    fragment=st.none() | st.just("ef" * 32),
)
replicas = st.builds(
    replica,
    role=st.sampled_from(["worker", "organizer", "validator", "observer"]),
    digest=st.none() | st.binary(max_size=32),
    load=st.floats(0, 1e9),
    addresses=st.lists(st.text(max_size=60), max_size=8),
    name=st.text(max_size=64),
)


@given(commits | replicas)
def test_every_record_comes_back_as_it_was_signed(record) -> None:
    data = encode(record, identity(0), RUN, EXPIRES)
    key = key_id(key_name(RUN, record.path()))
    signed = read(data, key=key, subkey=identity(0).peer_id)
    assert (signed.record, signed.peer, signed.expires_at) == (record, identity(0).peer_id, EXPIRES)


def test_full_weights_fit_into_a_record() -> None:
    peers = [f"12D3KooW{number:044d}".replace("0", "z") for number in range(111, 111 + 3 * MAX_WEIGHTS)]
    peers = list(dict.fromkeys(peers))[:MAX_WEIGHTS]
    assert len(peers) == MAX_WEIGHTS
    head = {"ledger_size": 2**53 - 1, "ledger_root": "ab" * 32, "made_at": time.time()}
    record = Weights(module="m" * 64, round=2**32 - 1, weights=dict.fromkeys(peers, 1 / 3), **head)
    data = encode(record, identity(0), RUN, EXPIRES)
    assert len(data) <= MAX_RECORD_BYTES
    assert read(data).record == record


def links(number: int, signer: int = 0) -> Links:
    """Of peer `signer`: so many statements."""
    account = identity(1)
    one = make_link(make_offer(account, identity(0).peer_id, 253_402_300_799), identity(0))
    return Links(peer=identity(signer).peer_id, links=[one, make_end(account, identity(0).peer_id, 7), *[one] * number])


def test_links_come_back_as_they_were_and_as_many_as_allowed_fit() -> None:
    record = links(MAX_LINKS - 2)
    data = encode(record, identity(0), RUN, EXPIRES)
    assert len(data) <= MAX_RECORD_BYTES
    assert read(data, key=key_id(key_name(RUN, record.path())), subkey=identity(0).peer_id).record == record
    with pytest.raises(RejectedRecord, match="malformed"):
        encode(links(MAX_LINKS - 1), identity(0), RUN, EXPIRES)


def test_nobody_shows_links_in_anothers_name_or_place_or_run() -> None:
    data = encode(links(0, signer=0), identity(2), RUN, EXPIRES)
    assert reason_of(data) == "wrong_subkey"
    assert reason_of(data, subkey=identity(0).peer_id) == "wrong_subkey"
    own = encode(links(0, signer=2), identity(2), RUN, EXPIRES)
    assert reason_of(own, key=key_id(key_name(RUN, links(0, signer=0).path()))) == "wrong_key"
    assert reason_of(own, run=OTHER_RUN) == "bad_signature"


def test_key_id_is_hiveminds() -> None:
    assert key_id("some/name") == DHTID.generate("some/name").to_bytes()


@given(st.data())
def test_mutated_bytes_raise_nothing_but_record_errors(data) -> None:
    good = encode(commit(), identity(0), RUN, EXPIRES)
    mutated = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for bad in (bytes(mutated), good[:cut], good + bytes(mutated[:cut])):
        if bad != good:
            with pytest.raises(RecordError):
                read(bad)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_record_errors(data) -> None:
    with pytest.raises(RecordError):
        read(data)


def test_ten_megabytes_are_refused_unparsed() -> None:
    assert reason_of(b"\x91" * 10_000_000) == "oversized"


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2**32},
        {"round": -1},
        {"shard": 2**16},
        {"size": 2**40 + 1},
        {"tokens": 2**63},
        {"module": "Stage 0"},
        {"module": "stage.0\n"},
        {"module": ""},
        {"blob": "AB" * 32},
        {"digest": "cd"},
        {"session": b"short"},
        {"steps": 1.5},
    ],
)
def test_a_field_out_of_bounds_cannot_be_signed(changes) -> None:
    with pytest.raises(RejectedRecord, match="malformed"):
        encode(commit(**changes), identity(0), RUN, EXPIRES)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number) -> None:
    with pytest.raises(ValueError, match="finite"):
        commit(loss_after=number)
    fields = {name: getattr(commit(), name) for name in commit().__struct_fields__}
    payload = msgspec.msgpack.encode(fields | {"loss_after": number})
    assert reason_of(unsealed(payload=payload)) == "malformed"
    assert reason_of(unsealed(expires_at=number)) == "malformed"


def test_unknown_fields_kinds_and_versions_are_refused() -> None:
    fields = {name: getattr(commit(), name) for name in commit().__struct_fields__}
    assert reason_of(unsealed(payload=msgspec.msgpack.encode(fields | {"more": 1}))) == "malformed"
    assert reason_of(unsealed(kind="gift")) == "malformed"
    assert reason_of(unsealed(version=2)) == "malformed"
    envelope = msgspec.msgpack.decode(unsealed())
    assert reason_of(msgspec.msgpack.encode([*envelope, "more"])) == "malformed"


def test_a_record_of_another_run_is_refused() -> None:
    assert reason_of(encode(commit(), identity(0), OTHER_RUN, EXPIRES)) == "bad_signature"


def test_a_forged_record_is_refused() -> None:
    assert reason_of(unsealed(signer=identity(1).public_key)) == "bad_signature"
    assert reason_of(unsealed(expires_at=EXPIRES + 1)) == "bad_signature"
    assert reason_of(unsealed(signature=bytes(64))) == "bad_signature"


def test_an_expired_or_far_record_is_refused() -> None:
    data = encode(commit(), identity(0), RUN, EXPIRES)
    assert reason_of(data, now=EXPIRES) == "expired"
    assert reason_of(data, now=EXPIRES - AHEAD_SECONDS - 1) == "far_future"
    assert read(data, now=EXPIRES - AHEAD_SECONDS).expires_at == EXPIRES


def test_a_record_under_another_key_or_subkey_is_refused() -> None:
    data = encode(commit(round=4), identity(0), RUN, EXPIRES)
    assert reason_of(data, key=key_id(key_name(RUN, commit(round=3).path()))) == "wrong_key"
    assert reason_of(data, subkey=identity(1).peer_id) == "wrong_subkey"


def test_one_record_has_one_encoding() -> None:
    good = encode(commit(), identity(0), RUN, EXPIRES)
    assert good[1] == 1  # the version, as the shortest integer
    assert reason_of(good[:1] + b"\xcc\x01" + good[2:]) == "malformed"
