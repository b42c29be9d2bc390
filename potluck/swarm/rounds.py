"""Gossip rounds: train, commit, reveal, pull, aggregate, apply, agree (`rounds.md`, steps 1 to 7).

Leaderless and pull-based: nobody proposes a group and nobody waits for an answer. A round's deadlines come from the
clock alone (`phases.py`); what is late, missing or invalid is left out and noted. `GossipReplica` drives one module's
replica through rounds; everything it decides is in pure functions beside it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from potluck.dht.records import Commit
from potluck.dht.shards import count_replicas, estimate_replicas, next_shards, shard_of
from potluck.errors import (
    CodecError,
    NetworkError,
    ProtocolError,
    StateError,
)
from potluck.net.blobs import BlobId, BlobRef
from potluck.net.host import PeerId
from potluck.swarm.aggregate import Contribution, Sparse, aggregate, token_weights
from potluck.swarm.agreement import Agreement, Claim, agreement, network_at_fault
from potluck.swarm.codecs import Codec
from potluck.swarm.exchange import Exchange
from potluck.swarm.fragments import blend, decode_fragment, encode_fragment, root_mean_square
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round, RoundClock, Window
from potluck.swarm.pull import MAX_OF_GROUP_SIZE, Puller, View
from potluck.swarm.state import ReplicaState, parse_state, state_bytes
from potluck.swarm.waits import WaitBoard

T = TypeVar("T")
Emit = Callable[..., None]

#: How far back a joiner looks for a round that somebody committed to.
LOOK_BACK_ROUNDS = 3
#: Of a round's length: what the contributions of a missed round may take to come.
REPLAY_SHARE = 0.4


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
class RoundRules:
    """What the manifest says about rounds."""

    clock: RoundClock
    steps: int
    group_size: int
    retain: int
    fragments: int
    sync_limit: float
    clip: bool


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round, as the live table, the logs and the tests read it. Seconds are durations."""

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


@dataclass
class _Mine:
    """This peer's own part of the round in progress."""

    result: LocalResult
    commit: Commit | None = None
    contribution: Contribution | None = None
    published: bool = False


