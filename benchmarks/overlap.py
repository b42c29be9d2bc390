"""What overlapped rounds are worth: the time that goes into local steps, and the loss at equal tokens, beside blocking
rounds that spend 30 % of their time on the exchange.

    python benchmarks/overlap.py [--quick] [--rounds 80] [--seeds 3] [--momentum 0] [--codec int8]

Four peers train a small byte-level model with Potluck's own rounds: `GossipReplica` and `OverlappedReplica` with
`LocalTrainer`, codec, deadlines, aggregation and outer step. Simulated, in virtual time (`potluck/sim/loop.py`), are

    the network   each peer's downlink carries one blob after another, at a rate at which a group's contributions take
                  0.85 of the time that a round leaves for pulling; a look into the directory takes 10 ms
    computing     a local step takes 0.7 s, and evaluating held-out windows what their tokens are of a batch's, at a
                  third of the cost (no backward). Encoding, decoding, aggregating and copying take none: see
                  benchmarks/codecs.py and benchmarks/rounds.py for those.

Blocking rounds are 10.1 s, 3 of them for the exchange; overlapped ones are 7.1 s, with the same 3. Utilization: seconds
of local steps over all peers' seconds, from the second round on. Both end with exactly the same tokens, on the same
samples. The loss is that of the shared parameters at the end, on held-out windows.

Without --quick also: other ways to handle staleness, for each of which a few lines of the replica are exchanged, and
`rounds.stream`: the largest contribution of a round, and the loss, where the tensors are exchanged in parts. The last
line is JSON. Goals: overlap_utilization >= 0.97 where blocking_utilization is 0.7, loss_ratio <= 1.01.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from convergence import MODULE, WORKERS, DataSpec, Method, Size, make_trainer, samples
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sim"))

from potluck.net.blobs import BlobRef
from potluck.net.host import PeerId
from potluck.sim.loop import Compute, VirtualLoop, run
from potluck.sim.stand_in import Pace
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import Corpus, load_corpus
from potluck.swarm.follower import Following, RoundRules
from potluck.swarm.layout import Flat
from potluck.swarm.local import LocalResult, LocalTrainer
from potluck.swarm.outer import OuterStep
from potluck.swarm.overlap import OverlappedReplica
from potluck.swarm.phases import PULL_SHARE, Round, RoundClock
from potluck.swarm.rounds import GossipReplica
from potluck.swarm.state import ReplicaState
from potluck.swarm.waits import WaitBoard

from fake_exchange import FakeExchange, World

SMALL: Final = Size(hidden=32, layers=1, heads=2, batch=16, length=32, steps=0, eval_every=0, eval_windows=512)
HORIZON: Final = 10
STEP_SECONDS: Final = 0.7
EXCHANGE_SECONDS: Final = 3.0
#: Held-out windows that a peer evaluates each round; the loss at the end is of many more.
WINDOWS: Final = 2
#: Of the time that a round has for pulling: what its contributions take.
FILLED: Final = 0.85
console = Console(stderr=True)


# --- what is simulated


class Machine:
    """A processor whose local steps take virtual time."""

    def __init__(self) -> None:
        self.pace = Pace(STEP_SECONDS)
        self.evaluated = 0.0

    def cost(self) -> float:
        evaluated, self.evaluated = self.evaluated, 0.0
        return self.pace.paid() + evaluated

    def when_awake(self, then: Callable[[], None]) -> None:
        then()


class TimedTrainer:
    """`LocalTrainer` whose steps and evaluations take virtual time."""

    def __init__(self, trainer: LocalTrainer, machine: Machine, batch: int) -> None:
        self.layout, self._trainer, self._machine, self._batch = trainer.layout, trainer, machine, batch
        self.load, self.delta, self.forget = trainer.load, trainer.delta, trainer.forget

    def train(
        self,
        batches: Iterator[torch.Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = lambda seconds: True,
    ) -> LocalResult:
        pace = self._machine.pace
        # A hair less than a step, or rounding would take one from some rounds.
        steps = pace.steps_until(max_steps, lambda seconds: may_start(seconds - 1e-6))
        return self._trainer.train(batches, steps, first_step)

    def evaluate(self, tokens: torch.Tensor) -> float:
        self._machine.evaluated += STEP_SECONDS * tokens.shape[0] / (3 * self._batch)
        return self._trainer.evaluate(tokens)


class LinkExchange(FakeExchange):
    """Whose blobs come over a downlink of `rate` bytes per second, one after another."""

    def __init__(self, world: World, peer: PeerId, rate: float) -> None:
        super().__init__(world, peer)
        self._rate, self._free_at = rate, 0.0
        self.received = self.largest = 0

    async def fetch(
        self, ref: BlobRef, holders: Sequence[PeerId], max_bytes: int, timeout_seconds: float, may_come: bool = True
    ) -> memoryview:
        if holders[0] != self.peer:
            loop = asyncio.get_running_loop()
            self._free_at = max(self._free_at, loop.time()) + ref.size / self._rate
            self.received, self.largest = self.received + ref.size, max(self.largest, ref.size)
            async with asyncio.timeout(timeout_seconds):
                await asyncio.sleep(self._free_at - loop.time())
        return await super().fetch(ref, holders, max_bytes, timeout_seconds, may_come)

    def traffic(self) -> tuple[int, int]:
        return self.received, self.received


# --- what is compared


@dataclass(frozen=True)
class Way:
    """How rounds go. `replica`: one that overlaps, or none that does; `stream`: parts of the tensors."""

    name: str
    replica: type[GossipReplica] = GossipReplica
    stream: int = 1

    @property
    def overlaps(self) -> bool:
        return issubclass(self.replica, OverlappedReplica)


class Unmoved(OverlappedReplica):
    """Trains a whole round from its guess: the update comes a full round late."""

    def _move(self, theta: Flat) -> None:
        pass


class Stale(OverlappedReplica):
    """Begins with the newest theta that there is."""

    def _foresee(self, theta: Flat, delta: Flat, round_: Round) -> Flat:
        return theta.copy()


class StaleUnmoved(Stale, Unmoved):
    """Plain staleness of one round."""


class Penalized(StaleUnmoved):
    """After CO2: plain staleness, and the outer step divided by its age in rounds (the paper's penalty follows the
    measured gap), its momentum clipped to three times its root mean square."""

    def _outer_step(self, theta: Flat, velocity: Flat | None, update: Flat, round_: Round) -> tuple[Flat, Flat | None]:
        if velocity is not None:
            most = np.float32(3 * np.sqrt(np.mean(np.square(velocity, dtype=np.float64))))
            velocity = np.clip(velocity, -most, most)
        return super()._outer_step(theta, velocity, update * np.float32(0.5), round_)


class Mixed(OverlappedReplica):
    """Streaming DiLoCo: half of what was trained, half of theta."""

    kept = 0.5

    def _foresee(self, theta: Flat, delta: Flat, round_: Round) -> Flat:
        return super()._foresee(theta, delta * np.float32(self.kept), round_)


class LessMixed(Mixed):
    kept = 0.75


class Stepped(OverlappedReplica):
    """Takes the outer step, momentum and all, with its own delta."""

    def _foresee(self, theta: Flat, delta: Flat, round_: Round) -> Flat:
        state = self.state
        assert state is not None
        return self._outer_step(theta, state.velocity, delta.copy(), round_)[0]


class Eager(OverlappedReplica):
    """Eager Updates: its own delta for its share, and the last update for the others'."""

    _last: Flat | None = None
    _own: Flat | None = None

    def _outer_step(self, theta: Flat, velocity: Flat | None, update: Flat, round_: Round) -> tuple[Flat, Flat | None]:
        self._last = update.copy()
        return super()._outer_step(theta, velocity, update, round_)

    def _foresee(self, theta: Flat, delta: Flat, round_: Round) -> Flat:
        last, own, self._own = self._last, self._own, delta
        guess = delta if last is None or own is None else last + np.float32(1 / len(WORKERS)) * (delta - own)
        return super()._foresee(theta, guess, round_)


