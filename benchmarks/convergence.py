"""What averaging every H steps costs: held-out loss of 4 workers beside synchronous AdamW on the same tokens.

Everything that touches a number is Potluck's own code: `LocalTrainer` trains, each worker's delta goes through its
codec's `encode` and `decode` with its own residual, `aggregate` weighs and clips, `OuterStep` applies. Only the network
is left out. `ddp` is one process that takes the four workers' batches as one, with the same number of optimizer steps.
Every method sees exactly the same samples (those that the run assigns to four peers in rounds of ten steps), starts
from the same weights and has its learning rate tuned on seed 0.

    python benchmarks/convergence.py [--quick] [--size small] [--seeds 3] [--out benchmarks/results] [--tune] [--json]

Finished runs are kept in `convergence.jsonl` under `--out` and not repeated (`--quick` keeps nothing). The last line
is JSON. Ratios are held-out losses at the end over that of ddp, but `h10_sparse_ratio` is sparse over none at H = 10.
`codecs`: for every codec at H = 10 its loss over that of none, mean and spread (standard deviation over seeds), and the
bytes that a peer sends per parameter in all rounds together. `--size long` has 400 rounds of 4 steps instead of 40.
Goals: h1_none_ratio <= 1.01, h10_none_ratio and h10_int8_ratio <= 1.05, h10_sparse_ratio <= 1.04; after 400 rounds
sparse and demo within 1 % of none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.codecs import CODEC_NAMES, Codec, make_codec
from potluck.swarm.contribution import Contribution
from potluck.swarm.data import Corpus, assigned_offsets, load_corpus
from potluck.swarm.layout import Flat
from potluck.swarm.local import LocalTrainer
from potluck.swarm.model import build_module
from potluck.swarm.outer import OuterStep

WORKERS = [PeerId(f"worker-{i}") for i in range(4)]
MODULE = "stage.0"
#: Samples are assigned per peer and round; here a round of ten steps for every method, so that all see the same ones.
ASSIGNMENT_STEPS = 10
#: Part of a finished run's key: raise it when a change of the code makes old runs incomparable.
#: 2: `aggregate` clips to the lower median (the rows of edition 1 in convergence.jsonl are older).
EDITION = 2


@dataclass(frozen=True)
class Size:
    """A model, its batches and how long it trains."""

    hidden: int
    layers: int
    heads: int
    batch: int
    """Sequences per worker and step."""
    length: int
    steps: int
    eval_every: int
    eval_windows: int
    horizon: int = 10
    """Local steps of the rounds that all codecs are compared at."""


SIZES = {
    # --quick: 0.07M parameters.
    "tiny": Size(hidden=64, layers=1, heads=4, batch=4, length=64, steps=160, eval_every=40, eval_windows=128),
    # The default: 0.12M parameters, 40 rounds of ten steps, 15 s a run on an idle core, 8 minutes in all.
    "small": Size(hidden=64, layers=2, heads=4, batch=8, length=64, steps=400, eval_every=20, eval_windows=128),
    # 400 rounds of four steps: what a codec costs in a run that is not over while residuals are still on their way.
    "long": Size(
        hidden=64, layers=2, heads=4, batch=4, length=64, steps=1600, eval_every=80, eval_windows=128, horizon=4
    ),
    # The model of the `demo` preset: 0.82M parameters, 140 s a run, 70 minutes in all.
    "demo": Size(hidden=128, layers=4, heads=4, batch=8, length=128, steps=400, eval_every=40, eval_windows=128),
}


@dataclass(frozen=True)
class Method:
    """One row of the table. `horizon` 0 is synchronous AdamW with the four-fold batch."""

    horizon: int
    codec: str = "none"
    parameters: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.1
    outer_rate: float = 1.0
    momentum: float = 0.0
    momentum_warmup_rounds: int = 0
    clip: bool = True
    ramp: tuple[int, ...] = ()
    """Local steps of the first rounds, before `horizon` holds."""
    density: tuple[int, ...] = ()
    """`k` of each round, the last for all that follow; else the codec's own."""
    variant: str = ""

    @property
    def name(self) -> str:
        return f"h{self.horizon}_{self.codec}{self.variant}" if self.horizon else "ddp"

    @property
    def settings(self) -> dict[str, Any]:
        """All that a run depends on."""
        left_out = {"variant"} if self.density else {"variant", "density"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def codec_of(self, round_: int) -> Codec:
        if not self.density:
            return make_codec(self.codec, self.parameters)
        return make_codec(self.codec, {**self.parameters, "k": self.density[min(round_, len(self.density) - 1)]})

    def rounds(self, steps: int) -> Iterator[int]:
        """Local steps of each round; the last round is cut to what is left."""
        queue = list(self.ramp)
        while steps > 0:
            take = min(steps, queue.pop(0) if queue else self.horizon)
            yield take
            steps -= take


# --- specs, as the library's files read them


@dataclass(frozen=True)
class DataSpec:
    sequence_length: int
    source: str = "python-stdlib"
    tokenizer: str = "bytes"
    held_out_fraction: float = 0.05
    text_field: str = "text"
    split: str = "train"
    seed: int = 0


@dataclass(frozen=True)
class ModelSpec:
    config: dict[str, Any]
    seed: int
    family: str = "llama"
    stages: int = 1


@dataclass(frozen=True)
class TrainingSpec:
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    schedule: str
    total_steps: int
    batch_size: int
    optimizer: str = "adamw"
    gradient_clip: float = 1.0
    precision: str = "float32"


def make_trainer(size: Size, method: Method, seed: int) -> LocalTrainer:
    config = {
        "vocab_size": 256,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "intermediate_size": size.hidden * 43 // 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    spec = TrainingSpec(
        learning_rate=method.learning_rate,
        betas=method.betas,
        weight_decay=method.weight_decay,
        warmup_steps=method.warmup_steps,
        schedule=method.schedule,
        total_steps=size.steps,
        batch_size=size.batch if method.horizon else size.batch * len(WORKERS),
    )
    return LocalTrainer(build_module(ModelSpec(config, seed), MODULE), spec, torch.device("cpu"))


# --- training


def samples(size: Size, corpus: Corpus, seed: int, peer: PeerId, step: int) -> torch.Tensor:
    """The batch of a peer at a step, whatever the method."""
    round_, within = divmod(step, ASSIGNMENT_STEPS)
    run_seed = f"convergence {seed}".encode()
    return corpus.batch(assigned_offsets(run_seed, MODULE, peer, round_, within * size.batch, size.batch, corpus))


@dataclass
class Curve:
    """Held-out loss over steps."""

    size: Size
    held_out: torch.Tensor
    points: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, trainer: LocalTrainer) -> None:
        due = self.points[-1][0] + self.size.eval_every if self.points else 0
        if step >= due // self.size.eval_every * self.size.eval_every or step == self.size.steps:
            self.points.append((step, trainer.evaluate(self.held_out)))


