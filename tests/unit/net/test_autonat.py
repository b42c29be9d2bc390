"""AutoNAT's messages: as the Go daemon writes them, and as nobody should."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import NetworkError, ProtocolError
from potluck.net.autonat import MAX_ANSWER_BYTES, DialBack, ask_to_dial_back, decode_answer, encode_dial
from potluck.net.host import PeerId

PEER = PeerId("12D3KooWCHA12mx7eyUNJDQNmAoz4n2ds3sLWmpNzPhTgciM4uPR")
#: As p2pd sent them: to a public peer, to one behind a NAT, and on loopback.
REACHED = b"\x08\x01\x1a\x0c\x08\x00\x1a\x08\x04\x0b\x00\x02\x02\x06\x0f\xa1"
FAILED = b"\x08\x01\x1a\x0f\x08d\x12\x0bdial failed"
REFUSED = b"\x08\x01\x1a7\x08e\x123refusing to dial peer with blocked observed address"


def test_answers_of_the_daemon_are_understood() -> None:
    assert decode_answer(REACHED) == DialBack("reached", "/ip4/11.0.2.2/tcp/4001")
    assert decode_answer(FAILED) == DialBack("failed", "dial failed")
    assert decode_answer(REFUSED) == DialBack("refused", "refusing to dial peer with blocked observed address")


def test_a_question_is_protobuf_with_its_length_before_it() -> None:
    assert encode_dial(b"me", [b"a", b"bc"]) == b"\x11\x08\x00\x12\x0d\x0a\x0b\x0a\x02me\x12\x01a\x12\x02bc"
    long = encode_dial(bytes(40), [bytes(200)])
    assert long[:2] == bytes([(len(long) - 2) & 0x7F | 0x80, (len(long) - 2) >> 7])


@pytest.mark.parametrize(
    "message", [b"", b"\x08\x00", b"\x08\x01", b"\x08\x01\x1a\x05ab", b"\xff" * 20, b"\x0d\0\0\0\0", REACHED[:-1]]
)
def test_malformed_answers_are_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_answer(message)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: REACHED[:4] + tail))
def test_any_bytes_are_an_answer_or_refused(message: bytes) -> None:
    try:
        answer = decode_answer(message)
    except ProtocolError:
        return
    assert answer.outcome in ("reached", "failed", "refused") and len(answer.text) <= 200


class FakeHost:
    """A host whose peer answers with these bytes and then closes, or cannot be asked."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.peer_id: Any = self

    def to_bytes(self) -> bytes:
        return b"me"

    async def call_binary_stream_handler(self, peer: Any, name: str) -> tuple[Any, asyncio.StreamReader, Any]:
        if isinstance(self.answer, Exception):
            raise self.answer
        reader = asyncio.StreamReader()
        reader.feed_data(self.answer)
        if self.answer != b"":
            reader.feed_eof()
        return None, reader, self

    def write(self, data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (bytes([len(REACHED)]) + REACHED, "reached"),
        (bytes([len(FAILED)]) + FAILED, "failed"),
        (b"", "silent"),  # and the stream stays open
        (b"\x20half", "silent"),
        (b"\xff\xff\xff\xff\xff\xff", "silent"),
        (b"\x02\x08\x01", "silent"),
        (b"\x81\x81" + bytes([MAX_ANSWER_BYTES >> 13]), "silent"),
        (NetworkError("protocols not supported"), "silent"),
    ],
)
def test_whatever_a_peer_does_is_an_answer(answer: bytes | Exception, outcome: str) -> None:
    host: Any = FakeHost(answer)
    said = asyncio.run(ask_to_dial_back(host, PEER, ["/ip4/192.168.1.2/tcp/4001"], timeout_seconds=0.2))
    assert said.outcome == outcome and said.text
