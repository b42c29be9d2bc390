"""The web application: pages, JSON API, events and metrics, from what was heard of some runs.

Nothing is loaded from elsewhere, nothing needs the network: it works on a machine without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from potluck import __version__
from potluck.dht.manifest import RunId
from potluck.errors import PotluckError
from potluck.peer.home import RunFolder
from potluck.peer.web import api, machine_api
from potluck.peer.web.assets import Assets
from potluck.peer.web.guard import Guard
from potluck.peer.web.machine import Machine
from potluck.peer.web.metrics import CONTENT_TYPE, exposition
from potluck.peer.web.models import PeerText, RunText
from potluck.peer.web.stream import Hub

#: Viewers of live events at once; more are told to come again.
MAX_VIEWERS = 1500
_HTML = "text/html; charset=utf-8"


def create_app(
    runs: Callable[[], Sequence[RunFolder]],
    *,
    machine: Machine | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
    invites: Mapping[RunId, str] | None = None,
    max_viewers: int = MAX_VIEWERS,
) -> FastAPI:
    """`runs`: what there is to see, asked again every few seconds (`home.runs` of a daemon, `lambda: [folder]` of a
    monitor); a folder needs its manifest, and shows what its `history` and `ledgers` hold, which may appear later. Who
    looks at contributors makes it ask the run's control socket for newer ledgers (`ledgers`), where one answers.

    `machine`: of a daemon; a page about it, with buttons. It needs a `token`, which every request must then bear.
    Without one, everything is public and nothing can be changed. `hosts`: names besides the loopback ones at which it
    is reached, such as that of a reverse proxy; a public page is reached by any bare address too. `invites`: shown on
    the page of their run, for others to join with.
    """
    if machine is not None and not token:
        raise ValueError("a machine's page needs a token")
    hub = Hub(runs, invite_of=(invites or {}).get, max_viewers=max_viewers)
    assets = Assets()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await hub.poll(0.0)
        polling = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            polling.cancel()
            with suppress(asyncio.CancelledError):
                await polling

    app = FastAPI(
        title="Potluck",
        version=__version__,
        description="What was heard of a run, and what its validators wrote. Times are UTC seconds.",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],
        responses=api.GUARDED if token else {},
    )
    app.state.hub = hub
    app.include_router(api.router(hub, machine), prefix="/api/v1")
    if machine is not None:
        app.include_router(machine_api.router(hub, machine), prefix="/api/v1/machine")
    _add_pages(app, hub, assets, machine)
    app.add_exception_handler(PotluckError, _on_problem)
    app.add_exception_handler(404, _missing(assets))
    app.add_middleware(Guard, token=token, hosts=hosts, sign_in=assets.sign_in)
    return app


async def _on_problem(request: Request, error: Exception) -> Response:
    """What the machine refuses, in its own words."""
    return api.json_response({"detail": str(error)}, 400)


def _missing(assets: Assets) -> Callable[[Request, Exception], Awaitable[Response]]:
    """For people a page that says so, for programs JSON."""

    async def missing(request: Request, error: Exception) -> Response:
        detail = error.detail if isinstance(error, HTTPException) else "there is nothing"
        if "text/html" not in request.headers.get("accept", ""):
            return api.json_response({"detail": detail}, 404)
        return Response(assets.shell, 404, media_type=_HTML)

    return missing


def _add_pages(app: FastAPI, hub: Hub, assets: Assets, machine: Machine | None) -> None:
    """One shell; its script draws what the address names."""

    async def page(request: Request) -> Response:
        return Response(assets.shell, media_type=_HTML, headers={"cache-control": "no-cache"})

    async def page_of_run(run: Annotated[RunText, Path()]) -> Response:
        if hub.watch(run) is None:
            raise HTTPException(404, "no such run here")
        return Response(assets.shell, media_type=_HTML, headers={"cache-control": "no-cache"})

    async def page_of_peer(run: Annotated[RunText, Path()], peer: Annotated[PeerText, Path()]) -> Response:
        return await page_of_run(run)

    async def first(request: Request) -> Response:
        watches = hub.watches
        if len(watches) == 1:
            return RedirectResponse(f"/runs/{watches[0].about.run}", 303)
        return await page(request)

    async def static(request: Request, name: str) -> Response:
        asset = await assets.get(name)
        if asset is None:
            raise HTTPException(404, "there is no such file")
        return asset.response(request)

    async def metrics() -> Response:
        states = await api.states_of(hub)
        daemon: dict[str, Any] | None = await machine.status() if machine else None
        return Response(exposition(states, daemon, hub.viewers, hub.events_sent), media_type=CONTENT_TYPE)

    pages: dict[str, Callable[..., Any]] = {
        "/": first,
        "/runs/{run}": page_of_run,
        "/runs/{run}/contributors": page_of_run,
        "/runs/{run}/peers/{peer}": page_of_peer,
        "/api": page,
        "/static/{name}": static,
        "/metrics": metrics,
    }
    if machine is not None:
        pages["/machine"] = page
    for path, handler in pages.items():
        app.add_api_route(path, handler, methods=["GET"], include_in_schema=False, response_model=None)
