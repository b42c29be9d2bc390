"""A validator's ledger: an append-only log of entries whose every state has one hash, which the validator signs.

The log is a Merkle tree after RFC 9162, section 2 (leaf prefix 0x00, node prefix 0x01, SHA-256), so that one entry is
proven with a few hashes, and a later state is shown to hold all of an earlier one. A `Head` is the signed root at one
size: whoever kept one notices when the validator rewrites what came before it (`compare`, `check_consistency`). What
no one else has a head of can be cut off the end without a trace: heads have to be published to mean something.

A ledger lives in one SQLite file, of the layout of pymerkle's `SqliteTree` and a table of heads, and travels as a
portable file (`Ledger.export`). Either may come from a stranger. Entries and heads are counted from 0.

The portable file: 16 bytes `potluck.ledger.1` and the latest head; then, to the end of the file, the entries and the
earlier heads in the order in which they were written. An entry is its length (4 bytes, big-endian), its leaf hash and
its bytes; a head is a length of 0 and its 196 bytes (`Head.pack`), behind the last entry that it covers. The leaf
hashes only repeat what follows from the entries: they tell which entry is damaged.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal, NamedTuple, Self

import msgspec
from msgspec import Meta
from pymerkle import BaseMerkleTree, SqliteTree  # type: ignore[import-untyped]

from potluck.dht.manifest import RunId
from potluck.dht.records import Hash, PeerIdText
from potluck.errors import IdentityError, LedgerError, UserError
from potluck.incentives.entries import MAX_ENTRY_BYTES, AnyEntry, RoundEntry, decode, encode
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of, public_key_of, verify

#: A proof as JSON: an entry in base64, a head and at most 64 hashes.
MAX_PROOF_BYTES: Final = 2 * MAX_ENTRY_BYTES

_DOMAIN: Final = b"potluck.ledger.head.1"
_MAGIC: Final = b"potluck.ledger.1"
_SQLITE_MAGIC: Final = b"SQLite format 3\0"
#: Run id, the validator's public key, size, Unix time, root, signature.
_HEAD: Final = struct.Struct(">52s32sQQ32s64s")
_HASH_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_LENGTH: Final = struct.Struct(">I")
_RUN_ID: Final = re.compile(rb"[a-z2-7]{52}")
#: SQLite's integers; it also bounds a proof's path.
_MAX_INTEGER: Final = 2**63 - 1
#: The end of the year 9999: every date can be shown.
_MAX_TIME: Final = 253_402_300_799
#: What SQLite cannot do for reasons outside of the file.
_CIRCUMSTANCES: Final = {
    sqlite3.SQLITE_BUSY: "another process holds it; try again when it is done",
    sqlite3.SQLITE_CANTOPEN: "check that the folder exists and is writable",
    sqlite3.SQLITE_FULL: "free some space",
    sqlite3.SQLITE_PERM: "check its permissions",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable",
}

_Path = Annotated[list[Hash], Meta(max_length=64)]


class TwoHistories(LedgerError):
    """A validator signed two states of one run of which neither continues the other: `heads` are the evidence."""

    def __init__(self, one: Head, other: Head, entry: int | None = None) -> None:
        self.heads = (one, other)
        #: The first that differs, if both ledgers were at hand.
        self.entry = entry
        where = "" if entry is None else f", which differ from entry {entry} on"
        super().__init__(
            f"validator {one.validator} shows two histories of run {one.run}{where}; it signed both: "
            + " and ".join(f"size {h.size} root {h.root} signature {h.signature.hex()}" for h in self.heads)
        )


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The root of a ledger's first `size` entries, signed by its validator: a signed tree head of RFC 9162."""

    run: Annotated[RunId, Meta(pattern=r"\A[a-z2-7]{52}\Z")]
    validator: PeerIdText
    size: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)]
    root: Hash
    #: Unix time in seconds.
    made_at: Annotated[int, Meta(ge=0, le=_MAX_TIME)]
    signature: Annotated[bytes, Meta(min_length=_SIGNATURE_BYTES, max_length=_SIGNATURE_BYTES)]

    @classmethod
    def sign(cls, identity: Identity, run: RunId, size: int, root: bytes, made_at: float) -> Head:
        head = cls(run, identity.peer_id, size, root.hex(), int(made_at), bytes(_SIGNATURE_BYTES))
        return msgspec.structs.replace(head, signature=identity.sign(head._message()))

    def check(self) -> None:
        """Raises LedgerError unless the validator signed it."""
        try:
            signed = verify(public_key_of(PeerId(self.validator)), self._message(), self.signature)
        except IdentityError as error:
            raise LedgerError(f"the head of {self.size} entries names no validator: {error}") from None
        if not signed:
            raise LedgerError(f"the head of {self.size} entries is not signed by validator {self.validator}")

    def pack(self) -> bytes:
        """The one form in which a head is signed, stored and sent."""
        key, root = public_key_of(PeerId(self.validator)), bytes.fromhex(self.root)
        return _HEAD.pack(self.run.encode(), key, self.size, self.made_at, root, self.signature)

    @classmethod
    def unpack(cls, data: object) -> Head:
        """Raises LedgerError for what is no head; whether its validator signed it is for `check`."""
        if not isinstance(data, bytes) or len(data) != _HEAD.size:
            raise LedgerError(f"a head is not {_HEAD.size} bytes long")
        run, key, size, made_at, root, signature = _HEAD.unpack(data)
        if not (_RUN_ID.fullmatch(run) and 0 < size <= _MAX_INTEGER and made_at <= _MAX_TIME):
            raise LedgerError("a head has values that no head can have")
        return cls(RunId(run.decode()), peer_id_of(key), size, root.hex(), made_at, signature)

    def _message(self) -> bytes:
        return _DOMAIN + self.pack()[:-_SIGNATURE_BYTES]


