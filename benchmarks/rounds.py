"""A round's overhead outside training, with real peers on loopback (issue claim 6: under 10 % at 10 s rounds).

Both sides are in one run: the seconds that each peer trains, and the seconds of encode, commit, waiting for the commit
deadline, pull, aggregate and apply, as the peers' own events tell them.

    python benchmarks/rounds.py [--quick] [--peers 3] [--rounds 6] [--seconds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path

from potluck.dht.template import template_toml
from potluck.peer.party import Party, overhead_share

PHASES = ("evaluate", "train", "idle", "commit", "wait", "pull", "apply")


async def measure(root: Path, peers: int, rounds: int, seconds: float, exchange: float) -> dict[str, float]:
    settings = {
        "rounds.seconds": seconds,
        "rounds.exchange_seconds": exchange,
        "rounds.steps": 10_000,  # more than fit: the clock ends the local steps, so nobody idles
        "training.total_steps": 1_000_000,
    }
    manifest = root / "run.toml"
    manifest.write_text(template_toml("demo", "overhead", settings))
    async with Party(root) as party:
        organizer = await party.start("organizer", "host", str(manifest))
        invite = organizer.status["invite"]
        others = [party.start(f"worker-{i}", "join", invite) for i in range(1, peers)]
        await asyncio.gather(*others)
        first = max(m.last.get("round", -1) for m in party.members) + 2  # the first that all trained in full
        last = first + rounds - 1
        limit = (rounds + 4) * seconds + 30
        await party.until("the rounds", lambda: all(m.last.get("round", -1) >= last for m in party.members), limit)
        events = [e for m in party.members for e in m.applied if first <= e["round"] <= last]
    medians = {phase: statistics.median(e["seconds"][phase] for e in events) for phase in PHASES}
    agree = all(len({e["digest"] for e in events if e["round"] == r}) == 1 for r in range(first, last + 1))
    return {**medians, "overhead_share": overhead_share(events), "rounds_measured": len(events), "agree": agree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two peers, two rounds: ends within 50 s")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--exchange-seconds", type=float, default=1.0)
    options = parser.parse_args()
    if options.quick:
        options.peers, options.rounds = 2, 2
    with tempfile.TemporaryDirectory(prefix="plb-") as folder:
        figures = asyncio.run(
            measure(Path(folder), options.peers, options.rounds, options.seconds, options.exchange_seconds)
        )
    print(f"{options.peers} peers, {options.seconds:g} s rounds, medians over {figures['rounds_measured']} rounds")
    for phase in PHASES:
        print(f"  {phase:<10} {figures[phase]:8.3f} s")
    print(f"  outside training: {100 * figures['overhead_share']:.1f} % of a round")
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({**rounded, "peers": options.peers, "round_seconds": options.seconds}))


if __name__ == "__main__":
    main()
