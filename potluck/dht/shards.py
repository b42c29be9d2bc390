"""Which shard a peer's commit goes to, and how many shards there are: pure functions of what was read.

Step 3 of a gossip round: a peer's shard for a round is hash(peer id, round) mod S with
S = ceil(replicas / group size). Nobody counts the replicas: S is estimated from the last shard's members.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import median
from typing import Final

from potluck.net.host import PeerId

#: Records carry the shard in 16 bits.
MAX_SHARDS: Final = 2**15
#: How far the estimate must pass a factor of two before S follows: neighbours' estimates differ by a member
#: or two, and a swarm that hovers at a boundary must not split into halves that look under different keys.
HYSTERESIS: Final = 1.25


def shard_of(peer: PeerId, round: int, shards: int) -> int:
    """The shard of a peer in a round, in [0, shards): reshuffles the groups every round."""
    if shards < 1:
        raise ValueError(f"shards is {shards}, allowed at least 1")
    digest = hashlib.sha256(b"potluck.shard.1" + round.to_bytes(8, "big", signed=True) + peer.encode()).digest()
    return int.from_bytes(digest[:8], "big") % shards


def count_replicas(members_seen: int, shards: int) -> float:
    """What one shard says about the whole: this raw count is what a commit publishes as `replicas_estimate`.

    Never publish the median instead: medians of medians would outvote every newcomer for ever.
    """
    return float(max(1, members_seen) * shards)


def estimate_replicas(own_estimate: float, members_seen: int, shards: int, others_estimates: Sequence[float]) -> float:
    """How many replicas a module has: the median of our last estimate, our count, and what the commits read
    say.

    `members_seen` counts the commits read in our shard, our own included. A median, since less than half of
    the voices may lie. With nothing read it halves the way to what is seen, so that nobody looks for long
    under the shards of a swarm that died.
    """
    voices = [value for value in others_estimates if math.isfinite(value) and value >= 0]
    return max(1.0, float(median([own_estimate, count_replicas(members_seen, shards), *voices])))


def next_shards(estimate: float, group_size: int, current_shards: int) -> int:
    """S for the next round: a power of two near ceil(estimate / group_size), kept while the estimate is near.

    Always 1 while the estimate fits one group. Doubles or halves, however often, only past the hysteresis.
    """
    if estimate <= group_size or not math.isfinite(estimate):
        return 1
    # S groups hold S * group_size replicas; powers of two only, so that shards split and merge whole.
    shards = max(1, min(MAX_SHARDS, 1 << max(0, current_shards - 1).bit_length()))
    while shards < MAX_SHARDS and estimate > shards * group_size * (HYSTERESIS if shards > 1 else 1):
        shards *= 2
    while shards > 2 and estimate * HYSTERESIS < (shards // 2) * group_size:
        shards //= 2
    return max(2, shards)
