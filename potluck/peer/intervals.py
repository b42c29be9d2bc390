"""How often peers send heartbeats, and how long one lasts. Light: pages need it without telemetry itself."""

from __future__ import annotations

from typing import Final

#: Between two heartbeats of one peer, whatever its rounds are.
LEAST_SECONDS: Final = 2.0
MOST_SECONDS: Final = 30.0
#: Made-up senders must not silence the others for longer.
SELDOMEST_SECONDS: Final = 300.0
#: Of all peers together: about 0.4 kB each, passed on to gossipsub's six neighbours, are 12 kB/s.
ALL_PER_SECOND: Final = 5.0
#: A heartbeat is believed for so many intervals, and for so long at least: clocks differ.
LASTS_INTERVALS: Final = 3
LASTS_SECONDS: Final = 60.0


def interval_seconds(round_seconds: float, peers: int) -> float:
    """Between two heartbeats, where `peers` are heard: once a round, more seldom the more they are."""
    seconds = max(min(MOST_SECONDS, max(LEAST_SECONDS, round_seconds)), peers / ALL_PER_SECOND)
    return min(seconds, SELDOMEST_SECONDS)


def lasting_seconds(round_seconds: float, peers: int) -> float:
    """Who was silent for longer is not here any more."""
    return max(LASTS_SECONDS, LASTS_INTERVALS * interval_seconds(round_seconds, peers))