def train_together(size: Size, method: Method, seed: int, corpus: Corpus, curve: Curve) -> float:
    """Synchronous AdamW on all workers' batches. Bytes per parameter and step of an fp32 gradient: 4."""
    trainer = make_trainer(size, method, seed)
    curve.add(0, trainer)
    for step in range(size.steps):
        batch = torch.cat([samples(size, corpus, seed, peer, step) for peer in WORKERS])
        trainer.train(iter([batch]), 1, step)
        curve.add(step + 1, trainer)
    return 4.0


def train_by_rounds(size: Size, method: Method, seed: int, corpus: Corpus, curve: Curve) -> float:
    """Rounds as in `design/rounds.md`, without the network. Returns the mean bytes per parameter of a contribution."""
    trainers = {peer: make_trainer(size, method, seed) for peer in WORKERS}
    layout = trainers[WORKERS[0]].layout
    has_residual = method.codec_of(0).has_residual
    residuals: dict[PeerId, Flat | None] = {p: layout.zeros() if has_residual else None for p in WORKERS}
    outer = OuterStep(method.outer_rate, method.momentum, True, method.momentum_warmup_rounds)
    theta = layout.gather(trainers[WORKERS[0]].module)
    velocity: Flat | None = layout.zeros() if method.momentum else None
    step, sent = 0, 0
    curve.add(0, trainers[WORKERS[0]])
    for round_, horizon in enumerate(method.rounds(size.steps)):
        codec = method.codec_of(round_)
        contributions: dict[PeerId, Contribution] = {}
        tokens: dict[PeerId, int] = {}
        for peer, trainer in trainers.items():
            trainer.load(theta)
            batches = (samples(size, corpus, seed, peer, step + i) for i in range(horizon))
            tokens[peer] = trainer.train(batches, horizon, step).tokens
            blob = codec.encode(trainer.delta(theta), layout, residuals[peer])
            contributions[peer] = codec.decode(blob, layout)
        sent += len(blob)
        update = aggregate(contributions, token_weights(tokens), layout, clip=method.clip)
        update = codec.update_of(update, layout)
        theta, velocity = outer.apply(theta, velocity, update, round_)
        step += horizon
        trainers[WORKERS[0]].load(theta)
        curve.add(step, trainers[WORKERS[0]])
    return sent / layout.size / (round_ + 1)


