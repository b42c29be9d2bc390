"""The page's server: uvicorn on the running loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from potluck.errors import UserError

#: Connections beyond this are answered with 503. The system's own limit on open files may be lower.
MAX_CONNECTIONS = 4096
#: Open streams end at once (`Hub.close`); what else is under way has so long.
END_SECONDS = 2


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to who runs the loop."""
        yield


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
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,  # addresses hold the token once
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
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
        sock.listen(1024)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UserError(f"--port {port} on {listen}: {error.strerror}; give another, or 0 for a free one") from None
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