class GossipReplica:
    """One module's replica on this peer.

    `now` gives UTC seconds; `sleep_until` waits for such a time. Blocking work runs in one thread of its own (or in
    `compute`), so that the event loop stays free. `batches(peer, round)` yields the samples that the run assigns.
    """

    def __init__(
        self,
        *,
        peer: PeerId,
        module: str,
        rules: RoundRules,
        trainer: Trainer,
        codec: Codec,
        outer: OuterStep,
        exchange: Exchange,
        batches: Callable[[Round], Iterator[torch.Tensor]],
        held_out: torch.Tensor,
        now: Callable[[], float],
        waits: WaitBoard,
        emit: Emit,
        session: bytes,
        on_state: Callable[[ReplicaState, Flat | None], Awaitable[None]] | None = None,
        compute: Executor | None = None,
    ) -> None:
        self.peer, self.module, self.rules = peer, module, rules
        self.trainer, self.codec, self.outer = trainer, codec, outer
        self.layout = trainer.layout
        self.residual: Flat | None = self.layout.zeros() if codec.has_residual else None
        self.shards, self.estimate, self.counted = 1, 1.0, 1.0
        self.state: ReplicaState | None = None
        self.last: RoundReport | None = None
        self.rounds_alone = 0
        self._exchange, self._batches, self._held_out = exchange, batches, held_out
        self._now, self._waits, self._emit, self._session = now, waits, emit, session
        self._on_state = on_state
        self._stop, self._finish = asyncio.Event(), asyncio.Event()
        self._thread = compute or ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._out_of_sync = False
        #: Lengths of the last outer steps (root mean square): how far apart replicas may wander between two averages.
        self._steps: deque[float] = deque(maxlen=rules.fragments)
        self._puller = Puller(
            peer=peer,
            module=module,
            layout=self.layout,
            codec=codec,
            exchange=exchange,
            clock=rules.clock,
            group_size=rules.group_size,
            fragments=rules.fragments,
            now=now,
            in_thread=self._in_thread,
        )
        self._published: deque[int] = deque(maxlen=2 * rules.retain)

    # ---- the life of a replica ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Leave after the round in progress: its contribution still counts."""
        self._finish.set()

    def stop(self) -> None:
        """Leave now: local steps end after the one in progress."""
        self._finish.set()
        self._stop.set()

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
            self._stop.set()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _linger(self) -> None:
        """Stay until the last round's pull deadline: a contribution that nobody could fetch would not count."""
        if self.last is not None and self.last.contributed and not self._stop.is_set():
            pull_by = self.rules.clock.window(self.last.round).pull_by
            await self._sleep_until(pull_by, "others to pull the last contribution", "the peer leaves")

    async def _round(self) -> None:
        clock, state = self.rules.clock, self._state
        current = clock.round_at(self._now())
        if current < state.round - 1:
            # Applied early and then a whole round ahead: only a clock that went backwards does this.
            await self._sleep_until(
                clock.window(Round(state.round - 1)).end, f"round {state.round} to begin", "training begins"
            )
        tried = False
        while not self._finish.is_set() and (current > self._state.round or (self._out_of_sync and not tried)):
            tried = True
            await self._catch_up(Round(current))
            current = clock.round_at(self._now())
        window = clock.window(self._state.round)
        started, sent_before = self._now(), self._exchange.traffic()
        loss = await self._in_thread(self._load_and_evaluate, self._state.theta)
        evaluated = self._now()
        self._emit("swarm.round.started", round=self._state.round, loss=loss, digest=self._state.digest)
        mine = await self._train(window)
        if self._stop.is_set():
            return
        trained = self._now()
        await self._commit(mine, window)
        committed = self._now()
        await self._sleep_until(
            window.read_from, f"the commit deadline of round {window.round}", "the group's commits are read"
        )
        revealed = self._now()
        if self._stop.is_set():
            return  # the round is given up: pulled in haste, it would be applied alone
        view = await self._pull(window, mine)
        pulled = self._now()
        if self._stop.is_set():
            return
        agreed = await self._apply(window.round, view, clock.window(Round(window.round + 1)).train_until)
        # A peer that finished its steps early idles; only what lies behind `train_until` is the round's overhead.
        idle = max(0.0, min(window.train_until, revealed) - committed)
        seconds = {
            "evaluate": evaluated - started,
            "train": trained - evaluated,
            "commit": committed - trained,
            "idle": idle,
            "wait": revealed - committed - idle,
            "pull": pulled - revealed,
            "apply": self._now() - pulled,
        }
        self._report(window, view, mine, agreed, loss, sent_before, seconds)

    # ---- 1 and 2: train and commit --------------------------------------------------------------------------

    def _load_and_evaluate(self, theta: Flat) -> float:
        self.trainer.load(theta)
        return self.trainer.evaluate(self._held_out)

    async def _train(self, window: Window) -> _Mine:
        def may_start(step_seconds: float) -> bool:
            return not self._stop.is_set() and self._now() + step_seconds <= window.train_until

        with self._waits.waiting(
            f"local steps of round {window.round}", window.train_until, "the contribution is encoded and committed"
        ):
            result = await self._in_thread(
                self.trainer.train,
                self._batches(window.round),
                self.rules.steps,
                window.round * self.rules.steps,
                may_start,
            )
        return _Mine(result)

    async def _commit(self, mine: _Mine, window: Window) -> None:
        """Encode, serve (hidden until the deadline) and publish. Too late or nothing trained: say so, skip."""
        if mine.result.steps == 0 or self._now() >= window.commit_by:
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason="too_late")
            return
        encoded = await self._in_thread(self._encode)
        if encoded is None or not math.isfinite(mine.result.loss_before + mine.result.loss_after):
            self._drop_residual("training diverged")
            self.trainer.forget()
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason="diverged")
            return
        blob, contribution = encoded
        mine.contribution = contribution
        ref = await self._exchange.offer(blob, window.commit_by)
        fragment = None
        if self.shards > 1:
            theta, fragments = self._state.theta, self.rules.fragments
            part = await self._in_thread(encode_fragment, theta, self.layout, window.round, fragments)
            fragment = await self._exchange.offer(part, window.commit_by)
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
        if mine.published:
            self._published.append(window.round)
        else:
            self._keep_unsent(contribution)
            self._emit("swarm.round.skipped", round=window.round, steps=mine.result.steps, reason="not_stored")

    async def _publish(self, commit: Commit, window: Window, timeout_seconds: float) -> bool:
        try:
            return await self._exchange.publish(commit, self._expiry(window), timeout_seconds)
        except (NetworkError, ProtocolError) as error:
            self._emit("swarm.commit.failed", round=window.round, error=str(error))
            return False

    def _encode(self) -> tuple[bytes, Contribution] | None:
        """(blob, what others will decode from it); None if training diverged and nobody would take it."""
        try:
            blob = self.codec.encode(self.trainer.delta(self._state.theta), self.layout, self.residual)
            return blob, self.codec.decode(blob, self.layout)
        except (ValueError, CodecError):
            return None

    def _keep_unsent(self, contribution: Contribution) -> None:
        """What was encoded but never counted goes back into the error feedback."""
        if self.residual is None:
            return
        if isinstance(contribution, Sparse):
            self.residual[contribution.indices] += contribution.values
        else:
            self.residual += contribution.values

    def _expiry(self, window: Window) -> float:
        return window.end + self.rules.retain * self.rules.clock.seconds

    # ---- 3 and 4: group and pull ----------------------------------------------------------------------------

    async def _pull(self, window: Window, mine: _Mine) -> View:
        """Read the group's commits and fetch their blobs until the pull deadline; read once more for latecomers."""
        view = View()
        if mine.published and mine.commit and mine.contribution is not None:
            view.commits[self.peer] = mine.commit
            view.contributions[self.peer] = mine.contribution
        with self._waits.waiting(
            f"the group's contributions of round {window.round}", window.pull_by, "what is missing is left out"
        ):
            for _ in range(2):
                if not await self._pull_once(window.round, window.pull_by, view):
                    break
        if mine.published and mine.contribution is not None and self.peer not in view.commits:
            self._keep_unsent(mine.contribution)  # the group is over-full, and the draw left us out
        return view

    async def _pull_once(self, round_: Round, pull_by: float, view: View, late: bool = False) -> bool:
        shard = shard_of(self.peer, round_, self.shards)
        # Our own node also holds commits of ours that nobody else does: those count for nobody.
        unseen = None if round_ in self._published else self._session
        drift = self.shards > 1
        return await self._puller.pull(round_, shard, pull_by, view, drift=drift, session=unseen, late=late)

    # ---- 5 to 7: aggregate, outer step, agree ---------------------------------------------------------------

    async def _apply(self, round_: Round, view: View, deadline: float) -> Agreement | None:
        """Turn what was pulled into theta of the next round.

        If ours is the odd state in its group, the group's is loaded first (until `deadline`) and updated instead.
        """
        agreed = agreement(Claim(p, c.digest, c.history) for p, c in view.commits.items())
        own = self._state
        if agreed and self.shards == 1 and agreed.digest != own.digest:
            adopted = await self._fetch_state(agreed, round_, deadline)
            self._out_of_sync = adopted is None
            if adopted:
                self._drop_residual("the group's state was loaded")
                own = adopted
        present = [p for p in view.contributions if p in view.commits]
        weights = token_weights({p: view.commits[p].tokens for p in present})
        self._update_estimate(view)

        def step() -> tuple[ReplicaState, float, float]:
            base, distance = self._blend_fragments(own, view, round_)
            update = aggregate({p: view.contributions[p] for p in present}, weights, self.layout, clip=self.rules.clip)
            theta, velocity = self.outer.apply(base, own.velocity, update, round_)
            after = ReplicaState(
                self.module, self.layout, Round(round_ + 1), theta, velocity, own.history + len(present)
            )
            return after, distance, root_mean_square(theta - base)

        if present:
            counted = {peer: view.commits[peer].blob for peer in present}
            self._emit("swarm.contributions.counted", round=round_, blobs=counted)
            after, distance, length = await self._in_thread(step)
            self._check_sync(round_, distance, length, len(view.fragments))
            await self._become(after)
        else:
            await self._become(own.at_round(Round(round_ + 1)))
        return agreed

    def _blend_fragments(self, state: ReplicaState, view: View, round_: Round) -> tuple[Flat, float]:
        if not view.fragments:
            return state.theta, 0.0
        count = self.rules.fragments
        try:
            own = decode_fragment(encode_fragment(state.theta, self.layout, round_, count), self.layout, round_, count)
        except CodecError:  # a model whose parameters outgrow what fragments carry trains on, its drift unchecked
            return state.theta, 0.0
        others = [view.fragments[p] for p in sorted(view.fragments)]
        return blend(state.theta, own, others, self.layout, round_, count)

    def _check_sync(self, round_: Round, distance: float, length: float, members: int) -> None:
        """Whether our drift from the group is more than replicas come by between two averages of a fragment.

        In F rounds independent steps of length s lead sqrt(F) s apart: that, times the run's `sync_limit`.
        """
        self._steps.append(length)
        if members:
            self._emit("swarm.drift.measured", round=round_, rms=distance, step=length, members=members)
        wander = math.sqrt(math.fsum(s * s for s in self._steps))
        if len(self._steps) == self.rules.fragments and 0 < self.rules.sync_limit * wander < distance:
            self._emit("swarm.drift.beyond", round=round_, rms=distance, limit=self.rules.sync_limit * wander)
            self._steps.clear()
            self._out_of_sync = True

    def _update_estimate(self, view: View) -> None:
        others = [c.replicas_estimate for p, c in view.commits.items() if p != self.peer]
        seen = max(1, len(view.commits))
        self.estimate = estimate_replicas(self.estimate, seen, self.shards, others)
        shards = next_shards(self.estimate, self.rules.group_size, self.shards)
        # What is published is this peer's own count: a published median would outvote growth for ever. A count made
        # while S changes is no count: some of those in a shard looked for another.
        self.counted = count_replicas(seen, shards) if shards == self.shards else self._exchange.network_size()
        self.shards = shards

    async def _become(self, state: ReplicaState) -> None:
        """Make a state ours: know its digest, serve it, hand it to the checkpoints."""
        await self._in_thread(lambda: state.chunks)
        self._exchange.offer_state(state)
        self.state = state
        if self._on_state:
            await self._on_state(state, self.residual)

    def _drop_residual(self, reason: str) -> None:
        if self.residual is not None and self.residual.any():
            self.residual[:] = 0
            self._emit("swarm.residual.dropped", reason=reason)

    # ---- joining and catching up ----------------------------------------------------------------------------

    async def _join(self) -> bool:
        """Load the group's state if there is a group, then apply the rounds since. False if it stays with its own."""
        current = self.rules.clock.round_at(self._now())
        if current < 0:
            await self._sleep_until(self.rules.clock.genesis, "round 0 to begin", "training begins")
            self._guess_shards()
            return False
        started = self._now()
        joined = await self._load_group("joined from the group's state")
        if joined:
            self._emit("swarm.join.done", round=self._state.round, seconds=self._now() - started)
        else:
            self._guess_shards()
            self._emit("swarm.join.alone", round=current, from_round=self._state.round)
        return joined

    def _guess_shards(self) -> None:
        """Before the first round nobody has counted. A thousand who all began with one group would each read a
        thousand commits; how many peers the run's network has is known well enough to begin with."""
        self.estimate = self.counted = max(1.0, self._exchange.network_size())
        if self.estimate > MAX_OF_GROUP_SIZE * self.rules.group_size:
            self.shards = next_shards(self.estimate, self.rules.group_size, self.shards)

    async def _load_group(self, reason: str) -> bool:
        """Take over the state that the latest round's commits agree on, then apply the rounds since then.

        False if nobody has committed lately, or nobody could give the state.
        """
        deadline = self._now() + self._patience
        async for round_, agreed in self._groups():
            if agreed.digest == self._state.digest:
                break
            state = await self._fetch_state(agreed, round_, deadline)
            if state is not None:
                self._drop_residual(reason)
                await self._become(state)
                break
        else:
            return False
        self._out_of_sync = False
        now = self.rules.clock.round_at(self._now())
        # Where we contributed already, the group counts that: another contribution to the same round would split it.
        await self._replay(Round(now + 1) if now in self._published else now)
        return True

    async def _catch_up(self, current: Round) -> None:
        """Come to round `current`: replay what was missed, or load the group's state where that cannot work."""
        missed = current - self._state.round
        if missed > self.rules.retain or self._out_of_sync:
            self._emit("swarm.round.missed", rounds=missed, out_of_sync=self._out_of_sync)
            if not await self._load_group("the group went on without this peer"):
                # Nobody can give that state: our own is the best there is.
                self._out_of_sync = False
                await self._become(self._state.at_round(Round(max(current, self._state.round))))
        else:
            await self._replay(current)

    async def _replay(self, current: Round) -> None:
        """Apply missed rounds (frozen, slow, or joining) from commits and blobs that others still hold."""
        for round_ in range(self._state.round, current):
            if self._finish.is_set():
                return
            view = View()
            # Much less than a round, or a laggard whom somebody keeps waiting would never catch up.
            until = self._now() + max(1.0, REPLAY_SHARE * self.rules.clock.seconds)
            with self._waits.waiting(f"contributions of round {round_}, missed", until, "it is applied without them"):
                await self._pull_once(Round(round_), until, view, late=True)
            await self._apply(Round(round_), view, self._now() + self._patience)
            self._emit("swarm.round.replayed", round=round_, contributions=len(view.contributions))

    @property
    def _patience(self) -> float:
        """Seconds that a state may take to load when no round waits for it."""
        return max(120.0, self.rules.retain * self.rules.clock.seconds)

    async def _groups(self) -> AsyncIterator[tuple[Round, Agreement]]:
        """The latest rounds with commits of others, and what they agree on.

        The round in progress counts only after its deadline: before, whoever was quickest would speak for all.
        """
        clock, now = self.rules.clock, self._now()
        current = clock.round_at(now)
        newest = current if now >= clock.window(current).read_from else current - 1
        timeout = min(5.0, clock.seconds)
        for round_ in range(newest, max(-1, newest - LOOK_BACK_ROUNDS) - 1, -1):
            with self._waits.waiting(
                f"commits of round {round_}", self._now() + timeout, "an earlier round is looked at"
            ):
                signed = await self._exchange.commits(self.module, Round(round_), 0, timeout)
            others = {s.peer: s.record for s in signed if s.peer != self.peer and self._puller.counts(s, Round(round_))}
            agreed = agreement(Claim(p, c.digest, c.history) for p, c in others.items())
            if agreed:
                self.estimate = float(np.median([c.replicas_estimate for c in others.values()]))
                self.shards = next_shards(self.estimate, self.rules.group_size, self.shards)
                yield Round(round_), agreed

    async def _fetch_state(self, agreed: Agreement, round_: Round, deadline: float) -> ReplicaState | None:
        """The state that `round_` began with, from several of its holders, checked against its digest.

        None if nobody could give it, or if it says another round than the commits that named it.
        """
        has_velocity = self._state.velocity is not None
        size = state_bytes(self.layout, has_velocity)
        holders = [peer for peer in agreed.holders if peer != self.peer]
        started = self._now()
        self._emit("swarm.state.fetching", digest=agreed.digest, holders=len(holders), bytes=size)
        with self._waits.waiting(
            f"the group's state ({size / 2**20:.1f} MiB) from {len(holders)} peers",
            deadline,
            "training goes on from our own state",
        ):
            try:
                blob, by_holder = await self._exchange.fetch_state(
                    BlobRef(BlobId(agreed.digest), size), holders, size, max(0.1, deadline - self._now())
                )
                state = await self._in_thread(parse_state, blob, self.module, self.layout, has_velocity)
                if state.round != round_:  # the digest vouches for the rest
                    raise StateError(f"the state is of round {state.round}, not {round_}")
            except (NetworkError, ProtocolError, StateError) as error:
                self._emit("swarm.state.failed", error=str(error))
                return None
        self._emit(
            "swarm.state.loaded",
            round=state.round,
            digest=agreed.digest,
            bytes=size,
            donors=sum(1 for n in by_holder.values() if n),
            seconds=self._now() - started,
        )
        return state

    # ---- plumbing -------------------------------------------------------------------------------------------

    @property
    def _state(self) -> ReplicaState:
        if self.state is None:
            raise StateError("this replica has no state yet")
        return self.state

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def _sleep_until(self, when: float, what: str, then: str) -> None:
        # In slices: the wall clock may be set while we sleep.
        slice_ = max(1.0, self.rules.clock.seconds / 20)
        with self._waits.waiting(what, when, then):
            while not self._stop.is_set() and (left := when - self._now()) > 0:
                try:
                    async with asyncio.timeout(min(max(left, 0.001), slice_)):
                        await self._stop.wait()
                except TimeoutError:
                    pass

    def _report(
        self,
        window: Window,
        view: View,
        mine: _Mine,
        agreed: Agreement | None,
        loss: float,
        sent_before: tuple[int, int],
        seconds: Mapping[str, float],
    ) -> None:
        group = tuple(sorted(view.contributions))
        alone = not any(peer != self.peer for peer in view.commits)
        self.rounds_alone = self.rounds_alone + 1 if alone else 0
        sent, received = self._exchange.traffic()
        self.last = RoundReport(
            round=window.round,
            group=group,
            missing=dict(view.missing),
            alone=alone,
            contributed=self.peer in view.contributions,
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
        self._emit("swarm.round.applied", **fields)
