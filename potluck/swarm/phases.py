"""Round phases: which round it is and what must happen by when. Pure; every peer computes the same from UTC.

 start                                    train_until     commit_by     pull_by   end
 |--------------- local steps ------------------|-- encode, --|-- pull, ----|------|-> next round
                                                   commit        aggregate,
                                                                 apply
Blobs are revealed at `commit_by`. A peer that has applied early starts the next round's local steps at once.
With `rounds.overlap` it starts them at `train_until`, and trains until the next round's (`overlap.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Round = NewType("Round", int)

#: Shares of the exchange time: encode and commit, then pull and apply, then slack before the round ends.
COMMIT_SHARE = 0.35
PULL_SHARE = 0.6
#: Commits are read this share of the exchange time after the deadline, so that stores under way have landed.
SETTLE_SHARE = 0.03


@dataclass(frozen=True)
class Window:
    """Deadlines of one round in UTC seconds."""

    round: Round
    start: float
    train_until: float
    commit_by: float
    read_from: float
    pull_by: float
    end: float


@dataclass(frozen=True)
class RoundClock:
    """`genesis`: UTC second at which round 0 starts. `exchange_seconds`: kept free of training at a round's end."""

    genesis: float
    seconds: float
    exchange_seconds: float

    def round_at(self, now: float) -> Round:
        """The round in progress; -1 before genesis."""
        return Round(max(-1, int((now - self.genesis) // self.seconds)))

    def window(self, round_: Round) -> Window:
        start = self.genesis + round_ * self.seconds
        end = start + self.seconds
        train_until = end - self.exchange_seconds
        commit_by = train_until + COMMIT_SHARE * self.exchange_seconds
        return Window(
            round=round_,
            start=start,
            train_until=train_until,
            commit_by=commit_by,
            read_from=commit_by + SETTLE_SHARE * self.exchange_seconds,
            pull_by=commit_by + PULL_SHARE * self.exchange_seconds,
            end=end,
        )
