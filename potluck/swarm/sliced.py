"""Sliced exchange: each member aggregates a part of the update for all (`rounds.md`, "Dense codecs: sliced exchange").

Whole blobs cost (g - 1) times a contribution's bytes; a butterfly all-reduce needs 2 (g - 1) / g of it. Member j pulls
its segments of everybody's blob, aggregates them, encodes what comes out with the run's codec and serves that; the
others pull it. Pull-only and leaderless: who aggregates what follows from the commits, a segment that nobody gives in
time is pulled raw by whoever needs it, and the same contributions give the same bytes whoever aggregates them. So any
member can check any segment. Each checks one a round, drawn at random; who lied is named, aggregates for us no more,
and those whom we tell so check it themselves.

Clipping and robust rules see one segment at a time: tensors are cut where segments end.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from blake3 import blake3

from potluck.dht.records import Commit
from potluck.errors import CodecError, PotluckError, ProtocolError, RpcRemoteError
from potluck.net.blobs import BlobId, BlobRef
from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.codecs.segments import SEGMENT_BYTES, DenseCodec
from potluck.swarm.contribution import Contribution
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.ownership import MARK_BYTES, owned_by
from potluck.swarm.phases import Round
from potluck.swarm.pull import Puller, View
from potluck.swarm.recycled import Recycled
from potluck.swarm.slice_board import NothingTold
from potluck.swarm.slices import MAX_ACCUSED, Accusation, Aggregated, agrees, assign

#: Shares of the time to pull: until then members' raw segments are waited for, and until then what others aggregated.
RAW_SHARE: Final = 0.45
TOLD_SHARE: Final = 0.75
#: Who has not begun to aggregate is asked again after this.
ASK_AGAIN_SECONDS: Final = 0.1
#: Rounds whose words are kept, so that an accusation can be looked into.
KEPT_ROUNDS: Final = 3


@dataclass
class _Round:
    """What is known of one round's exchange."""

    number: Round
    commits: Mapping[PeerId, Commit]
    owners: Sequence[PeerId]
    #: Zero where nobody gave a segment.
    update: Flat
    told: dict[PeerId, Aggregated] = field(default_factory=dict)
    #: Segments that are in `update`.
    filled: set[int] = field(default_factory=set)
    #: Of segments that others aggregated, as they came.
    digests: dict[int, bytes] = field(default_factory=dict)
    members: set[PeerId] = field(default_factory=set)

    def of(self, peer: PeerId) -> list[int]:
        return [segment for segment, owner in enumerate(self.owners) if owner == peer]


