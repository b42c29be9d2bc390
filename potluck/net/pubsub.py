"""Publish and subscribe: gossipsub, as the libp2p daemon offers it on its control socket.

hivemind's client of the control protocol lacks it. A subscription is a control connection of its own that stays open;
the daemon signs what it publishes and drops what bears no valid signature of the peer that it is from (strict signing).
Spec: `PSRequest`, `PSMessage` in hivemind/proto/p2pd.proto; https://github.com/libp2p/specs/tree/master/pubsub.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_unsigned_varint
from hivemind.proto import p2pd_pb2

from potluck.errors import NetworkError
from potluck.net.host import PeerId

#: What surrounds a message's data: peer id, sequence number, topic, signature, key.
_AROUND_BYTES: Final = 1024
_AGAIN_SECONDS: Final = 1.0

#: One request on a control connection of its own, which stays open (`GoHost.control`). Raises NetworkError.
Control = Callable[[Any], Awaitable[tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]]]


@dataclass(frozen=True, slots=True)
class Message:
    """`sender` published it first: the daemon has checked its signature. Anybody may have passed it on."""

    sender: PeerId
    data: bytes


async def publish(control: Control, topic: str, data: bytes) -> None:
    """To all subscribers that our neighbours know. Raises NetworkError; a retry is safe, and may be heard twice."""
    _, _, writer = await control(_request(p2pd_pb2.PSRequest.PUBLISH, topic, data))
    writer.close()


async def subscribe(
    control: Control, topic: str, *, max_bytes: int, on_bytes: Callable[[int], None] = lambda size: None
) -> AsyncGenerator[Message | None, None]:
    """What others publish, and this host itself, for as long as it is asked for: also after the daemon was started
    again (what was said meanwhile is lost). None for a message of more than `max_bytes`, which is not held.
    `on_bytes` hears the size of each, of those too: the daemon has passed it on to our neighbours already."""
    while True:
        try:
            _, reader, writer = await control(_request(p2pd_pb2.PSRequest.SUBSCRIBE, topic))
        except NetworkError:  # it is being started again
            await asyncio.sleep(_AGAIN_SECONDS)
            continue
        try:
            while True:
                yield await _read(reader, max_bytes, on_bytes)
        except (OSError, EOFError, ValueError):  # the daemon died, or lost its thread
            await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader, max_bytes: int, on_bytes: Callable[[int], None]) -> Message | None:
    """The next message; None for one that is too large, or is none."""
    size = await read_unsigned_varint(reader)
    on_bytes(size)
    if size > max_bytes + _AROUND_BYTES:
        while size > 0:
            size -= len(await reader.readexactly(min(size, 1 << 16)))
        return None
    data = await reader.readexactly(size)
    message = p2pd_pb2.PSMessage()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    if len(message.data) > max_bytes:
        return None
    return Message(PeerId(PeerID(getattr(message, "from")).to_base58()), message.data)


def _request(kind: Any, topic: str, data: bytes = b"") -> Any:
    request = p2pd_pb2.PSRequest(type=kind, topic=topic, data=data)
    return p2pd_pb2.Request(type=p2pd_pb2.Request.PUBSUB, pubsub=request)
