"""This peer's part in a pipeline: it serves one stage, and trains through whoever serves the others."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from potluck.dht.directory import Directory
from potluck.dht.records import Replica, Signed
from potluck.dht.shards import shard_of
from potluck.errors import HardwareError, NetworkError, PotluckError, UserError
from potluck.net.host import PeerId
from potluck.peer.build import rules_of, settle_seconds, shapes_of
from potluck.peer.hardware import free_memory
from potluck.peer.seat import Around, Keeper, Seat
from potluck.swarm.data import Corpus, assigned_offsets
from potluck.swarm.keepers import COPIES, kept_by
from potluck.swarm.model import ModelSpec
from potluck.swarm.phases import Round
from potluck.swarm.rebalance import PERIOD_SECONDS, RULES, PeerLoad, decide, newcomer
from potluck.swarm.server import StageServer
from potluck.swarm.stage import stage_layout, stage_names, stage_work
from potluck.swarm.stage_trainer import StageTrainer
from potluck.swarm.state import ReplicaState
from potluck.swarm.trainer import PipelineTrainer

READ_SECONDS: Final = 5.0
#: Shards of each stage that a trainer knows: enough servers to choose from.
READ_SHARDS: Final = 3
REFRESH_SECONDS: Final = 10.0
#: A period of rebalancing is not longer than this many rounds.
PERIOD_ROUNDS: Final = 4
#: A peer's throughput counts as at most this many times the median.
MOST_OF_USUAL: Final = 16.0
#: A keeper needs room for two states, while one becomes the next.
MEMORY_FACTOR: Final = 3
#: Names the samples that a trainer draws, whatever stage it serves.
TRAINER_MODULE: Final = "trainer"


async def read_stages(directory: Directory, stages: int, shards: Sequence[int] = (0,)) -> list[list[Signed[Replica]]]:
    """Who serves each stage, by the directory. Of a large stage its `shards` are samples, each of a group or two."""

    async def read(name: str) -> list[Signed[Replica]]:
        views = await asyncio.gather(
            *(directory.replicas(name, shard, timeout_seconds=READ_SECONDS) for shard in shards)
        )
        return [record for view in views for record in view.records]

    return list(await asyncio.gather(*map(read, stage_names(stages))))


def wire(driver: PipelineTrainer, rows: Sequence[Sequence[Signed[Replica]]], now: float, longer: float = 0.0) -> None:
    """Make a trainer know who serves each stage, until the announcements expire or `longer` seconds beyond that."""
    for wiring, row in zip(driver.wirings, rows, strict=True):
        wiring.update({one.peer: one.expires_at + longer for one in row if one.record.serves}, now)


def shards_to_read(me: PeerId, shards: int) -> list[int]:
    """This peer's own shard, in which the others look for it, and the next few: keepers are in the first."""
    own = shard_of(me, 0, shards)
    return sorted({0, *((own + i) % shards for i in range(READ_SHARDS))})


def table_of(rows: Sequence[Sequence[Signed[Replica]]], me: PeerId | None = None) -> list[dict[PeerId, PeerLoad]]:
    """What rebalancing goes by, without `me`. Who has not measured yet counts as the middle of those who have."""
    serving = [[one for one in row if not one.record.keeps and one.peer != me] for row in rows]
    measured = [one.record.throughput for row in serving for one in row if one.record.throughput > 0]
    usual = statistics.median(measured) if measured else 1.0

    def load_of(record: Replica) -> PeerLoad:
        # A word is believed within bounds: nobody empties the other stages by claiming to be a thousand peers.
        throughput = min(record.throughput or usual, MOST_OF_USUAL * usual)
        return PeerLoad(min(1.0, record.load), throughput, record.moving, record.bound)

    return [{one.peer: load_of(one.record) for one in row} for row in serving]