def run(size: Size, method: Method, seed: int, corpus: Corpus) -> dict[str, Any]:
    """One finished run as a JSON-able row."""
    started = time.monotonic()
    curve = Curve(size, corpus.held_out_batch(size.eval_windows))
    train = train_by_rounds if method.horizon else train_together
    bytes_per_parameter = train(size, method, seed, corpus, curve)
    return {
        "key": key_of(size, method, seed),
        "method": method.settings,
        "size": asdict(size),
        "seed": seed,
        "edition": EDITION,
        "loss": curve.points[-1][1],
        "curve": [(step, round(loss, 5)) for step, loss in curve.points],
        "tokens": size.steps * size.batch * size.length * len(WORKERS),
        "bytes_per_parameter_and_round": bytes_per_parameter,
        "seconds": round(time.monotonic() - started, 1),
    }


def key_of(size: Size, method: Method, seed: int) -> str:
    sizes = {name: value for name, value in asdict(size).items() if name != "horizon"}  # no part of a run
    text = json.dumps([EDITION, sizes, method.settings, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Runs:
    """Runs by key; finished ones are appended to a file and found there the next time."""

    def __init__(self, path: Path | None, console: Console) -> None:
        self._path, self._console, self._corpora = path, console, dict[int, Corpus]()
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self._rows = {row["key"]: row for row in rows}

    def has(self, size: Size, method: Method, seed: int) -> bool:
        return key_of(size, method, seed) in self._rows

    def get(self, size: Size, method: Method, seed: int) -> dict[str, Any]:
        key = key_of(size, method, seed)
        if key not in self._rows:
            row = run(size, method, seed, self._corpus(size.length))
            self._rows[key] = row
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self._console.print(
                f"{method.name} seed {seed} lr {method.learning_rate:g}: {row['loss']:.4f} in {row['seconds']:.0f} s"
            )
        return self._rows[key]

    def _corpus(self, length: int) -> Corpus:
        if length not in self._corpora:
            self._corpora[length] = load_corpus(DataSpec(length), own_manifest=True)
        return self._corpora[length]


# --- what is compared


#: By codec and horizon, where it is not the codec's own: parameters and outer learning rate. Forty rounds are short for
#: error feedback: old residuals fade, and steps are longer. Lion's momentum would not have begun to move in them.
TUNED: dict[tuple[str, int], tuple[dict[str, float], float]] = {
    ("sparse", 1): ({"k": 512, "beta": 0.7}, 1.3),
    ("sparse", 4): ({"k": 512, "beta": 0.5}, 1.6),
    ("sparse", 10): ({"k": 512, "beta": 0.5}, 1.6),
    ("sparse", 30): ({"k": 512, "beta": 0.7}, 1.3),
    ("demo", 4): ({"k": 1024, "beta": 0.6}, 1.3),
    ("demo", 10): ({"k": 512, "beta": 0.5}, 1.6),
    ("sign", 10): ({"beta1": 0.0, "beta2": 0.0}, 1.0),
}


def tuned(size: str, horizon: int, codec: str = "none") -> Method:
    """The settings that tuning on seed 0 chose (docs/convergence.md says what was tried)."""
    large = size == "demo"
    if horizon == 0:
        return Method(0, learning_rate=2.5e-3 if large else 5e-3, betas=(0.8, 0.95))
    rate = 1.5e-3 if large else 2e-3 if horizon == 30 else 3e-3
    # The outer momentum warms up over a quarter of the run's rounds.
    warmup = max(1, SIZES[size].steps // (4 * horizon))
    parameters, outer_rate = TUNED.get((codec, horizon), ({}, 1.0))
    return Method(
        horizon,
        codec,
        parameters,
        learning_rate=rate,
        betas=(0.5, 0.95),
        outer_rate=outer_rate,
        momentum=0.8,
        momentum_warmup_rounds=warmup,
    )


def at_a_fiftieth(size: str, horizon: int) -> list[Method]:
    """`sparse` at 0.02 byte per parameter and round: as it is by default; tuned; with a density warm-up (Deep Gradient
    Compression, arXiv 1712.01887) of as many bytes in all, k falling from 256 to 42 in ten of 40 rounds; and one value
    of each 64 in place of 64 of each 4096."""
    naive = replace(tuned(size, horizon, "sparse"), parameters={"k": 64}, outer_rate=1.0, variant="_naive")
    faded = replace(naive, parameters={"k": 64, "beta": 0.6}, outer_rate=3.0, variant="_64")
    density = tuple(max(42, round(256 * (42 / 256) ** (round_ / 10))) for round_ in range(11))
    warm = replace(faded, density=density, variant="_warm")
    return [naive, faded, warm, replace(faded, parameters={"chunk": 64, "k": 1, "beta": 0.6}, variant="_1of64")]


def grid(method: Method) -> list[Method]:
    """Learning rates tried on seed 0: the chosen one and its neighbours."""
    return [replace(method, learning_rate=method.learning_rate * factor) for factor in (2 / 3, 1.0, 3 / 2)]


def methods(size: str, quick: bool) -> list[Method]:
    if size == "long":
        pairs = [(0, "none"), (4, "none"), (4, "sparse"), (4, "demo")]
        return [tuned(size, horizon, codec) for horizon, codec in pairs] + at_a_fiftieth(size, 4)[-1:]
    pairs = [(0, "none"), (1, "none"), *((10, codec) for codec in CODEC_NAMES)]
    if quick:
        return [tuned(size, horizon, codec) for horizon, codec in pairs]
    pairs += [(30, "none"), (30, "int8"), (30, "sparse"), (1, "int8"), (1, "sparse")]
    return [tuned(size, horizon, codec) for horizon, codec in pairs] + at_a_fiftieth(size, 10)


# --- results


def loss_at(row: dict[str, Any], step: int) -> float:
    """Held-out loss at a step, between two evaluations by interpolation."""
    steps, losses = zip(*row["curve"], strict=True)
    return float(np.interp(step, steps, losses))


def ratios(rows: list[dict[str, Any]], base: list[dict[str, Any]], step: int) -> list[float]:
    """Losses at a step over those of `base`, of the seeds that both have."""
    of_seed = {row["seed"]: row for row in base}
    pairs = [(row, of_seed[row["seed"]]) for row in rows if row["seed"] in of_seed]
    return [loss_at(a, step) / loss_at(b, step) for a, b in pairs]


def mean_ratio(rows: list[dict[str, Any]], base: list[dict[str, Any]], step: int) -> float:
    return statistics.mean(ratios(rows, base, step))


def none_of(rows: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]] | None:
    """What a codec's runs are compared with: the same number of local steps, uncompressed."""
    return results.get(f"h{rows[0]['method']['horizon']}_none")


def bytes_sent(row: dict[str, Any], step: int) -> float:
    """By each peer until a step, per parameter; of ddp an fp32 gradient in every step."""
    return float(row["bytes_per_parameter_and_round"] * step / (row["method"]["horizon"] or 1))


def summarize(results: dict[str, list[dict[str, Any]]], size: Size) -> dict[str, Any]:
    """The JSON line."""
    ddp, end = results["ddp"], size.steps
    summary: dict[str, Any] = {"ddp_loss": round(statistics.mean(row["loss"] for row in ddp), 4)}
    for name, rows in results.items():
        if name != "ddp":
            summary[f"{name}_ratio"] = round(mean_ratio(rows, ddp, end), 4)
    for name in [name for name in results if name.endswith("_sparse")]:
        summary[f"{name}_ddp_ratio"] = summary.pop(f"{name}_ratio")
        if none := results.get(name.replace("sparse", "none")):
            summary[f"{name}_ratio"] = round(mean_ratio(results[name], none, end), 4)
    summary["codecs"] = {
        name.split("_", 1)[1]: {
            "ratio": round(mean_ratio(rows, none, end), 4),
            "spread": round(statistics.pstdev(ratios(rows, none, end)), 4),
            "ddp_ratio": round(mean_ratio(rows, ddp, end), 4),
            "bytes_per_param": round(bytes_sent(rows[0], end), 3),
        }
        for name, rows in results.items()
        if rows[0]["method"]["horizon"] == size.horizon and (none := none_of(rows, results))
    }
    return summary | {"tokens": ddp[0]["tokens"], "seeds": min(map(len, results.values()))}


def show(results: dict[str, list[dict[str, Any]]], size: Size, console: Console) -> None:
    quarters = [size.steps * i // 4 for i in (1, 2, 3, 4)]
    columns = ["method", "lr", "beta1", "outer", "loss (seeds)", "loss"]
    table = Table(*columns, *(f"/ddp @{step}" for step in quarters), "/none", "B/param/round")
    for name, rows in results.items():
        m = rows[0]["method"]
        none = none_of(rows, results) if not name.endswith("_none") else None
        table.add_row(
            name,
            f"{m['learning_rate']:g}",
            f"{m['betas'][0]:g}",
            f"{m['outer_rate']:g} / {m['momentum']:g}" if m["horizon"] else "",
            " ".join(f"{row['loss']:.3f}" for row in rows),
            f"{statistics.mean(row['loss'] for row in rows):.4f}",
            *(f"{mean_ratio(rows, results['ddp'], step):.3f}" for step in quarters),
            f"{mean_ratio(rows, none, size.steps):.3f}" if none else "",
            f"{rows[0]['bytes_per_parameter_and_round']:.3f}",
        )
    console.print(table)
    console.print("h10_sparse_ratio in the JSON is sparse / none at H = 10; every other ratio is over ddp.")


#: Of lines, by codec.
STYLES: dict[str, Any] = {
    "none": "-",
    "int8": "--",
    "int4": "-.",
    "sparse": ":",
    "demo": (0, (1, 1, 4, 1)),
    "sign": (0, (5, 1, 1, 1, 1, 1)),
}


def plot(results: dict[str, list[dict[str, Any]]], size: Size, path: Path) -> None:
    """Held-out loss, and its ratio to ddp, over steps: mean over seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, rows in results.items():
        steps = [step for step, _ in rows[0]["curve"]]
        style = STYLES[rows[0]["method"]["codec"]]
        color = {0: "black", 1: "tab:green", 4: "tab:blue", 10: "tab:blue", 30: "tab:red"}[rows[0]["method"]["horizon"]]
        losses = [statistics.mean(loss_at(row, step) for row in rows) for step in steps]
        left.plot(steps[1:], losses[1:], linestyle=style, color=color, label=name)
        if name != "ddp":
            ratios = [mean_ratio(rows, results["ddp"], step) for step in steps]
            right.plot(steps[1:], ratios[1:], linestyle=style, color=color, label=name)
    right.axhline(1.0, color="black", linewidth=0.8)
    right.axhline(1.05, color="grey", linewidth=0.8, linestyle="-.")
    left.set(xlabel="optimizer step (H of them per round)", ylabel="held-out loss, nats per byte")
    right.set(xlabel="optimizer step", ylabel="loss / ddp loss at the same step")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_bytes(results: dict[str, list[dict[str, Any]]], size: Size, path: Path) -> None:
    """Held-out loss over the bytes that a peer has sent per parameter: mean over seeds, their spread at the end."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8))
    for name, rows in results.items():
        if rows[0]["method"]["horizon"] not in (0, size.horizon):
            continue
        steps = [step for step, _ in rows[0]["curve"]][1:]
        if rows[0]["method"].get("density"):
            steps = steps[-1:]  # only the mean of its rounds' bytes is known
        sent = [bytes_sent(rows[0], step) for step in steps]
        losses = [statistics.mean(loss_at(row, step) for row in rows) for step in steps]
        color = None if name != "ddp" else "black"
        (line,) = axes.plot(sent, losses, linewidth=1, color=color, label=f"{name} {losses[-1]:.3f}")
        spread = statistics.pstdev(loss_at(row, size.steps) for row in rows)
        axes.errorbar(sent[-1], losses[-1], spread, marker="o", markersize=4, capsize=3, color=line.get_color())
    axes.set_ylim(top=3.2)
    axes.set(
        xscale="log", xlabel="bytes sent per parameter by each peer, so far", ylabel="held-out loss, nats per byte"
    )
    axes.set_title(f"{size.steps} optimizer steps, the same tokens for all", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, one seed, 35 s on an idle core")
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="small", help="small and long: 0.12M parameters, demo: 0.82M"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--methods", help="only these, for example ddp,h10_none")
    parser.add_argument("--tune", action="store_true", help="first try neighbouring learning rates on seed 0")
    parser.add_argument("--cached", action="store_true", help="train nothing: show what is finished")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=arguments.json, width=150)
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    size_name = "tiny" if arguments.quick else arguments.size
    size = SIZES[size_name]
    chosen = methods(size_name, arguments.quick)
    if arguments.methods:
        chosen = [m for m in chosen if m.name in arguments.methods.split(",")]
    runs = Runs(None if arguments.quick else arguments.out / "convergence.jsonl", console)
    if arguments.tune:
        for method in (neighbour for m in chosen for neighbour in grid(m)):
            runs.get(size, method, 0)
    seeds = range(1 if arguments.quick else arguments.seeds)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:  # seeds outermost: a sweep that is cut short has every method
        for method in chosen:
            if not arguments.cached or runs.has(size, method, seed):
                results.setdefault(method.name, []).append(runs.get(size, method, seed))
    if "ddp" not in results:
        parser.error("nothing to compare with: ddp is not among the methods, or not finished (leave out --cached)")
    show(results, size, console)
    summary = summarize(results, size)
    if not arguments.quick:
        name = f"convergence-{size_name}"
        plot(results, size, arguments.out / f"{name}.svg")
        docs = Path(__file__).parent.parent / "docs" / "convergence-bytes.svg"
        plot_bytes(results, size, docs if size_name == "small" else arguments.out / f"{name}-bytes.svg")
        (arguments.out / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
