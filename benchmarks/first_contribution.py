"""A new volunteer's path: from the command line with an invite to the first contribution that others averaged.

    python benchmarks/first_contribution.py [--quick] [--volunteers 5] [--round-seconds 20]

Two peers train a small model on loopback. One volunteer after another, each with an empty home, runs `potluck join` in
a process of its own; the clock runs from its start until the organizer has applied a round with its contribution. Every
second is accounted for, by the volunteer's own events: the parts of the table add up to the whole. What a volunteer
cannot help is apart: the transfer of the state, and the round (it may begin in the midst of one).

`--quick` (within 50 s): one volunteer, rounds of 6 s. The last line is JSON, medians over volunteers. Goal:
seconds_to_first_contribution < 60 + transfer_seconds + round_seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from potluck.dht.template import template_toml
from potluck.peer.party import Member, Party

MODEL = {
    "model.config.hidden_size": 64,
    "model.config.num_hidden_layers": 2,
    "model.config.intermediate_size": 128,
    "data.sequence_length": 64,
    "training.batch_size": 4,
    "rounds.steps": 10,
}
#: What the volunteer does when its `peer.phase` says so.
PHASES = {
    "network": "its libp2p daemon starts",
    "connecting": "dialling the invite's peers",
    "manifest": "the run's manifest",
    "clock": "comparing clocks",
    "building": "model and data are built",
    "directory": "joining the DHT",
}
console = Console(stderr=True)


def account(started: float, volunteer: Member, applied: float) -> dict[str, float]:
    """Seconds of each part of the way, in order; they add up to all of it. Times are Unix seconds."""
    marks: list[tuple[float, str]] = []
    for event in volunteer.events:
        match event["event"]:
            case "peer.phase":
                marks.append((event["time"], PHASES[event["phase"]]))
            case "peer.joined":
                marks.append((event["seen_utc"], "finding the group and its state"))
            case "swarm.state.fetching":
                marks.append((event["time"], "transfer of the state"))
            case "swarm.state.loaded":
                marks.append((event["time"], "missed rounds are replayed"))
            case "swarm.round.started":
                marks.append((event["time"], "the round: training, exchange, the organizer's average"))
    parts = {"Python starts, torch and hivemind are imported": marks[0][0] - started}
    for (begin, what), (end, _) in zip(marks, [*marks[1:], (applied, "")], strict=True):
        if begin < applied:
            parts[what] = parts.get(what, 0.0) + min(end, applied) - begin
    return parts


async def volunteers(folder: Path, count: int, round_seconds: float) -> list[dict[str, float]]:
    settings = {**MODEL, "rounds.seconds": round_seconds, "rounds.exchange_seconds": 0.25 * round_seconds}
    (folder / "run.toml").write_text(template_toml("demo", "first", settings))
    ways = []
    async with Party(folder) as party:
        organizer = await party.start("org", "host", str(folder / "run.toml"))
        await party.start("other", "join", organizer.status["invite"])
        await party.until("a common round", lambda: len(organizer.last.get("group", ())) == 2, 120)
        for number in range(count):
            started = time.time()
            one = await party.start(f"v{number}", "join", organizer.status["invite"], wait=False)
            await party.joined(one)
            one.status["seen_utc"] = time.time()
            peer = one.status["peer"]

            def counted(peer: str = peer) -> dict[str, Any] | None:
                return next((event for event in organizer.applied if peer in event["group"]), None)

            await party.until("its contribution", lambda: counted() is not None, 180)
            found = counted()
            assert found is not None
            ways.append(account(started, one, found["time"]))
            console.print(f"volunteer {number + 1} of {count}: {sum(ways[-1].values()):.1f} s")
            await party.leave(one)
        await party.leave_all(party.members[:2])
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--volunteers", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=20.0)
    options = parser.parse_args()
    count, round_seconds = (1, 6.0) if options.quick else (options.volunteers, options.round_seconds)
    with tempfile.TemporaryDirectory(prefix="pl", dir="/tmp") as folder:
        ways = asyncio.run(volunteers(Path(folder), count, round_seconds))
    names = list(dict.fromkeys(name for way in ways for name in way))
    table = Table(title=f"from the invite to the first contribution, {count} volunteers, rounds of {round_seconds:g} s")
    table.add_column("seconds", justify="right")
    table.add_column("")
    for name in names:
        table.add_row(f"{statistics.median(way.get(name, 0.0) for way in ways):.2f}", name)
    total = statistics.median(sum(way.values()) for way in ways)
    table.add_row(f"{total:.2f}", "in all")
    console.print(table)
    found = {
        "seconds_to_first_contribution": round(total, 2),
        "transfer_seconds": round(statistics.median(way.get("transfer of the state", 0.0) for way in ways), 3),
        "round_seconds": round_seconds,
        "import_seconds": round(statistics.median(way[names[0]] for way in ways), 2),
        "volunteers": count,
    }
    print(json.dumps(found))
    if total >= 60 + found["transfer_seconds"] + round_seconds:
        sys.exit("the goal is missed")


if __name__ == "__main__":
    main()
