"""Gossip rounds: train, commit, reveal, pull, aggregate, apply, agree (`rounds.md`, steps 1 to 7).

Leaderless and pull-based: nobody proposes a group and nobody waits for an answer. A round's deadlines come from the
clock alone (`phases.py`); what is late, missing or invalid is left out and noted. `GossipReplica` drives one module's
replica through rounds; what has nothing to do with training (steps 5 to 7, joining, catching up) is its `Follower`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, Unpack

import torch

from potluck.dht.records import Commit
from potluck.dht.shards import shard_of
from potluck.errors import CapTooLow, CodecError, DiskFull, NetworkError, ProtocolError
from potluck.net.host import PeerId
from potluck.net.wire import Buffer
from potluck.swarm.agreement import Agreement, network_at_fault
from potluck.swarm.contribution import Contribution, Sparse
from potluck.swarm.exact import all_finite
from potluck.swarm.follower import Follower, Following
from potluck.swarm.fragments import encode_fragment
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult
from potluck.swarm.ownership import marked
from potluck.swarm.phases import Round, Window
from potluck.swarm.pull import View
from potluck.swarm.state import ReplicaState, witness

T = TypeVar("T")

#: Of the time for training, how much of it late segments of the round before may take: to load a state takes more.
LATE_SHARE = 0.25


class Trainer(Protocol):
    """The part of `LocalTrainer` that rounds use."""

    @property
    def layout(self) -> Layout: ...
    def load(self, theta: Flat) -> None: ...
    def train(
        self,
        batches: Iterator[torch.Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = ...,
    ) -> LocalResult: ...
    def delta(self, theta: Flat) -> Flat: ...
    def evaluate(self, tokens: torch.Tensor) -> float: ...
    def forget(self) -> None: ...


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round, as the live table, the logs and the tests read it.

    `seconds`: where the trainer's time went, by phase; together all of it. `beside`: with `rounds.overlap`, durations
    of what went on while the next round was trained. `late`: whose contribution was missing in the round before and has
    come since, and how many seconds after its deadline: these are slow, and not gone.
    """

    round: Round
    group: tuple[PeerId, ...]
    missing: Mapping[PeerId, str]
    alone: bool
    contributed: bool
    steps: int
    tokens: int
    loss: float
    digest: str
    agree: bool
    bytes_sent: int
    bytes_received: int
    contribution_bytes: int
    shards: int
    seconds: Mapping[str, float]
    beside: Mapping[str, float]
    late: Mapping[PeerId, float]

    @property
    def utilization(self) -> float:
        """Share of the time that went into local steps."""
        return self.seconds["train"] / (math.fsum(self.seconds.values()) or 1.0)


@dataclass
class Mine:
    """This peer's own part of a round. `delta`: what is sent of the pseudo-gradient; None if nothing was trained, or
    training diverged."""

    result: LocalResult
    delta: Flat | None = None
    commit: Commit | None = None
    contribution: Contribution | None = None
    published: bool = False


@dataclass(frozen=True)
class Landed:
    """A round that was committed, pulled and applied, and the seconds that each took."""

    view: View
    agreed: Agreement | None
    late: Mapping[PeerId, float]
    seconds: Mapping[str, float]


