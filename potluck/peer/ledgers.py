"""Ledgers over the network: a validator serves its own, and anybody takes a copy and verifies it on the way.

A copy is checked against all that the validator has said elsewhere: what it published with its weights, and an older
copy. So it cannot show one history to some and another to others without being found by whoever has both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Protocol

from potluck.dht.directory import DirectoryView
from potluck.dht.manifest import RunId
from potluck.dht.records import Replica, Weights
from potluck.dht.validator import TokenBuckets
from potluck.errors import LedgerError, NetworkError, RpcClosed, RpcRefused, RpcRemoteError, RpcTimeout, UserError
from potluck.incentives.entries import MAX_ENTRY_BYTES
from potluck.incentives.ledger import (
    Check,
    Head,
    Ledger,
    Record,
    compare,
    compare_files,
    file_header,
    pack_record,
    read_head,
    read_piece,
    read_records,
    replacing,
    unpack_records,
    verify_file,
)
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, short
from potluck.peer.build import rules_of
from potluck.swarm.stage import stage_names

if TYPE_CHECKING:
    from potluck.peer.seat import Around

HEAD_METHOD: Final = "ledger.head"
READ_METHOD: Final = "ledger.read"
#: Of one answer: the largest entry has room, with what a portable file puts around it and the head behind it.
ANSWER_BYTES: Final = MAX_ENTRY_BYTES + 512
#: A validator that may upload little gives smaller answers.
LEAST_ANSWER_BYTES: Final = 4096
#: Answers per second to all, and to one peer; four times as many at once. That is 4 MiB/s at most.
PER_SECOND: Final = 16.0
PEER_PER_SECOND: Final = 8.0
#: Of what a validator may upload, ledgers get this share.
UPLOAD_SHARE: Final = 0.25

READ_SECONDS: Final = 5.0
CALL_SECONDS: Final = 20.0
#: How long one answer may be refused, or not come, before the fetch is given up.
PATIENCE_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 1.0
#: A validator may send on and on what it has signed: so much is taken, at no less than this rate.
MAX_LEDGER_BYTES: Final = 64 * 2**30
MIN_BYTES_PER_SECOND: Final = 256.0

#: (entries done, entries in all)
Progress = Callable[[int, int], None]


class Server(Protocol):
    """What of `Rpc` is used to serve."""

    def register(self, method: str, handler: Any, *, max_request_bytes: int) -> None: ...


class Caller(Protocol):
    """What of `Rpc` is used to fetch."""

    async def call(
        self,
        peer: PeerId,
        method: str,
        head: dict[str, Any],
        *,
        timeout_seconds: float,
        max_response_bytes: int,
    ) -> Reply: ...


class Directory(Protocol):
    """What of a run's directory is read."""

    async def replicas(self, module: str, *, timeout_seconds: float) -> DirectoryView[Replica]: ...
    async def weights(self, module: str, round: int, *, timeout_seconds: float) -> DirectoryView[Weights]: ...


