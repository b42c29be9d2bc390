"""The JSON API about runs, `/api/v1`. Read only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from potluck.peer.web.assets import Encoded
from potluck.peer.web.machine import Machine
from potluck.peer.web.models import (
    Contributors,
    Curve,
    PeerPage,
    Peers,
    PeerText,
    Problem,
    RunBrief,
    RunList,
    RunState,
    RunText,
)
from potluck.peer.web.stream import GZIP, Full, Hub
from potluck.peer.web.watch import POINTS, Watch

JSON = "application/json"
#: How soon who found no room may come again.
RETRY_SECONDS = 30

RunPath = Annotated[RunText, Path(description="id of a run")]
PeerPath = Annotated[PeerText, Path(description="id of a peer")]
Limit = Annotated[int, Query(ge=1, le=500, description="how many at most")]
Offset = Annotated[int, Query(ge=0, le=100_000, description="how many to leave out first")]

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "`RunState` in each event", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
    503: {"description": "As many viewers as there may be: see Retry-After", "model": Problem},
}
MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "Nothing of the kind is known here", "model": Problem}}
#: What the guard answers, before anything else is looked at (`guard.py`).
GUARDED: dict[int | str, dict[str, Any]] = {
    400: {"description": "Not understood, or refused, for the reason that it gives", "model": Problem},
    401: {"description": "The token is missing or wrong", "model": Problem},
    403: {"description": "Asked for by a page from elsewhere", "model": Problem},
    413: {"description": "Too long a body", "model": Problem},
    415: {"description": "A body that is not JSON", "model": Problem},
}


def json_response(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type=JSON)


def router(hub: Hub, machine: Machine | None) -> APIRouter:
    routes = APIRouter(tags=["runs"], responses=MISSING)

    def find(run: str) -> Watch:
        if (watch := hub.watch(run)) is None:
            raise HTTPException(404, "no such run here")
        return watch

    @routes.get("/runs", response_model=RunList, responses={404: {"model": Problem}})
    async def list_runs() -> Response:
        """All runs that are watched here."""
        states = await states_of(hub)
        briefs = [RunBrief(**{name: getattr(state, name) for name in RunBrief.model_fields}) for state in states]
        told = RunList(runs=briefs, me=machine.peer if machine else None, machine=machine is not None)
        return Response(told.model_dump_json(), media_type=JSON)

    @routes.get("/runs/{run}", response_model=RunState)
    async def show_run(request: Request, run: RunPath) -> Response:
        """A run as it is now, with its pipeline and its last rounds."""
        live = await asyncio.to_thread(find(run).live, patient=True)
        return _response(request, live.encoded if live else None)

    @routes.get("/runs/{run}/curve", response_model=Curve)
    async def show_curve(
        request: Request,
        run: RunPath,
        since: Annotated[int, Query(ge=0, lt=2**32, description="the first round")] = 0,
        points: Annotated[int, Query(ge=1, le=POINTS, description="how many rounds at most")] = 600,
    ) -> Response:
        """Loss, speed and peers by round; of many rounds one in `every`."""
        watch = find(run)
        key = f"curve {since} {points}"
        return _response(request, await asyncio.to_thread(watch.answer, key, lambda: watch.curve(since, points)))

    @routes.get("/runs/{run}/peers", response_model=Peers)
    async def list_peers(request: Request, run: RunPath, limit: Limit = 100, offset: Offset = 0) -> Response:
        """Peers as they were heard, those that are here now first."""
        watch = find(run)
        key = f"peers {limit} {offset}"
        return _response(request, await asyncio.to_thread(watch.answer, key, lambda: watch.peers(limit, offset)))

    @routes.get("/runs/{run}/contributors", response_model=Contributors)
    async def list_contributors(
        request: Request,
        run: RunPath,
        limit: Limit = 100,
        offset: Offset = 0,
        validator: Annotated[PeerText | None, Query(description="by whose ledger; else by the longest one")] = None,
        peer: Annotated[PeerText | None, Query(description="only this one, if it is known")] = None,
    ) -> Response:
        """The leaderboard: who earned what, by a validator's ledger, and who else takes part."""
        watch = find(run)
        await watch.ask_for_ledgers()
        key = f"contributors {limit} {offset} {validator} {peer}"
        made = lambda: watch.contributors(limit, offset, validator, peer)  # noqa: E731
        return _response(request, await asyncio.to_thread(watch.answer_from_ledgers, key, made))

    @routes.get("/runs/{run}/peers/{peer}", response_model=PeerPage)
    async def show_peer(request: Request, run: RunPath, peer: PeerPath) -> Response:
        """What one peer did each round, what it was scored and why; the proof of each shown score is checked here."""
        watch = find(run)
        await watch.ask_for_ledgers()
        made = lambda: watch.peer(peer)  # noqa: E731
        return _response(request, await asyncio.to_thread(watch.answer_from_ledgers, f"peer {peer}", made))

    @routes.get("/runs/{run}/events", responses=_EVENTS, response_class=StreamingResponse)
    async def follow_run(request: Request, run: RunPath) -> Response:
        """Server-sent events: `RunState` at once and whenever something is new. A slow reader skips to the newest."""
        find(run)
        stack = AsyncExitStack()
        try:
            address = request.client.host if request.client else ""
            viewer = await stack.enter_async_context(hub.viewing(run, address))
        except Full as full:
            raise HTTPException(503, str(full), {"retry-after": str(RETRY_SECONDS)}) from None

        packed = "gzip" in request.headers.get("accept-encoding", "")

        async def events() -> AsyncIterator[bytes]:
            async with stack:
                if packed:
                    yield GZIP
                async for event in viewer.events():
                    yield event.packed if packed else event.plain

        headers = {"cache-control": "no-store", "x-accel-buffering": "no", "vary": "accept-encoding"}
        headers |= {"content-encoding": "gzip"} if packed else {}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    return routes


async def states_of(hub: Hub) -> list[RunState]:
    """Of all runs, as they were made for live events or for others who asked; without those that cannot be read now."""
    lives = [await asyncio.to_thread(watch.live, patient=True) for watch in hub.watches]
    return [live.state for live in lives if live]


def _response(request: Request, found: Encoded | None) -> Response:
    if found is None:
        raise HTTPException(404, "nothing of the kind is known here")
    return found.response(request, JSON)
