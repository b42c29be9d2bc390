"""What a peer says of a sliced round: `slices.get`, a segment that it aggregates, for which those who ask wait until it
is there; `slices.heard`, digests of what others told it, by which who was told something else finds out."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec

from potluck.errors import NetworkError, ProtocolError
from potluck.net.blobs import DIGEST_BYTES
from potluck.net.host import PeerId
from potluck.net.ranges import asked_range, call_by_ranges
from potluck.net.rpc import Reply, Rpc
from potluck.net.wire import Buffer
from potluck.swarm.slices import Aggregated, parse_aggregated

METHOD: Final = "slices.get"
HEARD_METHOD: Final = "slices.heard"
#: Of a segment that was not told.
NOT_HEARD: Final = bytes(DIGEST_BYTES)
#: Rounds of all modules that are remembered.
MOST_KEPT: Final = 256
#: Requests that may wait here, of a peer and in all: far below what RPC allows, so that it stays free for others.
MOST_WAITING_OF_PEER: Final = 16
MOST_WAITING: Final = 128

Key = tuple[str, int]
_Head = TypeVar("_Head", bound=msgspec.Struct)


class NothingTold(NetworkError):
    """This peer aggregates no such segment in that round."""


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    module: str
    round: int
    segment: int
    start: Annotated[int, msgspec.Meta(ge=0)]
    size: Annotated[int, msgspec.Meta(ge=0)]


class _AskedHeard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    module: str
    round: int


class _Told(NamedTuple):
    word: Aggregated
    data: Buffer


class _Newest(NamedTuple):
    """The newest round that was begun. `over` is resolved when the next one is; `members` may wait until then."""

    round: int
    over: asyncio.Future[None]
    members: frozenset[PeerId]


def _parse(method: str, head: dict[str, Any], kind: type[_Head]) -> _Head:
    try:
        return msgspec.convert(head, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{method}: {error}") from None


class SliceBoard:
    """One for all modules of a peer."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._rounds: OrderedDict[Key, dict[int, asyncio.Future[_Told]]] = OrderedDict()
        #: By module.
        self._newest: dict[str, _Newest] = {}
        self._waiting: Counter[PeerId] = Counter()
        #: Of those rounds.
        self._heard: dict[Key, bytes] = {}
        rpc.register(METHOD, self._answer, max_request_bytes=0)
        rpc.register(HEARD_METHOD, self._answer_heard, max_request_bytes=0)

    def begin(self, module: str, round_: int, segments: Sequence[int], members: Collection[PeerId]) -> None:
        """Members who ask for these segments are to wait, and for the next round's until that begins."""
        loop = asyncio.get_running_loop()
        self._rounds.setdefault((module, round_), {segment: loop.create_future() for segment in segments})
        while len(self._rounds) > MOST_KEPT:
            self.forget(*next(iter(self._rounds)))
        before = self._newest.get(module)
        newest = round_ if before is None else max(before.round, round_)
        self._newest[module] = _Newest(newest, loop.create_future(), frozenset(members))
        if before is not None:
            before.over.set_result(None)

    def tell(self, module: str, round_: int, segment: int, word: Aggregated, data: Buffer) -> None:
        told = self._of(module, round_, segment)
        if told is not None and not told.done():
            told.set_result(_Told(word, data))

    def end(self, module: str, round_: int) -> None:
        """What was not told is not worth waiting for."""
        for told in self._rounds.get((module, round_), {}).values():
            told.cancel()

    def forget(self, module: str, round_: int) -> None:
        self.end(module, round_)
        self._rounds.pop((module, round_), None)
        self._heard.pop((module, round_), None)
        if module in self._newest and not any(key[0] == module for key in self._rounds):
            self._newest.pop(module).over.set_result(None)

    def hear(self, module: str, round_: int, digests: Sequence[bytes]) -> None:
        """What others told us in a round that was begun: a digest for each segment, or NOT_HEARD."""
        if (module, round_) in self._rounds:
            self._heard[module, round_] = b"".join(digests)

    async def ask_heard(
        self, peer: PeerId, module: str, round_: int, segments: int, timeout_seconds: float
    ) -> list[bytes]:
        """What others told `peer`: of each of `segments` a digest, or NOT_HEARD. Raises NetworkError, ProtocolError."""
        head = {"module": module, "round": round_}
        size = segments * DIGEST_BYTES
        reply = await self._rpc.call(
            peer, HEARD_METHOD, head, timeout_seconds=timeout_seconds, max_response_bytes=size, lane="bulk"
        )
        if len(reply.body) != size:
            raise ProtocolError(f"{HEARD_METHOD}: {len(reply.body)} bytes for {segments} segments")
        body = bytes(reply.body)
        return [body[start : start + DIGEST_BYTES] for start in range(0, size, DIGEST_BYTES)]

    async def ask(
        self, peer: PeerId, module: str, round_: int, segment: int, into: memoryview, timeout_seconds: float
    ) -> Aggregated:
        """A segment that `peer` aggregates, into a buffer of exactly its size, as soon as it is there. Raises
        NetworkError or ProtocolError."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        head = {"module": module, "round": round_, "segment": segment}
        return parse_aggregated(await call_by_ranges(self._rpc, peer, METHOD, head, into, deadline, measured=True))

    async def _answer(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        asked = _parse(METHOD, head, _Asked)
        there = self._of(asked.module, asked.round, asked.segment)
        if there is not None and there.done() and not there.cancelled():
            return self._reply(there.result(), head)
        newest = self._newest.get(asked.module)
        if newest is None or peer not in newest.members:
            raise NothingTold("only members of the last round wait for segments here")
        if self._waiting[peer] >= MOST_WAITING_OF_PEER or self._waiting.total() >= MOST_WAITING:
            raise NothingTold("too many wait for segments here")
        self._waiting[peer] += 1
        try:
            told = await self._told(asked.module, asked.round, asked.segment)
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]
        return self._reply(told, head)

    async def _answer_heard(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        asked = _parse(HEARD_METHOD, head, _AskedHeard)
        if (heard := self._heard.get((asked.module, asked.round))) is None:
            raise NothingTold(f"nothing of {asked.module} was told here in round {asked.round}")
        return Reply(body=heard)

    def _of(self, module: str, round_: int, segment: int) -> asyncio.Future[_Told] | None:
        return self._rounds.get((module, round_), {}).get(segment)

    def _reply(self, told: _Told, head: dict[str, Any]) -> Reply:
        return Reply(told.word.head(), asked_range(memoryview(told.data), head))

    async def _told(self, module: str, round_: int, segment: int) -> _Told:
        # Others' clocks may be ahead of ours.
        while (newest := self._newest.get(module)) is not None and newest.round + 1 == round_:
            await asyncio.shield(newest.over)
        told = self._of(module, round_, segment)
        nothing = f"segment {segment} of {module} is not aggregated here in round {round_}"
        if told is None:
            raise NothingTold(nothing)
        try:
            return await asyncio.shield(told)
        except asyncio.CancelledError:
            if told.cancelled():
                raise NothingTold(nothing) from None
            raise
