"""Who agrees with whom: what the digests in a round's commits say. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from potluck.net.host import PeerId


class Claim(NamedTuple):
    """One commit's word about the state it started from."""

    peer: PeerId
    digest: str
    history: int


@dataclass(frozen=True)
class Agreement:
    """The digest most commits started from, and who did. `unanimous`: nobody differs."""

    digest: str
    history: int
    holders: tuple[PeerId, ...]
    unanimous: bool


def agreement(claims: Iterable[Claim]) -> Agreement | None:
    """The plurality; ties go to the longer history (a newcomer never outvotes a trained model), then by digest."""
    by_digest: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        by_digest[claim.digest].append(claim)
    if not by_digest:
        return None

    def rank(digest: str) -> tuple[int, int, str]:
        # The least history that its holders claim: one who exaggerates cannot split or lift a state.
        return len(by_digest[digest]), min(claim.history for claim in by_digest[digest]), digest

    digest = max(by_digest, key=rank)
    holders = tuple(sorted(claim.peer for claim in by_digest[digest]))
    return Agreement(digest, rank(digest)[1], holders, unanimous=len(by_digest) == 1)


def network_at_fault(group: Sequence[PeerId], missing: Mapping[PeerId, str]) -> bool:
    """Many missing at once is the network's fault, not theirs (`rounds.md` step 4): more than half of the others."""
    return len(missing) >= 2 and 2 * len(missing) > len(group)
