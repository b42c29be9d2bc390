"""Stages: a causal LM's layers cut into contiguous runs, `stage.0` to `stage.S-1`, each a module of its own.

A stage is the whole transformers model whose other layers are only stand-ins (`_Elsewhere`), and whose embedding or
head, where another stage has it, is `_Absent`. So layer indices, names, masks, rotary tables and per-layer settings are
the family's own, and no family needs code here. Built on the meta device and cut there: only the slice is ever in
memory. Legend: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from potluck.errors import ManifestError, StateError
from potluck.swarm.layout import Layout
from potluck.swarm.model import ModelSpec, count_parameters, transformers_config


def stage_names(stages: int) -> tuple[str, ...]:
    return tuple(f"stage.{k}" for k in range(stages))


def layer_ranges(layers: int, stages: int) -> tuple[range, ...]:
    """Contiguous and balanced to one layer. What is left over goes to the middle stages, then to the first: the first
    also has the embedding, and the last the head and the loss, which cost more."""
    if not 1 <= stages <= layers:
        raise ManifestError(f"model.stages is {stages}, allowed are 1 to the number of layers, which is {layers}")
    base, extra = divmod(layers, stages)
    favoured = [*range(1, stages - 1), 0][:extra]
    bounds = accumulate((base + (k in favoured) for k in range(stages)), initial=0)
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def hidden_size(spec: ModelSpec) -> int:
    """D of the activations between stages."""
    return int(transformers_config(spec).get_text_config().hidden_size)


def stage_parameters(spec: ModelSpec) -> tuple[int, ...]:
    """How many each stage has (4 bytes each), nothing allocated. Raises ManifestError as `build_stage` does."""
    return tuple(sum(shape.numel() for shape in shapes.values()) for shapes in _Cut(spec).shapes)


def stage_work(spec: ModelSpec) -> tuple[float, ...]:
    """Compute per token of each stage, relative to the mean: by its parameters, lookups left out."""
    cut = _Cut(spec)
    sizes = [sum(s.numel() for name, s in shapes.items() if name not in cut.lookups) for shapes in cut.shapes]
    return tuple(size * len(sizes) / max(1, sum(sizes)) for size in sizes)


def stage_layout(spec: ModelSpec, module: str) -> Layout:
    """Of a stage that is not built here. Raises ManifestError as `build_stage` does."""
    shapes = _Cut(spec).shapes[stage_names(spec.stages).index(module)]
    return Layout.of((name, tuple(shape)) for name, shape in shapes.items())


def join_stages(spec: ModelSpec, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole model's state dict from all stages' (name to tensor, the stage's own names). Tensors are not copied.

    Raises StateError if a stage is missing or unknown, or one of its names or shapes is off.
    """
    cut = _Cut(spec)
    names = stage_names(spec.stages)
    if odd := sorted(set(states) ^ set(names)):
        raise StateError(f"these stages are missing or not of this run: {', '.join(odd)}")
    joined: dict[str, Tensor] = {}
    for stage, shapes in zip(names, cut.shapes, strict=True):
        state = states[stage]
        if odd := sorted(shapes.keys() ^ (state.keys() - cut.constants)):
            raise StateError(f"{stage}: missing or unknown: {', '.join(odd[:5])}")
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise StateError(f"{stage}: {name} has shape {tuple(state[name].shape)}, not {tuple(shape)}")
        joined.update(state)
    return joined


