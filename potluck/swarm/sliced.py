"""Sliced exchange: each member aggregates a part of the update for all (`rounds.md`, "Dense codecs: sliced exchange").

Whole blobs cost (g - 1) times a contribution's bytes; a butterfly all-reduce needs 2 (g - 1) / g of it. A member pulls
a segment of everybody's blob, aggregates it, encodes what comes out with the run's codec and gives that to whoever
asks, while the next segment comes: both ways of its line are busy all the time. Pull-only and leaderless: who
aggregates what follows from the commits, a segment that nobody gives in time is pulled raw by whoever needs it, and
the same contributions give the same bytes whoever aggregates them. So any member can check any segment. Members check
segments drawn at random; who lied is named, aggregates for us no more, and those whom we tell so check it themselves.

Clipping and robust rules see one segment at a time: tensors are cut where segments end.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
from blake3 import blake3

from potluck.dht.records import Commit
from potluck.errors import CodecError, PotluckError, RpcRemoteError
from potluck.net.blobs import BlobId, BlobRef
from potluck.net.fetch import Kept
from potluck.net.host import PeerId
from potluck.net.pace import WINDOW
from potluck.net.wire import Buffer
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.agreement import Claim, agreement
from potluck.swarm.codecs.frame import MAX_MAGNITUDE
from potluck.swarm.codecs.segments import SEGMENT_BYTES, DenseCodec
from potluck.swarm.contribution import Contribution, Dense, Quantized
from potluck.swarm.ownership import MARK_BYTES, owned_by
from potluck.swarm.phases import Round
from potluck.swarm.pull import Puller, View
from potluck.swarm.recycled import Recycled
from potluck.swarm.slice_board import MOST_WAITING, NOT_HEARD, NothingTold
from potluck.swarm.slices import (
    MAX_ACCUSED,
    Accusation,
    Aggregated,
    assign,
    check_enough,
    fewest,
    members_in,
    name_of,
    named_by_most,
)

#: Shares of the time to pull. Until then whose contribution it is that two have committed to: who does not show is left
#: out; until then members' raw segments are waited for; what others aggregated; and what must be pulled raw instead.
DISPUTE_SHARE: Final = 0.1
RAW_SHARE: Final = 0.6
TOLD_SHARE: Final = 0.8
FALLBACK_SHARE: Final = 0.9
#: Of the time after a deadline, for segments that others aggregated; the rest is for raw ones.
LATE_TOLD_SHARE: Final = 0.5
#: For how many rounds nobody is waited for after it was in vain: who withholds must not cost all rounds.
IMPATIENT_ROUNDS: Final = 8
#: Who has not begun to aggregate is asked again after this.
ASK_AGAIN_SECONDS: Final = 0.1
#: Rounds whose words are kept, so that an accusation can be looked into.
KEPT_ROUNDS: Final = 3
#: Of an exchange's bytes, what checks may cost on the average.
CHECK_SHARE: Final = 1 / 8
#: A mean of values at a codec's bound may be beyond it by rounding: such aggregates are clipped to a little less.
MOST: Final = np.float32(0.999 * MAX_MAGNITUDE)
#: Rounds of so many in which an aggregator did not show what it says that it counted, before it is trusted no more.
MOST_UNPROVED: Final = 2
UNPROVED_ROUNDS: Final = 256
#: Rounds of which an aggregator shows what it counted: an accusation is heard in the round behind.
SHOWN_ROUNDS: Final = 2
#: Of the time for a check, how long members are asked for their own; then their segment's aggregator is.
ASK_MEMBERS_SHARE: Final = 0.5
#: Of the time to pull, how long an aggregator must have been asked before it is blamed for what it did not show.
FAIR_SHARE: Final = 0.15

#: What is done with a segment's contributions, once nobody's is waited for any more.
Then = Callable[[int, Mapping[PeerId, Contribution]], Coroutine[Any, Any, object]]


class _Evidence(NamedTuple):
    """What members contributed to a segment, of those who were to be had; whether its aggregator had time to show the
    rest."""

    raw: Mapping[PeerId, Contribution]
    fair: bool


@dataclass
class _Round:
    """What is known of one round's exchange."""

    number: Round
    commits: Mapping[PeerId, Commit]
    owners: Sequence[PeerId]
    #: Whose commit each name (`name_of`) is.
    names: Mapping[bytes, PeerId]
    #: Of each segment, what it comes to, as soon as that is known.
    pieces: dict[int, Dense | Quantized] = field(default_factory=dict)
    #: Of segments that others aggregated, as they came: whose contributions are in them, and a digest.
    told: dict[int, tuple[frozenset[PeerId], bytes]] = field(default_factory=dict)
    #: By whom.
    accused: dict[PeerId, tuple[Accusation, ...]] = field(default_factory=dict)
    #: Who failed to give a segment that it should have aggregated.
    failed: set[PeerId] = field(default_factory=set)
    #: Of each of these, whose contributions are in it.
    counted: dict[int, frozenset[PeerId]] = field(default_factory=dict)
    #: Who gave us nothing of its own.
    silent: set[PeerId] = field(default_factory=set)
    #: That is known.
    asked_all: asyncio.Event = field(default_factory=asyncio.Event)
    #: Of each, that it gave us its own of what we aggregate, or does not.
    gave: Mapping[PeerId, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))

    @property
    def majority(self) -> int:
        """Of the contributions. What fewer of them come to is hardly what others apply."""
        return fewest(len(self.commits), robust=False)

    def of(self, peer: PeerId) -> list[int]:
        return [segment for segment, owner in enumerate(self.owners) if owner == peer]


