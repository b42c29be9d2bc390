"""What a peer tells others about their line: the address at which it sees them, and how fast their bytes come.

`line.seen` answers with the asker's address, as the connection has it. `line.take` takes bytes and forgets them, a few
megabytes from each peer and not many in all: enough to measure an upload with, too few to be worth anybody's while.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from potluck.errors import NetworkError, RpcError, RpcRefused
from potluck.net.host import Host, PeerId
from potluck.net.rpc import Reply, Rpc

SEEN_METHOD: Final = "line.seen"
TAKE_METHOD: Final = "line.take"
#: What any method may be sent.
BODY_BYTES: Final = 64 * 1024
#: A smaller body counts as one of so many: they bound how many peers are remembered, too.
LEAST_BYTES: Final = 1024
#: Of one peer, and of all, within `BUDGET_SECONDS`.
PEER_BYTES: Final = 4 << 20
ALL_BYTES: Final = 64 << 20
BUDGET_SECONDS: Final = 600.0
#: Questions for addresses that are answered within a second: each costs one to our own daemon.
SEEN_PER_SECOND: Final = 16
_ADDRESS = re.compile(r"/ip[46]/([0-9a-fA-F:.]{2,45})/tcp/(\d{1,5})(?:/p2p/\w{1,128})?")


class Endpoint(NamedTuple):
    ip: str
    port: int


def endpoint(address: str) -> Endpoint | None:
    """Of a multiaddress that is plain TCP; None for all others, relayed ones too."""
    match = _ADDRESS.fullmatch(address)
    return Endpoint(match[1], int(match[2])) if match and int(match[2]) < 65536 else None


class LineService:
    def __init__(self, rpc: Rpc, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._clock = rpc.host, clock
        self._taken: dict[PeerId, int] = {}
        self._in_all, self._began = 0, clock()
        self._seen, self._second = 0, 0.0
        rpc.register(SEEN_METHOD, self._see, max_request_bytes=0)
        rpc.register(TAKE_METHOD, self._take, max_request_bytes=BODY_BYTES)

    async def _see(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        if self._clock() - self._second >= 1.0:
            self._seen, self._second = 0, self._clock()
        self._seen += 1
        if self._seen > SEEN_PER_SECOND:
            raise RpcRefused("others ask, too", 1.0)
        found = await address_of(self._host, peer)
        return Reply({"address": f"/ip{6 if ':' in found.ip else 4}/{found.ip}/tcp/{found.port}" if found else ""})

    async def _take(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        if self._clock() - self._began >= BUDGET_SECONDS:
            self._taken.clear()
            self._in_all, self._began = 0, self._clock()
        size = max(len(body), LEAST_BYTES)
        taken = self._taken.get(peer, 0) + size
        if taken > PEER_BYTES or self._in_all + size > ALL_BYTES:
            raise RpcRefused("enough for now", BUDGET_SECONDS - (self._clock() - self._began))
        self._taken[peer] = taken
        self._in_all += size
        return Reply()


async def address_of(host: Host, peer: PeerId) -> Endpoint | None:
    """Where a connected peer's end of a direct TCP connection is. Raises NetworkError if our daemon does not answer."""
    for one in await host.list_peers():
        if one.peer_id.to_base58() == peer:
            found = [endpoint(str(address)) for address in one.addrs]
            return next((each for each in found if each is not None), None)
    return None


async def seen_by(rpc: Rpc, peer: PeerId, timeout_seconds: float) -> Endpoint | None:
    """Our address as a connected peer sees it; None if it does not tell. What it says may be a lie."""
    try:
        reply = await rpc.call(peer, SEEN_METHOD, timeout_seconds=timeout_seconds, max_response_bytes=64)
    except NetworkError:
        return None
    address = reply.head.get("address")
    return endpoint(address) if isinstance(address, str) else None


async def upload_speed(
    rpc: Rpc, peer: PeerId, *, most_bytes: int = PEER_BYTES // 2, seconds: float = 5.0, window: int = 16
) -> tuple[int, float]:
    """Bytes that the peer has taken, and the seconds until it had. (0, 0.0) if it takes none."""
    loop = asyncio.get_running_loop()
    left, body = most_bytes // BODY_BYTES, bytes(BODY_BYTES)
    came, last = 0, 0.0
    began = loop.time()

    async def send() -> None:
        nonlocal left, came, last
        while left > 0 and (rest := began + seconds - loop.time()) > 0:
            left -= 1
            await rpc.call(peer, TAKE_METHOD, {}, body, timeout_seconds=rest, lane="bulk")
            came, last = came + BODY_BYTES, loop.time() - began

    await asyncio.gather(*(_quietly(send()) for _ in range(window)))
    return came, last


async def _quietly(sending: Any) -> None:
    try:
        await sending
    except RpcError:
        pass  # refused, or too slow: what came before counts