class SlicedPuller(Puller):
    """Gives `view.update` instead of contributions. `vectors`: for updates. `draw(n)` gives a number below n that
    nobody can foretell."""

    def __init__(self, *, vectors: Recycled, draw: Callable[[int], int], **pulling: Any) -> None:
        super().__init__(**pulling)
        self._vectors = vectors
        assert isinstance(self._codec, DenseCodec)
        self._dense: DenseCodec = self._codec
        self._draw = draw
        #: Who said of a segment what is not so.
        self.distrusted: set[PeerId] = set()
        self._accusations: deque[Accusation] = deque(maxlen=MAX_ACCUSED)
        self._looked_into: deque[Accusation] = deque(maxlen=64)
        self._past: deque[_Round] = deque(maxlen=KEPT_ROUNDS)
        width, size = self._dense.segment_values, self._layout.size
        self._ranges = [slice(at, min(size, at + width)) for at in range(0, size, width)]
        self._layouts = [self._layout.cut(part.start, part.stop) for part in self._ranges]

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
        await self._read(round_, shard, pull_by, view, session)
        view.contributions.clear()
        began, left = self._now(), pull_by - self._now()
        raw_by, told_by = began + RAW_SHARE * left, began + TOLD_SHARE * left
        commits = await self._genuine(view, raw_by)
        if not commits:
            return False
        owners = await self._in_thread(assign, len(self._ranges), commits, round_)
        one = _Round(round_, commits, owners, self._vectors.zeros())
        mine, checked = one.of(self._peer), self._draw(len(self._ranges))
        async with asyncio.TaskGroup() as group:
            if mine:
                group.create_task(self._aggregate_mine(one, mine, raw_by, view))
            for peer in set(one.owners) - self.distrusted - {self._peer}:
                group.create_task(self._take(one, peer, told_by, late))
            evidence = group.create_task(self._raw([checked], commits if checked not in mine else {}, told_by))
            if drift:
                for peer in commits.keys() - {self._peer}:
                    group.create_task(self._pull_fragment(peer, commits[peer], tuple(commits), pull_by, view))
        await self._check(one, checked, evidence.result())
        for accusation in dict.fromkeys(each for told in one.told.values() for each in told.accused):
            await self._look_into(accusation, one, pull_by)
        if missing := [segment for segment in range(len(self._ranges)) if segment not in one.filled]:
            self._emit("swarm.slices.raw", round=round_, segments=len(missing), of=len(self._ranges))
            await self._aggregate(one, missing, await self._raw(missing, commits, pull_by, view))
        view.update, view.aggregated = one.update, one.members
        self._past.append(replace(one, update=Layout(()).zeros(), filled=set()))
        return True

    async def _genuine(self, view: View, until: float) -> dict[PeerId, Commit]:
        """The commits whose blobs can be theirs. The mark lies at a blob's end, and is looked at only where two commit
        to the same one: nobody has the bytes of another's before everybody has committed."""
        size = MARK_BYTES + self._dense.max_bytes(self._layout)
        times = Counter(commit.blob for commit in view.commits.values())
        genuine = {}
        for peer, commit in sorted(view.commits.items()):
            try:
                if commit.size != size:
                    raise CodecError(f"a contribution of {commit.size} bytes, expected {size}")
                if times[commit.blob] > 1:
                    last = {(size - MARK_BYTES) // SEGMENT_BYTES, (size - 1) // SEGMENT_BYTES}
                    data = await self._chunks(peer, commit, sorted(last), until)
                    owned_by(data, peer, self._module, Round(commit.round))
                genuine[peer] = commit
            except PotluckError as error:
                view.missing[peer] = f"{type(error).__name__}: {error}"
        return genuine

    # ---- aggregating ----------------------------------------------------------------------------------------

    async def _aggregate_mine(self, one: _Round, segments: Sequence[int], until: float, view: View) -> None:
        self._exchange.begin_slices(self._module, one.number)
        told, blob = None, b""
        try:
            parts = await self._raw(segments, one.commits, until, view)
            if parts:
                encoded = await self._aggregate(one, segments, parts)
                blob = b"".join([*(each.ljust(SEGMENT_BYTES, b"\0") for each in encoded[:-1]), encoded[-1]])
                members = {str(peer): one.commits[peer].blob for peer in sorted(parts)}
                told = Aggregated("0" * 64, len(blob), tuple(segments), members, tuple(self._accusations))
        finally:
            await self._exchange.tell_slices(self._module, one.number, told, blob)

    async def _raw(
        self, segments: Sequence[int], commits: Mapping[PeerId, Commit], until: float, view: View | None = None
    ) -> dict[PeerId, list[Contribution]]:
        """Members' own segments, of those who give all of them in time. `view` hears of the others."""
        parts: dict[PeerId, list[Contribution]] = {}

        async def get(peer: PeerId, commit: Commit) -> None:
            try:
                data = await self._chunks(peer, commit, segments, until)
                parts[peer] = await self._in_thread(
                    lambda: [self._decoded(data, segment, segment) for segment in segments]
                )
            except PotluckError as error:
                if view is not None:
                    view.missing[peer] = f"{type(error).__name__}: {error}"

        async with asyncio.TaskGroup() as group:
            for peer, commit in commits.items():
                group.create_task(get(peer, commit))
        return parts

    async def _aggregate(
        self, one: _Round, segments: Sequence[int], parts: Mapping[PeerId, Sequence[Contribution]]
    ) -> list[bytes]:
        """Put segments into the update; as they are told to others."""

        def one_after_another() -> list[bytes]:
            encoded = []
            for place, segment in enumerate(segments):
                encoded.append(self._aggregated(one, segment, {peer: parts[peer][place] for peer in parts}))
                self._fill(one, segment, encoded[-1])
            return encoded

        told: list[bytes] = await self._in_thread(one_after_another)
        one.members |= parts.keys()
        return told

    def _aggregated(self, one: _Round, segment: int, contributions: Mapping[PeerId, Contribution]) -> bytes:
        rules, weights = self._rules, token_weights({peer: one.commits[peer].tokens for peer in contributions})
        layout = self._layouts[segment]
        update = aggregate(contributions, weights, layout, clip=rules.clip, rule=rules.rule, liars=rules.liars)
        return self._dense.encode_segment(update)

    async def _chunks(self, peer: PeerId, commit: Commit, indexes: Sequence[int], until: float) -> memoryview:
        ref, left = BlobRef(BlobId(commit.blob), commit.size), max(0.05, until - self._now())
        return await self._exchange.fetch_chunks(ref, peer, indexes, ref.size, left)

    def _decoded(self, data: memoryview, chunk: int, segment: int) -> Contribution:
        return self._dense.decode_segment(self._cut(data, chunk, segment), self._layouts[segment].size)

    def _cut(self, data: memoryview, chunk: int, segment: int) -> memoryview:
        start = chunk * SEGMENT_BYTES
        return data[start : start + self._dense.segment_bytes(self._layouts[segment].size)]

    def _fill(self, one: _Round, segment: int, data: bytes | memoryview) -> None:
        size = self._layouts[segment].size
        self._dense.decode_segment(data, size).add_to(one.update[self._ranges[segment]], slice(0, size), 1.0)
        one.filled.add(segment)

    def _fill_in(self, one: _Round, wanted: Mapping[int, int], data: memoryview) -> None:
        """`wanted`: which chunk of `data` each segment is."""
        for segment, chunk in wanted.items():
            encoded = self._cut(data, chunk, segment)
            self._fill(one, segment, encoded)
            one.digests[segment] = blake3(encoded).digest()

    # ---- what others aggregated -----------------------------------------------------------------------------

    def _drop(self, one: _Round, peer: PeerId) -> None:
        for segment in one.filled.intersection(one.of(peer)):
            one.filled.remove(segment)
            one.update[self._ranges[segment]] = 0.0

    async def _take(self, one: _Round, peer: PeerId, until: float, late: bool) -> None:
        """The segments that `peer` has aggregated for all. What does not come, or is no good, is pulled raw later."""
        try:
            told = await self._told(peer, one.number, until, late)
            if not agrees(told, {each: commit.blob for each, commit in one.commits.items()}):
                raise ProtocolError("aggregated other contributions than were committed to, or less than half of them")
            share = set(one.of(peer))
            wanted = {segment: place for place, segment in enumerate(told.segments) if segment in share}
            ref, most = BlobRef(BlobId(told.blob), told.size), SEGMENT_BYTES * len(told.segments)
            left = max(0.05, until - self._now())
            data = await self._exchange.fetch_chunks(ref, peer, list(wanted.values()), most, left)
            await self._in_thread(self._fill_in, one, wanted, data)
            one.told[peer] = told
            one.members |= {PeerId(each) for each in told.members}
        except PotluckError as error:
            self._drop(one, peer)
            self._emit("swarm.slices.failed", round=one.number, peer=peer, error=f"{type(error).__name__}: {error}")

    async def _told(self, peer: PeerId, round_: Round, until: float, late: bool) -> Aggregated:
        """Asked again while `peer` may not have begun: views of the clock differ."""
        while True:
            try:
                return await self._exchange.told_slices(peer, self._module, round_, max(0.05, until - self._now()))
            except RpcRemoteError as error:
                if late or error.kind != NothingTold.__name__ or self._now() + ASK_AGAIN_SECONDS >= until:
                    raise
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _check(self, one: _Round, segment: int, raw: Mapping[PeerId, Sequence[Contribution]]) -> None:
        """Whether a segment is what `raw`, its first column, gives. If not, all that its aggregator said is dropped."""
        owner = one.owners[segment]
        told = one.told.get(owner)
        if told is None or not told.members.keys() <= raw.keys() or segment not in one.digests:
            return
        right = await self._in_thread(
            self._aggregated, one, segment, {PeerId(peer): raw[PeerId(peer)][0] for peer in told.members}
        )
        if blake3(right).digest() == one.digests[segment]:
            return
        self._emit("swarm.slices.lied", round=one.number, peer=owner, segment=segment)
        self.distrusted.add(owner)
        self._accusations.append(Accusation(owner, one.number, segment))
        self._drop(one, owner)

    async def _look_into(self, accusation: Accusation, now: _Round, until: float) -> None:
        """Others' word is not believed: the segment is computed here."""
        accused = PeerId(accusation.peer)
        one = next((past for past in (*self._past, now) if past.number == accusation.round), None)
        if accusation in self._looked_into or accused in self.distrusted or one is None:
            return
        if not (accusation.segment < len(self._ranges) and one.owners[accusation.segment] == accused in one.told):
            return
        self._looked_into.append(accusation)
        members = {PeerId(peer): one.commits[PeerId(peer)] for peer in one.told[accused].members}
        await self._check(one, accusation.segment, await self._raw([accusation.segment], members, until))
