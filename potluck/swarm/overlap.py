"""Rounds that overlap: the next one is trained while the last one is committed, pulled, aggregated and applied.

 blocking   |-- train r ------------|- exchange r -|-- train r+1 ----------|- exchange r+1 -|
 overlap    |-- train r ------------|-- train r+1 --------*----------------|-- train r+2 ---
                                    |- exchange r --------|                |- exchange r+1 -
                                                          theta_{r+1} lands
The shared sequence theta_r, its digests, deadlines and agreement are those of `rounds.py`: followers and joiners see no
difference, nor do they need to. What changes is where a peer trains. While theta_{r+1} is on its way it begins at a
guess of it: where its own training went, from theta_r. When theta_{r+1} lands, the parameters are moved by what the
guess was off, and training goes on; the pseudo-gradient is measured from theta_{r+1}. So an update comes as late as its
exchange takes, and before a round is committed the one before it has landed.

Overlap as in CO2 (arXiv 2401.16265) and Streaming DiLoCo (arXiv 2501.18512). docs/decisions/0021-overlap.md says how
they handle the staleness, and what was measured.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, Unpack

import numpy as np
import torch

from potluck.swarm.exact import all_finite
from potluck.swarm.follower import Following
from potluck.swarm.layout import Flat
from potluck.swarm.local import LocalResult
from potluck.swarm.phases import Round, Window
from potluck.swarm.rounds import GossipReplica, Mine, Trainer
from potluck.swarm.state import ReplicaState

T = TypeVar("T")

#: A round's steps are given this many times what they took last.
SPARE = 1.2


@dataclass(frozen=True)
class _Landing:
    """A round that is being committed, pulled and applied. `task`'s owner is the replica's `run`."""

    window: Window
    task: asyncio.Task[None]


class OverlappedReplica(GossipReplica):
    """A replica that trains while its last round lands."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        batches: Callable[[Round], Iterator[torch.Tensor]],
        held_out: torch.Tensor,
        **following: Unpack[Following],
    ) -> None:
        super().__init__(trainer=trainer, batches=batches, held_out=held_out, **following)
        self._landing: _Landing | None = None
        #: Where training begins, or began: a guess of theta, or theta itself.
        self._base: Flat = self.layout.zeros()
        self._loss = 0.0
        #: Encoding the last contribution showed that it had diverged.
        self._diverged = False
        #: What a local step took last, and whether there was time for all of the round's.
        self._step_seconds, self._did_all = 0.0, False
        #: When the trainer was last free, and what had been sent and received at the last report.
        self._turned = 0.0
        self._traffic = (0, 0)

    async def run(
        self, start: ReplicaState, theta_0: Callable[[], Awaitable[ReplicaState]] | None = None
    ) -> ReplicaState:
        try:
            return await super().run(start, theta_0)
        finally:
            if self._landing is not None:  # told to stop, or cancelled: the round is given up
                self._landing.task.cancel()
                await asyncio.gather(self._landing.task, return_exceptions=True)
                await self._end_behind()  # which it may have begun after the first one was ended

    async def _linger(self) -> None:
        await self._landed()
        await super()._linger()

    # ---- one round ------------------------------------------------------------------------------------------

    async def _round(self) -> None:
        window = await self._in_step()
        ready = self._now()
        await self._wait_with_time_to_spare(window)
        if self._finish.is_set():
            return
        began = self._now()
        self._emit("swarm.round.started", round=window.round, loss=self._loss, digest=self._state.digest)
        mine = await self._train(window, self._base)
        trained, self._did_all = self._now(), mine.result.steps == self.rules.steps
        if self._stop.is_set():
            return
        await self._landed()
        if self._stop.is_set():
            return
        if self._state.round < window.round:  # what the round before came to was missed: it is replayed first
            await self._in_trainer(self._forget_diverged)
            return
        landed = self._now()
        early = max(0.0, min(window.train_until, landed) - trained)
        seconds = {"evaluate": ready - self._turned, "train": trained - began, "idle": began - ready + early}
        seconds |= {"commit": 0.0, "wait": landed - trained - early, "pull": 0.0, "apply": 0.0}
        self._turned = landed
        self._base, self._loss = await self._in_trainer(self._turn, mine, self._state.theta, window.round)
        self._landing = _Landing(window, asyncio.create_task(self._land_beside(window, mine, self._loss, seconds)))

    async def _in_step(self) -> Window:
        """The round to train: the one after that which is landing, if its time has not passed."""
        clock = self.rules.clock
        if self._landing is not None:
            coming = Round(self._landing.window.round + 1)
            if self._now() < clock.window(coming).read_from and not self._out_of_sync:
                return clock.window(coming)
            await self._landed()
        window = await super()._in_step()
        self._turned, self._traffic = self._now(), self._exchange.traffic()
        self._base = self._state.theta
        self._loss = await self._in_trainer(self._begin, self._base, self._base)
        return window

    async def _landed(self) -> None:
        """Wait until theta of the round in training is here."""
        if self._landing is None or self._stop.is_set():
            return
        window, clock = self._landing.window, self.rules.clock
        until = max(self._now(), window.end) + clock.seconds
        with self._waits.waiting(f"round {window.round} to land", until, "its contributions are applied"):
            await self._landing.task
        self._landing = None

    async def _land_beside(self, window: Window, mine: Mine, loss: float, seconds: Mapping[str, float]) -> None:
        landed = await self._land(window, mine)
        if landed is not None:
            before, self._traffic = self._traffic, self._exchange.traffic()
            self._report(window, landed, mine, loss, before, seconds, landed.seconds)

    # ---- training -------------------------------------------------------------------------------------------

    async def _wait_with_time_to_spare(self, window: Window) -> None:
        """What is trained before theta is here is trained from a guess. So who did all steps of the last round does not
        begin before its end; and whose steps would be done early again waits for theta for as long as that leaves."""
        if self._landing is None or not self._did_all:
            return
        latest = window.train_until - SPARE * self.rules.steps * self._step_seconds
        start_by = max(self._landing.window.train_until, latest)
        if (left := start_by - self._now()) > 0:
            with self._waits.waiting(f"round {self._landing.window.round} to land", start_by, "training begins"):
                await asyncio.wait({self._landing.task}, timeout=left)

    async def _train(self, window: Window, base: Flat) -> Mine:
        """Local steps from a guess of theta, and from theta as soon as it is here."""
        batches, landing, done = self._batches(window.round), self._landing, _NO_STEPS
        with self._waits.waiting(
            f"local steps of round {window.round}", window.train_until, "the contribution is encoded and committed"
        ):
            if landing is not None:
                before = -1
                while not landing.task.done() and done.steps > before:
                    before, done = done.steps, await self._go_on(done, 1, batches, window)
                if landing.task.done():
                    landing.task.result()
                    await self._in_trainer(self._move, self._state.theta)
            done = await self._go_on(done, self.rules.steps, batches, window)
        return await self._in_trainer(self._trained, done, self._base, window.round)

    async def _go_on(
        self, done: LocalResult, most: int, batches: Iterator[torch.Tensor], window: Window
    ) -> LocalResult:
        """At most `most` further steps of the round's, after those `done`."""

        def may_start(step_seconds: float) -> bool:
            return not self._stop.is_set() and self._now() + step_seconds <= window.train_until

        most = min(most, self.rules.steps - done.steps)
        if most == 0:
            return done
        began, first = self._now(), window.round * self.rules.steps + done.steps
        more = await self._in_trainer(self.trainer.train, batches, most, first, may_start)
        if more.steps:
            self._step_seconds = (self._now() - began) / more.steps
        return _joined(done, more)

    def _move(self, theta: Flat) -> None:
        """theta has landed: what was trained so far goes on from there."""
        if theta is not self._base:
            self.trainer.load(theta - self.trainer.delta(self._base))
            self._base = theta

    def _to_be_trusted(self, delta: Flat) -> bool:
        return all_finite(delta)  # the next round's training begins with it

    def _on_diverged(self) -> None:
        self._diverged = True  # the next round is in training

    def _forget_diverged(self) -> bool:
        """What came of training that diverged, if it did since the last time."""
        diverged, self._diverged = self._diverged, False
        if diverged:
            self._start_anew()
        return diverged

    def _turn(self, mine: Mine, theta: Flat, round_: Round) -> tuple[Flat, float]:
        """(a guess of the next round's theta, where training begins; the loss at `theta`, which this round began
        with)."""
        if self._forget_diverged():
            mine.delta = None
        guess = theta if mine.delta is None else self._foresee(theta, mine.delta, round_)
        return guess, self._begin(theta, guess)

    def _foresee(self, theta: Flat, delta: Flat, round_: Round) -> Flat:
        """Of the next round's theta, as far as this peer's own `delta` tells: local training just goes on."""
        part, guess = self._part(round_).range, theta.copy()
        np.subtract(guess[part], delta, out=guess[part])
        return guess


_NO_STEPS = LocalResult(0, 0, math.nan, math.nan, 0.0)


def _joined(first: LocalResult, then: LocalResult) -> LocalResult:
    """Of one round's steps, in two goes."""
    if not (first.steps and then.steps):
        return then if then.steps else first
    return LocalResult(
        first.steps + then.steps,
        first.tokens + then.tokens,
        first.loss_before,
        then.loss_after,
        first.seconds + then.seconds,
    )
