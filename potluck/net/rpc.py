"""Calls between peers over long-lived binary streams: many in flight on one stream, each with an id, a
deadline and a byte limit that is checked before reading.

Each pair of peers has up to two streams ("lanes") per direction, so that a bulk transfer never delays a small
call. The side that opened a lane sends requests on it and the other side answers, in any order. After an
8-byte hello both replace asyncio's stream protocol with a `BufferedProtocol`, so a body is received into its
final place (`potluck.net.wire`). A lane has no task of its own: the transport's callbacks drive it.

What a stranger can do to us is bounded: requests in flight and bytes buffered, per peer and in total (beyond
them it is refused at once and told when to retry); a peer that does not read its responses is not read from;
half a frame followed by silence, an idle lane or a stalled one is closed.

Caps are of the whole peer (`potluck.net.pace`): all that lanes send is charged to one bucket, and all that they receive
to another. A body goes out piece by piece; one that we ask for is asked for no sooner than there is room for it; from
those that come unasked we stop reading until there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import msgspec

from potluck.errors import (
    PotluckError,
    ProtocolError,
    RpcClosed,
    RpcError,
    RpcRefused,
    RpcRemoteError,
    RpcTimeout,
    RpcUnreached,
)
from potluck.net.host import Host, PeerId
from potluck.net.pace import MAX_PIECE_BYTES, RELAXED_SECONDS, SLOW_WINDOW, WINDOW, Flow, Pace
from potluck.net.wire import MAX_HEAD_BYTES, Buffer, Frame, FrameReader, Kind, encode

log = logging.getLogger(__name__)

PROTOCOL = "/potluck/rpc/1"
#: Magic and version, sent by either side before the first frame.
HELLO = b"potluck\x01"
#: A body up to this size is joined to its head: copying it is cheaper than a second system call.
_JOIN_BYTES = 16 * 1024
#: How many calls given up by us a lane remembers, to tell a late answer from an invented one.
_REMEMBERED_CALLS = 4096
#: How many peers' traffic is remembered.
_REMEMBERED_PEERS = 4096

LaneName = Literal["small", "bulk"]


class Reply(NamedTuple):
    """An answer. The body belongs to the transport until it is sent: don't write into it before. Under a cap what is
    not `urgent` goes behind what is. `on_sent` hears when it has left, or never will."""

    head: dict[str, Any] = {}  # noqa: RUF012 (never modified: a default for replies without a head)
    body: Buffer = b""
    urgent: bool = True
    on_sent: Callable[[], None] = lambda: None


#: (peer, head, body) -> Reply. The body is valid until the handler returns.
Handler = Callable[[PeerId, dict[str, Any], memoryview], Awaitable[Reply]]
#: (peer, bytes sent, bytes received), as they pass.
OnTraffic = Callable[[PeerId, int, int], None]


@dataclass(frozen=True)
class RpcLimits:
    requests_per_peer: int = 64
    """Requests of one peer that are being received, handled or answered; beyond it the peer is refused."""
    requests_total: int = 512
    """The same for all peers together."""
    buffered_bytes_per_peer: int = 128 << 20
    """Bytes of one peer's request bodies held at once."""
    buffered_bytes_total: int = 512 << 20
    """The same for all peers together."""
    lanes_per_peer: int = 4
    """Streams one peer may have open to us: two, and as many again for those that broke unnoticed."""
    lanes_total: int = 1024
    """Streams all peers together may have open to us."""
    max_head_bytes: int = MAX_HEAD_BYTES
    """Bytes of msgpack in front of a body."""
    max_body_bytes: int = 1 << 30
    """Bytes of any body, whatever a method or a call allows."""
    max_timeout_seconds: float = 3600.0
    """The longest deadline a peer may ask a handler to work for."""
    retry_after_seconds: float = 0.25
    """What a refused peer is told to wait."""
    hello_timeout_seconds: float = 15.0
    """For opening a stream (which may dial the peer first) and exchanging hellos."""
    frame_timeout_seconds: float = 20.0
    """Half a frame, and then no byte for this long, closes the lane."""
    stall_timeout_seconds: float = 60.0
    """A peer that takes none of what we write for this long loses the lane."""
    idle_timeout_seconds: float = 120.0
    """A lane without calls for this long is closed by its opener; after twice that by the other side."""


class _RequestHead(msgspec.Struct, array_like=True, frozen=True):
    method: str
    timeout_ms: int
    max_response_bytes: int
    head: dict[str, Any]


