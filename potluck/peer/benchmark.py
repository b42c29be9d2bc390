"""How fast this machine trains: a standard model for some seconds, once per machine, torch, device and threads.

Forward, backward and AdamW's step of a 12-million-parameter Llama on random tokens, with the code that trains in a run.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch

from potluck.dht.manifest import ModelPart, TrainingPart
from potluck.peer.hardware import Machine, choose_device
from potluck.peer.home import write_atomically
from potluck.swarm.local import LocalTrainer
from potluck.swarm.model import build_module

#: Of measuring, after a first step that warms up; what loading takes comes on top.
SECONDS: Final = 10.0
SEQUENCE_LENGTH: Final = 256
#: Changes whenever figures of before cannot be compared with those of after.
_VERSION: Final = 1
_FILE: Final = "benchmark.json"
_VOCABULARY: Final = 4096
_MANY: Final = 1_000_000
_MODEL: Final = ModelPart(
    family="llama",
    config={
        "vocab_size": _VOCABULARY,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 1024,
        "max_position_embeddings": SEQUENCE_LENGTH,
        "tie_word_embeddings": True,
    },
)
#: Sequences per step: a GPU needs many to be busy.
_BATCH: Final = {"cpu": 2, "mps": 8, "cuda": 32}


@dataclass(frozen=True)
class Speed:
    """Of training the standard model, which has so many `parameters`. `measured_at` in UTC seconds."""

    tokens_per_second: float
    parameters: int
    device: str
    measured_at: float


class SpeedCache:
    """The measurements of a home, by what they hold for: homes travel between machines."""

    def __init__(self, home: Path) -> None:
        self._path = home / _FILE

    def get(self, key: str) -> Speed | None:
        return self._all().get(key)

    def put(self, key: str, speed: Speed) -> None:
        """Raises UserError where it cannot be written."""
        write_atomically(self._path, msgspec.json.encode({**self._all(), key: speed}))

    def _all(self) -> dict[str, Speed]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Speed])
        except (OSError, msgspec.MsgspecError):
            return {}


def key_of(machine: Machine, device: str) -> str:
    """What a measurement holds for. `device`: as `choose_device` names it."""
    name = next((one.name for one in machine.accelerators if one.device.startswith(device)), machine.cpu)
    cores = f"{machine.threads} of {machine.cores} threads"
    return f"{_VERSION} {platform.node()} {name} {device} {cores} torch {machine.torch}"


def measure(device: str, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> Speed:
    """Blocks for about `seconds`. Raises HardwareError if the device is not there, or has no memory left."""
    where = choose_device(device)
    training = TrainingPart(learning_rate=1e-4, batch_size=_BATCH[where.type])
    module = build_module(_MODEL)
    parameters = sum(p.numel() for p in module.parameters())
    trainer = LocalTrainer(module, training, where)
    batches = _random_batches(training.batch_size)
    first = trainer.train(batches, 1, 0)
    until = clock() + seconds
    done = trainer.train(batches, _MANY, 1, lambda step_seconds: clock() + step_seconds < until)
    if not done.steps:  # one step takes longer than that
        done = first
    return Speed(done.tokens / done.seconds, parameters, str(where), time.time())


def _random_batches(size: int) -> Iterator[torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(_VOCABULARY, (size, SEQUENCE_LENGTH + 1), generator=dice)
