"""The index space of a module: its tensors in name order, laid end to end in one flat float32 vector.

Everything that peers exchange (states, contributions, fragments) is a statement about this vector, so that two
peers agree on what index 12,345 means without saying so. Equal layouts have equal `digest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
import torch

#: A flat float32 vector over a layout, shape (layout.size,).
Flat = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def range(self) -> slice:
        return slice(self.offset, self.offset + self.size)


def slabs(begin: int, end: int, width: int) -> Iterator[slice]:
    """`begin` to `end` in parts of `width`, of which the last may be shorter."""
    for start in range(begin, end, width):
        yield slice(start, min(end, start + width))


@dataclass(frozen=True)
class Layout:
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Layout:
        """`tensors`: (name, shape) pairs in any order. Raises ValueError for one without values."""
        slots, offset = [], 0
        for name, shape in sorted(tensors):
            size = int(np.prod(shape, dtype=np.int64))
            if size == 0:
                raise ValueError(f"the tensor {name} of shape {tuple(shape)} has no values")
            slots.append(Slot(name, tuple(shape), offset, size))
            offset += size
        return cls(tuple(slots))

    @classmethod
    def of_module(cls, module: torch.nn.Module) -> Layout:
        """Trainable parameters only; tied ones count once."""
        return cls.of((n, tuple(p.shape)) for n, p in module.named_parameters() if p.requires_grad)

    @cached_property
    def size(self) -> int:
        """Number of float32 values in all tensors."""
        return sum(slot.size for slot in self.slots)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this layout."""
        listing = msgspec.msgpack.encode([(slot.name, slot.shape) for slot in self.slots])
        return hashlib.sha256(b"potluck.layout.1" + listing).digest()[:16]

    def cut(self, start: int, stop: int) -> Layout:
        """The layout of values `start` to `stop`, from 0 on. A tensor that is cut is flat, and named by what is left of
        it: "name[from:to]"."""
        slots = []
        for slot in self.slots:
            begin, end = max(start, slot.offset), min(stop, slot.offset + slot.size)
            if begin < end:
                name, shape = slot.name, slot.shape
                if end - begin < slot.size:
                    name, shape = f"{name}[{begin - slot.offset}:{end - slot.offset}]", (end - begin,)
                slots.append(Slot(name, shape, begin - start, end - begin))
        return Layout(tuple(slots))

    def empty(self) -> Flat:
        return np.empty(self.size, dtype=np.float32)

    def zeros(self) -> Flat:
        flat = self.empty()
        flat.fill(0.0)  # np.zeros would take small pages, one fault for each when it is written to
        return flat

    def tensors(self, flat: Flat) -> dict[str, torch.Tensor]:
        """Views into a flat vector, by name."""
        return {slot.name: torch.from_numpy(flat[slot.range].reshape(slot.shape)) for slot in self.slots}

    def gather(self, module: torch.nn.Module) -> Flat:
        """A module's parameters as one flat CPU vector (a copy)."""
        return self.flatten(dict(module.named_parameters()))

    def flatten(self, tensors: Mapping[str, torch.Tensor]) -> Flat:
        """Tensors on any device and of any dtype, by name, as the flat float32 CPU vector that codecs take (a copy).
        Raises KeyError for a name that is missing, ValueError for another shape."""
        flat = self.empty()
        out = torch.from_numpy(flat)
        for slot in self.slots:
            tensor = tensors[slot.name].detach()
            if tuple(tensor.shape) != slot.shape:
                raise ValueError(f"{slot.name} has shape {tuple(tensor.shape)}, expected {slot.shape}")
            out[slot.range].copy_(tensor.reshape(-1))
        return flat

    @torch.no_grad()
    def scatter(self, flat: Flat, module: torch.nn.Module) -> None:
        """Write the flat vector into a module's parameters, on whatever device and dtype they are."""
        parameters = dict(module.named_parameters())
        source = torch.from_numpy(flat)
        for slot in self.slots:
            parameter = parameters[slot.name]
            parameter.copy_(source[slot.range].view(slot.shape))
