"""One simulated peer: the real stack (RPC, blobs, DHT, directory, rounds) on an in-memory host."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from potluck.dht.care import dial, keep_connected
from potluck.dht.directory import Directory
from potluck.dht.node import start_dht, stop_dht
from potluck.dht.records import Record
from potluck.errors import ClockError, PotluckError, StateError
from potluck.incentives.judge import Effort
from potluck.incentives.ledger import Ledger
from potluck.incentives.steering import Steering
from potluck.incentives.validator import Terms, Validator
from potluck.net.blobs import BlobStore
from potluck.net.clock import RunClock
from potluck.net.host import PeerId
from potluck.net.hosts.memory import MemoryHost
from potluck.net.identity import Identity
from potluck.net.rpc import Rpc, RpcLimits
from potluck.sim.blobs import MemoryBlobStore
from potluck.sim.dht_model import ModelDirectory
from potluck.sim.invariants import WatchedWaits
from potluck.sim.liars import Liar, LyingBlobService, LyingExchange, LyingTrainer, lying_batches
from potluck.sim.loop import Compute
from potluck.sim.network import Line
from potluck.sim.plan import Lie
from potluck.sim.stand_in import MODULE, Pace
from potluck.swarm.checkpoints import CheckpointStore
from potluck.swarm.codecs import Codec, make_codec
from potluck.swarm.exchange import NetworkExchange
from potluck.swarm.follower import Follower, Following
from potluck.swarm.layout import Flat
from potluck.swarm.outer import OuterStep
from potluck.swarm.overlap import OverlappedReplica
from potluck.swarm.phases import Round
from potluck.swarm.presence import Presence
from potluck.swarm.rounds import GossipReplica
from potluck.swarm.slice_board import SliceBoard
from potluck.swarm.state import ReplicaState

if TYPE_CHECKING:
    from potluck.sim.world import World

QUOTA_BYTES = 64 * 2**20
ARCHIVE_BYTES = 2**30
#: A real lane looks after itself every few seconds; among thousands of peers that would be most of all events.
LIMITS = RpcLimits(frame_timeout_seconds=120.0, stall_timeout_seconds=120.0, idle_timeout_seconds=90.0)


def identity_of(seed: int, number: int) -> Identity:
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"potluck.sim {seed} {number}".encode()).digest())
    return Identity(Path("/nowhere"), key)


class SimPeer:
    """A machine and its identity. `start` gives it a process, `crash` takes it away."""

    def __init__(self, world: World, number: int, line: Line) -> None:
        self.world, self.number, self.line = world, number, line
        self.identity = identity_of(world.plan.seed, number)
        self.id: PeerId = self.identity.peer_id
        self.skew = 0.0
        self.pace = Pace(world.plan.step_seconds)
        self.lie: Lie | None = None
        self.disk_full = False
        self.sessions = 0
        self.born = world.loop.time()
        self.host: MemoryHost | None = None
        self.replica: Follower | None = None
        #: Whether it scores the others, and does not train.
        self.validates = self.id in world.stake
        self.rpc: Rpc | None = None
        self.store: BlobStore | None = None
        self.dht: Any = None
        self.ended: str | None = None
        self.dht_operations = 0
        #: Rounds that it applied, and those to whose group it contributed, over all its processes.
        self.applied: set[int] = set()
        self.contributed: set[int] = set()
        #: Whether a fault struck this peer itself, and whether it left at its session's end.
        self.struck = self.left = False
        self._task: asyncio.Task[None] | None = None
        self._addresses: list[str] = []
        self._frozen = False
        #: When it was last thawed, or its clock set, in loop time.
        self._disturbed_at = -math.inf
        self._thawed: list[Callable[[], None]] = []
        self._checkpoints = CheckpointStore(world.root / str(number) / "checkpoints", world.plan.name, keep=2)
        self._saved = False
        world.network.add(self.id, line)

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    # ---- the address book (`dht/care.py`) -------------------------------------------------------------------

    def peers(self) -> list[str]:
        return self._addresses

    def save_peers(self, addresses: list[str]) -> None:
        self._addresses = addresses

    # ---- the machine ----------------------------------------------------------------------------------------

    def system_clock(self) -> float:
        return self.world.utc() + self.skew

    def cost(self) -> float:
        return self.pace.paid()

    def when_awake(self, then: Callable[[], None]) -> None:
        if self._frozen:
            self._thawed.append(then)
        else:
            then()

    def freeze(self) -> None:
        self._frozen = True
        self.world.network.freeze(self.id)

    def thaw(self) -> None:
        self._frozen, self._disturbed_at = False, self.world.loop.time()
        self.world.network.thaw(self.id)
        thawed, self._thawed = self._thawed, []
        for then in thawed:
            then()

    def set_clock(self, error: float) -> None:
        """`error`: seconds that it is ahead from now on."""
        self.skew, self._disturbed_at = error, self.world.loop.time()

    def _excused(self, began: float) -> bool:
        """A frozen process cannot see its deadlines; nor can one whose clock was set meanwhile."""
        return self._frozen or self._disturbed_at >= began

    # ---- the process ----------------------------------------------------------------------------------------

    def start(self, bootstrap: list[PeerId]) -> None:
        assert not self.alive
        self.sessions += 1
        self.ended = None
        self.world.watch.started(self.id)
        self._task = self.world.loop.create_task(self._live(bootstrap))

    def crash(self) -> None:
        """kill -9."""
        if self.host:
            self.host.crash()
        if self._task:
            self._task.cancel()
        if self._frozen:
            self.thaw()
        self.check_disk()

    def check_disk(self) -> None:
        if self._saved and self._checkpoints.latest(self.world.layout, MODULE) is None:
            self.world.watch.say(self.id, "no checkpoint on disk loads")

    async def _live(self, bootstrap: list[PeerId]) -> None:
        async with AsyncExitStack() as stack:
            try:
                await self._run(stack, bootstrap)
            except ClockError as error:
                self.ended = f"clock: {error}"
            except PotluckError as error:
                self.ended = f"{type(error).__name__}: {error}"
                if not self.disk_full and self.host and self.host.alive:
                    self.world.watch.say(self.id, f"ended: {self.ended}")
            except Exception as error:
                self.ended = repr(error)
                self.world.watch.say(self.id, f"a bug ended it: {self.ended}")
            if self.ended:
                self.emit("sim.peer.ended", why=self.ended)

    async def _run(self, stack: AsyncExitStack, bootstrap: list[PeerId]) -> None:
        world, plan = self.world, self.world.plan
        host = self.host = MemoryHost(world.lan, self.id)
        stack.push_async_callback(host.shutdown)
        clock = RunClock(self.system_clock, world.loop.time)
        rpc = self.rpc = Rpc(host, LIMITS, upload=plan.upload_cap_mbit * 125_000 or None)
        await rpc.start()
        stack.push_async_callback(rpc.close)
        kind = BlobStore if plan.checkpoints else MemoryBlobStore
        store = self.store = kind(world.root / str(self.number) / "blobs", QUOTA_BYTES, clock=clock.now)
        store.quota_bytes = 0 if self.disk_full else QUOTA_BYTES
        LyingBlobService(self, rpc, store)
        clock.serve(rpc)
        known = [f"/ip4/10.0.0.1/tcp/4001/p2p/{peer}" for peer in bootstrap]
        await dial(host, [*known, *self._addresses])

        async def connected_now() -> list[PeerId]:
            return [PeerId(info.peer_id.to_base58()) for info in await host.list_peers()]

        connected = await connected_now()
        measured = await clock.measure(rpc, connected)
        if measured is not None and clock.correct(measured):
            self.emit("peer.clock.corrected", seconds=measured)
        rounds = world.rules
        directory = await self._join_directory(stack, connected, clock)
        exchange = NetworkExchange(
            directory,
            rpc,
            store,
            retain_seconds=(plan.retain + 2) * plan.seconds,
            keep_states=plan.retain,
            slices=SliceBoard(rpc),
        )
        session = hashlib.sha256(f"{self.id} {self.sessions}".encode()).digest()[:16]
        presence = Presence(directory, self.id, role="worker", name="", session=session, emit=self.emit)
        presence.started = world.utc()
        following = self._following(exchange, clock, presence, session)
        presence.first_round = rounds.clock.round_at(clock.now())
        saved = self._checkpoints.latest(world.layout, MODULE) if plan.checkpoints else None
        start = saved.state if saved else world.theta_0
        if self.validates:
            validator = self._make_validator(stack, exchange, clock)
            following["on_applied"] = validator.on_applied
            replica: Follower = Follower(world.layout, **following)
            training: asyncio.Task[Any] = asyncio.create_task(replica.follow(start))
        else:
            trainer = LyingTrainer(self, world.make_trainer(self))
            made: type[GossipReplica] = OverlappedReplica if plan.overlap else GossipReplica
            replica = training_one = made(trainer=trainer, batches=self._batches, held_out=world.held_out, **following)
            training = asyncio.create_task(training_one.run(start))
        self.replica = replica
        care = [
            asyncio.create_task(keep_connected(host, self, lambda: self.dht, self.emit, plan.seconds / 3)),
            asyncio.create_task(clock.keep_checked(rpc, connected_now, self.emit, samples=1)),
        ]
        try:
            await asyncio.wait([training, *care], return_when=asyncio.FIRST_COMPLETED)
            for task in (training, *care):
                if task.done():
                    await task
        finally:
            replica.stop()
            for task in (training, *care):
                task.cancel()
            await asyncio.gather(training, *care, return_exceptions=True)

    async def _join_directory(self, stack: AsyncExitStack, connected: list[PeerId], clock: RunClock) -> Directory:
        world, plan = self.world, self.world.plan
        directory: Any
        if plan.dht == "model":
            directory = ModelDirectory(self, world.shelf, world.network.median_latency)
        else:
            assert self.host
            node = self.dht = await start_dht(
                self.host,
                world.run_id,
                initial_peers=connected,
                max_ahead_seconds=(plan.retain + 3) * plan.seconds + 60,
                wait_timeout_seconds=min(3.0, max(0.5, plan.exchange_seconds / 4)),
                clock=clock.now,
                validators=world.stake.keys(),
            )
            stack.push_async_callback(stop_dht, node)
            world.watch_records(self.id, node.protocol.storage)
            directory = CountingDirectory(self, node, self.identity, world.run_id, clock=clock.now)
        return cast(Directory, directory)

    def _following(self, exchange: NetworkExchange, clock: RunClock, presence: Presence, session: bytes) -> Following:
        world, plan = self.world, self.world.plan
        codec: Codec = make_codec(plan.codec, plan.codec_parameters)

        async def on_state(state: ReplicaState, residual: Flat | None) -> None:
            self._save(state, residual)
            shards = self.replica.shards if self.replica else 1
            world.background(presence.announce(state, shards, clock.now(), plan.seconds))

        following = Following(
            peer=self.id,
            module=MODULE,
            rules=world.rules,
            codec=codec if plan.sliced else Liar(self, codec),
            outer=OuterStep(1.0, plan.momentum),
            exchange=LyingExchange(self, exchange),
            now=clock.now,
            waits=WatchedWaits(clock.now, self.id, world.watch, self._excused),
            emit=self.emit,
            draw=random.Random(f"{plan.seed} {self.id}").randrange,
            session=session,
            on_state=on_state,
            compute=Compute(self),
        )
        if world.stake:
            following["steer"] = Steering(exchange, MODULE, world.stake, world.rules.clock, plan.retain, self.emit)
        return following

    def _make_validator(self, stack: AsyncExitStack, exchange: NetworkExchange, clock: RunClock) -> Validator:
        world, plan = self.world, self.world.plan
        folder = world.root / str(self.number)
        ledger = Ledger.open(folder / "ledger.sqlite", world.run_id, self.identity)
        stack.callback(ledger.close)
        assert self.store

        async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
            return work(*arguments)

        validator = Validator(
            module=MODULE,
            judge=world.make_judge(self.id),
            ledger=ledger,
            terms=Terms(world.stake, plan.emission, plan.validator_emission),
            records=LyingExchange(self, exchange),
            store=self.store,
            archive=BlobStore(folder / "archive", ARCHIVE_BYTES, clock=clock.now),
            clock=world.rules.clock,
            retain=plan.retain,
            now=clock.now,
            emit=self.emit,
            in_thread=at_once,
            effort=Effort(windows=64, tests=8),
        )
        codec = make_codec(plan.codec, plan.codec_parameters)
        validator.resume(lambda blob: codec.decode(blob, world.layout))
        return validator

    def _batches(self, round_: Round) -> Iterator[torch.Tensor]:
        assert self.replica and self.replica.state
        return lying_batches(self, round_, self.replica.state.digest)

    def _save(self, state: ReplicaState, residual: Flat | None) -> None:
        if not self.world.plan.checkpoints:
            return
        try:
            if self.disk_full:
                raise StateError("no space left on the simulated disk")
            self._checkpoints.save(state, residual)
            self._saved = True
            self.check_disk()
        except StateError as error:
            self.emit("peer.checkpoint.failed", error=str(error))

    async def measured(self, kind: str, records: int | None, operation: Any) -> Any:
        """Run a DHT operation and note what it took, for the model of its cost. (kind, records, calls, bytes, s)."""
        assert self.host
        self.dht_operations += 1
        began, calls, size = self.world.loop.time(), self.host.calls, self.host.call_bytes
        result = await operation
        # Operations of one peer overlap now and then: their calls are counted for both, and the median forgives it.
        self.world.operations.append(
            (
                kind,
                len(result.records) if records is None else records,
                self.host.calls - calls,
                self.host.call_bytes - size,
                self.world.loop.time() - began,
            )
        )
        return result

    def emit(self, name: str, **fields: Any) -> None:
        if name == "peer.clock.corrected":
            self._disturbed_at = self.world.loop.time()
        self.world.event(self, name, fields)


class CountingDirectory(Directory):
    """Counts what a peer asks of the DHT."""

    def __init__(self, peer: SimPeer, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._owner = peer

    async def publish(self, record: Record, expires_at: float, timeout_seconds: float) -> bool:
        stored = super().publish(record, expires_at, timeout_seconds)
        return bool(await self._owner.measured("publish", 1, stored))

    async def _read(self, kind: Any, path: str, timeout_seconds: float) -> Any:
        return await self._owner.measured("read", None, super()._read(kind, path, timeout_seconds))
