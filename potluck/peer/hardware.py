"""The device a worker trains on, and how much fits on it."""

from __future__ import annotations

import psutil
import torch
from torch import nn

from potluck.errors import HardwareError

DEVICES = ("auto", "cuda", "mps", "cpu")

#: Float32 values of activations that a transformer layer keeps per token and hidden unit (Korthikanti et al., 2022,
#: eq. 2, without attention scores: 34 bytes in 16 bit, so 17 values).
_VALUES_PER_HIDDEN = 17
#: Share of the free memory that activations may take.
_MEMORY_SHARE = 0.5


def choose_device(wanted: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises HardwareError if a device was demanded in vain."""
    if wanted not in DEVICES and not wanted.startswith("cuda:"):
        raise HardwareError(f"--device {wanted}: use one of {', '.join(DEVICES)}")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted.startswith("cuda") and not has_cuda:
        raise HardwareError(f"--device {wanted}: no CUDA GPU was found; use --device auto, or check the driver")
    if wanted.startswith("cuda:") and int(wanted[5:] or 0) >= torch.cuda.device_count():
        raise HardwareError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    if wanted == "mps" and not has_mps:
        raise HardwareError("--device mps: this is no Apple GPU; use --device auto")
    if wanted == "auto":
        wanted = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    return torch.device(wanted)


def fit_micro_batch(batch_size: int, sequence_length: int, module: nn.Module, device: torch.device) -> int:
    """Sequences per micro-batch whose activations are estimated to fit; running out of memory halves it later.

    Raises HardwareError if the parameters, gradients and optimizer states alone do not fit.
    """
    config = module.config  # transformers models carry it
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    vocabulary = int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    per_sequence = 4 * sequence_length * (hidden * layers * _VALUES_PER_HIDDEN + 3 * vocabulary)
    parameters = sum(p.numel() for p in module.parameters())
    needed = 16 * parameters + per_sequence  # parameter, gradient and two Adam moments in float32
    if device.type == "cpu":
        needed += 12 * parameters  # base parameters, the previous state, a contribution
    free = free_memory(device)
    if needed > free:
        raise HardwareError(
            f"this run's model needs about {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free: "
            "close other programs, use --device cpu, or join a run with a smaller model"
        )
    fits = int(_MEMORY_SHARE * (free - 16 * parameters) / per_sequence)
    return max(1, min(batch_size, fits))


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
