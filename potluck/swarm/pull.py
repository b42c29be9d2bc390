"""Steps 3 and 4 of a round: reading a shard finds the group, and its members' blobs are pulled (`rounds.md`).

What is late, missing or invalid is left out and noted. A stranger may publish as many commits as it has keys, so a
group has a bound: beyond it the same members are taken by everyone who read the same commits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from potluck.dht.records import Commit, Signed
from potluck.errors import BlobUnavailable, CapTooLow, PotluckError
from potluck.net.blobs import BlobId, BlobRef
from potluck.net.host import PeerId
from potluck.swarm.advance import Advance
from potluck.swarm.codecs import Codec
from potluck.swarm.contribution import Contribution, Segments
from potluck.swarm.exchange import Exchange
from potluck.swarm.fragments import decode_fragment, fragment_bytes
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.ownership import MARK_BYTES, owned_by
from potluck.swarm.parts import Part, parts_of
from potluck.swarm.phases import Round, RoundClock

#: A group may be this much larger than planned (estimates of the swarm's size lag behind) before members are left out.
MAX_OF_GROUP_SIZE = 2


@dataclass
class View:
    """What a peer saw of its group in one round."""

    commits: dict[PeerId, Commit] = field(default_factory=dict)
    contributions: dict[PeerId, Contribution] = field(default_factory=dict)
    fragments: dict[PeerId, Flat] = field(default_factory=dict)
    missing: dict[PeerId, str] = field(default_factory=dict)
    #: Of a sliced exchange (`sliced.py`): what was aggregated, of whom.
    update: Segments | None = None
    aggregated: set[PeerId] = field(default_factory=set)
    #: What is made of that as it comes, if it is.
    advance: Advance | None = None

    @property
    def incomplete(self) -> bool:
        """Whether a part of the update did not come, which others will have."""
        return self.update is not None and any(piece is None for _, piece in self.update)

    @property
    def counted(self) -> list[PeerId]:
        """Whose contributions count, in peer-id order."""
        return sorted((self.aggregated if self.update is not None else self.contributions.keys()) & self.commits.keys())

    def leave_out(self, peer: PeerId, error: PotluckError) -> None:
        """Note why a contribution is missing."""
        self.missing[peer] = f"{type(error).__name__}: {error}"

    def keep(self, members: Collection[PeerId]) -> None:
        """Forget everybody else."""
        everything: tuple[dict[PeerId, Any], ...] = (self.commits, self.contributions, self.fragments, self.missing)
        for part in everything:
            for peer in [peer for peer in part if peer not in members]:
                del part[peer]


def admitted(peers: Collection[PeerId], round_: Round, most: int) -> set[PeerId]:
    """At most `most` of the peers, drawn by a hash of peer and round: the same for all who see the same peers."""

    def rank(peer: PeerId) -> bytes:
        return hashlib.sha256(b"potluck.admitted.1" + round_.to_bytes(8, "big") + peer.encode()).digest()

    return set(sorted(peers, key=rank)[:most])


class Rules(Protocol):
    """What this file reads of `RoundRules`."""

    @property
    def clock(self) -> RoundClock: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def fragments(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def clip(self) -> bool: ...
    @property
    def rule(self) -> str: ...
    @property
    def liars(self) -> float: ...


class Puller:
    """Reads groups for one replica. `in_thread` runs blocking work off the event loop; `emit` hears what happens."""

    #: The parts of the flat vector of which `View.update` consists, if it does.
    ranges: Sequence[slice] = ()

    def __init__(
        self,
        *,
        peer: PeerId,
        module: str,
        layout: Layout,
        codec: Codec,
        exchange: Exchange,
        rules: Rules,
        now: Callable[[], float],
        in_thread: Callable[..., Awaitable[Any]],
        emit: Callable[..., None],
    ) -> None:
        self._peer, self._module, self._layout, self._codec = peer, module, layout, codec
        self._exchange, self._rules, self._now, self._in_thread = exchange, rules, now, in_thread
        self._emit = emit
        self._parts = parts_of(layout, rules.stream)
        self._most, self._fragments = MAX_OF_GROUP_SIZE * rules.group_size, rules.fragments
        #: That the download cap is too low was said, and is so still.
        self._cap_too_low = False

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
        """Read the shard once and fetch what is new into `view`, until `pull_by`; True if anything was new.

        `drift`: fetch drift fragments too. `session`: commits of ours that bear it do not count (our own node holds
        what nobody else saw). `late`: the round is over, and who does not have a blob will not get it.
        """
        new = await self._read(round_, shard, pull_by, view, session)
        holders = tuple(peer for peer in view.commits if peer != self._peer)
        async with asyncio.TaskGroup() as group:
            for peer, commit in new.items():
                group.create_task(self._pull_one(peer, commit, holders, pull_by, view, drift, late))
        return bool(new)

    async def _read(
        self, round_: Round, shard: int, pull_by: float, view: View, session: bytes | None
    ) -> dict[PeerId, Commit]:
        """Read the shard once: the commits that are new to `view`."""
        left = pull_by - self._now()
        if left <= 0:
            return {}
        signed = await self._exchange.commits(self._module, round_, shard, left)
        known = {
            s.peer: s.record
            for s in signed
            if self.counts(s, round_) and (s.peer != self._peer or s.record.session != session)
        }
        members = admitted(known.keys() | view.commits.keys(), round_, self._most)
        new = {peer: commit for peer, commit in known.items() if peer in members and peer not in view.commits}
        view.commits.update(new)
        view.keep(members)
        if new:
            self._look_at_cap(self._bytes_of(new), left)
        return new

    def _bytes_of(self, new: Mapping[PeerId, Commit]) -> int:
        """What comes from others."""
        return sum(commit.size for peer, commit in new.items() if peer != self._peer)

    def _look_at_cap(self, size: int, seconds: float) -> None:
        said, self._cap_too_low = self._cap_too_low, False
        try:
            self._exchange.check_download(size, seconds)
        except CapTooLow as error:
            self._cap_too_low = True
            if not said:
                self._emit("peer.cap.too_low", error=str(error))

    def counts(self, signed: Signed[Commit], round_: Round) -> bool:
        """Commits stamped after the deadline count for nobody, nor do those that trained nothing, or claim more steps
        than a round has, or other tokens than those steps have."""
        record, rules = signed.record, self._rules
        if record.committed_at > rules.clock.window(round_).commit_by or record.tokens <= 0:
            return False
        return rules.step_tokens == 0 or (
            0 < record.steps <= rules.steps and record.tokens == record.steps * rules.step_tokens
        )

    async def _pull_one(
        self,
        peer: PeerId,
        commit: Commit,
        members: tuple[PeerId, ...],
        pull_by: float,
        view: View,
        drift: bool,
        late: bool,
    ) -> None:
        holders = (peer, *(m for m in members if m != peer))
        try:
            own = await self._own_blob(peer, commit, holders, pull_by, may_come=not late)
            view.contributions[peer] = await self._in_thread(self._codec.decode, own, self._part_of(commit).layout)
            view.missing.pop(peer, None)
            if drift and peer != self._peer:
                await self._pull_fragment(peer, commit, holders, pull_by, view)
        except PotluckError as error:  # a full disk, too: others decide how much there is to store
            view.leave_out(peer, error)

    async def _own_blob(
        self, peer: PeerId, commit: Commit, holders: Sequence[PeerId], until: float, may_come: bool
    ) -> memoryview:
        """What a peer's codec made, without the mark. Raises PotluckError."""
        most = MARK_BYTES + self._codec.max_bytes(self._part_of(commit).layout)
        ref, left = BlobRef(BlobId(commit.blob), commit.size), max(0.05, until - self._now())
        blob = await self._exchange.fetch(ref, holders, most, left, may_come=may_come)
        return owned_by(blob, peer, self._module, Round(commit.round))

    def _part_of(self, commit: Commit) -> Part:
        return self._parts[commit.round % len(self._parts)]

    async def complete(self, view: View, until: float) -> None:
        """Fetch what an incomplete view lacks, after the deadline. Whole contributions are left out instead."""

    async def chase(self, view: View, until: float, came: Callable[[PeerId], None]) -> None:
        """Fetch what did not come in time, for whoever catches up on its round; `came` hears of each that is had."""

        async def one(peer: PeerId, commit: Commit) -> None:
            try:
                await self._fetch_late(peer, commit, until)
                came(peer)
            except PotluckError:
                pass  # as its round said

        async with asyncio.TaskGroup() as group:
            for peer in sorted(view.missing.keys() & view.commits.keys() - {self._peer}):
                if view.missing[peer].startswith(BlobUnavailable.__name__):
                    group.create_task(one(peer, view.commits[peer]))

    async def check(self, until: float) -> None:
        """Look into what others said of the round that was applied. Whole contributions are what they are."""

    async def _fetch_late(self, peer: PeerId, commit: Commit, until: float) -> None:
        """Raises PotluckError."""
        await self._own_blob(peer, commit, [peer], until, may_come=False)

    async def _pull_fragment(
        self, peer: PeerId, commit: Commit, holders: tuple[PeerId, ...], pull_by: float, view: View
    ) -> None:
        if commit.fragment is None:
            return
        size = fragment_bytes(self._layout, commit.round, self._fragments)
        ref = BlobRef(BlobId(commit.fragment), commit.fragment_size)
        try:
            blob = await self._exchange.fetch(ref, holders, size, max(0.05, pull_by - self._now()), may_come=True)
            view.fragments[peer] = await self._in_thread(
                decode_fragment, blob, self._layout, commit.round, self._fragments
            )
        except PotluckError:
            pass  # a drift fragment is an extra: without it drift contracts a round later
