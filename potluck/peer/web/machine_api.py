"""The JSON API about this machine, `/api/v1/machine`: only a daemon's page has it. Changes are guarded (`guard.py`)."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from potluck.errors import UserError
from potluck.peer.limits import Limits
from potluck.peer.web.api import JSON
from potluck.peer.web.machine import Machine
from potluck.peer.web.models import Finish, Limit, LimitList, MachineState, Nothing, Problem
from potluck.peer.web.stream import Hub

REFUSED: dict[int | str, dict[str, Any]] = {400: {"description": "The daemon refuses, and says why", "model": Problem}}


def router(hub: Hub, machine: Machine) -> APIRouter:
    routes = APIRouter(tags=["machine"], responses=REFUSED)

    def told(status: dict[str, Any]) -> Response:
        runs = [{**run, "name": _name(hub, run["run"])} for run in status["runs"]]
        return Response(MachineState.model_validate({**status, "runs": runs}).model_dump_json(), media_type=JSON)

    @routes.get("", response_model=MachineState)
    async def show() -> Response:
        """What this machine does now, or by which rule it does not."""
        return told(await machine.status())

    @routes.post("/pause", response_model=MachineState)
    async def pause(nothing: Nothing) -> Response:
        """Give the machine back within two seconds, until `resume`."""
        return told(await machine.pause())

    @routes.post("/resume", response_model=MachineState)
    async def resume(nothing: Nothing) -> Response:
        """Go on after a pause, and try again what had stopped."""
        return told(await machine.resume())

    @routes.post("/finish", response_model=MachineState)
    async def finish(which: Finish) -> Response:
        """Complete the round at hand, so that it counts, then stop until `resume`."""
        return told(await machine.finish(which.run))

    @routes.get("/limits", response_model=LimitList)
    async def show_limits() -> Response:
        """All limits, with their defaults and what is allowed."""
        return _limits(await asyncio.to_thread(machine.limits))

    @routes.post("/limits", response_model=LimitList, openapi_extra=_changes())
    async def change_limits(request: Request) -> Response:
        """Change those that are named; null is the default. All or none of them are taken."""
        try:
            changes = _CHANGES.decode(await request.body())
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UserError(f"not a JSON object: {error}") from None
        return _limits(await asyncio.to_thread(machine.set_limits, changes))

    return routes


def _number(text: str) -> int | float:
    """JSON has one kind of numbers: 1.0 is a whole one."""
    number = float(text)
    return int(number) if number.is_integer() else number


_CHANGES: Final = msgspec.json.Decoder(dict[str, Any], float_hook=_number)


def _name(hub: Hub, run: str | None) -> str | None:
    watch = hub.watch(run) if run else None
    return watch.about.name if watch else None


def _limits(limits: Limits) -> Response:
    values, default, schemas = msgspec.to_builtins(limits), msgspec.to_builtins(Limits()), _schemas()
    listed = [
        Limit(name=name, value=values[name], default=default[name], schema=schemas[name])
        for name in Limits.__struct_fields__
    ]
    return Response(LimitList(limits=listed).model_dump_json(by_alias=True), media_type=JSON)


def _schemas() -> dict[str, Any]:
    """What each limit may be, as JSON Schema."""
    _, components = msgspec.json.schema_components([Limits], ref_template="{name}")

    def whole(schema: Any) -> Any:
        if isinstance(schema, list):
            return [whole(part) for part in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return whole(components[schema["$ref"]])
        return {key: whole(part) for key, part in schema.items() if key != "default"}

    properties: dict[str, Any] = whole(components["Limits"]["properties"])
    return properties


def _changes() -> dict[str, Any]:
    """For the OpenAPI page: what `limits` takes."""
    null = {"type": "null"}
    properties = {name: {"anyOf": [*schema.get("anyOf", [schema]), null]} for name, schema in _schemas().items()}
    body = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": body}}}}
