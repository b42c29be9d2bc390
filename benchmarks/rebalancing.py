"""Pipelines of peers that come and go: SWARM's own tables with Potluck's `wiring.py` and `rebalance.py`, simulated.

    python benchmarks/rebalancing.py [--quick] [--seed 0] [--out FOLDER]

- Preemptible peers (fluid model: the pipeline runs at its slowest stage's speed): share of the optimal assignment's
  throughput with and without rebalancing. The optimum is recomputed at each join, death and end of a download, over all
  whose first download is done; it is the water level, an upper bound that no assignment need reach, so the shares err
  on the low side. The headline is SWARM's own case, spot instances; volunteers of unlike cards are beside it.
- Heterogeneous peers (queueing, event by event): throughput of stochastic wiring over uniformly random choice.
- Convergence from the worst start, all peers in one stage but one in each other, and moves after it.

Compute is declared, not measured: a card sustains 40 % of its published dense half-precision peak (single precision
where it has no tensor cores), a layer costs 24 h^2 + 4 T h FLOPs per token forward, and backward three times that
(recomputation included). Throughput by model size and bandwidth is `square_cube.py`'s. The last line is one JSON
object. `--quick` ends within 50 s.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import json
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from potluck.net.host import PeerId
from potluck.swarm.rebalance import PERIOD_SECONDS, RULES, PeerLoad, Stages, newcomer, plan
from potluck.swarm.wiring import Wiring

console = Console(width=140)
Result = TypeVar("Result")

#: Published peak TFLOP/s: tensor cores, dense, half precision with float32 accumulation; the GTX in float32.
CARDS = {"GTX 1080": 8.9, "RTX 3060": 25.5, "T4": 65.0, "RTX 3090": 71.0, "RTX 4090": 165.2}
SUSTAINED = 0.4
HIDDEN, LAYERS, TOKENS, SEQUENCE = 2048, 3, 2048, 512  # of a stage, and of a microbatch
BACKWARD = 3.0  # forwards: twice the FLOPs, and the recomputation
NOISE = 0.1  # of published loads
STALE = 0.2  # of the peers read the last period's table


def forward_flops(hidden: int, layers: int, tokens: int) -> float:
    return tokens * layers * (24.0 * hidden**2 + 4.0 * SEQUENCE * hidden)


def forward_seconds(card: str) -> float:
    return forward_flops(HIDDEN, LAYERS, TOKENS) / (SUSTAINED * CARDS[card] * 1e12)


def samples_per_second(card: str) -> float:
    return TOKENS / SEQUENCE / ((1 + BACKWARD) * forward_seconds(card))


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


# -- (a) preemptible peers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A population that stays about equally large: who leaves is replaced, after a while, by another."""

    name: str
    stages: int
    peers: int
    cards: tuple[str, ...]
    session: Callable[[random.Random], float]  # seconds
    waves: float | None = None  # of each so many seconds, the second half lets nobody in
    replaced_after: float = 300.0  # mean seconds, exponential
    download: tuple[float, float] = (30.0, 120.0)  # a stage's state: 1 GB at 270 to 67 Mbit/s


def preempted(dice: random.Random) -> float:
    return dice.expovariate(1 / 7200.0)  # spot instances: Poisson, two hours


def volunteered(dice: random.Random) -> float:
    return 1200.0 * (dice.paretovariate(1.5))  # home computers: at least 20 minutes, one hour on average, heavy tail


SCENES = (
    Scene("spot T4s", 4, 32, ("T4",), preempted),
    Scene("spot T4s", 16, 400, ("T4",), preempted),
    Scene("spot T4s, in waves", 4, 32, ("T4",), preempted, waves=14400.0),
    Scene("spot T4s, in waves", 16, 400, ("T4",), preempted, waves=14400.0),
    Scene("volunteers", 4, 32, tuple(CARDS), volunteered),
    Scene("volunteers", 8, 100, tuple(CARDS), volunteered),
    Scene("volunteers, in waves", 8, 100, tuple(CARDS), volunteered, waves=14400.0),
)


@dataclass
class Replica:
    """A peer: where it serves (None: its first download), and where it is going."""

    throughput: int  # millionths of samples per second: sums are exact
    stage: int | None = None
    going: int | None = None
    moved: int | None = None


