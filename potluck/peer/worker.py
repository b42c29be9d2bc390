"""The worker: joins one run, trains its module in gossip rounds, and tells what it does.

`Peer` is the main object that a newcomer sees:

    async with Peer.open(home) as peer:
        run = await peer.join("potluck:...")
        async for report in run.rounds():
            print(report.round, report.loss)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from potluck import __version__
from potluck.dht.care import DIAL_SECONDS
from potluck.dht.invite import Invite, is_address
from potluck.dht.manifest import Manifest, RunId, SignedManifest
from potluck.dht.manifest import sign as sign_manifest
from potluck.dht.records import Heartbeat
from potluck.dht.template import load_toml
from potluck.errors import NetworkError, PotluckError, UserError
from potluck.net.clock import SAID_SECONDS, RunClock
from potluck.net.identity import Identity
from potluck.peer.build import MODULE, Parts, build, check_memory, initial_state, rules_of, same_draft
from potluck.peer.control import ControlServer
from potluck.peer.events import EventLog, Twentieths, counted
from potluck.peer.hardware import choose_device
from potluck.peer.home import Home, RunFolder
from potluck.peer.ledger_copies import LedgerCopies
from potluck.peer.links import show_links
from potluck.peer.node import DIRECTORY_SECONDS, Node
from potluck.peer.pipeline import Pipeline, choose_stage
from potluck.peer.seat import Around, Seat
from potluck.peer.settings import PeerSettings
from potluck.peer.telemetry import Telemetry, Vitals
from potluck.peer.validating import Bench, Whole
from potluck.swarm.aggregate import RULE_NAMES
from potluck.swarm.codecs import CODEC_NAMES, make_codec
from potluck.swarm.data import Corpus, load_corpus
from potluck.swarm.phases import Round
from potluck.swarm.presence import Role, new_session
from potluck.swarm.rounds import GossipReplica, RoundReport
from potluck.swarm.stage import stage_names, stage_parameters
from potluck.swarm.stage_trainer import StageTrainer
from potluck.swarm.state import ReplicaState
from potluck.swarm.waits import WaitBoard

#: What a step or a fetch under way gets to end by itself when the peer is stopped.
STOP_SECONDS = 1.0
#: What the state of a stage that we move to may take to come, while we go on where we are.
MOVE_SECONDS = 1800.0


class Peer:
    """One identity on one machine. Open it, then host or join a run."""

    def __init__(self, home: Home, settings: PeerSettings) -> None:
        self.home, self.settings = home, settings
        self.identity: Identity = home.identity()
        self._stack = AsyncExitStack()

    @classmethod
    def open(cls, home: Path | str | Home, settings: PeerSettings | None = None) -> Peer:
        """Raises UserError or IdentityError if the home cannot be used."""
        where = home if isinstance(home, Home) else Home(Path(home))
        return cls(where.open(), settings or PeerSettings())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()

    async def host(self, manifest_file: Path, start_in_seconds: float = 2.0) -> Run:
        """Sign the manifest (or find the run that this home already started from it) and take part in it."""
        draft = load_toml(manifest_file)
        unsigned = draft.finish(self.identity.peer_id, created=0.0, genesis=0.0)
        unsigned.check_known(codecs=CODEC_NAMES, rules=RULE_NAMES)
        make_codec(unsigned.codec.name, unsigned.codec.parameters)
        choose_device(self.settings.device)
        if folder := self._hosted(unsigned):
            return await self._take_part(folder, folder.manifest(), None)
        # Of a pipeline no single peer may be able to hold all stages: each is drawn from the seed where it is served.
        whole = unsigned.model.stages == 1
        if not whole:
            await asyncio.to_thread(stage_parameters, unsigned.model)  # refuses what cannot be cut
        theta_0 = await asyncio.to_thread(initial_state, unsigned, self.settings.device) if whole else None
        now = time.time()
        signed = sign_manifest(
            draft.finish(
                self.identity.peer_id,
                created=now,
                genesis=round(now + start_in_seconds, 3),
                initial_state=theta_0.digest if theta_0 else None,
                initial_bytes=theta_0.ref.size if theta_0 else 0,
            ),
            self.identity,
        )
        namesake = self._namesake(unsigned)
        folder = self.home.run(signed.run_id)
        folder.save_manifest(signed)
        return await self._take_part(folder, signed, None, namesake)

    def _hosted(self, unsigned: Manifest) -> RunFolder | None:
        """The run that was started here from this manifest. One that never came to train is forgotten: nobody joined it
        before its first checkpoint, and its rounds would have been counting since."""
        for folder in self.home.runs():
            signed = folder.manifest()
            if signed and same_draft(signed.manifest, unsigned):
                if folder.held(stage_names(signed.manifest.model.stages)):
                    return folder
                with folder.locked():
                    folder.remove()
        return None

    def _namesake(self, unsigned: Manifest) -> RunId | None:
        """The latest run of the same name that was started here, and came to train."""
        for folder in self.home.runs():
            signed = folder.manifest()
            mine = signed and (signed.manifest.name, signed.manifest.organizer) == (unsigned.name, unsigned.organizer)
            if signed and mine and folder.held(stage_names(signed.manifest.model.stages)):
                return folder.run_id
        return None

    async def join(self, invite: str | Invite) -> Run:
        """Take part in the run that an invite names. Raises ManifestError, NetworkError, ClockError, ..."""
        parsed = invite if isinstance(invite, Invite) else Invite.parse(invite)
        folder = self.home.run(parsed.run_id)
        return await self._take_part(folder, folder.manifest(), parsed)

    async def _take_part(
        self, folder: RunFolder, signed: SignedManifest | None, invite: Invite | None, namesake: RunId | None = None
    ) -> Run:
        async with AsyncExitStack() as stack:
            stack.enter_context(folder.locked())
            run = Run(self, folder, signed, invite)
            if namesake:
                run.events.emit("peer.run.new", run=folder.run_id, other=namesake)
            try:
                await stack.enter_async_context(run)
            except BaseException:
                if folder.is_new:
                    folder.remove()
                raise
            self._stack.push_async_exit(stack.pop_all())
        return run


class Run:
    """This peer's part in one run. `phase` says what it is doing; `seat` is where it trains, once it has joined."""

    def __init__(self, peer: Peer, folder: RunFolder, signed: SignedManifest | None, invite: Invite | None) -> None:
        self.peer, self.folder = peer, folder
        self.identity, self.settings = peer.identity, peer.settings
        self.clock = RunClock()
        self.waits = WaitBoard(self.clock.now)
        self.events = EventLog(folder.events_path, peer=self.identity.peer_id, name=self.settings.name)
        if self.settings.on_event:
            self.events.subscribe(self.settings.on_event)
        self.phase = "starting"
        self.seat: Seat | None = None
        relays = invite.peers if invite else ()
        self.node = Node(self.identity, folder, self.clock, self.events.emit, self.settings.network, relays)
        self._signed, self._invite = signed, invite
        self._session = new_session()
        self._loop = asyncio.get_running_loop()
        self._stack = AsyncExitStack()
        self._reports: asyncio.Queue[RoundReport | None] = asyncio.Queue()
        self._rounds_left: int | None = None
        #: The last round that was sat out, and why.
        self._sat_out: dict[str, Any] | None = None
        self._fetched, self._read = Twentieths(), Twentieths()
        self._training: asyncio.Task[Any] | None = None
        self._stopping = self._leaving = False
        self.pipeline: Pipeline | None = None
        self.bench: Bench | None = None
        #: Of the seat, and of the one that it moves to or comes from.
        self._seats: dict[asyncio.Task[None], Seat] = {}
        self._moving: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._copies: LedgerCopies | None = None
        self.telemetry: Telemetry | None = None

    # ---- joining --------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self.stop()
        if self._training and self._training is not asyncio.current_task():
            await asyncio.wait([self._training])
        await self._stack.aclose()
        self.events.close()

    async def _start(self) -> None:
        control = ControlServer(
            self.folder.control_socket,
            {
                "status": self.status,
                "why": self.why,
                "leave": self._leave,
                "ledgers": self._ledgers,
                "limit": self.node.limit,
            },
        )
        await self._stack.enter_async_context(control)
        with self._phase("network", "the libp2p daemon to start", 30, "the peer gives up"):
            await self._stack.enter_async_context(self.node)
        await self._connect()
        if self._signed is None:
            assert self._invite is not None
            with self._phase("manifest", "the run's manifest from a connected peer", 10, "the peer gives up"):
                self._signed = await self.node.fetch_manifest(self._invite)
            self.folder.save_manifest(self._signed)
        self.manifest.check_known(codecs=CODEC_NAMES, rules=RULE_NAMES)
        self.node.publish_manifest(self._signed)
        with self._phase("clock", "the clocks of connected peers", 6, "this machine's clock is taken as it is"):
            await self._check_clock()
        module, parts = MODULE, None
        if self.manifest.model.stages == 1 and not self.settings.validate:
            parts = await self._build_parts(module)
        with self._phase("directory", "the run's directory", DIRECTORY_SECONDS, "the peer gives up"):
            around = await self._enter_directory()
        self._copies = LedgerCopies(around)
        self._stack.push_async_callback(self._copies.close)
        if self.settings.validate:
            self.bench = await self._make_bench(around)
            self.phase = "validating"
            return
        if self.settings.train_only:
            if parts is not None:
                raise UserError("--train-only: this run's model is whole on every peer; leave the option out")
            corpus = await self._read_data()
            self.pipeline = await self._make_pipeline(around, corpus)
            self.phase = "training"
            return
        if parts is None:
            device = choose_device(self.settings.device)
            module = await choose_stage(
                around.directory,
                around.peer,
                self.manifest.model,
                self.settings.stage,
                self.folder.held(stage_names(self.manifest.model.stages)),
                partial(check_memory, self.manifest, device),
            )
            self.events.emit("peer.stage.chosen", module=module)
            parts = await self._build_parts(module)
        self.seat = self._make_seat(around, module, parts)
        if isinstance(parts.trainer, StageTrainer):
            self.pipeline = await self._make_pipeline(around, parts.corpus)
            self.pipeline.serve(self.seat)
        if self._leaving:
            self.seat.replica.finish()
        self.phase = "training"

    async def _make_pipeline(self, around: Around, corpus: Corpus) -> Pipeline:
        on_move, bound = partial(self._on_move, around), self.settings.stage is not None
        return await asyncio.to_thread(Pipeline, around, corpus, on_move, bound=bound)

    async def _make_bench(self, around: Around) -> Bench:
        trusted = self.manifest.incentives.validators
        if self.identity.peer_id not in trusted:
            self.events.emit("incentives.validator.untrusted", validators=len(trusted))
        corpus = await self._read_data()
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        with self._phase("building", "the whole model to be built", 300, "it goes on"):
            whole = await asyncio.to_thread(Whole.build, self.manifest, self.settings.device)
            return await Bench.open(around, whole, corpus, self.settings.archive_bytes)

    async def _read_data(self) -> Corpus:
        own = self.manifest.organizer == self.identity.peer_id
        with self._phase("building", "data to be read", 300, "it goes on: data may be large"):
            return await asyncio.to_thread(load_corpus, self.manifest.data, self.settings.data, own, self._on_reading)

    async def _build_parts(self, module: str) -> Parts:
        with self._phase("building", "model and data to be built", 300, "it goes on: data may be large"):
            return await asyncio.to_thread(self._build, module)

    def _build(self, module: str) -> Parts:
        return build(
            self.manifest,
            self.settings.device,
            self.settings.threads,
            self.settings.data,
            own_manifest=self.manifest.organizer == self.identity.peer_id,
            on_progress=self._on_reading,
            name=module,
            halvings=self.settings.halvings,
        )

    def _make_seat(self, around: Around, module: str, parts: Parts) -> Seat:
        seat = Seat(around, module, parts, lambda name, **fields: self._on_event(seat, name, **fields))
        return seat

    async def _enter_directory(self) -> Around:
        directory = self._directory = await self.node.join_dht(self.run_id, self.manifest)
        return Around(
            run_id=self.run_id,
            manifest=self.manifest,
            folder=self.folder,
            node=self.node,
            directory=directory,
            clock=self.clock,
            waits=self.waits,
            session=self._session,
            name=self.settings.name,
            keep_checkpoints=self.settings.keep_checkpoints,
            addresses=await self.node.addresses(),
            first_round=rules_of(self.manifest).clock.round_at(self.clock.now()),
            emit=self._on_run_event,
            on_progress=self._on_progress,
        )

    async def _connect(self) -> None:
        invited = list(self._invite.peers) if self._invite else []
        addresses = [*invited, *self.folder.peers()]
        with self._phase("connecting", f"one of {len(addresses)} known peers", DIAL_SECONDS, "the peer gives up"):
            results = await self.node.dial(addresses)
        failures = [
            " ".join(f"{address}: {why}".split())  # the daemon's reasons have many lines
            for address, why in results.items()
            if isinstance(why, NetworkError)
        ]
        if failures and len(failures) == len(results):
            if self._invite is not None:
                # Also with a checkpoint: to train alone beside those who go on would fork the run.
                raise NetworkError(
                    "none of the invite's peers, and none known from last time, can be reached: "
                    + "; ".join(failures)
                    + ". Check the address and the firewall, or ask for a fresh invite"
                )
            self.events.emit("net.bootstrap.unreachable", failures=failures)

    async def _check_clock(self) -> None:
        measured = await self.clock.measure(self.node.rpc, await self.node.connected())
        if measured is None:
            return
        if self.clock.correct(measured):
            self.events.emit("peer.clock.corrected", seconds=measured, limit=SAID_SECONDS)
        else:
            self.events.emit("peer.clock.checked", seconds=measured)

    # ---- training -------------------------------------------------------------------------------------------

    async def train(self) -> None:
        """Rounds until asked to leave or to `stop`. Raises what ends a peer: IdentityError, DaemonError, HardwareError.

        When this is stopped or cancelled, a step or a fetch under way gets a second to end by itself.
        """
        self._training = asyncio.current_task()
        if self._stopping:
            return
        try:
            await self._train()
        except asyncio.CancelledError:
            if not self._stopping:
                raise

    async def _train(self) -> None:
        assert self.seat or self.pipeline or self.bench
        home, seconds = self.peer.home, self.manifest.rounds.seconds
        showing = show_links(home, self._directory, self.identity.peer_id, seconds, self.clock.now, self.events.emit)
        care = [
            asyncio.create_task(self.node.keep_connected()),
            asyncio.create_task(showing),
            asyncio.create_task(self.clock.keep_checked(self.node.rpc, self.node.connected, self.events.emit)),
            asyncio.create_task(self.node.until_daemon_fails()),
        ]
        if self.pipeline:
            care.append(asyncio.create_task(self.pipeline.run()))
        if self.bench:
            care.append(asyncio.create_task(self.bench.run()))
        if self.settings.telemetry:
            self.telemetry = self._telemetry()
            care.append(asyncio.create_task(self.telemetry.run()))
        for task in care:
            task.add_done_callback(self._wake)
        if self.seat:
            self._sit(self.seat)
        try:
            while not self._leaving if self.seat is None else self.seat in self._seats.values():
                await self._woken.wait()
                self._woken.clear()
                for task in (*care, *self._seats, *filter(None, [self._moving])):
                    # What becomes of a seat that is not ours yet is for `_move` to say.
                    if task.done() and not task.cancelled() and self._seats.get(task, self.seat) is self.seat:
                        await task
                for seat in self._seats.values():
                    if seat.presence.taken.done():
                        raise seat.presence.taken.result()
                self._seats = {task: seat for task, seat in self._seats.items() if not task.done()}
        finally:
            if self._moving:
                self._moving.cancel()
            for seat in self._seats.values():
                seat.replica.stop()
            if self._seats:
                await asyncio.wait(self._seats, timeout=STOP_SECONDS)
            tasks = [*self._seats, *care, *filter(None, [self._moving])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.phase = "left"

    def _sit(self, seat: Seat, kept: ReplicaState | None = None) -> asyncio.Task[None]:
        task = asyncio.create_task(seat.run(kept))
        self._seats[task] = seat
        task.add_done_callback(self._wake)
        seat.presence.taken.add_done_callback(self._wake)
        return task

    def _wake(self, _: object) -> None:
        self._woken.set()

    # ---- moving to another stage ----------------------------------------------------------------------------

    def _on_move(self, around: Around, module: str) -> None:
        if self._leaving or self._stopping or (self._moving and not self._moving.done()):
            return
        self._moving = asyncio.create_task(self._move(around, module))
        self._moving.add_done_callback(self._wake)

    async def _move(self, around: Around, module: str) -> None:
        """Build the stage and take over its state first; only then is the old one left, after its round. Whatever
        fails on the way costs the move, not the peer."""
        old, pipeline = self.seat, self.pipeline
        assert old and pipeline
        self.events.emit("swarm.move.started", module=module, left=old.module)
        try:
            parts = await asyncio.to_thread(self._build, module)
            kept = await pipeline.coming(module)
            new = self._make_seat(around, module, parts)
            new.presence.moving = True
            await new.presence.announce_coming(module, self._round, self.clock.now(), self.manifest.rounds.seconds)
            arriving = self._sit(new, kept)
            if not await self._loaded(new, arriving):
                raise NetworkError(f"the state of {module} did not come within {MOVE_SECONDS:.0f} s")
            if self._leaving or self._rounds_left == 0 or not await pipeline.may_leave(old.module):
                raise NetworkError(f"{old.module} has no other replica any more, or this peer leaves")
        except (PotluckError, RuntimeError, MemoryError) as error:  # such as too little memory for two stages
            self.events.emit("swarm.move.failed", module=module, error=str(error))
            await self._give_up(module)
            return
        self.seat = new
        pipeline.serve(new)
        old.replica.finish()
        self.events.emit("peer.stage.chosen", module=module)
        for task in [task for task, seat in self._seats.items() if seat is old]:
            (failure,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(failure, Exception):
                self.events.emit("peer.seat.failed", module=old.module, error=str(failure))
        pipeline.leave(old.module)
        self.events.emit("swarm.move.done", module=module, left=old.module)
        await old.presence.withdraw(old.module, self._round, self.clock.now(), self.manifest.rounds.seconds)

    @property
    def _round(self) -> Round:
        return Round(max(0, rules_of(self.manifest).clock.round_at(self.clock.now())))

    async def _loaded(self, seat: Seat, task: asyncio.Task[None]) -> bool:
        """Whether a seat has its group's state in time."""
        loaded = asyncio.create_task(seat.loaded.wait())
        until = self.clock.now() + MOVE_SECONDS
        with self.waits.waiting(f"the state of {seat.module}", until, "this peer stays where it is"):
            await asyncio.wait([loaded, task], timeout=MOVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        loaded.cancel()
        if task.done() and not task.cancelled():
            task.result()
        return seat.loaded.is_set()

    async def _give_up(self, module: str) -> None:
        """The seat that we were moving to."""
        assert self.pipeline and self.seat
        for task, seat in list(self._seats.items()):
            if seat.module == module and seat is not self.seat:
                del self._seats[task]
                seat.replica.stop()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                now, seconds = self.clock.now(), self.manifest.rounds.seconds
                await seat.presence.withdraw(module, self._round, now, seconds)
        self.pipeline.stays()

    async def rounds(self, at_most: int | None = None) -> AsyncIterator[RoundReport]:
        """Train, and yield each round's report as it is applied. `at_most`: leave after so many rounds."""
        self._rounds_left = at_most
        training = self._training = asyncio.create_task(self.train())
        training.add_done_callback(lambda _: self._reports.put_nowait(None))
        try:
            while (report := await self._reports.get()) is not None:
                yield report
        finally:
            self.stop()
            await asyncio.wait([training])
        if not training.cancelled():
            training.result()

    def stop(self) -> None:
        """Leave at once (Ctrl-C): the round in progress is given up, the last checkpoint stays."""
        if self._training and not self._stopping:
            self._training.cancel()
        self._stopping = True

    # ---- telling --------------------------------------------------------------------------------------------

    @property
    def replica(self) -> GossipReplica | None:
        return self.seat.replica if self.seat else None

    @property
    def last(self) -> RoundReport | None:
        """The last round's report."""
        return self.replica.last if self.replica else None

    @property
    def manifest(self) -> Manifest:
        assert self._signed is not None
        return self._signed.manifest

    @property
    def run_id(self) -> RunId:
        return self.folder.run_id

    async def invite(self) -> Invite:
        """A fresh invite: this peer first, then others that it knows."""
        own = await self.node.addresses()
        others = [a for a in self.folder.peers() if not a.endswith(self.identity.peer_id)]
        return Invite(self.run_id, tuple(filter(is_address, dict.fromkeys([*own[:2], *others[:3]]))))

    def _telemetry(self) -> Telemetry:
        organizer = self.manifest.organizer == self.identity.peer_id
        role: Role = "validator" if self.bench else "organizer" if organizer else "worker"
        rounds = rules_of(self.manifest).clock
        vitals = Vitals(role, self.settings.name, rounds, self.clock.now)
        self.events.subscribe(vitals.on_event)

        def describe() -> Heartbeat:
            vitals.phase = self.phase
            if self.seat:
                vitals.module, vitals.load = self.seat.module, self.seat.presence.load
            return vitals.beat()

        return Telemetry(
            self.node.host.control,
            self.run_id,
            self.folder.history,
            clock=rounds,
            now=self.clock.now,
            emit=self.events.emit,
            identity=self.identity,
            describe=describe,
        )

    async def _ledgers(self) -> dict[str, Any]:
        """For pages: copies of the validators' ledgers are brought up to date."""
        return self._copies.refresh() if self._copies else {"fetching": False, "errors": {}}

    async def status(self) -> dict[str, Any]:
        replica, last = self.replica, self.last
        return {
            "run": self.run_id,
            "run_name": self.manifest.name if self._signed else None,
            "peer": self.identity.peer_id,
            "name": self.settings.name,
            "version": __version__,
            "pid": os.getpid(),
            "phase": self.phase,
            "round": replica.state.round if replica and replica.state else None,
            "loss": last.loss if last else None,
            "tokens_per_second": last.tokens / max(1e-9, last.seconds["train"]) if last else None,
            "alone": last.alone if last else None,
            "rounds_alone": replica.rounds_alone if replica else 0,
            "group": list(last.group) if last else [],
            "agree": last.agree if last else None,
            "sat_out": self._sat_out_last(),
            "clock_offset_seconds": self.clock.offset,
            "module": self.seat.module if self.seat else None,
            "pipeline": self.pipeline.status() if self.pipeline else None,
            "validates": self.bench.status() if self.bench else None,
            **await self._network_status(),
        }

    async def _network_status(self) -> dict[str, Any]:
        if not self.node.started:
            none = {"connected_peers": 0, "bytes_sent": 0, "bytes_received": 0, "daemon_restarts": 0}
            return {**none, "invite": None}
        gossip = self.telemetry.bytes_passed if self.telemetry else 0
        return {
            "connected_peers": len(await self.node.connected()),
            "bytes_sent": self.node.rpc.bytes_sent + gossip,
            "bytes_received": self.node.rpc.bytes_received + gossip,
            "daemon_restarts": self.node.host.restarts,
            "invite": str(await self.invite()),
        }

    async def why(self) -> dict[str, Any]:
        last = self.last
        return {
            "phase": self.phase,
            "now": self.clock.now(),
            "waits": self.waits.current(),
            "alone": last.alone if last else None,
            "rounds_alone": self.replica.rounds_alone if self.replica else 0,
            "missing": dict(last.missing) if last else {},
            "late": dict(last.late) if last else {},
            "counted": counted(last.contribution_bytes, last.contributed) if last else None,
            "sat_out": self._sat_out_last(),
            "leaving": self._leaving,
            "leaving_after_round": self._last_round() if self._leaving else None,
        }

    def _sat_out_last(self) -> dict[str, Any] | None:
        """The last round and the reason, if it is sat out."""
        sat_out = self._sat_out
        return sat_out if self.last is None or (sat_out and sat_out["round"] >= self.last.round) else None

    async def _leave(self) -> dict[str, Any]:
        self._leaving = True
        self._woken.set()
        if self.bench:
            self.bench.finish()
        if self.replica:
            for seat in self._seats.values():
                seat.replica.finish()
            self.replica.finish()
        return {"leaving_after_round": self._last_round()}

    def _last_round(self) -> Round | None:
        """The round in progress, after which a peer that is asked to leave does; None if it has not joined yet."""
        if self.replica is None:
            return self._round if self.pipeline or self.bench else None
        return self.replica.state.round if self.replica.state else None

    def _on_progress(self, done: int, total: int) -> None:
        """Of a state's download."""
        if self._fetched.passed(done, total):
            self.events.emit("swarm.state.progress", bytes=done, of=total)

    def _on_run_event(self, name: str, **fields: Any) -> None:
        """Of the run, not of a seat. Who has none counts the rounds in which it trained."""
        self.events.emit(name, **fields)
        counted = name == "incentives.round.scored" or (name == "swarm.pipeline.trained" and self.seat is None)
        if counted and self._rounds_left is not None:
            self._rounds_left -= 1
            if self._rounds_left == 0:
                self._leaving = True
                self._woken.set()

    def _on_event(self, seat: Seat, name: str, **fields: Any) -> None:
        """Of a seat's replica. Who moves applies two modules' rounds for a while; the new one's are reported."""
        self.events.emit(name, **({"module": seat.module} | fields if self.pipeline else fields))
        if name == "swarm.round.skipped":
            self._sat_out = {"round": fields["round"], "reason": fields["reason"]}
        if name != "swarm.round.applied":
            return
        if self.pipeline and fields["contributed"]:
            self.pipeline.counted(seat, fields["round"])
        if seat is self.seat and seat.replica.last:
            self._reports.put_nowait(seat.replica.last)
            if self._rounds_left is not None:
                self._rounds_left -= 1
                if self._rounds_left == 0:
                    seat.replica.finish()

    def _on_reading(self, done: int, total: int) -> None:
        """Of the training data, from the building thread."""
        if self._read.passed(done, total):
            self._loop.call_soon_threadsafe(partial(self.events.emit, "data.read", bytes=done, of=total))

    @contextmanager
    def _phase(self, phase: str, what: str, seconds: float, then: str) -> Iterator[None]:
        self.phase = phase
        self.events.emit("peer.phase", phase=phase, waiting_for=what, at_most_seconds=seconds)
        with self.waits.waiting(what, self.clock.now() + seconds, then):
            yield


__all__ = ["Peer", "PeerSettings", "Run"]
