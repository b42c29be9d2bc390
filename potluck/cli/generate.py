"""`potluck generate`: text from a run's latest checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption, RunOption


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "def ",
    home: HomeOption = None,
    run: RunOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=100_000, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=100.0, help="0: the likeliest.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with the model as this peer has it.

    Example:  potluck generate 'import os' --tokens 300
    """
    from potluck.peer.export import generate_text, load_model
    from potluck.peer.home import Home, default_home

    module, manifest, round_ = load_model(Home(home or default_home()).find_run(run))
    text = generate_text(module, manifest, prompt, tokens, temperature, seed)
    print(json.dumps({"text": text, "round": round_}) if as_json else text)
