"""This peer's part in a pipeline: it serves one stage, and trains through whoever serves the others."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import Tensor

from potluck.dht.directory import Directory
from potluck.dht.manifest import Manifest, RunId
from potluck.dht.records import Replica, Signed
from potluck.errors import NetworkError, PotluckError, UserError
from potluck.net.host import PeerId
from potluck.net.rpc import Rpc
from potluck.peer.build import rules_of
from potluck.swarm.data import Corpus, assigned_offsets
from potluck.swarm.phases import Round
from potluck.swarm.presence import Presence
from potluck.swarm.rebalance import PeerLoad, newcomer
from potluck.swarm.server import Shapes, StageServer
from potluck.swarm.stage import hidden_size, stage_names
from potluck.swarm.stage_trainer import StageTrainer
from potluck.swarm.trainer import PipelineTrainer

READ_SECONDS: Final = 5.0
REFRESH_SECONDS: Final = 10.0
#: Names the samples that a trainer draws, whatever stage it serves.
TRAINER_MODULE: Final = "trainer"


async def read_stages(directory: Directory, stages: int) -> list[list[Signed[Replica]]]:
    """Who serves each stage, by the directory."""
    views = await asyncio.gather(
        *(directory.replicas(name, timeout_seconds=READ_SECONDS) for name in stage_names(stages))
    )
    return [list(view.records) for view in views]


async def choose_stage(directory: Directory, me: PeerId, stages: int, wanted: int | None, held: set[str]) -> str:
    """The stage asked for, else one whose checkpoint lies here, else where another replica is missed most."""
    names = stage_names(stages)
    if wanted is not None:
        if wanted >= stages:
            raise UserError(f"--stage {wanted}: this run has the stages 0 to {stages - 1}")
        return names[wanted]
    try:
        found = await read_stages(directory, stages)
    except PotluckError:
        found = [[] for _ in names]
    mine = [name for name in names if name in held]
    if mine:
        return min(mine, key=lambda name: len(found[names.index(name)]))
    table = [
        {one.peer: PeerLoad(one.record.load, one.record.throughput or 1.0) for one in row if one.peer != me}
        for row in found
    ]
    return names[newcomer(me, table)]


class Pipeline:
    """`serve` from the start; `run` trains while the rounds do."""

    def __init__(
        self,
        *,
        rpc: Rpc,
        run_id: RunId,
        manifest: Manifest,
        module: str,
        trainer: StageTrainer,
        corpus: Corpus,
        directory: Directory,
        presence: Presence,
        now: Callable[[], float],
        emit: Callable[..., None],
    ) -> None:
        self.module, self.trainer = module, trainer
        self._manifest, self._corpus, self._directory = manifest, corpus, directory
        self._presence, self._now, self._emit = presence, now, emit
        self._seed = run_id.encode() + manifest.data.seed.to_bytes(8, "big")
        self._me = rpc.peer_id
        stages, settings = manifest.model.stages, manifest.pipeline
        shapes = Shapes(
            settings.microbatch,
            manifest.data.sequence_length,
            hidden_size(manifest.model),
            int(trainer.stage.config.get_text_config().vocab_size),
            settings.activations,
        )
        StageServer(rpc, shapes).host(module, trainer)
        self.driver = PipelineTrainer(
            rpc, stages, shapes, in_flight=settings.in_flight, direct=settings.direct, now=now
        )
        self._clock = rules_of(manifest).clock
        self._replicas: list[list[Signed[Replica]]] = [[] for _ in range(stages)]
        self._microbatch_seconds = 0.0
        self._busy = (time.monotonic(), 0.0)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._refresh())
            group.create_task(self._drive())

    def status(self) -> dict[str, Any]:
        stages = [
            {"replicas": len(row), "load": round(statistics.fmean(one.record.load for one in row), 3) if row else None}
            for row in self._replicas
        ]
        stats = self.driver.stats
        return {
            "module": self.module,
            "stages": stages,
            "microbatches": stats.microbatches,
            "resends": stats.resends,
            "thrown_away": stats.thrown_away,
        }

    def counted(self, round_: int) -> None:
        """Tell which microbatches this stage's contribution to a round holds."""
        ids = [id_.hex() for id_ in self.trainer.counted]
        self._emit("swarm.stage.counted", round=round_, module=self.module, ids=ids, voided=self.trainer.stats.voided)

    async def _refresh(self) -> None:
        while True:
            try:
                self._replicas = await read_stages(self._directory, self._manifest.model.stages)
            except PotluckError as error:
                self._emit("swarm.pipeline.unread", error=str(error))
            else:
                for wiring, row in zip(self.driver.wirings, self._replicas, strict=True):
                    wiring.update({one.peer: one.expires_at for one in row}, self._now())
            self._presence.load, self._presence.throughput = self._measure()
            await asyncio.sleep(min(REFRESH_SECONDS, self._clock.seconds / 2))

    def _measure(self) -> tuple[float, float]:
        """(share of the time that this stage computed since the last call, samples it could do per second)."""
        now, busy = time.monotonic(), self.trainer.stats.busy_seconds
        before, self._busy = self._busy, (now, busy)
        load = (busy - before[1]) / max(1e-3, now - before[0])
        done = self.trainer.stats.backwards * self._manifest.pipeline.microbatch
        return min(1.0, max(0.0, load)), done / busy if busy > 0 else 0.0

    async def _drive(self) -> None:
        """Microbatches while a round's training lasts; then sleep until the next."""
        while True:
            round_ = self._clock.round_at(self._now())
            window = self._clock.window(round_)
            until = window.train_until - self.trainer.settle_seconds
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
        size, first = self._manifest.pipeline.microbatch, 0
        while True:
            offsets = assigned_offsets(self._seed, TRAINER_MODULE, self._me, round_, first, size, self._corpus)
            yield self._corpus.batch(offsets)
            first += size
