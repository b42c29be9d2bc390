"""What a peer may send, or receive, per second (a token bucket that all of its streams share), and what it asks for.

A cap is of the line: every byte is charged with what libp2p, TCP and IP put around it. The bucket is shallow and no
piece is large, so that any ten seconds stay within five percent of the cap. Small frames (questions, errors, short
answers) are charged like all others, but pass at once until they have overdrawn it, too.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import Final

#: Ethernet carries 1500 bytes, 52 of them TCP's and IP's; libp2p adds 22 to 16 KiB (TLS) and 12 to each of its frames.
OVERHEAD: Final = 1.04
#: What may be saved up while nobody sends: a loop that is late makes up for it.
BURST_SECONDS: Final = 0.2
#: How far small frames may overdraw.
DEBT_SECONDS: Final = 0.1
#: A body goes out in pieces of so many seconds' worth.
PIECE_SECONDS: Final = 0.05
#: What is asked for at once: each question costs some bytes, too.
ASK_SECONDS: Final = 0.1
MAX_PIECE_BYTES: Final = 1 << 20
MIN_PIECE_BYTES: Final = 1024
MIN_ASK_BYTES: Final = 4096
#: What may be under way to us from one peer, in seconds of what it gives: this, at the usual rate (bytes per second),
#: and so many round trips (fewer keep TCP from growing). More only waits in routers (RFC 6817, LEDBAT), where some
#: streams are pushed aside, and all wait for those then. Of who is slower it is longer, by the root: streams that are
#: asked for in proportion to what they give stay as uneven as they are.
AHEAD_SECONDS: Final = 0.04
USUAL_RATE: Final = 4.2e6
AHEAD_ROUND_TRIPS: Final = 4.0
#: Chunks that are asked for at once of who is fast, and of who is slow.
WINDOW: Final = 4
SLOW_WINDOW: Final = 2
#: Each request costs CPU time: at least, and from when on as much as may be.
LEAST_ASK_BYTES: Final = 48 << 10
LARGE_ASK_BYTES: Final = 256 << 10
#: A peer that answers later is not nearer than that.
MAX_LATENCY_SECONDS: Final = 1.0
#: What a body counts for when the next one has come.
FADING: Final = 0.7
#: What is not urgent goes behind what is, for at most so long: a frame that stands still breaks its stream.
RELAXED_SECONDS: Final = 5.0

#: Called once when its turn has come. Two that are equal wait as one.
Waiter = Callable[[], None]


class Pace:
    """`rate`: bytes per second of the line, None for no cap; it may change at any time."""

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._level = 0.0 if rate is None else BURST_SECONDS * rate
        self._at = -math.inf
        self._queue: list[tuple[float, int, Waiter]] = []
        #: The keys that count: an entry of the queue with another one is a leftover.
        self._keys: dict[Waiter, float] = {}
        self._number = count()
        self._turn: Waiter | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def rate(self) -> float | None:
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._settle()
        self._rate = rate
        self._level = min(self._level, 0.0) if rate is None else min(self._level, BURST_SECONDS * rate)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._arm()

    @property
    def piece_bytes(self) -> int:
        """Of a body, what goes out at once."""
        return _clamp(self._rate, PIECE_SECONDS, MIN_PIECE_BYTES)

    @property
    def ask_bytes(self) -> int:
        """What a receiver asks for at once."""
        return _clamp(self._rate, ASK_SECONDS, MIN_ASK_BYTES)

    def seconds(self, size: int) -> float:
        """What so many bytes take at least."""
        return 0.0 if self._rate is None else size * OVERHEAD / self._rate

    def charge(self, size: int) -> None:
        """Also into debt. Negative: what was paid for, and did not pass."""
        if self._rate is not None:
            self._settle()
            self._level -= size * OVERHEAD

    def behind(self, small: bool = False) -> bool:
        """Whether more has passed than may."""
        if self._rate is None:
            return False
        self._settle()
        return self._level < -(DEBT_SECONDS * self._rate if small else 1.0)  # a byte: times are rounded

    def ask(self, waiter: Waiter, patience: float = 0.0, small: bool = False) -> bool:
        """Whether a piece may pass now, which is charged for next. If not, `waiter` is called when its turn comes,
        after those that have waited longer, `patience` seconds counted off."""
        if self._rate is None:
            return True
        if self._turn == waiter:
            self._turn = None
            return True
        if small and not self.behind(small=True):
            return True
        key = asyncio.get_running_loop().time() + patience
        key = min(key, self._keys.get(waiter, key))
        self._drop_leftovers()
        first = self._queue[0] if self._queue else None
        if not self.behind() and (first is None or key < first[0] or first[2] == waiter):
            self.forget(waiter)
            return True
        if self._keys.get(waiter) != key:
            self._keys[waiter] = key
            heapq.heappush(self._queue, (key, next(self._number), waiter))
        self._arm()
        return False

    def forget(self, waiter: Waiter) -> None:
        """It waits no more."""
        self._keys.pop(waiter, None)

    async def take(self, size: int) -> None:
        """Pay for bytes that are asked for, as soon as there is room."""
        if self._rate is None:
            return
        paid = asyncio.get_running_loop().create_future()

        def go() -> None:
            if not paid.done() and self.ask(go):
                self.charge(size)
                paid.set_result(None)

        go()
        try:
            await paid
        except asyncio.CancelledError:
            self.forget(go)
            if not paid.cancelled():
                self.charge(-size)
            raise

    def _settle(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._rate is not None and self._at < now:
            saved = BURST_SECONDS * self._rate
            self._level = min(saved, self._level + min(now - self._at, 1e6) * self._rate)
        self._at = now

    def _drop_leftovers(self) -> None:
        while self._queue and self._keys.get(self._queue[0][2]) != self._queue[0][0]:
            heapq.heappop(self._queue)

    def _arm(self) -> None:
        if self._timer is None and self._keys:
            wait = max(0.0, -self._level) / self._rate if self._rate else 0.0
            self._timer = asyncio.get_running_loop().call_later(wait, self._pass)

    def _pass(self) -> None:
        """Those whose turn has come, one piece each."""
        self._timer = None
        self._drop_leftovers()
        while self._queue and not self.behind():
            _, _, waiter = heapq.heappop(self._queue)
            del self._keys[waiter]
            self._turn = waiter
            waiter()
            self._turn = None
            self._drop_leftovers()
        self._arm()


class Flow:
    """How fast a peer's bodies come, while they come, and how soon its answers begin, at best."""

    def __init__(self) -> None:
        self._latency = MAX_LATENCY_SECONDS
        self._bytes = self._seconds = 0.0

    def answered(self, seconds: float) -> None:
        """From a question to the first byte of its answer, in seconds."""
        self._latency = min(self._latency, seconds)

    def came(self, size: int, seconds: float) -> None:
        """A body, from its first byte to its last. What fits into one read tells nothing, and is left out."""
        if size >= LEAST_ASK_BYTES:
            self._bytes, self._seconds = FADING * self._bytes + size, FADING * self._seconds + seconds

    @property
    def ask_bytes(self) -> int:
        """What to ask for at once, if more is asked for before it came."""
        if not self._bytes:
            return MAX_PIECE_BYTES
        rate = self._bytes / max(self._seconds, 1e-9)
        ahead = AHEAD_SECONDS * math.sqrt(USUAL_RATE / rate) + AHEAD_ROUND_TRIPS * self._latency
        size = _clamp(rate, ahead / SLOW_WINDOW, LEAST_ASK_BYTES)
        return size if size < LARGE_ASK_BYTES else MAX_PIECE_BYTES


def _clamp(rate: float | None, seconds: float, least: int) -> int:
    return MAX_PIECE_BYTES if rate is None else max(least, min(int(seconds * rate), MAX_PIECE_BYTES))
