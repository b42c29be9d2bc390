"""Who aggregates which part of a dense update, and what a member says about the parts that it did. Pure.

A dense contribution is cut into segments of about a mebibyte (`codecs/segments.py`). Each has one member of the group
for its aggregator, which every member works out from the commits (`rounds.md`, "Dense codecs: sliced exchange").
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Final

import msgspec

from potluck.dht.records import Commit
from potluck.errors import ProtocolError
from potluck.net.host import PeerId
from potluck.swarm.phases import Round

#: Of a module whose segments nobody counts: 2^18 segments of float32 are 2^36 parameters.
MAX_SEGMENTS: Final = 1 << 18
MAX_MEMBERS: Final = 1024
MAX_ACCUSED: Final = 4
NAME_BYTES: Final = 32

PeerText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SEGMENTS)]


class Accusation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`peer` said of `segment` in `round` what the contributions that it names do not give: anybody can compute it."""

    peer: PeerText
    round: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    segment: Number


class Aggregated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member's word about a segment that it aggregated.

    `counted`: names (`name_of`) of the commits whose contributions are in it, 32 bytes each, ascending. `accused`: what
    others should check.
    """

    counted: Annotated[bytes, msgspec.Meta(max_length=NAME_BYTES * MAX_MEMBERS)]
    accused: Annotated[tuple[Accusation, ...], msgspec.Meta(max_length=MAX_ACCUSED)] = ()

    @classmethod
    def of(cls, counted: Iterable[bytes], accused: Iterable[Accusation]) -> Aggregated:
        return cls(b"".join(sorted(counted)), tuple(accused))

    def head(self) -> dict[str, Any]:
        """As it goes over the wire."""
        head: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return head


def parse_aggregated(head: Mapping[str, Any]) -> Aggregated:
    """Raises ProtocolError."""
    try:
        told = msgspec.convert(head, Aggregated)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"no word about an aggregated segment: {error}") from None
    names = _names(told)
    if names != sorted(set(names)) or len(told.counted) % NAME_BYTES:
        raise ProtocolError("contributions that are not ascending")
    return told


def _names(told: Aggregated) -> list[bytes]:
    return [told.counted[at : at + NAME_BYTES] for at in range(0, len(told.counted), NAME_BYTES)]


def name_of(commit: Commit) -> bytes:
    """Of what a commit's contribution and its weight follow from: who signs two commits to a blob, with other tokens,
    has committed twice."""
    return hashlib.sha256(f"potluck.counted.1 {commit.blob} {commit.tokens}".encode()).digest()


def assign(segments: int, members: Collection[PeerId], round_: Round) -> list[PeerId]:
    """The aggregator of each segment: of those with room left, the one with the highest hash (rendezvous hashing with
    bounded loads). Nobody has more than their share, rounded up; the last segment, mostly a short one, goes to one of
    those with the fewest; where one member more or less is seen, most segments stay with whom they had. `members` must
    not be empty."""
    load, owners = Counter[PeerId](), list[PeerId]()
    most = -(-(segments - 1) // len(members))
    named = sorted((peer, peer.encode()) for peer in members)
    for segment in range(segments):
        if segment == segments - 1:
            most = min(load[peer] for peer in members) + 1
        salt = b"potluck.slice.1" + round_.to_bytes(8, "big") + segment.to_bytes(8, "big")
        free = [(hashlib.sha256(salt + name).digest(), peer) for peer, name in named if load[peer] < most]
        owners.append(max(free)[1])
        load[owners[-1]] += 1
    return owners


def fewest(commits: int, robust: bool) -> int:
    """Of how many contributions at least a segment must be, where so many were committed to and none is missing. A
    mean has most of them. A rule that stands a share of liars has nearly all: of who leaves honest ones out, liars
    would be a larger share."""
    return commits - max(1, commits // 8) if robust else commits // 2 + 1


def members_in(told: Aggregated, names: Mapping[bytes, PeerId]) -> frozenset[PeerId]:
    """Whose contributions are in a segment. `names`: of commits. Raises ProtocolError unless all of them were committed
    to."""
    try:
        return frozenset(names[name] for name in _names(told))
    except KeyError:
        raise ProtocolError("aggregated what nobody has committed to") from None


def check_enough(
    members: Collection[PeerId], commits: Collection[PeerId], silent: Collection[PeerId], robust: bool
) -> None:
    """Raises ProtocolError if a segment has too few members. Who is `silent` to us, too, may be missing there, but
    never half of all: who hears nobody must not believe everybody."""
    present, least = len(members), fewest(len(commits), robust)
    excused = len(set(silent).difference(members))
    if present + excused < least or present < fewest(len(commits), robust=False):
        raise ProtocolError(f"aggregated {present} contributions of {len(commits)}, expected {least - excused} or more")


def named_by_most(counted: Collection[Collection[PeerId]]) -> set[PeerId]:
    """Who is in more than half of the segments: one aggregator's word alone makes nobody a member."""
    times = Counter(peer for members in counted for peer in members)
    return {peer for peer, count in times.items() if 2 * count > len(counted)}
