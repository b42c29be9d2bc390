"""`potluck export`: the trained model as a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import UserError


def export(
    run: Annotated[str, typer.Argument(help="First characters of the run id.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the latest checkpoint as a folder for `transformers.AutoModelForCausalLM.from_pretrained`.

    Example:  potluck export abc123 ./model
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty folder: choose another")
    from potluck.peer.export import export_run
    from potluck.peer.home import Home, default_home

    done = export_run(Home(home or default_home()).find_run(run), directory)
    if as_json:
        print(json.dumps(done))
    else:
        print(f"wrote {done['path']}: round {done['round']}, {done['parameters']:,} parameters")