class SlicedPuller(Puller):
    """Gives `view.update` instead of contributions. `draw(n)` gives a number below n that nobody can foretell."""

    def __init__(self, *, draw: Callable[[int], int], **pulling: Any) -> None:
        super().__init__(**pulling)
        assert isinstance(self._codec, DenseCodec)
        self._dense: DenseCodec = self._codec
        self._draw = draw
        #: Who said of a segment what is not so.
        self.distrusted: set[PeerId] = set()
        self._accusations: deque[Accusation] = deque(maxlen=MAX_ACCUSED)
        self._looked_into: deque[Accusation] = deque(maxlen=64)
        #: The last rounds in which it could not be checked what a peer aggregated, as it did not show what it counted.
        self._unproved = defaultdict[PeerId, set[Round]](set)
        self._past: deque[_Round] = deque(maxlen=KEPT_ROUNDS)
        #: What we counted in the last rounds, which we show; and the first round of which others still have to.
        self._shown: deque[tuple[Round, Kept]] = deque()
        self._shown_from = Round(0)
        #: The last round, and who answered us in it.
        self._there: tuple[Round, Collection[PeerId]] = Round(0), ()
        #: Seconds to pull in, and when they are over.
        self._window, self._pull_by = 0.0, 0.0
        #: Segments to check, once nothing waits for the line: one drawn in each round, and what is not decided.
        self._unchecked: list[tuple[_Round, int]] = []
        #: The last round, if segments of it are missing.
        self._unfinished: _Round | None = None
        #: Until this round nobody is waited for after a deadline: it was in vain.
        self._patient_from = Round(0)
        self.ranges = list(self._dense.parts(self._layout.size))
        self._layouts = [self._layout.cut(part.start, part.stop) for part in self.ranges]
        self._scratch = Recycled(self._dense.segment_values)

    async def pull(
        self,
        round_: Round,
        shard: int,
        pull_by: float,
        view: View,
        *,
        drift: bool,
        session: bytes | None = None,
        late: bool = False,
    ) -> bool:
        """As `Puller.pull`, but once: a commit that is seen later is not counted here."""
        if view.update is not None:
            return False
        # Nobody asks for what is counted when a round is replayed, and nobody else shows what is older.
        self._shown_from = Round(round_ + 1 - (0 if late else SHOWN_ROUNDS))
        kept = None if late else self._keep_from_now_on(round_)
        await self._read(round_, shard, pull_by, view, session)
        view.contributions.clear()
        began, left = self._now(), pull_by - self._now()
        self._window, self._pull_by = left, pull_by
        raw_by, told_by = began + RAW_SHARE * left, began + TOLD_SHARE * left
        commits = await self._genuine(view, began + DISPUTE_SHARE * left)
        if not commits:
            return False
        owners = await self._in_thread(assign, len(self.ranges), commits, round_)
        names = {name_of(commit): peer for peer, commit in commits.items()}
        one = _Round(round_, commits, owners, names)
        before = set(self.distrusted)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._aggregate_mine(one, raw_by, view, kept))
            for peer in sorted(set(one.owners) - before - {self._peer}):
                group.create_task(self._take(one, peer, told_by, view, late))
            if drift:
                for peer in sorted(commits.keys() - {self._peer}):
                    group.create_task(self._pull_fragment(peer, commits[peer], tuple(commits), pull_by, view))
        self._there = round_, (commits.keys() - one.silent) | {one.owners[segment] for segment in one.told}
        patient = not late and round_ >= self._patient_from
        least = one.majority if patient else 1
        await self._fill_raw(one, self._missing(one), began + FALLBACK_SHARE * left, view, least)
        not_to_be_had = self._missing(one)
        # Behind what the update needs: whoever accuses must not keep others from that.
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_into_one(one, pull_by))
            if not late:
                group.create_task(self._compare_the_last(one, pull_by))
        self._drop(one, self.distrusted - before)
        dropped = [segment for segment in self._missing(one) if segment not in not_to_be_had]
        await self._fill_raw(one, dropped, pull_by, view, least)
        self._conclude(one, view)
        self._past.append(past := replace(one, pieces={}))
        if not late and (drawn := self._to_check(owners, len(commits))) is not None:
            self._unchecked.append((past, drawn))
        heard = [one.told[segment][1] if segment in one.told else NOT_HEARD for segment in range(len(self.ranges))]
        self._exchange.hear_slices(self._module, one.number, heard)
        self._unfinished = one if patient and view.incomplete else None
        return True

    async def complete(self, view: View, until: float) -> None:
        """Aggregators tell the segments of a round for several rounds. A line that was too slow for the deadline would
        be busier with raw ones, and with a whole state in the next round."""
        one, self._unfinished = self._unfinished, None
        if one is None:
            return
        missing, told_by = self._missing(one), self._now() + LATE_TOLD_SHARE * (until - self._now())
        known = set(one.told)
        self._emit("swarm.slices.late", round=one.number, segments=len(missing), of=len(self.ranges))
        async with asyncio.TaskGroup() as group:
            for peer in sorted({one.owners[segment] for segment in missing} - self.distrusted - {self._peer}):
                group.create_task(self._take(one, peer, told_by, view, late=True))
        came = one.told.keys() - known
        if not came:
            self._patient_from = Round(one.number + 1 + IMPATIENT_ROUNDS)
        await self._fill_raw(one, self._missing(one), until, view, 1)
        self._conclude(one, view)

    def _conclude(self, one: _Round, view: View) -> None:
        view.update = [(part, one.pieces.get(segment)) for segment, part in enumerate(self.ranges)]
        view.aggregated = named_by_most([one.counted[segment] for segment in sorted(one.pieces)])
        for peer in view.aggregated:
            view.missing.pop(peer, None)

    def _bytes_of(self, new: Mapping[PeerId, Commit]) -> int:
        """Of n members' bytes, an n-th raw and the others' aggregates."""
        return 2 * super()._bytes_of(new) // len(new)

    async def _fill_raw(self, one: _Round, segments: Sequence[int], until: float, view: View, least: int) -> None:
        """Aggregate what nobody else did, of so many contributions at least."""
        if segments:
            self._emit("swarm.slices.raw", round=one.number, segments=len(segments), of=len(self.ranges))
            await self._raw(segments, one.commits, until, partial(self._aggregate, one, least), view)

    async def _fetch_late(self, peer: PeerId, commit: Commit, until: float) -> None:
        """The last chunk, mostly a short one: nobody catches up by whole contributions, and it tells who is slow from
        who is gone."""
        await self._chunks(peer, commit, [(commit.size - 1) // SEGMENT_BYTES], until, lambda index, data: None)

    def _missing(self, one: _Round) -> list[int]:
        return [segment for segment in range(len(self.ranges)) if segment not in one.pieces]

    async def _genuine(self, view: View, until: float) -> dict[PeerId, Commit]:
        """The commits whose blobs can be theirs. The mark lies at a blob's end, and is looked at only where two commit
        to the same one: nobody has the bytes of another's before everybody has committed."""
        size = MARK_BYTES + self._dense.max_bytes(self._layout)
        times, genuine = Counter(commit.blob for commit in view.commits.values()), dict[PeerId, Commit]()

        async def look_at(peer: PeerId, commit: Commit) -> None:
            try:
                if commit.size != size:
                    raise CodecError(f"a contribution of {commit.size} bytes, expected {size}")
                if times[commit.blob] > 1:
                    last = {(size - MARK_BYTES) // SEGMENT_BYTES, (size - 1) // SEGMENT_BYTES}
                    data: dict[int, memoryview] = {}
                    await self._chunks(peer, commit, sorted(last), until, data.__setitem__)
                    tail = b"".join(data[index] for index in sorted(data))
                    owned_by(tail, peer, self._module, Round(commit.round))
                genuine[peer] = commit
            except PotluckError as error:
                view.leave_out(peer, error)

        async with asyncio.TaskGroup() as group:
            for peer, commit in view.commits.items():
                group.create_task(look_at(peer, commit))
        return dict(sorted(genuine.items()))

    # ---- aggregating ----------------------------------------------------------------------------------------

    def _keep_from_now_on(self, round_: Round) -> Kept:
        """Where what is counted in this round is noted; what need not be shown any more goes."""
        while self._shown and self._shown[0][0] <= round_ - SHOWN_ROUNDS:
            self._exchange.drop_chunks(self._shown.popleft()[1])
        self._shown.append((round_, []))
        return self._shown[-1][1]

    async def _aggregate_mine(self, one: _Round, until: float, view: View, kept: Kept | None) -> None:
        mine = one.of(self._peer)

        async def aggregate_and_tell(segment: int, parts: Mapping[PeerId, Contribution]) -> None:
            if data := await self._aggregate(one, one.majority, segment, parts):
                counted = (name for name, peer in one.names.items() if peer in parts)
                told = Aggregated.of(counted, self._accusations)
                self._exchange.tell_slice(self._module, one.number, segment, told, data)
                await self._use(one, segment, view)

        self._exchange.begin_slices(self._module, one.number, mine, one.commits.keys())
        try:
            await self._raw(
                mine, one.commits, until, aggregate_and_tell, view, kept=kept, gave=lambda peer: one.gave[peer].set()
            )
        finally:
            self._exchange.end_slices(self._module, one.number)
            one.silent.update(view.missing.keys() & one.commits.keys())
            one.asked_all.set()

    async def _raw(
        self,
        segments: Sequence[int],
        commits: Mapping[PeerId, Commit],
        until: float,
        then: Then,
        view: View | None = None,
        *,
        kept: Kept | None = None,
        holder: PeerId | None = None,
        gave: Callable[[PeerId], object] = lambda peer: None,
    ) -> None:
        """Pull members' own segments, from themselves or from one `holder`; `kept`: to show them. `then` has each as
        soon as it came from all who give it in time; `view` hears of those who do not; `gave` of who gives no more. Of
        no segments: ask whether they answer at all (but for blobs of one chunk: those have no list to ask for)."""
        parts: dict[int, dict[PeerId, Contribution]] = {segment: {} for segment in segments}
        awaited = {segment: set(commits) for segment in segments}

        def settle(segment: int, peer: PeerId) -> None:
            if peer in awaited[segment]:
                awaited[segment].remove(peer)
                if not awaited[segment]:
                    group.create_task(then(segment, parts.pop(segment)))

        def failed(peer: PeerId, error: PotluckError) -> None:
            if view is not None:
                view.leave_out(peer, error)

        async def get(peer: PeerId, commit: Commit) -> None:
            def came(segment: int, data: memoryview) -> None:
                try:
                    parts[segment][peer] = self._decoded(data, segment)
                except CodecError as error:
                    failed(peer, error)
                settle(segment, peer)

            try:
                await self._chunks(holder or peer, commit, segments, until, came, kept)
            except PotluckError as error:
                failed(peer, error)
            gave(peer)
            for segment in segments:
                settle(segment, peer)

        async with asyncio.TaskGroup() as group:
            for peer, commit in commits.items():
                group.create_task(get(peer, commit))

    async def _aggregate(self, one: _Round, least: int, segment: int, parts: Mapping[PeerId, Contribution]) -> Buffer:
        """Make a segment of the update; as it is told to others. Nothing of fewer contributions than `least`."""

        def work() -> memoryview:
            encoded, one.pieces[segment] = self._aggregated(one, segment, parts)
            return encoded

        if len(parts) < least:
            return b""
        encoded: Buffer = await self._in_thread(work)
        one.counted[segment] = frozenset(parts)
        return encoded

    def _aggregated(
        self, one: _Round, segment: int, contributions: Mapping[PeerId, Contribution]
    ) -> tuple[memoryview, Dense | Quantized]:
        """A segment of the update, as it is told and as it is applied."""
        rules, weights = self._rules, token_weights({peer: one.commits[peer].tokens for peer in contributions})
        layout = self._layouts[segment]
        update = aggregate(
            contributions,
            weights,
            layout,
            clip=rules.clip,
            rule=rules.rule,
            liars=rules.liars,
            out=self._scratch.any()[: layout.size] if rules.rule == "mean" else None,
        )
        encoded = self._dense.encode_segment(update)
        try:
            return encoded, self._decoded(encoded, segment)
        except CodecError:  # of values at the codec's bound, and by rounding beyond it
            encoded = self._dense.encode_segment(np.clip(update, -MOST, MOST, out=update))
            return encoded, self._decoded(encoded, segment)

    async def _chunks(
        self,
        peer: PeerId,
        commit: Commit,
        indexes: Sequence[int],
        until: float,
        on_chunk: Callable[[int, memoryview], None],
        kept: Kept | None = None,
    ) -> None:
        ref, left = BlobRef(BlobId(commit.blob), commit.size), max(0.05, until - self._now())
        await self._exchange.fetch_chunks(ref, peer, indexes, left, on_chunk, kept)

    def _decoded(self, data: bytes | memoryview, segment: int) -> Dense | Quantized:
        """`data`: of the segment, and what may lie behind it in its chunk."""
        values = self._layouts[segment].size
        return self._dense.decode_segment(memoryview(data)[: self._dense.segment_bytes(values)], values)

    # ---- what others aggregated -----------------------------------------------------------------------------

    async def _take(self, one: _Round, peer: PeerId, until: float, view: View, late: bool) -> None:
        """The segments that `peer` aggregates for all. What does not come, or is no good, is pulled raw later."""
        robust = self._rules.rule != "mean"
        waiting = deque(segment for segment in one.of(peer) if segment not in one.pieces)

        async def take(segment: int) -> None:
            try:
                told, data = await self._told(one, peer, segment, until, late)
                members = members_in(told, one.names)
                if len(members) < fewest(len(one.commits), robust):
                    await one.asked_all.wait()
                check_enough(members, one.commits, one.silent, robust)
                # Here and not in a thread: 0.3 ms, while it is in the cache.
                one.pieces[segment] = self._decoded(data, segment)
                one.told[segment], one.counted[segment] = (members, blake3(data).digest()), members
                one.accused[peer] = told.accused
                group.create_task(self._use(one, segment, view))
            except PotluckError as error:
                if peer not in one.failed:
                    what = f"{type(error).__name__}: {error}"
                    self._emit("swarm.slices.failed", round=one.number, peer=peer, segment=segment, error=what)
                one.failed.add(peer)

        async def take_on(at_once: int) -> None:
            while waiting and at_once <= self._exchange.window(peer) and self._now() < until:
                await take(waiting.popleft())

        if self._exchange.window(peer) < WINDOW:
            # Of a line that is full its raw segments first: all others wait for what is made of them.
            await one.gave[peer].wait()
        async with asyncio.TaskGroup() as group:
            for number in range(max(1, min(WINDOW, MOST_WAITING // len(one.commits)))):
                group.create_task(take_on(number + 1))

    async def _use(self, one: _Round, segment: int, view: View) -> None:
        """A segment that came changes the state while others are waited for: of lines that are slow. Where they are
        fast the processor is what all wait for, and others for what it aggregates."""
        slow = any(self._exchange.window(peer) < WINDOW for peer in one.commits if peer != self._peer)
        if view.advance is not None and slow:
            await self._in_thread(view.advance.take, segment, one.pieces[segment])

    async def _told(
        self, one: _Round, peer: PeerId, segment: int, until: float, late: bool
    ) -> tuple[Aggregated, memoryview]:
        """Asked again while `peer` may not have begun: views of the clock differ."""
        size = self._dense.segment_bytes(self._layouts[segment].size)
        while True:
            left = max(0.05, until - self._now())
            try:
                return await self._exchange.told_slice(peer, self._module, one.number, segment, size, left)
            except RpcRemoteError as error:
                if late or error.kind != NothingTold.__name__ or self._now() + ASK_AGAIN_SECONDS >= until:
                    raise
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    # ---- checking others ------------------------------------------------------------------------------------

    def _to_check(self, owners: Sequence[PeerId], commits: int) -> int | None:
        """A segment drawn at random, if it is one that somebody else aggregates."""
        # A check costs g - 1 segments; the exchange of n costs 2 n (g - 1) / g.
        segments, share = len(owners), CHECK_SHARE * 2 * len(owners) / commits
        drawn = self._draw(max(segments, round(segments / share)))
        unchecked = self.distrusted | {self._peer}
        return drawn if drawn < segments and owners[drawn] not in unchecked else None

    async def check(self, until: float) -> None:
        """Behind the time to pull, where lines are idle and nothing waits. The segment's aggregator has told it by
        then: to who asks for members' own before, its own among them, it would tell the truth."""
        await asyncio.sleep(max(0.0, self._pull_by - self._now()))
        for each in tuple(self._unchecked):
            one, segment = each
            trusted = segment in one.told and one.owners[segment] not in self.distrusted
            shown = trusted and one.number >= self._shown_from
            if not shown or await self._check(one, segment, await self._raw_of_told(one, segment, until)):
                self._unchecked.remove(each)

    async def _raw_of_told(self, one: _Round, segment: int, until: float) -> _Evidence:
        """Pull what is in a segment, as its aggregator says: from the members, and what they do not give from the
        aggregator, which has to show what it counted. Who is known to give us nothing is not asked."""
        members, owner, found = one.told[segment][0], one.owners[segment], dict[PeerId, Contribution]()
        silent, began = members & one.silent, self._now()
        turn = began + ASK_MEMBERS_SHARE * (until - began)

        async def add(segment: int, parts: Mapping[PeerId, Contribution]) -> None:
            found.update(parts)

        async def ask(peers: Collection[PeerId], until: float, holder: PeerId | None = None) -> None:
            commits = {peer: one.commits[peer] for peer in sorted(peers)}
            await self._raw([segment], commits, until, add, holder=holder)

        async def ask_the_others() -> None:
            await ask(members - silent, turn)
            if hidden := members - silent - found.keys():
                await ask(hidden, until, owner)

        async with asyncio.TaskGroup() as group:
            group.create_task(ask(silent, until, owner))
            group.create_task(ask_the_others())
        asked_from = began if members - found.keys() <= silent else turn
        return _Evidence(found, fair=until - asked_from >= FAIR_SHARE * self._window)

    async def _check(self, one: _Round, segment: int, evidence: _Evidence) -> bool:
        """Whether a segment is what the evidence gives. If not, all that its aggregator said is dropped. So it is where
        nobody shows something that the aggregator counted, itself included, again and again while it has to. False if
        nothing is known now."""
        (members, digest), owner, raw = one.told[segment], one.owners[segment], evidence.raw
        if members <= raw.keys():
            right, _ = await self._in_thread(self._aggregated, one, segment, {peer: raw[peer] for peer in members})
            if blake3(right).digest() == digest:
                return True
            event = "swarm.slices.lied"
        elif evidence.fair and self._has_to_show(owner, one.number) and self._heard_most(raw, members):
            strikes = {number for number in self._unproved[owner] if number > one.number - UNPROVED_ROUNDS}
            self._unproved[owner] = strikes | {one.number}
            event = "swarm.slices.unproved"
        else:
            return False
        self._emit(event, round=one.number, peer=owner, segment=segment)
        if (accusation := Accusation(owner, one.number, segment)) not in self._accusations:
            self._accusations.append(accusation)  # others ask it, too
        if event == "swarm.slices.lied" or len(self._unproved[owner]) >= MOST_UNPROVED:
            self.distrusted.add(owner)
            self._drop(one, [owner])
        return True

    def _has_to_show(self, owner: PeerId, counted_in: Round) -> bool:
        """Who answered in no later round may be gone, and nobody is blamed for that."""
        last, peers = self._there
        return counted_in >= self._shown_from and last > counted_in and owner in peers

    def _heard_most(self, raw: Collection[PeerId], members: Collection[PeerId]) -> bool:
        """Who hears few of the others must accuse nobody: the line may be its own."""
        others = set(members) - {self._peer}
        return 2 * len(others.intersection(raw)) >= len(others)

    def _drop(self, one: _Round, liars: Iterable[PeerId]) -> None:
        for liar in liars:
            for segment in one.of(liar):
                one.pieces.pop(segment, None)

    async def _look_into_one(self, now: _Round, until: float) -> None:
        """One accusation of one of those who accuse, drawn: who cries most is not heard most, and what it costs is
        bounded. Others' word is not believed: the segment is computed here."""
        rounds = [
            [(each, one) for each in accused if (one := self._round_of(each, now))]
            for _, accused in sorted(now.accused.items())
        ]
        if not (worth := [accused for accused in rounds if accused]):
            return
        accused = worth[self._draw(len(worth))]
        accusation, one = accused[self._draw(len(accused))]
        evidence = await self._raw_of_told(one, accusation.segment, until)
        if one.told[accusation.segment][0] <= evidence.raw.keys():  # else it is looked into when it is heard again
            self._looked_into.append(accusation)
        await self._check(one, accusation.segment, evidence)

    async def _compare_the_last(self, now: _Round, until: float) -> None:
        """Who began this round with another state than most may have been told other segments than they were. One of
        them says what it was told, and a segment that differs is computed here."""
        agreed = agreement(Claim(peer, commit.digest, commit.history) for peer, commit in now.commits.items())
        last = next((one for one in self._past if one.number + 1 == now.number), None)
        if last is None or agreed is None or self._peer not in now.commits:
            return
        others = [peer for peer in agreed.holders if peer in last.commits]
        if not others or now.commits[self._peer].digest == agreed.digest:
            return
        asked = others[self._draw(len(others))]
        try:
            left = max(0.05, until - self._now())
            heard = await self._exchange.heard_slices(asked, self._module, last.number, len(self.ranges), left)
        except PotluckError:
            return  # another one next time
        unchecked = self.distrusted | {asked}
        differ = [
            segment
            for segment, (_, digest) in sorted(last.told.items())
            if heard[segment] not in (NOT_HEARD, digest) and last.owners[segment] not in unchecked
        ]
        if differ:
            segment = differ[self._draw(len(differ))]
            await self._check(last, segment, await self._raw_of_told(last, segment, until))

    def _round_of(self, accusation: Accusation, now: _Round) -> _Round | None:
        """That of an accusation worth looking into."""
        accused = PeerId(accusation.peer)
        if accusation in self._looked_into or accused in self.distrusted:
            return None
        for one in (*self._past, now):
            if one.number == accusation.round and accusation.segment in one.told:
                return one if one.owners[accusation.segment] == accused else None
        return None
