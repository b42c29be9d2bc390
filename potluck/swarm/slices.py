"""Who aggregates which part of a dense update, and what a member says about the parts that it did. Pure.

A dense contribution is cut into segments of about a mebibyte (`codecs/segments.py`). Each has one member of the group
for its aggregator, which every member works out from the commits (`rounds.md`, "Dense codecs: sliced exchange").
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Annotated, Final

import msgspec

from potluck.errors import ProtocolError
from potluck.net.host import PeerId
from potluck.swarm.phases import Round

#: Of a module whose segments nobody counts: 2^18 segments of float32 are 2^36 parameters.
MAX_SEGMENTS: Final = 1 << 18
MAX_MEMBERS: Final = 1024
MAX_ACCUSED: Final = 4

BlobText = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
PeerText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Number = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SEGMENTS)]


class Accusation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`peer` said of `segment` in `round` what the contributions that it names do not give: anybody can compute it."""

    peer: PeerText
    round: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    segment: Number


class Aggregated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member's word about the segments that it aggregated: the n-th of `segments` is chunk n of blob `blob`.

    `members`: whose contributions are in them, and the blobs that these lie in. `accused`: what others should check.
    """

    blob: BlobText
    size: Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
    segments: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_SEGMENTS)]
    members: Annotated[dict[PeerText, BlobText], msgspec.Meta(max_length=MAX_MEMBERS)]
    accused: Annotated[tuple[Accusation, ...], msgspec.Meta(max_length=MAX_ACCUSED)] = ()

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


_decoder = msgspec.msgpack.Decoder(Aggregated)


def parse_aggregated(data: bytes | memoryview) -> Aggregated:
    """Raises ProtocolError."""
    try:
        told = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"no word about aggregated segments: {error}") from None
    if list(told.segments) != sorted(set(told.segments)):
        raise ProtocolError("aggregated segments that are not ascending")
    return told


def assign(segments: int, members: Collection[PeerId], round_: Round) -> list[PeerId]:
    """The aggregator of each segment: of those with room left, the one with the highest hash (rendezvous hashing with
    bounded loads). Nobody has more than their share, rounded up; where one member more or less is seen, most segments
    stay with whom they had. `members` must not be empty."""
    most, load, owners = -(-segments // len(members)), Counter[PeerId](), []
    named = sorted((peer, peer.encode()) for peer in members)
    for segment in range(segments):
        salt = b"potluck.slice.1" + round_.to_bytes(8, "big") + segment.to_bytes(8, "big")
        free = [(hashlib.sha256(salt + name).digest(), peer) for peer, name in named if load[peer] < most]
        owners.append(max(free)[1])
        load[owners[-1]] += 1
    return owners


def agrees(told: Aggregated, commits: Mapping[PeerId, str]) -> bool:
    """Whether only contributions are in it that were committed to, and those of most. `commits`: blob by peer."""
    known = all(commits.get(PeerId(peer)) == blob for peer, blob in told.members.items())
    return known and 2 * len(told.members) > len(commits)
