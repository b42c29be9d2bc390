"""The ledger: roots and proofs against RFC 9162 done anew, all or nothing, and every change found."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree, SqliteTree, verify_inclusion

sys.path.insert(0, str(Path(__file__).parents[2]))
from sample_entries import round_entry

from potluck.dht.manifest import RunId
from potluck.errors import LedgerError, UserError
from potluck.incentives import ledger as module
from potluck.incentives.entries import AnyEntry, CreditEntry, RoundEntry, ScoreEntry, Standing, encode
from potluck.incentives.ledger import (
    Consistency,
    Head,
    Inclusion,
    Ledger,
    TwoHistories,
    check_consistency,
    check_inclusion,
    compare,
    compare_files,
    verify_file,
)
from potluck.incentives.validator import Before
from potluck.net.identity import Identity, verify
from potluck.swarm.phases import Round

RUN = RunId("a" * 52)
MANY = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("keys") / "identity.key")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("keys") / "stranger.key")


def score(identity: Identity, number: int, **changes: object) -> ScoreEntry:
    fields = {"module": "model", "round": number, "peer": identity.peer_id, "standing": Standing(), **changes}
    return ScoreEntry(**fields)  # type: ignore[arg-type]


def a_round(identity: Identity, number: int, run: str = RUN) -> RoundEntry:
    return round_entry(number, identity.peer_id, run=run)


def written(path: Path, identity: Identity, batches: list[int], changed: int | None = None) -> Path:
    """A ledger of so many scores in each batch; entry `changed` is another one."""
    numbers = itertools.count()
    with Ledger.open(path, RUN, identity) as ledger:
        for time, count in enumerate(batches):
            these = list(itertools.islice(numbers, count))
            ledger.append([score(identity, n, tokens=1 if n == changed else 0) for n in these], 1_000 + time)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, identity: Identity) -> Path:
    """Entries in four batches: sizes 1, 4, 6 and 11."""
    return written(tmp_path_factory.mktemp("store") / "ledger.sqlite", identity, [1, 3, 2, 5])


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    path = tmp_path_factory.mktemp("portable") / "one.ledger"
    with Ledger.read(store) as ledger:
        ledger.export(path)
    return path


# ---- RFC 9162, by its text --------------------------------------------------------------------------------


def mth(leaves: list[bytes]) -> bytes:
    """Merkle tree hash of RFC 9162, 2.1.1."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def test_roots_are_those_of_rfc_9162_and_of_pymerkle(tmp_path: Path, identity: Identity) -> None:
    blobs: list[bytes] = []
    reference = InmemoryTree()
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        assert ledger.root(0) == mth([]) == reference.get_root()
        for n in range(40):
            head = ledger.append([score(identity, n)], 0)
            blobs.append(encode(score(identity, n)))
            reference.append_entry(blobs[-1])
            assert head.root == mth(blobs).hex() == reference.get_root().hex()
        assert [ledger.root(n) for n in range(41)] == [mth(blobs[:n]) for n in range(41)]


def test_roots_of_subtrees_beyond_a_chunk_are_those_of_rfc_9162(
    tmp_path: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Tree, "CHUNK", 2)
    entries = [score(identity, n) for n in range(700)]
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        assert ledger.append(entries, 0).root == mth([encode(entry) for entry in entries]).hex()


def test_inclusion_proofs_hold_for_their_entry_and_no_other(tmp_path: Path, identity: Identity) -> None:
    reference = InmemoryTree()
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        for size in range(1, 21):
            entry = score(identity, size - 1)
            ledger.append([entry], 0)
            reference.append_entry(encode(entry))
            for index in range(size):
                proof = ledger.prove(index)
                assert check_inclusion(Inclusion.decode(proof.encode())) == score(identity, index)
                theirs = reference.prove_inclusion(index + 1)
                assert [node.hex() for node in theirs.path[1:]] == proof.path
                verify_inclusion(sha256(b"\0" + proof.entry).digest(), bytes.fromhex(ledger.head.root), theirs)
                for other in range(size):
                    if other != index:
                        with pytest.raises(LedgerError, match=identity.peer_id):
                            check_inclusion(msgspec.structs.replace(proof, index=other))


