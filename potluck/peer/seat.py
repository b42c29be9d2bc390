"""A seat: this peer's place in one module, with all that its replica needs. Who moves to another stage has two for a
while.

A keeper's seat has no replica: it follows another stage's rounds, so that the stage can come back when all of its
replicas are gone. It costs the stage's contributions as traffic, and 4 to 8 bytes per parameter of memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from potluck.dht.directory import Directory
from potluck.dht.manifest import Manifest, RunId
from potluck.errors import ManifestError
from potluck.incentives.steering import Steering
from potluck.net.blobs import BlobId, BlobRef
from potluck.net.clock import RunClock
from potluck.net.fetch import fetch
from potluck.net.host import PeerId
from potluck.peer.build import MODULE, Parts, outer_of, rules_of
from potluck.peer.home import RunFolder
from potluck.peer.node import Node
from potluck.swarm.checkpoints import CheckpointStore, CheckpointWriter
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import assigned_offsets, data_seed
from potluck.swarm.exchange import NetworkExchange
from potluck.swarm.follower import Follower, Following
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.overlap import OverlappedReplica
from potluck.swarm.phases import PULL_SHARE, Round
from potluck.swarm.presence import Presence, Role
from potluck.swarm.rounds import GossipReplica
from potluck.swarm.state import ReplicaState, parse_state, state_bytes
from potluck.swarm.waits import WaitBoard

THETA_0_SECONDS: Final = 300.0
#: Held-out windows evaluated at the start of each round: the loss curve costs little beside the round's steps.
EVALUATED_WINDOWS: Final = 8

Emit = Callable[..., None]


@dataclass(frozen=True)
class Around:
    """What a run gives each of its seats. `first_round`: the one in which this process began."""

    run_id: RunId
    manifest: Manifest
    folder: RunFolder
    node: Node
    directory: Directory
    clock: RunClock
    waits: WaitBoard
    session: bytes
    name: str
    keep_checkpoints: int
    addresses: list[str]
    first_round: int
    emit: Emit
    on_progress: Callable[[int, int], None]

    @property
    def peer(self) -> PeerId:
        return self.node.peer_id

    @property
    def run_seed(self) -> bytes:
        """What the assignment of samples to peers begins with."""
        return self.run_id.encode() + self.manifest.data.seed.to_bytes(8, "big")

    def exchange(self) -> NetworkExchange:
        rounds = self.manifest.rounds
        return NetworkExchange(
            self.directory,
            self.node.rpc,
            self.node.store,
            retain_seconds=(rounds.retain + 2) * rounds.seconds,
            keep_states=rounds.retain,
            on_progress=self.on_progress,
            pull_seconds=PULL_SHARE * rounds.exchange_seconds,
            uploads=rounds.uploads,
            slices=self.node.slices,
        )

    def presence(self, role: Role | None = None) -> Presence:
        organizer = self.manifest.organizer == self.peer
        presence = Presence(
            self.directory,
            self.peer,
            role=role or ("organizer" if organizer else "worker"),
            name=self.name,
            session=self.session,
            emit=self.emit,
        )
        presence.addresses, presence.first_round = self.addresses, self.first_round
        return presence

    def following(self, module: str, exchange: NetworkExchange, emit: Emit) -> Following:
        manifest = self.manifest
        following = Following(
            peer=self.peer,
            module=module,
            rules=rules_of(manifest),
            codec=make_codec(manifest.codec.name, manifest.codec.parameters),
            outer=outer_of(manifest),
            exchange=exchange,
            now=self.clock.now,
            waits=self.waits,
            emit=emit,
            session=self.session,
        )
        if trust := manifest.incentives.trust:
            following["steer"] = Steering(
                exchange, module, trust, rules_of(manifest).clock, manifest.rounds.retain, emit
            )
        return following


class Seat:
    """`run` trains its replica. `emit` hears the replica's events; `loaded` is set when it has a state to train."""

    def __init__(self, around: Around, module: str, parts: Parts, emit: Emit) -> None:
        self.module, self.parts, self.presence = module, parts, around.presence()
        self.loaded = asyncio.Event()
        self._around, self._exchange = around, around.exchange()
        self.checkpoints = CheckpointStore(around.folder.checkpoints(module), around.run_id, around.keep_checkpoints)
        self._writer = CheckpointWriter(
            self.checkpoints, lambda error: emit("peer.checkpoint.failed", module=module, error=str(error))
        )
        self._tasks: set[asyncio.Task[None]] = set()
        following = around.following(module, self._exchange, self._on_event)
        following["on_state"] = self._on_state
        kind: type[GossipReplica] = OverlappedReplica if around.manifest.rounds.overlap else GossipReplica
        self.replica = kind(
            trainer=parts.trainer,
            batches=self._batches,
            held_out=parts.corpus.held_out_batch(EVALUATED_WINDOWS),
            **following,
        )
        self._emit = emit

    async def run(self, kept: ReplicaState | None = None) -> None:
        """Rounds until the replica is told to leave. They begin with the group's state; where there is no group with
        `kept`, else with the newest checkpoint, else with theta_0."""
        try:
            start, genuine = (kept, True) if kept else await self.starting_state()
            await self.replica.run(start, None if genuine else self.download_theta_0)
        finally:
            self._exchange.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._writer.close()

    async def starting_state(self) -> tuple[ReplicaState, bool]:
        """The newest checkpoint, else theta_0 as this machine draws it from the seed; False if that is not the run's.

        Unlike processors may draw unlike bits. Then the group's state, or theta_0 from another peer, takes its place.
        """
        theta_0 = self.parts.theta_0
        saved = await asyncio.to_thread(self.checkpoints.latest, theta_0.layout, self.module)
        if saved:
            if self.replica.residual is not None and saved.residual is not None:
                self.replica.residual[:] = saved.residual
            self._emit("peer.checkpoint.loaded", module=self.module, round=saved.state.round)
            return saved.state, True
        wanted = self._around.manifest.model.initial_state
        genuine = wanted is None or wanted == theta_0.digest
        if not genuine:
            self._emit("peer.theta0.differs", ours=theta_0.digest, wanted=wanted)
        return theta_0, genuine

    async def download_theta_0(self) -> ReplicaState:
        around, ours, model = self._around, self.parts.theta_0, self._around.manifest.model
        assert model.initial_state
        size = state_bytes(ours.layout, ours.velocity is not None)
        if model.initial_bytes != size:
            raise ManifestError("model.initial_bytes does not fit the model that the manifest describes")
        until = around.clock.now() + THETA_0_SECONDS
        what = f"theta_0 ({size / 2**20:.1f} MiB) from connected peers"
        with around.waits.waiting(what, until, "the peer gives up"):
            fetched = await fetch(
                around.node.rpc,
                BlobRef(BlobId(model.initial_state), size),
                await around.node.connected(),
                timeout_seconds=THETA_0_SECONDS,
                max_bytes=size,
                store=around.node.store,
                on_progress=around.on_progress,
            )
        return parse_state(fetched, self.module, ours.layout, ours.velocity is not None)

    def _batches(self, round_: Round) -> Iterator[torch.Tensor]:
        around, corpus, state = self._around, self.parts.corpus, self.replica.state
        size, first = around.manifest.training.batch_size, 0
        assert state
        seed = data_seed(around.run_seed, state.digest)
        while True:
            yield corpus.batch(assigned_offsets(seed, MODULE, around.peer, round_, first, size, corpus))
            first += size

    async def _on_state(self, state: ReplicaState, residual: Flat | None) -> None:
        self._writer.save(state, residual)
        model = self._around.manifest.model
        if state.round == 0 and model.initial_state:
            # theta_0 stays available for those whose machines draw other initial weights from the seed.
            store = self._around.node.store
            await asyncio.to_thread(lambda: store.put(b"".join(state.buffers), pin=True))
        if model.stages == 1 or self.loaded.is_set():  # a stage is nobody's to call before it has the group's state
            self._announce(state)

    def _announce(self, state: ReplicaState) -> None:
        around, shards = self._around, self.replica.shards
        self._background(self.presence.announce(state, shards, around.clock.now(), around.manifest.rounds.seconds))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_event(self, name: str, **fields: Any) -> None:
        if name == "swarm.round.started" and not self.loaded.is_set():
            self.loaded.set()
            if self.replica.state:
                self._announce(self.replica.state)
        self._emit(name, **fields)


