"""Export and generation: from this home's checkpoint, or, where the model lies on many peers, from the run."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potluck.dht.invite import Invite
from potluck.dht.manifest import Manifest, RunId, SignedManifest
from potluck.errors import StateError, UserError
from potluck.peer.build import MODULE
from potluck.peer.home import Home, RunFolder
from potluck.peer.visitor import Progress, Sampling, Visitor, addresses_of, visit
from potluck.swarm.checkpoints import CheckpointStore
from potluck.swarm.data import hub_tokenizer
from potluck.swarm.layout import Layout
from potluck.swarm.model import build_module


@dataclass(frozen=True)
class Source:
    """A run to look at: what this home has of it, and where its peers are."""

    run_id: RunId
    folder: RunFolder | None
    signed: SignedManifest | None
    addresses: list[str]

    @classmethod
    async def of(cls, run: str | None, home: Path) -> Source:
        """`run`: an invite, or the first characters of the id of a run of this home (None: the latest).

        Raises UserError, StateError or ManifestError."""
        if run and run.startswith("potluck:"):
            invite = Invite.parse(run)
            return cls(invite.run_id, None, None, list(invite.peers))
        folder = Home(home).find_run(run)
        signed = folder.manifest()
        if signed is None:
            raise StateError(f"{folder.path} holds no manifest")
        whole = signed.manifest.model.stages == 1
        return cls(folder.run_id, folder, signed, [] if whole else await addresses_of(folder))

    @property
    def is_here(self) -> bool:
        """Whether a checkpoint of the whole model lies here."""
        return self.folder is not None and self.signed is not None and self.signed.manifest.model.stages == 1

    def visit(self, on_progress: Progress = lambda done, total: None) -> AbstractAsyncContextManager[Visitor]:
        return visit(self.run_id, self.addresses, self.signed, on_progress)

    def checkpoint(self) -> tuple[nn.Module, Manifest, int]:
        """(model with the latest checkpoint's parameters, manifest, round). Raises StateError without a checkpoint."""
        assert self.folder and self.signed
        manifest = self.signed.manifest
        module = build_module(manifest.model)
        layout = Layout.of_module(module)
        saved = CheckpointStore(self.folder.checkpoints(MODULE), self.run_id).latest(layout, MODULE)
        if saved is None:
            raise StateError(f"run {self.run_id[:8]} has no checkpoint yet: train at least one round")
        layout.scatter(saved.state.theta, module)
        return module.eval(), manifest, saved.state.round


async def export_run(
    source: Source, directory: Path, on_progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Write config, weights (safetensors) and, for Hub tokenizers, the tokenizer. From this home's checkpoint, or,
    where it has none of the whole model, from the run's peers."""
    if source.is_here:
        module, manifest, round_ = source.checkpoint()
    else:
        async with source.visit(on_progress) as visitor:
            module, round_ = await visitor.model()
            manifest = visitor.manifest
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # First: what is interrupted is known for an export, too.
        (directory / "potluck-manifest.json").write_bytes(manifest.to_json())
        module.save_pretrained(directory)  # type: ignore[operator]
        if manifest.data.tokenizer != "bytes":
            hub_tokenizer(manifest.data.tokenizer).save_pretrained(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from None
    parameters = sum(p.numel() for p in module.parameters())
    return {"path": str(directory), "run": source.run_id, "round": round_, "parameters": parameters}


async def generate(source: Source, prompt: str, sampling: Sampling, on_text: Callable[[str], None]) -> int | None:
    """Continue a text, and hand it over as it comes. The round of the model; None of one that goes on training."""
    if source.is_here:
        module, manifest, round_ = source.checkpoint()
        on_text(generate_text(module, manifest, prompt, sampling))
        return round_
    async with source.visit() as visitor:
        if visitor.manifest.model.stages == 1:
            module, round_ = await visitor.model()
            on_text(generate_text(module, visitor.manifest, prompt, sampling))
            return round_
        text = Text(visitor.manifest)
        ids = text.encode(prompt)
        on_text(text.decode(ids))
        await visitor.generate(ids, sampling, lambda token: on_text(text.more(token)))
        on_text(text.rest())
    return None


class Text:
    """Text to token ids and, as they come, back."""

    def __init__(self, manifest: Manifest) -> None:
        name = manifest.data.tokenizer
        self._tokenizer = None if name == "bytes" else hub_tokenizer(name)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = ""

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return list(text.encode("utf-8", "surrogateescape") or b"\n")
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return bytes(ids).decode("utf-8", "replace")
        self._ids, self._shown = list(ids), str(self._tokenizer.decode(ids))
        return self._shown

    def more(self, token: int) -> str:
        """What a token adds to what was decoded so far; of a character that is not whole yet, nothing."""
        if self._tokenizer is None:
            return self._bytes.decode(bytes([token])) if token < 256 else ""
        self._ids.append(token)  # all of them: what a token means for spaces depends on those before it
        text = str(self._tokenizer.decode(self._ids))
        return "" if text.endswith("\ufffd") else self._show(text)

    def rest(self) -> str:
        if self._tokenizer is None:
            return self._bytes.decode(b"", True)
        return self._show(str(self._tokenizer.decode(self._ids)))

    def _show(self, text: str) -> str:
        new, self._shown = text[len(self._shown) :], text
        return new


def generate_text(module: nn.Module, manifest: Manifest, prompt: str, sampling: Sampling) -> str:
    """Sample a continuation of the prompt, which is part of the answer."""
    torch.manual_seed(sampling.seed)
    text = Text(manifest)
    ids = torch.tensor([text.encode(prompt)])
    hot = sampling.temperature > 0
    drawn = {"do_sample": True, "temperature": sampling.temperature} if hot else {"do_sample": False}
    with torch.inference_mode():
        out = module.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.tokens, pad_token_id=0, **drawn
        )[0].tolist()
    return text.decode(out)
