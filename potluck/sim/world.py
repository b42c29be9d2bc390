"""A simulation: runs a plan's peers in virtual time, strikes with its faults, and measures.

`simulate(plan)` gives a `Report`. The same plan and seed give the same events, byte for byte (`Report.trace`), in any
process on any machine; with the `llama` stand-in only where PyTorch gives the same bits.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import random
import resource
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
import torch
from hivemind.dht.routing import DHTID

from potluck.dht.manifest import RunId
from potluck.dht.node import quieten_hivemind
from potluck.dht.records import RejectedRecord
from potluck.dht.storage import RecordStorage
from potluck.dht.validator import RecordValidator
from potluck.net.host import PeerId
from potluck.net.hosts.memory import Lan
from potluck.sim.dht_model import Shelf
from potluck.sim.hivemind import HivemindInVirtualTime
from potluck.sim.invariants import Watch
from potluck.sim.loop import VirtualLoop, run
from potluck.sim.network import Line, Nat, Network, Weather
from potluck.sim.peer import QUOTA_BYTES, SimPeer
from potluck.sim.plan import Fault, Plan
from potluck.sim.report import Report
from potluck.sim.stand_in import MODULE, Model
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.rounds import RoundRules, Trainer
from potluck.swarm.state import ReplicaState

#: UTC second at which every simulation begins.
EPOCH = 1_700_000_000.0
#: Peers that an invite names.
INVITED = 3
#: Rounds between two searches for objects in cycles.
COLLECT_ROUNDS = 5
#: Replicas among which drift is measured.
DRIFT_SAMPLE = 64

OnRound = Callable[[dict[str, Any]], None]


class World:
    """Everything of one simulation. `root`: where peers' disks lie."""

    def __init__(self, loop: VirtualLoop, plan: Plan, root: Path, on_round: OnRound | None, strict: bool) -> None:
        self.loop, self.plan, self.root = loop, plan, root
        self.dice = random.Random(f"world {plan.seed}")
        weather = Weather(**plan.weather.model_dump())
        self.network = Network(loop, plan.seed, weather)
        self.lan = Lan(self.network)
        self.epoch = EPOCH
        self.start_seconds = plan.join_over_rounds * plan.seconds
        self.genesis = EPOCH + math.ceil(self.start_seconds) + 5.0
        self.rules = RoundRules(
            clock=RoundClock(self.genesis, plan.seconds, plan.exchange_seconds),
            steps=plan.steps,
            group_size=plan.group_size,
            retain=plan.retain,
            fragments=plan.fragments,
            sync_limit=plan.sync_limit,
            clip=True,
        )
        self.run_id = RunId("a" * 52)
        self.watch = Watch(self.utc, strict)
        #: No node's: it has seen none of the records, and knows no time and no rate.
        self._validator = RecordValidator(
            self.run_id, max_ahead_seconds=1e12, clock=lambda: 0.0, signer_burst=1e9, signer_per_second=1e9
        )
        self.peers: list[SimPeer] = []
        self.report = Report(plan=plan.model_dump(mode="json"))
        self._on_round = on_round
        self._trace = hashlib.blake2b(digest_size=16)
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._applied: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self._contributed: dict[PeerId, float] = {}
        self._missed: Counter[str] = Counter()
        self._sent_before: dict[PeerId, int] = {}
        self._counts: dict[str, dict[PeerId, int]] = {}
        self.shelf: Shelf = {}
        #: What each DHT operation took: see `SimPeer.measured`.
        self.operations: list[tuple[str, int, int, int, float]] = []
        self.living = 0
        self._model = Model(plan)
        self.layout = self._model.layout
        self.held_out = self._model.held_out
        velocity = self.layout.zeros() if plan.momentum else None
        self.theta_0 = ReplicaState(MODULE, self.layout, Round(0), self._model.theta_0, velocity)

    def utc(self) -> float:
        return EPOCH + self.loop.time()

    # ---- the peers' world -----------------------------------------------------------------------------------

    def make_trainer(self, peer: SimPeer) -> Trainer:
        return self._model.trainer(peer)

    def batches(self, peer: PeerId, round_: Round) -> Iterator[torch.Tensor]:
        return self._model.batches(peer, round_)

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def event(self, peer: SimPeer, name: str, fields: dict[str, Any]) -> None:
        line = msgspec.json.encode([round(self.loop.time(), 9), peer.number, name, fields], order="deterministic")
        self._trace.update(line)
        self.report.events += 1
        self.watch.event(peer.id, name, fields)
        match name:
            case "swarm.round.applied":
                self._applied[fields["round"]].append(fields)
                peer.applied.add(fields["round"])
                if fields["contributed"]:
                    peer.contributed.add(fields["round"])
                if fields["contributed"] and peer.id not in self._contributed:
                    self._contributed[peer.id] = self.loop.time()
                    if peer.born > self.start_seconds:
                        self.report.join_rounds.append((self.loop.time() - peer.born) / self.plan.seconds)
            case "swarm.round.skipped":
                self._missed[fields["reason"]] += 1
            case "swarm.round.missed":
                self._missed["out of sync" if fields["out_of_sync"] else "away"] += max(1, fields["rounds"])

    # ---- the course of events -------------------------------------------------------------------------------

    async def run(self) -> Report:
        plan = self.plan
        began, cpu_began = time.perf_counter(), time.process_time()
        for number in range(plan.peers):
            at = 0.0 if number == 0 else self.dice.uniform(0.5, max(0.6, self.start_seconds))
            self.loop.call_at(at, self._arrive)
        for number, fault in enumerate(plan.fault):
            self.loop.call_at(self._when(fault), self._strike, fault, random.Random(f"fault {plan.seed} {number}"))
        if plan.churn.arrivals_per_round > 0:
            self.background(self._churn())
        for round_ in range(plan.rounds):
            await self._until(round_ + 1.05)
            self._measure(round_)
        await self._end()
        self.report.cpu_seconds = time.process_time() - cpu_began
        self._conclude(time.perf_counter() - began)
        return self.report

    def _when(self, fault: Fault) -> float:
        return self.genesis - EPOCH + (fault.round + fault.at) * self.plan.seconds

    async def _until(self, rounds: float) -> None:
        await asyncio.sleep(self.genesis - EPOCH + rounds * self.plan.seconds - self.loop.time())

    def _arrive(self) -> SimPeer:
        peer = SimPeer(self, len(self.peers), self._line())
        self.peers.append(peer)
        self.living += 1
        peer.start(self._bootstrap())
        if self.plan.churn.session_rounds > 0 and peer.number > 0:
            session = self.plan.churn.session_rounds * math.exp(self.dice.gauss(0, 1.5))
            self.loop.call_later(session * self.plan.seconds, self._leave, peer)
        return peer

    def _leave(self, peer: SimPeer) -> None:
        if peer.alive and peer.replica:
            peer.replica.finish()

    def _bootstrap(self) -> list[PeerId]:
        """An invite: the organizer while it lives, and others whom `potluck status` would name."""
        living = [peer.id for peer in self.peers if peer.host and peer.host.alive]
        first = living[:1] if self.peers and self.peers[0].alive else []
        return list(dict.fromkeys([*first, *self.dice.sample(living, min(INVITED - len(first), len(living)))]))

    def _line(self) -> Line:
        lines, dice = self.plan.lines, self.dice
        spread = math.exp(dice.gauss(0, lines.spread))
        up, down = (mbit * 125_000 * spread or None for mbit in (lines.up_mbit, lines.down_mbit))
        drawn = dice.random()
        nat: Nat = "cone" if drawn < lines.cone else "symmetric" if drawn < lines.cone + lines.symmetric else "public"
        region = dice.randrange(lines.regions)
        # The first peer is the organizer, who opened a port.
        return Line(up, down, region, nat if self.peers else "public")

    async def _churn(self) -> None:
        churn, seconds = self.plan.churn, self.plan.seconds
        while True:
            day = 1 + churn.wave * math.sin(2 * math.pi * self.loop.time() / (churn.wave_rounds * seconds))
            await asyncio.sleep(self.dice.expovariate(max(1e-9, churn.arrivals_per_round * day)) * seconds)
            self._arrive()

    # ---- faults ---------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault, dice: random.Random) -> None:
        if fault.kind == "join":
            count = fault.count or max(1, round((fault.share or 0) * len(self.peers)))
            over = max(0.0, fault.rounds) * self.plan.seconds
            for _ in range(count):
                self.loop.call_later(dice.uniform(0, over), self._arrive)
            return
        if fault.kind == "heal":
            self.network.heal()
            return
        if fault.kind == "organizer_dies":
            self.peers[0].crash()
            return
        victims = self._victims(fault, dice)
        if fault.kind == "partition":
            self.network.partition([p.id for p in self.peers if p not in victims], [p.id for p in victims])
            if fault.rounds:
                self.loop.call_later(fault.rounds * self.plan.seconds, self.network.heal)
            return
        for victim in victims:
            victim.struck = True
            self._hit(victim, fault, dice)

    def _victims(self, fault: Fault, dice: random.Random) -> list[SimPeer]:
        if fault.peer is not None:
            return [self.peers[fault.peer]] if fault.peer < len(self.peers) else []
        if fault.kind == "restart":
            candidates = [peer for peer in self.peers if not peer.alive]
        else:
            candidates = [peer for peer in self.peers if peer.alive]
        count = fault.count or round((fault.share or 0.0) * len(candidates))
        return sorted(dice.sample(candidates, min(count, len(candidates))), key=lambda peer: peer.number)

    def _hit(self, peer: SimPeer, fault: Fault, dice: random.Random) -> None:
        undo: Callable[[], None] | None = None
        match fault.kind:
            case "crash":
                peer.crash()
                undo = lambda: self._restart(peer)  # noqa: E731
            case "restart":
                self._restart(peer)
            case "slow":
                peer.pace.slowness = fault.factor
                undo = lambda: setattr(peer.pace, "slowness", 1.0)  # noqa: E731
            case "freeze":
                peer.freeze()
                undo = peer.thaw
            case "lie":
                peer.lie = fault.lie
                undo = lambda: setattr(peer, "lie", None)  # noqa: E731
            case "clock_skew":
                error = fault.seconds if fault.peer is not None else dice.uniform(-fault.seconds, fault.seconds)
                peer.skew = error
            case "disk_full":
                self._fill_disk(peer, True)
                undo = lambda: self._fill_disk(peer, False)  # noqa: E731
        if undo and fault.rounds:
            self.loop.call_later(fault.rounds * self.plan.seconds, undo)

    def _restart(self, peer: SimPeer) -> None:
        if not peer.alive:
            peer.start(self._bootstrap())

    def _fill_disk(self, peer: SimPeer, full: bool) -> None:
        peer.disk_full = full
        if peer.store:
            peer.store.quota_bytes = 0 if full else QUOTA_BYTES
        if not full and peer.ended and not peer.alive:
            self._restart(peer)  # the volunteer made room

    # ---- measuring ------------------------------------------------------------------------------------------

    def _measure(self, round_: int) -> None:
        applied = self._applied.pop(round_, [])
        living = [peer for peer in self.peers if peer.alive]
        self.living = len(living)
        self._check_memory(living)
        sent = {peer.id: self.network.traffic(peer.id).sent for peer in self.peers}
        spent = [sent[p.id] - self._sent_before.get(p.id, 0) for p in living]
        self._sent_before = sent
        self.report.operations, self.operations = self.operations, []
        row = {
            "round": round_,
            "peers": len(living),
            "applied": len(applied),
            "contributed": sum(1 for each in applied if each["contributed"]),
            "alone": sum(1 for each in applied if each["alone"]),
            "loss": float(np.mean([each["loss"] for each in applied])) if applied else None,
            "group": float(np.mean([len(each["group"]) for each in applied])) if applied else 0.0,
            "digests": len({each["digest"] for each in applied}),
            "shards": max((each["shards"] for each in applied), default=0),
            "drift": self._drift(living),
            "bytes_median": median(spent) if spent else 0,
            "bytes_max": max(spent, default=0),
            "dht_operations": self._since("operations", living, lambda peer: peer.dht_operations),
            "dht_calls": self._since("calls", living, lambda peer: peer.host.calls if peer.host else 0),
            "dht_bytes": self._since("bytes", living, lambda peer: peer.host.call_bytes if peer.host else 0),
        }
        self.report.rounds.append(row)
        if self._on_round:
            self._on_round(row)
        if round_ % COLLECT_ROUNDS == COLLECT_ROUNDS - 1:
            gc.collect()

    def _since(self, what: str, living: list[SimPeer], count: Callable[[SimPeer], int]) -> float:
        """Median over peers of what was counted since the last round; a restarted host counts anew."""
        before = self._counts.setdefault(what, {})
        now = {peer.id: count(peer) for peer in living}
        grown = [n - before[peer] for peer, n in now.items() if 0 <= before.get(peer, -1) <= n]
        self._counts[what] = now
        return float(median(grown)) if grown else 0.0

    def _drift(self, living: list[SimPeer]) -> float:
        """Standard deviation over replicas, averaged (root mean square) over parameters."""
        thetas = [p.replica.state.theta for p in living[:DRIFT_SAMPLE] if p.replica and p.replica.state]
        return float(np.sqrt(np.mean(np.var(np.stack(thetas), axis=0)))) if len(thetas) > 1 else 0.0

    def _check_memory(self, living: list[SimPeer]) -> None:
        for peer in living:
            if peer.store and peer.store.used_bytes > QUOTA_BYTES:
                self.watch.say(peer.id, f"{peer.store.used_bytes} bytes of blobs")
            if peer.rpc and peer.rpc._total.buffered > peer.rpc.limits.buffered_bytes_total:
                self.watch.say(peer.id, "requests hold more memory than allowed")
            if peer.dht is not None and len(peer.dht.protocol.storage) > 4096:
                self.watch.say(peer.id, "the DHT's storage holds more keys than allowed")

    def watch_records(self, peer: PeerId, storage: RecordStorage) -> None:
        """From now on every record that this storage takes must verify."""
        store = storage.store_subkey

        def watched(key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
            stored = store(key, subkey, value, expiration_time)
            if stored:
                self._check_record(peer, key, subkey, value, expiration_time)
            return stored

        storage.store_subkey = watched  # type: ignore[method-assign]

    def _check_record(self, peer: PeerId, key: DHTID, subkey: str, value: bytes, expires_at: float) -> None:
        try:
            self._validator.open(key.to_bytes(), msgspec.msgpack.encode(subkey), value, expires_at)
        except RejectedRecord as error:
            self.watch.say(peer, f"holds a record that does not verify: {error}")

    def check_records(self) -> None:
        """Every record that any node holds verifies."""
        for peer in self.peers:
            if peer.alive and peer.dht is not None:
                for key, held in peer.dht.protocol.storage.items():
                    for subkey, (value, expires_at) in held.value.items():
                        self._check_record(peer.id, key, subkey, value, expires_at)

    def _survivors_missed(self) -> int:
        """The most rounds that any peer did not apply, of those that lived on and that no fault struck."""
        last = self.plan.rounds - 1
        gaps = [
            len(set(range(min(peer.applied), last + 1)) - peer.applied)
            for peer in self.peers
            if peer.alive and not peer.struck and peer.applied
        ]
        return max(gaps, default=0)

    async def _end(self) -> None:
        self.report.survivors_missed = self._survivors_missed()
        self.check_records()
        for peer in self.peers:
            if peer.alive:
                peer.crash()
            else:
                peer.check_disk()
        await asyncio.sleep(1.0)

    def _conclude(self, seconds: float) -> None:
        report, plan = self.report, self.plan
        rows = [row for row in report.rounds if row["loss"] is not None]
        report.missed = dict(sorted(self._missed.items()))
        report.violations = self.watch.violations
        report.peers_seen = len(self.peers)
        if rows:
            report.loss_start, report.loss_end = rows[0]["loss"], rows[-1]["loss"]
        late = rows[len(rows) // 2 :]  # what joining cost is over by then
        report.bytes_per_peer_per_round = median(row["bytes_median"] for row in late) if late else 0.0
        for name in ("operations", "bytes"):
            rate = median(row[f"dht_{name}"] for row in late) if late else 0.0
            setattr(report, f"dht_{name}_per_peer_per_round", rate)
        report.heal_rounds = self._healed()
        report.trained = (
            f"a stand-in: a quadratic of {self.layout.size} parameters"
            if plan.model == "quadratic"
            else f"a real llama of {self.layout.size} parameters"
        )
        self._trace.update(msgspec.json.encode(report.rounds, order="deterministic"))
        report.trace = self._trace.hexdigest()
        report.seconds = round(seconds, 2)
        report.peak_memory_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)

    def _healed(self) -> float | None:
        """Rounds from the last fault's end until all who applied a round held one state; None if never."""
        ends = [f.round + f.at + f.rounds for f in self.plan.fault]
        if not ends:
            return None
        last = max(ends)
        for row in self.report.rounds:
            if row["round"] >= last and row["digests"] == 1:
                return float(row["round"] - math.floor(last))
        return None


def simulate(plan: Plan, on_round: OnRound | None = None, strict: bool = False) -> Report:
    """Run a plan to its end. Blocking; leaves nothing behind. `strict` raises Violation at the first one."""
    quieten_hivemind()
    random.seed(plan.seed)  # hivemind draws from the global generator
    # Cycles are few, and looking for them among thousands of peers' objects took half of the time (`_measure`).
    gc.freeze()
    gc.disable()
    root = Path(tempfile.mkdtemp(prefix="potluck-sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        return run(lambda loop: _simulate(loop, plan, root, on_round, strict))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        gc.enable()
        gc.unfreeze()


async def _simulate(loop: VirtualLoop, plan: Plan, root: Path, on_round: OnRound | None, strict: bool) -> Report:
    loop.set_exception_handler(_ignore_lost_tasks)
    with HivemindInVirtualTime(lambda: EPOCH + loop.time()):
        return await World(loop, plan, root, on_round, strict).run()


def _ignore_lost_tasks(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """hivemind loses tasks of searches that were cut short. Everything else is said."""
    if "was destroyed but it is pending" not in context.get("message", ""):
        loop.default_exception_handler(context)