class Inclusion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="proof", tag="ledger.inclusion.1"):
    """That an entry is in a ledger: all that `check_inclusion` needs."""

    head: Head
    index: Annotated[int, Meta(ge=0, le=_MAX_INTEGER)]
    #: The bytes that are hashed; `check_inclusion` opens them.
    entry: Annotated[bytes, Meta(max_length=MAX_ENTRY_BYTES)]
    #: Audit path, from the leaf to the root (RFC 9162, 2.1.3.1).
    path: _Path

    def encode(self) -> bytes:
        """JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Inclusion:
        """Raises LedgerError, whatever the bytes; whether it holds is for `check_inclusion`."""
        if len(data) > MAX_PROOF_BYTES:
            raise LedgerError(f"a proof of more than {MAX_PROOF_BYTES} bytes")
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise LedgerError(f"not a proof that an entry is in a ledger ({error})") from None


class Consistency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """That a ledger of `new_size` entries begins with the one of `old_size` (RFC 9162, 2.1.4.1)."""

    old_size: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)]
    new_size: Annotated[int, Meta(ge=1, le=_MAX_INTEGER)]
    path: _Path


class Verified(NamedTuple):
    """What a file turned out to hold: a ledger with so many heads, `head` being the latest; or a proof against one."""

    head: Head
    heads: int
    proof: Inclusion | None = None


class Leaf(NamedTuple):
    hash: bytes
    entry: bytes


Record = Leaf | Head


class Check:
    """Verifies a ledger's entries and earlier heads one after the other, as they come: that they lead to `latest`, and
    through those heads. Each step raises LedgerError, and so does `finish` if something is missing.

    The roots are computed after RFC 9162, 2.1.2, which remembers one hash a level.
    """

    def __init__(self, latest: Head) -> None:
        latest.check()
        self.latest = latest
        #: Entries so far; and those of the last head, which is number `_heads` - 1.
        self.size = 0
        self._signed = self._heads = 0
        self._subtrees: list[bytes] = []

    def add(self, record: Record) -> None:
        if isinstance(record, Head):
            self._check(record)
            self._heads, self._signed = self._heads + 1, self.size
            return
        who = _name(self.latest)
        if self.size == self.latest.size:
            raise LedgerError(f"{who}: there is more behind the {self.size} entries that are signed")
        subtree = _leaf(record.entry)
        if subtree != record.hash:
            raise LedgerError(f"{who}: entry {self.size} is not what its hash says")
        _opened(self.latest, self.size, record.entry)
        for _ in range((~self.size & (self.size + 1)).bit_length() - 1):
            subtree = _node(self._subtrees.pop(), subtree)
        self._subtrees.append(subtree)
        self.size += 1

    def finish(self) -> None:
        if self.size < self.latest.size:
            who = _name(self.latest)
            raise LedgerError(f"{who} breaks off behind {self.size} of the {self.latest.size} entries that are signed")
        self._check(self.latest)

    def root(self) -> bytes:
        """Of the entries so far; there has to be one."""
        root = self._subtrees[-1]
        for left in reversed(self._subtrees[:-1]):
            root = _node(left, root)
        return root

    def _check(self, head: Head) -> None:
        what = f"{_name(self.latest)}: head {self._heads}, of {head.size} entries,"
        if (head.run, head.validator) != (self.latest.run, self.latest.validator):
            raise LedgerError(f"{what} is validator {head.validator}'s, of run {head.run}")
        if not self._signed < head.size == self.size:
            raise LedgerError(f"{what} stands behind {self.size} entries, the one before it behind {self._signed}")
        try:
            head.check()
        except LedgerError:
            raise LedgerError(f"{what} is not signed by its validator") from None
        if self.root().hex() != head.root:
            changed = f"one of entries {self._signed} to {self.size - 1} was changed, left out or put elsewhere"
            raise LedgerError(f"{what} has another root than its entries: {changed}")


def check_inclusion(proof: Inclusion) -> AnyEntry:
    """The entry that is proven (RFC 9162, 2.1.3.2). Raises LedgerError."""
    head = proof.head
    head.check()
    what = f"the proof of entry {proof.index} of {_name(head)}"
    if proof.index >= head.size:
        raise LedgerError(f"{what} is for one of {head.size} entries")
    position, last, root = proof.index, head.size - 1, _leaf(proof.entry)
    for sibling in map(bytes.fromhex, proof.path):
        if last == 0:
            raise LedgerError(f"{what} is too long")
        if position & 1 or position == last:
            root = _node(sibling, root)
            while position and not position & 1:
                position, last = position >> 1, last >> 1
        else:
            root = _node(root, sibling)
        position, last = position >> 1, last >> 1
    if last or root.hex() != head.root:
        raise LedgerError(f"{what} does not lead to the root that is signed: the entry or the path was changed")
    return _opened(head, proof.index, proof.entry)


def check_consistency(old: Head, new: Head, proof: Consistency) -> None:
    """That `new` continues `old` (RFC 9162, 2.1.4.2). Raises LedgerError, TwoHistories if the heads alone show it."""
    _check_pair(old, new)
    what = f"the proof that {old.size} entries of {_name(old)} became {new.size}"
    if old.size == new.size and old.root != new.root:
        raise TwoHistories(old, new)
    if (proof.old_size, proof.new_size) != (old.size, new.size) or old.size > new.size:
        raise LedgerError(f"{what} is one for {proof.old_size} and {proof.new_size}")
    if (old.size == new.size) != (not proof.path):
        raise LedgerError(f"{what} is of the wrong length")
    if old.size == new.size:
        return
    nodes = map(bytes.fromhex, proof.path)
    # A power of two is a whole subtree of the new tree: the proof leaves out what is known.
    old_root = new_root = bytes.fromhex(old.root) if old.size & (old.size - 1) == 0 else next(nodes)
    position, last = old.size - 1, new.size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    for sibling in nodes:
        if last == 0:
            raise LedgerError(f"{what} is too long")
        if position & 1 or position == last:
            old_root, new_root = _node(sibling, old_root), _node(sibling, new_root)
            while position and not position & 1:
                position, last = position >> 1, last >> 1
        else:
            new_root = _node(new_root, sibling)
        position, last = position >> 1, last >> 1
    if last or old_root.hex() != old.root or new_root.hex() != new.root:
        raise LedgerError(f"{what} does not lead to both roots: it is damaged, or there are two histories")


def compare(one: Ledger | Head, other: Ledger | Head) -> None:
    """Raises TwoHistories unless one continues the other; LedgerError where these two cannot tell.

    The evidence is two heads of one size where there are such: they convict the validator without any entry.
    """
    a, b = (it if isinstance(it, Head) else it.head for it in (one, other))
    _check_pair(a, b)
    size = min(a.size, b.size)
    if isinstance(one, Ledger) and isinstance(other, Ledger):
        if one.root(size) == other.root(size):
            return
        same, differs = 0, size  # the roots of one size are equal as long as all entries are
        while differs - same > 1:
            middle = (same + differs) // 2
            if one.root(middle) == other.root(middle):
                same = middle
            else:
                differs = middle
        for head in one.heads():
            if head.size > same and (twin := other.head_at(head.size)):
                raise TwoHistories(head, twin, same)
        raise TwoHistories(a, b, same)
    if any(isinstance(it, Head) and it.size > size for it in (one, other)):
        raise LedgerError(
            f"whether {a.size} and {b.size} entries of {_name(a)} begin alike cannot be told from these two: "
            "take the longer ledger itself, or a proof of consistency"
        )
    roots = {it.root if isinstance(it, Head) else it.root(size).hex() for it in (one, other)}
    if len(roots) > 1:
        a, b = (it if isinstance(it, Head) else it.head_at(size) or it.head for it in (one, other))
        raise TwoHistories(a, b)


def compare_files(one: Path, other: Path) -> None:
    """`compare` two files: ledgers in either form, or proofs as JSON, for their heads."""
    with ExitStack() as stack:

        def opened(path: Path) -> Ledger | Head:
            return verify_file(path).head if _form(path) == "proof" else stack.enter_context(Ledger.read(path))

        compare(opened(one), opened(other))


def verify_file(path: Path) -> Verified:
    """Check all of a ledger, in either form, or a proof of inclusion as JSON, with bounded memory. Raises LedgerError
    that names the place, and the validator once it is known; UserError for a file that cannot be read.

    Every byte of a portable file is checked. A SQLite store has bytes that mean nothing (free space, counters), and a
    log beside it which SQLite drops when it is damaged: there a changed byte is found, or it changes no entry and no
    head among those that are read. In either form a ledger that lost its newest entries together with their heads is
    simply an older one: `compare` it with a head that somebody saw.
    """
    form = _form(path)
    if form == "store":
        with Ledger.read(path) as ledger:
            return Verified(ledger.head, sum(1 for _ in ledger.heads()))
    with _about(path), _reading(path) as file:
        if form == "proof":
            proof = Inclusion.decode(file.read(MAX_PROOF_BYTES + 1))
            check_inclusion(proof)
            return Verified(proof.head, 1, proof)
        head, records = _portable(file)
        return Verified(head, 1 + sum(isinstance(record, Head) for record in _verified(head, records)))


class Ledger:
    """An open ledger: everything in it was verified when it was opened. Not to be used by two threads at once."""

    def __init__(self, path: Path, tree: _Tree, run: RunId, head: Head | None, identity: Identity | None) -> None:
        self.path, self.run = path, run
        self._tree, self._head, self._identity = tree, head, identity

    def lot(self, what: bytes) -> int:
        """64 bits that nobody but the ledger's owner knows beforehand, always the same for the same `what`."""
        if self._identity is None:
            raise ValueError(f"{self.path} was opened to read")
        return int.from_bytes(hashlib.sha256(self._identity.sign(b"potluck.lot.1\0" + what)).digest()[:8], "big")

    @classmethod
    def open(cls, path: Path, run: RunId, identity: Identity) -> Ledger:
        """To append to, made if there is none. Raises LedgerError if it is damaged or somebody else's, UserError where
        it cannot be written.

        For one process at a time. Never of a backup: what was signed since then would get a second history.
        """
        with _opening(path, path, "rwc") as tree:
            head = tree.prepare()
            if head and (head.run, head.validator) != (run, identity.peer_id):
                mine = f"this is validator {identity.peer_id}, run {run}"
                raise LedgerError(f"{_name(head)}, run {head.run}; {mine}")
        return cls(path, tree, run, head, identity)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """To look at, as it is now: a store, also while its validator writes; or a portable file, which is unpacked
        into a temporary one. Raises LedgerError, or UserError where it cannot be read.
        """
        form = _form(path)
        if form == "proof":
            raise LedgerError(f"{path} is JSON, perhaps a proof, and no ledger")
        portable = form == "portable"
        with _opening(path, "" if portable else path, "rw") as tree:
            head = tree.load(path) if portable else tree.snapshot()
        return cls(path, tree, head.run, head, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._tree.close()

    @property
    def size(self) -> int:
        return self._head.size if self._head else 0

    @property
    def head(self) -> Head:
        """The latest. Raises LedgerError before the first `append`."""
        if self._head is None:
            raise LedgerError(f"{self.path}: nothing has been written into this ledger yet")
        return self._head

    def heads(self) -> Iterator[Head]:
        """All, the oldest first."""
        for (packed,) in self._tree.con.execute("SELECT signed FROM head ORDER BY size"):
            yield Head.unpack(packed)

    def head_at(self, size: int) -> Head | None:
        row = self._tree.con.execute("SELECT signed FROM head WHERE size = ?", (size,)).fetchone()
        return Head.unpack(row[0]) if row else None

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[AnyEntry]:
        """From `start` to before `stop`, one after the other in memory."""
        stop = self.size if stop is None else min(stop, self.size)
        query = "SELECT entry FROM leaf WHERE id > ? AND id <= ? ORDER BY id"
        for (data,) in self._tree.con.execute(query, (start, stop)):
            yield decode(data)

    def root(self, size: int) -> bytes:
        """Of the first `size` entries."""
        return self._tree.subtree(0, size)

    def append(self, entries: Sequence[AnyEntry], now: float) -> Head:
        """Write `entries` and the head that covers them, `now` being the Unix time. Once this returns they are on the
        disk; where it raises nothing was written, and calling it again is safe.

        Raises LedgerError, ValueError for no entries, UserError where the disk does not take them.
        """
        if self._identity is None:
            raise ValueError(f"{self.path} was opened to read")
        if not entries:
            raise ValueError("no entries: a head of the same size says nothing new")
        leaves = [Leaf(_leaf(data), data) for data in map(encode, entries)]
        for entry in entries:
            _check_owner(self.run, self._identity.peer_id, entry)
        size = self.size + len(leaves)
        with _database(self.path), self._tree.transaction():
            for leaf in leaves:
                self._tree.insert(leaf)
            if self._tree.get_size() != size:
                raise LedgerError(f"{self.path} was changed by another process: only one may write into it")
            head = Head.sign(self._identity, self.run, size, self.root(size), now)
            self._tree.insert(head)
        self._head = head
        return head

    def prove(self, index: int) -> Inclusion:
        """That entry `index` is in it, against the latest head. Raises UserError for one beyond it."""
        if not 0 <= index < self.size:
            raise UserError(f"{self.path} has {self.size} entries, counted from 0: there is no entry {index}")
        path = self._tree.prove_inclusion(index + 1, self.size).path[1:]  # pymerkle counts from 1, the leaf is in front
        return Inclusion(self.head, index, self._tree.get_entry(index + 1), [node.hex() for node in path])

    def consistency(self, old_size: int) -> Consistency:
        """That it begins with its first `old_size` entries. Raises UserError for more than there are.

        RFC 9162's proof, which anyone can check: pymerkle's has other hashes in it.
        """
        if not 0 < old_size <= self.size:
            raise UserError(f"{self.path} has {self.size} entries: it proves nothing about {old_size}")
        path = _subproof(self._tree.subtree, old_size, 0, self.size, True)
        return Consistency(old_size, self.size, [node.hex() for node in path])

    def export(self, path: Path) -> None:
        """Write the portable file; one of that name is replaced when the new one is whole. Raises UserError."""
        if path.exists() and self.path.exists() and path.samefile(self.path):
            raise UserError(f"{path} is this ledger itself: choose another name")
        with replacing(path) as file, _database(self.path):
            file.write(file_header(self.head))
            for record in _stored(self._tree.con, self.head):
                file.write(pack_record(record))


def file_header(latest: Head) -> bytes:
    """What a portable file begins with."""
    return _MAGIC + latest.pack()


def pack_record(record: Record) -> bytes:
    """As it stands in a portable file."""
    if isinstance(record, Head):
        return _LENGTH.pack(0) + record.pack()
    return _LENGTH.pack(len(record.entry)) + record.hash + record.entry


def unpack_records(data: bytes, latest: Head, start: int) -> Iterator[Record]:
    """Of a piece of a portable file that begins with entry `start`. Bounded, and not verified. Raises LedgerError."""
    return _portable_records(io.BytesIO(data), latest, start)


def read_piece(path: Path, start: int, stop: int, max_bytes: int) -> bytes:
    """A piece of the portable file that a store would become, had it `stop` entries: from entry `start` on, as many as
    `max_bytes` have room for, each with the head behind it; at least one.

    For a validator to serve its own, also while it writes: nothing is verified. Raises LedgerError, UserError.
    """
    query = (
        "SELECT leaf.hash, leaf.entry, head.signed FROM leaf LEFT JOIN head ON head.size = leaf.id AND head.size < ? "
        "WHERE leaf.id > ? AND leaf.id <= ? ORDER BY leaf.id"
    )
    piece = bytearray()
    with _database(path), closing(_connect(path, "rw")) as con:
        for digest, entry, signed in con.execute(query, (stop, start, stop)):
            record = pack_record(Leaf(digest, entry)) + (b"" if signed is None else pack_record(Head.unpack(signed)))
            if piece and len(piece) + len(record) > max_bytes:
                break
            piece += record
    return bytes(piece)


def read_head(path: Path) -> Head:
    """The latest head of a portable file, as it says. Raises LedgerError, UserError."""
    form = _form(path)
    if form != "portable":
        raise UserError(f"{path} is not a ledger in its portable form: choose another name")
    with _about(path), _reading(path) as file:
        return _portable(file)[0]


def read_records(path: Path) -> Iterator[Record]:
    """A portable file's entries and heads in their order, the latest one at the end, verified as they come."""
    with _about(path), _reading(path) as file:
        latest, records = _portable(file)
        yield from _verified(latest, records)
        yield latest


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` once it is whole and on the disk; else nothing is left. Raises UserError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


class _Tree(SqliteTree):  # type: ignore[misc]
    """pymerkle's tree, on a connection of our own: its own writes when it is opened, and commits by itself."""

    #: As SQLite keeps it. A file with anything else is not ours: a stranger's views and triggers could make up rows.
    SCHEMA: Final = {
        "leaf": "CREATE TABLE leaf(id INTEGER PRIMARY KEY AUTOINCREMENT, entry BLOB, hash BLOB)",
        "head": "CREATE TABLE head(size INTEGER PRIMARY KEY, signed BLOB)",
    } | {
        f"{table}_no_{action}": f"CREATE TRIGGER {table}_no_{action} BEFORE {action.upper()} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} table is append-only'); END"
        for table, action in (("leaf", "delete"), ("leaf", "update"), ("head", "delete"), ("head", "update"))
    }
    #: Leaf hashes that are read at once.
    CHUNK: Final = 1024

    def __init__(self, connection: sqlite3.Connection) -> None:
        BaseMerkleTree.__init__(self, "sha256", capacity=64 * 1024 * 1024)
        self.con = connection
        self.cur = connection.cursor()
        self.cur.row_factory = lambda _, row: row[0]  # pymerkle's queries have one column, and want its value

    def prepare(self) -> Head | None:
        """Ready to append to; the latest head, everything being verified."""
        with self.transaction():
            if not self.con.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._create()
            head = self._verify()
        # With a write-ahead log others read meanwhile. EXTRA: a commit is on the disk when it returns, also where the
        # file system allows no such log (in a log it is the same as FULL).
        for pragma in ("journal_mode=WAL", "synchronous=EXTRA"):
            self.con.execute(f"PRAGMA {pragma}").fetchall()
        return head

    def snapshot(self) -> Head:
        """Only to read, what is there now, everything verified; the latest head."""
        self.con.execute("BEGIN")  # never ended: what others write meanwhile is not seen
        self.con.execute("PRAGMA query_only=ON")
        head = self._verify()
        if head is None:
            raise LedgerError("nothing has been written into this ledger yet")
        return head

    def load(self, path: Path) -> Head:
        """What a portable file holds, verified on its way in; the latest head."""
        self.con.execute("BEGIN")  # never ended: the database is temporary
        self._create()
        with _reading(path) as file:
            head, records = _portable(file)
            for record in _verified(head, records):
                self.insert(record)
        self.insert(head)
        return head

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing."""
        self.con.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.con.execute("COMMIT")
        except BaseException:
            if self.con.in_transaction:
                self.con.execute("ROLLBACK")
            self.cache_clear()  # it may hold subtrees of leaves that are gone again
            raise

    def insert(self, record: Record) -> None:
        if isinstance(record, Head):
            self.con.execute("INSERT INTO head(size, signed) VALUES (?, ?)", (record.size, record.pack()))
        else:
            self.con.execute("INSERT INTO leaf(hash, entry) VALUES (?, ?)", record)

    def subtree(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]) of RFC 9162."""
        root: bytes = self._get_root(start, end)
        return root

    def close(self) -> None:
        try:
            self.con.execute("PRAGMA busy_timeout=0")
            if not self.con.in_transaction:
                # At rest a store is one file, to be copied or put on read-only media: the log is folded in.
                self.con.execute("PRAGMA journal_mode=DELETE").fetchall()
        except sqlite3.Error:
            pass  # somebody reads it: the log stays beside it until the last one closes
        self.con.close()

    def _get_subroot_uncached(self, offset: int, width: int) -> bytes:
        # pymerkle reads all leaves of a subtree into memory: above CHUNK its halves are put together instead.
        if width <= self.CHUNK:
            root: bytes = super()._get_subroot_uncached(offset, width)
            return root
        half = width // 2
        return _node(self._get_subroot(offset, half), self._get_subroot(offset + half, half))

    def _create(self) -> None:
        for statement in self.SCHEMA.values():
            self.con.execute(statement)

    def _verify(self) -> Head | None:
        query = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"
        schema = dict(self.con.execute(query).fetchmany(len(self.SCHEMA) + 1))
        if not schema:
            return None
        if schema != self.SCHEMA:
            raise LedgerError("a SQLite file that is no ledger, or whose tables are damaged")
        latest = self.con.execute("SELECT signed FROM head ORDER BY size DESC LIMIT 1").fetchone()
        if latest is None:
            if self.con.execute("SELECT 1 FROM leaf").fetchone():
                raise LedgerError("a ledger with entries that nobody signed")
            return None
        head = Head.unpack(latest[0])
        with _database(_name(head)):
            for _ in _verified(head, _stored(self.con, head)):
                pass
            for (problem,) in self.con.execute("PRAGMA integrity_check(1)"):
                if problem != "ok":
                    raise LedgerError(f"{_name(head)}: its SQLite file is damaged: {problem}")
        return head


@contextmanager
def _opening(path: Path, database: Path | Literal[""], mode: Literal["rw", "rwc"]) -> Iterator[_Tree]:
    """`path` is what errors are about. The tree stays open unless there was one."""
    with _about(path), _database(path):
        tree = _Tree(_connect(database, mode))
        try:
            yield tree
        except BaseException:
            tree.close()
            raise


def _connect(path: Path | Literal[""], mode: Literal["rw", "rwc"]) -> sqlite3.Connection:
    """To read a store it is opened to write too ("rw"): the log that a crash left has to be folded in. Nothing else is
    written then. The empty name is SQLite's for a temporary database on the disk."""
    name = f"{path.absolute().as_uri()}?mode={mode}" if path else ""
    con = sqlite3.connect(name, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    con.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * MAX_ENTRY_BYTES)  # a stranger's row may claim any length
    con.execute("PRAGMA cell_size_check=ON")
    return con


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Which of two files it is that does not verify."""
    try:
        yield
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from None


@contextmanager
def _database(what: object) -> Iterator[None]:
    """SQLite's errors as ours, about `what`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _CIRCUMSTANCES:
            raise UserError(f"{what}: {error}: {_CIRCUMSTANCES[code]}") from None
        raise LedgerError(f"{what} is damaged, or no ledger ({error})") from None
    except UnicodeDecodeError:  # in the text of an error, which quotes what is damaged
        raise LedgerError(f"{what} is damaged, or no ledger") from None


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _form(path: Path) -> Literal["store", "portable", "proof"]:
    with _reading(path) as file:
        start = file.read(len(_MAGIC))
    if start == _MAGIC:
        return "portable"
    if start in (_SQLITE_MAGIC, b""):  # empty: its validator died as it made it
        return "store"
    if start.startswith(b"{"):
        return "proof"
    raise LedgerError(f"{path} is no ledger, or its first bytes are damaged")


def _portable(file: BinaryIO) -> tuple[Head, Iterator[Record]]:
    """The latest head and what follows it: bounded, not yet verified."""
    file.read(len(_MAGIC))
    latest = Head.unpack(file.read(_HEAD.size))
    return latest, _portable_records(file, latest)


def _portable_records(file: BinaryIO, latest: Head, entries: int = 0) -> Iterator[Record]:
    who = _name(latest)

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise LedgerError(f"{who} breaks off behind {entries} entries")
        return data

    while start := file.read(1):
        (length,) = _LENGTH.unpack(start + take(_LENGTH.size - 1))
        if length > MAX_ENTRY_BYTES:
            raise LedgerError(f"{who}: entry {entries} claims {length} bytes, allowed are {MAX_ENTRY_BYTES}")
        if length:
            yield Leaf(take(_HASH_BYTES), take(length))
            entries += 1
        else:
            yield _unpacked(take(_HEAD.size), latest, entries)


def _stored(con: sqlite3.Connection, latest: Head) -> Iterator[Record]:
    """The entries and the earlier heads of a store, in the same order."""
    heads = con.execute("SELECT size, signed FROM head ORDER BY size")
    size, packed = heads.fetchone() or (0, None)
    for index, (number, data, digest) in enumerate(con.execute("SELECT id, entry, hash FROM leaf ORDER BY id")):
        if number != index + 1 or not isinstance(data, bytes) or not isinstance(digest, bytes):
            raise LedgerError(f"{_name(latest)}: entry {index} is missing")
        yield Leaf(digest, data)
        if size == index + 1 < latest.size:
            yield _unpacked(packed, latest, size)
            size, packed = heads.fetchone() or (0, None)
    if (size, packed) != (latest.size, latest.pack()):
        raise LedgerError(f"{_name(latest)}: a head for {size} entries does not stand behind so many")


def _unpacked(data: object, latest: Head, entries: int) -> Head:
    try:
        return Head.unpack(data)
    except LedgerError as error:
        raise LedgerError(f"{_name(latest)}: behind {entries} entries: {error}") from None


def _verified(latest: Head, records: Iterator[Record]) -> Iterator[Record]:
    """`records` as they come, if they lead to `latest` and through the heads among them. Raises LedgerError."""
    check = Check(latest)
    for record in records:
        check.add(record)
        yield record
    check.finish()


def _check_pair(a: Head, b: Head) -> None:
    a.check()
    b.check()
    if (a.run, a.validator) != (b.run, b.validator):
        raise UserError(
            f"two ledgers that have nothing to do with each other: validator {a.validator}, run {a.run}, "
            f"and validator {b.validator}, run {b.run}"
        )


def _check_owner(run: str, validator: str, entry: AnyEntry) -> None:
    if isinstance(entry, RoundEntry) and (entry.run, entry.validator) != (run, validator):
        raise LedgerError(f"an entry of validator {entry.validator}, run {entry.run}")


def _opened(head: Head, index: int, data: bytes) -> AnyEntry:
    try:
        entry = decode(data)
        _check_owner(head.run, head.validator, entry)
    except LedgerError as error:
        raise LedgerError(f"{_name(head)}: entry {index}: {error}") from None
    return entry


def _name(head: Head) -> str:
    return f"the ledger of validator {head.validator}"


def _subproof(root: Callable[[int, int], bytes], old_size: int, start: int, end: int, is_old_tree: bool) -> list[bytes]:
    """SUBPROOF(old_size, D[start:end], is_old_tree) of RFC 9162, 2.1.4.1."""
    if old_size == end - start:
        return [] if is_old_tree else [root(start, end)]
    left = 1 << (end - start - 1).bit_length() - 1  # the largest power of two that is smaller
    if old_size <= left:
        return [*_subproof(root, old_size, start, start + left, is_old_tree), root(start + left, end)]
    return [*_subproof(root, old_size - left, start + left, end, False), root(start, start + left)]


def _leaf(entry: bytes) -> bytes:
    return sha256(b"\x00" + entry).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()
