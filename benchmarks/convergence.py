"""What averaging every H steps costs: held-out loss of 4 workers beside synchronous AdamW on the same tokens.

Everything that touches a number is Potluck's own code: `LocalTrainer` trains, each worker's delta goes through its
codec's `encode` and `decode` with its own residual, `aggregate` weighs and clips, `OuterStep` applies. Only the network
is left out. `ddp` is one process that takes the four workers' batches as one, with the same number of optimizer steps.
Every method sees exactly the same samples (those that the run assigns to four peers in rounds of ten steps), starts
from the same weights and has its learning rate tuned on seed 0.

    python benchmarks/convergence.py [--quick] [--size demo] [--seeds 3] [--out benchmarks/results] [--tune] [--json]

Finished runs are kept in `convergence.jsonl` under `--out` and not repeated (`--quick` keeps nothing). The last line
is JSON. Ratios are held-out losses at the end over that of ddp, but `h10_sparse_ratio` is sparse over none at H = 10.
Goals: h1_none_ratio <= 1.01, h10_none_ratio and h10_int8_ratio <= 1.05, h10_sparse_ratio <= 1.04.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from potluck.net.host import PeerId
from potluck.swarm.aggregate import Contribution, aggregate, token_weights
from potluck.swarm.codecs import Codec, make_codec
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
EDITION = 1


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


SIZES = {
    # --quick: 0.12M parameters.
    "tiny": Size(hidden=64, layers=2, heads=4, batch=4, length=64, steps=240, eval_every=40, eval_windows=128),
    # Tuning: 0.17M parameters.
    "small": Size(hidden=64, layers=3, heads=4, batch=8, length=128, steps=400, eval_every=20, eval_windows=128),
    # The model of the `demo` preset: 0.82M parameters.
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

    @property
    def name(self) -> str:
        return f"h{self.horizon}_{self.codec}" if self.horizon else "ddp"

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
    return corpus.batch(
        assigned_offsets(run_seed, MODULE, peer, round_, within * size.batch, size.batch, corpus)
    )


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
    """Rounds as in `design/rounds.md`, without the network. Returns bytes per parameter and round of a contribution."""
    trainers = {peer: make_trainer(size, method, seed) for peer in WORKERS}
    layout = trainers[WORKERS[0]].layout
    codec: Codec = make_codec(method.codec, method.parameters)
    residuals: dict[PeerId, Flat | None] = {p: layout.zeros() if codec.has_residual else None for p in WORKERS}
    outer = OuterStep(method.outer_rate, method.momentum, True, method.momentum_warmup_rounds)
    theta = layout.gather(trainers[WORKERS[0]].module)
    velocity: Flat | None = layout.zeros() if method.momentum else None
    step, sent = 0, 0
    curve.add(0, trainers[WORKERS[0]])
    for round_, horizon in enumerate(method.rounds(size.steps)):
        contributions: dict[PeerId, Contribution] = {}
        tokens: dict[PeerId, int] = {}
        for peer, trainer in trainers.items():
            trainer.load(theta)
            batches = (samples(size, corpus, seed, peer, step + i) for i in range(horizon))
            tokens[peer] = trainer.train(batches, horizon, step).tokens
            blob = codec.encode(trainer.delta(theta), layout, residuals[peer])
            contributions[peer] = codec.decode(blob, layout)
            sent = len(blob)
        update = aggregate(contributions, token_weights(tokens), layout, clip=method.clip)
        theta, velocity = outer.apply(theta, velocity, update, round_)
        step += horizon
        trainers[WORKERS[0]].load(theta)
        curve.add(step, trainers[WORKERS[0]])
    return sent / layout.size


def run(size: Size, method: Method, seed: int, corpus: Corpus) -> dict[str, Any]:
    """One finished run as a JSON-able row."""
    started = time.monotonic()
    curve = Curve(size, corpus.held_out_batch(size.eval_windows))
    train = train_by_rounds if method.horizon else train_together
    bytes_per_parameter = train(size, method, seed, corpus, curve)
    return {
        "key": key_of(size, method, seed),
        "method": asdict(method),
        "size": asdict(size),
        "seed": seed,
        "loss": curve.points[-1][1],
        "curve": [(step, round(loss, 5)) for step, loss in curve.points],
        "tokens": size.steps * size.batch * size.length * len(WORKERS),
        "bytes_per_parameter_and_round": bytes_per_parameter,
        "seconds": round(time.monotonic() - started, 1),
    }


def key_of(size: Size, method: Method, seed: int) -> str:
    text = json.dumps([EDITION, asdict(size), asdict(method), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Runs:
    """Runs by key; finished ones are appended to a file and found there the next time."""

    def __init__(self, path: Path | None, console: Console) -> None:
        self._path, self._console, self._corpora = path, console, dict[int, Corpus]()
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self._rows = {row["key"]: row for row in rows}

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
