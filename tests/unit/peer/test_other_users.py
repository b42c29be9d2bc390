"""Other users of the machine: a home, its daemon's socket and its page's token are not theirs."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.peer.control import ControlServer
from potluck.peer.home import Home
from potluck.peer.web.token import token_of

NOBODY = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def refused(work: Callable[[], object]) -> bool:
    """Whether somebody else may not do it."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
        except PermissionError:
            os._exit(13)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 13)
    return code == 13


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("opened", [False, True])
def test_nobody_else_reaches_a_homes_daemon_its_token_or_its_key(opened: bool) -> None:
    """`opened`: also where the owner has made the home readable to all."""

    async def go(home: Home) -> None:
        async with ControlServer(home.daemon_socket, {}):
            connect(home.daemon_socket)
            assert refused(lambda: connect(home.daemon_socket))

    with tempfile.TemporaryDirectory(prefix="pl", dir="/tmp") as name:
        Path(name).chmod(0o755)
        home = Home(Path(name) / "h").open()
        home.identity()
        token_of(home.path)
        if opened:
            home.path.chmod(0o755)
        (home.path / "shown").write_text("")
        assert refused((home.path / "shown").read_text) is not opened
        asyncio.run(go(home))
        for file in (home.key_path, home.path / "token"):
            assert file.read_bytes()
            assert refused(file.read_bytes)
