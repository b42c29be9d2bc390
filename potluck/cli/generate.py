"""`potluck generate`: text from a run's model."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "def ",
    home: HomeOption = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="First characters of a run id (default: the latest), or an invite."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=100_000, help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=100.0, help="0: the likeliest.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with the model as this peer has it.

    Where the model lies in stages on many peers, each token goes through the run's servers, between what they train.

    Example:  potluck generate 'import os' --tokens 300
    """
    from potluck.peer.export import Source
    from potluck.peer.export import generate as continue_text
    from potluck.peer.home import default_home
    from potluck.peer.visitor import Sampling

    parts: list[str] = []

    def on_text(text: str) -> None:
        parts.append(text)
        if not as_json:
            print(text, end="", flush=True)

    async def go() -> int | None:
        source = await Source.of(run, home or default_home())
        return await continue_text(source, prompt, Sampling(tokens, temperature, seed), on_text)

    round_ = asyncio.run(go())
    print(json.dumps({"text": "".join(parts), "round": round_}) if as_json else "")
