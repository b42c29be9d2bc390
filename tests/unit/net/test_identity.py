from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import IdentityError
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of, public_key_of, verify


def test_created_key_loads_as_itself(tmp_path: Path) -> None:
    created = Identity.create(tmp_path / "key")
    loaded = Identity.load(tmp_path / "key")
    assert loaded.peer_id == created.peer_id and loaded.peer_id.startswith("12D3KooW")
    assert verify(loaded.public_key, b"x", created.sign(b"x"))


def test_file_is_private_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    Identity.create(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["key"]


def test_file_is_what_libp2p_reads(tmp_path: Path) -> None:
    from hivemind.p2p import PeerID
    from hivemind.proto import crypto_pb2

    identity = Identity.create(tmp_path / "key")
    key = crypto_pb2.PrivateKey.FromString((tmp_path / "key").read_bytes())
    assert key.key_type == 1 and key.data[32:] == identity.public_key
    assert PeerID.from_base58(identity.peer_id).to_bytes().endswith(identity.public_key)


def test_existing_key_is_never_replaced(tmp_path: Path) -> None:
    first = Identity.create(tmp_path / "key")
    with pytest.raises(IdentityError, match="never overwritten"):
        Identity.create(tmp_path / "key")
    assert Identity.load_or_create(tmp_path / "key").peer_id == first.peer_id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_that_others_can_read_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    Identity.create(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {tmp_path}/key"):
        Identity.load(tmp_path / "key")


@pytest.mark.parametrize("damage", ["truncated", "longer", "other half", "prefix", "empty"])
def test_damaged_key_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "key"
    Identity.create(path)
    content = bytearray(path.read_bytes())
    if damage == "other half":
        content[-1] ^= 1
    elif damage == "prefix":
        content[1] = 0
    damaged = {"truncated": content[:-1], "longer": content + b"x", "empty": b""}.get(damage, content)
    path.write_bytes(damaged)
    with pytest.raises(IdentityError, match=str(path)):
        Identity.load(path)


def test_missing_key_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="nowhere"):
        Identity.load(tmp_path / "nowhere")


def _create(path: Path, results: multiprocessing.Queue[str]) -> None:
    results.put(Identity.load_or_create(path).peer_id)


def test_processes_that_create_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_create, args=(tmp_path / "key", results)) for _ in range(6)]
    for process in processes:
        process.start()
    ids = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(ids) == 1 and os.listdir(tmp_path) == ["key"]


@given(st.binary(min_size=32, max_size=32))
def test_peer_id_embeds_the_public_key(public_key: bytes) -> None:
    assert public_key_of(peer_id_of(public_key)) == public_key


@settings(max_examples=200)
@given(st.text(max_size=80))
def test_garbage_is_never_a_peer_id(text: str) -> None:
    with pytest.raises(IdentityError):
        public_key_of(PeerId(text))


@given(st.binary(max_size=40), st.binary(max_size=80))
def test_malformed_signatures_are_false_not_errors(public_key: bytes, signature: bytes) -> None:
    assert not verify(public_key, b"message", signature)
