"""The organizer's side of a manifest: commented TOML out of presets, and back into a draft.

The comments are the descriptions of the fields in `manifest.py`, so the two cannot drift apart.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from potluck.dht.manifest import MAX_MANIFEST_BYTES, ManifestDraft, parse_draft
from potluck.errors import ManifestError
from potluck.toml import toml_value

#: Filled in by `potluck host`, not by people.
_HOST_FIELDS: Final = frozenset({"initial_state", "initial_bytes"})

PRESETS: Final[dict[str, dict[str, Any]]] = {
    # About 0.8M parameters: the demo, and tests on two cores. The learning rate is what H = 10 liked in a
    # sketch.
    "demo": {
        "model": {
            "family": "llama",
            "config": {
                "vocab_size": 256,
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "intermediate_size": 344,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
        },
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": 128},
        "rounds": {"seconds": 5.0, "steps": 10, "group_size": 16, "exchange_seconds": 1.5},
        "training": {
            "learning_rate": 1.5e-3,
            "betas": [0.5, 0.95],
            "schedule": "cosine",
            "warmup_steps": 20,
            "total_steps": 2000,
            "batch_size": 8,
            "precision": "float32",
        },
        "codec": {"name": "int8"},
        "outer": {"momentum": 0.8, "momentum_warmup_rounds": 10},
    },
    # About 25M parameters: one laptop GPU, or patience.
    "small": {
        "model": {
            "family": "llama",
            "config": {
                "vocab_size": 256,
                "hidden_size": 512,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
                "intermediate_size": 1376,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            },
        },
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": 512},
        "rounds": {"seconds": 60.0, "steps": 50, "group_size": 16, "exchange_seconds": 10.0},
        "training": {
            "learning_rate": 6e-4,
            "warmup_steps": 200,
            "total_steps": 50_000,
            "batch_size": 32,
            "schedule": "cosine",
        },
        "codec": {"name": "int8"},
    },
    # 1.1B parameters in the shape of TinyLlama: an example with a Hub tokenizer and data set.
    "1b": {
        "model": {
            "family": "llama",
            "config": {
                "vocab_size": 32000,
                "hidden_size": 2048,
                "num_hidden_layers": 22,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "intermediate_size": 5632,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": False,
            },
        },
        "data": {
            "source": "hf:HuggingFaceFW/fineweb-edu",
            "tokenizer": "hf:TinyLlama/TinyLlama_v1.1",
            "sequence_length": 2048,
            "held_out_fraction": 0.001,
            "documents": 200_000,
        },
        "rounds": {"seconds": 1200.0, "steps": 100, "group_size": 16, "exchange_seconds": 120.0},
        "training": {
            "optimizer": "adamw8bit",
            "learning_rate": 3e-4,
            "warmup_steps": 1000,
            "total_steps": 200_000,
            "batch_size": 128,
            "schedule": "cosine",
        },
        "codec": {"name": "sparse"},
        "outer": {"learning_rate": 0.7, "momentum": 0.9, "momentum_warmup_rounds": 50},
    },
}


def load_toml(path: Path) -> ManifestDraft:
    """Read what an organizer wrote. Raises ManifestError that names the file and every wrong setting."""
    try:
        if not path.is_file():
            raise ManifestError(f"{path}: No such file: write one with `potluck run new`")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, not a manifest")
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}: write one with `potluck run new`") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # tomllib.TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ManifestError(f"{path}: not TOML: {error}") from None
    try:
        return parse_draft(fields)
    except ManifestError as error:
        raise ManifestError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def preset_draft(preset: str, name: str, overrides: Mapping[str, Any] | None = None) -> ManifestDraft:
    """A preset with some settings changed: `overrides` maps dotted names ("rounds.seconds") to values.

    Raises ManifestError for an unknown preset or setting, or a value out of bounds.
    """
    if preset not in PRESETS:
        raise ManifestError(f"preset is {preset!r}, allowed: {', '.join(PRESETS)}")
    fields: dict[str, Any] = json.loads(json.dumps(PRESETS[preset])) | {"name": name}
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        table = fields
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ManifestError(f"{dotted} is unknown: {parent} holds no settings")
        table[last] = value
    return parse_draft(fields)


def template_toml(preset: str, name: str, overrides: Mapping[str, Any] | None = None) -> str:
    """A preset as `draft_toml`, some settings changed. Raises ManifestError."""
    return draft_toml(preset_draft(preset, name, overrides))


def draft_toml(draft: ManifestDraft) -> str:
    """A manifest for people to edit: every setting with its meaning above it."""
    header = [
        "# A Potluck run. Edit, then start it with: potluck host THIS-FILE",
        "# Its id is the hash of the signed manifest, so nothing here can change once the run has started.",
        "",
    ]
    return "\n".join([*header, *_table(draft, "")]).rstrip("\n") + "\n"


def _table(part: BaseModel, prefix: str) -> Iterator[str]:
    """The lines of a table: its own values first, then its sub-tables, as TOML wants it."""
    tables: list[tuple[str, str, Any]] = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if name in _HOST_FIELDS:
            continue
        if isinstance(value, BaseModel | dict):
            tables.append((prefix + name, field.description or "", value))
            continue
        yield f"# {field.description}"
        yield f"{name} = {toml_value(value)}"
    for dotted, description, value in tables:
        yield ""
        yield f"# {description}"
        yield f"[{dotted}]"
        if isinstance(value, BaseModel):
            yield from _table(value, dotted + ".")
        else:
            # TOML has no null: a config key that is absent takes the family's default.
            yield from (f"{key} = {toml_value(item)}" for key, item in value.items() if item is not None)
