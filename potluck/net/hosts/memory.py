"""An in-memory host: peers of one process talk through a `Wire`, which decides when what arrives (`sim/network.py`).

It carries real bytes over asyncio's own streams, with flow control, so RPC, blobs and hivemind's DHT run on it
unchanged. Costs are those of libp2p in round trips: dialling takes two (transport and security), a stream one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

from hivemind.p2p import P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

from potluck.errors import NetworkError
from potluck.net.host import PeerId, StreamHandler

#: Bytes of one stream that may be under way before its writer is told to pause, and go on.
_HIGH_WATER = 256 * 1024
_LOW_WATER = 64 * 1024
#: What libp2p adds to a unary call: stream negotiation, lengths, headers of its transports.
_CALL_OVERHEAD = 160
HANDSHAKE_BYTES = 600
#: Looks like any; peers are found by id.
_ADDRESS = "/ip4/10.0.0.1/tcp/4001"
DIAL_SECONDS = 10.0
#: A host with more closes the oldest; p2pd does so at 512, down to something between 256 and 384.
MAX_CONNECTIONS = 384

Arrive = Callable[[], None]


class Channel:
    """What is sent on one channel arrives in order. `last` is when its latest bytes arrive, in loop time.

    `relay` forwards them, where the two cannot talk directly.
    """

    last = 0.0
    relay: PeerId | None = None

    def break_off(self) -> None:
        """The network lost it: a stream is reset, who waits for an answer hears so; a handshake doesn't care."""


class _Question(Channel):
    """A channel whose end is an error for who waits for `answer`."""

    def __init__(self, answer: asyncio.Future[Any], reset: Exception) -> None:
        self._answer, self._reset = answer, reset

    def break_off(self) -> None:
        if not self._answer.done():
            self._answer.set_exception(self._reset)


class Wire(Protocol):
    """The network between hosts."""

    def send(self, source: PeerId, target: PeerId, size: int, arrive: Arrive, channel: Channel) -> None:
        """Call `arrive` when `size` bytes have come to `target`. What is sent on one channel stays in order.

        Bytes that the network cannot carry now (a partition) come later or never.
        """
        ...

    def can_dial(self, source: PeerId, target: PeerId) -> bool:
        """Whether a connection can be opened now."""
        ...

    def up(self, peer: PeerId) -> None:
        """A host of this peer runs now: it may relay for others."""
        ...

    def down(self, peer: PeerId) -> None:
        """It is gone: it relays for nobody any more, and channels on which it had something to forward break off."""
        ...


class StreamInfo(NamedTuple):
    peer_id: PeerID
    addr: str
    proto: str


class PeerInfo(NamedTuple):
    peer_id: PeerID
    addrs: Sequence[str]


#: Thousands of hosts name each other all the time.
_peer_id = lru_cache(maxsize=100_000)(PeerID.from_base58)


