"""A replica's shared state: the parameters at a round's start, and the outer momentum.

Its digest is its content address (`net/blobs.py`): what a peer commits to as "my theta_r" is the very id under which
a joiner fetches those bytes from any peer that has them, checking every chunk. Layout of the blob: a 64-byte header,
theta, then (with outer momentum) the velocity, all little-endian float32.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np

from potluck.errors import StateError
from potluck.net.blobs import BlobId, BlobRef, ChunkList
from potluck.net.host import PeerId
from potluck.swarm.exact import all_finite
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.phases import Round

MAGIC = b"potluck.state.1\0"
#: Values that a witness is made of, all over the parameters: who misses a part of them is found out.
WITNESSES = 4096
_HEADER = struct.Struct("<16s16sQQQQ")
HEADER_BYTES: Final = _HEADER.size


@dataclass(frozen=True, eq=False)  # equal states have equal digests; arrays have no truth value
class ReplicaState:
    """theta of one module at the start of `round`. `history`: contributions applied since theta_0, over all rounds.
    `known`: digests of some of its blob's chunks, if they are known already."""

    module: str
    layout: Layout
    round: Round
    theta: Flat
    velocity: Flat | None = None
    history: int = 0
    known: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def header(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            _name(self.module, self.layout),
            self.round,
            self.history,
            self.layout.size,
            0 if self.velocity is None else 1,
        )

    @property
    def buffers(self) -> Sequence[memoryview]:
        """The blob, in parts, without copying."""
        arrays = [self.theta] if self.velocity is None else [self.theta, self.velocity]
        return [memoryview(self.header), *(a.data.cast("B") for a in arrays)]

    @cached_property
    def chunks(self) -> ChunkList:
        """Hashes what is not `known` the first time (about 0.2 ms per MB): call it off the event loop."""
        return ChunkList.of(self.buffers, self.known)

    @property
    def ref(self) -> BlobRef:
        return BlobRef(self.chunks.blob_id, self.chunks.size)

    @property
    def digest(self) -> BlobId:
        return self.chunks.blob_id

    def at_round(self, round_: Round) -> ReplicaState:
        """The same parameters, carried to a later round in which nothing was applied. What is `known` is so still: the
        round's number is in the first chunk, which never is."""
        return replace(self, round=round_)


def witness(theta: Flat, digest: str, peer: PeerId) -> str:
    """What only who holds `theta` can say for `peer`: a hash of values at places that follow from both names.

    A digest can be copied from another's commit; this cannot, and holds for nobody else.
    """
    name = hashlib.sha256(f"potluck.witness.1 {digest} {peer}".encode()).digest()
    places = np.random.Philox(key=np.frombuffer(name[:16], dtype="<u8")).random_raw(WITNESSES) % np.uint64(theta.size)
    return hashlib.sha256(name + theta[places.astype(np.int64)].astype("<f4").tobytes()).hexdigest()


def state_bytes(layout: Layout, has_velocity: bool) -> int:
    """Exact size of a state blob."""
    return _HEADER.size + 4 * layout.size * (2 if has_velocity else 1)


def parse_state(blob: memoryview, module: str, layout: Layout, has_velocity: bool) -> ReplicaState:
    """A state from fetched bytes (already checked against their digest). Raises StateError."""
    if len(blob) != state_bytes(layout, has_velocity):
        raise StateError(f"a state of {len(blob)} bytes, expected {state_bytes(layout, has_velocity)}")
    magic, name, round_, history, size, flags = _HEADER.unpack(blob[: _HEADER.size])
    if (magic, name, size, flags) != (MAGIC, _name(module, layout), layout.size, int(has_velocity)):
        raise StateError("the state belongs to another module, layout or version")
    values = np.frombuffer(blob, dtype="<f4", offset=_HEADER.size)
    if not all_finite(values):
        raise StateError("the state holds values that are not finite")
    velocity = values[layout.size :] if has_velocity else None
    return ReplicaState(module, layout, Round(round_), values[: layout.size], velocity, history)


def _name(module: str, layout: Layout) -> bytes:
    return hashlib.sha256(module.encode() + b"\0" + layout.digest).digest()[:16]
