"""What is trained in a simulation: a quadratic whose gradients are known, or a real, tiny language model.

Both keep the virtual time that their steps take; the peer's machine pays it (`Machine.cost`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from potluck.dht.manifest import DataPart, ModelPart, TrainingPart
from potluck.incentives.evaluate import Evaluator, ModelEvaluator
from potluck.incentives.judge import Promise
from potluck.net.host import PeerId
from potluck.sim.plan import Plan
from potluck.swarm.data import Corpus, assigned_offsets, data_seed, load_corpus
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult, LocalTrainer
from potluck.swarm.model import build_module
from potluck.swarm.phases import Round
from potluck.swarm.rounds import Trainer

if TYPE_CHECKING:
    from potluck.sim.peer import SimPeer

MODULE = "stage.0"
#: Of the way to the minimum that one step of the quadratic goes.
_RATE = 0.02
_TOKENS = 1000
#: Tokens per sample of the real model.
_LENGTH = 32


class Pace:
    """Virtual seconds of local steps on one machine, and who asks for them."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds, self.slowness, self._owed = step_seconds, 1.0, 0.0

    def steps_until(self, most: int, may_start: Callable[[float], bool]) -> int:
        """How many steps fit; the machine owes their time then. `may_start` knows only the time now."""
        took, steps = self.step_seconds * self.slowness, 0
        while steps < most and may_start((steps + 1) * took):
            steps += 1
        self._owed += steps * took
        return steps

    def paid(self) -> float:
        owed, self._owed = self._owed, 0.0
        return owed


class Quadratic:
    """Minimizes |theta - target|^2 / 2 with gradients whose noise is `noise` times as long as the target.

    Implements `swarm.rounds.Trainer`. The noise follows from (seed, peer, round): a replayed run sees the same.
    """

    def __init__(self, parameters: int, noise: float, seed: int, name: str, pace: Pace) -> None:
        rows = max(1, math.isqrt(parameters))
        self.layout = Layout.of([("weight", (rows, -(-parameters // rows)))])
        self.target = np.random.default_rng(seed).standard_normal(self.layout.size).astype(np.float32)
        self.theta: Flat = self.layout.zeros()
        self.pace, self._noise, self._name = pace, noise, f"{seed} {name}"
        #: From this step on nothing is learned any more.
        self.last_step = 2**62

    def load(self, theta: Flat) -> None:
        self.theta = theta.copy()

    def train(
        self,
        batches: Iterator[torch.Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = lambda seconds: True,
    ) -> LocalResult:
        before = self.evaluate(torch.empty(0))
        steps = self.pace.steps_until(max_steps, may_start)
        dice = np.random.default_rng(zlib.crc32(f"{self._name} {first_step}".encode()))
        way = np.float32(1 - (1 - _RATE) ** steps if first_step < self.last_step else 0.0)
        noise = dice.standard_normal(self.layout.size).astype(np.float32) * np.float32(self._noise)
        self.theta += way * (self.target + noise - self.theta)
        return LocalResult(steps, _TOKENS * steps, before, self.evaluate(torch.empty(0)), 0.0)

    def forget(self) -> None:
        pass

    def delta(self, theta: Flat) -> Flat:
        delta: Flat = theta - self.theta
        return delta

    def evaluate(self, tokens: torch.Tensor) -> float:
        return float(0.5 * np.mean(np.square(self.theta - self.target), dtype=np.float64))


class QuadraticEvaluator:
    """The quadratic's loss and gradient, for validators. There are no data."""

    def __init__(self, quadratic: Quadratic) -> None:
        self.layout, self._target = quadratic.layout, quadratic.target

    def loss(self, theta: Flat, tokens: torch.Tensor) -> float:
        return float(0.5 * np.mean(np.square(theta - self._target), dtype=np.float64))

    def gradient(self, theta: Flat, tokens: torch.Tensor) -> tuple[float, Flat]:
        return self.loss(theta, tokens), (theta - self._target) / np.float32(theta.size)


class PacedTrainer(LocalTrainer):
    """Real local training in virtual time."""

    pace: Pace

    def train(
        self,
        batches: Iterator[torch.Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = lambda seconds: True,
    ) -> LocalResult:
        return super().train(batches, self.pace.steps_until(max_steps, may_start), first_step)


class Model:
    """What is trained, shared by all peers of a simulation."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.held_out = torch.zeros(1, 2, dtype=torch.int64)
        self.step_tokens = _TOKENS
        if plan.model == "quadratic":
            first = self._quadratic("theta_0", None)
            self.layout, self.theta_0 = first.layout, first.theta
            nothing = np.zeros(4, dtype=np.uint8)
            self.corpus = Corpus(nothing, nothing, sequence_length=1)
            return
        sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
        self._spec = ModelPart(family="llama", config=sizes | {"tie_word_embeddings": True}, seed=plan.seed % 2**31)
        self._training = TrainingPart(learning_rate=3e-3, batch_size=4, betas=(0.5, 0.95), precision="float32")
        self.step_tokens = self._training.batch_size * _LENGTH
        torch.set_num_threads(1)
        module = build_module(self._spec)
        self.layout = Layout.of_module(module)
        self.theta_0 = self.layout.gather(module)
        self.corpus = _corpus()
        self.held_out = self.corpus.held_out_batch(8)

    def _quadratic(self, name: str, peer: SimPeer | None) -> Quadratic:
        pace = peer.pace if peer else Pace(1.0)
        return Quadratic(self._plan.parameters, self._plan.noise, self._plan.seed % 2**32, name, pace)

    def trainer(self, peer: SimPeer) -> Trainer:
        if self._plan.model == "quadratic":
            quadratic = self._quadratic(str(peer.number), peer)
            if self._plan.train_rounds is not None:
                quadratic.last_step = self._plan.train_rounds * self._plan.steps
            return quadratic
        trainer = PacedTrainer(build_module(self._spec), self._training, torch.device("cpu"))
        trainer.pace = peer.pace
        return trainer

    def batches(self, peer: PeerId, round_: Round, state: str) -> Iterator[torch.Tensor]:
        if self._plan.model == "quadratic":
            return
        size, first = self._training.batch_size, 0
        while True:
            offsets = assigned_offsets(data_seed(b"sim", state), MODULE, peer, round_, first, size, self.corpus)
            yield self.corpus.batch(offsets)
            first += size

    def evaluator(self) -> Evaluator:
        if self._plan.model == "quadratic":
            return QuadraticEvaluator(self._quadratic("evaluator", None))
        return ModelEvaluator(build_module(self._spec), torch.device("cpu"))

    def assigned(self, peer: PeerId, round_: Round, promise: Promise) -> np.ndarray | None:
        """What the run assigned to a peer, as far as it says that it trained (`incentives.judge.Assignment`)."""
        if self._plan.model == "quadratic":
            return None
        count = min(promise.steps, self._plan.steps) * self._training.batch_size
        return assigned_offsets(data_seed(b"sim", promise.digest), MODULE, peer, round_, 0, count, self.corpus)


@lru_cache(maxsize=1)
def _corpus() -> Corpus:
    return load_corpus(DataPart(sequence_length=_LENGTH))
