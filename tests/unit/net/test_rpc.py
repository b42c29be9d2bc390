from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from potluck.errors import (
    BlobUnavailable,
    ProtocolError,
    RpcClosed,
    RpcError,
    RpcRefused,
    RpcRemoteError,
    RpcTimeout,
)
from potluck.net.host import PeerId
from potluck.net.pace import SLOW_WINDOW, WINDOW
from potluck.net.ranges import asked_range, call_by_ranges
from potluck.net.rpc import HELLO, Reply, Rpc, RpcLimits, _ErrorHead, _received_error
from potluck.net.wire import HEADER, Kind, encode

from fake_net import network


async def echo(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
    return Reply({**head, "from": peer}, bytes(body))


def request_frame(call_id: int, method: str, body_length: int = 0, timeout_ms: int = 5000) -> bytes:
    head = msgspec.msgpack.encode((method, timeout_ms, 1 << 20, {}))
    return encode(Kind.REQUEST, call_id, head, body_length)


async def ends(reader: asyncio.StreamReader) -> bytes:
    """Everything until the other side closes."""
    async with asyncio.timeout(10):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("size", [0, 1, 100, 16_384, 16_385, 3_000_000])
def test_head_and_body_come_back(short_dir: Path, size: int) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            a.register("echo", echo, max_request_bytes=4 << 20)
            body = bytes(range(256)) * (size // 256 + 1)
            reply = await b.call(
                a.peer_id, "echo", {"x": 1}, body[:size], timeout_seconds=10, max_response_bytes=4 << 20
            )
            assert reply.head == {"x": 1, "from": b.peer_id} and bytes(reply.body) == body[:size]
            assert b.bytes_sent == a.bytes_received >= size
            assert b.traffic[a.peer_id].received == a.traffic[b.peer_id].sent >= size

    asyncio.run(main())


def test_works_under_uvloop(short_dir: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            a.register("echo", echo, max_request_bytes=4 << 20)
            into = memoryview(bytearray(3_000_000))
            body = b"u" * 3_000_000
            for _ in range(3):
                reply = await b.call(a.peer_id, "echo", {}, body, timeout_seconds=10, into=into)
                assert bytes(reply.body) == body

    uvloop.run(main())


def test_many_calls_share_one_stream_and_do_not_wait_for_each_other(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            release = asyncio.Event()

            async def wait(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                await release.wait()
                return Reply({})

            a.register("wait", wait)
            a.register("echo", echo)
            slow = asyncio.create_task(b.call(a.peer_id, "wait", timeout_seconds=10))
            calls = [b.call(a.peer_id, "echo", {"i": i}, timeout_seconds=10) for i in range(50)]
            assert [reply.head["i"] for reply in await asyncio.gather(*calls)] == list(range(50))
            assert not slow.done()
            release.set()
            await slow
            assert b.host.opened == 1  # type: ignore[attr-defined]
            await b.call(a.peer_id, "echo", timeout_seconds=10, lane="bulk")
            assert b.host.opened == 2  # type: ignore[attr-defined]

    asyncio.run(main())


def test_response_is_received_in_place(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            a.register("echo", echo, max_request_bytes=1 << 20)
            into = memoryview(bytearray(200_000))
            reply = await b.call(a.peer_id, "echo", {}, b"z" * 150_000, timeout_seconds=10, into=into)
            assert len(reply.body) == 150_000 and bytes(into) == b"z" * 150_000 + bytes(50_000)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_giving_up_cancels_the_handler(short_dir: Path, how: str) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            started, cancelled = asyncio.Event(), asyncio.Event()

            async def forever(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                started.set()
                try:
                    await asyncio.Future()
                finally:
                    cancelled.set()
                return Reply()

            a.register("forever", forever)
            a.register("echo", echo)
            timeout = 0.2 if how == "deadline" else 60
            call = asyncio.create_task(b.call(a.peer_id, "forever", timeout_seconds=timeout))
            await asyncio.wait_for(started.wait(), 10)
            if how == "cancel":
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            else:
                with pytest.raises(RpcTimeout, match="forever"):
                    await call
            await asyncio.wait_for(cancelled.wait(), 10)
            await b.call(a.peer_id, "echo", timeout_seconds=10)
            assert b.host.opened == 1  # type: ignore[attr-defined]
            assert not a._loads

    asyncio.run(main())


def test_buffer_of_a_cancelled_call_is_left_alone(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")

            async def big(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                return Reply({}, b"x" * (32 << 20))

            a.register("big", big)
            a.register("echo", echo)
            into = memoryview(bytearray(32 << 20))
            call = asyncio.create_task(b.call(a.peer_id, "big", timeout_seconds=30, into=into))
            await until(lambda: into[0] or call.done())
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            into[:] = bytes(len(into))
            await b.call(a.peer_id, "echo", timeout_seconds=30)
            assert not any(into[:: 1 << 10]) and b.host.opened == 1  # type: ignore[attr-defined]

    asyncio.run(main())


def test_errors_keep_their_type(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")

            async def fail(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                raise {
                    "known": BlobUnavailable("gone"),
                    "busy": RpcRefused("later", 1.5),
                    "bug": ValueError("secret detail"),
                }[head["how"]]

            a.register("fail", fail)
            b.register("fail", fail)
            for target in (a.peer_id, b.peer_id):  # from afar and from oneself alike
                with pytest.raises(RpcRemoteError, match="gone") as known:
                    await b.call(target, "fail", {"how": "known"}, timeout_seconds=10)
                assert known.value.kind == "BlobUnavailable" and target[-8:] in str(known.value)
                with pytest.raises(RpcRefused) as busy:
                    await b.call(target, "fail", {"how": "busy"}, timeout_seconds=10)
                assert busy.value.retry_after_seconds == 1.5
                for _ in range(2):
                    with pytest.raises(RpcRemoteError) as bug:
                        await b.call(target, "fail", {"how": "bug"}, timeout_seconds=10)
                    assert bug.value.kind == "InternalError" and "secret" not in str(bug.value)
                with pytest.raises(RpcRemoteError) as unknown:
                    await b.call(target, "nothing", timeout_seconds=10)
                assert unknown.value.kind == "UnknownMethod"

    asyncio.run(main())
    assert sum("handler_failed" in record.message for record in caplog.records) == 2  # once per peer


def test_beyond_the_limits_a_peer_is_refused_at_once(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a = await net.rpc("a", RpcLimits(requests_per_peer=3, buffered_bytes_per_peer=1000))
            b, c = await net.rpc("b"), await net.rpc("c")
            release = asyncio.Event()

            async def wait(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                await release.wait()
                return Reply()

            a.register("wait", wait)
            a.register("echo", echo)
            slow = [asyncio.create_task(b.call(a.peer_id, "wait", timeout_seconds=10)) for _ in range(3)]
            await until(lambda: a._total.requests == 3)
            with pytest.raises(RpcRefused) as refused:
                await b.call(a.peer_id, "wait", {}, b"x" * 900, timeout_seconds=10)
            assert refused.value.retry_after_seconds > 0
            await c.call(a.peer_id, "echo", timeout_seconds=10)  # others are not affected
            release.set()
            await asyncio.gather(*slow)
            with pytest.raises(RpcRefused):
                await b.call(a.peer_id, "echo", {}, b"x" * 1001, timeout_seconds=10)
            await b.call(a.peer_id, "echo", {}, b"x" * 1000, timeout_seconds=10)
            assert not a._loads and a._total.buffered == 0

    asyncio.run(main())


def test_request_beyond_its_methods_limit_breaks_only_that_lane(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            a.register("echo", echo, max_request_bytes=100)
            with pytest.raises(RpcError):
                await b.call(a.peer_id, "echo", {}, bytes(101), timeout_seconds=10)
            await b.call(a.peer_id, "echo", {}, bytes(100), timeout_seconds=10)

    asyncio.run(main())


def test_response_beyond_the_callers_limit_is_an_error_not_a_transfer(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            a.register("echo", echo)
            with pytest.raises(RpcRemoteError) as error:
                await b.call(a.peer_id, "echo", {}, bytes(101), timeout_seconds=10, max_response_bytes=100)
            assert error.value.kind == "ResponseTooLarge" and b.bytes_received < 1000

    asyncio.run(main())


@pytest.mark.parametrize(
    "attack",
    [
        encode(Kind.REQUEST, 1, b"", 2**63),
        request_frame(1, "echo", 2**63),
        request_frame(1, "nothing", 2**40),
        encode(Kind.REQUEST, 1, b"\x91" * 60_000),
        encode(Kind.REQUEST, 1, msgspec.msgpack.encode(["echo", "soon", 1, {}])),
        encode(Kind.RESPONSE, 1, b"\x80"),
        encode(Kind.CANCEL, 1, b"", 5),
        HEADER.pack(9, 0, 0, 1, 0),
        HEADER.pack(Kind.REQUEST, 1, 0, 1, 0),
        b"\xff" * 4096,
    ],
    ids=lambda attack: attack[:4].hex() + f"-{len(attack)}",
)
def test_malformed_frames_close_the_lane_and_nothing_else(short_dir: Path, attack: bytes) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            a.register("echo", echo)
            reader, writer = await net.raw(a)
            writer.write(HELLO)
            assert await reader.readexactly(len(HELLO)) == HELLO
            writer.write(attack)
            await ends(reader)
            writer.close()
            await b.call(a.peer_id, "echo", timeout_seconds=10)
            assert not a._loads

    asyncio.run(main())


@pytest.mark.parametrize("sent", [HEADER.pack(Kind.REQUEST, 0, 9, 1, 5)[:7], request_frame(1, "echo", 10) + b"half"])
def test_half_a_frame_and_silence_closes_the_lane(short_dir: Path, sent: bytes) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a = await net.rpc("a", RpcLimits(frame_timeout_seconds=0.2))
            a.register("echo", echo)
            reader, writer = await net.raw(a)
            writer.write(HELLO + b"")
            await reader.readexactly(len(HELLO))
            writer.write(sent)
            assert await ends(reader) == b""
            writer.close()
            assert not a._loads and not a._server_lanes

    asyncio.run(main())


def test_silence_instead_of_a_hello_is_closed(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a = await net.rpc("a", RpcLimits(hello_timeout_seconds=0.1))
            reader, writer = await net.raw(a)
            assert await ends(reader) == b""
            writer.close()

    asyncio.run(main())


def test_idle_lanes_close_and_the_next_call_opens_another(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b", RpcLimits(idle_timeout_seconds=0.1))
            a.register("echo", echo)
            for opened in (1, 2):
                await b.call(a.peer_id, "echo", timeout_seconds=10)
                assert b.host.opened == opened  # type: ignore[attr-defined]
                await until(lambda: not b._lanes and not a._server_lanes)

    asyncio.run(main())


def test_peer_that_does_not_read_is_not_read_from_and_then_dropped(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a = await net.rpc("a", RpcLimits(stall_timeout_seconds=0.5))
            handled = 0

            async def big(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                nonlocal handled
                handled += 1
                return Reply({}, bytes(1 << 20))

            a.register("big", big)
            reader, writer = await net.raw(a)
            writer.write(HELLO)
            await reader.readexactly(len(HELLO))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            for call_id in range(5000):
                writer.write(request_frame(call_id, "big"))
            await until(lambda: not a._server_lanes)
            assert 1 <= handled <= RpcLimits().requests_per_peer
            writer.transport.abort()

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer",
    [
        encode(Kind.RESPONSE, 1, b"\x80", 2**63),
        encode(Kind.RESPONSE, 1, b"\xc1"),
        encode(Kind.RESPONSE, 77, b"\x80"),
        encode(Kind.ERROR, 1, b"\x80"),
        encode(Kind.REQUEST, 1, b"\x80"),
        b"",
    ],
)
def test_malformed_answers_end_the_call_with_an_rpc_error(short_dir: Path, answer: bytes) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            b = await net.rpc("b")
            liar = await net.rpc("liar")

            async def lie(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(await reader.readexactly(len(HELLO)))
                await reader.readexactly(HEADER.size)
                writer.write(answer)
                if not answer:
                    writer.close()
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                writer.close()

            await liar.host.add_binary_stream_handler("/potluck/rpc/1", lie)
            with pytest.raises(RpcClosed) as error:
                await b.call(liar.peer_id, "x", timeout_seconds=10)
            assert "x to .." in str(error.value)
            if answer:
                assert isinstance(error.value.__cause__, ProtocolError)
            assert not b._lanes

    asyncio.run(main())


def test_broken_stream_fails_its_calls_at_once_and_the_next_call_reopens(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")

            async def forever(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                await asyncio.Future()
                return Reply()

            a.register("forever", forever)
            a.register("echo", echo)
            call = asyncio.create_task(b.call(a.peer_id, "forever", timeout_seconds=60))
            await until(lambda: a._total.requests)
            for transport in b.host.transports:  # type: ignore[attr-defined]
                transport.abort()
            with pytest.raises(RpcClosed, match="forever"):
                await call
            await b.call(a.peer_id, "echo", timeout_seconds=10)

    asyncio.run(main())


def test_unreachable_and_nonsense_peers_are_rpc_errors(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            b = await net.rpc("b")
            with pytest.raises(RpcClosed, match="not reached"):
                await b.call(PeerId("nobody"), "x", timeout_seconds=10)
            assert not b._lanes

    asyncio.run(main())


def test_close_ends_calls_in_both_directions(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")

            async def forever(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                await asyncio.Future()
                return Reply()

            a.register("forever", forever)
            call = asyncio.create_task(b.call(a.peer_id, "forever", timeout_seconds=60))
            await until(lambda: a._total.requests)
            await a.close()
            with pytest.raises(RpcClosed):
                await call
            await b.close()
            with pytest.raises(RpcClosed, match="shutting down"):
                await b.call(a.peer_id, "forever", timeout_seconds=1)
            assert not a._loads

    asyncio.run(main())


def test_calling_oneself_needs_no_stream_and_sees_the_same_types(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a = await net.rpc("a")
            a.register("echo", echo)
            reply = await a.call(a.peer_id, "echo", {"pair": (1, 2)}, b"x", timeout_seconds=10)
            assert reply.head == {"pair": [1, 2], "from": a.peer_id} and bytes(reply.body) == b"x"
            assert a.host.opened == 0  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_method_is_registered_once(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a: Rpc = await net.rpc("a")
            a.register("echo", echo)
            with pytest.raises(ValueError, match="echo"):
                a.register("echo", echo)

    asyncio.run(main())


def test_streams_that_never_say_hello_count_too(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a = await net.rpc("a", RpcLimits(lanes_per_peer=3, hello_timeout_seconds=30))
            silent = [await net.raw(a) for _ in range(3)]
            await until(lambda: a._owned == 3)
            reader, _ = await net.raw(a)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            for _, writer in silent:
                writer.close()
            await until(lambda: a._owned == 0)

    asyncio.run(main())


@pytest.mark.parametrize("told", [float("nan"), float("inf"), -1.0, 0.0, 1e300])
def test_what_a_stranger_tells_us_to_wait_is_bounded(told: float) -> None:
    error = _received_error(PeerId("p"), "m", _ErrorHead("RpcRefused", "busy", told))
    assert isinstance(error, RpcRefused) and 0.01 <= error.retry_after_seconds <= 60


def test_a_slow_peer_is_asked_for_less_at_once(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            data, sizes = memoryview(bytes(range(256)) * 2048), list[int]()

            async def get(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                sizes.append(head["size"])
                return Reply({}, asked_range(data, head))

            a.register("get", get)
            a.upload.rate = 1e6
            loop = asyncio.get_running_loop()
            for measured in (False, True, False):
                into = memoryview(bytearray(len(data)))
                await call_by_ranges(b, a.peer_id, "get", {}, into, loop.time() + 10, measured=measured)
                assert into == data
            assert sizes[0] == sizes[-1] == len(data) and sum(sizes) == 3 * len(data) and max(sizes[1:-1]) < 1 << 17
            assert b.ask_bytes(a.peer_id) < 1 << 17 and b.ask_bytes(b.peer_id) == 1 << 20
            assert b.window(a.peer_id) == SLOW_WINDOW < b.window(b.peer_id) == WINDOW

    asyncio.run(main())
