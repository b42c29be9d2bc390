"""A follower keeps one module's state in step with its group: joins, pulls, aggregates, applies, agrees (`rounds.md`).

It contributes nothing itself. `GossipReplica` (rounds.py) is a follower that also trains; a peer of another stage that
keeps a snapshot is one that does not. All that it decides is in pure functions beside it.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar

import numpy as np

from potluck.dht.shards import count_replicas, estimate_replicas, next_shards, shard_of
from potluck.errors import CodecError, NetworkError, ProtocolError, StateError
from potluck.net.blobs import BlobId, BlobRef
from potluck.net.host import PeerId
from potluck.swarm.advance import Advance
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.agreement import Agreement, Claim, agreement
from potluck.swarm.codecs import Codec
from potluck.swarm.exchange import Exchange
from potluck.swarm.fragments import blend, decode_fragment, encode_fragment, root_mean_square
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.outer import OuterStep
from potluck.swarm.parts import Part, parts_of
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.pull import MAX_OF_GROUP_SIZE, Puller, View
from potluck.swarm.recycled import Recycled
from potluck.swarm.sliced import SlicedPuller
from potluck.swarm.state import ReplicaState, parse_state, state_bytes
from potluck.swarm.waits import WaitBoard

T = TypeVar("T")
Emit = Callable[..., None]

#: How far back a joiner looks for a round that somebody committed to.
LOOK_BACK_ROUNDS = 3
#: Announced states that are tried where nobody committed, the newest and most held first.
MAX_SNAPSHOTS = 8
#: Of a round's length: what the contributions of a missed round may take to come.
REPLAY_SHARE = 0.4


@dataclass(frozen=True)
class RoundRules:
    """What the manifest says about rounds. `step_tokens`: of a local step; 0 where replicas train what others send."""

    clock: RoundClock
    steps: int
    step_tokens: int
    group_size: int
    retain: int
    fragments: int
    sync_limit: float
    clip: bool
    rule: str = "mean"
    liars: float = 0.0
    #: Whether members aggregate for each other (`sliced.py`).
    sliced: bool = False
    #: Parts of the tensors that are exchanged in turn (`parts.py`); 1: all in every round.
    stream: int = 1


class Steer(Protocol):
    """Weights of a round's members, as plain data: who gives them knows why."""

    async def read(self, round_: Round, timeout_seconds: float) -> None: ...
    def weights(self, round_: Round, tokens: Mapping[PeerId, int]) -> dict[PeerId, float] | None:
        """They add up to 1; the same for all who read the same. None where tokens alone count."""
        ...


@dataclass(frozen=True)
class Applied:
    """A round that was just applied: the state that it began with, what was pulled, and the state after it. `steered`:
    whether the weights are validators'; `shards`: groups that the module's replicas met in."""

    round: Round
    before: ReplicaState
    view: View
    weights: Mapping[PeerId, float]
    steered: bool
    after: ReplicaState
    shards: int


class Following(TypedDict):
    """What a follower is made of. `now` gives UTC seconds. Blocking work runs in one thread of its own, or in
    `compute`, so that the event loop stays free. `on_state` hears each state, and the residual that goes with it;
    `on_applied` hears each round, and is waited for. `draw(n)` gives a number below n that nobody can foretell."""

    peer: PeerId
    module: str
    rules: RoundRules
    codec: Codec
    outer: OuterStep
    exchange: Exchange
    now: Callable[[], float]
    waits: WaitBoard
    emit: Emit
    session: bytes
    on_state: NotRequired[Callable[[ReplicaState, Flat | None], Awaitable[None]]]
    on_applied: NotRequired[Callable[[Applied], Awaitable[None]]]
    steer: NotRequired[Steer]
    compute: NotRequired[Executor]
    draw: NotRequired[Callable[[int], int]]


