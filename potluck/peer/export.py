"""Export and generation: a run's latest checkpoint as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from potluck.dht.manifest import Manifest
from potluck.errors import StateError, UserError
from potluck.peer.build import MODULE
from potluck.peer.home import RunFolder
from potluck.swarm.checkpoints import CheckpointStore
from potluck.swarm.data import hub_tokenizer
from potluck.swarm.layout import Layout
from potluck.swarm.model import build_module


def load_model(folder: RunFolder) -> tuple[nn.Module, Manifest, int]:
    """(model with the latest checkpoint's parameters, manifest, round). Raises StateError without a checkpoint."""
    signed = folder.manifest()
    if signed is None:
        raise StateError(f"{folder.path} holds no manifest")
    if signed.manifest.model.stages > 1:
        raise UserError("this run's model lies on many peers, one stage each: exporting it is not available yet")
    module = build_module(signed.manifest.model)
    layout = Layout.of_module(module)
    saved = CheckpointStore(folder.checkpoints(MODULE), folder.run_id).latest(layout, MODULE)
    if saved is None:
        raise StateError(f"run {folder.run_id[:8]} has no checkpoint yet: train at least one round")
    layout.scatter(saved.state.theta, module)
    return module.eval(), signed.manifest, saved.state.round


def export_run(folder: RunFolder, directory: Path) -> dict[str, Any]:
    """Write config, weights (safetensors) and, for Hub tokenizers, the tokenizer."""
    module, manifest, round_ = load_model(folder)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        module.save_pretrained(directory)  # type: ignore[operator]
        if manifest.data.tokenizer != "bytes":
            hub_tokenizer(manifest.data.tokenizer).save_pretrained(directory)
        (directory / "potluck-manifest.json").write_bytes(manifest.to_json())
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from None
    parameters = sum(p.numel() for p in module.parameters())
    return {"path": str(directory), "run": folder.run_id, "round": round_, "parameters": parameters}


def generate_text(
    module: nn.Module, manifest: Manifest, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """Sample a continuation. `temperature` 0 takes the likeliest token each time."""
    torch.manual_seed(seed)
    if manifest.data.tokenizer == "bytes":
        ids = torch.tensor([list(prompt.encode("utf-8", "surrogateescape") or b"\n")])
    else:
        tokenizer = hub_tokenizer(manifest.data.tokenizer)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        out = module.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0, **sampling
        )[0].tolist()
    if manifest.data.tokenizer == "bytes":
        return bytes(out).decode("utf-8", "replace")
    return str(tokenizer.decode(out))