def water_level(ascending: Sequence[float], stages: int) -> float:
    """The most that the slowest of so many stages can have: peers larger than the level fill a stage alone."""
    total = sum(ascending)
    for largest in reversed(ascending):
        if stages == 1 or largest <= total / stages:
            break
        total -= largest
        stages -= 1
    return total / stages


def greedy(throughputs: Iterable[float], stages: int) -> float:
    """The slowest stage of a real assignment: each peer, the fastest first, to the slowest stage."""
    levels = [0.0] * stages
    for throughput in sorted(throughputs, reverse=True):
        heapq.heapreplace(levels, levels[0] + throughput)
    return levels[0]


@dataclass
class Shares:
    """Of the optimum's throughput over time: of its bound, and of the greedy assignment's at samples of time."""

    of_bound: float
    of_greedy: float
    moves_per_peer_hour: float
    empty: float  # share of the time in which a stage had nobody


class Population:
    def __init__(self, scene: Scene, every: float | None, placed: bool, seed: int) -> None:
        self.scene, self.every, self.placed = scene, every, placed
        # Peers' lives are the same with and without rebalancing; only what they decide differs.
        self.lives, self.dice = random.Random(seed), random.Random(seed + 1)
        self.replicas: dict[PeerId, Replica] = {}
        self.serving = [0] * scene.stages
        self.able: list[int] = []  # throughputs of all who serve somewhere, ascending
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.tie = itertools.count()
        self.now, self.period, self.moves = 0.0, 0, 0
        self.last: Stages | None = None

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.tie), what))

    def join(self) -> None:
        scene, lives = self.scene, self.lives
        peer = PeerId(f"{lives.getrandbits(64):016x}")
        stage = newcomer(peer, self.table()) if self.placed else self.dice.randrange(scene.stages)
        self.replicas[peer] = Replica(round(1e6 * samples_per_second(lives.choice(scene.cards))), going=stage)
        self.after(lives.uniform(*scene.download), lambda: self.arrive(peer))
        self.after(scene.session(lives), lambda: self.leave(peer, lives.expovariate(1 / scene.replaced_after)))

    def leave(self, peer: PeerId, replaced_after: float) -> None:
        replica = self.replicas.pop(peer)
        if replica.stage is not None:
            self.serving[replica.stage] -= replica.throughput
            self.able.remove(replica.throughput)
        waves = self.scene.waves
        if waves is not None and self.now % waves > waves / 2:
            replaced_after += waves - self.now % waves
        self.after(replaced_after, self.join)

    def arrive(self, peer: PeerId) -> None:
        replica = self.replicas.get(peer)
        if replica is None or replica.going is None:
            return
        if replica.stage is None:
            bisect.insort(self.able, replica.throughput)
        else:
            self.serving[replica.stage] -= replica.throughput
        self.serving[replica.going] += replica.throughput
        replica.stage, replica.going = replica.going, None

    def table(self) -> list[dict[PeerId, PeerLoad]]:
        """What peers publish: utilization with noise, under the stage they serve or are on their way to."""
        serving, dice = self.serving, self.dice
        rate = min(serving)
        stages: list[dict[PeerId, PeerLoad]] = [{} for _ in serving]
        for peer, replica in self.replicas.items():
            load = 0.0
            if replica.stage is not None:
                load = rate / serving[replica.stage] * dice.uniform(1 - NOISE, 1 + NOISE)
            moving = replica.going is not None or RULES.resting(replica.moved, self.period)
            at = replica.going if replica.going is not None else replica.stage
            assert at is not None
            stages[at][peer] = PeerLoad(load, replica.throughput, moving)
        return stages

    def rebalance(self, every: float) -> None:
        """Each peer decides from this period's table or the last one's; the plan is computed once for all."""
        new = self.table()
        old = self.last or new
        plans = [(table, plan(table, self.period)) for table in (old, new)]
        for peer, replica in self.replicas.items():
            table, moves = plans[self.dice.random() >= STALE]
            if peer not in moves or replica.going is not None or replica.stage is None:
                continue
            if peer in table[replica.stage] and not RULES.resting(replica.moved, self.period):
                replica.going, replica.moved = moves[peer], self.period
                self.moves += 1
                self.after(self.dice.uniform(*self.scene.download), lambda peer=peer: self.arrive(peer))  # type: ignore[misc]
        self.last = new
        self.period += 1
        self.after(every, lambda: self.rebalance(every))

    def run(self, hours: float) -> Shares:
        for _ in range(self.scene.peers):
            self.join()
        if self.every is not None:
            self.rebalance(self.every)
        warm, end = 3600.0, 3600.0 * (1 + hours)
        done = bound = samples = best = empty = peer_seconds = 0.0
        while self.now < end:
            when, _, what = heapq.heappop(self.events)
            seconds = when - max(self.now, warm)
            if seconds > 0:
                rate = min(self.serving)
                done += rate * seconds
                bound += water_level(self.able, self.scene.stages) * seconds
                empty += seconds * (rate == 0)
                peer_seconds += len(self.replicas) * seconds
                if self.dice.random() < 30 / self.scene.peers:
                    samples += rate * seconds
                    best += greedy(self.able, self.scene.stages) * seconds
            elif when < warm:
                self.moves = 0
            self.now = when
            what()
        return Shares(done / bound, samples / best, self.moves / (peer_seconds / 3600), empty / (end - warm))


