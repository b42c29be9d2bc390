"""The frame of Potluck's RPC, and a reader that never believes a length.

    u8 kind | u8 flags (0) | u16 head bytes | u32 call id | u64 body bytes | head (msgpack) | body (raw)

All integers are big-endian. The reader is a pure state machine with the two methods of
`asyncio.BufferedProtocol`: it says where the next bytes should go, and is told how many came. Small frames
are parsed out of a staging buffer; the body goes straight into the buffer that its owner chose, after the
owner has seen the head and the announced length, so nothing is allocated for a frame that will be refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from potluck.errors import ProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER = struct.Struct(">BBHIQ")
MAX_HEAD_BYTES = 0xFFFF
#: Of a body that follows in the same read, at most this much is copied; the rest is received in place.
STAGING_BYTES = 16 * 1024


class Kind(IntEnum):
    REQUEST = 1
    RESPONSE = 2
    ERROR = 3
    CANCEL = 4


class Frame(NamedTuple):
    kind: Kind
    call_id: int
    head: bytes
    body_length: int

    @property
    def length(self) -> int:
        """Bytes on the wire."""
        return HEADER.size + len(self.head) + self.body_length


def encode(kind: Kind, call_id: int, head: bytes = b"", body_length: int = 0) -> bytes:
    """Everything of a frame that precedes its body. Raises ValueError if the head does not fit."""
    if len(head) > MAX_HEAD_BYTES:
        raise ValueError(f"a head of {len(head)} bytes; at most {MAX_HEAD_BYTES} fit: put it into the body")
    return HEADER.pack(kind, 0, len(head), call_id, body_length) + head


#: Called with the frame before its body is read. Returns where the body goes (exactly `body_length` bytes),
#: or None to let it pass unread. Raises ProtocolError to refuse the frame, and with it the stream.
OnHead = Callable[[Frame], memoryview | None]
#: Called when the frame is complete: with its body, or None if it passed unread.
OnFrame = Callable[[Frame, memoryview | None], None]


class FrameReader:
    """Turns bytes into frames. After a ProtocolError it must not be fed again."""

    def __init__(self, on_head: OnHead, on_frame: OnFrame, max_head_bytes: int = MAX_HEAD_BYTES) -> None:
        self._on_head = on_head
        self._on_frame = on_frame
        self._max_head_bytes = max_head_bytes
        self._staging: memoryview | None = None
        self._filled = 0
        # What is being read into: None between frames, else the head or the body of one.
        self._target: memoryview | None = None
        self._position = 0
        self._skip = 0
        self._header = (0, 0, 0)
        self._frame: Frame | None = None

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._filled > 0 or self._target is not None or self._skip > 0

    @property
    def reading_body_of(self) -> int | None:
        """The call id of the frame whose body is being received now."""
        return self._frame.call_id if self._frame is not None else None

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        if self._target is not None:
            return self._target[self._position :]
        if self._staging is None:
            self._staging = memoryview(bytearray(STAGING_BYTES))
        return self._staging[self._filled :]

    def buffer_updated(self, count: int) -> None:
        if self._target is not None:
            self._position += count
            if self._position == len(self._target):
                self._target_full()
                self._parse()
        else:
            self._filled += count
            self._parse()

    def abandon_body(self) -> None:
        """Let the rest of the current body pass unread: its buffer goes back to its owner now."""
        if self._frame is not None and self._target is not None:
            self._skip = len(self._target) - self._position
            self._target = None

    def rest(self) -> None:
        """Nothing is expected for a while: the staging buffer goes back until the next bytes come."""
        if not self.in_frame:
            self._staging = None

    def _parse(self) -> None:
        if self._staging is None:
            return
        start, end = 0, self._filled
        while True:
            if self._skip:
                count = min(self._skip, end - start)
                start += count
                self._skip -= count
                if self._skip:
                    break
                self._finish(None)
            elif self._target is None:
                if end - start < HEADER.size:
                    break
                self._begin(*HEADER.unpack_from(self._staging, start))
                start += HEADER.size
            else:
                count = min(end - start, len(self._target) - self._position)
                stop = self._position + count
                self._target[self._position : stop] = self._staging[start : start + count]
                self._position = stop
                start += count
                if stop < len(self._target):
                    break
                self._target_full()
        if start:
            if start < end:
                self._staging[: end - start] = bytes(self._staging[start:end])
            self._filled = end - start

    def _begin(self, kind: int, flags: int, head_length: int, call_id: int, body_length: int) -> None:
        if flags or not Kind.REQUEST <= kind <= Kind.CANCEL:
            raise ProtocolError(f"not a frame: kind {kind}, flags {flags}")
        if head_length > self._max_head_bytes:
            raise ProtocolError(f"a frame's head has {head_length} bytes; the limit is {self._max_head_bytes}")
        self._header = (kind, call_id, body_length)
        self._target, self._position = memoryview(bytearray(head_length)), 0

    def _target_full(self) -> None:
        assert self._target is not None
        if self._frame is not None:
            self._finish(self._target)
            return
        kind, call_id, body_length = self._header
        frame = Frame(Kind(kind), call_id, bytes(self._target), body_length)
        body = self._on_head(frame)
        self._frame, self._target, self._position = frame, body, 0
        if body is None:
            self._skip = body_length
            if not body_length:
                self._finish(None)
        elif len(body) != body_length:
            raise ValueError(f"{len(body)} bytes of room for a body of {body_length}")

    def _finish(self, body: memoryview | None) -> None:
        frame, self._frame, self._target = self._frame, None, None
        assert frame is not None
        self._on_frame(frame, body)
