"""What a simulated swarm costs, per peer and per simulated second of work.

    python benchmarks/simulation.py [--quick] [--calibrate] [--peers 10 100 1000 10000] [--rounds 20] [--out FOLDER]

- Bytes and DHT operations per peer and round at growing sizes and one group size (must stay flat).
- Drift: without updates, one round of averaging one of F fragments in random groups of g must contract the variance
  between replicas as theory says; both factors are printed.
- Random seeds of small swarms with random faults: violations of invariants.

Up to `--real` peers the DHT is hivemind's, beyond that a model of its cost. `--calibrate` fits that model to the real
one, shows data and fit side by side, and prints the coefficients for `potluck/sim/dht_model.py`.
The last line is one JSON object. `--quick` ends within 50 s.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from potluck.sim.dht_model import PUBLISH, READ
from potluck.sim.network import REGIONS
from potluck.sim.plan import Plan, random_plan
from potluck.sim.report import Report
from potluck.sim.world import simulate

console = Console(width=140)


def sized(peers: int, rounds: int, group_size: int, real: int, **changed: Any) -> Plan:
    return Plan(
        name=f"{peers}-peers",
        peers=peers,
        rounds=rounds,
        group_size=group_size,
        dht="real" if peers <= real else "model",
        checkpoints=False,
        **changed,
    )


def cost_table(sizes: list[int], rounds: int, group_size: int, real: int) -> dict[int, Report]:
    table = Table(title=f"Cost per peer and round, groups of {group_size}")
    for column in ("peers", "DHT", "bytes", "DHT operations", "DHT bytes", "CPU s", "peer-rounds / s", "violations"):
        table.add_column(column, justify="right")
    reports = {}
    for peers in sizes:
        report = reports[peers] = simulate(sized(peers, rounds, group_size, real))
        table.add_row(
            f"{peers:,}",
            report.plan["dht"],
            f"{report.bytes_per_peer_per_round:,.0f}",
            f"{report.dht_operations_per_peer_per_round:.1f}",
            f"{report.dht_bytes_per_peer_per_round:,.0f}",
            f"{report.cpu_seconds:.1f}",
            f"{peers * rounds / report.cpu_seconds:.0f}",
            str(len(report.violations)),
        )
        console.print(f"{peers:,} peers: {report.seconds:.1f} s, {report.cpu_seconds:.1f} s of processor")
    console.print(table)
    return reports


def drift_factor(peers: int, group_size: int, fragments: int, rounds: int) -> tuple[float, float]:
    """(measured, predicted) factor on the variance between replicas over F rounds of pure averaging.

    Groups are drawn anew each round: a replica's group has g members in the mean. Averaging a fragment within a group
    of m leaves 1/m of its variance among that group's members (every member moves to the group's mean), so over F
    rounds each coordinate is averaged once and its variance falls to E[1/m], where m - 1 is binomial: the number of
    the others in the same of S shards.
    """
    plan = sized(
        peers, rounds, group_size, real=0, codec="none", fragments=fragments, join_over_rounds=0.2, sync_limit=1e6
    )
    plan.noise = 2.0
    # Training stops after the first third: from there on only fragments move anything.
    quiet = rounds // 3
    report = simulate(plan.model_copy(update={"train_rounds": quiet}))
    rows = report.rounds[quiet + 1 :]
    spans = (len(rows) - 1) // fragments
    first, last = rows[0]["drift"], rows[spans * fragments]["drift"]
    measured = (last / first) ** (2 / spans) if first > 0 else math.nan
    share = 1 / rows[-1]["shards"]
    sizes = np.arange(1, peers + 1)
    log_binomial = np.array([math.lgamma(peers) - math.lgamma(m) - math.lgamma(peers - m + 1) for m in sizes])
    weights = np.exp(log_binomial + (sizes - 1) * math.log(share) + (peers - sizes) * math.log1p(-share))
    return measured, float(np.sum(weights / sizes))


def hunt(seeds: int, seconds: float) -> tuple[int, int]:
    """(seeds run, violations) of random small swarms, for at most so long."""
    began, run, violations = time.monotonic(), 0, 0
    for seed in range(seeds):
        report = simulate(random_plan(seed))
        run += 1
        violations += len(report.violations)
        for violation in report.violations:
            console.print(f"seed {seed}: {violation}   replay: potluck simulate seed:{seed}")
        if time.monotonic() - began > seconds:
            break
    return run, violations


def calibrate(sizes: list[int], rounds: int, group_size: int) -> None:
    """Least squares on the medians of each size: calls and latency over log2 N, bytes per call over records."""
    data: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    latency = 0.0
    for peers in sizes:
        report = simulate(sized(peers, rounds, group_size, real=10**9))
        latency = REGIONS[0][0] / 1000  # one-way seconds between two peers of the first region: the unit
        for kind in ("read", "publish"):
            rows = np.array([op[1:] for op in report.operations if op[0] == kind], dtype=float)
            data[kind].append((peers, rows))
        console.print(f"{peers} peers: {report.seconds:.0f} s, {len(report.operations)} operations in the last round")
    for kind, samples in data.items():
        logs = np.array([math.log2(peers) for peers, _ in samples])
        design = np.stack([np.ones_like(logs), logs], axis=1)
        calls = np.array([np.median(rows[:, 1]) for _, rows in samples])
        seconds = np.array([np.median(rows[:, 3]) for _, rows in samples]) / latency
        every = np.concatenate([rows for _, rows in samples])
        every = every[every[:, 1] > 0]
        per_call = every[:, 2] / every[:, 1]
        # What is published is one record; what is read grows with the shard.
        records = np.stack([np.ones(len(every)), every[:, 0] if kind == "read" else np.zeros(len(every))], axis=1)
        a = np.linalg.lstsq(design, calls, rcond=None)[0]
        b = np.linalg.lstsq(records, per_call, rcond=None)[0]
        c = np.linalg.lstsq(design, seconds, rcond=None)[0]
        sigma = float(np.median([np.std(np.log(np.maximum(rows[:, 3], 1e-3))) for _, rows in samples]))
        table = Table(title=f"{kind}: median of the real DHT / fit")
        for column in ("peers", "calls", "fit", "bytes", "fit", "seconds", "fit"):
            table.add_column(column, justify="right")
        for (peers, rows), line in zip(samples, design, strict=True):
            fitted = float(line @ a)
            size = fitted * (b[0] + b[1] * np.median(rows[:, 0]))
            table.add_row(
                str(peers),
                f"{np.median(rows[:, 1]):.0f}",
                f"{fitted:.1f}",
                f"{np.median(rows[:, 2]):,.0f}",
                f"{size:,.0f}",
                f"{np.median(rows[:, 3]):.3f}",
                f"{float(line @ c) * latency:.3f}",
            )
        console.print(table)
        pairs = [tuple(round(float(x), 3) for x in each) for each in (a, b, c)]
        console.print(f"{kind.upper()} = Cost({pairs[0]}, {pairs[1]}, {pairs[2]}, {sigma:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller groups: within 50 s")
    parser.add_argument("--calibrate", action="store_true", help="fit the model of the DHT to the real one")
    parser.add_argument("--peers", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--real", type=int, default=1000, help="most peers with hivemind's DHT")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="keep the JSON here as well")
    options = parser.parse_args()
    if options.calibrate:
        calibrate([25, 50, 100, 200], 4, options.group_size)
        return
    if options.quick:
        options.peers, options.rounds, options.group_size, options.real, options.seeds = [10, 100, 1000], 2, 3, 10, 50
    reports = cost_table(options.peers, options.rounds, options.group_size, options.real)
    sizes = sorted(reports)
    bytes_by_size = {str(n): round(reports[n].bytes_per_peer_per_round) for n in sizes}
    base = 100 if 100 in reports else sizes[0]
    growth = reports[sizes[-1]].bytes_per_peer_per_round / reports[base].bytes_per_peer_per_round
    measured, predicted = drift_factor(*((24, 4, 2, 12) if options.quick else (64, 8, 4, 30)))
    seeds, violations = hunt(options.seeds, 6 if options.quick else 4 * 3600)
    largest = reports[sizes[-1]]
    line = {
        "bytes_per_peer_per_round": bytes_by_size,
        "dht_operations_per_peer_per_round": {
            str(n): round(reports[n].dht_operations_per_peer_per_round, 2) for n in sizes
        },
        "growth": round(growth, 3),
        "drift_factor": round(measured, 4),
        "drift_factor_predicted": round(predicted, 4),
        "seeds_run": seeds,
        "violations": violations + sum(len(report.violations) for report in reports.values()),
        "peers_per_second": round(sizes[-1] * options.rounds / largest.cpu_seconds, 1),
        "cpu_seconds": {str(n): round(reports[n].cpu_seconds, 1) for n in sizes},
        "group_size": options.group_size,
        "real_dht_up_to": options.real,
    }
    console.print(f"READ {READ}\nPUBLISH {PUBLISH}")
    text = json.dumps(line)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "simulation.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
