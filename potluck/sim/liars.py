"""Peers that lie: the run's codec and exchange, which may say something else than the truth."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from potluck.swarm.aggregate import Contribution
from potluck.swarm.codecs import Codec
from potluck.swarm.exchange import NetworkExchange
from potluck.swarm.layout import Flat, Layout

if TYPE_CHECKING:
    from potluck.sim.peer import SimPeer


class Liar:
    """A codec that may send something else than what was trained. Without a lie it is the run's codec."""

    def __init__(self, peer: SimPeer, codec: Codec) -> None:
        self._peer, self._codec = peer, codec
        self.name, self.has_residual = codec.name, codec.has_residual

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        match self._peer.lie:
            case "scale":
                delta = delta * np.float32(100.0)
            case "sign":
                delta = -delta
        return self._codec.encode(delta, layout, residual)

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        return self._codec.decode(blob, layout)

    def max_bytes(self, layout: Layout) -> int:
        return self._codec.max_bytes(layout)


class LyingExchange:
    """Publishes and serves what a liar says. Everything else goes to the real one."""

    def __init__(self, peer: SimPeer, exchange: NetworkExchange) -> None:
        self._peer, self._exchange = peer, exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)

    async def offer(self, blob: bytes, reveal_at: float) -> Any:
        if self._peer.lie == "garbage":
            blob = hashlib.shake_128(blob).digest(len(blob))
        return await self._exchange.offer(blob, reveal_at)

    async def publish(self, commit: Any, expires_at: float, timeout_seconds: float) -> bool:
        if self._peer.lie == "digest":
            commit = msgspec.structs.replace(commit, digest="ab" * 32, history=2**40)
        elif self._peer.lie == "tokens":
            commit = msgspec.structs.replace(commit, tokens=2**40)
        return await self._exchange.publish(commit, expires_at, timeout_seconds)