BLOCKING: Final = Way("blocking")
OVERLAP: Final = Way("overlap", OverlappedReplica)
STALENESS: Final = (
    Way("own, unmoved", Unmoved),
    Way("stale", Stale),
    Way("stale, unmoved", StaleUnmoved),
    Way("stale, unmoved, penalty (CO2)", Penalized),
    Way("mixed, 0.5 (Streaming DiLoCo)", Mixed),
    Way("mixed, 0.75", LessMixed),
    Way("outer step on own", Stepped),
    Way("eager", Eager),
)
STREAMS: Final = (
    Way("blocking, stream 4", stream=4),
    Way("overlap, stream 4", OverlappedReplica, stream=4),
)


# --- runs


@dataclass(frozen=True)
class Figures:
    """Of one run. `peak_bytes`: the largest contribution; `received`: bytes that a peer pulled; `told`: utilization as
    the rounds' reports say."""

    loss: float
    tokens: int
    utilization: float
    told: float
    peak_bytes: int
    received: int


@dataclass
class Seen:
    """What a peer said."""

    reports: dict[int, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    theta: Flat | None = None


async def train(loop: VirtualLoop, way: Way, size: Size, method: Method, corpus: Corpus, seed: int) -> Figures:
    """Rounds by four peers; exactly the same samples whatever the way."""
    rounds, step_tokens = size.steps // HORIZON, size.batch * size.length
    # A hundredth more than the steps take: evaluating and a step's grain need some.
    seconds = 1.015 * HORIZON * STEP_SECONDS + (0.0 if way.overlaps else EXCHANGE_SECONDS)
    rules = RoundRules(
        clock=RoundClock(0.0, seconds, EXCHANGE_SECONDS),
        steps=HORIZON,
        step_tokens=step_tokens,
        group_size=16,
        retain=6,
        fragments=8,
        sync_limit=3.0,
        clip=True,
        stream=way.stream,
    )
    world = World()

    def now() -> float:
        world.now = loop.time()
        return world.now

    # The first overlapped round is as much shorter as the others' exchange takes; so is that of the blocking ones.
    await asyncio.sleep(0.0 if way.overlaps else EXCHANGE_SECONDS)
    seen = {peer: Seen() for peer in WORKERS}
    replicas, exchanges, done = [], [], asyncio.Event()
    for peer in WORKERS:
        machine, trainer = Machine(), make_trainer(size, method, seed)
        codec, layout = make_codec(method.codec, method.parameters), trainer.layout
        dice = np.random.default_rng(0)
        whole = len(codec.encode(dice.standard_normal(layout.size, dtype=np.float32), layout))
        rate = whole * (len(WORKERS) - 1) / (FILLED * PULL_SHARE * EXCHANGE_SECONDS)
        exchanges.append(LinkExchange(world, peer, rate))

        def batches(round_: Round, peer: PeerId = peer) -> Iterator[torch.Tensor]:
            step = round_ * HORIZON
            while True:
                yield samples(size, corpus, seed, peer, step)
                step += 1

        async def on_state(state: ReplicaState, residual: Flat | None, peer: PeerId = peer) -> None:
            if state.round == rounds:
                seen[peer].theta = state.theta

        def emit(name: str, *, peer: PeerId = peer, **fields: Any) -> None:
            if name == "swarm.round.applied":
                seen[peer].reports[fields["round"]] = now(), fields
                if all(rounds - 1 in one.reports for one in seen.values()):
                    done.set()

        following = Following(
            peer=peer,
            module=MODULE,
            rules=rules,
            codec=codec,
            outer=OuterStep(1.0, method.momentum, True, method.momentum_warmup_rounds),
            exchange=exchanges[-1],
            now=now,
            waits=WaitBoard(now),
            emit=emit,
            session=peer.encode()[-16:].ljust(16),
            on_state=on_state,
            compute=Compute(machine),
        )
        replicas.append(
            way.replica(
                trainer=TimedTrainer(trainer, machine, size.batch),
                batches=batches,
                held_out=corpus.held_out_batch(WINDOWS),
                **following,
            )
        )
    velocity = layout.zeros() if method.momentum else None
    theta_0 = ReplicaState(MODULE, layout, Round(0), layout.gather(trainer.module), velocity)
    tasks = [asyncio.create_task(replica.run(theta_0)) for replica in replicas]
    finished = asyncio.create_task(done.wait())
    await asyncio.wait([finished, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finished.cancel()
    for replica in replicas:
        replica.stop()
    await asyncio.gather(*tasks)
    thetas = [one.theta for one in seen.values() if one.theta is not None]
    assert len({theta.tobytes() for theta in thetas}) == 1, "peers of one group have unlike parameters"
    trainer.load(thetas[0])
    reports = [report for one in seen.values() for number, (_, report) in one.reports.items() if number < rounds]
    wall = sum(one.reports[rounds - 1][0] - one.reports[0][0] for one in seen.values())
    later = [report for report in reports if report["round"] > 0]
    return Figures(
        loss=trainer.evaluate(corpus.held_out_batch(size.eval_windows)),
        tokens=sum(report["tokens"] for report in reports),
        utilization=sum(report["steps"] for report in later) * STEP_SECONDS / wall,
        told=statistics.mean(report["utilization"] for report in later),
        peak_bytes=max(exchange.largest for exchange in exchanges),
        received=max(exchange.received for exchange in exchanges),
    )


def measure(way: Way, rounds: int, seed: int, momentum: float, codec: str, corpus: Corpus) -> Figures:
    began = time.monotonic()
    size = replace(SMALL, steps=rounds * HORIZON)
    warmup = max(1, rounds // 4) if momentum else 0
    method = Method(HORIZON, codec, momentum=momentum, momentum_warmup_rounds=warmup, betas=(0.5, 0.95))
    figures = run(lambda loop: train(loop, way, size, method, corpus, seed))
    console.print(
        f"{way.name}, seed {seed}: loss {figures.loss:.4f}, utilization {figures.utilization:.3f}, "
        f"{figures.tokens} tokens, in {time.monotonic() - began:.0f} s"
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 rounds, one seed: within 50 s")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--momentum", type=float, default=0.0, help="of the outer step, Nesterov")
    parser.add_argument("--codec", default="int8")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seeds = 40, 1
    torch.set_num_threads(1)
    corpus = load_corpus(DataSpec(SMALL.length), own_manifest=True)
    ways = [BLOCKING, OVERLAP, *(() if options.quick else (*STALENESS, *STREAMS))]
    figures: dict[str, list[Figures]] = {way.name: [] for way in ways}
    for seed in range(options.seeds):
        for way in ways:
            figures[way.name].append(measure(way, options.rounds, seed, options.momentum, options.codec, corpus))
    blocking, overlap = figures["blocking"], figures["overlap"]
    table = Table("rounds", "loss", "/ blocking (seeds)", "utilization", "largest contribution", "received")
    ratios: dict[str, list[float]] = {}
    for name, found in figures.items():
        ratios[name] = [one.loss / base.loss for one, base in zip(found, blocking, strict=True)]
        table.add_row(
            name,
            f"{statistics.mean(one.loss for one in found):.4f}",
            f"{statistics.mean(ratios[name]):.4f} ({' '.join(f'{ratio:.4f}' for ratio in ratios[name])})",
            f"{statistics.mean(one.utilization for one in found):.3f}",
            f"{found[0].peak_bytes / 1e3:.1f} kB",
            f"{found[0].received / 1e6:.2f} MB",
        )
    console.print(table)
    summary: dict[str, Any] = {
        "blocking_utilization": round(statistics.mean(one.utilization for one in blocking), 4),
        "overlap_utilization": round(statistics.mean(one.utilization for one in overlap), 4),
        "loss_ratio": round(statistics.mean(ratios["overlap"]), 4),
        "blocking_loss": round(statistics.mean(one.loss for one in blocking), 4),
        "overlap_loss": round(statistics.mean(one.loss for one in overlap), 4),
        "tokens": [blocking[0].tokens, overlap[0].tokens],
        "rounds": options.rounds,
        "seeds": options.seeds,
        "momentum": options.momentum,
    }
    if not options.quick:
        summary["loss_ratios"] = {name: round(statistics.mean(found), 4) for name, found in ratios.items()}
        summary["peak_bytes"] = {name: found[0].peak_bytes for name, found in figures.items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
