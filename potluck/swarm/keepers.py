"""Who keeps snapshots of which stage, so that a stage whose replicas all die comes back. Pure; all decide alike.

Two peers keep each stage: of each other stage, beginning with the one before it, the peer whose key hashes lowest. So
the two are of different stages if there are three or more, and few changes of membership change who they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Final

from potluck.net.host import PeerId

COPIES: Final = 2


def keepers(stage: int, stages: Sequence[Collection[PeerId]]) -> tuple[PeerId, ...]:
    """Who keeps snapshots of `stage`. `stages`: the peers that serve each."""
    candidates: list[tuple[int, int, PeerId]] = []
    for distance in range(1, len(stages)):
        others = sorted(stages[stage - distance], key=lambda peer: _dice(peer, stage))
        candidates += [(place, distance, peer) for place, peer in enumerate(others[:COPIES])]
    chosen = dict.fromkeys(peer for *_, peer in sorted(candidates))
    return tuple(chosen)[:COPIES]


def kept_by(me: PeerId, own: int, stages: Sequence[Collection[PeerId]]) -> list[int]:
    """The stages that this peer, serving `own`, keeps."""
    return [stage for stage in range(len(stages)) if stage != own and me in keepers(stage, stages)]


def _dice(peer: PeerId, stage: int) -> bytes:
    return hashlib.sha256(b"potluck.keeper.1" + stage.to_bytes(4, "big") + peer.encode()).digest()
