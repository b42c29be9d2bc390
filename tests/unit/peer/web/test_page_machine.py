"""Limits that a page sets, the token's file, and the server's socket."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from potluck.errors import UserError
from potluck.peer.home import RunFolder
from potluck.peer.limits import Limits, read_limits
from potluck.peer.web.app import create_app
from potluck.peer.web.machine import change_limits
from potluck.peer.web.serve import serve
from potluck.peer.web.token import token_of


def test_what_is_not_named_stays_and_null_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("threads = 3\n[runs.abc]\nupload = 20000\n")
    limits = change_limits(tmp_path, {"schedule": ["22:00-07:00"], "battery": True})
    assert limits == read_limits(tmp_path) and limits.runs["abc"].upload == 20_000
    assert (limits.threads, limits.schedule, limits.battery) == (3, ["22:00-07:00"], True)
    assert change_limits(tmp_path, {"threads": None, "battery": None}).threads is None
    assert not read_limits(tmp_path).battery


@pytest.mark.parametrize(
    "changes",
    [
        *({"schedule": ["late"]}, {"load": 2}, {"nothing": 1}, {"threads": "two"}, {"battery": 1}, {"upload": 1}),
        *({"battery": True, "load": -1}, {"programs": ["a\x7fb\x00"]}, {"schedule": "22:00-07:00"}),
    ],
)
def test_a_wrong_limit_is_named_and_nothing_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "programs" in changes:  # either it is kept as it is, or refused
        try:
            assert change_limits(tmp_path, changes).programs == changes["programs"]
        except UserError:
            pass
        return
    with pytest.raises(UserError, match=list(changes)[-1]):
        change_limits(tmp_path, changes)
    assert read_limits(tmp_path) == Limits()


def test_the_token_is_random_lasting_and_the_owners_alone(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    assert token == token_of(tmp_path) and len(token) >= 40
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    os.chmod(tmp_path / "token", 0o644)
    with pytest.raises(UserError, match="other users"):
        token_of(tmp_path)
    (tmp_path / "token").unlink()
    assert token_of(tmp_path) != token
    (tmp_path / "token").write_text("short")
    with pytest.raises(UserError, match="damaged"):
        token_of(tmp_path)


def test_a_port_that_is_taken_is_named_or_another_is_found(folder: RunFolder) -> None:
    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(UserError, match="--port"):
                async with serve(create_app(lambda: [folder]), port=port):
                    pass
            async with serve(create_app(lambda: [folder]), port=port, any_port=True) as url:
                assert url.startswith("http://127.0.0.1:") and not url.endswith(f":{port}")
                async with httpx.AsyncClient() as client:
                    assert (await client.get(f"{url}/api/v1/runs")).json()["runs"][0]["run"] == folder.run_id
        with pytest.raises(UserError, match="--listen"):
            async with serve(create_app(lambda: [folder]), "no.such.host.invalid"):
                pass

    asyncio.run(go())


def test_an_open_stream_does_not_hold_up_the_end(folder: RunFolder) -> None:
    async def go() -> None:
        async with httpx.AsyncClient() as client:
            async with serve(create_app(lambda: [folder])) as url:
                request = client.build_request("GET", f"{url}/api/v1/runs/{folder.run_id}/events")
                response = await client.send(request, stream=True)
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("retry:")
            rest = [line async for line in lines]
            assert any(line.startswith("data: ") for line in rest)

    asyncio.run(asyncio.wait_for(go(), 20))
