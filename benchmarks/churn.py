"""A pipeline whose servers are killed: a calm run, and one in which a random peer gets kill -9 every 20 s.

    python benchmarks/churn.py [--quick] [--stages 2] [--replicas 3] [--seconds 300] [--every 20] [--seed 0]

Real processes. Every peer serves a stage and trains through the others; whoever is killed is started again at once, in
the same home. Compared:
- microbatches that stage.0 counted, per second, beside the calm run's; also corrected for the share of time in which
  peers were there at all (a killed one is back when it trains again);
- the training loss at equal tokens: the mean over the last fifth of what both runs trained;
- microbatches counted twice in a stage (must be none), and the longest time without any progress.

`--quick` (within 50 s): one run, calm first, then with a single kill; its numbers only show that the script works. The
last line is one JSON object. Goals at 300 s: throughput_ratio_corrected >= 0.75, loss_ratio within 0.02 of 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from potluck.dht.template import template_toml
from potluck.peer.party import Member, Party, counted_microbatches

console = Console(width=120)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model.stages": options.stages,
        "model.config.tie_word_embeddings": False,
        "model.config.hidden_size": 128,
        "model.config.num_hidden_layers": max(2, options.stages),
        "model.config.intermediate_size": 256,
        "data.sequence_length": 128,
        "training.batch_size": 16,
        "pipeline.microbatch": 4,
        "rounds.seconds": 4.0 if options.quick else 8.0,
        "rounds.exchange_seconds": 1.6 if options.quick else 2.5,
        "rounds.steps": 50,
    }


@dataclass
class Run:
    """What was counted between `began` and `ended` (monotonic seconds)."""

    began: float = 0.0
    ended: float = 0.0
    away: float = 0.0
    """Peer-seconds between a kill and the victim's next trained round."""
    kills: int = 0
    members: list[Member] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def counted(self) -> list[tuple[float, int]]:
        """(when, new microbatches) of stage.0's contributions."""
        seen: set[str] = set()
        found = []
        events = [e for m in self.members for e in m.of("swarm.stage.counted") if e["module"] == "stage.0"]
        for event in sorted(events, key=lambda e: e["seen"]):
            new = set(event["ids"]) - seen
            seen |= new
            if self.began <= event["seen"] <= self.ended:
                found.append((event["seen"], len(new)))
        return found

    @property
    def rate(self) -> float:
        return sum(n for _, n in self.counted()) / self.seconds

    @property
    def presence(self) -> float:
        """Mean share of the peers that were there."""
        return 1.0 - self.away / (self.seconds * len(self.members))

    @property
    def longest_pause(self) -> float:
        times = [self.began, *(when for when, n in self.counted() if n), self.ended]
        return max(b - a for a, b in itertools.pairwise(times))

    def losses(self) -> list[tuple[int, float]]:
        """(microbatches so far, mean loss of a trainer's round), from the run's very beginning."""
        events = [e for m in self.members for e in m.of("swarm.pipeline.trained") if e["loss"] is not None]
        total, curve = 0, []
        for event in sorted(events, key=lambda e: e["seen"]):
            total += event["microbatches"]
            curve += [(total, event["loss"])] * event["microbatches"]
        return curve


def trained(member: Member, since: float = 0.0) -> int:
    return sum(e["microbatches"] for e in member.of("swarm.pipeline.trained") if e["seen"] > since)


async def play(options: argparse.Namespace, root: Path, phases: list[tuple[float, bool]]) -> list[Run]:
    """One swarm through phases of (seconds, whether peers are killed)."""
    dice = random.Random(options.seed)
    root.mkdir()
    async with Party(root) as party:
        manifest = root / "run.toml"
        manifest.write_text(template_toml("demo", "churn", settings(options)))
        organizer = await party.start("p0", "host", str(manifest), "--stage", "0")
        invite = str(organizer.status["invite"])
        count = options.stages * options.replicas
        await asyncio.gather(
            *(party.start(f"p{i}", "join", invite, "--stage", str(i % options.stages)) for i in range(1, count))
        )
        await party.until("everybody to train", lambda: all(trained(m) for m in party.members), 300)
        runs = []
        for seconds, churn in phases:
            run = Run(began=time.monotonic(), members=party.members)
            runs.append(run)
            watching: list[asyncio.Task[None]] = []
            next_kill = run.began + (0.2 * seconds if options.quick else options.every)
            while (now := time.monotonic()) < run.began + seconds:
                if churn and now >= next_kill:
                    next_kill += options.every
                    victim = dice.choice([m for m in party.members if m.alive])
                    watching.append(asyncio.create_task(kill(party, run, victim, invite_of(party, victim))))
                await asyncio.sleep(0.2)
            run.ended = time.monotonic()
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        return runs


def invite_of(party: Party, victim: Member) -> str:
    """Any living peer's: the victim's first known one may be dead."""
    return str(next(m.status["invite"] for m in party.members if m.alive and m is not victim and m.status))


async def kill(party: Party, run: Run, victim: Member, invite: str) -> None:
    at = time.monotonic()
    run.kills += 1
    await party.kill(victim)
    try:
        await party.restart(victim, "join", invite, "--stage", victim.module.removeprefix("stage."), wait=False)
        await party.until("the victim to train", lambda: trained(victim, at) > 0, 600)
    finally:
        run.away += time.monotonic() - at


def equal_tokens(calm: Run, churn: Run) -> tuple[float, float]:
    """Mean losses over the last fifth of what both trained."""
    curves = [run.losses() for run in (calm, churn)]
    end = min(curve[-1][0] for curve in curves)
    means = [statistics.fmean(loss for at, loss in curve if 0.8 * end < at <= end) for curve in curves]
    return means[0], means[1]


async def main(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="plc", dir="/tmp") as folder:
        if options.quick:
            calm, churn = await play(options, Path(folder) / "a", [(8.0, False), (14.0, True)])
        else:
            (calm,) = await play(options, Path(folder) / "a", [(options.seconds, False)])
            (churn,) = await play(options, Path(folder) / "b", [(options.seconds, True)])
    table = Table(title=f"{options.stages} stages x {options.replicas} replicas")
    for column in ("run", "seconds", "kills", "peers there", "microbatches / s", "longest pause s", "loss"):
        table.add_column(column, justify="right")
    losses = (None, None) if options.quick else equal_tokens(calm, churn)
    for name, run, loss in (("calm", calm, losses[0]), ("kills", churn, losses[1])):
        table.add_row(
            *(name, f"{run.seconds:.0f}", str(run.kills), f"{run.presence:.2%}", f"{run.rate:.2f}"),
            *(f"{run.longest_pause:.1f}", "" if loss is None else f"{loss:.4f}"),
        )
    console.print(table)
    everybody = {id(m): m for run in (calm, churn) for m in run.members}
    twice = [times for run in (calm, churn) for times in counted_microbatches(run.members).values() if times > 1]
    return {
        "calm_microbatches_s": round(calm.rate, 3),
        "churn_microbatches_s": round(churn.rate, 3),
        "throughput_ratio": round(churn.rate / calm.rate, 4),
        "throughput_ratio_corrected": round(churn.rate / calm.rate / churn.presence, 4),
        "loss_ratio": round(losses[1] / losses[0], 4) if losses[0] and losses[1] else None,
        "kills": churn.kills,
        "longest_pause_seconds": round(churn.longest_pause, 1),
        "microbatches_counted_twice": len(twice),
        "peers": len(everybody),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.replicas = min(arguments.replicas, 2)
    print(json.dumps(asyncio.run(main(arguments))))
