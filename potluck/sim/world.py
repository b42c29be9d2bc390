"""A simulation: runs a plan's peers in virtual time, strikes with its faults, and measures.

`simulate(plan)` gives a `Report`. The same plan and seed give the same events, byte for byte (`Report.trace`), in any
process on any machine; with the `llama` stand-in only where PyTorch gives the same bits.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import logging
import math
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
from hivemind.dht.routing import DHTID

from potluck.dht.manifest import RunId
from potluck.dht.node import quieten_hivemind
from potluck.dht.records import RejectedRecord
from potluck.dht.storage import MAX_BYTES, MAX_KEYS, RecordStorage
from potluck.dht.validator import RecordValidator
from potluck.incentives.judge import Judge
from potluck.net.host import PeerId
from potluck.net.hosts.memory import Lan
from potluck.sim.dht_model import Shelf
from potluck.sim.faults import Faults
from potluck.sim.hivemind import HivemindInVirtualTime
from potluck.sim.invariants import Complaints, Watch
from potluck.sim.loop import VirtualLoop, run
from potluck.sim.network import Line, Nat, Network, Weather
from potluck.sim.peer import QUOTA_BYTES, SimPeer, identity_of
from potluck.sim.plan import Fault, Plan
from potluck.sim.report import Report
from potluck.sim.stand_in import MODULE, Model
from potluck.swarm.codecs import make_codec
from potluck.swarm.follower import RoundRules
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.rounds import Trainer
from potluck.swarm.state import ReplicaState

#: UTC second at which every simulation begins.
EPOCH = 1_700_000_000.0
#: Peers that an invite names.
INVITED = 3
#: Rounds between two searches for objects in cycles.
COLLECT_ROUNDS = 5
#: Peers from which on the process is large.
LARGE = 1000
_HUGE = 2**21
_ROOT = "potluck-sim"
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
        self._model = Model(plan)
        self.start_seconds = plan.join_over_rounds * plan.seconds
        self.genesis = EPOCH + math.ceil(self.start_seconds) + 5.0
        self.rules = RoundRules(
            clock=RoundClock(self.genesis, plan.seconds, plan.exchange_seconds),
            steps=plan.steps,
            step_tokens=self._model.step_tokens,
            group_size=plan.group_size,
            retain=plan.retain,
            fragments=plan.fragments,
            sync_limit=plan.sync_limit,
            clip=plan.clip,
            rule=plan.rule,
            liars=plan.liars,
            sliced=plan.sliced,
            stream=plan.stream,
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
        self._root_name = str(root).encode()
        self._trace = hashlib.blake2b(digest_size=16)
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._applied: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self._contributed: dict[PeerId, float] = {}
        self._missed: Counter[str] = Counter()
        self._missed_before: Counter[str] = Counter()
        self._sent_before: dict[PeerId, int] = {}
        self._counts: dict[str, dict[PeerId, int]] = {}
        self._served: dict[PeerId, int] = {}
        self.shelf: Shelf = {}
        #: What each DHT operation took: see `SimPeer.measured`.
        self.operations: list[tuple[str, int, int, int, float]] = []
        self.living = 0
        self.layout = self._model.layout
        self.held_out = self._model.held_out
        velocity = self.layout.zeros() if plan.momentum else None
        #: Trust in each validator.
        self.stake = {identity_of(plan.seed, n).peer_id: 1.0 for n in range(plan.peers - plan.validators, plan.peers)}
        self.theta_0 = ReplicaState(MODULE, self.layout, Round(0), self._model.theta_0, velocity)

    def utc(self) -> float:
        return EPOCH + self.loop.time()

    # ---- the peers' world -----------------------------------------------------------------------------------

    def make_trainer(self, peer: SimPeer) -> Trainer:
        return self._model.trainer(peer)

    def batches(self, peer: PeerId, round_: Round, state: str) -> Iterator[torch.Tensor]:
        return self._model.batches(peer, round_, state)

    def make_judge(self, me: PeerId) -> Judge:
        testable = self.plan.model != "quadratic"
        model, codec = self._model, make_codec(self.plan.codec, self.plan.codec_parameters)
        return Judge(self.run_id, me, model.evaluator(), model.corpus, model.assigned, codec=codec, testable=testable)

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.watch.say("the simulation", f"a task in the background ended: {error!r}")

    def event(self, peer: SimPeer, name: str, fields: dict[str, Any]) -> None:
        line = msgspec.json.encode([round(self.loop.time(), 9), peer.number, name, fields], order="deterministic")
        self._trace.update(line.replace(self._root_name, b""))
        self.report.events += 1
        self.watch.event(peer.id, name, fields)
        match name:
            case "swarm.slices.lied":
                self.report.named.setdefault(self._numbers()[fields["peer"]], set()).add(peer.number)
            case "swarm.round.applied":
                self._check_memory(peer)
                self._applied[fields["round"]].append(fields)
                peer.applied.add(fields["round"])
                if fields["contributed"]:
                    peer.contributed.add(fields["round"])
                if fields["contributed"] and peer.id not in self._contributed:
                    self._contributed[peer.id] = self.loop.time()
                    if peer.born > self.start_seconds:
                        self.report.join_rounds.append((self.loop.time() - peer.born) / self.plan.seconds)
            case "incentives.round.scored":
                self._scored(peer, fields)
            case "swarm.round.skipped":
                self._missed[fields["reason"]] += 1
            case "swarm.round.missed":
                self._missed["out of sync" if fields["out_of_sync"] else "away"] += max(1, fields["rounds"])

    def _numbers(self) -> dict[PeerId, int]:
        return {peer.id: peer.number for peer in self.peers}

    def _scored(self, validator: SimPeer, fields: dict[str, Any]) -> None:
        numbers = self._numbers()
        by_number = {
            what: {numbers[p]: v for p, v in fields[what].items()}
            for what in ("shares", "verdicts", "refused", "paid", "earned")
        }
        self.report.scores.append(
            {"round": fields["round"], "validator": validator.number, "error": fields["error"], **by_number}
        )

    # ---- the course of events -------------------------------------------------------------------------------

    async def run(self) -> Report:
        plan = self.plan
        self._began = time.perf_counter(), time.process_time()
        for number in range(plan.peers):
            at = 0.0 if number == 0 else self.dice.uniform(0.5, max(0.6, self.start_seconds))
            self.loop.call_at(at, self.arrive)
        faults = Faults(self)
        for number, fault in enumerate(plan.fault):
            self.loop.call_at(self._when(fault), faults.strike, fault, random.Random(f"fault {plan.seed} {number}"))
        if plan.churn.arrivals_per_round > 0:
            self.background(self._churn())
        for round_ in range(plan.rounds):
            await self._until(round_ + 1.05)
            self._measure(round_)
        await self._end()
        return self._conclude()

    def interrupted(self) -> Report:
        """The report of the rounds so far."""
        self.report.interrupted = True
        return self._conclude()

    def _when(self, fault: Fault) -> float:
        return self._start_of(fault.round + fault.at)

    def _start_of(self, rounds: float) -> float:
        """Loop time."""
        return self.genesis - EPOCH + rounds * self.plan.seconds

    async def _until(self, rounds: float) -> None:
        await asyncio.sleep(self._start_of(rounds) - self.loop.time())

    def arrive(self) -> SimPeer:
        peer = SimPeer(self, len(self.peers), self._line())
        self.peers.append(peer)
        self.living += 1
        peer.start(self.bootstrap())
        if self.plan.churn.session_rounds > 0 and peer.number > 0:
            session = self.plan.churn.session_rounds * math.exp(self.dice.gauss(0, 1.5))
            self.loop.call_later(session * self.plan.seconds, self._leave, peer)
        return peer

    def _leave(self, peer: SimPeer) -> None:
        peer.left = True
        if peer.alive and peer.replica:
            peer.replica.finish()
        elif peer.alive:
            peer.crash()

    def bootstrap(self) -> list[PeerId]:
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
            day = 1 + churn.wave * math.sin(2 * math.pi * self.loop.time() / churn.day_seconds)
            await asyncio.sleep(self.dice.expovariate(max(1e-9, churn.arrivals_per_round * day)) * seconds)
            self.arrive()

    # ---- measuring ------------------------------------------------------------------------------------------

    def _measure(self, round_: int) -> None:
        applied = self._applied.pop(round_, [])
        living = [peer for peer in self.peers if peer.alive and not peer.validates]
        self.living = len(living)
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
            "missed": dict(sorted((self._missed - self._missed_before).items())),
            "shards": max((each["shards"] for each in applied), default=0),
            "drift": self._drift(living),
            "bytes_median": median(spent) if spent else 0,
            "bytes_max": max(spent, default=0),
            "served_max": self._served_max(living),
            "dht_operations": self._since("operations", living, lambda peer: peer.dht_operations),
            "dht_calls": self._since("calls", living, lambda peer: peer.host.calls if peer.host else 0),
            "dht_bytes": self._since("bytes", living, lambda peer: peer.host.call_bytes if peer.host else 0),
        }
        self._missed_before = self._missed.copy()
        self.report.rounds.append(row)
        if self._on_round:
            self._on_round(row)
        if len(self.peers) >= LARGE:
            _use_huge_pages()
        if not gc.isenabled() and round_ % COLLECT_ROUNDS == COLLECT_ROUNDS - 1:
            gc.collect()

    def _since(self, what: str, living: list[SimPeer], count: Callable[[SimPeer], int]) -> float:
        """Median over peers of what was counted since the last round; a restarted host counts anew."""
        before = self._counts.setdefault(what, {})
        now = {peer.id: count(peer) for peer in living}
        grown = [n - before[peer] for peer, n in now.items() if 0 <= before.get(peer, -1) <= n]
        self._counts[what] = now
        return float(median(grown)) if grown else 0.0

    def _served_max(self, living: list[SimPeer]) -> int:
        """Most bytes that any peer sent others since the last round, the directory's left out."""
        before, now = self._served, {peer.id: peer.rpc.bytes_sent for peer in living if peer.rpc}
        self._served = now
        return max((n - before.get(peer, 0) for peer, n in now.items() if n >= before.get(peer, 0)), default=0)

    def _drift(self, living: list[SimPeer]) -> float:
        """Standard deviation over replicas, averaged (root mean square) over parameters."""
        thetas = [p.replica.state.theta for p in living[:DRIFT_SAMPLE] if p.replica and p.replica.state]
        return float(np.sqrt(np.mean(np.var(np.stack(thetas), axis=0)))) if len(thetas) > 1 else 0.0

    def _check_memory(self, peer: SimPeer) -> None:
        if peer.store and peer.store.used_bytes > QUOTA_BYTES:
            self.watch.say(peer.id, f"{peer.store.used_bytes} bytes of blobs")
        if peer.rpc and peer.rpc.buffered_bytes > peer.rpc.limits.buffered_bytes_total:
            self.watch.say(peer.id, f"{peer.rpc.buffered_bytes} bytes of requests")
        if peer.dht is not None:
            storage = peer.dht.protocol.storage
            if len(storage) > MAX_KEYS or storage.total_bytes > MAX_BYTES:
                self.watch.say(peer.id, f"{storage.total_bytes} bytes under {len(storage)} keys in the DHT's storage")

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

    def _survivors_missed(self, done: Callable[[SimPeer], set[int]]) -> int:
        """The most rounds that are not in `done`, of any peer that lived on and that no fault struck."""
        last = self.plan.rounds - 1
        gaps = [len(set(range(self._first_round(peer), last + 1)) - done(peer)) for peer in self._survivors()]
        return max(gaps, default=0)

    def _survivors(self) -> list[SimPeer]:
        """Who was there long enough to have joined: three rounds, for those who arrived late."""
        end = self._start_of(self.plan.rounds)
        return [
            peer
            for peer in self.peers
            if not (peer.struck or peer.left or peer.validates)
            and (peer.applied or peer.born < end - 3 * self.plan.seconds)
        ]

    def _first_round(self, peer: SimPeer) -> int:
        """From here on it is expected to take part."""
        return min(peer.applied) if peer.applied else max(0, self.rules.clock.round_at(peer.born + EPOCH))

    async def _end(self) -> None:
        self.report.survivors_missed = self._survivors_missed(lambda peer: peer.applied)
        self.report.survivors_sat_out = self._survivors_missed(lambda peer: peer.contributed)
        self.check_records()
        for peer in self.peers:
            if peer.alive:
                peer.crash()
            else:
                peer.check_disk()
        await asyncio.sleep(1.0)

    def _conclude(self) -> Report:
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
        wall, cpu = self._began
        report.seconds = round(time.perf_counter() - wall, 2)
        report.cpu_seconds = round(time.process_time() - cpu, 2)
        report.peak_memory_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        return report

    def _healed(self) -> float | None:
        """Rounds from the last fault's end until the swarm is whole again, and stays so for two rounds; None if never.

        Whole: nearly all apply a round and hold one state, or, in several groups, have drifted no farther than before.
        """
        faults = [fault for fault in self.plan.fault if fault.kind != "join"]
        if not faults:
            return None
        first, last = min(f.round for f in faults), max(f.round + f.at + f.rounds for f in faults)
        drift = max((row["drift"] for row in self.report.rounds[: max(1, first)]), default=0.0)

        def whole(row: dict[str, Any]) -> bool:
            together = row["digests"] == 1 if row["shards"] == 1 else row["drift"] <= 1.2 * drift
            return bool(together and row["peers"] > 0 and row["applied"] >= 0.9 * row["peers"])

        after = [row for row in self.report.rounds if row["round"] >= last]
        for row, following in zip(after, [*after[1:], after[-1]] if after else [], strict=True):
            if whole(row) and whole(following):
                return float(row["round"] - math.floor(last))
        return None


