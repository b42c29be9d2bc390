"""The DHT replaced by a model of its cost and latency, for swarms too large to run hivemind's code in one process.

A shared dictionary answers at once and completely; what it costs is drawn from a fit to the real DHT, which
`benchmarks/simulation.py --calibrate` measures and prints (docs/simulation.md shows it beside the data). Each kind of
operation has, for N peers and m records in what it reads or writes:

    calls   = a0 + a1 log2 N                       unary calls to other nodes
    bytes   = calls (b0 + b1 m)                    both ways
            + what dialling those costs who are not connected
    seconds = median one-way latency x (c0 + c1 log2 N), times a log-normal factor of sigma s
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potluck.dht.directory import DirectoryView
from potluck.dht.records import (
    Commit,
    Record,
    Replica,
    Signed,
    Weights,
    commits_path,
    replicas_path,
    weights_path,
)
from potluck.dht.storage import MAX_SUBKEYS
from potluck.net.hosts.memory import HANDSHAKE_BYTES, MAX_CONNECTIONS

if TYPE_CHECKING:
    from potluck.sim.peer import SimPeer


#: Both ways, for two round trips.
DIAL_BYTES = 4 * HANDSHAKE_BYTES


@dataclass(frozen=True)
class Cost:
    """Coefficients of one kind of operation, as in the module's formula."""

    calls: tuple[float, float]
    bytes_per_call: tuple[float, float]
    latencies: tuple[float, float]
    sigma: float

    def draw(self, peers: int, records: int, dice: random.Random) -> tuple[int, int, float]:
        """(calls, bytes, seconds in units of the median one-way latency)."""
        log = math.log2(max(2, peers))
        calls = max(0.0, min(peers - 1.0, self.calls[0] + self.calls[1] * log))
        size = calls * (self.bytes_per_call[0] + self.bytes_per_call[1] * records)
        seconds = max(2.0, self.latencies[0] + self.latencies[1] * log) * math.exp(dice.gauss(0, self.sigma))
        return round(calls), round(size), seconds


#: Fitted by `benchmarks/simulation.py --calibrate`.
READ = Cost((10.0, 0.0), (1596.887, 280.655), (5.506, -0.018), 0.143)
PUBLISH = Cost((15.0, 0.0), (1107.843, 0.0), (7.217, 0.272), 0.209)

Shelf = dict[str, dict[str, Signed[Any]]]


class ModelDirectory:
    """Stands in for `dht.directory.Directory`. `shelf`: what all peers published, shared; the expired goes."""

    def __init__(self, peer: SimPeer, shelf: Shelf, median_latency: float) -> None:
        self._peer, self._shelf, self._latency = peer, shelf, median_latency
        self._dice = random.Random(f"dht {peer.world.plan.seed} {peer.number} {peer.sessions}")

    async def publish(self, record: Record, expires_at: float, timeout_seconds: float) -> bool:
        if not await self._spend(PUBLISH, 1, timeout_seconds):
            return False
        self._shelf.setdefault(record.path(), {})[self._peer.id] = Signed(record, self._peer.id, expires_at)
        return True

    async def commits(self, module: str, round: int, shard: int, *, timeout_seconds: float) -> DirectoryView[Commit]:
        return await self._read(commits_path(module, round, shard), timeout_seconds)

    async def weights(self, module: str, round: int, *, timeout_seconds: float) -> DirectoryView[Weights]:
        return await self._read(weights_path(module, round), timeout_seconds)

    async def replicas(self, module: str, shard: int = 0, *, timeout_seconds: float) -> DirectoryView[Replica]:
        return await self._read(replicas_path(module, shard), timeout_seconds)

    def network_size(self) -> float:
        return float(self._peer.world.living)

    async def _read(self, path: str, timeout_seconds: float) -> DirectoryView[Any]:
        complete = await self._spend(READ, min(MAX_SUBKEYS, len(self._shelf.get(path, ()))), timeout_seconds)
        now = self._peer.world.utc()
        held = self._shelf.get(path, {})
        for peer in [peer for peer, signed in held.items() if signed.expires_at < now]:
            del held[peer]
        return DirectoryView(tuple(signed for _, signed in sorted(held.items())[:MAX_SUBKEYS]), complete)

    async def _spend(self, cost: Cost, records: int, timeout_seconds: float) -> bool:
        """Whether the operation was done in time. Its bytes are charged to who asked; each peer serves as many."""
        peer = self._peer
        peer.dht_operations += 1
        calls, size, latencies = cost.draw(peer.world.living, records, self._dice)
        dialled = 0.0
        if peer.host:
            peer.host.calls += calls
            peer.host.call_bytes += size
            # Whom it asks is anybody: those who are not connected are dialled first.
            dialled = calls * max(0.0, 1 - min(peer.host.connections, MAX_CONNECTIONS) / peer.world.living)
        peer.world.network.charge(peer.id, size + round(dialled * DIAL_BYTES))
        seconds = latencies * self._latency
        await asyncio.sleep(min(seconds, timeout_seconds))
        return seconds <= timeout_seconds