class GossipReplica(Follower):
    """One module's replica on this peer: a follower that trains. `batches(round)` yields the samples that the run
    assigns; `held_out` (B, T + 1) is evaluated at the start of each round. `compute`, if given, must do two things at
    a time."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        batches: Callable[[Round], Iterator[torch.Tensor]],
        held_out: torch.Tensor,
        **following: Unpack[Following],
    ) -> None:
        super().__init__(trainer.layout, **following)
        self.trainer = trainer
        self.residual = self.layout.zeros() if self.codec.has_residual else None
        #: Where a round exchanges only a part: what local training changed in the others, theta less the parameters.
        self._unsent = self.layout.zeros() if len(self.parts) > 1 else None
        self.last: RoundReport | None = None
        self.rounds_alone = 0
        self._first = True
        #: What goes on behind the round that was applied last.
        self._behind: list[asyncio.Task[None]] = []
        #: Local steps have a thread of their own: what is exchanged meanwhile does not wait for them.
        self._trainer_thread: Executor = following.get("compute") or ThreadPoolExecutor(1, thread_name_prefix="train")
        self._late: dict[PeerId, float] = {}
        self._batches, self._held_out = batches, held_out

    # ---- the life of a replica ------------------------------------------------------------------------------

    async def run(
        self, start: ReplicaState, theta_0: Callable[[], Awaitable[ReplicaState]] | None = None
    ) -> ReplicaState:
        """Join with `start` (a checkpoint or theta_0), then one round after another until asked to leave.

        Returns the last state. The replica prefers the group's state over `start` whenever there is a group. With
        `theta_0`, `start` is only a placeholder: where there is no group, what `theta_0()` gives is trained instead.
        """
        self._guess_shards()
        try:
            if theta_0 is None:
                await self._become(start)
            else:
                self.state = start
            if not await self._join() and theta_0 is not None:
                await self._become(await theta_0())
            while not self._finish.is_set():
                await self._round()
            await self._linger()
            return self._state
        finally:
            try:
                await self._end_behind()
            finally:
                self._close()

    async def _linger(self) -> None:
        """Stay until the last round's pull deadline: a contribution that nobody could fetch would not count. Of a
        sliced round until its end: others check what this peer aggregated."""
        if self.last is not None and self.last.contributed and not self._stop.is_set():
            window = self.rules.clock.window(self.last.round)
            until = window.end if self.rules.sliced else window.pull_by
            await self._sleep_until(until, "others to pull the last contribution", "the peer leaves")

    async def _round(self) -> None:
        window, theta = await self._in_step(), self._state.theta
        if self._finish.is_set():
            return
        started, sent_before = self._now(), self._exchange.traffic()
        loss = await self._in_trainer(self._begin, theta, theta)
        evaluated = self._now()
        self._emit("swarm.round.started", round=self._state.round, loss=loss, digest=self._state.digest)
        mine = await self._train(window, theta)
        if self._stop.is_set():
            return
        seconds = {"evaluate": evaluated - started, "train": self._now() - evaluated}
        landed = await self._land(window, mine)
        if landed is not None:
            self._report(window, landed, mine, loss, sent_before, {**seconds, **landed.seconds})

    async def _in_step(self) -> Window:
        """Come to the round in progress, if this peer is behind it. If others pull its contributions already, they are
        fetched once it is over: what could still be had of them now is not what others apply. The round to train."""
        clock, state = self.rules.clock, self._state
        current = clock.round_at(self._now())
        if current < state.round - 1:
            # Applied early and then a whole round ahead: only a clock that went backwards does this.
            await self._sleep_until(
                clock.window(Round(state.round - 1)).end, f"round {state.round} to begin", "training begins"
            )
        tried = waited = False
        while not self._finish.is_set():
            window = clock.window(self._state.round)
            if current > window.round or (self._out_of_sync and not tried):
                tried = True
                await self._catch_up(Round(current))
                current = clock.round_at(self._now())
            elif self._now() >= window.read_from and not waited:
                waited = True
                then = "its contributions are applied"
                await self._sleep_until(window.end, f"the end of round {window.round}, which was met too late", then)
                current = Round(window.round + 1)  # at its very end the clock may still say this one
            else:
                break
        return clock.window(self._state.round)

    async def _land(self, window: Window, mine: Mine) -> Landed | None:
        """Commit, pull and apply a round: steps 2 to 7. None if told to stop, or past the deadline (a step took longer
        than the whole exchange; the machine slept): the round is given up, or replayed when it is over."""
        trained = self._now()
        await self._commit(mine, window)
        committed = self._now()
        await self._sleep_until(
            window.read_from, f"the commit deadline of round {window.round}", "the group's commits are read"
        )
        revealed = self._now()
        if self._stop.is_set():
            return None  # pulled in haste, it would be applied alone
        view = await self._pull(window, mine)
        pulled = self._now()
        if self._stop.is_set() or view is None:
            return None
        following = self.rules.clock.window(Round(window.round + 1))
        late, self._late = self._late, {}
        await self._end_behind()
        self._begin_chase(window, view, following.commit_by)
        agreed = await self._apply(window.round, view, following.train_until)
        self._behind.append(asyncio.create_task(self._puller.check(following.commit_by)))
        # A peer that finished its steps early idles; only what lies behind `train_until` is the round's overhead.
        idle = max(0.0, min(window.train_until, revealed) - committed)
        seconds = {
            "commit": committed - trained,
            "idle": idle,
            "wait": revealed - committed - idle,
            "pull": pulled - revealed,
            "apply": self._now() - pulled,
        }
        return Landed(view, agreed, late, seconds)

    def _begin_chase(self, window: Window, view: View, until: float) -> None:
        late = self._late

        def came(peer: PeerId) -> None:
            # A sliced round is over when nobody waits for more, which may be before its deadline.
            late[peer] = max(0.0, self._now() - window.pull_by)

        self._behind.append(asyncio.create_task(self._puller.chase(view, until, came)))

    async def _end_behind(self) -> None:
        ended, self._behind = self._behind, []
        for task in ended:
            task.cancel()
        for error in await asyncio.gather(*ended, return_exceptions=True):
            if isinstance(error, Exception):  # and not that it was cancelled
                raise error

    # ---- 1 and 2: train and commit --------------------------------------------------------------------------

    def _begin(self, theta: Flat, base: Flat) -> float:
        """The loss at `theta`. Training will begin at `base`, less what the group has not had yet."""
        self.trainer.load(theta)
        loss = self.trainer.evaluate(self._held_out)
        if self._unsent is not None:
            self.trainer.load(base - self._unsent)
        elif base is not theta:
            self.trainer.load(base)
        return loss

    async def _train(self, window: Window, base: Flat) -> Mine:
        def may_start(step_seconds: float) -> bool:
            return not self._stop.is_set() and self._now() + step_seconds <= window.train_until

        with self._waits.waiting(
            f"local steps of round {window.round}", window.train_until, "the contribution is encoded and committed"
        ):
            result = await self._in_trainer(
                self.trainer.train,
                self._batches(window.round),
                self.rules.steps,
                window.round * self.rules.steps,
                may_start,
            )
        return await self._in_trainer(self._trained, result, base, window.round)

    def _trained(self, result: LocalResult, base: Flat, round_: Round) -> Mine:
        """What training from `base` came to, and what of it is this round's to send."""
        if result.steps == 0:
            return Mine(result)
        delta = self.trainer.delta(base)
        if not (math.isfinite(result.loss_before + result.loss_after) and self._to_be_trusted(delta)):
            self._start_anew()
            return Mine(result)
        if self._unsent is None:
            return Mine(result, delta)
        part = self._part(round_).range
        sent, self._unsent = delta[part].copy(), delta
        self._unsent[part] = 0
        return Mine(result, sent)

    def _to_be_trusted(self, delta: Flat) -> bool:
        """Whether what is used of `delta` before codecs see it is finite. They look at all that they encode."""
        return self._unsent is None or all_finite(delta)

    async def _commit(self, mine: Mine, window: Window) -> None:
        """Encode, serve (hidden until the deadline) and publish. Too late or nothing trained: say so, skip."""
        if mine.result.steps == 0 or self._now() >= window.commit_by:
            reason = "too_late" if mine.result.steps else "nothing"
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason=reason)
            return
        if await self._committed_before(window):
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason="committed_before")
            return
        encoded = None if mine.delta is None else await self._in_thread(self._encode, mine.delta, window.round)
        if encoded is None:
            self._drop_residual("training diverged")
            if mine.delta is not None:
                self._on_diverged()
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason="diverged")
            return
        buffers, contribution = encoded
        mine.contribution = contribution
        fragment = None
        try:
            ref = await self._exchange.offer(buffers, window.commit_by)
            if self.shards > 1:
                theta, fragments = self._state.theta, self.rules.fragments
                part = await self._in_thread(encode_fragment, theta, self.layout, window.round, fragments)
                fragment = await self._exchange.offer([part], window.commit_by)
        except (DiskFull, CapTooLow) as error:  # it may be otherwise in the next round
            self._keep_unsent(contribution, window.round)
            full = isinstance(error, DiskFull)
            self._emit("peer.disk.full" if full else "peer.cap.too_low", error=str(error))
            reason = "disk_full" if full else "cap_too_low"
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason=reason)
            return
        mine.commit = Commit(
            module=self.module,
            round=window.round,
            shard=shard_of(self.peer, window.round, self.shards),
            blob=ref.id,
            size=ref.size,
            tokens=mine.result.tokens,
            steps=mine.result.steps,
            loss_before=mine.result.loss_before,
            loss_after=mine.result.loss_after,
            digest=self._state.digest,
            witness=await self._in_thread(witness, self._state.theta, self._state.digest, self.peer),
            history=self._state.history,
            replicas_estimate=self.counted,
            fragment=fragment.id if fragment else None,
            fragment_size=fragment.size if fragment else 0,
            session=self._session,
            committed_at=self._now(),
        )
        left = window.commit_by - self._now()
        if left > 0:
            with self._waits.waiting(
                f"the commit of round {window.round} to be stored", window.commit_by, "the round is sat out"
            ):
                mine.published = await self._publish(mine.commit, window, left)
        # The disk's turn comes while the group waits for the deadline.
        self._behind.append(asyncio.create_task(self._settle()))
        if mine.published:
            self._published.append(window.round)
        else:
            self._keep_unsent(contribution, window.round)
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason="not_stored")

    async def _settle(self) -> None:
        try:
            await self._exchange.settle()
        except DiskFull as error:  # it took the room before: on few file systems
            self._emit("peer.disk.full", error=str(error))

    async def _committed_before(self, window: Window) -> bool:
        """Whether this peer died in this very round, after its commit, and came back within it.

        Some would count that commit and some a second one: the round is sat out. Asked once, in the first round. Before
        it died it may have counted half as many shards as now, or twice as many (seed 1832).
        """
        first, self._first = self._first, False
        left = window.commit_by - self._now()
        if not first or left <= 0:
            return False
        counts = (max(1, self.shards // 2), self.shards, 2 * self.shards)
        shards = sorted({shard_of(self.peer, window.round, count) for count in counts})
        for shard in shards:
            try:
                signed = await self._exchange.commits(self.module, window.round, shard, left / 2 / len(shards))
            except NetworkError:
                continue
            if any(one.peer == self.peer and one.record.session != self._session for one in signed):
                return True
        return False

    async def _publish(self, commit: Commit, window: Window, timeout_seconds: float) -> bool:
        try:
            return await self._exchange.publish(commit, self._expiry(window), timeout_seconds)
        except (NetworkError, ProtocolError) as error:
            self._emit("swarm.commit.failed", round=window.round, error=str(error))
            return False

    def _start_anew(self) -> None:
        """Training diverged: forget what came of it."""
        self.trainer.forget()
        if self._unsent is not None:
            self._unsent[:] = 0

    def _on_diverged(self) -> None:
        """Nobody would take what training came to, as encoding showed."""
        self._start_anew()

    def _encode(self, delta: Flat, round_: Round) -> tuple[tuple[Buffer, Buffer], Contribution] | None:
        """(buffers of what is committed to, what others decode from it); None if training diverged and nobody would
        take it."""
        part = self._part(round_)
        residual = None if self.residual is None else self.residual[part.range]
        try:
            blob = self.codec.encode(delta, part.layout, residual)
            return marked(blob, self.peer, self.module, round_), self.codec.decode(blob, part.layout)
        except (ValueError, CodecError):
            return None

    def _keep_unsent(self, contribution: Contribution, round_: Round) -> None:
        """What was encoded but never counted goes back into the error feedback."""
        if self.residual is None:
            return
        residual = self.residual[self._part(round_).range]
        if isinstance(contribution, Sparse):
            residual[contribution.indices] += contribution.values
        else:
            residual += contribution.values

    def _expiry(self, window: Window) -> float:
        return window.end + self.rules.retain * self.rules.clock.seconds

    # ---- 3 and 4: group and pull ----------------------------------------------------------------------------

    async def _pull(self, window: Window, mine: Mine) -> View | None:
        """Read the group's commits and fetch their blobs until the pull deadline; read once more for latecomers. None
        past the deadline, as where the machine slept."""
        view, ours = View(), mine.contribution if mine.published else None
        if self._now() >= window.pull_by:
            if ours is not None:  # it was never served: nobody can have had it
                self._published.remove(window.round)
                self._keep_unsent(ours, window.round)
            return None
        if mine.commit and ours is not None:
            view.commits[self.peer], view.contributions[self.peer] = mine.commit, ours
        with self._waits.waiting(
            f"the group's contributions of round {window.round}", window.pull_by, "what is missing is left out"
        ):
            for _ in range(2):
                if not await self._pull_once(window.round, window.pull_by, view):
                    break
        slept = self._now() > window.pull_by + (window.pull_by - window.read_from) / 2
        if slept and (view.missing or view.incomplete or view.commits.keys() <= {self.peer}):
            return None  # others can have had ours
        if view.incomplete and not self._stop.is_set():
            following = self.rules.clock.window(Round(window.round + 1))
            late_by = following.start + LATE_SHARE * (following.train_until - following.start)
            with self._waits.waiting(f"the rest of round {window.round}", late_by, "training goes on without it"):
                await self._puller.complete(view, late_by)
        if ours is not None and self.peer not in view.commits:
            self._keep_unsent(ours, window.round)  # the group is over-full, and the draw left us out
        return view

    # ---- telling --------------------------------------------------------------------------------------------

    async def _in_trainer(self, work: Callable[..., T], *args: Any) -> T:
        """Where local steps are computed."""
        return await asyncio.get_running_loop().run_in_executor(self._trainer_thread, work, *args)

    def _close(self) -> None:
        super()._close()
        if self._own_thread:
            self._trainer_thread.shutdown(wait=False, cancel_futures=True)

    def _report(
        self,
        window: Window,
        landed: Landed,
        mine: Mine,
        loss: float,
        sent_before: tuple[int, int],
        seconds: Mapping[str, float],
        beside: Mapping[str, float] | None = None,
    ) -> None:
        view, agreed = landed.view, landed.agreed
        group = tuple(view.counted)
        alone = not any(peer != self.peer for peer in view.commits)
        self.rounds_alone = self.rounds_alone + 1 if alone else 0
        sent, received = self._exchange.traffic()
        self.last = RoundReport(
            round=window.round,
            group=group,
            missing=dict(view.missing),
            alone=alone,
            contributed=self.peer in group,
            steps=mine.result.steps,
            tokens=mine.result.tokens,
            loss=loss,
            digest=self._state.digest,
            agree=agreed is None or agreed.unanimous,
            bytes_sent=sent - sent_before[0],
            bytes_received=received - sent_before[1],
            contribution_bytes=mine.commit.size if mine.commit else 0,
            shards=self.shards,
            seconds=dict(seconds),
            beside=dict(beside or {}),
            late=dict(landed.late),
        )
        if view.missing:
            others = [p for p in view.commits if p != self.peer]
            self._emit(
                "swarm.round.incomplete",
                round=window.round,
                missing=dict(view.missing),
                fault="network" if network_at_fault(others, view.missing) else "peers",
            )
        if alone:
            self._emit("swarm.round.alone", round=window.round, rounds_alone=self.rounds_alone)
        fields = {name: getattr(self.last, name) for name in self.last.__dataclass_fields__}
        self._emit("swarm.round.applied", utilization=self.last.utilization, **fields)
