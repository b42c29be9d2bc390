"""AutoNAT: asking a peer to dial us back. The daemon asks, too, but keeps what it learns to itself.

The peer tries our ports at the address at which it sees us, under another identity, and says how that went; it refuses
where that address is a private one. Spec: https://github.com/libp2p/specs/blob/master/autonat/autonat-v1.md
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from potluck.errors import NetworkError, ProtocolError
from potluck.net.host import Host, PeerId

PROTOCOL: Final = "/libp2p/autonat/1.0.0"
MAX_ANSWER_BYTES: Final = 8192
_MAX_TEXT: Final = 200
_DIAL, _DIAL_RESPONSE = 0, 1
_OK, _DIAL_ERROR = 0, 100


@dataclass(frozen=True)
class DialBack:
    """What a peer said. `refused`: it did not try. `silent`: it does not speak AutoNAT, or not in time. `text` is why,
    and of `reached` the address."""

    outcome: Literal["reached", "failed", "refused", "silent"]
    text: str


async def ask_to_dial_back(host: Host, peer: PeerId, addresses: Sequence[str], timeout_seconds: float) -> DialBack:
    """`peer` is connected; `addresses` are ours. Whatever a peer does is an answer: raises nothing for it."""
    try:
        async with asyncio.timeout(timeout_seconds):
            _, reader, writer = await host.call_binary_stream_handler(PeerID.from_base58(peer), PROTOCOL)
            try:
                question = encode_dial(host.peer_id.to_bytes(), [Multiaddr(a).to_bytes() for a in addresses])
                writer.write(question)
                await writer.drain()
                return decode_answer(await _read_delimited(reader))
            finally:
                writer.close()
    except TimeoutError:
        return DialBack("silent", f"no answer in {timeout_seconds:.0f} s")
    except (NetworkError, ProtocolError) as error:
        return DialBack("silent", " ".join(str(error).split())[:_MAX_TEXT])
    except (OSError, EOFError):
        return DialBack("silent", "it closed the stream")


def encode_dial(peer: bytes, addresses: Sequence[bytes]) -> bytes:
    """A message with its length before it: our id and addresses, all in libp2p's binary forms."""
    about_us = _field(1, peer) + b"".join(_field(2, address) for address in addresses)
    message = _varint(1 << 3) + _varint(_DIAL) + _field(2, _field(1, about_us))
    return _varint(len(message)) + message


def decode_answer(message: bytes) -> DialBack:
    """Raises ProtocolError for anything but a dial response."""
    fields = _fields(message)
    response = fields.get(3)
    if fields.get(1) != _DIAL_RESPONSE or not isinstance(response, bytes):
        raise ProtocolError("AutoNAT: not a dial response")
    inner = _fields(response)
    status, text, address = inner.get(1, _OK), inner.get(2, b""), inner.get(3, b"")
    if not isinstance(text, bytes) or not isinstance(address, bytes):
        raise ProtocolError("AutoNAT: a malformed dial response")
    if status == _OK:
        return DialBack("reached", _address_text(address))
    said = text.decode(errors="replace")[:_MAX_TEXT]
    return DialBack("failed" if status == _DIAL_ERROR else "refused", said)


def _address_text(address: bytes) -> str:
    try:
        return str(Multiaddr(address))[:_MAX_TEXT]
    except Exception as error:  # the library has many for bytes that are no address
        raise ProtocolError(f"AutoNAT: not an address: {error!r}") from None


async def _read_delimited(reader: asyncio.StreamReader) -> bytes:
    size = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        size |= (byte & 0x7F) << shift
        shift += 7
        if size > MAX_ANSWER_BYTES or shift > 28:
            raise ProtocolError(f"AutoNAT: an answer of more than {MAX_ANSWER_BYTES} bytes")
        if byte < 0x80:
            return await reader.readexactly(size)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _fields(message: bytes) -> dict[int, int | bytes]:
    """A protobuf message's fields by number, the last of each: numbers, and bytes. Others raise ProtocolError."""
    found: dict[int, Any] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise ProtocolError("AutoNAT: a malformed message")
            byte = message[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            found[tag >> 3] = varint()
        elif tag & 7 == 2:
            size = varint()
            if size > len(message) - at:
                raise ProtocolError("AutoNAT: a malformed message")
            found[tag >> 3] = message[at : at + size]
            at += size
        else:
            raise ProtocolError("AutoNAT: a malformed message")
    return found
