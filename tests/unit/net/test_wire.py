from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import ProtocolError
from potluck.net.wire import HEADER, STAGING_BYTES, Frame, FrameReader, Kind, encode

frames = st.lists(
    st.tuples(
        st.sampled_from(Kind),
        st.integers(0, 2**32 - 1),
        st.one_of(st.binary(max_size=40), st.just(b"h" * 20_000)),
        st.one_of(st.binary(max_size=100), st.integers(0, 70_000).map(lambda size: b"b" * size)),
    ),
    max_size=6,
)


class Sink:
    """Collects frames; lets the bodies of `skip` pass."""

    def __init__(self, skip: frozenset[int] = frozenset(), max_body: int = 1 << 20) -> None:
        self.frames: list[tuple[Kind, int, bytes, bytes | None]] = []
        self.skip = skip
        self.max_body = max_body
        self.reader = FrameReader(self.on_head, self.on_frame)

    def on_head(self, frame: Frame) -> memoryview | None:
        if frame.body_length > self.max_body:
            raise ProtocolError("too large")
        return None if frame.call_id in self.skip else memoryview(bytearray(frame.body_length))

    def on_frame(self, frame: Frame, body: memoryview | None) -> None:
        self.frames.append((frame.kind, frame.call_id, frame.head, None if body is None else bytes(body)))

    def feed(self, data: bytes, cuts: list[int]) -> None:
        """As a transport does: at most one buffer at a time, cut where the test says."""
        position = 0
        while position < len(data):
            room = self.reader.get_buffer()
            assert len(room) > 0
            limit = max(1, cuts.pop(0)) if cuts else len(room)
            count = min(len(room), limit, len(data) - position)
            room[:count] = data[position : position + count]
            self.reader.buffer_updated(count)
            position += count


def _bytes_of(content: list[tuple[Kind, int, bytes, bytes]]) -> bytes:
    return b"".join(encode(kind, call, head, len(body)) + body for kind, call, head, body in content)


@given(frames, st.lists(st.integers(1, 40_000), max_size=30))
def test_any_split_gives_the_same_frames(content: list[tuple[Kind, int, bytes, bytes]], cuts: list[int]) -> None:
    sink = Sink()
    sink.feed(_bytes_of(content), cuts)
    assert sink.frames == content
    assert not sink.reader.in_frame


@given(frames, st.lists(st.integers(1, 3_000), max_size=30), st.data())
def test_bodies_that_pass_unread_leave_the_rest_intact(
    content: list[tuple[Kind, int, bytes, bytes]], cuts: list[int], data: st.DataObject
) -> None:
    skip = frozenset(data.draw(st.sets(st.sampled_from([each[1] for each in content]))) if content else ())
    sink = Sink(skip)
    sink.feed(_bytes_of(content), cuts)
    assert sink.frames == [(k, c, h, None if c in skip else b) for k, c, h, b in content]


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=20))
def test_garbage_is_refused_or_waited_for_and_allocates_little(garbage: bytes, cuts: list[int]) -> None:
    sink = Sink(max_body=1000)
    try:
        sink.feed(garbage, cuts)
    except ProtocolError:
        pass
    assert len(sink.reader.get_buffer()) <= max(STAGING_BYTES, 0xFFFF)


def test_two_to_the_63_is_refused_before_anything_is_allocated() -> None:
    sink = Sink()
    with pytest.raises(ProtocolError):
        sink.feed(encode(Kind.REQUEST, 1, b"", 2**63), [])


def test_head_beyond_the_limit_is_refused_at_the_header() -> None:
    reader = FrameReader(lambda frame: None, lambda frame, body: None, max_head_bytes=100)
    header = HEADER.pack(Kind.REQUEST, 0, 101, 1, 0)
    reader.get_buffer()[: len(header)] = header
    with pytest.raises(ProtocolError, match="101"):
        reader.buffer_updated(len(header))


def test_abandoned_body_is_not_written_any_more() -> None:
    target = memoryview(bytearray(10))
    done: list[tuple[int, bool]] = []
    reader = FrameReader(lambda f: target, lambda f, body: done.append((f.call_id, body is None)))
    data = encode(Kind.RESPONSE, 1, b"", 10) + b"12345"
    reader.get_buffer()[: len(data)] = data
    reader.buffer_updated(len(data))
    assert reader.reading_body_of == 1
    reader.abandon_body()
    rest = b"67890" + encode(Kind.RESPONSE, 2, b"", 10) + b"abcdefghij"
    reader.get_buffer()[: len(rest)] = rest
    reader.buffer_updated(len(rest))
    assert done == [(1, True), (2, False)]
    assert bytes(target) == b"abcdefghij"
