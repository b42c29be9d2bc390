"""`potluck page`: the daemon's own page, in a browser."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from potluck.cli.daemon import ask_daemon
from potluck.cli.options import HomeOption, JsonOption
from potluck.errors import NetworkError, UserError

NoOpenOption = Annotated[bool, typer.Option("--no-open", help="Only print the address.")]


def page(home: HomeOption = None, no_open: NoOpenOption = False, as_json: JsonOption = False) -> None:
    """Open the page of this home's daemon: its runs, its credit, its limits, pause and resume.

    The address holds the page's token: whoever has it can use the page. The browser remembers it.

    Example:  potluck page
    """
    from potluck.peer.home import Home, default_home
    from potluck.peer.web.token import token_of

    where = Home(home or default_home())
    answer = ask_daemon(where, "page")
    if answer is None:
        raise NetworkError(f"no daemon runs in {where.path}: start it with `potluck daemon`")
    if answer["url"] is None:
        raise UserError("the daemon was started with --no-page: start it again without")
    url = f"{answer['url']}/?token={token_of(where.path)}"
    print(json.dumps({"url": url}) if as_json else url, flush=True)
    if not no_open and not as_json and _has_display():
        _open(where.path / "page.html", url)


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(path: Path, url: str) -> None:
    """By a file that only this user can read: other users can see what a browser is started with."""
    import webbrowser

    from potluck.net.identity import write_private

    path.unlink(missing_ok=True)
    html = f'<!doctype html><meta http-equiv="refresh" content="0; url={url}"><a href="{url}">Open the page</a>'
    write_private(path, html.encode())
    webbrowser.open(path.as_uri())
