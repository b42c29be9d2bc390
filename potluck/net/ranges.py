"""A body that is asked for range by range: no more at once than a cap, or a slow line, lets through soon."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from potluck.errors import BlobError, ProtocolError
from potluck.net.host import PeerId
from potluck.net.rpc import Rpc


async def call_by_ranges(
    rpc: Rpc,
    peer: PeerId,
    method: str,
    head: Mapping[str, Any],
    into: memoryview,
    deadline: float,
    *,
    measured: bool,
) -> dict[str, Any]:
    """Fill `into`, which is not empty, with exactly as many bytes, until `deadline` (of the loop's clock). Each request
    has the `start` and `size` of its range, in bytes: what a cap lets through soon, and where `measured` what the line
    does, of several bodies asked for at once. Gives the last answer's head. Raises as `Rpc.call` does, and
    BlobError for another number of bytes."""
    loop, answered, start = asyncio.get_running_loop(), dict[str, Any](), 0
    while start < len(into):
        part = into[start : start + (rpc.ask_bytes(peer) if measured else rpc.download.ask_bytes)]
        reply = await rpc.call(
            peer,
            method,
            {**head, "start": start, "size": len(part)},
            timeout_seconds=max(0.0, deadline - loop.time()),
            lane="bulk",
            into=part,
        )
        if len(reply.body) != len(part):
            raise BlobError(f"sent {len(reply.body)} bytes for {len(part)}")
        answered = reply.head
        start += len(part)
    return answered


def asked_range(data: memoryview, head: Mapping[str, Any]) -> memoryview:
    """The range of `data` that a request asks for: all of it, without `start` and `size`. Raises ProtocolError."""
    start, size = head.get("start", 0), head.get("size")
    size = len(data) - start if isinstance(start, int) and size is None else size
    if not isinstance(start, int) or not isinstance(size, int) or not 0 <= start <= start + size <= len(data):
        raise ProtocolError(f"a range that a body of {len(data)} bytes does not have")
    return data[start : start + size]
