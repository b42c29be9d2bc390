"""Ledgers over the network: a copy is what the validator signed, whatever comes instead; an old copy is never lost."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from potluck.dht.directory import DirectoryView
from potluck.dht.manifest import RunId
from potluck.dht.records import Replica, Signed, Weights
from potluck.errors import (
    LedgerError,
    NetworkError,
    PotluckError,
    RpcClosed,
    RpcRefused,
    RpcRemoteError,
    RpcTimeout,
    UserError,
)
from potluck.incentives.entries import ScoreEntry, Standing, encode
from potluck.incentives.ledger import (
    Head,
    Leaf,
    Ledger,
    TwoHistories,
    pack_record,
    read_piece,
    unpack_records,
    verify_file,
)
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of
from potluck.net.rpc import Reply
from potluck.peer import ledgers
from potluck.peer.ledgers import (
    HEAD_METHOD,
    READ_METHOD,
    Claim,
    LedgerService,
    choose,
    fetch,
    find_validators,
    read_claims,
)

RUN, OTHER_RUN = RunId("a" * 52), RunId("b" * 52)
READER = PeerId(peer_id_of(bytes(32)))
Answer = Callable[[dict[str, Any], bytes], bytes]


class FakeRpc:
    """What `Rpc` does with handlers and errors, without a network. `lies`: answers made of the honest ones."""

    def __init__(self) -> None:
        self.methods: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lies: dict[str, Answer] = {}
        self.failures: list[PotluckError] = []

    def register(self, method: str, handler: Any, *, max_request_bytes: int) -> None:
        self.methods[method] = handler

    async def call(
        self, peer: PeerId, method: str, head: dict[str, Any], *, timeout_seconds: float, max_response_bytes: int
    ) -> Reply:
        self.asked.append((method, head))
        if self.failures:
            raise self.failures.pop(0)
        try:
            body = bytes((await self.methods[method](READER, head, memoryview(b""))).body)
        except RpcRefused:
            raise
        except PotluckError as error:
            raise RpcRemoteError(type(error).__name__, str(error)) from None
        if method in self.lies:
            body = self.lies[method](head, body)
        if len(body) > max_response_bytes:
            raise RpcClosed("the stream broke")
        return Reply({}, body)

    @property
    def starts(self) -> list[int]:
        return [head["start"] for method, head in self.asked if method == READ_METHOD]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("keys") / "identity.key")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("keys") / "stranger.key")


def score(identity: Identity, number: int, tokens: int = 0) -> ScoreEntry:
    return ScoreEntry(module="model", round=number, peer=identity.peer_id, standing=Standing(), tokens=tokens)


def append(path: Path, identity: Identity, *batches: int, tokens: int = 0, run: RunId = RUN) -> None:
    with Ledger.open(path, run, identity) as ledger:
        for count in batches:
            new = [score(identity, n, tokens) for n in range(ledger.size, ledger.size + count)]
            ledger.append(new, 1_700_000_000 + ledger.size)


class Validator:
    """A ledger that is served: 11 entries in four batches."""

    def __init__(self, folder: Path, identity: Identity, run: RunId = RUN) -> None:
        self.path, self.identity, self.rpc = folder / "ledger.sqlite", identity, FakeRpc()
        append(self.path, identity, 1, 3, 2, 5, run=run)
        self.ledger = Ledger.open(self.path, run, identity)
        self.said: list[dict[str, Any]] = []
        self.serve()

    def serve(self) -> None:
        seconds = itertools.count()  # one for each request: nobody is too fast
        LedgerService(
            self.rpc, self.ledger, None, lambda name, **fields: self.said.append(fields), lambda: next(seconds)
        )

    def append(self, *batches: int) -> None:
        for count in batches:
            size = self.ledger.size
            self.ledger.append([score(self.identity, n) for n in range(size, size + count)], 1_800_000_000 + size)

    def becomes(self, other: Path) -> None:
        """From now on it serves another ledger of its own."""
        self.ledger.close()
        self.ledger = Ledger.open(other, RUN, self.identity)
        self.serve()

    def export(self, path: Path) -> bytes:
        with Ledger.read(self.path) as ledger:
            ledger.export(path)
        return path.read_bytes()

    def fetch(self, path: Path, *claims: Claim, peer: PeerId | None = None) -> ledgers.Copy:
        return asyncio.run(fetch(self.rpc, RUN, peer or self.identity.peer_id, path, claims))


@pytest.fixture
def validator(tmp_path: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(ledgers, "ANSWER_BYTES", 900)  # a few entries to an answer
    monkeypatch.setattr(ledgers, "LEAST_ANSWER_BYTES", 100)
    (tmp_path / "home").mkdir()
    found = Validator(tmp_path / "home", identity)
    monkeypatch.setattr(ledgers, "ANSWER_BYTES", 2000)
    yield found
    found.ledger.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "copies").mkdir()
    return tmp_path / "copies" / "validator.ledger"


# ---- an honest validator ------------------------------------------------------------------------------------


def test_a_copy_is_what_the_validator_itself_exports(validator: Validator, copy: Path, tmp_path: Path) -> None:
    done = validator.fetch(copy)
    assert copy.read_bytes() == validator.export(tmp_path / "exported")
    assert (done.head, done.old) == (validator.ledger.head, 0)
    assert verify_file(copy).heads == 4
    assert len(validator.rpc.starts) > 2, "all in one answer: the test shows nothing"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("room", [1, 200, 400, 700, 10**6])
def test_pieces_of_any_size_are_the_whole_and_none_is_larger_than_it_may_be(validator: Validator, room: int) -> None:
    size, whole, start, most = validator.ledger.size, b"", 0, 0
    while start < size:
        piece = read_piece(validator.path, start, size, room)
        records = list(unpack_records(piece, validator.ledger.head, start))
        entries = [record for record in records if isinstance(record, Leaf)]
        assert len(piece) <= room or len(entries) == 1
        whole, start, most = whole + piece, start + len(entries), max(most, len(entries))
    exported = validator.export(validator.path.with_name("exported"))
    assert exported.endswith(whole) and len(exported) - len(whole) == 16 + 196
    assert most == (1 if room == 1 else most) and (most == size) == (room == 10**6)


def test_a_copy_is_continued_with_what_is_new_only(validator: Validator, copy: Path, tmp_path: Path) -> None:
    validator.fetch(copy)
    validator.append(4, 1)
    validator.rpc.asked.clear()
    done = validator.fetch(copy)
    assert (done.old, done.head.size) == (11, 16) and min(validator.rpc.starts) == 11
    assert copy.read_bytes() == validator.export(tmp_path / "exported")
    validator.rpc.asked.clear()
    assert validator.fetch(copy).old == 16 and validator.rpc.starts == []


def test_what_is_written_meanwhile_waits_for_the_next_copy(validator: Validator, copy: Path) -> None:
    def grow(head: dict[str, Any], body: bytes) -> bytes:
        validator.append(2)
        return body

    validator.rpc.lies[READ_METHOD] = grow
    assert validator.fetch(copy).head.size == 11 and validator.ledger.size > 14
    assert verify_file(copy).head.size == 11


def test_a_validator_that_is_busy_or_out_of_reach_for_a_moment_is_asked_again(validator: Validator, copy: Path) -> None:
    validator.rpc.failures = [RpcRefused("busy", 0.01), RpcTimeout("slow"), RpcRefused("busy", 0.01)]
    assert validator.fetch(copy).head.size == 11


def test_progress_counts_entries(validator: Validator, copy: Path) -> None:
    told: list[tuple[int, int]] = []
    peer = validator.identity.peer_id
    asyncio.run(fetch(validator.rpc, RUN, peer, copy, on_progress=lambda *both: told.append(both)))
    assert told[0] == (0, 11) and told[-1] == (11, 11) and told == sorted(told) and len(told) > 2


# ---- the service --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"run": RUN, "start": 0, "stop": 12},
        {"run": RUN, "start": 3, "stop": 3},
        {"run": RUN, "start": -1, "stop": 3},
        {"run": RUN, "start": False, "stop": True},
        {"run": RUN, "start": "0", "stop": 3.0},
        {"run": RUN, "start": 2**70, "stop": 2**71},
        {"run": RUN},
        {"run": OTHER_RUN, "start": 0, "stop": 3},
        {"start": 0, "stop": 3},
    ],
)
def test_what_is_not_there_is_not_given(validator: Validator, asked: dict[str, Any]) -> None:
    for method in (READ_METHOD, HEAD_METHOD) if asked.get("run") != RUN else (READ_METHOD,):
        with pytest.raises(RpcRemoteError) as refused:
            asyncio.run(
                validator.rpc.call(PeerId("p"), method, asked, timeout_seconds=1, max_response_bytes=10**6),
            )
        assert refused.value.kind == "LedgerError" and str(validator.path) not in str(refused.value)


def test_strangers_do_not_hear_of_this_machine(validator: Validator, copy: Path) -> None:
    validator.ledger._tree.con.execute("DROP TABLE head")
    with pytest.raises(NetworkError, match="cannot read its ledger now") as failed:
        validator.fetch(copy)
    assert str(validator.path.parent) not in str(failed.value)
    assert str(validator.path) in validator.said[0]["error"]


def test_a_ledger_that_is_empty_yet_is_said_to_be(tmp_path: Path, identity: Identity, copy: Path) -> None:
    rpc = FakeRpc()
    with Ledger.open(tmp_path / "empty", RUN, identity) as ledger:
        LedgerService(rpc, ledger, None, lambda name, **fields: None)
        with pytest.raises(NetworkError, match="written nothing yet"):
            asyncio.run(fetch(rpc, RUN, identity.peer_id, copy))
    assert not copy.exists()


def served(rpc: FakeRpc, peers: int, times: int) -> int:
    """How many of so many requests by so many peers are answered."""

    async def go() -> int:
        answered = 0
        for number in range(times):
            peer = PeerId(f"peer-{number % peers}")
            try:
                await rpc.methods[READ_METHOD](peer, {"run": RUN, "start": 0, "stop": 1}, memoryview(b""))
                answered += 1
            except RpcRefused as refused:
                assert refused.retry_after_seconds > 0
        return answered

    return asyncio.run(go())


def test_one_peer_and_all_together_get_so_many_answers_and_more_with_time(validator: Validator) -> None:
    now = 0.0
    LedgerService(validator.rpc, validator.ledger, None, lambda name, **fields: None, lambda: now)
    assert served(validator.rpc, 1, 100) == 32
    assert served(validator.rpc, 50, 100) == 32, "a flood of identities is no more than one peer and another"
    now = 1.0
    assert served(validator.rpc, 1, 100) == 8
    assert served(validator.rpc, 50, 100) == 8


def test_who_may_upload_little_gives_little(tmp_path: Path, identity: Identity) -> None:
    now, rpc, path = 0.0, FakeRpc(), tmp_path / "ledger"
    append(path, identity, 200)
    with Ledger.open(path, RUN, identity) as ledger:
        LedgerService(rpc, ledger, 10_000.0, lambda name, **fields: None, lambda: now)

        async def spend(until: int) -> int:
            nonlocal now
            total = 0
            for second in range(until):
                now = float(second)
                try:
                    asked = {"run": RUN, "start": 0, "stop": 200}
                    total += len((await rpc.methods[READ_METHOD](READER, asked, memoryview(b""))).body)
                except RpcRefused:
                    pass
            return total

        assert 60_000 < asyncio.run(spend(40)) <= 40 * 2500 + 3 * 4096


# ---- a validator that sends something else ------------------------------------------------------------------


def first(change: Callable[[bytes], bytes]) -> Answer:
    return lambda head, body: change(body) if head.get("start", 0) == 0 else body


def in_the_middle(change: Callable[[bytes], bytes]) -> Answer:
    return lambda head, body: change(body) if head["start"] > 0 else body


def a_leaf(identity: Identity, number: int) -> bytes:
    entry = encode(score(identity, number, tokens=7))
    return pack_record(Leaf(sha256(b"\0" + entry).digest(), entry))


PIECES: dict[str, Callable[[Identity], Answer]] = {
    "nothing": lambda me: first(lambda body: b""),
    "nothing in the middle": lambda me: in_the_middle(lambda body: b""),
    "garbage": lambda me: first(lambda body: random.Random(3).randbytes(len(body))),
    "zeros": lambda me: first(lambda body: bytes(len(body))),
    "half an entry": lambda me: first(lambda body: body[:-100]),
    "a length beyond all bounds": lambda me: first(lambda body: b"\xff\xff\xff\xff" + body[4:]),
    "another entry": lambda me: first(lambda body: a_leaf(me, 0) + body[len(a_leaf(me, 0)) :]),
    "the first piece again": lambda me: lambda head, body: body if head["start"] == 0 else a_leaf(me, 0),
    "more than it signed": lambda me: in_the_middle(lambda body: body + b"".join(a_leaf(me, n) for n in range(2))),
    "a head that is no head": lambda me: first(lambda body: body + bytes(4) + random.Random(4).randbytes(196)),
    "its entries in another order": lambda me: in_the_middle(lambda body: _swapped(body)),
}


def _swapped(body: bytes) -> bytes:
    length = 4 + 32 + int.from_bytes(body[:4], "big")
    following = 4 + 32 + int.from_bytes(body[length : length + 4], "big")
    return body[length : length + following] + body[:length] + body[length + following :]


@pytest.mark.parametrize("lie", PIECES)
@pytest.mark.parametrize("old", [False, True], ids=["new", "continued"])
def test_a_lie_is_found_and_nothing_is_written(
    lie: str, old: bool, validator: Validator, copy: Path, identity: Identity
) -> None:
    kept = None
    if old:
        append(copy.parent.with_name("early"), identity, 1)
        with Ledger.read(copy.parent.with_name("early")) as early:
            early.export(copy)
        kept = copy.read_bytes()
    validator.rpc.lies[READ_METHOD] = PIECES[lie](identity)
    if old:  # what is new begins behind the first entry
        honest = validator.rpc.lies[READ_METHOD]
        validator.rpc.lies[READ_METHOD] = lambda head, body: honest({**head, "start": max(0, head["start"] - 1)}, body)
    with pytest.raises(LedgerError) as found:
        validator.fetch(copy)
    assert validator.identity.peer_id in str(found.value)
    assert [path.name for path in copy.parent.iterdir()] == ([copy.name] if old else [])
    assert not old or copy.read_bytes() == kept


def test_an_answer_that_is_too_long_is_not_taken(
    validator: Validator, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "PATIENCE_SECONDS", 0.1)
    validator.rpc.lies[READ_METHOD] = lambda head, body: body + bytes(2000)
    with pytest.raises(RpcClosed):
        validator.fetch(copy)
    assert list(copy.parent.iterdir()) == []


def test_every_changed_byte_is_found(validator: Validator, copy: Path, tmp_path: Path) -> None:
    honest = validator.export(tmp_path / "exported")
    dice = random.Random(11)
    for _ in range(120):
        method = dice.choice([HEAD_METHOD, READ_METHOD, READ_METHOD, READ_METHOD])
        number, seen = dice.randrange(3), 0

        def change(head: dict[str, Any], body: bytes, number: int = number) -> bytes:
            nonlocal seen
            seen += 1
            if "start" in head and seen != number + 1:
                return body
            where = dice.randrange(len(body))
            return body[:where] + bytes([body[where] ^ (1 << dice.randrange(8))]) + body[where + 1 :]

        validator.rpc.lies = {method: change}
        with pytest.raises(LedgerError):
            validator.fetch(copy)
        assert list(copy.parent.iterdir()) == []
    validator.rpc.lies = {}
    validator.fetch(copy)
    assert copy.read_bytes() == honest


@pytest.mark.parametrize("head", [b"", b"x" * 196, b"x" * 1000], ids=["empty", "garbage", "too long"])
def test_what_is_no_head_is_refused(head: bytes, validator: Validator, copy: Path) -> None:
    validator.rpc.lies[HEAD_METHOD] = lambda asked, body: head
    with pytest.raises(LedgerError, match="head"):
        validator.fetch(copy)
    assert not copy.exists()


def test_a_head_that_nobody_signed_or_another_one_is_refused(
    validator: Validator, copy: Path, tmp_path: Path, identity: Identity, stranger: Identity
) -> None:
    forged = msgspec.structs.replace(validator.ledger.head, size=10**15)
    validator.rpc.lies[HEAD_METHOD] = lambda asked, body: forged.pack()
    with pytest.raises(LedgerError, match="not signed"):
        validator.fetch(copy)
    validator.rpc.lies.clear()
    with pytest.raises(LedgerError, match="shows the ledger of validator"):
        validator.fetch(copy, peer=stranger.peer_id)
    append(tmp_path / "other", identity, 2, run=OTHER_RUN)
    with Ledger.read(tmp_path / "other") as other:
        foreign = other.head.pack()
    validator.rpc.lies[HEAD_METHOD] = lambda asked, body: foreign
    with pytest.raises(LedgerError, match=f"run {OTHER_RUN}"):
        validator.fetch(copy)
    assert list(copy.parent.iterdir()) == []


def test_a_size_without_end_takes_neither_memory_nor_time(
    validator: Validator, copy: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It signed 2^62 entries, and sends one after the other."""
    endless = Head.sign(identity, RUN, 2**62, bytes(32), 0)
    numbers = iter(range(10**6))

    async def head(peer: PeerId, asked: dict[str, Any], body: memoryview) -> Reply:
        return Reply({}, endless.pack())

    async def read(peer: PeerId, asked: dict[str, Any], body: memoryview) -> Reply:
        return Reply({}, a_leaf(identity, next(numbers)))

    validator.rpc.methods = {HEAD_METHOD: head, READ_METHOD: read}
    monkeypatch.setattr(ledgers, "MAX_LEDGER_BYTES", 20_000)
    with pytest.raises(NetworkError, match="no ledger is that large"):
        validator.fetch(copy)
    monkeypatch.setattr(ledgers, "MAX_LEDGER_BYTES", 2**40)
    monkeypatch.setattr(ledgers, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(ledgers, "MIN_BYTES_PER_SECOND", 1e12)
    with pytest.raises(NetworkError, match="too slow"):
        validator.fetch(copy)
    assert list(copy.parent.iterdir()) == []


@pytest.mark.parametrize("failure", [RpcTimeout("no answer"), RpcRefused("busy", 60.0)], ids=["silent", "busy"])
def test_who_never_answers_is_given_up(
    failure: PotluckError, validator: Validator, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "PATIENCE_SECONDS", 0.2)
    validator.rpc.failures = [failure] * 1000
    with pytest.raises(type(failure)):
        validator.fetch(copy)
    assert len(validator.rpc.failures) > 900 and not copy.exists()


def test_a_strangers_words_are_safe_on_a_terminal(validator: Validator, copy: Path) -> None:
    validator.rpc.failures = [RpcRemoteError("LedgerError", "\x1b[2J owned \r\n" + "x" * 5000)]
    with pytest.raises(NetworkError) as failed:
        validator.fetch(copy)
    assert str(failed.value).isprintable() and len(str(failed.value)) <= 300


# ---- two histories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(1, 3, 2, 5), (1, 3, 2, 5, 6), (20,)], ids=["as long", "longer", "other heads"])
def test_a_history_that_was_rewritten_convicts_the_validator_and_the_old_copy_stays(
    batches: tuple[int, ...], validator: Validator, copy: Path, tmp_path: Path, identity: Identity
) -> None:
    validator.fetch(copy)
    kept = copy.read_bytes()
    append(tmp_path / "rewritten", identity, *batches, tokens=7)
    validator.becomes(tmp_path / "rewritten")
    with pytest.raises(TwoHistories) as found:
        validator.fetch(copy)
    for head in found.value.heads:
        head.check()
    assert copy.read_bytes() == kept and len(list(copy.parent.iterdir())) == 1


def test_a_ledger_that_lost_entries_does_not_take_the_place_of_the_old_copy(
    validator: Validator, copy: Path, tmp_path: Path, identity: Identity
) -> None:
    validator.fetch(copy)
    kept = copy.read_bytes()
    append(tmp_path / "shorter", identity, 1, 3)
    validator.becomes(tmp_path / "shorter")
    with pytest.raises(LedgerError, match=r"11 entries .* shows 4 only"):
        validator.fetch(copy)
    assert copy.read_bytes() == kept


def test_an_old_copy_that_is_damaged_or_something_else_is_not_replaced(
    validator: Validator, copy: Path, tmp_path: Path, identity: Identity, stranger: Identity
) -> None:
    validator.fetch(copy)
    good = copy.read_bytes()
    append(tmp_path / "strangers", stranger, 1)
    with Ledger.read(tmp_path / "strangers") as ledger:
        ledger.export(tmp_path / "strangers.ledger")
    cases = [
        (good[:-9] + b"x" + good[-8:], LedgerError),
        (b"my diary", LedgerError),
        (validator.path.read_bytes(), UserError),
        ((tmp_path / "strangers.ledger").read_bytes(), UserError),
    ]
    validator.rpc.asked.clear()
    for content, kind in cases:
        copy.write_bytes(content)
        with pytest.raises(kind) as failed:
            validator.fetch(copy)
        assert str(copy) in str(failed.value) and copy.read_bytes() == content
    assert validator.rpc.asked == []
    copy.unlink()
    copy.mkdir()
    with pytest.raises(UserError, match="not a file"):
        validator.fetch(copy)


def claim(validator: Validator, size: int, root: str | None = None, round_: int = 7) -> Claim:
    return Claim("stage.0", round_, size, root or validator.ledger.root(size).hex())


def test_what_was_published_is_compared(validator: Validator, copy: Path) -> None:
    done = validator.fetch(copy, claim(validator, 6), claim(validator, 11), claim(validator, 3))
    assert [one.size for one in done.claims] == [6, 11, 3]
    kept = copy.read_bytes()
    validator.append(2)
    for lie in (claim(validator, 6, "ab" * 32), claim(validator, 13, "ab" * 32), claim(validator, 12, "ab" * 32)):
        with pytest.raises(LedgerError, match=r"two histories .* round 7 of stage.0"):
            validator.fetch(copy, claim(validator, 11), lie)
        assert copy.read_bytes() == kept
        with pytest.raises(LedgerError, match="two histories"):
            validator.fetch(copy.with_name("new"), lie)
    with pytest.raises(LedgerError, match="withholds some"):
        validator.fetch(copy, claim(validator, 14, "ab" * 32))
    with pytest.raises(LedgerError, match="two histories"):
        validator.fetch(copy, claim(validator, 6), claim(validator, 6, "ab" * 32, round_=8))
    assert len(list(copy.parent.iterdir())) == 1
    validator.fetch(copy, claim(validator, 6), claim(validator, 6, round_=8))


# ---- the directory ------------------------------------------------------------------------------------------

ANNA, BORIS, CLARA = (PeerId(peer_id_of(bytes([n]) * 32)) for n in (1, 2, 3))


class FakeDirectory:
    def __init__(self) -> None:
        self.roles = {("m.0", ANNA): "worker", ("m.0", BORIS): "validator", ("m.1", CLARA): "validator"}
        self.published: dict[tuple[str, int, PeerId], int] = {}
        self.read: list[tuple[str, int]] = []

    async def replicas(self, module: str, *, timeout_seconds: float) -> DirectoryView[Replica]:
        found = [
            Signed(
                Replica(module=module, round=1, role=role, session=bytes(16), started=0.0, addresses=[]),  # type: ignore[arg-type]
                peer,
                9e9,
            )
            for (name, peer), role in self.roles.items()
            if name == module
        ]
        return DirectoryView(tuple(found), True)

    async def weights(self, module: str, round: int, *, timeout_seconds: float) -> DirectoryView[Weights]:
        self.read.append((module, round))
        found = [
            Signed(
                Weights(module=module, round=round, ledger_size=size, ledger_root="ab" * 32, made_at=0.0, weights={}),
                peer,
                9e9,
            )
            for (name, number, peer), size in self.published.items()
            if (name, number) == (module, round)
        ]
        return DirectoryView(tuple(found), True)


def test_validators_of_all_modules_are_found() -> None:
    assert set(asyncio.run(find_validators(FakeDirectory(), ["m.0", "m.1"]))) == {BORIS, CLARA}
    assert asyncio.run(find_validators(FakeDirectory(), ["m.0"])) == [BORIS]


def test_the_newest_of_each_module_is_taken_and_only_the_validators_own() -> None:
    directory = FakeDirectory()
    directory.published = {("m.0", 5, BORIS): 50, ("m.0", 7, BORIS): 70, ("m.0", 8, CLARA): 80, ("m.1", 4, BORIS): 40}
    claims = asyncio.run(read_claims(directory, ["m.0", "m.1", "m.2"], BORIS, range(9, 3, -1)))
    assert [(one.module, one.round, one.size) for one in claims] == [("m.0", 7, 70), ("m.1", 4, 40)]
    assert ("m.0", 6) not in directory.read and ("m.2", 4) in directory.read


def test_the_trusted_are_chosen_or_the_one_that_is_named() -> None:
    assert choose([BORIS, CLARA], [BORIS, ANNA], None) == [BORIS]
    assert choose([BORIS, CLARA], [BORIS, CLARA], None) == sorted([BORIS, CLARA])
    assert choose([BORIS, CLARA], [BORIS], CLARA) == [CLARA]  # not trusted, but named
    assert choose([BORIS, CLARA], [], CLARA[8:20]) == choose([BORIS, CLARA], [], CLARA[:20]) == [CLARA]
    assert choose([], [ANNA], ANNA) == [ANNA]  # not seen just now: it may answer
    with pytest.raises(NetworkError, match="none of the 1 validators"):
        choose([CLARA], [ANNA], None)
    with pytest.raises(UserError, match="--validator"):
        choose([CLARA], [], None)
    for wanted in ("", "12D3KooW", "nobody", ANNA):
        with pytest.raises(UserError, match="no such validator"):
            choose([BORIS, CLARA], [BORIS], wanted)
    common = next(n for n in range(1, 45) if BORIS[8 : 8 + n] != CLARA[8 : 8 + n]) - 1
    if common:
        with pytest.raises(UserError, match="fits 2"):
            choose([BORIS, CLARA], [], BORIS[8 : 8 + common])
