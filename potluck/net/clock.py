"""The run's clock: UTC as this peer's system has it, checked against its peers' median.

More than a second off is said and corrected for; more than 30 seconds refuses (another machine's clock cannot be
that wrong by accident of the network). One lying peer among three cannot move the median.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence

from potluck.errors import ClockError, RpcError
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc

SAID_SECONDS = 1.0
REFUSED_SECONDS = 30.0
METHOD = "clock.read"
_SAMPLES = 3
_PEERS = 8


class RunClock:
    """`system`: UTC seconds as this machine has it."""

    def __init__(self, system: Callable[[], float] = time.time) -> None:
        self.offset = 0.0
        self._system = system

    def now(self) -> float:
        """UTC seconds by the run's clock."""
        return self._system() + self.offset

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
