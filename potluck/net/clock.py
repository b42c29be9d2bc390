"""The run's clock: UTC as this peer's system has it, checked against its peers' median.

More than a second off is said and corrected for; more than 30 seconds refuses (another machine's clock cannot be
that wrong by accident of the network). One lying peer among three cannot move the median.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

from potluck.errors import ClockError, NetworkError, RpcError
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc

SAID_SECONDS = 1.0
REFUSED_SECONDS = 30.0
METHOD = "clock.read"
_SAMPLES = 3
_PEERS = 8
#: A clock that runs freely (50 parts in a million) is off by a tenth of a second after so long. Whoever sets it moves
#: it against the monotonic one.
CHECK_SECONDS = 1800.0
LOOK_SECONDS = 10.0
_JUMP_SECONDS = 0.2


class RunClock:
    """`system`: UTC seconds as this machine has it. `monotonic`: seconds that nobody sets."""

    def __init__(
        self, system: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.offset = 0.0
        self._system, self._monotonic = system, monotonic
        self._checked_at, self._apart = -math.inf, system() - monotonic()

    def now(self) -> float:
        """UTC seconds by the run's clock."""
        return self._system() + self.offset

    def is_due(self) -> bool:
        """Whether to measure again: every half hour, and when the system's clock was set. Look now and then."""
        now = self._monotonic()
        apart = self._system() - now
        due = abs(apart - self._apart) > _JUMP_SECONDS or now - self._checked_at >= CHECK_SECONDS
        if due:
            self._apart, self._checked_at = apart, now
        return due

    def serve(self, rpc: Rpc) -> None:
        async def read(peer: PeerId, head: dict[str, object], body: memoryview) -> Reply:
            return Reply({"utc": self.now()}, b"")

        rpc.register(METHOD, read, max_request_bytes=64)

    async def measure(
        self, rpc: Rpc, peers: Sequence[PeerId], timeout_seconds: float = 2.0, samples: int = _SAMPLES
    ) -> float | None:
        """Median over peers of (their clock - ours) in seconds; None if nobody answered. `samples`: per peer."""
        asked = peers[:_PEERS]
        measured = await asyncio.gather(*(self._offset_to(rpc, peer, timeout_seconds, samples) for peer in asked))
        offsets = [offset for offset in measured if offset is not None]
        self._checked_at = self._monotonic() if offsets else -math.inf
        return statistics.median(offsets) if offsets else None

    def correct(self, measured: float) -> bool:
        """Take over an offset of more than a second; True if it did. Raises ClockError beyond 30 seconds."""
        if abs(self.offset + measured) > REFUSED_SECONDS:
            raise ClockError(
                f"this machine's clock is {abs(self.offset + measured):.0f} s "
                f"{'behind' if self.offset + measured > 0 else 'ahead of'} its peers': set it (for example with NTP), "
                "then join again"
            )
        if abs(measured) <= SAID_SECONDS:
            return False
        self.offset += measured
        return True

    async def keep_checked(
        self,
        rpc: Rpc,
        connected: Callable[[], Awaitable[Sequence[PeerId]]],
        emit: Callable[..., None],
        samples: int = _SAMPLES,
    ) -> None:
        """Forever. Strangers may lie and the daemon may be restarting: only at joining does a wrong clock refuse."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self.is_due():
                continue
            try:
                measured = await self.measure(rpc, await connected(), samples=samples)
                if measured is not None and self.correct(measured):
                    emit("peer.clock.corrected", seconds=measured, limit=SAID_SECONDS)
            except (NetworkError, ClockError) as error:
                emit("peer.clock.unchecked", error=str(error))

    async def _offset_to(self, rpc: Rpc, peer: PeerId, timeout_seconds: float, samples: int) -> float | None:
        """By the fastest of a few exchanges, assuming equal ways there and back (as NTP)."""
        best: tuple[float, float] | None = None
        for _ in range(samples):
            sent = self.now()
            try:
                reply = await rpc.call(peer, METHOD, timeout_seconds=timeout_seconds, max_response_bytes=64)
            except RpcError:
                return None
            received = self.now()
            theirs = reply.head.get("utc")
            if not isinstance(theirs, float) or not abs(theirs) < 2**40:
                return None
            sample = (received - sent, theirs - (sent + received) / 2)
            best = min(best, sample) if best else sample
        return best[1] if best else None
