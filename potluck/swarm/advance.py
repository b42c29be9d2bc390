"""The next round's state, made while its update is still on its way: what a segment changes, and the hashes of what
does not change any more. So when the last segment is here, only that is left to apply and to hash."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Final

import numpy as np

from potluck.net.blobs import CHUNK_BYTES, Pieces
from potluck.swarm.contribution import SLAB_VALUES, Dense, Quantized, Segments
from potluck.swarm.layout import Flat, slabs
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round
from potluck.swarm.state import HEADER_BYTES

VALUE_BYTES: Final = 4

Piece = Dense | Quantized | None


class Advance:
    """From `theta` (and outer momentum) by an update that comes in `segments`, which cover the flat vector. theta of
    the next round is written into `into`. May be used by several threads."""

    def __init__(
        self, theta: Flat, velocity: Flat | None, outer: OuterStep, round_: Round, segments: Sequence[slice], into: Flat
    ) -> None:
        self.theta, self._before, self._into = theta, velocity if outer.moves(velocity) else None, into
        self._outer, self._round, self._segments = outer, round_, segments
        self._velocity = velocity if self._before is None else np.empty_like(self._before)
        self._pieces = Pieces([bytes(HEADER_BYTES), into, *([] if self._velocity is None else [self._velocity])])
        self._taken: dict[int, Piece] = {}
        self._lock = threading.Lock()
        #: Of the state's chunks (its blob's): those that each segment changes, and what changes each.
        self._chunks: list[list[int]] = []
        self._changed_by = defaultdict[int, list[int]](list)
        arrays = 1 if self._before is None else 2
        for number, part in enumerate(segments):
            starts = (HEADER_BYTES + VALUE_BYTES * (array * into.size + part.start) for array in range(arrays))
            spans = [(start, start + VALUE_BYTES * (part.stop - part.start)) for start in starts]
            self._chunks.append(
                list(chain.from_iterable(range(a // CHUNK_BYTES, -(-b // CHUNK_BYTES)) for a, b in spans))
            )
            for chunk in self._chunks[-1]:
                self._changed_by[chunk].append(number)
        #: Of chunks that are done. Never of the first: the state's header is in it.
        self.digests: dict[int, bytes] = {}

    def take(self, segment: int, piece: Piece) -> None:
        """Apply one, instead of what was taken for it before. None: zeros. Takes milliseconds."""
        with self._lock:
            if self._take(segment, piece):
                for chunk in self._chunks[segment]:
                    if chunk > 0 and all(other in self._taken for other in self._changed_by[chunk]):
                        self.digests[chunk] = self._pieces.digest(chunk)

    def finish(self, update: Segments) -> tuple[Flat, Flat | None]:
        """(theta, velocity) of the next round, whatever was taken before. What is hashed by then is in `digests`."""
        with self._lock:
            for segment, (_, piece) in enumerate(update):
                if self._take(segment, piece):
                    for chunk in self._chunks[segment]:
                        self.digests.pop(chunk, None)
        return self._into, self._velocity

    def _take(self, segment: int, piece: Piece) -> bool:
        """Whether anything changed."""
        if segment in self._taken and self._taken[segment] is piece:
            return False
        whole = self._segments[segment]
        for part in slabs(whole.start, whole.stop, SLAB_VALUES):
            theta, into = self.theta[part], self._into[part]
            velocity = None if self._velocity is None else self._velocity[part]
            if velocity is not None and self._before is not None:
                velocity[:] = self._before[part]
            if piece is None:
                into[:] = 0
                self._outer.move(theta, velocity, into, self._round)
            else:
                inside = slice(part.start - whole.start, part.stop - whole.start)
                self._outer.move_by(theta, velocity, piece, inside, into, self._round)
        self._taken[segment] = piece
        return True
