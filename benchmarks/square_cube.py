"""The square-cube law: a pipeline's throughput by model size and bandwidth, simulated from recorded compute times.

    python benchmarks/square_cube.py [--quick] [--hidden 512 1024 2048] [--links 500 200 100 20] [--seed 0]

A middle stage of two layers is built by `swarm/stage.py` and timed on this machine (forward, and backward with its
graph kept, one thread, median of several): that is the recorded compute. Then 4 stages of 4 peers are played event by
event: every peer serves its stage one microbatch after another and is also a trainer with 4 in flight; servers are
chosen by `swarm/wiring.py`; each peer's line carries one message at a time in each direction, 25 ms one way. `driven`:
activations go through the trainer; `direct`: from server to server. `T4` is the same with declared compute (40 % of 65
TFLOP/s).

The last line is one JSON object: the share of the unshaped rate by size, line, codec and way. `--quick` ends within
50 s.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from potluck.dht.manifest import ModelPart
from potluck.net.host import PeerId
from potluck.swarm.activations import encoded_bytes
from potluck.swarm.stage import build_stage
from potluck.swarm.wiring import Wiring

console = Console(width=140)
STAGES, REPLICAS, IN_FLIGHT, LATENCY, LAYERS = 4, 4, 4, 0.025, 2
BATCH, LENGTH = 2, 256
T4_FLOPS = 0.4 * 65e12


def record(hidden: int, repeats: int) -> tuple[float, float]:
    """Seconds of (forward, backward) of a microbatch in a middle stage, on this machine."""
    sizes = {"vocab_size": 256, "hidden_size": hidden, "num_hidden_layers": 3 * LAYERS, "intermediate_size": 4 * hidden}
    sizes |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    spec = ModelPart(family="llama", config=sizes | {"tie_word_embeddings": False}, seed=1, stages=3)
    stage = build_stage(spec, "stage.1")
    times = []
    for _ in range(repeats + 1):
        x = torch.randn(BATCH, LENGTH, hidden, requires_grad=True)
        began = time.perf_counter()
        y = stage(x)
        middle = time.perf_counter()
        y.backward(torch.ones_like(y))
        times.append((middle - began, time.perf_counter() - middle))
    return statistics.median(f for f, _ in times[1:]), statistics.median(b for _, b in times[1:])


def declared(hidden: int) -> tuple[float, float]:
    forward = BATCH * LENGTH * LAYERS * (32.0 * hidden**2 + 4.0 * LENGTH * hidden) / T4_FLOPS
    return forward, 2 * forward


@dataclass
class Microbatch:
    trainer: PeerId
    route: list[PeerId] = field(default_factory=list)
    hop: int = 0  # 0 to STAGES - 1 forward (the last one's backward with it), then back to the first
    sent: float = 0.0


@dataclass
class Swarm:
    """Discrete events. Lines and processors are first in, first out."""

    forward: float
    backward: float
    carried: int  # bytes of an activation or a gradient
    bytes_per_second: float
    direct: bool
    dice: random.Random

    def __post_init__(self) -> None:
        self.names = [[PeerId(f"{s}.{r}") for r in range(REPLICAS)] for s in range(STAGES)]
        self.peers = [peer for stage in self.names for peer in stage]
        self.wirings = {peer: [Wiring() for _ in range(STAGES)] for peer in self.peers}
        for wirings in self.wirings.values():
            for wiring, stage in zip(wirings, self.names, strict=True):
                wiring.update(dict.fromkeys(stage, math.inf), 0.0)
        self.up: defaultdict[PeerId, float] = defaultdict(float)
        self.down: defaultdict[PeerId, float] = defaultdict(float)
        self.busy: defaultdict[PeerId, float] = defaultdict(float)
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.tie = itertools.count()
        self.done = 0

    def run(self, seconds: float) -> float:
        """Tokens per second, after a quarter of the time."""
        for peer in self.peers:
            for _ in range(IN_FLIGHT):
                self.start(Microbatch(peer), 0.0)
        before = None
        while self.events:
            now, _, what = heapq.heappop(self.events)
            if now > seconds:
                break
            if before is None and now > seconds / 4:
                before = self.done
            what(now)
        return (self.done - (before or 0)) * BATCH * LENGTH / (0.75 * seconds)

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (when, next(self.tie), what))

    def send(self, source: PeerId, to: PeerId, size: int, now: float, then: Callable[[float], None]) -> None:
        if source == to:
            self.at(now, then)
            return
        took = size / self.bytes_per_second
        self.up[source] = max(self.up[source], now) + took
        self.down[to] = max(self.down[to] + took, self.up[source])
        self.at(self.down[to] + LATENCY, then)

    def start(self, one: Microbatch, now: float) -> None:
        for wiring in self.wirings[one.trainer] if self.direct else ():
            one.route.append(self.chosen(wiring, now))
        self.leg(one, one.trainer, 4 * 2 * BATCH * LENGTH, now)

    def chosen(self, wiring: Wiring, now: float) -> PeerId:
        peer = wiring.choose(1.0, now)
        assert peer is not None
        return peer

    def leg(self, one: Microbatch, source: PeerId, size: int, now: float) -> None:
        """To the next server, and its work there."""
        stage = min(one.hop, 2 * STAGES - 2 - one.hop)
        if not self.direct and one.hop < STAGES:
            one.route.append(self.chosen(self.wirings[one.trainer][stage], now))
        server, one.sent = one.route[stage], now
        self.send(source, server, size, now, lambda then: self.compute(one, server, stage, then))

    def compute(self, one: Microbatch, server: PeerId, stage: int, now: float) -> None:
        work = (self.forward if one.hop < STAGES else 0.0) + (self.backward if one.hop >= STAGES - 1 else 0.0)
        self.busy[server] = max(self.busy[server], now) + work * self.dice.lognormvariate(0, 0.1)
        self.at(self.busy[server], lambda then: self.computed(one, server, stage, then))

    def computed(self, one: Microbatch, server: PeerId, stage: int, now: float) -> None:
        self.wirings[one.trainer][stage].succeeded(server, 1.0, now - one.sent)
        one.hop += 1
        if one.hop == 2 * STAGES - 1:
            self.send(server, one.trainer, 100, now, lambda then: self.finished(one, then))
        elif self.direct:
            self.leg(one, server, self.carried, now)
        else:
            self.send(
                server, one.trainer, self.carried, now, lambda then: self.leg(one, one.trainer, self.carried, then)
            )

    def finished(self, one: Microbatch, now: float) -> None:
        self.done += 1
        self.start(Microbatch(one.trainer), now)


def play(
    compute: tuple[float, float], hidden: int, codec: str, mbit: float, direct: bool, options: argparse.Namespace
) -> float:
    carried = encoded_bytes((BATCH, LENGTH, hidden), codec)  # type: ignore[arg-type]
    rate = mbit * 1e6 / 8 if mbit else math.inf
    swarm = Swarm(*compute, carried, rate, direct, random.Random(options.seed))
    # Long enough for as many microbatches of each trainer, whatever holds them up.
    return swarm.run(options.microbatches * STAGES * max(sum(compute), 4 * carried / rate + 2 * LATENCY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--links", type=float, nargs="+", default=[500.0, 200.0, 100.0, 20.0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.microbatches = 50 if options.quick else 200
    torch.set_num_threads(1)
    recorded = {hidden: record(hidden, 2 if options.quick else 5) for hidden in options.hidden}
    sizes = {f"recorded {hidden}": (hidden, times) for hidden, times in recorded.items()}
    sizes |= {f"T4 {hidden}": (hidden, declared(hidden)) for hidden in (1024, 2048, 4096, 8192)}
    table = Table(title=f"{STAGES} stages x {REPLICAS} peers, {LAYERS} layers each, microbatches of {BATCH} x {LENGTH}")
    columns = ("compute", "ms forward", "ms backward", "codec", "way", "unshaped tokens/s")
    for column in (*columns, *(f"{link:g} Mbit/s" for link in options.links)):
        table.add_column(column, justify="right")
    shares: dict[str, dict[str, float]] = {}
    for name, (hidden, times) in sizes.items():
        for codec, direct in itertools.product(("none", "int8"), (False, True)):
            unshaped = play(times, hidden, codec, 0.0, direct, options)
            row = {f"{link:g}": play(times, hidden, codec, link, direct, options) / unshaped for link in options.links}
            way = "direct" if direct else "driven"
            shares[f"{name} {codec} {way}"] = {link: round(share, 3) for link, share in row.items()}
            table.add_row(
                *(name, f"{1000 * times[0]:.1f}", f"{1000 * times[1]:.1f}", codec, way, f"{unshaped:,.0f}"),
                *(f"{share:.0%}" for share in row.values()),
                end_section=codec == "int8" and direct,
            )
    console.print(table)
    line = {
        "recorded_ms": {str(h): [round(1000 * t, 2) for t in times] for h, times in recorded.items()},
        "share_of_unshaped": shares,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