async def choose_stage(
    directory: Directory,
    me: PeerId,
    spec: ModelSpec,
    wanted: int | None,
    held: set[str],
    check_fits: Callable[[str], None],
) -> str:
    """The stage asked for, else one whose checkpoint lies here, else, of those that fit into this machine, where
    another replica is missed most. `check_fits` raises HardwareError, and so does this where none fits."""
    names = stage_names(spec.stages)
    if wanted is not None:
        if wanted >= len(names):
            raise UserError(f"--stage {wanted}: this run has the stages 0 to {len(names) - 1}")
        return names[wanted]
    try:
        found = await read_stages(directory, len(names))
    except PotluckError:
        found = [[] for _ in names]
    mine = [name for name in names if name in held]
    if mine:
        return min(mine, key=lambda name: len(found[names.index(name)]))
    # In a thread: whoever looks at a model first imports transformers, for seconds.
    able = await asyncio.to_thread(_fitting, names, check_fits)
    return names[newcomer(me, table_of(found, me), await asyncio.to_thread(stage_work, spec), able)]


def _fitting(names: Sequence[str], check_fits: Callable[[str], None]) -> list[int]:
    able, reason = [], None
    for number, name in enumerate(names):
        try:
            check_fits(name)
            able.append(number)
        except HardwareError as error:
            reason = error
    if reason and not able:
        raise reason
    return able