def test_a_proof_that_was_changed_anywhere_does_not_hold(store: Path, stranger: Identity) -> None:
    with Ledger.read(store) as ledger:
        proof, last = ledger.prove(4), ledger.prove(10)
    replace, other = msgspec.structs.replace, "00" * 32
    bad = [
        replace(proof, entry=last.entry),
        replace(proof, entry=proof.entry + b"\0"),
        replace(proof, index=11),
        replace(proof, index=2**62),
        replace(proof, path=[]),
        replace(proof, path=[*proof.path, other]),
        replace(proof, path=proof.path[:-1]),
        replace(proof, path=[other, *proof.path[1:]]),
        replace(proof, path=proof.path[::-1]),
        replace(proof, head=replace(proof.head, root=other)),
        replace(proof, head=replace(proof.head, size=10)),
        replace(proof, head=replace(proof.head, made_at=5)),
        replace(proof, head=replace(proof.head, run=RunId("b" * 52))),
        replace(proof, head=replace(proof.head, validator=stranger.peer_id)),
        replace(proof, head=replace(proof.head, validator="12D3KooW" + "1" * 44)),
    ]
    check_inclusion(proof)
    for one in bad:
        with pytest.raises(LedgerError):
            check_inclusion(one)


def test_consistency_proofs_hold_for_their_sizes_and_no_others(tmp_path: Path, identity: Identity) -> None:
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        heads = [ledger.append([score(identity, n)], 0) for n in range(20)]
    for new in heads:
        with Ledger.open(tmp_path / f"{new.size}", RUN, identity) as ledger:
            ledger.append([score(identity, n) for n in range(new.size)], 0)
            for old in heads[: new.size]:
                proof = ledger.consistency(old.size)
                check_consistency(old, ledger.head, proof)
                wrong = msgspec.structs.replace(old, root="00" * 32)
                forged = Head.sign(identity, RUN, old.size, bytes(32), 0)
                with pytest.raises(LedgerError, match="not signed"):
                    check_consistency(wrong, new, proof)
                with pytest.raises(LedgerError, match=identity.peer_id):
                    check_consistency(forged, new, proof)
                paths = [proof.path[:-1], proof.path[1:], [*proof.path, "00" * 32], ["11" * 32, *proof.path[1:]]]
                for path in paths:
                    if path != proof.path:
                        with pytest.raises(LedgerError):
                            check_consistency(old, new, Consistency(old.size, new.size, path))


def test_a_consistency_proof_does_not_serve_another_history(tmp_path: Path, identity: Identity) -> None:
    with Ledger.read(written(tmp_path / "one", identity, [8, 8], changed=3)) as one:
        old = one.head_at(8)
        proof = one.consistency(8)
    with Ledger.read(written(tmp_path / "two", identity, [8, 8])) as two:
        assert old is not None
        with pytest.raises(LedgerError, match="two histories"):
            check_consistency(old, two.head, proof)
        with pytest.raises(LedgerError, match="two histories"):
            check_consistency(old, two.head, two.consistency(8))
        with pytest.raises(TwoHistories):
            check_consistency(one.head, two.head, two.consistency(16))


