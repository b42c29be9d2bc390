"""The device a worker trains on, and how much fits on it."""

from __future__ import annotations

import math
import re

import psutil
import torch
from torch import nn

from potluck.errors import HardwareError

DEVICES = ("auto", "cuda", "mps", "cpu")

#: Float32 values of activations that a transformer layer keeps per token and hidden unit (Korthikanti et al., 2022,
#: eq. 2, without attention scores: 34 bytes in 16 bit, so 17 values).
_VALUES_PER_HIDDEN = 17
#: Parameter and gradient in float32, and Adam's two moments in float32 or 8 bit.
_BYTES_PER_PARAMETER = {"adamw": 16, "adamw8bit": 10}
#: Share of the free memory that activations may take.
_MEMORY_SHARE = 0.5


def choose_device(wanted: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises HardwareError if a device was demanded in vain."""
    if wanted not in DEVICES and not re.fullmatch(r"cuda:\d{1,3}", wanted):
        raise HardwareError(f"--device {wanted}: use one of {', '.join(DEVICES)}")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted.startswith("cuda") and not has_cuda:
        raise HardwareError(f"--device {wanted}: no CUDA GPU was found; use --device auto, or check the driver")
    if wanted.startswith("cuda:") and int(wanted[5:]) >= torch.cuda.device_count():
        raise HardwareError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    if wanted == "mps" and not has_mps:
        raise HardwareError("--device mps: this is no Apple GPU; use --device auto")
    if wanted == "auto":
        wanted = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    return torch.device(wanted)


def check_fits(parameters: int, optimizer: str, contributions: int, device: torch.device) -> None:
    """Raises HardwareError if parameters, gradients, optimizer and the exchange do not fit, before anything is built.

    `contributions`: decoded dense contributions that are held while they are aggregated.
    """
    on_device = parameters * _BYTES_PER_PARAMETER[optimizer]
    # The round's base parameters and momentum, those of the next, and the contributions lie in main memory.
    on_host = 4 * parameters * (4 + contributions)
    demands = [(device, on_device)] if device.type != "cpu" else []
    demands.append((torch.device("cpu"), on_host if demands else on_host + on_device))
    for where, needed in demands:
        free = free_memory(where)
        if needed > free:
            raise HardwareError(
                f"this run's model of {parameters:,} parameters needs about {needed / 2**30:.1f} GiB on {where}, "
                f"{free / 2**30:.1f} GiB are free: close other programs, use another --device, or join a smaller run"
            )


def fit_micro_batch(
    batch_size: int, sequence_length: int, module: nn.Module, device: torch.device, optimizer: str = "adamw"
) -> int:
    """Sequences per micro-batch whose activations are estimated to fit; running out of memory halves it later.

    Raises HardwareError if not even one sequence fits beside the parameters.
    """
    config = module.config.get_text_config()  # type: ignore[operator, union-attr]  # transformers models carry it
    parameters = sum(p.numel() for p in module.parameters())
    layers = int(getattr(config, "num_hidden_layers", None) or 1)
    # An unusual config without a hidden size: as if the parameters were square matrices, twelve in a layer.
    hidden = int(getattr(config, "hidden_size", None) or math.isqrt(parameters // (12 * layers)) + 1)
    per_sequence = 4 * sequence_length * (hidden * layers * _VALUES_PER_HIDDEN + 3 * int(config.vocab_size))
    left = free_memory(device) - parameters * _BYTES_PER_PARAMETER[optimizer]
    if left < per_sequence:
        raise HardwareError(
            f"one sequence of {sequence_length} tokens needs about {per_sequence / 2**30:.1f} GiB on {device} beside "
            f"the model, {max(0, left) / 2**30:.1f} GiB are free: close other programs, or join a smaller run"
        )
    return max(1, min(batch_size, int(_MEMORY_SHARE * left / per_sequence)))


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
