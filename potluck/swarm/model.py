"""Modules: the parts of a transformers causal LM that are trained and averaged by themselves.

A plain data-parallel run is a pipeline of one stage: its only module, `stage.0`, is the whole model. Every peer builds
it from the manifest alone (family, config, seed), so all start from the same bits; `initial_state` in the manifest is
the content address that proves it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck.errors import ManifestError


class ModelSpec(Protocol):
    """What this file reads of a manifest's `model` table."""

    @property
    def family(self) -> str: ...
    @property
    def config(self) -> Any: ...
    @property
    def seed(self) -> int: ...
    @property
    def stages(self) -> int: ...


#: Larger models are refused before a byte is allocated.
MAX_PARAMETERS = 1 << 40


def transformers_config(spec: ModelSpec) -> Any:
    """The transformers config object of a manifest's model; ManifestError for unknown families and keys.

    Only keys that the family's config class defines are taken: a manifest cannot smuggle in code or loading options.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if spec.family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ManifestError(f"model.family: {spec.family!r} is not a causal language model that transformers knows")
    config_class = CONFIG_MAPPING[spec.family]
    known = set(config_class().to_dict())
    unknown = sorted(set(spec.config) - known)
    if unknown:
        raise ManifestError(f"model.config: {spec.family} has no setting {', '.join(map(repr, unknown))}")
    try:
        return config_class(**spec.config)
    except Exception as error:  # transformers validates with many exception types; all mean a bad manifest
        raise ManifestError(f"model.config: {error}") from None


def skeleton(spec: ModelSpec) -> nn.Module:
    """The whole model on the meta device: shapes, no memory. Raises ManifestError if it cannot be built, or is too
    large."""
    from transformers import AutoModelForCausalLM

    config = transformers_config(spec)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise ManifestError(f"model.config: transformers cannot build this {spec.family}: {error}") from None
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise ManifestError(f"model.config: {parameters:,} parameters; at most {MAX_PARAMETERS:,} are allowed")
    return model


def count_parameters(spec: ModelSpec) -> int:
    """How many the model has, without allocating them. Raises ManifestError as `skeleton` does."""
    return sum(p.numel() for p in skeleton(spec).parameters())


def build_module(spec: ModelSpec, module: str = "stage.0") -> nn.Module:
    """The named module in float32 on the CPU, initialized from the manifest's seed. Same bits for every caller.

    With `model.stages` = 1, `stage.0` is the whole model; else a `Stage`, of which only the slice is ever in memory.
    Raises ManifestError if the model cannot be built, or has no such module. `count_parameters`, or `stage_parameters`,
    says beforehand whether it fits in memory.
    """
    if spec.stages > 1:
        from potluck.swarm.stage import build_stage

        return build_stage(spec, module)
    count_parameters(spec)
    if module != "stage.0":
        raise ManifestError(f"{module!r} is none of this run's modules: model.stages is 1, so there is only stage.0")
    from transformers import AutoModelForCausalLM

    config = transformers_config(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


def next_token_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; B sequences of T = sequence_length + 1 tokens (int64)."""
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