def build_stage(spec: ModelSpec, module: str) -> Stage:
    """The named stage in float32 on the CPU, initialized as its family does from (seed, name). Same bits for all.

    Raises ManifestError if there is no such stage, or if the family cannot be cut (the message says why).
    """
    names = stage_names(spec.stages)
    if module not in names:
        raise ManifestError(f"{module!r} is none of this run's modules, {names[0]} to {names[-1]}")
    cut = _Cut(spec)
    stage = cut.stage(names.index(module)).to_empty(device="cpu")
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for _, tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        digest = hashlib.sha256(f"potluck.stage.1 {spec.seed} {module}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        try:
            cut.whole.initialize_weights()
        except AttributeError as error:
            raise cut.refusal(f"its initialization reaches across stages: {error}") from None
    if left := [name for name, tensor in tensors if tensor.is_floating_point() and tensor.isnan().any()]:
        raise cut.refusal(f"transformers does not initialize {left[0]}")
    return stage


class Stage(nn.Module):
    """One replica of a stage. Parameters have the names that they have in the whole model, global layer index included.

    `forward` takes int64 tokens (B, T) in the first stage, hidden states (B, T, D) in the others, and gives hidden
    states, or logits (B, T, V) in the last.
    """

    def __init__(self, whole: Any, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = whole.config, first, last
        self.__dict__["_whole"] = whole  # not a child: its children are ours, so names need no prefix and no mapping
        for name, child in whole.named_children():
            self.add_module(name, child)

    def train(self, mode: bool = True) -> Stage:
        self.__dict__["_whole"].training = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.__dict__["_whole"]
        # Before layer 0 a later stage's model reads only shape, dtype and device, so it gets nothing it could write to.
        inputs = {"input_ids": x} if self.first else {"inputs_embeds": torch.empty_like(x, requires_grad=False)}
        crossing = _Crossing(entering=None if self.first else x)
        token = _crossing.set(crossing)
        try:
            if self.last:
                logits_BTV: Tensor = whole(**inputs, use_cache=False).logits
                return logits_BTV
            whole.base_model(**inputs, use_cache=False)
        finally:
            _crossing.reset(token)
        assert crossing.leaving is not None
        return crossing.leaving

    def loss(self, x: Tensor, targets_BT: Tensor) -> Tensor:
        """Last stage: mean cross-entropy in nats per token."""
        return functional.cross_entropy(self(x).flatten(0, 1).float(), targets_BT.flatten())


@dataclass
class _Crossing:
    """One forward's hidden states at the stage's edges."""

    entering: Tensor | None = None
    leaving: Tensor | None = None


_crossing: ContextVar[_Crossing] = ContextVar("crossing")


class _Elsewhere(nn.Module):
    """Stands where another stage has a layer: passes hidden states on, the first one putting in the stage's input."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        # Models read settings off their layers, such as `attention_type`.
        self.__dict__.update({k: v for k, v in vars(layer).items() if isinstance(v, str | int | float)})
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        crossing = _crossing.get()
        if crossing.entering is not None:
            hidden_states, crossing.entering = crossing.entering, None
        crossing.leaving = hidden_states
        return (hidden_states,) if self.as_tuple else hidden_states


class _Absent(nn.Module):
    """Stands where another stage has an embedding, norm or head: passes hidden states, and adds nothing for ids or a
    mask. What comes of it reaches no layer."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x if x.ndim == 3 else torch.zeros((), device=x.device)


class _Cut:
    """The whole model on the meta device with stand-ins for its layers, and which stage has what.

    Raises ManifestError if the model's layers are not a plain chain. That is found by running the model without its
    layers on fake tensors: every other parameter must be used by a module called before the first layer or after the
    last, and layers may share nothing that depends on parameters or tokens except the hidden states.
    """

    def __init__(self, spec: ModelSpec) -> None:
        from transformers import AutoModelForCausalLM

        self.family, config = spec.family, transformers_config(spec)
        text = config.get_text_config()
        if getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False):
            raise ManifestError(
                "model.config.tie_word_embeddings is true, but the first stage has the embedding, the last the head, "
                "and the two copies would drift apart: set it to false, or model.stages to 1"
            )
        if getattr(text, "layerdrop", 0):
            raise self.refusal("layers may be skipped at random: set model.config.layerdrop to 0")
        count = getattr(text, "num_hidden_layers", 0)
        self.ranges = layer_ranges(count, spec.stages)
        count_parameters(spec)
        with torch.device("meta"):
            self.whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        tensors = dict(self.whole.named_parameters())
        if len(tensors) < sum(1 for _ in self.whole.named_parameters(remove_duplicate=False)):
            raise self.refusal("modules share parameters")
        embeddings = (name for name, module in self.whole.named_modules() if isinstance(module, nn.Embedding))
        self.lookups = {f"{name}.weight" for name in embeddings}
        self.constants = self.whole.state_dict().keys() - tensors.keys()
        lists = {n: m for n, m in self.whole.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
        outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
        if len(outer) != 1:
            raise self.refusal(f"{len(outer)} lists of {count} layers in its model")
        self.path, self.stack = outer[0], lists[outer[0]]
        self.layers = list(self.stack)
        try:
            self.before, self.after = self._trace(as_tuple=False)
        except Exception as first:
            try:
                self.before, self.after = self._trace(as_tuple=True)
            except Exception as second:
                raise self.refusal(f"{first}; {second}") from None
        self.shapes: list[dict[str, torch.Size]] = [{} for _ in self.ranges]
        for name, tensor in tensors.items():
            self.shapes[self._stage_of(name)][name] = tensor.shape

    def refusal(self, why: str) -> ManifestError:
        return ManifestError(f"model.family: {self.family} cannot be cut into stages ({why}): set model.stages to 1")

    def stage(self, index: int) -> Stage:
        """On the meta device. Rehearsed without its layers, on fake tensors: what comes in must go out unchanged."""
        first, last = index == 0, index == len(self.ranges) - 1
        gone = (set() if first else self.before) | (set() if last else self.after)
        for name in gone:
            if not any(name.startswith(f"{other}.") for other in gone):
                self.whole.set_submodule(name, _Absent())
        stage, D = Stage(self.whole, first, last), self.whole.config.get_text_config().hidden_size
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
                x = torch.zeros((2, 5), dtype=torch.int64) if first else torch.zeros((2, 5, D))
                intact = stage(x) is x or first or last
        except Exception as error:
            raise self.refusal(str(error)) from None
        for i in self.ranges[index]:
            self.stack[i] = self.layers[i]
        if not intact or {name for name, _ in stage.named_parameters()} != self.shapes[index].keys():
            raise self.refusal("its stages are not independent")
        return stage

    def _stage_of(self, name: str) -> int:
        if name.startswith(f"{self.path}."):
            layer = int(name[len(self.path) + 1 :].split(".")[0])
            return next(k for k, layers in enumerate(self.ranges) if layer in layers)
        owner = name.rpartition(".")[0]
        if (owner in self.before) == (owner in self.after):
            raise self.refusal(f"{name} is not used before the layers only or after them only")
        return 0 if owner in self.before else len(self.ranges) - 1

    def _trace(self, as_tuple: bool) -> tuple[set[str], set[str]]:
        """Names of the modules with parameters, or with dropout, called before the layers and after them."""
        for i, layer in enumerate(self.layers):
            self.stack[i] = _Elsewhere(layer, as_tuple)
        calls: list[tuple[str, nn.Module, list[Any]]] = []
        hooks = [
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: calls.append((name, m, [*args, *kwargs.values()])), with_kwargs=True
            )
            for name, module in self.whole.named_modules()
            if isinstance(module, nn.Dropout | _Elsewhere) or next(module.parameters(recurse=False), None) is not None
            if name and not self.path.startswith(f"{name}.")
        ]
        token = _crossing.set(_Crossing())
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
                tokens_BT = torch.zeros((2, 5), dtype=torch.int64, device="meta")
                self.whole(input_ids=tokens_BT, use_cache=False)
        finally:
            _crossing.reset(token)
            for hook in hooks:
                hook.remove()
        at = [i for i, (_, module, _) in enumerate(calls) if isinstance(module, _Elsewhere)]
        if [calls[i][1] for i in at] != list(self.stack) or at[-1] - at[0] != len(at) - 1:
            raise ValueError("layers are not called once each, one after the other")
        for i in at:
            hidden, *others = calls[i][2]
            if hidden is not calls[at[0]][2][0]:
                raise ValueError("hidden states are changed between layers")
            if any(isinstance(other, dict | list) for other in others):
                raise ValueError("layers share state")
            for leaf in tree_leaves(others):
                if isinstance(leaf, Tensor) and (leaf.requires_grad or leaf is tokens_BT or leaf._base is tokens_BT):
                    raise ValueError("layers take more than the hidden states")
        return {name for name, _, _ in calls[: at[0]]}, {name for name, _, _ in calls[at[-1] + 1 :]}