def simulate(plan: Plan, on_round: OnRound | None = None, strict: bool = False) -> Report:
    """Run a plan to its end. Blocking; leaves nothing behind. `strict` raises Violation at the first one.

    Ctrl-C ends it early: the report has the rounds so far, and `interrupted` is set.
    """
    plan = Plan.of(plan.model_dump())
    quieten_hivemind()
    random.seed(plan.seed)  # hivemind draws from the global generator
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)  # millions of short-lived objects, few of them in cycles
    if plan.dht == "model":
        # Even fewer there, and looking for them among ten thousand peers' objects took half of the time (`_measure`).
        gc.disable()
    root = _new_root()
    worlds: list[World] = []
    handler = signal.getsignal(signal.SIGINT)
    try:
        return run(lambda loop: _simulate(worlds, loop, plan, root, on_round, strict))
    except KeyboardInterrupt:
        if not worlds:
            raise
        return worlds[0].interrupted()
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, handler)
        shutil.rmtree(root, ignore_errors=True)
        gc.set_threshold(*thresholds)
        gc.enable()
        gc.unfreeze()


def _use_huge_pages() -> None:
    """Of 2 MB for what is allocated by now, where Linux has them: among gigabytes of small objects most accesses miss
    the processor's table of pages. Rounds of 1,500 peers take 15 % less time."""
    try:
        advise, lines = ctypes.CDLL(None).madvise, Path("/proc/self/maps").read_text().splitlines()
    except (OSError, AttributeError):
        return
    for line in lines:
        where, rights, _, _, _, *name = line.split()
        start, end = (int(number, 16) for number in where.split("-"))
        start, end = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if rights == "rw-p" and name in ([], ["[heap]"]) and start < end:
            for advice in (14, 25):  # MADV_HUGEPAGE: what comes; MADV_COLLAPSE (Linux 6.1): what is there
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _new_root() -> Path:
    """A folder for the peers' disks, in memory where possible. What killed simulations left is removed."""
    where = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    for old in where.glob(f"{_ROOT}-*"):
        pid = old.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_ROOT}-{os.getpid()}-", dir=where))


async def _simulate(
    worlds: list[World], loop: VirtualLoop, plan: Plan, root: Path, on_round: OnRound | None, strict: bool
) -> Report:
    world = World(loop, plan, root, on_round, strict)
    worlds.append(world)
    with suppress(ValueError):  # not in the main thread: nobody's Ctrl-C comes here
        signal.signal(signal.SIGINT, lambda *_: loop.interrupt())

    def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """hivemind loses tasks of searches that were cut short. Everything else is a bug."""
        if "was destroyed but it is pending" not in context["message"]:
            world.watch.say("the loop", f"{context['message']}: {context.get('exception')!r}")

    loop.set_exception_handler(failed)
    complaints, log = Complaints(world.watch), logging.getLogger("potluck")
    log.addHandler(complaints)
    try:
        with HivemindInVirtualTime(lambda: EPOCH + loop.time()):
            return await world.run()
    finally:
        log.removeHandler(complaints)
