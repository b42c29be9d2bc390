"""`potluck export`: the trained model as a folder that transformers loads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from potluck.cli.display import progress_bar
from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import UserError


def export(
    run: Annotated[str, typer.Argument(help="First characters of the run id, or an invite.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model as a folder for `transformers.AutoModelForCausalLM.from_pretrained`.

    Of a run of this home, its latest checkpoint. Where the model lies in stages on many peers, or with an invite, it is
    gathered from the run; it has to fit into this machine's memory.

    Example:  potluck export abc123 ./model
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty folder: choose another")
    from potluck.peer.export import Source, export_run
    from potluck.peer.home import default_home

    async def go() -> dict[str, Any]:
        source = await Source.of(run, home or default_home())
        with progress_bar("gathering the model", not as_json) as on_progress:
            return await export_run(source, directory, on_progress)

    done = asyncio.run(go())
    if as_json:
        print(json.dumps(done))
    else:
        print(f"wrote {done['path']}: round {done['round']}, {done['parameters']:,} parameters")
