"""Local training: the inner optimizer's steps between two rounds, on one device, in one thread.

The caller owns the thread and the stop flag. Out of memory halves the micro-batch and repeats the step instead of
dying. Losses and deltas are data for others: nothing here needs to be bit-identical across machines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from potluck.errors import HardwareError, ManifestError
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.model import next_token_loss


class TrainingSpec(Protocol):
    """What this file reads of a manifest's `training` table."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_clip(self) -> float: ...
    @property
    def precision(self) -> str: ...


@dataclass(frozen=True)
class LocalResult:
    """What one round of local training did. Losses are training losses in nats per token (nan if no step)."""

    steps: int
    tokens: int
    loss_before: float
    loss_after: float
    seconds: float


def learning_rate_at(spec: TrainingSpec, step: int) -> float:
    """Learning rate of global step `step` (from 0): linear warm-up, then constant or cosine to a tenth."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps > 0 else 1.0
    if spec.schedule == "cosine":
        done = min(1.0, step / max(1, spec.total_steps))
        return spec.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * done))
    return spec.learning_rate * warm


def make_optimizer(spec: TrainingSpec, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' AdamW8bit. Norms and biases (1-D) get no weight decay."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(spec.betas[0], spec.betas[1]))
    if spec.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise HardwareError(
                "training.optimizer adamw8bit needs the package bitsandbytes: pip install 'potluck[adam8bit]'"
            ) from None
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            groups, lr=spec.learning_rate, betas=tuple(spec.betas)
        )
        return optimizer
    raise ManifestError(f"training.optimizer: unknown optimizer {spec.optimizer!r}; use adamw or adamw8bit")


def autocast(spec: TrainingSpec, device: torch.device) -> AbstractContextManager[object]:
    """The run's precision. bf16 pays on CUDA only; on the CPU it is emulated or slower for small models."""
    use_bf16 = spec.precision == "bf16-auto" and device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if use_bf16 else nullcontext()


def take_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float, learning_rate: float
) -> None:
    """Clip the norm of all gradients together to `clip` (0: not at all), and step."""
    if clip > 0:
        nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


class LocalTrainer:
    """One module's replica on this machine's device, with its inner optimizer."""

    def __init__(
        self,
        module: nn.Module,
        spec: TrainingSpec,
        device: torch.device,
        loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = next_token_loss,
        micro_batch: int | None = None,
    ) -> None:
        self.layout = Layout.of_module(module)
        self.module = module.to(device).train()
        self.device = device
        self.spec = spec
        self.optimizer = make_optimizer(spec, self.module)
        self.micro_batch = micro_batch or spec.batch_size
        self.halvings = 0
        self._loss = loss
        #: Seconds of the last steps, by which a round's first one is judged.
        self._step_seconds = 0.0

    def forget(self) -> None:
        """Drop the inner optimizer's moments: after values that are not finite they would poison every later step."""
        self.optimizer.state.clear()

    def load(self, theta: Flat) -> None:
        """Start from the round's base parameters. The inner optimizer's moments stay (as in DiLoCo)."""
        self.layout.scatter(theta, self.module)

    def train(
        self,
        batches: Iterator[torch.Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = lambda step_seconds: True,
    ) -> LocalResult:
        """At most `max_steps` optimizer steps; `may_start(seconds a step takes)` is asked before each one."""
        started, losses, tokens, took = time.monotonic(), [], 0, self._step_seconds
        for step in range(max_steps):
            if not may_start(took):
                self._step_seconds = 0.5 * took  # one slow step must not keep every later round from starting
                break
            began = time.monotonic()
            batch = next(batches)
            losses.append(self._step(batch, first_step + step))
            tokens += batch.shape[0] * (batch.shape[1] - 1)
            took = self._step_seconds = max(time.monotonic() - began, 0.5 * took)
        nan = float("nan")
        return LocalResult(
            steps=len(losses),
            tokens=tokens,
            loss_before=losses[0] if losses else nan,
            loss_after=losses[-1] if losses else nan,
            seconds=time.monotonic() - started,
        )

    def delta(self, theta: Flat) -> Flat:
        """The pseudo-gradient: theta minus the parameters now, shape (layout.size,)."""
        trained = self.layout.gather(self.module)
        delta: Flat = theta - trained
        return delta

    @torch.no_grad()
    def evaluate(self, tokens: torch.Tensor) -> float:
        """Mean loss in nats per token over the given windows."""
        self.module.eval()
        try:
            return self._fitting(lambda: self._evaluate(tokens))
        finally:
            self.module.train()

    def _evaluate(self, tokens: torch.Tensor) -> float:
        parts = torch.split(tokens, self.micro_batch)
        return sum(float(self._forward(part)) * part.shape[0] for part in parts) / tokens.shape[0]

    def _fitting(self, work: Callable[[], float]) -> float:
        """Do `work`; out of memory halves the micro-batch and does it again."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.micro_batch == 1:
                    raise HardwareError(
                        "out of memory with a micro-batch of one sequence: this model does not fit this device "
                        "(try --device cpu, or a run with a smaller model)"
                    ) from None
            self._free()
            self.micro_batch = max(1, self.micro_batch // 2)
            self.halvings += 1

    def _step(self, batch: torch.Tensor, step: int) -> float:
        return self._fitting(lambda: self._accumulate(batch, step))

    def _accumulate(self, batch: torch.Tensor, step: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in torch.split(batch, self.micro_batch):
            share = part.shape[0] / batch.shape[0]
            loss = self._forward(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        take_step(self.optimizer, self.module.parameters(), self.spec.gradient_clip, learning_rate_at(self.spec, step))
        return total

    def _forward(self, part: torch.Tensor) -> torch.Tensor:
        with autocast(self.spec, self.device):
            return self._loss(self.module, part.to(self.device, non_blocking=True))

    def _free(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text
