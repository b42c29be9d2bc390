"""Peers that lie: the run's trainer, codec and exchange, which may do something else than they say.

Each attack of `Lie` is done by a peer in the real round loop, from what such a peer would know.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from potluck.dht.records import Commit, Weights
from potluck.dht.shards import shard_of
from potluck.net.blobs import BlobId, BlobNotFound, BlobRef, BlobService, BlobStore, ChunkList
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc
from potluck.net.wire import Buffer
from potluck.sim.stand_in import MODULE
from potluck.swarm.codecs import Codec, make_codec
from potluck.swarm.codecs.segments import DenseCodec
from potluck.swarm.contribution import Contribution, Sparse
from potluck.swarm.exchange import NetworkExchange
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult
from potluck.swarm.phases import Round
from potluck.swarm.rounds import Trainer
from potluck.swarm.slices import Aggregated

if TYPE_CHECKING:
    from potluck.sim.peer import SimPeer

#: How old the parameters of a stale trainer are, in rounds.
STALE_ROUNDS = 3
#: Part of the steps that a lazy trainer really does.
LAZY = 0.125


class LyingTrainer:
    """Trains something else than it says. Without a lie it is the run's trainer."""

    def __init__(self, peer: SimPeer, trainer: Trainer) -> None:
        self._peer, self._trainer = peer, trainer
        self._begun: deque[Flat] = deque(maxlen=STALE_ROUNDS + 1)

    @property
    def layout(self) -> Layout:
        return self._trainer.layout

    def load(self, theta: Flat) -> None:
        self._begun.append(theta)
        self._trainer.load(theta)

    def train(
        self,
        batches: Iterator[torch.Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = lambda seconds: True,
    ) -> LocalResult:
        if self._peer.lie == "stale":
            self._trainer.load(self._begun[0])
        if self._peer.lie != "lazy":
            return self._trainer.train(batches, max_steps, first_step, may_start)
        done = self._trainer.train(batches, max(1, round(LAZY * max_steps)), first_step, may_start)
        return replace(done, steps=max_steps, tokens=done.tokens * max_steps // max(1, done.steps))

    def delta(self, theta: Flat) -> Flat:
        return self._trainer.delta(self._begun[0] if self._peer.lie == "stale" else theta)

    def evaluate(self, tokens: torch.Tensor) -> float:
        return self._trainer.evaluate(tokens)

    def forget(self) -> None:
        self._trainer.forget()


def lying_batches(peer: SimPeer, round_: Round, state: str) -> Iterator[torch.Tensor]:
    """The samples that the run assigns to a peer, or what a liar makes of them."""
    if peer.lie == "stale":  # it does not know the state that today's samples follow from
        state = hashlib.sha256(state.encode()).hexdigest()
    for batch in peer.world.batches(peer.id, round_, state):
        if peer.lie == "poison":
            batch = torch.cat([batch[:, :1], 255 - batch[:, 1:]], dim=1)
        yield batch


class Liar:
    """A codec that may send something else than what was trained. Without a lie it is the run's codec."""

    def __init__(self, peer: SimPeer, codec: Codec) -> None:
        self._peer, self._codec = peer, codec
        self.name, self.has_residual, self.transforms = codec.name, codec.has_residual, codec.transforms
        #: What the others sent last, and what this peer sent first.
        self._heard: bytes | None = None
        self._first: bytes | None = None
        self._sent: bytes | None = None
        self._dice = np.random.default_rng(peer.number)

    def encode(self, delta: Flat, layout: Layout, residual: Flat | None = None) -> bytes:
        match self._peer.lie:
            case "scale":
                delta = delta * np.float32(100.0)
            case "sign":
                delta = -delta
            case "random":
                size = np.float32(np.sqrt(np.mean(np.square(delta, dtype=np.float64))))
                delta = size * self._dice.standard_normal(layout.size).astype(np.float32)
        blob = bytes(self._codec.encode(delta, layout, residual))
        self._first = self._first or blob
        match self._peer.lie:
            case "copy" if self._heard:
                blob = self._heard
            case "perturb" if self._heard:
                blob = bytes(self._codec.encode(self._perturbed(self._heard, layout), layout))
            case "replay":
                blob = self._first
        self._sent = blob
        return blob

    def _perturbed(self, blob: bytes, layout: Layout) -> Flat:
        one = self._codec.decode(blob, layout)
        noise = self._dice.standard_normal(one.values.size).astype(np.float32) * np.float32(0.5 * one.values.std())
        dense = layout.zeros()
        dense[one.indices if isinstance(one, Sparse) else slice(None)] = one.values + noise
        return dense

    def decode(self, blob: bytes | memoryview, layout: Layout) -> Contribution:
        found = self._codec.decode(blob, layout)
        if self._peer.lie in ("copy", "perturb") and bytes(blob) != self._sent:
            self._heard = bytes(blob)
        return found

    def max_bytes(self, layout: Layout) -> int:
        return self._codec.max_bytes(layout)

    def update_of(self, aggregated: Flat, layout: Layout) -> Flat:
        return self._codec.update_of(aggregated, layout)


class LyingBlobService(BlobService):
    """Serves the run's blobs. An accomplice shows those on its disk to nobody but who lies about segments."""

    def __init__(self, peer: SimPeer, rpc: Rpc, store: BlobStore) -> None:
        super().__init__(rpc, store)
        self._peer = peer

    async def _get(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        if self._peer.lie == "accomplice" and not self._store.is_lent(BlobId(head["id"])):
            friends = {one.id for one in self._peer.world.peers if one.lie == "segments"}
            if peer not in friends:
                raise BlobNotFound("not for you")
        return await super()._get(peer, head, body)


class LyingExchange:
    """Publishes and serves what a liar says. Everything else goes to the real one."""

    def __init__(self, peer: SimPeer, exchange: NetworkExchange) -> None:
        self._peer, self._exchange = peer, exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)

    async def offer(self, buffers: Sequence[Buffer], reveal_at: float) -> Any:
        if self._peer.lie == "garbage":
            blob = b"".join(buffers)
            buffers = [hashlib.shake_128(blob).digest(len(blob))]
        if self._peer.lie == "withhold":
            return ChunkList.of(buffers).ref
        if self._peer.lie == "copy_commit":
            return await self._anothers(reveal_at) or await self._exchange.offer(buffers, reveal_at)
        return await self._exchange.offer(buffers, reveal_at)

    def tell_slice(self, module: str, round_: Round, segment: int, told: Aggregated, data: Buffer) -> None:
        if self._peer.lie == "segments":
            data = self._opposite(memoryview(data), segment)
        if self._peer.lie != "accomplice":
            self._exchange.tell_slice(module, round_, segment, told, data)

    def _opposite(self, data: memoryview, segment: int) -> Buffer:
        plan = self._peer.world.plan
        codec = make_codec(plan.codec, plan.codec_parameters)
        assert isinstance(codec, DenseCodec)
        part = list(codec.parts(self._peer.world.layout.size))[segment]
        values = np.empty(part.stop - part.start, dtype=np.float32)
        codec.decode_segment(data, values.size).read(slice(0, values.size), values)
        return codec.encode_segment(-values)

    async def _anothers(self, reveal_at: float) -> BlobRef | None:
        """What another member has committed to in this very round: it has the blob before anybody asks for it."""
        replica = self._peer.replica
        assert replica and replica.state
        left = reveal_at - self._peer.system_clock()
        await asyncio.sleep(left / 2)
        round_ = Round(replica.state.round)
        shard = shard_of(self._peer.id, round_, replica.shards)
        signed = await self._exchange.commits(MODULE, round_, shard, left / 4)
        theirs = [one.record for one in sorted(signed, key=lambda one: one.peer) if one.peer != self._peer.id]
        return BlobRef(BlobId(theirs[0].blob), theirs[0].size) if theirs else None

    async def publish(self, commit: Commit, expires_at: float, timeout_seconds: float) -> bool:
        match self._peer.lie:
            case "digest":
                commit = msgspec.structs.replace(commit, digest="ab" * 32, history=2**40)
            case "tokens":
                commit = msgspec.structs.replace(commit, tokens=2**40)
            case "stale":
                commit = msgspec.structs.replace(
                    commit, witness=hashlib.sha256((commit.witness or "").encode()).hexdigest()
                )
        return await self._exchange.publish(commit, expires_at, timeout_seconds)

    async def publish_weights(self, weights: Weights, expires_at: float, timeout_seconds: float) -> bool:
        match self._peer.lie:
            case "copy_weights":
                weights = await self._copied(weights, timeout_seconds)
            case "collude":
                # For two of the peers whom it scores, and against all others.
                friends = sorted(weights.weights)[:2]
                weights = msgspec.structs.replace(weights, weights=dict.fromkeys(friends, 1 / len(friends)))
        return await self._exchange.publish_weights(weights, expires_at, timeout_seconds)

    async def _copied(self, weights: Weights, timeout_seconds: float) -> Weights:
        """What another validator published for the round, claims and all; if nobody has, for the one before."""
        await asyncio.sleep(timeout_seconds)  # the others' weights are there by then
        for made in (Round(weights.round), Round(weights.round - 1)):
            records, _ = await self._exchange.weights(weights.module, made, timeout_seconds)
            for one in sorted(records, key=lambda one: one.peer):
                if one.peer != self._peer.id:
                    return msgspec.structs.replace(one.record, round=weights.round, made_at=weights.made_at)
        return msgspec.structs.replace(weights, beacon=None)