def test_a_proof_is_one_for_the_size_that_is_signed(identity: Identity) -> None:
    """A validator may sign a root under a wrong size: no path fits then, however long."""
    data = encode(score(identity, 0))
    leaf, other, third = sha256(b"\0" + data).digest(), bytes([1]) * 32, bytes([2]) * 32

    def node(left: bytes, right: bytes) -> bytes:
        return sha256(b"\x01" + left + right).digest()

    def head(size: int, root: bytes) -> Head:
        return Head.sign(identity, RUN, size, root, 0)

    inclusions = [
        Inclusion(head(1, leaf), 1, data, []),
        Inclusion(head(1, node(other, leaf)), 0, data, [other.hex()]),
        Inclusion(head(100, node(leaf, other)), 0, data, [other.hex()]),
    ]
    for inclusion in inclusions:
        with pytest.raises(LedgerError):
            check_inclusion(inclusion)
    assert check_inclusion(Inclusion(head(2, node(leaf, other)), 0, data, [other.hex()])) == score(identity, 0)

    new = head(100, node(leaf, other))
    with pytest.raises(LedgerError, match="both roots"):
        check_consistency(head(2, leaf), new, Consistency(2, 100, [other.hex()]))
    old, new = node(other, node(other, leaf)), node(other, node(other, node(leaf, third)))
    path = [leaf.hex(), third.hex(), other.hex(), other.hex()]
    with pytest.raises(LedgerError, match="too long"):
        check_consistency(head(3, old), head(4, new), Consistency(3, 4, path))
    old, new = node(other, leaf), node(other, node(leaf, third))
    check_consistency(head(3, old), head(4, new), Consistency(3, 4, path[:-1]))
    with pytest.raises(LedgerError, match="one for 3 and 4"):
        check_consistency(head(4, old), head(3, new), Consistency(3, 4, path[:-1]))


# ---- heads ------------------------------------------------------------------------------------------------


def test_a_head_is_signed_by_its_validator_and_bound_to_all_its_fields(identity: Identity, stranger: Identity) -> None:
    head = Head.sign(identity, RUN, 5, bytes(32), 1234.9)
    head.check()
    assert head.made_at == 1234 and Head.unpack(head.pack()) == head
    assert verify(identity.public_key, b"potluck.ledger.head.1" + head.pack()[:-64], head.signature)
    for position in range(len(head.pack())):
        bad = bytearray(head.pack())
        bad[position] ^= 1
        with pytest.raises(LedgerError):
            Head.unpack(bytes(bad)).check()
    with pytest.raises(LedgerError, match=stranger.peer_id):
        msgspec.structs.replace(head, validator=stranger.peer_id).check()


@given(st.binary(min_size=196, max_size=196) | st.binary(max_size=250))
def test_any_bytes_are_a_head_or_a_ledger_error(data: bytes) -> None:
    try:
        assert Head.unpack(data).pack() == data
    except LedgerError:
        pass


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_proof_or_a_ledger_error(data: bytes) -> None:
    with pytest.raises(LedgerError):
        Inclusion.decode(data)


def test_a_proof_has_bounds(store: Path) -> None:
    with Ledger.read(store) as ledger:
        proof = ledger.prove(0)
    with pytest.raises(LedgerError):
        Inclusion.decode(msgspec.structs.replace(proof, path=["00" * 32] * 65).encode())
    with pytest.raises(LedgerError, match="more than"):
        Inclusion.decode(b" " * module.MAX_PROOF_BYTES + proof.encode())


# ---- writing ----------------------------------------------------------------------------------------------


def test_what_was_appended_is_read_in_order(store: Path, portable: Path, identity: Identity) -> None:
    for path in (store, portable):
        with Ledger.read(path) as ledger:
            assert [entry.round for entry in ledger.entries()] == list(range(11))
            assert [entry.round for entry in ledger.entries(3, 5)] == [3, 4]
            assert [entry.round for entry in ledger.entries(9, 50)] == [9, 10]
            assert [(head.size, head.made_at) for head in ledger.heads()] == [
                (1, 1000),
                (4, 1001),
                (6, 1002),
                (11, 1003),
            ]
            assert (ledger.size, ledger.run, ledger.head.validator) == (11, RUN, identity.peer_id)