class Follower:
    """One module's state on this peer. `state`: at the start of the round that comes next for it."""

    def __init__(
        self,
        layout: Layout,
        *,
        peer: PeerId,
        module: str,
        rules: RoundRules,
        codec: Codec,
        outer: OuterStep,
        exchange: Exchange,
        now: Callable[[], float],
        waits: WaitBoard,
        emit: Emit,
        session: bytes,
        on_state: Callable[[ReplicaState, Flat | None], Awaitable[None]] | None = None,
        on_applied: Callable[[Applied], Awaitable[None]] | None = None,
        steer: Steer | None = None,
        compute: Executor | None = None,
        draw: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self.peer, self.module, self.rules = peer, module, rules
        self.layout, self.codec, self.outer = layout, codec, outer
        #: The codec's error feedback, of those who train.
        self.residual: Flat | None = None
        self.shards, self.estimate, self.counted = 1, 1.0, 1.0
        self.state: ReplicaState | None = None
        #: What each round exchanges: of one after another.
        self.parts = parts_of(layout, rules.stream)
        self._exchange, self._now, self._waits, self._emit, self._session = exchange, now, waits, emit, session
        self._on_state, self._on_applied, self._steer = on_state, on_applied, steer
        self._stop, self._finish = asyncio.Event(), asyncio.Event()
        self._thread = compute or ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._own_thread = compute is None
        self._out_of_sync = False
        #: Lengths of the last outer steps (root mean square): how far apart replicas may wander between two averages.
        self._steps: deque[float] = deque(maxlen=rules.fragments)
        #: Rounds that we contributed to.
        self._published: deque[int] = deque(maxlen=2 * rules.retain)
        self._vectors = Recycled(layout.size)
        pulling = partial(SlicedPuller, draw=draw) if rules.sliced else Puller
        self._puller: Puller = pulling(
            peer=peer,
            module=module,
            layout=self.layout,
            codec=codec,
            exchange=exchange,
            rules=rules,
            now=now,
            in_thread=self._in_thread,
            emit=emit,
        )

    def finish(self) -> None:
        """Leave after the round in progress: its contribution still counts."""
        self._finish.set()

    def stop(self) -> None:
        """Leave now: local steps end after the one in progress."""
        self._finish.set()
        self._stop.set()

    async def follow(self, start: ReplicaState) -> None:
        """Take over the group's state as soon as there is one, and keep up with it until told to stop.

        `start` is a placeholder of the right layout; until a group's state has come, nothing is served.
        """
        self.state, following = start, False
        try:
            while not self._finish.is_set():
                current = Round(self.rules.clock.round_at(self._now()))
                if not following:
                    following = current >= 0 and await self._load_group("followed")
                elif current > self._state.round or self._out_of_sync:
                    await self._catch_up(current)
                end = self.rules.clock.window(current).end
                await self._sleep_until(end, f"the end of round {current}", "its contributions are applied")
        finally:
            self._close()

    async def peek(self, placeholder: ReplicaState) -> ReplicaState | None:
        """The group's state now; None if nobody gives one."""
        self.state = placeholder
        try:
            return self._state if await self._load_group("looked at") else None
        finally:
            self._close()

    def _close(self) -> None:
        self._stop.set()
        if self._own_thread:
            self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- pull, aggregate, outer step, agree ------------------------------------------------------------------------

    async def _pull_once(self, round_: Round, pull_by: float, view: View, late: bool = False) -> bool:
        shard = shard_of(self.peer, round_, self.shards)
        # Our own node also holds commits of ours that nobody else does: those count for nobody.
        unseen = None if round_ in self._published else self._session
        drift = self.shards > 1
        if self._puller.ranges and view.advance is None and not drift:
            view.advance = self._advance(self._state.theta, self._state.velocity, round_)
        pulling = self._puller.pull(round_, shard, pull_by, view, drift=drift, session=unseen, late=late)
        if self._steer is None:
            return await pulling
        left = max(0.1, pull_by - self._now())
        new, _ = await asyncio.gather(pulling, self._steer.read(round_, left))
        return new

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
        present, shards = view.counted, self.shards
        tokens = {p: view.commits[p].tokens for p in present}
        steered = self._steer.weights(round_, tokens) if self._steer and tokens else None
        weights = steered or token_weights(tokens)
        self._update_estimate(view)

        def step() -> tuple[ReplicaState, float, float]:
            base, distance = self._blend_fragments(own, view, round_)
            known: Mapping[int, bytes] = {}
            if view.update is not None:
                advance, view.advance = view.advance, None  # whose vectors are used again
                if advance is None or advance.theta is not base:  # another state was loaded, or drift taken off
                    advance = self._advance(base, own.velocity, round_)
                theta, velocity = advance.finish(view.update)
                known = advance.digests
            else:
                rules, layout = self.rules, self._part(round_).layout
                update = aggregate(
                    {p: view.contributions[p] for p in present},
                    weights,
                    layout,
                    clip=rules.clip,
                    steered=bool(steered),
                    rule=rules.rule,
                    liars=rules.liars,
                    out=self._vectors.any() if rules.rule == "mean" and len(self.parts) == 1 else None,
                )
                theta, velocity = self._outer_step(base, own.velocity, self.codec.update_of(update, layout), round_)
            history = own.history + len(present)
            after = ReplicaState(self.module, self.layout, Round(round_ + 1), theta, velocity, history, known)
            return after, distance, root_mean_square(theta - base) if shards > 1 else 0.0

        if present:
            counted = {peer: view.commits[peer].blob for peer in present}
            self._emit("swarm.contributions.counted", round=round_, blobs=counted)
            after, distance, length = await self._in_thread(step)
            self._check_sync(round_, distance, length, len(view.fragments))
            await self._become(after)
        else:
            await self._become(own.at_round(Round(round_ + 1)))
        if self._on_applied:
            await self._on_applied(Applied(round_, own, view, weights, bool(steered), self._state, shards))
        return agreed

    def _part(self, round_: Round) -> Part:
        """Of the tensors, those that a round exchanges."""
        return self.parts[round_ % len(self.parts)]

    def _outer_step(self, theta: Flat, velocity: Flat | None, update: Flat, round_: Round) -> tuple[Flat, Flat | None]:
        """(theta, velocity) of the next round: of what this one exchanges. `update` is used up."""
        if len(self.parts) == 1:
            return self.outer.apply(theta, velocity, update, round_)
        part = self._part(round_).range
        moved, faster = self.outer.apply(theta[part], None if velocity is None else velocity[part], update, round_)
        theta = theta.copy()
        theta[part] = moved
        if velocity is not None and faster is not None:
            velocity = velocity.copy()
            velocity[part] = faster
        return theta, velocity

    def _advance(self, theta: Flat, velocity: Flat | None, round_: Round) -> Advance:
        """Of what is exchanged in segments."""
        return Advance(theta, velocity, self.outer, round_, self._puller.ranges, self._vectors.any())

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
        if length:
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

    # ---- joining and catching up -----------------------------------------------------------------------------------

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

        Where nobody has committed lately, or none of those could give the state, replicas that sat their rounds out and
        keepers of snapshots are asked. False if nobody gave a state.
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
            if not await self._load_snapshot(reason):
                return False
        self._out_of_sync = False
        now = self.rules.clock.round_at(self._now())
        # Where we contributed already, the group counts that: another contribution to the same round would split it.
        await self._replay(Round(now + 1) if now in self._published else now)
        return True

    async def _load_snapshot(self, reason: str) -> bool:
        """Take over the newest state that somebody announces, unless ours has more contributions in it."""
        timeout = min(5.0, self.rules.clock.seconds)
        with self._waits.waiting("who announces a state", self._now() + timeout, "training goes on from our own"):
            announced = await self._exchange.replicas(self.module, timeout)
        newest = self.rules.clock.round_at(self._now()) + 1  # whoever is further ahead is nowhere
        claims: dict[tuple[Round, str], list[PeerId]] = defaultdict(list)
        for signed in announced:
            record = signed.record
            if signed.peer != self.peer and record.digest is not None and self._state.round < record.round <= newest:
                claims[Round(record.round), record.digest.hex()].append(signed.peer)
        ranked = sorted(claims, key=lambda claim: (claim[0], len(claims[claim]), claim[1]), reverse=True)
        for round_, digest in ranked[:MAX_SNAPSHOTS]:
            agreed = Agreement(digest, 0, tuple(sorted(claims[round_, digest])), unanimous=False)
            # One after another, each with a time of its own: whoever promises much and sends nothing costs only that.
            until = self._now() + self._patience / MAX_SNAPSHOTS
            state = await self._fetch_state(agreed, round_, until, self._state.history)
            if state is not None:
                self._drop_residual(reason)
                await self._become(state)
                return True
        return False

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
            self._emit("swarm.round.replayed", round=round_, contributions=len(view.counted))

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

    async def _fetch_state(
        self, agreed: Agreement, round_: Round, deadline: float, least_history: int = 0
    ) -> ReplicaState | None:
        """The state that `round_` began with, from several of its holders, checked against its digest.

        None if nobody could give it, or if it says another round than those who named it, or holds fewer contributions
        than `least_history`.
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
                if state.history < least_history:
                    raise StateError(f"the state holds {state.history} contributions, ours {least_history}")
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

    # ---- plumbing --------------------------------------------------------------------------------------------------

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
