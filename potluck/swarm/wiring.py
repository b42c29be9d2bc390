"""Stochastic wiring: which server of one stage gets the next microbatch. Pure: the time is an argument.

Interleaved weighted round-robin (SWARM, Ryabinin et al. 2023): each server has a virtual time; the smallest is chosen
and moves on by the seconds the microbatch is expected to take there, so that servers are chosen in proportion to the
samples per second that this trainer sees of them. Unlike the published code, a server that exceeds a deadline grows
less attractive, and a failed one comes back by itself after a backoff.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Final

from potluck.net.host import PeerId

#: Weight of the newest observation (SWARM's public code).
NEWEST: Final = 0.1
#: The first ban, doubled by each failure without a success in between, and the longest.
FIRST_BAN_SECONDS: Final = 2.0
LONGEST_BAN_SECONDS: Final = 60.0


@dataclass
class Average:
    """An exponential moving average, corrected for its start at zero (as in Adam)."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.total += NEWEST * (value - self.total)
        self.weight += NEWEST * (1.0 - self.weight)  # 1 - 0.9^n

    def value(self, unmeasured: float) -> float:
        return self.total / self.weight if self.weight else unmeasured


@dataclass
class _Server:
    expiry: float
    seconds_per_sample: Average = field(default_factory=Average)
    failures: int = 0
    banned_until: float | None = None


class Wiring:
    """The servers of one stage as one trainer knows them. Sizes are samples (or any one unit of work).

    Deterministic: equal calls give equal choices. What is known of a server goes when its announcement expires, so
    that memory is bounded by the announcements that are alive; answers of servers that left are ignored.
    """

    def __init__(self, initial_samples_per_second: float = 1.0) -> None:
        self._initial = 1.0 / initial_samples_per_second
        self._servers: dict[PeerId, _Server] = {}
        self._heap: list[tuple[float, int, PeerId]] = []  # everyone who is not banned, once
        self._counter = itertools.count()
        self._virtual = 0.0  # the smallest virtual time at the last choice
        self._stage = Average()  # seconds per sample of all servers together

    def __len__(self) -> int:
        """Servers known, the banned included."""
        return len(self._servers)

    def update(self, servers: Mapping[PeerId, float], now: float) -> None:
        """What the directory says: peer -> expiry of its announcement. Who is not in it stays until its own expiry."""
        for peer, expiry in servers.items():
            known = self._servers.get(peer)
            if known is None:
                self._servers[peer] = _Server(expiry)
                self._enter(peer)
            elif expiry > known.expiry:  # announced anew since
                known.expiry = expiry
                if known.banned_until is not None:
                    self._readmit(peer, known)
        self._servers = {peer: server for peer, server in self._servers.items() if server.expiry > now}
        self._keep(self._servers)

    def choose(self, size: float, now: float, exclude: Container[PeerId] = ()) -> PeerId | None:
        """The server for a microbatch of `size`; None when there is none now (see `retry_at`)."""
        for peer, server in self._servers.items():
            if server.banned_until is not None and server.banned_until <= now:
                self._readmit(peer, server)
        passed: list[tuple[float, int, PeerId]] = []
        chosen = None
        while self._heap and chosen is None:
            entry = heappop(self._heap)
            virtual, _, peer = entry
            if (server := self._servers[peer]).expiry <= now:
                del self._servers[peer]
                continue
            if not passed:
                self._virtual = virtual
            if peer in exclude:
                passed.append(entry)
                continue
            chosen = peer
            heappush(self._heap, (virtual + size * self._pace(server), next(self._counter), peer))
        for entry in passed:
            heappush(self._heap, entry)
        return chosen

    def succeeded(self, peer: PeerId, size: float, seconds: float) -> None:
        if server := self._servers.get(peer):
            server.failures = 0
            self._learn(server, seconds / size)

    def late(self, peer: PeerId, size: float, seconds_so_far: float) -> None:
        """A deadline exceeded is no failure, but the server is at least that slow. If it answers yet: `succeeded`."""
        if server := self._servers.get(peer):
            self._learn(server, max(seconds_so_far / size, server.seconds_per_sample.value(0.0)))

    def failed(self, peer: PeerId, now: float) -> None:
        """Ban it, for twice as long as the last time, or until it announces itself anew."""
        server = self._servers.get(peer)
        if server is None or server.banned_until is not None:
            return  # microbatches that fail together are one failure
        server.banned_until = now + min(FIRST_BAN_SECONDS * 2.0**server.failures, LONGEST_BAN_SECONDS)
        server.failures = min(server.failures + 1, 16)
        self._keep({other for _, _, other in self._heap if other != peer})

    def retry_at(self, now: float) -> float | None:
        """When the next banned server is back; None when only a new announcement can bring one."""
        ends = ((server.banned_until, server.expiry) for server in self._servers.values())
        return min((max(now, end) for end, expiry in ends if end is not None and end < expiry), default=None)

    def expected_seconds(self, peer: PeerId, size: float) -> float:
        """What a microbatch of `size` is expected to take there: the measure for a deadline."""
        return size * self._pace(self._servers.get(peer))

    def _pace(self, server: _Server | None) -> float:
        """Seconds per sample; an unmeasured server counts as the stage's average so far."""
        average = self._stage.value(self._initial)
        return server.seconds_per_sample.value(average) if server else average

    def _learn(self, server: _Server, seconds_per_sample: float) -> None:
        server.seconds_per_sample.add(seconds_per_sample)
        self._stage.add(seconds_per_sample)

    def _enter(self, peer: PeerId) -> None:
        # At the last minimum: tried at once, without a credit for the time that it was not there.
        heappush(self._heap, (self._virtual, next(self._counter), peer))

    def _readmit(self, peer: PeerId, server: _Server) -> None:
        server.banned_until = None
        self._enter(peer)

    def _keep(self, peers: Container[PeerId]) -> None:
        self._heap = [entry for entry in self._heap if entry[2] in peers]
        heapify(self._heap)