class Pipeline:
    """`run` trains while the rounds do; `serve` a seat from the start, or none. `on_move(module)` is called when this
    peer is missed more elsewhere; `bound`: it never is."""

    def __init__(self, around: Around, corpus: Corpus, on_move: Callable[[str], None], *, bound: bool) -> None:
        manifest = around.manifest
        self._around, self._corpus, self._on_move, self._bound = around, corpus, on_move, bound
        self._now, self._emit, self._me = around.clock.now, around.emit, around.peer
        self._names, settings = stage_names(manifest.model.stages), manifest.pipeline
        rpc, shapes = around.node.rpc, shapes_of(manifest)
        self._server = StageServer(rpc, shapes)
        self.driver = PipelineTrainer(
            rpc, len(self._names), shapes, in_flight=settings.in_flight, direct=settings.direct, now=self._now
        )
        self._clock = rules_of(manifest).clock
        self._period_seconds = min(PERIOD_SECONDS, PERIOD_ROUNDS * self._clock.seconds)
        self._work = stage_work(manifest.model)
        self._replicas: list[list[Signed[Replica]]] = [[] for _ in self._names]
        self._seat: Seat | None = None
        self._coming: str | None = None
        self._missing: list[str] = []
        self._keepers: dict[str, tuple[Keeper, asyncio.Task[None]]] = {}
        self._microbatch_seconds = 0.0
        self._drawn: tuple[Round, int] = (Round(-1), 0)
        self._busy = (time.monotonic(), 0.0)
        self._decided = self._moved = -(10**9)

    # ---- serving --------------------------------------------------------------------------------------------

    def serve(self, seat: Seat) -> None:
        """From now on this is our stage. Where we were before is served until `leave`."""
        if self._seat is not None:
            self._moved = self._period
        self._seat, self._coming = seat, None
        self._busy = (time.monotonic(), self._trainer.stats.busy_seconds)
        self._server.host(seat.module, self._trainer)

    async def coming(self, module: str) -> ReplicaState | None:
        """We are about to serve a module: the state of it that we kept, if any."""
        self._coming = module
        return await self._stop_keeping(module)

    def stays(self) -> None:
        """We are not coming after all, and do not try again for as long as those rest who came."""
        self._coming, self._moved = None, self._period

    async def may_leave(self, module: str) -> bool:
        """Whether another replica serves a stage now. Whoever is last stays."""
        try:
            view = await self._around.directory.replicas(module, timeout_seconds=READ_SECONDS)
        except PotluckError:
            return False
        return any(one.record.serves for one in view.records if one.peer != self._me)

    def leave(self, module: str) -> None:
        self._server.leave(module)

    @property
    def _trainer(self) -> StageTrainer:
        assert self._seat and isinstance(self._seat.parts.trainer, StageTrainer)
        return self._seat.parts.trainer

    @property
    def _period(self) -> int:
        return int(self._now() // self._period_seconds)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._refresh())
                group.create_task(self._drive())
        finally:
            await self.driver.close()
            for module in list(self._keepers):
                await self._stop_keeping(module)

    def status(self) -> dict[str, Any]:
        stages = []
        for row in self._replicas:
            serving = [one.record for one in row if not one.record.keeps]
            load = round(statistics.fmean(record.load for record in serving), 3) if serving else None
            rate = round(sum(record.throughput for record in serving), 1)  # for a stage of average work
            stages.append(
                {"replicas": len(serving), "keepers": len(row) - len(serving), "load": load, "samples_per_second": rate}
            )
        stats = self.driver.stats
        return {
            "module": self._seat.module if self._seat else None,
            "missing": self._missing,
            "keeps": [module for module, (keeper, _) in self._keepers.items() if keeper.state],
            "stages": stages,
            "microbatches": stats.microbatches,
            "resends": stats.resends,
            "thrown_away": stats.thrown_away,
            "half_counted": stats.half_counted,
        }

    def counted(self, seat: Seat, round_: int) -> None:
        """Tell which microbatches a stage's contribution to a round holds."""
        trainer = seat.parts.trainer
        assert isinstance(trainer, StageTrainer)
        ids = [id_.hex() for id_ in trainer.counted]
        self._emit("swarm.stage.counted", round=round_, module=seat.module, ids=ids, voided=trainer.stats.voided)

    # ---- who serves what ------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        while True:
            try:
                shards = shards_to_read(self._me, self._seat.replica.shards if self._seat else 1)
                self._replicas = await read_stages(self._around.directory, len(self._names), shards)
            except PotluckError as error:
                self._emit("swarm.pipeline.unread", error=str(error))
            else:
                wire(self.driver, self._replicas, self._now())
                self._measure()
                self._tell_missing()
                await self._keep()
                self._reconsider()
            await asyncio.sleep(min(REFRESH_SECONDS, self._clock.seconds / 2))

    def _tell_missing(self) -> None:
        """Which stages nobody serves, whenever that changes."""
        missing = [name for name, wiring in zip(self._names, self.driver.wirings, strict=True) if not len(wiring)]
        if missing != self._missing:
            self._missing = missing
            self._emit("swarm.pipeline.waiting", missing=missing)

    def _measure(self) -> None:
        """Publish the share of the time that our stage computed, and the samples per second that it could do."""
        if self._seat is None:
            return
        now, stats, presence = time.monotonic(), self._trainer.stats, self._seat.presence
        before, self._busy = self._busy, (now, stats.busy_seconds)
        presence.load = min(1.0, max(0.0, (stats.busy_seconds - before[1]) / max(1e-3, now - before[0])))
        if stats.busy_seconds > 0:
            samples = stats.backwards * self._around.manifest.pipeline.microbatch
            presence.throughput = samples / stats.busy_seconds * self._work[self._names.index(self._seat.module)]
        presence.bound, presence.moving = self._bound, RULES.resting(self._moved, self._period)

    def _reconsider(self) -> None:
        """Once a period: whether we are missed more elsewhere."""
        period = self._period
        if self._seat is None or self._bound or period == self._decided or not self._seat.loaded.is_set():
            return
        self._decided = period
        own = self._names.index(self._seat.module)
        to = decide(self._me, own, table_of(self._replicas), period, self._moved, self._work)
        if to is not None:
            self._on_move(self._names[to])

    async def _keep(self) -> None:
        """Follow the stages of which we are to keep snapshots, and those no longer that others keep now."""
        if self._seat is None:
            return
        serving = [[one.peer for one in row if not one.record.keeps] for row in self._replicas]
        own = self._names.index(self._seat.module)
        wanted = {self._names[stage] for stage in kept_by(self._me, own, serving)} - {self._coming}
        for module in [module for module in self._keepers if self._may_drop(module, wanted)]:
            await self._stop_keeping(module)
        for module in wanted - self._keepers.keys():
            layout = await asyncio.to_thread(stage_layout, self._around.manifest.model, module)
            if module == self._coming:
                continue  # decided meanwhile
            keeper = Keeper(self._around, module, layout)
            needed = MEMORY_FACTOR * keeper.state_bytes
            if needed > free_memory(torch.device("cpu")):
                self._emit("swarm.keeper.failed", module=module, error=f"{needed / 2**30:.1f} GiB are not free")
                continue
            self._keepers[module] = keeper, asyncio.create_task(keeper.run())

    def _may_drop(self, module: str, wanted: Container[str]) -> bool:
        """A snapshot is dropped when it is not ours to keep and the stage lives, or when others keep it too."""
        keeper, task = self._keepers[module]
        if task.done() or (keeper.state is None and module not in wanted):
            return True
        records = [one.record for one in self._replicas[self._names.index(module)] if one.peer != self._me]
        lives = any(record.serves for record in records)
        kept = sum(1 for record in records if record.keeps and record.digest)
        return module not in wanted and (lives or kept >= COPIES)

    async def _stop_keeping(self, module: str) -> ReplicaState | None:
        """The state that was kept, if any."""
        if module not in self._keepers:
            return None
        keeper, task = self._keepers.pop(module)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, Exception):
            self._emit("swarm.keeper.failed", module=module, error=str(result))
        return keeper.state

    # ---- training -------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        """Microbatches while a round's training lasts; then sleep until the next."""
        while True:
            round_ = self._clock.round_at(self._now())
            window = self._clock.window(round_)
            until = window.train_until - settle_seconds(self._around.manifest)
            if round_ >= 0 and self._may_start(until) and all(len(wiring) for wiring in self.driver.wirings):
                before, began = self.driver.stats.microbatches, time.monotonic()
                loss = await self._train(round_, until)
                done = self.driver.stats.microbatches - before
                self._emit(
                    "swarm.pipeline.trained",
                    round=round_,
                    microbatches=done,
                    loss=loss,
                    resends=self.driver.stats.resends,
                    thrown_away=self.driver.stats.thrown_away,
                    half_counted=self.driver.stats.half_counted,
                    seconds=time.monotonic() - began,
                )
            elif self._may_start(until):
                await asyncio.sleep(0.2)  # somebody is missing: the directory is read again soon
            else:
                await asyncio.sleep(max(0.05, window.end - self._now()))

    async def _train(self, round_: Round, until: float) -> float | None:
        try:
            loss = await self.driver.train(
                self._batches(round_), lambda: self._may_start(until), self._learn, max(0.1, until - self._now())
            )
        except NetworkError as error:
            self._emit("swarm.pipeline.failed", round=round_, error=str(error))
            return None
        return loss if loss == loss else None  # not a number: nothing was done

    def _may_start(self, until: float) -> bool:
        return self._now() + 1.5 * self._microbatch_seconds < until

    def _learn(self, seconds: float) -> None:
        """How long a microbatch is on its way."""
        old = self._microbatch_seconds
        self._microbatch_seconds = 0.8 * old + 0.2 * seconds if old else seconds

    def _batches(self, round_: Round) -> Iterator[Tensor]:
        """Samples that are this trainer's in a round; none twice, however often its training is taken up again."""
        size = self._around.manifest.pipeline.microbatch
        if self._drawn[0] != round_:
            self._drawn = (round_, 0)
        while True:
            first = self._drawn[1]
            self._drawn = (round_, first + size)
            offsets = assigned_offsets(
                self._around.run_seed, TRAINER_MODULE, self._me, round_, first, size, self._corpus
            )
            yield self._corpus.batch(offsets)