class _ErrorHead(msgspec.Struct, array_like=True, frozen=True):
    kind: str
    message: str
    retry_after_seconds: float = 0.0


@dataclass(frozen=True)
class _Method:
    handler: Handler
    max_request_bytes: int


@dataclass
class Traffic:
    """Bytes to and from one peer, framing included."""

    sent: int = 0
    received: int = 0


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(_RequestHead)
_error_decoder = msgspec.msgpack.Decoder(_ErrorHead)
_head_decoder = msgspec.msgpack.Decoder(dict[str, Any])


def short(peer: PeerId) -> str:
    """A peer's name in messages: its id's end (its beginning is the same for all)."""
    return f"..{peer[-8:]}"


def _decode(decoder: msgspec.msgpack.Decoder[Any], head: bytes) -> Any:
    try:
        return decoder.decode(head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise ProtocolError(f"a frame's head does not parse: {error}") from error


class _Outgoing:
    """A frame on its way out. `sent` is resolved when the transport has taken all of it."""

    __slots__ = ("body", "head", "patience", "position", "sent")

    def __init__(self, head: bytes, body: memoryview, sent: asyncio.Future[None] | None, urgent: bool) -> None:
        self.head = head
        self.body = body
        self.position = -1  # -1: not even the head was written
        self.sent = sent
        self.patience = 0.0 if urgent else RELAXED_SECONDS


class _Lane(asyncio.BufferedProtocol):
    """One stream with frames on it. Subclasses are its two ends."""

    def __init__(self, rpc: Rpc, peer: PeerId, writer: asyncio.StreamWriter, idle_seconds: float) -> None:
        self.rpc = rpc
        self.peer = peer
        self.closed: BaseException | None = None
        # Kept, because a StreamWriter closes its transport when it is garbage collected.
        self._writer = writer
        self._transport = cast(Any, writer.transport)
        self._reader = FrameReader(self._on_head, self._on_frame, rpc.limits.max_head_bytes)
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[_Outgoing] = deque()
        self._write_paused = False
        #: Why we don't read now: the peer does not take its answers, or the cap.
        self._unread: set[str] = set()
        #: Bytes to come that were paid for when they were asked for.
        self._credit = 0
        self._idle_seconds = idle_seconds
        self._last_read = self._last_write = self._loop.time()
        #: Nothing is under way: only the idle timeout can come, and any frame wakes the watchdog.
        self._dozing = False
        self._watchdog = self._loop.call_later(self._watch_seconds, self._watch)
        # Pausing around the switch makes uvloop select its callbacks for the new kind of protocol.
        self._transport.pause_reading()
        self._transport.set_protocol(self)
        self._transport.resume_reading()
        if writer.is_closing():
            self.close(ProtocolError("closed right after the hello"))

    # --- what the two ends do differently

    @property
    def busy(self) -> bool:
        raise NotImplementedError

    def _on_head(self, frame: Frame) -> memoryview | None:
        raise NotImplementedError

    def _on_frame(self, frame: Frame, body: memoryview | None) -> None:
        raise NotImplementedError

    def _on_closed(self) -> None:
        raise NotImplementedError

    # --- reading

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed is not None:
            return
        self._last_read = self._loop.time()
        if self._dozing:
            self._wake()
        self.rpc._count(self.peer, 0, nbytes)
        paid = min(nbytes, self._credit)
        self._credit -= paid
        pace = self.rpc.download
        pace.charge(nbytes - paid)
        try:
            self._reader.buffer_updated(nbytes)
        except ProtocolError as error:
            log.warning("net.rpc.protocol_error peer=%s error=%s", self.peer, error)
            self.close(error)
            return
        if not self._credit and pace.behind(small=self._reader.reading_body_of is None):
            self._stop_reading("cap")
            if pace.ask(self._within_cap):
                self._within_cap()

    def _within_cap(self) -> None:
        self._go_on_reading("cap")

    def _stop_reading(self, why: str) -> None:
        if self.closed is None and not self._unread:
            self._transport.pause_reading()
        self._unread.add(why)

    def _go_on_reading(self, why: str) -> None:
        if why in self._unread:
            self._unread.remove(why)
            if self.closed is None and not self._unread:
                self._last_read = self._loop.time()
                self._transport.resume_reading()

    def prepay(self, size: int) -> None:
        """So many bytes that will come were charged for."""
        self._credit += size

    def take_back(self, size: int) -> None:
        """They will not come, or not now."""
        left = min(size, self._credit)
        self._credit -= left
        self.rpc.download.charge(-left)

    def eof_received(self) -> bool:
        return False  # the transport closes itself

    def connection_lost(self, exc: BaseException | None) -> None:
        self.close(exc or ConnectionResetError("the stream was closed"))

    # --- writing

    def send(
        self,
        kind: Kind,
        call_id: int,
        head: bytes = b"",
        body: Buffer = b"",
        sent: asyncio.Future[None] | None = None,
        urgent: bool = True,
    ) -> _Outgoing:
        view = memoryview(body).cast("B")
        item = _Outgoing(encode(kind, call_id, head, len(view)), view, sent, urgent)
        self._outbox.append(item)
        if self._dozing:
            self._wake()
        self._pump()
        return item

    def withdraw(self, item: _Outgoing) -> bool:
        """Take a frame back. False if its first byte has gone: then the rest must follow."""
        if item.position < 0 and item in self._outbox:
            self._outbox.remove(item)
            return True
        return False

    def _pump(self) -> None:
        pace, write = self.rpc.upload, self._transport.write
        while self._outbox and not self._write_paused and self.closed is None:
            item = self._outbox[0] if pace.rate is None else self._most_urgent()
            body, begun, most = item.body, item.position >= 0, pace.piece_bytes
            small = not begun and len(item.head) + len(body) <= min(most, _JOIN_BYTES)
            if pace.rate is not None and not pace.ask(self._pump, self._patience(), small):
                return
            start = max(item.position, 0)
            item.position = stop = min(start + most, len(body))
            if begun:
                write(body[start:stop])
            elif stop <= _JOIN_BYTES:
                write(item.head + bytes(body[:stop]))
            else:
                write(item.head)
                write(body[:stop])
            size = stop - start + (0 if begun else len(item.head))
            pace.charge(size)
            self.rpc._count(self.peer, size, 0)
            self._last_write = self._loop.time()
            # A write may have closed the lane, which empties the outbox.
            if stop == len(body) and self._outbox:
                self._outbox.popleft()
                if item.sent is not None and not item.sent.done():
                    item.sent.set_result(None)

    def _most_urgent(self) -> _Outgoing:
        """The frame to go on with, which is the first of the outbox then. One that has begun must end."""
        first = self._outbox[0]
        if first.position >= 0:
            return first
        most = self.rpc.upload.piece_bytes
        item = min(self._outbox, key=lambda each: (each.patience, len(each.body) > most))
        if item is not first:
            self._outbox.remove(item)
            self._outbox.appendleft(item)
        return item

    def _patience(self) -> float:
        """A frame that keeps an urgent one waiting is urgent itself."""
        return min(each.patience for each in self._outbox)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._last_write = self._loop.time()
        self._pump()

    # --- the end

    @property
    def _watch_seconds(self) -> float:
        limits = self.rpc.limits
        return min(limits.frame_timeout_seconds, limits.stall_timeout_seconds, self._idle_seconds) / 4

    def _watch(self) -> None:
        now, limits = self._loop.time(), self.rpc.limits
        read_silence, write_silence = now - self._last_read, now - self._last_write
        if self._write_paused and write_silence >= limits.stall_timeout_seconds:
            self.close(ProtocolError(f"took nothing of what we sent for {write_silence:.0f} s"))
        elif (
            self._reader.in_frame
            and not self._unread
            and min(read_silence, write_silence if self._write_paused else read_silence) >= limits.frame_timeout_seconds
        ):
            self.close(ProtocolError(f"sent half a frame and then nothing for {read_silence:.0f} s"))
        elif self.busy or self._outbox or self._reader.in_frame:
            self._watchdog = self._loop.call_later(self._watch_seconds, self._watch)
        elif (left := self._idle_seconds - min(read_silence, write_silence)) <= 0:
            self.close(ConnectionAbortedError("idle"))
        else:
            self._dozing = True
            self._reader.rest()
            # A rounded remainder would come round again and again in the same instant.
            self._watchdog = self._loop.call_later(max(left, 0.001), self._watch)

    def _wake(self) -> None:
        self._dozing = False
        self._watchdog.cancel()
        self._watchdog = self._loop.call_later(self._watch_seconds, self._watch)

    def close(self, reason: BaseException) -> None:
        """Idempotent. Every call on this lane ends now."""
        if self.closed is not None:
            return
        self.closed = reason
        self._watchdog.cancel()
        self._transport.close()
        for item in self._outbox:
            if item.sent is not None and not item.sent.done():
                item.sent.cancel()
        self._outbox.clear()
        self._reader.abandon_body()
        self.rpc.upload.forget(self._pump)
        self.rpc.download.forget(self._within_cap)
        self.take_back(self._credit)
        self._on_closed()


class _Call:
    __slots__ = ("answer", "asked_at", "body", "into", "max_bytes", "method")

    def __init__(
        self, method: str, answer: asyncio.Future[Reply], max_bytes: int, into: memoryview | None, asked_at: float
    ) -> None:
        self.method = method
        self.asked_at = asked_at
        self.answer = answer
        self.max_bytes = max_bytes
        self.into = into


class _CallerLane(_Lane):
    """The end that sends requests."""

    def __init__(self, rpc: Rpc, peer: PeerId, writer: asyncio.StreamWriter) -> None:
        self._calls: dict[int, _Call] = {}
        self._given_up: OrderedDict[int, None] = OrderedDict()
        self._next_id = 0
        self.flow = Flow()
        self._body_from = 0.0
        super().__init__(rpc, peer, writer, rpc.limits.idle_timeout_seconds)

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    async def call(
        self,
        method: str,
        head: Mapping[str, Any],
        body: Buffer,
        deadline: float,
        max_response_bytes: int,
        into: memoryview | None,
    ) -> Reply:
        if self.closed is not None:
            raise RpcClosed(f"{method} to {short(self.peer)}: the stream broke: {self.closed}")
        now = self._loop.time()
        remaining_ms = max(1, int((deadline - now) * 1000))
        request = _encoder.encode((method, remaining_ms, max_response_bytes, head))
        self._next_id = call_id = self._free_id()
        answer: asyncio.Future[Reply] = self._loop.create_future()
        self._calls[call_id] = _Call(method, answer, max_response_bytes, into, now)
        timer = self._loop.call_at(deadline, self._expire, call_id)
        item = None
        try:
            item = self.send(Kind.REQUEST, call_id, request, body)
            return await answer
        finally:
            timer.cancel()
            if self._calls.pop(call_id, None) is not None:
                # Nobody waits for the answer any more, and `into` belongs to the caller again.
                if self._reader.reading_body_of == call_id:
                    self._reader.abandon_body()
                if self.closed is None and not (item is not None and self.withdraw(item)):
                    self._given_up[call_id] = None
                    if len(self._given_up) > _REMEMBERED_CALLS:
                        self._given_up.popitem(last=False)
                    self.send(Kind.CANCEL, call_id)

    def _free_id(self) -> int:
        call_id = self._next_id
        while True:
            call_id = (call_id + 1) & 0xFFFFFFFF
            if call_id not in self._calls and call_id not in self._given_up:
                return call_id

    def _expire(self, call_id: int) -> None:
        call = self._calls.get(call_id)
        if call is not None and not call.answer.done():
            call.answer.set_exception(RpcTimeout(f"{call.method} to {short(self.peer)}: no answer before the deadline"))

    def _on_head(self, frame: Frame) -> memoryview | None:
        if frame.kind not in (Kind.RESPONSE, Kind.ERROR):
            raise ProtocolError(f"a {frame.kind.name} from the answering side")
        call = self._calls.get(frame.call_id)
        if call is None or call.answer.done():
            if call is None and frame.call_id not in self._given_up:
                raise ProtocolError(f"an answer to call {frame.call_id}, which was never made")
            if frame.body_length > self.rpc.limits.max_body_bytes:
                raise ProtocolError(f"an answer of {frame.body_length} bytes to a call that was given up")
            return None
        self._body_from = self._last_read
        self.flow.answered(self._body_from - call.asked_at)
        limit = 0 if frame.kind is Kind.ERROR else call.max_bytes
        if frame.body_length > limit:
            raise ProtocolError(f"{call.method}: an answer of {frame.body_length} bytes; the limit is {limit}")
        if call.into is not None:
            return call.into[: frame.body_length]
        return memoryview(bytearray(frame.body_length))

    def _on_frame(self, frame: Frame, body: memoryview | None) -> None:
        self._given_up.pop(frame.call_id, None)
        call = self._calls.get(frame.call_id)
        if body is None or call is None or call.answer.done():
            return
        self.flow.came(len(body), self._last_read - self._body_from)
        if frame.kind is Kind.RESPONSE:
            head = _decode(_head_decoder, frame.head)
            del self._calls[frame.call_id]
            call.answer.set_result(Reply(head, body))
        else:
            error = _decode(_error_decoder, frame.head)
            del self._calls[frame.call_id]
            call.answer.set_exception(_received_error(self.peer, call.method, error))
            if error.kind == "RequestTooLarge":  # the other side closes after saying so
                self.close(ProtocolError(error.message[:200]))

    def _on_closed(self) -> None:
        self.rpc._forget(self)
        for call in self._calls.values():
            if not call.answer.done():
                error = RpcClosed(f"{call.method} to {short(self.peer)}: the stream broke: {self.closed}")
                error.__cause__ = self.closed
                call.answer.set_exception(error)
        self._calls.clear()


def _received_error(peer: PeerId, method: str, error: _ErrorHead) -> RpcError:
    message = f"{method} to {short(peer)}: {error.message}"
    if error.kind == "RpcRefused":
        # A stranger's number: neither a busy loop nor a wait for ever; not-a-number is the least.
        return RpcRefused(message, min(max(0.01, error.retry_after_seconds), 60.0))
    if error.kind == "RpcTimeout":
        return RpcTimeout(message)
    return RpcRemoteError(error.kind[:64], message)


class _ServedCall:
    __slots__ = ("body", "buffered", "head", "method", "received_at", "task")

    def __init__(self, method: _Method, head: _RequestHead, buffered: int, received_at: float) -> None:
        self.method = method
        self.head = head
        self.buffered = buffered
        self.received_at = received_at
        self.task: asyncio.Task[None] | None = None


class _ServerLane(_Lane):
    """The end that answers requests."""

    def __init__(self, rpc: Rpc, peer: PeerId, writer: asyncio.StreamWriter) -> None:
        self._served: dict[int, _ServedCall] = {}
        # Twice the opener's time, so that no request is in flight when this side closes.
        super().__init__(rpc, peer, writer, 2 * rpc.limits.idle_timeout_seconds)

    @property
    def busy(self) -> bool:
        return bool(self._served)

    # A peer that does not take its answers gets no more questions in.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_reading("answers")

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._write_paused:
            self._go_on_reading("answers")

    def _on_head(self, frame: Frame) -> memoryview | None:
        if frame.kind is Kind.CANCEL:
            if frame.body_length or frame.head:
                raise ProtocolError("a CANCEL with a body")
            return None
        if frame.kind is not Kind.REQUEST:
            raise ProtocolError(f"a {frame.kind.name} from the asking side")
        head: _RequestHead = _decode(_request_decoder, frame.head)
        if frame.call_id in self._served:
            raise ProtocolError(f"call id {frame.call_id} is in use")
        method = self.rpc._methods.get(head.method)
        limit = min(method.max_request_bytes if method else 64 * 1024, self.rpc.limits.max_body_bytes)
        if frame.body_length > limit:
            text = f"{head.method[:64]}: a request of {frame.body_length} bytes; the limit is {limit}"
            self._send_error(frame.call_id, _ErrorHead("RequestTooLarge", text))
            raise ProtocolError(text)
        if method is None:
            self._send_error(frame.call_id, _ErrorHead("UnknownMethod", f"no method {head.method[:64]!r} here"))
            return None
        if not self.rpc._admit(self.peer, frame.body_length):
            retry = self.rpc.limits.retry_after_seconds
            self._send_error(frame.call_id, _ErrorHead("RpcRefused", "busy", retry))
            return None
        self._served[frame.call_id] = _ServedCall(method, head, frame.body_length, self._loop.time())
        return memoryview(bytearray(frame.body_length))

    def _on_frame(self, frame: Frame, body: memoryview | None) -> None:
        call = self._served.get(frame.call_id)
        if frame.kind is Kind.CANCEL:
            if call is not None and call.task is not None:
                call.task.cancel()
        elif call is not None and body is not None:
            call.task = self.rpc._spawn(self._serve(frame.call_id, call, body))
            call.task.add_done_callback(lambda _: self._release(frame.call_id, call))

    async def _serve(self, call_id: int, call: _ServedCall, body: memoryview) -> None:
        timeout = min(max(call.head.timeout_ms, 0) / 1000, self.rpc.limits.max_timeout_seconds)
        try:
            async with asyncio.timeout_at(call.received_at + timeout) as deadline:
                answer = await self.rpc._handle(self.peer, call.method.handler, call.head, body)
        except TimeoutError:
            if not deadline.expired():
                raise
            answer = _ErrorHead("RpcTimeout", "the handler did not finish before the deadline")
        if isinstance(answer, _ErrorHead):
            if self.closed is None:
                self._send_error(call_id, answer)
            return
        try:
            await self._send_reply(call_id, answer)
        finally:
            answer.on_sent()

    async def _send_reply(self, call_id: int, answer: Reply) -> None:
        if self.closed is not None:
            return
        sent: asyncio.Future[None] = self._loop.create_future()
        item = self.send(Kind.RESPONSE, call_id, _encoder.encode(answer.head), answer.body, sent, answer.urgent)
        try:
            await sent
        except asyncio.CancelledError:
            self.withdraw(item)
            raise

    def _send_error(self, call_id: int, error: _ErrorHead) -> None:
        # Refusals have no task to wait for them; a peer that piles them up without reading is cut off.
        if len(self._outbox) > 4 * self.rpc.limits.requests_per_peer:
            raise ProtocolError("does not read its refusals")
        self.send(Kind.ERROR, call_id, _encoder.encode(error))

    def _release(self, call_id: int, call: _ServedCall) -> None:
        if self._served.pop(call_id, None) is not None:
            self.rpc._release(self.peer, call.buffered)

    def _on_closed(self) -> None:
        if self in self.rpc._server_lanes:
            del self.rpc._server_lanes[self]
            self.rpc._disown(self.peer)
        for call_id, call in list(self._served.items()):
            if call.task is None:
                self._release(call_id, call)
            else:
                call.task.cancel()


@dataclass
class _Load:
    requests: int = 0
    buffered: int = 0


class Rpc:
    """Potluck's calls on one host: register methods, `start`, `call` others, `close`.

    `bytes_sent`, `bytes_received` and `traffic` (by peer, for a few thousand peers) count frames, not libp2p. `upload`
    and `download`: caps in bytes per second, None for none; the attributes of these names can change them.
    """

    def __init__(
        self,
        host: Host,
        limits: RpcLimits | None = None,
        on_traffic: OnTraffic | None = None,
        upload: float | None = None,
        download: float | None = None,
    ) -> None:
        self.host = host
        self.upload, self.download = Pace(upload), Pace(download)
        self.limits = limits or RpcLimits()
        self.peer_id = PeerId(host.peer_id.to_base58())
        self.bytes_sent = 0
        self.bytes_received = 0
        self.traffic: OrderedDict[PeerId, Traffic] = OrderedDict()
        self._on_traffic = on_traffic
        self._methods: dict[str, _Method] = {}
        self._lanes: dict[tuple[PeerId, LaneName], asyncio.Task[_CallerLane]] = {}
        #: Dictionaries, because sets have another order in every process, and a replayed run is the same run.
        self._server_lanes: dict[_ServerLane, None] = {}
        #: Whose they are; streams that have not said hello yet count, too.
        self._owners: Counter[PeerId] = Counter()
        self._owned = 0
        self._total = _Load()
        self._loads: dict[PeerId, _Load] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._failed_methods: set[tuple[str, str]] = set()
        self._closed = False

    async def start(self) -> None:
        """Begin to answer. Calls can be made before."""
        await self.host.add_binary_stream_handler(PROTOCOL, self._accept)

    async def close(self) -> None:
        """Ends every lane, call and handler. Idempotent."""
        self._closed = True
        reason = ConnectionAbortedError("shutting down")
        for lane in [
            *self._server_lanes,
            *(task.result() for task in self._lanes.values() if _succeeded(task)),
        ]:
            lane.close(reason)
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lanes.clear()

    def register(self, method: str, handler: Handler, *, max_request_bytes: int = 64 * 1024) -> None:
        """`handler` answers `method`. A longer request body closes the peer's lane before it is read."""
        if method in self._methods:
            raise ValueError(f"method {method!r} is registered already")
        self._methods[method] = _Method(handler, max_request_bytes)

    async def call(
        self,
        peer: PeerId,
        method: str,
        head: Mapping[str, Any] | None = None,
        body: Buffer = b"",
        *,
        timeout_seconds: float,
        max_response_bytes: int = 64 * 1024,
        lane: LaneName = "small",
        into: memoryview | None = None,
    ) -> Reply:
        """Ask `peer`. The response's body is received into `into` where given, which then also is its limit.

        Under a download cap `into` is asked for when there is room for all of it. Raises RpcTimeout, RpcRefused,
        RpcRemoteError or RpcClosed, and nothing else for what others do; a retry is as safe as the method is. After a
        timeout or a cancellation the handler is cancelled too, and `into` is not touched again.
        """
        head = head or {}
        limit = len(into) if into is not None else min(max_response_bytes, self.limits.max_body_bytes)
        if peer == self.peer_id:
            return await self._call_self(method, head, body, timeout_seconds, limit, into)
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        opened = self._lanes.get((peer, lane))
        if opened is not None and _is_open(opened):
            open_lane = opened.result()  # nearly always: no timer is needed
        else:
            try:
                async with asyncio.timeout_at(deadline):
                    open_lane = await self._lane(peer, lane)
            except TimeoutError as error:
                raise RpcUnreached(f"{method} to {short(peer)}: no stream before the deadline") from error
            except RpcClosed as error:
                raise RpcClosed(f"{method} to {short(peer)}: {error}") from error
        if into is None or self.download.rate is None:
            return await open_lane.call(method, head, body, deadline, limit, into)
        try:
            async with asyncio.timeout_at(deadline):
                await self.download.take(limit)
        except TimeoutError as error:
            raise RpcTimeout(f"{method} to {short(peer)}: the download cap left no room before the deadline") from error
        open_lane.prepay(limit)
        try:
            return await open_lane.call(method, head, body, deadline, limit, into)
        except BaseException:
            open_lane.take_back(limit)
            raise

    def ask_bytes(self, peer: PeerId) -> int:
        """How much of a long body to ask `peer` for at once: what our cap allows, and its line seems to carry soon."""
        opened = self._lanes.get((peer, "bulk"))
        if opened is None or not _is_open(opened):
            return self.download.ask_bytes
        return min(self.download.ask_bytes, opened.result().flow.ask_bytes)

    def window(self, peer: PeerId) -> int:
        """How many chunks to ask `peer` for at once: of who is slow few, as each waits for those before it."""
        return WINDOW if self.ask_bytes(peer) == MAX_PIECE_BYTES else SLOW_WINDOW

    # --- lanes

    async def _lane(self, peer: PeerId, name: LaneName) -> _CallerLane:
        if self._closed:
            raise RpcClosed("this peer is shutting down")
        opening = self._lanes.get((peer, name))
        if opening is None or (opening.done() and not _is_open(opening)):
            opening = self._lanes[peer, name] = self._spawn(self._open(peer, name))
        if opening.done():
            return opening.result()
        # Callers share the attempt: one that gives up does not end it for the others.
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():
                raise RpcClosed("this peer is shutting down") from None
            raise

    async def _open(self, peer: PeerId, name: LaneName) -> _CallerLane:
        try:
            async with asyncio.timeout(self.limits.hello_timeout_seconds):
                # The host's own class of ids, so that this module need not import hivemind.
                remote = type(self.host.peer_id).from_base58(peer)
                _, reader, writer = await self.host.call_binary_stream_handler(remote, PROTOCOL)
                try:
                    writer.write(HELLO)
                    if await reader.readexactly(len(HELLO)) != HELLO:
                        raise ProtocolError("speaks another protocol")
                    return _CallerLane(self, peer, writer)
                except BaseException:
                    writer.close()
                    raise
        except TimeoutError as error:
            self._lanes.pop((peer, name), None)
            raise RpcClosed(f"not reached in {self.limits.hello_timeout_seconds:.0f} s") from error
        except Exception as error:  # whatever the host raises: each has its own tree
            self._lanes.pop((peer, name), None)
            raise RpcClosed(f"not reached: {error or type(error).__name__}") from error

    def _forget(self, lane: _CallerLane) -> None:
        for key, task in list(self._lanes.items()):
            if key[0] == lane.peer and _succeeded(task) and task.result() is lane:
                del self._lanes[key]

    async def _accept(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = PeerId(info.peer_id.to_base58())
        limits = self.limits
        if self._closed or self._owners[peer] >= limits.lanes_per_peer or self._owned >= limits.lanes_total:
            writer.close()
            return
        self._owners[peer] += 1
        self._owned += 1
        served = False
        try:
            served = await self._greet(peer, reader, writer)
        finally:
            if not served:
                self._disown(peer)

    async def _greet(self, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the stream became a lane."""
        try:
            async with asyncio.timeout(self.limits.hello_timeout_seconds):
                hello = await reader.readexactly(len(HELLO))
        except (TimeoutError, OSError, EOFError):
            writer.close()
            return False
        if hello != HELLO or self._closed:
            writer.close()
            return False
        writer.write(HELLO)
        lane = _ServerLane(self, peer, writer)
        if lane.closed is None:
            self._server_lanes[lane] = None
        return lane in self._server_lanes

    def _disown(self, peer: PeerId) -> None:
        self._owned -= 1
        self._owners[peer] -= 1
        if not self._owners[peer]:
            del self._owners[peer]

    # --- serving

    async def _handle(
        self, peer: PeerId, handler: Handler, request: _RequestHead, body: memoryview
    ) -> Reply | _ErrorHead:
        """What the handler says, as it goes over the wire. The boundary where a handler's bug stops."""
        try:
            reply = await handler(peer, request.head, body)
        except RpcRefused as error:
            return _ErrorHead("RpcRefused", _clip(error), error.retry_after_seconds)
        except PotluckError as error:
            return _ErrorHead(type(error).__name__, _clip(error))
        except Exception as error:
            key = (request.method, type(error).__name__)
            if key not in self._failed_methods:
                self._failed_methods.add(key)
                log.exception("net.rpc.handler_failed method=%s peer=%s", request.method, peer)
            return _ErrorHead("InternalError", "the handler failed")
        size = memoryview(reply.body).nbytes
        if size > request.max_response_bytes:
            reply.on_sent()
            text = f"the response has {size} bytes; the caller allows {request.max_response_bytes}"
            return _ErrorHead("ResponseTooLarge", text)
        return reply

    async def _call_self(
        self,
        name: str,
        head: Mapping[str, Any],
        body: Buffer,
        timeout_seconds: float,
        limit: int,
        into: memoryview | None,
    ) -> Reply:
        method = self._methods.get(name)
        if method is None:
            raise _received_error(self.peer_id, name, _ErrorHead("UnknownMethod", f"no method {name!r} here"))
        # Through msgpack, so that a handler sees the same types as from afar.
        sent_head = _head_decoder.decode(_encoder.encode(head))
        request = _RequestHead(name, int(timeout_seconds * 1000), limit, sent_head)
        try:
            async with asyncio.timeout(timeout_seconds) as deadline:
                answer = await self._handle(self.peer_id, method.handler, request, memoryview(body).cast("B"))
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise RpcTimeout(f"{name} to {short(self.peer_id)}: no answer before the deadline") from error
        if isinstance(answer, _ErrorHead):
            raise _received_error(self.peer_id, name, answer)
        received = memoryview(answer.body).cast("B")
        if into is not None:
            into[: len(received)] = received
            received = into[: len(received)]
        answer.on_sent()
        return Reply(_head_decoder.decode(_encoder.encode(answer.head)), received)

    def _admit(self, peer: PeerId, size: int) -> bool:
        limits, total, load = self.limits, self._total, self._loads.get(peer) or _Load()
        if (
            load.requests >= limits.requests_per_peer
            or total.requests >= limits.requests_total
            or load.buffered + size > limits.buffered_bytes_per_peer
            or total.buffered + size > limits.buffered_bytes_total
        ):
            return False
        self._loads[peer] = load
        for each in (load, total):
            each.requests += 1
            each.buffered += size
        return True

    def _release(self, peer: PeerId, size: int) -> None:
        load = self._loads[peer]
        for each in (load, self._total):
            each.requests -= 1
            each.buffered -= size
        if not load.requests:
            del self._loads[peer]

    # --- bookkeeping

    @property
    def buffered_bytes(self) -> int:
        """Bytes of request bodies held now."""
        return self._total.buffered

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, RpcClosed):
            log.error("net.rpc.task_failed", exc_info=error)

    def _count(self, peer: PeerId, sent: int, received: int) -> None:
        self.bytes_sent += sent
        self.bytes_received += received
        traffic = self.traffic.get(peer)
        if traffic is None:
            traffic = self.traffic[peer] = Traffic()
            if len(self.traffic) > _REMEMBERED_PEERS:
                self.traffic.popitem(last=False)
        traffic.sent += sent
        traffic.received += received
        if self._on_traffic is not None:
            self._on_traffic(peer, sent, received)


def _succeeded(task: asyncio.Task[_CallerLane]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _is_open(task: asyncio.Task[_CallerLane]) -> bool:
    return _succeeded(task) and task.result().closed is None


def _clip(error: Exception) -> str:
    return str(error)[:1000]
