"""`potluck run new`: write a commented manifest."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli.options import JsonOption
from potluck.errors import UserError


def run_new(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.toml"),
    preset: Annotated[str, typer.Option("--preset", help="demo, small or 1b.")] = "demo",
    name: Annotated[str | None, typer.Option("--name", help="Name of the run (default: the file's).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set rounds.seconds=30 (repeatable).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a manifest with every setting explained. Edit it, then `potluck host` it.

    Example:  potluck run new my-run.toml --preset small --set codec.name=sparse
    """
    from potluck.dht.template import PRESETS, draft_toml, preset_draft
    from potluck.swarm.aggregate import RULE_NAMES
    from potluck.swarm.codecs import CODEC_NAMES, make_codec

    if preset not in PRESETS:
        raise UserError(f"--preset {preset!r}: use one of {', '.join(PRESETS)}")
    if path.exists() and not force:
        raise UserError(f"{path} exists: choose another name, or --force to overwrite it")
    draft = preset_draft(preset, name or path.stem, dict(map(_setting, settings or [])))
    draft.check_known(codecs=CODEC_NAMES, rules=RULE_NAMES)
    make_codec(draft.codec.name, draft.codec.parameters)
    try:
        path.write_text(draft_toml(draft))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    if as_json:
        print(json.dumps({"path": str(path), "preset": preset}))
    else:
        print(f"wrote {path}; start the run with:\n  potluck host {path}")


def _setting(text: str) -> tuple[str, Any]:
    """`rounds.seconds=30` -> ("rounds.seconds", 30); values as in TOML, bare words are text."""
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        raise UserError(f"--set {text!r}: write it as name=value, for example rounds.seconds=30")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
