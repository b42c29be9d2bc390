"""The page's server: uvicorn on the running loop."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from potluck.errors import UserError

#: Connections beyond this are answered with 503; with so many more, the next ones are closed unheard.
MAX_CONNECTIONS = 4096
MORE_CONNECTIONS = 50
#: Open files, at most, where the system's own limit is higher, or none.
MOST_FILES = 65_536
#: How many of them are left to the process itself (the network, the history, ledgers), and to connections of those who
#: follow nothing live.
OWN_FILES, ANSWERS = 100, 50
#: Connections that wait to be let in, and how many asyncio lets in at a time: while one is closed, as many have come.
WAITING, AT_A_TIME = 1024, 16
#: Open streams end at once (`Hub.close`); what else is under way has so long.
END_SECONDS = 2


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to who runs the loop."""
        yield


class _Protocol(H11Protocol):
    """Who sends no request is never told 503: without an end to them, no file would be left for the process itself."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency and len(self.connections) > self.limit_concurrency + MORE_CONNECTIONS:
            transport.abort()


def room_for_viewers() -> int:
    """Raises this process's limit of open files as far as it may; how many live streams it has room for then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # what there is must do
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, _files() - OWN_FILES - MORE_CONNECTIONS - ANSWERS)


def _files() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


@asynccontextmanager
async def serve(
    app: FastAPI, listen: str = "127.0.0.1", port: int = 0, *, any_port: bool = False
) -> AsyncIterator[str]:
    """Serves `app` (of `create_app`) while the body runs; gives its URL, without a token.

    `port` 0: any free one; `any_port`: also where `port` is taken. Signals stay with whoever runs the loop. Raises
    UserError that names `--listen` or `--port` where it cannot listen.
    """
    sock = _bound(listen, port, any_port)
    config = uvicorn.Config(
        app,
        loop="none",
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,  # addresses hold the token once
        proxy_headers=False,
        server_header=False,
        backlog=AT_A_TIME,
        limit_concurrency=max(ANSWERS, min(MAX_CONNECTIONS, _files() - OWN_FILES - MORE_CONNECTIONS)),
        timeout_keep_alive=30,
        timeout_graceful_shutdown=END_SECONDS,
        h11_max_incomplete_event_size=16 * 1024,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([sock]))
    try:
        while not server.started:
            if serving.done():
                serving.result()
                raise UserError("the page's server ended as it began")
            await asyncio.sleep(0.01)
        sock.listen(WAITING)  # the loop has set it to what it lets in at a time
        yield url_of(sock)
    finally:
        app.state.hub.close()
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await asyncio.wait([serving])
        sock.close()


def _bound(listen: str, port: int, any_port: bool) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(listen, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"--listen {listen}: {error.strerror or error}; give an address of this machine") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            if not (any_port and port):
                raise
            sock.bind((address[0], 0, *address[2:]))
        sock.listen(WAITING)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UserError(f"--port {port} on {listen}: {error.strerror}; give another, or 0 for a free one") from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
