"""The local control socket: how `potluck status`, `why` and `leave` reach a running peer.

A unix socket of mode 0600 in the peer's home; one JSON object per line each way. Nothing of it is on the network.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from potluck.errors import NetworkError, PotluckError, UserError
from potluck.peer.events import encode_event

MAX_LINE = 1 << 20
#: A unix socket's path, in bytes (sun_path less its zero).
MAX_SOCKET_PATH = 107
TIMEOUT_SECONDS = 5.0

#: Takes the request's arguments by name.
Handler = Callable[..., Awaitable[dict[str, Any]]]


class PeerHangs(NetworkError):
    """It runs, but does not answer in time."""


class ControlServer:
    def __init__(self, path: Path, commands: dict[str, Handler]) -> None:
        self._path, self._commands = path, commands
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        if len(os.fsencode(self._path)) > MAX_SOCKET_PATH:
            raise UserError(f"--home: {self._path} is too long for a socket; choose a shorter path")
        before = os.umask(0o077)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.parent.chmod(0o700)
            self._path.unlink(missing_ok=True)
            os.umask(0o177)
            self._server = await asyncio.start_unix_server(self._serve, path=str(self._path), limit=MAX_LINE)
        except OSError as error:
            raise UserError(f"--home: cannot open a socket at {self._path}: {error.strerror}") from None
        finally:
            os.umask(before)
        return self

    async def __aexit__(self, *exc: Any) -> None:
        if self._server:
            self._server.close()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._path.parent.rmdir()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), TIMEOUT_SECONDS)
            request = json.loads(line) if line else {}
            name = request.get("command") if isinstance(request, dict) else None
            handler = self._commands.get(str(name))
            if handler is None:
                raise NetworkError(f"unknown command {name!r}")
            try:
                calling = handler(**request.get("arguments", {}))
            except (TypeError, AttributeError):
                raise UserError(f"{name}: wrong arguments") from None
            writer.write(encode_event(await calling) + b"\n")
            await writer.drain()
        except (TimeoutError, ValueError, OSError, RecursionError):
            pass  # a local client that sends garbage or goes away concerns only itself
        except PotluckError as error:
            writer.write(json.dumps({"error": str(error), "exit_code": error.exit_code}).encode() + b"\n")
        finally:
            writer.close()


async def ask(path: Path, command: str, timeout_seconds: float = TIMEOUT_SECONDS, **arguments: Any) -> dict[str, Any]:
    """Send one command to a running peer or daemon. Raises NetworkError if none runs or it does not answer, UserError
    if it says that the request is wrong."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_LINE)
            try:
                writer.write(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except TimeoutError:
        raise PeerHangs(f"the peer does not answer within {timeout_seconds:.0f} s: it hangs or is stopped") from None
    except (OSError, ValueError):
        raise NetworkError("no peer is running for this run: start one with `potluck join`") from None
    if "error" in answer:
        raise (UserError if answer.get("exit_code") == UserError.exit_code else NetworkError)(str(answer["error"]))
    return dict(answer)