class Lan:
    """All hosts of one network, by peer id."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.hosts: dict[PeerId, MemoryHost] = {}


class MemoryHost:
    """Implements `Host`. `crash` ends it as kill -9 would; `shutdown` politely. Both are idempotent."""

    def __init__(self, lan: Lan, peer: PeerId) -> None:
        self.peer_id = _peer_id(peer)
        self.peer = peer
        self.alive = True
        #: Unary calls made, and their bytes both ways.
        self.calls = self.call_bytes = 0
        self._lan, self._wire = lan, lan.wire
        self._loop = asyncio.get_running_loop()
        self._unary: dict[str, tuple[Callable[..., Any], Any]] = {}
        self._streams: dict[str, StreamHandler] = {}
        self._connected: dict[PeerId, None] = {}
        self._dials: dict[PeerId, asyncio.Task[None]] = {}
        self._ends: dict[_End, None] = {}
        #: Open streams with each peer.
        self._open: dict[PeerId, int] = {}
        #: What runs for others, and how to tell a caller that it was cut off.
        self._serving: dict[asyncio.Task[Any], Callable[[str], None] | None] = {}
        lan.hosts[peer] = self
        lan.wire.up(peer)

    # --- unary calls, as hivemind's DHT makes them

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Callable[..., Any],
        input_protobuf_type: Any,
        *,
        stream_input: bool = False,
        stream_output: bool = False,
        balanced: bool = False,
    ) -> None:
        if stream_input or stream_output:
            raise NotImplementedError("streaming protobuf handlers: Potluck's RPC takes their place")
        self._unary[name] = (handler, input_protobuf_type)

    async def remove_protobuf_handler(
        self, name: str, *, stream_input: bool = False, stream_output: bool = False
    ) -> None:
        self._unary.pop(name, None)

    async def call_protobuf_handler(self, peer_id: Any, name: str, input: Any, output_protobuf_type: Any) -> Any:
        target = PeerId(peer_id.to_base58())
        await self._dial(target)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        channel = _Question(answer, P2PHandlerError(f"{target}: connection reset"))
        request = input.SerializeToString()
        self.calls += 1
        self.call_bytes += len(request) + _CALL_OVERHEAD

        def arrived() -> None:
            host = self._lan.hosts.get(target)
            if host is None or not host.alive:
                return fail_there(f"{target}: connection reset")
            host._serve(self.peer, name, request, answered, fail_there)

        def answered(response: bytes) -> None:
            self._wire.send(target, self.peer, len(response) + _CALL_OVERHEAD, lambda: done(response), channel)

        def done(response: bytes) -> None:
            self.call_bytes += len(response) + _CALL_OVERHEAD
            if not answer.done():
                answer.set_result(response)

        def fail(reason: str) -> None:
            if not answer.done():
                answer.set_exception(P2PHandlerError(reason))

        def fail_there(reason: str) -> None:
            self._wire.send(target, self.peer, _CALL_OVERHEAD, lambda: fail(reason), channel)

        self._wire.send(self.peer, target, len(request) + _CALL_OVERHEAD, arrived, channel)
        return output_protobuf_type.FromString(await answer)

    def _serve(
        self, caller: PeerId, name: str, request: bytes, answered: Callable[[bytes], None], fail: Callable[[str], None]
    ) -> None:
        found = self._unary.get(name)
        if found is None:
            return fail(f"no handler {name!r}")
        handler, kind = found

        async def serve() -> None:
            context = P2PContext(handle_name=name, local_id=self.peer_id, remote_id=_peer_id(caller))
            try:
                response = await handler(kind.FromString(request), context)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                fail(repr(error))
            else:
                answered(response.SerializeToString())

        self._spawn(serve(), fail)

    async def iterate_protobuf_handler(
        self, peer_id: Any, name: str, input: Any, output_protobuf_type: Any
    ) -> AsyncIterator[Any]:
        raise NotImplementedError("streaming protobuf handlers: Potluck's RPC takes their place")

    # --- streams

    async def add_binary_stream_handler(self, name: str, handler: StreamHandler, balanced: bool = False) -> None:
        self._streams[name] = handler

    async def call_binary_stream_handler(
        self, peer_id: Any, handler_name: str
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        target = PeerId(peer_id.to_base58())
        await self._dial(target)
        opened: asyncio.Future[_End] = self._loop.create_future()
        channel = _Question(opened, NetworkError(f"{target}: connection reset"))

        def arrived() -> None:
            host = self._lan.hosts.get(target)
            handler = host._streams.get(handler_name) if host and host.alive else None
            if host is None or handler is None:
                self._wire.send(target, self.peer, _CALL_OVERHEAD, refused, channel)
                return
            ours, theirs = _End(self, host), _End(host, self)
            ours.other, theirs.other = theirs, ours
            reader, writer = theirs.streams()
            info = StreamInfo(self.peer_id, _ADDRESS, handler_name)
            host._spawn(handler(info, reader, writer))
            self._wire.send(target, self.peer, _CALL_OVERHEAD, lambda: accepted(ours), channel)

        def accepted(end: _End) -> None:
            if opened.done() or not self.alive:
                end.abort()
            elif end._lost:
                channel.break_off()
            else:
                opened.set_result(end)

        def refused() -> None:
            if not opened.done():
                opened.set_exception(NetworkError(f"{target} does not speak {handler_name}"))

        self._wire.send(self.peer, target, _CALL_OVERHEAD, arrived, channel)
        end = await opened
        reader, writer = end.streams()
        return StreamInfo(peer_id, _ADDRESS, handler_name), reader, writer

    # --- connections

    @property
    def connections(self) -> int:
        return len(self._connected)

    async def get_visible_maddrs(self, latest: bool = False) -> Sequence[Any]:
        return [f"{_ADDRESS}/p2p/{self.peer}"]

    async def list_peers(self) -> Sequence[PeerInfo]:
        return [PeerInfo(_peer_id(peer), [_ADDRESS]) for peer in self._connected]

    async def connect(self, maddr: str, timeout_seconds: float) -> PeerId:
        peer = PeerId(maddr.rpartition("/p2p/")[2])
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._dial(peer)
        except TimeoutError:
            raise NetworkError(f"cannot connect to {maddr}: no answer in {timeout_seconds:g} s") from None
        return peer

    async def _dial(self, target: PeerId) -> None:
        """Connect, unless connected. Raises NetworkError: at once where nobody listens, late where nothing answers."""
        if not self.alive:
            raise NetworkError("this host is down")
        if target in self._connected:
            return
        task = self._dials.get(target)
        if task is None:
            task = self._dials[target] = self._loop.create_task(self._handshake(target))
            task.add_done_callback(lambda done: self._dialled(target, done))
        await asyncio.shield(task)

    def _dialled(self, target: PeerId, task: asyncio.Task[None]) -> None:
        self._dials.pop(target, None)
        if not task.cancelled():
            task.exception()  # who waits for it hears of it; who waits no more need not

    async def _handshake(self, target: PeerId) -> None:
        if not self._wire.can_dial(self.peer, target):
            await asyncio.sleep(DIAL_SECONDS)
            raise NetworkError(f"{target}: no answer in {DIAL_SECONDS:g} s")
        channel = Channel()
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                for source, other in 2 * ((self.peer, target), (target, self.peer)):
                    arrived: asyncio.Future[None] = self._loop.create_future()
                    self._wire.send(source, other, HANDSHAKE_BYTES, _resolver(arrived), channel)
                    await arrived
        except TimeoutError:
            raise NetworkError(f"{target}: no answer in {DIAL_SECONDS:g} s") from None
        host = self._lan.hosts.get(target)
        if host is None or not host.alive:
            raise NetworkError(f"{target}: connection refused")
        self._connected[target] = host._connected[self.peer] = None
        self._trim()
        host._trim()

    def _trim(self) -> None:
        """Close the oldest connections without streams, if there are too many; the newest stays."""
        excess = len(self._connected) - MAX_CONNECTIONS
        if excess <= 0:
            return
        idle = (peer for peer in list(self._connected)[:-1] if peer not in self._open)
        for peer in islice(idle, excess):
            del self._connected[peer]
            other = self._lan.hosts.get(peer)
            if other is not None:
                other._connected.pop(self.peer, None)

    # --- the end

    async def shutdown(self) -> None:
        self.crash()
        await asyncio.sleep(0)

    def crash(self) -> None:
        """Nothing is flushed, no handler ends well; the others see their streams reset."""
        if not self.alive:
            return
        self.alive = False
        if self._lan.hosts.get(self.peer) is self:
            del self._lan.hosts[self.peer]
            self._wire.down(self.peer)
        for end in list(self._ends):
            end.abort()
        for fail in self._serving.values():
            if fail is not None:
                fail(f"{self.peer}: connection reset")
        for task in [*self._serving, *self._dials.values()]:
            task.cancel()
        for peer in self._connected:
            other = self._lan.hosts.get(peer)
            if other is not None:
                other._connected.pop(self.peer, None)
        self._connected.clear()

    def _spawn(self, work: Any, fail: Callable[[str], None] | None = None) -> None:
        task = self._loop.create_task(work)
        self._serving[task] = fail
        task.add_done_callback(lambda done: self._serving.pop(done, None))

    def _closed_stream(self, peer: PeerId) -> None:
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]


def _resolver(future: asyncio.Future[None]) -> Arrive:
    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    return resolve


class _End(asyncio.Transport, Channel):
    """One side of a stream."""

    other: _End

    def __init__(self, host: MemoryHost, remote: MemoryHost) -> None:
        super().__init__()
        self._host, self._remote = host, remote
        self._loop = host._loop
        self._protocol: Any = None
        self._under_way = 0
        self._paused_reading = self._paused_writing = False
        self._closing = self._aborted = self._lost = False
        self._waiting: list[bytes | None] = []  # received while reading was paused; None is the end
        host._ends[self] = None
        host._open[remote.peer] = host._open.get(remote.peer, 0) + 1

    def streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader = asyncio.StreamReader(loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        self._protocol = protocol
        protocol.connection_made(self)
        self._flush()
        return reader, asyncio.StreamWriter(self, protocol, reader, self._loop)

    # --- asyncio.Transport

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        if self._closing or not len(data):
            return
        copy = bytes(data)
        self._under_way += len(copy)
        self._send(len(copy), lambda: self._arrived(copy))
        if self._under_way > _HIGH_WATER and not self._paused_writing:
            self._paused_writing = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._under_way

    def pause_reading(self) -> None:
        self._paused_reading = True

    def resume_reading(self) -> None:
        if self._paused_reading:
            self._paused_reading = False
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """What was written still arrives; then the other side sees the end."""
        if self._closing:
            return
        self._closing = True
        self._send(40, lambda: self.other._receive(None))
        self._loop.call_soon(self._lose, None)

    def break_off(self) -> None:
        if self._aborted:  # what was lost may be the reset itself
            self.other._lose(ConnectionResetError("the stream was reset"))
        self.abort()

    def abort(self) -> None:
        if self._aborted:
            return
        self._closing = self._aborted = True
        reset = ConnectionResetError("the stream was reset")
        self._send(40, lambda: self.other._lose(reset))
        self._loop.call_soon(self._lose, reset)

    # --- both ways

    def _send(self, size: int, arrive: Arrive) -> None:
        self._host._wire.send(self._host.peer, self._remote.peer, size, arrive, self)

    def _arrived(self, data: bytes) -> None:
        self._under_way -= len(data)
        if self._paused_writing and self._under_way < _LOW_WATER:
            self._paused_writing = False
            if not self._lost:
                self._protocol.resume_writing()
        self.other._receive(data)

    def _receive(self, data: bytes | None) -> None:
        if self._lost or not self._host.alive:
            return
        self._waiting.append(data)
        if not self._paused_reading and self._protocol is not None:
            self._flush()

    def _flush(self) -> None:
        while self._waiting and not self._paused_reading and not self._lost:
            data = self._waiting.pop(0)
            if data is None:
                if not self._protocol.eof_received():
                    self._lose(None)
            elif isinstance(self._protocol, asyncio.BufferedProtocol):
                self._fill(memoryview(data))
            else:
                self._protocol.data_received(data)

    def _fill(self, data: memoryview) -> None:
        while len(data) and not self._lost:
            room = memoryview(self._protocol.get_buffer(len(data)))
            count = min(len(room), len(data))
            room[:count] = data[:count]
            self._protocol.buffer_updated(count)
            data = data[count:]

    def _lose(self, reason: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._host._ends.pop(self, None)
        self._host._closed_stream(self._remote.peer)
        if self._protocol is not None:
            self._protocol.connection_lost(reason)