class Keeper:
    """Keeps a snapshot of another stage, at most a round old, and announces it."""

    def __init__(self, around: Around, module: str, layout: Layout) -> None:
        self.module = module
        self._around, self._exchange, self._presence = around, around.exchange(), around.presence("observer")
        following = around.following(module, self._exchange, lambda name, **fields: None)
        following["on_state"] = self._on_state
        self._follower = Follower(layout, **following)
        has_velocity = around.manifest.outer.momentum > 0
        empty = layout.zeros()
        self._placeholder = ReplicaState(module, layout, Round(0), empty, empty if has_velocity else None)
        self._state: ReplicaState | None = None
        self._announcing: asyncio.Task[None] | None = None

    @property
    def state_bytes(self) -> int:
        return state_bytes(self._follower.layout, self._placeholder.velocity is not None)

    @property
    def state(self) -> ReplicaState | None:
        """None until a replica's state has come."""
        return self._state

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._follower.follow(self._placeholder)
        finally:
            self._exchange.close()
            if self._announcing:
                self._announcing.cancel()
                await asyncio.gather(self._announcing, return_exceptions=True)

    async def _on_state(self, state: ReplicaState, residual: Flat | None) -> None:
        around = self._around
        if self._state is None:
            around.emit("swarm.snapshot.kept", module=self.module, round=state.round)
        self._state = state
        if self._announcing is None or self._announcing.done():  # else the next round's will do
            seconds = around.manifest.rounds.seconds
            self._announcing = asyncio.create_task(
                self._presence.announce(state, 1, around.clock.now(), seconds, every=1)
            )