#: Seconds between decisions (None: nobody moves), and whether newcomers ask where they are missed.
KINDS = {"with": (PERIOD_SECONDS, True), "paper": (300.0, True), "without": (None, True), "random": (None, False)}


def preemption(hours: float, seeds: Sequence[int]) -> dict[tuple[str, str], float]:
    """The mean share of the bound by kind and population."""
    table = table_of(
        f"Preemptible peers, {hours:g} h, up to {len(seeds)} seeds: share of the optimal assignment's throughput",
        *("peers are", "stages", "peers", "T", "newcomers go", "of the bound", "worst seed"),
        *("of greedy", "moves / peer h", "a stage empty"),
    )
    means: dict[tuple[str, str], float] = {}
    for scene in SCENES:
        for kind, (every, placed) in KINDS.items():
            some = seeds[: max(1, 100 * len(seeds) // scene.peers)]  # large swarms vary less
            shares = [Population(scene, every, placed, seed).run(hours) for seed in some]
            mean = statistics.fmean(s.of_bound for s in shares)
            means[kind, f"{scene.name}, {scene.stages} x {scene.peers}"] = mean
            table.add_row(
                *(scene.name, str(scene.stages), str(scene.peers), "never" if every is None else f"{every:g} s"),
                *("where missed" if placed else "anywhere", f"{mean:.3f}", f"{min(s.of_bound for s in shares):.3f}"),
                f"{statistics.fmean(s.of_greedy for s in shares):.3f}",
                f"{statistics.fmean(s.moves_per_peer_hour for s in shares):.2f}",
                f"{statistics.fmean(s.empty for s in shares):.2%}",
                end_section=kind == "random",
            )
    console.print(table)
    return means


# -- (b) wiring --------------------------------------------------------------------------------------------------------

MIXES = {
    "equal": ("T4",),
    "1 : 2.5": ("RTX 3060", "T4"),
    "1 : 2.9": ("GTX 1080", "RTX 3060"),
    "volunteers'": tuple(CARDS),
}
LATENCY = 0.05  # seconds, one way


@dataclass
class Microbatch:
    trainer: int
    route: list[PeerId] = field(default_factory=list)
    sent: float = 0.0
    hop: int = 0  # forward through all stages, then backward through the same servers


def queueing(
    cards: Sequence[str], wired: bool, in_flight_per_server: int, seconds: float, seed: int, stages: int = 4
) -> tuple[float, float]:
    """(microbatches per second, the limit: the slowest stage's servers all busy). First in, first out at servers."""
    replicas, trainers = 8, 8
    dice = random.Random(seed)
    names = [[PeerId(f"{s}.{r}") for r in range(replicas)] for s in range(stages)]
    forward = {peer: forward_seconds(dice.choice(cards)) for stage in names for peer in stage}
    limit = min(sum(1 / ((1 + BACKWARD) * forward[peer]) for peer in stage) for stage in names)
    free = dict.fromkeys(forward, 0.0)
    wirings = [[Wiring() for _ in names] for _ in range(trainers)]
    for mine in wirings:
        for wiring, stage in zip(mine, names, strict=True):
            wiring.update(dict.fromkeys(stage, math.inf), 0.0)
    tie = itertools.count()
    arrivals: list[tuple[float, int, bool, Microbatch]] = []  # (when, tie, at the server or back, what)

    def send(batch: Microbatch, now: float) -> None:
        stage = batch.hop
        if stage < stages:
            peer = wirings[batch.trainer][stage].choose(1 + BACKWARD, now) if wired else dice.choice(names[stage])
            assert peer is not None
            batch.route.append(peer)
        batch.sent = now
        heapq.heappush(arrivals, (now + LATENCY, next(tie), True, batch))

    for number in range(in_flight_per_server * stages * replicas):
        send(Microbatch(number % trainers), 0.0)
    done, warm = 0, seconds / 4
    while True:
        now, _, at_server, batch = heapq.heappop(arrivals)
        if now > seconds:
            return done / (seconds - warm), limit
        stage = min(batch.hop, 2 * stages - 1 - batch.hop)
        peer, size = batch.route[stage], 1.0 if batch.hop < stages else BACKWARD
        if at_server:
            free[peer] = max(free[peer], now) + size * forward[peer] * dice.lognormvariate(0, 0.1)
            heapq.heappush(arrivals, (free[peer] + LATENCY, next(tie), False, batch))
            continue
        wirings[batch.trainer][stage].succeeded(peer, size, now - batch.sent)
        batch.hop += 1
        if batch.hop == 2 * stages:
            done += now > warm
            batch = Microbatch(batch.trainer)
        send(batch, now)


def heterogeneity(seconds: float, seeds: Sequence[int]) -> dict[str, float]:
    table = table_of(
        f"Wiring, 4 stages x 8 servers, 8 trainers, {len(seeds)} seeds: share of the slowest stage's limit",
        *("cards' speeds", "in flight / server", "wiring", "uniform", "wiring / uniform", "worst seed"),
    )
    ratios = {}
    for mix, cards in MIXES.items():
        for in_flight in (2, 4, 8):
            rows = []
            for seed in seeds:
                (mine, limit), (uniform, _) = (queueing(cards, w, in_flight, seconds, seed) for w in (True, False))
                rows.append((mine / limit, uniform / limit))
            ratio = statistics.fmean(a for a, _ in rows) / statistics.fmean(b for _, b in rows)
            if in_flight == 4:
                ratios[mix] = ratio
            table.add_row(
                *(mix, str(in_flight), f"{statistics.fmean(a for a, _ in rows):.3f}"),
                *(f"{statistics.fmean(b for _, b in rows):.3f}", f"{ratio:.2f}", f"{min(a / b for a, b in rows):.2f}"),
                end_section=in_flight == 8,
            )
    console.print(table)
    return ratios


# -- (c) convergence ---------------------------------------------------------------------------------------------------


@dataclass
class Convergence:
    periods: int
    moves: int
    moves_after: int
    level: float  # the slowest stage over the water level
    plan_seconds: float  # the longest


def converge(stages: int, peers: int, cards: Sequence[str], quiet: int, seed: int) -> Convergence:
    """From all in one stage but one in each other; some peers always read the last period's table."""
    dice = random.Random(seed)
    names = [PeerId(f"{dice.getrandbits(64):016x}") for _ in range(peers)]
    throughput = {peer: samples_per_second(dice.choice(cards)) for peer in names}
    at = {peer: max(0, i - peers + stages) for i, peer in enumerate(names)}
    moved: dict[PeerId, int] = {}
    tables: deque[list[dict[PeerId, PeerLoad]]] = deque(maxlen=2)
    history: list[int] = []
    longest = 0.0
    level = [0.0]

    def publish(period: int) -> list[dict[PeerId, PeerLoad]]:
        nonlocal level
        level = [0.0] * stages
        for peer, stage in at.items():
            level[stage] += throughput[peer]
        table: list[dict[PeerId, PeerLoad]] = [{} for _ in level]
        for peer, stage in at.items():
            load = min(level) / level[stage] * dice.uniform(1 - NOISE, 1 + NOISE)
            table[stage][peer] = PeerLoad(load, throughput[peer], RULES.resting(moved.get(peer), period))
        return table

    bound = math.ceil(math.log2(peers)) + 2
    for period in range(bound + 3 + quiet):
        tables.append(publish(period))
        began = time.perf_counter()
        plans = [plan(table, period) for table in tables]
        longest = max(longest, (time.perf_counter() - began) / len(tables))
        count = 0
        for peer in names:
            which = -1 if dice.random() >= STALE else 0
            to = plans[which].get(peer)
            if to is not None and peer in tables[which][at[peer]] and not RULES.resting(moved.get(peer), period):
                at[peer], moved[peer] = to, period
                count += 1
        history.append(count)
    # Converged: the first period from which on nobody moved for as long as movers rest.
    settled = next(p for p in range(len(history)) if not any(history[p : p + RULES.rest + 1]))
    publish(0)
    share = min(level) / water_level(sorted(throughput.values()), stages)
    return Convergence(settled, sum(history), sum(history[settled:]), share, longest)


def convergence(stage_counts: Sequence[int], quiet: int, seeds: Sequence[int]) -> dict[int, list[Convergence]]:
    table = table_of(
        f"Convergence from the worst start, a fifth of the peers one period behind, worst of {len(seeds)} seeds",
        *("stages", "peers", "cards", "periods", "bound", "moves", "moves after", "of the bound", "s / plan"),
    )
    results: dict[int, list[Convergence]] = {}
    for stages in stage_counts:
        for peers, (name, cards) in itertools.product(
            sorted({4 * stages, 1000}), {"equal": ("T4",), "volunteers'": tuple(CARDS)}.items()
        ):
            runs = [converge(stages, peers, cards, quiet, seed) for seed in seeds]
            results.setdefault(stages, []).extend(runs)
            table.add_row(
                *(str(stages), str(peers), name, str(max(r.periods for r in runs))),
                *(str(math.ceil(math.log2(peers)) + 2), str(max(r.moves for r in runs))),
                *(str(sum(r.moves_after for r in runs)), f"{min(r.level for r in runs):.3f}"),
                f"{max(r.plan_seconds for r in runs):.2f}",
            )
    console.print(table)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and with fewer seeds: within 50 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the JSON here as well")
    options = parser.parse_args()
    quick, first = options.quick, options.seed
    took = {}

    def timed(name: str, result: Callable[[], Result]) -> Result:
        began = time.monotonic()
        value = result()
        took[name] = round(time.monotonic() - began, 1)
        return value

    several = range(first, first + (2 if quick else 10))
    shares = timed("preemption", lambda: preemption(4 if quick else 24, several))
    ratios = timed("wiring", lambda: heterogeneity(80 if quick else 600, several))
    counts = (3, 8, 64) if quick else (3, 4, 8, 16, 32, 64)
    settled = timed("convergence", lambda: convergence(counts, 20 if quick else 100, several[:1] if quick else several))

    def mean(kind: str, who: str) -> float:
        return round(statistics.fmean(v for (k, scene), v in shares.items() if k == kind and scene.startswith(who)), 4)

    line = {
        "share_of_optimal_with": mean("with", "spot"),
        "share_of_optimal_every_300_s": mean("paper", "spot"),
        "share_of_optimal_without": mean("without", "spot"),
        "share_of_optimal_random_newcomers": mean("random", "spot"),
        "volunteers_share_with": mean("with", "volunteers"),
        "volunteers_share_without": mean("without", "volunteers"),
        "share_by_scene": {scene: round(share, 4) for (kind, scene), share in shares.items() if kind == "with"},
        "wiring_over_uniform": round(ratios["volunteers'"], 3),
        "wiring_over_uniform_by_mix": {mix: round(ratio, 3) for mix, ratio in ratios.items()},
        "moves_after_convergence": sum(r.moves_after for runs in settled.values() for r in runs),
        "periods_to_converge": {str(stages): max(r.periods for r in runs) for stages, runs in settled.items()},
        "goals": {"share_of_optimal_with": 0.9, "wiring_over_uniform": 1.3, "moves_after_convergence": 0},
        "seconds": took,
    }
    text = json.dumps(line)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "rebalancing.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