def test_a_batch_that_fails_leaves_nothing_behind(tmp_path: Path, identity: Identity) -> None:
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        before = ledger.append([score(identity, n) for n in range(200)], 0)
        with pytest.raises(LedgerError):
            ledger.append([score(identity, 200), score(identity, 201, share=2.0)], 1)
        with pytest.raises(LedgerError, match="run b"):
            ledger.append([score(identity, 200), a_round(identity, 1, run="b" * 52)], 1)
        with pytest.raises(ValueError, match="no entries"):
            ledger.append([], 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Head, "sign", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ledger.append([score(identity, 500 + n) for n in range(100)], 1)
        assert ledger.head == before
        # Subtrees of the leaves that were rolled back must not be remembered.
        after = ledger.append([score(identity, n) for n in range(200, 300)], 2)
    assert after.root == mth([encode(score(identity, n)) for n in range(300)]).hex()
    assert verify_file(tmp_path / "ledger").head == after


def test_a_full_disk_is_the_users_error_and_changes_nothing(tmp_path: Path, identity: Identity) -> None:
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        before = ledger.append([score(identity, 0)], 0)
        ledger._tree.con.execute("PRAGMA max_page_count=1")
        with pytest.raises(UserError, match="space"):
            ledger.append([score(identity, n, refused="x" * 200) for n in range(1000)], 1)
        ledger._tree.con.execute("PRAGMA max_page_count=100000")
        assert ledger.head == before and ledger.append([score(identity, 1)], 2).size == 2


def test_a_ledger_goes_on_where_it_ended(tmp_path: Path, identity: Identity) -> None:
    path = written(tmp_path / "ledger", identity, [3])
    with Ledger.open(path, RUN, identity) as ledger:
        old = ledger.head
        check_consistency(old, ledger.append([score(identity, 3)], 5), ledger.consistency(3))
    assert os.listdir(tmp_path) == ["ledger"]
    assert path.read_bytes()[18:20] == b"\1\1", "at rest it needs no log beside it"


def test_a_ledger_is_its_validators_and_its_runs(tmp_path: Path, identity: Identity, stranger: Identity) -> None:
    path = written(tmp_path / "ledger", identity, [1])
    for run, who in ((RUN, stranger), (RunId("b" * 52), identity)):
        with pytest.raises(LedgerError, match=identity.peer_id):
            Ledger.open(path, run, who)
    with Ledger.read(path) as ledger, pytest.raises(ValueError, match="to read"):
        ledger.append([score(identity, 1)], 0)


def test_a_second_writer_is_noticed(tmp_path: Path, identity: Identity) -> None:
    path = written(tmp_path / "ledger", identity, [1])
    with Ledger.open(path, RUN, identity) as one, Ledger.open(path, RUN, identity) as two:
        one.append([score(identity, 1)], 0)
        with pytest.raises(LedgerError, match="another process"):
            two.append([score(identity, 2)], 0)
    assert verify_file(path).head.size == 2


def test_a_reader_sees_one_state_and_holds_nobody_up(tmp_path: Path, identity: Identity) -> None:
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        ledger.append([score(identity, 0)], 0)
        with Ledger.read(tmp_path / "ledger") as reader:
            ledger.append([score(identity, 1)], 0)
            assert (reader.size, len(list(reader.entries())), reader.root(1)) == (1, 1, ledger.root(1))
            assert list(reader.heads()) == [reader.head]
            with Ledger.read(tmp_path / "ledger") as late:
                assert late.size == 2
            ledger.append([score(identity, 2)], 0)
        assert [entry.round for entry in ledger.entries()] == [0, 1, 2]


def test_pymerkle_opens_a_store_by_itself(store: Path, tmp_path: Path) -> None:
    shutil.copy(store, tmp_path / "copy")
    with SqliteTree(str(tmp_path / "copy")) as tree:
        assert tree.get_root().hex() == verify_file(tmp_path / "copy").head.root


@pytest.mark.parametrize("statement", ["DELETE FROM leaf WHERE id = 3", "UPDATE head SET size = 2 WHERE size = 1"])
def test_a_store_refuses_to_forget(statement: str, store: Path, tmp_path: Path) -> None:
    shutil.copy(store, tmp_path / "copy")
    con = sqlite3.connect(tmp_path / "copy")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        con.execute(statement)
    con.close()


def test_the_ledger_does_not_load_torch() -> None:
    code = "import sys, potluck.incentives.ledger, potluck.incentives.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- changed files ----------------------------------------------------------------------------------------


@MANY
@given(data=st.data())
def test_a_changed_byte_of_a_portable_file_is_found(portable: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(portable.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    bad = tmp_path / "bad.ledger"
    bad.write_bytes(content)
    for look in (verify_file, Ledger.read):
        with pytest.raises(LedgerError):
            look(bad)


def records(content: bytes) -> Iterator[bytes]:
    """What follows the latest head, piece by piece."""
    position = 16 + 196
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        end = position + 4 + (32 + length if length else 196)
        yield content[position:end]
        position = end


@MANY
@given(dice=st.randoms(use_true_random=False))
def test_entries_that_were_left_out_doubled_or_moved_are_found(
    portable: Path, tmp_path: Path, dice: random.Random
) -> None:
    content = portable.read_bytes()
    whole = list(records(content))
    pieces, first = list(whole), dice.randrange(len(whole))
    match dice.choice(["drop", "double", "swap", "move"]):
        case "drop" if pieces[first][:4] != bytes(4):
            del pieces[first]
        case "double":
            pieces.insert(dice.randrange(len(whole)), pieces[first])
        case "swap":
            second = dice.randrange(len(whole))
            pieces[first], pieces[second] = pieces[second], pieces[first]
        case "move":
            pieces.insert(dice.randrange(len(whole)), pieces.pop(first))
    bad = tmp_path / "bad.ledger"
    bad.write_bytes(content[: 16 + 196] + b"".join(pieces))
    if pieces == whole:
        verify_file(bad)
    else:
        with pytest.raises(LedgerError):
            verify_file(bad)


def test_every_truncation_and_anything_behind_the_end_is_found(
    portable: Path, tmp_path: Path, identity: Identity
) -> None:
    content, bad = portable.read_bytes(), tmp_path / "bad.ledger"
    for end in (*range(1, len(content), 7), *range(len(content) - 50, len(content))):
        bad.write_bytes(content[:end])
        with pytest.raises(LedgerError):
            verify_file(bad)
    for rest in (b"\0", bytes(4), content[-100:]):
        bad.write_bytes(content + rest)
        with pytest.raises(LedgerError):
            verify_file(bad)
    bad.write_bytes(content + b"".join(list(records(content))[-1:]))
    with pytest.raises(LedgerError, match=f"{identity.peer_id}: there is more behind the 11"):
        verify_file(bad)


def test_the_place_of_a_change_is_named(portable: Path, tmp_path: Path, identity: Identity) -> None:
    content = portable.read_bytes()
    head, pieces, bad = content[: 16 + 196], list(records(content)), tmp_path / "bad.ledger"
    assert [piece[:4] == bytes(4) for piece in pieces[:7]] == [False, True, False, False, False, True, False]

    def verdict(changed: list[bytes]) -> str:
        bad.write_bytes(head + b"".join(changed))
        with pytest.raises(LedgerError, match=identity.peer_id) as error:
            verify_file(bad)
        return str(error.value)

    def flipped(piece: bytes) -> bytes:
        return piece[:-1] + bytes([piece[-1] ^ 1])

    other = encode(score(identity, 77))
    forged = len(other).to_bytes(4, "big") + sha256(b"\0" + other).digest() + other
    assert "entry 2 is not what its hash says" in verdict([*pieces[:3], flipped(pieces[3]), *pieces[4:]])
    assert "head 1, of 4 entries, has another root" in verdict([*pieces[:3], forged, *pieces[4:]])
    assert "one of entries 1 to 3" in verdict([*pieces[:3], forged, *pieces[4:]])
    assert "head 1, of 4 entries, is not signed" in verdict([*pieces[:5], flipped(pieces[5]), *pieces[6:]])
    assert "head 3, of 11 entries, has another root" in verdict([*pieces[:-1], forged])
    assert "stands behind" in verdict([pieces[0], pieces[1], pieces[1], *pieces[2:]])
    assert "entry 0 claims" in verdict([b"\xff\xff\xff\xff"])
    head = flipped(head)
    assert f"the head of 11 entries is not signed by validator {identity.peer_id}" in verdict([b"garbage"])


def test_a_head_or_a_round_of_somebody_else_does_not_belong_into_a_ledger(
    portable: Path, tmp_path: Path, identity: Identity, stranger: Identity
) -> None:
    content = portable.read_bytes()
    head, pieces, bad = content[: 16 + 196], list(records(content)), tmp_path / "bad.ledger"
    root = sha256(b"\0" + encode(score(identity, 0))).digest()
    for foreign in (Head.sign(stranger, RUN, 1, root, 0), Head.sign(identity, RunId("b" * 52), 1, root, 0)):
        foreign.check()
        bad.write_bytes(head + pieces[0] + bytes(4) + foreign.pack() + b"".join(pieces[2:]))
        with pytest.raises(LedgerError, match=f"head 0, of 1 entries, is validator {foreign.validator}'s"):
            verify_file(bad)
    data = encode(a_round(stranger, 1))
    leaf = sha256(b"\0" + data).digest()
    signed = Head.sign(identity, RUN, 1, leaf, 0)
    bad.write_bytes(b"potluck.ledger.1" + signed.pack() + len(data).to_bytes(4, "big") + leaf + data)
    with pytest.raises(LedgerError, match=f"entry 0: an entry of validator {stranger.peer_id}"):
        verify_file(bad)


@given(st.binary(max_size=400))
def test_any_bytes_behind_a_beginning_that_is_right_are_found(
    tmp_path_factory: pytest.TempPathFactory, portable: Path, data: bytes
) -> None:
    bad = tmp_path_factory.getbasetemp() / "garbage.ledger"
    for start in (b"", b"potluck.ledger.1", portable.read_bytes()[: 16 + 196], b"SQLite format 3\0", b"{"):
        bad.write_bytes(start + data)
        with pytest.raises(LedgerError):
            verify_file(bad)


@MANY
@given(data=st.data())
def test_a_changed_byte_of_a_store_is_found_or_changes_no_entry_and_no_head(
    store: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(store.read_bytes())
    # Most of the pages are empty: half of the tries aim at what is not.
    used = [n for n, byte in enumerate(content) if byte]
    content[data.draw(st.sampled_from(used) | st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    bad = tmp_path / "bad.sqlite"
    for path in tmp_path.iterdir():
        path.unlink()
    bad.write_bytes(content)
    with Ledger.read(store) as good:
        expected, heads = list(good.entries()), list(good.heads())
    try:
        with Ledger.read(bad) as ledger:
            assert list(ledger.entries()) == expected and list(ledger.heads()) == heads
            assert [ledger.head_at(head.size) for head in heads] == heads
            assert [check_inclusion(ledger.prove(n)) for n in range(11)] == expected
    except LedgerError:
        pass


@pytest.mark.parametrize(
    ("statement", "place"),
    [
        ("UPDATE leaf SET entry = (SELECT entry FROM leaf WHERE id = 9) WHERE id = 3", "entry 2 is not what its hash"),
        ("UPDATE leaf SET hash = (SELECT hash FROM leaf WHERE id = 9) WHERE id = 3", "entry 2 is not what its hash"),
        ("UPDATE leaf SET entry = 'text' WHERE id = 3", "entry 2 is missing"),
        ("DELETE FROM leaf WHERE id = 3", "entry 2 is missing"),
        ("DELETE FROM leaf WHERE id = 11", "breaks off behind 10"),
        ("INSERT INTO leaf(entry, hash) SELECT entry, hash FROM leaf WHERE id = 1", "more behind the 11"),
        ("DELETE FROM head WHERE size = 11", "more behind the 6"),
        ("UPDATE head SET size = 2 WHERE size = 4", "head 1, of 4 entries, stands behind 2"),
        ("UPDATE head SET size = 0 WHERE size = 1", "a head for 0 entries"),
        ("UPDATE head SET size = 12 WHERE size = 11", "a head for 12 entries"),
        ("UPDATE head SET signed = (SELECT signed FROM head WHERE size = 1) WHERE size = 4", "head 1, of 1 entries"),
        ("UPDATE head SET signed = zeroblob(196) WHERE size = 4", "behind 4 entries: a head has values"),
        ("UPDATE head SET signed = 7 WHERE size = 11", "not 196 bytes"),
        ("CREATE TABLE more(x)", "no ledger"),
        ("CREATE VIEW more AS SELECT * FROM leaf", "no ledger"),
    ],
)
def test_a_store_that_somebody_edited_is_found(statement: str, place: str, store: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.sqlite"
    shutil.copy(store, bad)
    con = sqlite3.connect(bad)
    triggers = con.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        con.execute(f"DROP TRIGGER {name}")
    con.execute(statement)
    for _, sql in triggers:
        con.execute(sql)
    con.commit()
    con.close()
    with pytest.raises(LedgerError, match=place):
        verify_file(bad)


def test_a_store_whose_pages_do_not_add_up_is_found(store: Path, tmp_path: Path, identity: Identity) -> None:
    content = bytearray(store.read_bytes())
    content[39] ^= 1  # how many pages are free
    (tmp_path / "bad.sqlite").write_bytes(content)
    with pytest.raises(LedgerError, match=f"{identity.peer_id}: its SQLite file is damaged"):
        verify_file(tmp_path / "bad.sqlite")


def test_files_that_are_none_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        verify_file(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a file"):
        verify_file(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(LedgerError, match="nothing has been written"):
        verify_file(tmp_path / "empty")
    (tmp_path / "other.sqlite").touch()
    con = sqlite3.connect(tmp_path / "other.sqlite")
    con.execute("CREATE TABLE t(x)")
    con.close()
    with pytest.raises(LedgerError, match="no ledger"):
        verify_file(tmp_path / "other.sqlite")


# ---- the portable file ------------------------------------------------------------------------------------


def test_a_ledger_has_one_portable_file(store: Path, portable: Path, tmp_path: Path) -> None:
    with Ledger.read(portable) as ledger:
        ledger.export(tmp_path / "again")
    with Ledger.read(store) as ledger:
        (tmp_path / "third").write_text("an older one, to be replaced")
        ledger.export(tmp_path / "third")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "third").read_bytes() == portable.read_bytes()
    assert verify_file(portable) == verify_file(store)
    assert sorted(os.listdir(tmp_path)) == ["again", "third"]


def test_a_writer_exports_what_it_has_acknowledged(tmp_path: Path, identity: Identity) -> None:
    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        with pytest.raises(LedgerError, match="nothing has been written"):
            ledger.export(tmp_path / "file")
        ledger.append([score(identity, 0)], 0)
        ledger.append([a_round(identity, 1)], 1)
        ledger.export(tmp_path / "file")
        with pytest.raises(UserError, match="this ledger itself"):
            ledger.export(tmp_path / "ledger")
        with pytest.raises(UserError, match="cannot write"):
            ledger.export(tmp_path / "nowhere" / "file")
        assert verify_file(tmp_path / "file").head == ledger.head
    assert sorted(os.listdir(tmp_path)) == ["file", "ledger"]


# ---- two histories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 1, 3, 4, 7, 12, 15])
def test_two_histories_are_told_with_the_first_entry_that_differs(
    changed: int, tmp_path: Path, identity: Identity
) -> None:
    one = written(tmp_path / "one", identity, [3, 5, 8])
    two = written(tmp_path / "two", identity, [3, 13, 4], changed)
    with pytest.raises(
        TwoHistories, match=f"{identity.peer_id} shows two histories .* from entry {changed} on"
    ) as told:
        compare_files(one, two)
    assert told.value.entry == changed
    a, b = told.value.heads
    a.check()
    b.check()
    assert a.size == b.size == (3 if changed < 3 else 16)  # where both were signed first after it
    assert a.root != b.root


def test_histories_without_heads_of_one_size_are_told_by_their_latest(tmp_path: Path, identity: Identity) -> None:
    one = written(tmp_path / "one", identity, [9], changed=2)
    two = written(tmp_path / "two", identity, [10])
    with pytest.raises(TwoHistories) as told:
        compare_files(one, two)
    assert (told.value.entry, [head.size for head in told.value.heads]) == (2, [9, 10])


def test_a_ledger_that_goes_on_is_one_history(tmp_path: Path, store: Path, portable: Path, identity: Identity) -> None:
    longer = written(tmp_path / "longer", identity, [2, 9, 30])
    for one, other in itertools.permutations([longer, store, portable], 2):
        compare_files(one, other)
    with Ledger.read(longer) as ledger, Ledger.read(store) as short:
        compare(ledger, short.head)
        compare(short.head, short.head)
        with pytest.raises(LedgerError, match="cannot be told"):
            compare(short, ledger.head)
        with pytest.raises(LedgerError, match="cannot be told"):
            compare(short.head, ledger.head)


def test_a_head_that_somebody_kept_convicts(tmp_path: Path, identity: Identity) -> None:
    with Ledger.read(written(tmp_path / "one", identity, [9], changed=2)) as one:
        kept = one.head
        proof = tmp_path / "proof.json"
        proof.write_bytes(one.prove(3).encode())
    path = written(tmp_path / "two", identity, [9, 4])
    with Ledger.read(path) as two:
        with pytest.raises(TwoHistories) as told:
            compare(kept, two)
        assert told.value.heads == (kept, two.head_at(9))
        with pytest.raises(TwoHistories):
            compare(kept, two.head_at(9) or two.head)
    with pytest.raises(TwoHistories):
        compare_files(proof, path)


def test_ledgers_of_two_validators_are_no_two_histories(tmp_path: Path, identity: Identity, stranger: Identity) -> None:
    one, two = written(tmp_path / "one", identity, [3]), written(tmp_path / "two", stranger, [3])
    with pytest.raises(UserError, match="nothing to do with each other"):
        compare_files(one, two)


def test_a_forged_head_accuses_nobody(store: Path, identity: Identity) -> None:
    with Ledger.read(store) as ledger:
        forged = msgspec.structs.replace(ledger.head, root="00" * 32)
        with pytest.raises(LedgerError, match="not signed") as error:
            compare(ledger, forged)
        assert not isinstance(error.value, TwoHistories)


def test_entries_are_the_same_whoever_reads_them(store: Path, portable: Path) -> None:
    def all_of(path: Path) -> list[AnyEntry]:
        with Ledger.read(path) as ledger:
            return list(ledger.entries())

    assert all_of(store) == all_of(portable)


# ---- what a validator takes up ------------------------------------------------------------------------------


def test_every_round_that_waited_for_weights_is_still_owed_after_a_restart(tmp_path: Path, identity: Identity) -> None:
    def paid(number: int) -> CreditEntry:
        return CreditEntry(module="model", round=number, opinions={}, incentive={}, paid={})

    with Ledger.open(tmp_path / "ledger", RUN, identity) as ledger:
        for number in range(5):
            ledger.append([a_round(identity, number), score(identity, number, came=True)], 1_000 + number)
        ledger.append([paid(0), paid(1)], 2_000)
        before = Before.read(ledger, "model", None)
    assert sorted(before.owed) == [2, 3, 4]
    assert all(list(owed.peers) == [identity.peer_id] for owed in before.owed.values())
    assert before.owed[Round(3)].beacon == "cc" * 32


def test_lots_are_the_validators_own_and_never_change(tmp_path: Path, identity: Identity, stranger: Identity) -> None:
    with Ledger.open(tmp_path / "a", RUN, identity) as one, Ledger.open(tmp_path / "b", RUN, stranger) as other:
        assert one.lot(b"1") == one.lot(b"1") != other.lot(b"1")
        assert len({one.lot(bytes([n])) % 4 for n in range(64)}) == 4