class LedgerService:
    """Answers `ledger.head` (the latest head) and `ledger.read` (a piece of the portable file) from a ledger that is
    being written. `upload`: what the validator may upload in all, in bytes per second."""

    def __init__(
        self,
        rpc: Server,
        ledger: Ledger,
        upload: float | None,
        emit: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger, self._emit = ledger, emit
        share = PER_SECOND * ANSWER_BYTES if upload is None else UPLOAD_SHARE * upload
        self._answer_bytes = int(min(ANSWER_BYTES, max(LEAST_ANSWER_BYTES, share)))
        per_second = min(PER_SECOND, share / self._answer_bytes)
        self._all = TokenBuckets(max(1.0, 4 * per_second), per_second, clock)
        self._peers = TokenBuckets(4 * PEER_PER_SECOND, PEER_PER_SECOND, clock)
        self._retry_after_seconds = 1 / min(per_second, PEER_PER_SECOND)
        self._reading = asyncio.Lock()
        rpc.register(HEAD_METHOD, self._head, max_request_bytes=0)
        rpc.register(READ_METHOD, self._read, max_request_bytes=0)

    async def _head(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        self._check_run(head)
        if self._ledger.size == 0:
            raise LedgerError("this validator has written nothing yet")
        return Reply({}, self._ledger.head.pack())

    async def _read(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        self._check_run(head)
        start, stop, size = head.get("start"), head.get("stop"), self._ledger.size
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= size:
            raise LedgerError(f"entries {start!r} to {stop!r} of a ledger of {size}"[:200])
        if not (self._peers.take(peer) and self._all.take("")):
            raise RpcRefused("this validator gives no more of its ledger now", self._retry_after_seconds)
        async with self._reading:  # one at a time, and not in the thread that judges
            try:
                piece = await asyncio.to_thread(read_piece, self._ledger.path, start, stop, self._answer_bytes)
            except (LedgerError, UserError) as error:  # what it says of this machine is for its owner
                self._emit("incentives.ledger.unread", error=str(error))
                raise LedgerError("this validator cannot read its ledger now") from None
        return Reply({}, piece)

    def _check_run(self, head: dict[str, Any]) -> None:
        if head.get("run") != self._ledger.run:
            raise LedgerError("this validator's ledger is of another run")


# ---- who, and what they published ---------------------------------------------------------------------------


async def find_validators(directory: Directory, modules: Iterable[str]) -> list[PeerId]:
    """Who says that it validates any of these modules."""
    reads = (directory.replicas(module, timeout_seconds=READ_SECONDS) for module in modules)
    views = await asyncio.gather(*reads)
    return sorted({one.peer for view in views for one in view.records if one.record.role == "validator"})


def choose(found: Collection[PeerId], trusted: Collection[PeerId], wanted: str | None) -> list[PeerId]:
    """Whose ledgers to fetch: of those whom the manifest trusts, or of the one whose id is, or begins with, `wanted`.

    Raises UserError where that is nobody or not clear, NetworkError if none of the trusted is there now.
    """
    there = ", ".join(sorted(found)) or "none"
    if wanted is None:
        if not trusted:
            raise UserError(f"this run's manifest trusts no validator: name one with --validator (there now: {there})")
        if not (mine := [peer for peer in found if peer in trusted]):
            raise NetworkError(f"none of the {len(trusted)} validators that this run trusts is in its directory now")
        return sorted(mine)
    known = sorted({*found, *trusted})
    beginning = wanted.removeprefix("12D3KooW")
    fits = [peer for peer in known if beginning and peer.removeprefix("12D3KooW").startswith(beginning)]
    if not fits:
        raise UserError(f"--validator {wanted[:60]!r}: no such validator in this run now (there now: {there})")
    if len(fits) > 1:
        raise UserError(f"--validator {wanted!r} fits {len(fits)} validators: give more characters of the peer id")
    return fits


@dataclass(frozen=True)
class Claim:
    """What a validator published along with its weights: its ledger's first `size` entries have this root."""

    module: str
    round: int
    size: int
    root: str

    def __str__(self) -> str:
        return f"the weights that it published for round {self.round} of {self.module}"


async def read_claims(
    directory: Directory, modules: Iterable[str], validator: PeerId, rounds: Sequence[int]
) -> list[Claim]:
    """The newest of each module that there are; `rounds`: where to look, the newest first."""

    async def newest(module: str) -> list[Claim]:
        for round_ in rounds:
            view = await directory.weights(module, round_, timeout_seconds=READ_SECONDS)
            for one in view.records:
                if one.peer == validator and one.record.ledger_root is not None:
                    return [Claim(module, round_, one.record.ledger_size, one.record.ledger_root)]
        return []

    return [claim for claims in await asyncio.gather(*map(newest, modules)) for claim in claims]


async def validators_of(around: Around, wanted: str | None) -> list[PeerId]:
    """Whose ledgers of a run are to be fetched: `choose`, of those who are there."""
    found = await find_validators(around.directory, stage_names(around.manifest.model.stages))
    return choose(found, around.manifest.incentives.trust.keys(), wanted)


async def fetch_from(around: Around, validator: PeerId, path: Path, on_progress: Progress) -> Copy:
    """`fetch`, compared with what the validator published. Read before its head is asked for: it cannot be newer."""
    modules, retain = stage_names(around.manifest.model.stages), around.manifest.rounds.retain
    now = rules_of(around.manifest).clock.round_at(around.clock.now())
    claims = await read_claims(around.directory, modules, validator, range(now, max(-1, now - 2 - retain), -1))
    return await fetch(around.node.rpc, around.run_id, validator, path, claims, on_progress)


# ---- fetching -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """A copy that was written: `old` entries were there before. `claims`: what it was compared with."""

    head: Head
    path: Path
    old: int
    claims: Sequence[Claim]


async def fetch(
    caller: Caller,
    run: RunId,
    validator: PeerId,
    path: Path,
    claims: Sequence[Claim] = (),
    on_progress: Progress = lambda done, total: None,
) -> Copy:
    """Write a validator's ledger to `path`, in its portable form, everything verified. A copy that is there already is
    continued: only what is new is asked for, and it stays as it is where this raises.

    Raises LedgerError for what does not verify, contradicts a claim or does not continue the old copy (TwoHistories
    where the validator signed both); NetworkError where it does not answer; UserError for a file that cannot be used.
    A retry is safe.
    """
    old = await asyncio.to_thread(_check_old, path, run, validator) if path.exists() else None
    source = _Source(caller, run, validator)
    head = await source.head()
    by_size = _by_size(head, claims)
    if old is not None and old.size >= head.size:
        await asyncio.to_thread(_check_shrunk, head, path)
    try:
        await _copy(source, head, path, by_size, path if old else None, on_progress)
    except LedgerError:
        if old is not None:
            with suppress(NetworkError):  # what is known already is enough to refuse it
                await _find_two_histories(source, head, path)
        raise
    return Copy(head, path, old.size if old else 0, claims)


async def _copy(
    source: _Source, head: Head, path: Path, claims: dict[int, Claim], old: Path | None, on_progress: Progress
) -> None:
    check = Check(head)
    with replacing(path) as file:
        file.write(file_header(head))

        def add(record: Record) -> None:
            check.add(record)
            file.write(pack_record(record))
            claim = None if isinstance(record, Head) else claims.get(check.size)
            if claim and check.root().hex() != claim.root:
                raise LedgerError(
                    f"validator {head.validator} shows two histories of run {head.run}: its {claim.size} first entries "
                    f"have the root {check.root().hex()}, but by {claim}, which it signed, {claim.root}"
                )

        def add_old(known: Path) -> None:
            for record in read_records(known):
                if not (isinstance(record, Head) and record.size == head.size):  # it stands at the file's beginning
                    add(record)

        if old is not None:
            await asyncio.to_thread(add_old, old)
        while check.size < head.size:
            on_progress(check.size, head.size)
            piece, start = await source.piece(check.size, head.size), check.size
            for record in unpack_records(piece, head, start):
                add(record)
            if check.size == start:
                raise LedgerError(f"validator {head.validator} gave no entry {start} of the {head.size} that it signed")
        check.finish()
        on_progress(check.size, head.size)


async def _find_two_histories(source: _Source, head: Head, old: Path) -> None:
    """What was sent does not continue the old copy. Whether the validator signed both shows only its whole ledger: then
    this raises TwoHistories, or LedgerError for the ledger itself."""
    with TemporaryDirectory(prefix="potluck-") as folder:
        other = Path(folder) / "ledger"
        await _copy(source, head, other, {}, None, lambda done, total: None)
        await asyncio.to_thread(compare_files, other, old)


class _Source:
    """A validator that may send anything, slowly or never."""

    def __init__(self, caller: Caller, run: RunId, validator: PeerId) -> None:
        self._caller, self._run, self._validator = caller, run, validator
        self._bytes, self._now = 0, asyncio.get_running_loop().time
        self._began = self._now()

    async def head(self) -> Head:
        """As it says: whether it signed it is for `Check`."""
        head = Head.unpack(await self._ask(HEAD_METHOD, {}, max_bytes=1024))
        if (head.run, head.validator) != (self._run, self._validator):
            raise LedgerError(
                f"validator {self._validator} shows the ledger of validator {head.validator}, run {head.run}"
            )
        return head

    async def piece(self, start: int, stop: int) -> bytes:
        return await self._ask(READ_METHOD, {"start": start, "stop": stop}, max_bytes=ANSWER_BYTES)

    async def _ask(self, method: str, what: dict[str, int], max_bytes: int) -> bytes:
        until = self._now() + PATIENCE_SECONDS
        while True:
            try:
                reply = await self._caller.call(
                    self._validator,
                    method,
                    {"run": self._run, **what},
                    timeout_seconds=CALL_SECONDS,
                    max_response_bytes=max_bytes,
                )
            except (RpcRefused, RpcTimeout, RpcClosed) as error:
                if self._now() >= until:
                    raise
                wait = error.retry_after_seconds if isinstance(error, RpcRefused) else RETRY_SECONDS
                await asyncio.sleep(min(wait, max(0.0, until - self._now())))
            except RpcRemoteError as error:  # a stranger's words
                raise NetworkError("".join(c if c.isprintable() else "?" for c in str(error))[:300]) from None
            else:
                body = bytes(reply.body)
                self._count(len(body))
                return body

    def _count(self, count: int) -> None:
        """Raises NetworkError for too much, or too little in its time."""
        self._bytes += count
        who, seconds = f"validator {short(self._validator)}", self._now() - self._began
        if self._bytes > MAX_LEDGER_BYTES:
            raise NetworkError(f"{who} sent more than {MAX_LEDGER_BYTES / 2**30:.0f} GiB: no ledger is that large")
        if seconds > PATIENCE_SECONDS + self._bytes / MIN_BYTES_PER_SECOND:
            raise NetworkError(f"{who} sent {self._bytes} bytes in {seconds:.0f} s: too slow to wait for")


def _check_old(path: Path, run: RunId, validator: PeerId) -> Head:
    """The head of the copy that is there, all of it verified."""
    head = read_head(path)
    if (head.run, head.validator) != (run, validator):
        raise UserError(
            f"{path} is the ledger of validator {head.validator}, run {head.run}: choose another name with --out"
        )
    return verify_file(path).head


def _check_shrunk(head: Head, old: Path) -> None:
    """Raises LedgerError unless the old copy, which is no shorter, is what the validator shows now."""
    with Ledger.read(old) as ledger:
        compare(head, ledger)
        if ledger.size > head.size:
            raise LedgerError(f"{old} has {ledger.size} entries of {head.validator}, which now shows {head.size} only")


def _by_size(head: Head, claims: Sequence[Claim]) -> dict[int, Claim]:
    """Raises LedgerError if they contradict each other, or a head that came later."""
    found: dict[int, Claim] = {}
    for claim in claims:
        other = found.setdefault(claim.size, claim)
        if other.root != claim.root:
            raise LedgerError(
                f"validator {head.validator} shows two histories of run {head.run}: {claim} name the root {claim.root} "
                f"of {claim.size} entries, {other} {other.root}"
            )
        if claim.size > head.size:
            raise LedgerError(
                f"validator {head.validator} shows {head.size} entries and withholds some: {claim} name {claim.size}"
            )
    return found
