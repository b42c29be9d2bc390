"""Limits that a page sets, the token's file, and the server's socket."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from potluck.errors import UserError
from potluck.peer.home import RunFolder
from potluck.peer.limits import Limits, read_limits
from potluck.peer.web import machine as machine_module
from potluck.peer.web import serve as serve_module
from potluck.peer.web.app import create_app
from potluck.peer.web.machine import DaemonMachine, change_limits
from potluck.peer.web.serve import room_for_viewers, serve
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


def test_of_two_changes_at_once_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def read(home: Path) -> Limits:
        found = read_limits(home)
        with suppress(threading.BrokenBarrierError):  # the other one waits until this one has written
            both.wait(0.05)
        return found

    monkeypatch.setattr(machine_module, "read_limits", read)
    machine: Any = DaemonMachine(SimpleNamespace(home=SimpleNamespace(path=tmp_path)))  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(machine.set_limits, [{"threads": 3}, {"battery": True}]))
    limits = read_limits(tmp_path)
    assert (limits.threads, limits.battery) == (3, True)


@pytest.mark.parametrize(
    "soft, hard, then, room",
    [
        *((1024, 20_000, 20_000, 19_800), (1024, 10**9, 65_536, 65_336), (100_000, 10**9, 100_000, 99_800)),
        *((1024, resource.RLIM_INFINITY, 65_536, 65_336), (220, 220, 220, 20), (64, 100, 100, 1)),
    ],
)
def test_files_are_allowed_as_far_as_may_be_and_some_stay_the_processes_own(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, then: int, room: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    assert room_for_viewers() == room and limits[-1] == (then, hard)


def test_connections_that_ask_nothing_leave_files_to_the_process(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "MAX_CONNECTIONS", 60)

    async def go() -> None:
        app = create_app(lambda: [folder])
        async with serve(app) as url:
            with ExitStack() as stack:
                at = urlsplit(url)
                idle = [stack.enter_context(socket.create_connection((at.hostname, at.port))) for _ in range(115)]
                for one in idle:
                    one.setblocking(False)
                loop = asyncio.get_running_loop()
                for one in idle[110:]:
                    with suppress(ConnectionResetError):
                        assert await asyncio.wait_for(loop.sock_recv(one, 1), 5) == b""
                await loop.sock_sendall(idle[109], f"GET / HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
                assert b" 503 " in await asyncio.wait_for(loop.sock_recv(idle[109], 100), 5)

    asyncio.run(go())
