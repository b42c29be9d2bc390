"""Liars in a group: each rule of aggregation against each attack, by the held-out loss that the run ends with.

    python benchmarks/byzantine.py [--quick] [--steps 400] [--peers 10] [--liars 3] [--seed 0]

Ten peers train a small byte-level model in gossip rounds of Potluck's own code (`LocalTrainer`, a codec, `aggregate`,
the outer step), without the network; three of them lie about what they trained:

    scale     a thousand times too long
    flip      with the other sign
    random    Gaussian noise ten times as long as an honest contribution
    nan       what is not finite (refused when it is decoded: the others go on without them)
    collude   all three the honest ones' mean less their standard deviation, per coordinate, which no distance tells
              from an honest one (Baruch et al., arXiv 1902.06156)

`honest` is the run of the seven honest ones alone. Also what each rule costs: seconds to aggregate 16 contributions of
a million parameters. The last line is JSON. Goal: robust rules end within 2 % of the honest run, where the mean
diverges. `--quick`: within 50 s, with a smaller model and four rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from convergence import DataSpec, Method, Size, make_trainer, samples
from rich.console import Console
from rich.table import Table

from potluck.errors import CodecError
from potluck.net.host import PeerId
from potluck.swarm.aggregate import RULE_NAMES, aggregate, token_weights
from potluck.swarm.codecs import make_codec
from potluck.swarm.contribution import Contribution, Dense
from potluck.swarm.data import Corpus, load_corpus
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalTrainer
from potluck.swarm.outer import OuterStep

SMALL: Final = Size(hidden=64, layers=2, heads=4, batch=4, length=64, steps=400, eval_every=40, eval_windows=64)
TINY: Final = Size(hidden=32, layers=1, heads=2, batch=2, length=32, steps=40, eval_every=20, eval_windows=64)
HORIZON: Final = 10
#: Beyond this a run has diverged: 5.5 is the loss of a uniform guess.
DIVERGED: Final = 20.0
console = Console(stderr=True)

#: (honest contributions, number of liars, dice) -> what the liars send.
Attack = Callable[[np.ndarray, int, np.random.Generator], list[Flat]]


def scale(honest: np.ndarray, liars: int, dice: np.random.Generator) -> list[Flat]:
    return [1000 * honest[n] for n in range(liars)]


def flip(honest: np.ndarray, liars: int, dice: np.random.Generator) -> list[Flat]:
    return [-honest[n] for n in range(liars)]


def random(honest: np.ndarray, liars: int, dice: np.random.Generator) -> list[Flat]:
    size = 10 * float(np.linalg.norm(honest, axis=1).mean()) / math.sqrt(honest.shape[1])
    return [(size * dice.standard_normal(honest.shape[1])).astype(np.float32) for _ in range(liars)]


def nan(honest: np.ndarray, liars: int, dice: np.random.Generator) -> list[Flat]:
    return [np.full(honest.shape[1], np.nan, dtype=np.float32) for _ in range(liars)]


def collude(honest: np.ndarray, liars: int, dice: np.random.Generator) -> list[Flat]:
    return [honest.mean(axis=0) - honest.std(axis=0)] * liars


ATTACKS: Final[tuple[Attack, ...]] = (scale, flip, random, nan, collude)


def run(
    size: Size, corpus: Corpus, seed: int, peers: int, liars: int, attack: Attack | None, rule: str, clip: bool
) -> float:
    """Held-out loss at the end; `attack` None: the honest ones alone."""
    method = Method(HORIZON, learning_rate=3e-3, betas=(0.5, 0.95), warmup_steps=5)
    names = [PeerId(f"worker-{n}") for n in range(peers)]
    trainers = {peer: make_trainer(size, method, seed) for peer in names[liars:]}
    first: LocalTrainer = trainers[names[-1]]
    layout, codec, outer = first.layout, make_codec("none"), OuterStep(1.0, 0.0, True, 0)
    theta, velocity, step = layout.gather(first.module), None, 0
    dice = np.random.default_rng(seed)
    for round_, horizon in enumerate(method.rounds(size.steps)):
        deltas: dict[PeerId, Flat] = {}
        for peer, trainer in trainers.items():
            trainer.load(theta)
            trainer.train((samples(size, corpus, seed, peer, step + i) for i in range(horizon)), horizon, step)
            deltas[peer] = trainer.delta(theta)
        honest = np.stack(list(deltas.values()))
        if not np.isfinite(honest).all():
            return math.inf
        if attack is not None:
            deltas |= dict(zip(names, attack(honest, liars, dice), strict=False))
        contributions = decoded(deltas, codec, layout)
        weights = token_weights(dict.fromkeys(contributions, horizon))
        update = aggregate(contributions, weights, layout, clip=clip, rule=rule, liars=liars / peers)
        theta, velocity = outer.apply(theta, velocity, update, round_)
        step += horizon
    first.load(theta)
    loss = first.evaluate(corpus.held_out_batch(size.eval_windows))
    return loss if loss < DIVERGED else math.inf


def decoded(deltas: Mapping[PeerId, Flat], codec: Any, layout: Layout) -> dict[PeerId, Contribution]:
    """What arrives: a contribution that does not decode is left out."""
    found: dict[PeerId, Contribution] = {}
    for peer, delta in deltas.items():
        try:
            found[peer] = codec.decode(codec.encode(delta, layout), layout)
        except (ValueError, CodecError):
            continue
    return found


def cost(rule: str, clip: bool) -> float:
    """Seconds for 16 contributions of a million parameters."""
    layout = Layout.of([(f"layer.{n}", (250, 400)) for n in range(10)])
    dice = np.random.default_rng(0)
    group = {PeerId(f"p{n:02}"): Dense(dice.standard_normal(layout.size, dtype=np.float32)) for n in range(16)}
    weights = token_weights(dict.fromkeys(group, 1))
    began = time.perf_counter()
    aggregate(group, weights, layout, clip=clip, rule=rule, liars=0.3)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--steps", type=int, default=SMALL.steps, help="local steps of each peer, ten a round")
    parser.add_argument("--peers", type=int, default=10)
    parser.add_argument("--liars", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = TINY if options.quick else Size(**{**vars(SMALL), "steps": options.steps})
    corpus = load_corpus(DataSpec(size.length), own_manifest=True)
    crowd = (size, corpus, options.seed, options.peers, options.liars)
    honest = run(*crowd, None, "mean", True)
    rules = [("mean, not clipped", "mean", False), *((name, name, True) for name in RULE_NAMES)]
    table: dict[str, dict[str, float | None]] = {}
    costs: dict[str, float] = {}
    for title, rule, clip in rules:
        losses = {attack.__name__: run(*crowd, attack, rule, clip) for attack in ATTACKS}
        table[title] = {name: round(loss, 4) if math.isfinite(loss) else None for name, loss in losses.items()}
        costs[title] = round(cost(rule, clip), 3)
        console.print(f"{title}: {table[title]}")
    shown = Table(title=f"{options.liars} of {options.peers} lie; held-out loss beside {honest:.4f} of the honest run")
    for column in ("rule", *(attack.__name__ for attack in ATTACKS), "seconds"):
        shown.add_column(column, justify="left" if column == "rule" else "right")
    for title, losses in table.items():
        cells = ["diverged" if loss is None else f"{loss:.4f} ({loss / honest - 1:+.1%})" for loss in losses.values()]
        shown.add_row(title, *cells, f"{costs[title]:.3f}")
    console.print(shown)
    within = {
        title: all(loss is not None and loss <= 1.02 * honest for loss in losses.values())
        for title, losses in table.items()
    }
    print(json.dumps({"honest_loss": round(honest, 4), "table": table, "seconds": costs, "within_2_percent": within}))


if __name__ == "__main__":
    sys.exit(main())
