"""The machine, the device a worker trains on, and how much fits on it."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from potluck.errors import HardwareError
from potluck.peer.cgroups import allowed

DEVICES = ("auto", "cuda", "mps", "cpu")

#: Float32 values of activations that a transformer layer keeps per token and hidden unit (Korthikanti et al., 2022,
#: eq. 2, without attention scores: 34 bytes in 16 bit, so 17 values).
_VALUES_PER_HIDDEN = 17
#: Parameter and gradient in float32, and Adam's two moments in float32 or 8 bit.
_BYTES_PER_PARAMETER = {"adamw": 16, "adamw8bit": 10}
#: Share of the free memory that activations may take.
_MEMORY_SHARE = 0.5
_DRIVER_SECONDS = 10.0


@dataclass(frozen=True)
class Accelerator:
    """A GPU that torch can use. Apple's share the main memory."""

    device: str
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """`nvidia_driver`: its version, with or without a torch that can use it; `torch_cuda`: what torch was built for.
    None: there is none."""

    system: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    free_bytes: int
    accelerators: tuple[Accelerator, ...]
    nvidia_driver: str | None
    torch: str
    torch_cuda: str | None


def detect() -> Machine:
    """Takes seconds where there is a GPU. `threads`: those that torch trains with. In a container memory and cores are
    what it may use."""
    memory, own = psutil.virtual_memory(), allowed()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(),
        cores=min(os.cpu_count() or 1, math.ceil(own.cores or 2**16)),
        threads=torch.get_num_threads(),
        memory_bytes=min(int(memory.total), own.memory_bytes or 2**63),
        free_bytes=free_memory(torch.device("cpu")),
        accelerators=tuple(_accelerators()),
        nvidia_driver=_nvidia_driver(),
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
    )


def _cpu() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def _accelerators() -> list[Accelerator]:
    found = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            with suppress(RuntimeError):  # one that fell off its bus, or that another process has for itself
                free, total = torch.cuda.mem_get_info(number)
                found.append(Accelerator(f"cuda:{number}", torch.cuda.get_device_name(number), total, free))
    if torch.backends.mps.is_available():
        memory = psutil.virtual_memory()
        found.append(Accelerator("mps", "Apple GPU", int(memory.total), int(memory.available)))
    return found


def _nvidia_driver() -> str | None:
    """Its version."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = done.stdout.strip().splitlines()
    return version[0].strip() if done.returncode == 0 and version else None


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


def cap_gpu_memory(device: torch.device, most: int) -> None:
    """This process gets no more of a CUDA GPU: beyond it, it runs out of memory. Does nothing for other devices."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def demands(parameters: int, optimizer: str, device: torch.device) -> list[tuple[torch.device, int]]:
    """Bytes for parameters, gradients, optimizer and the exchange, and on which device."""
    on_device = parameters * _BYTES_PER_PARAMETER[optimizer]
    # The round's base parameters and momentum, those of the next, the codec's residual and the peer's own contribution
    # lie in main memory. Those of others lie on disk, and are looked at part by part.
    on_host, host = 4 * parameters * 6, torch.device("cpu")
    return [(host, on_host + on_device)] if device.type == "cpu" else [(device, on_device), (host, on_host)]


def check_fits(parameters: int, optimizer: str, device: torch.device) -> None:
    """Raises HardwareError if what a replica `demands` is not free, before anything is built."""
    for where, needed in demands(parameters, optimizer, device):
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
        free, total = torch.cuda.mem_get_info(device)
        capped = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
        return max(0, min(free, int(capped)))
    free_here = allowed().free_bytes
    available = int(psutil.virtual_memory().available)
    return available if free_here is None else min(available, free_here)


def default_threads() -> int | None:
    """Those to train with where nobody said: None for torch's own choice, fewer where a container has less of the CPU
    than that."""
    cores = allowed().cores
    return max(1, int(cores)) if cores is not None and cores < torch.get_num_threads() else None
