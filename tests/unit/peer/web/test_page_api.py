"""The JSON API against its own description: schemathesis asks what a stranger might."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from sample_run import peer
from schemathesis import GenerationMode

from potluck.peer.home import RunFolder
from potluck.peer.web.app import create_app

TOKEN = "t" * 43
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_every_answer_is_as_described(folder: RunFolder, machine: Any, mode: GenerationMode) -> None:
    app = create_app(lambda: [folder], machine=machine, token=TOKEN, hosts=["testserver"])
    asyncio.run(app.state.hub.poll(0.0))
    described = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app, headers=BEARER)
    operations = described.exclude(path_regex="/events$").get_all_operations()  # that one never ends
    asked = {ask(operation.ok(), folder, mode) for operation in operations}
    assert len(asked) == 12
    for watch in app.state.hub.watches:
        watch.close()


def ask(operation: Any, folder: RunFolder, mode: GenerationMode) -> str:
    known = {"run": folder.run_id, "peer": peer(3)}  # what is made up would hardly ever be known

    @settings(max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode.is_positive and case.path_parameters:
            case.path_parameters = {name: known[name] for name in case.path_parameters}
        if mode.is_positive and isinstance(case.body, dict) and "schedule" in case.body:
            case.body["schedule"] = ["22:00-07:00"]  # that a text is a span of hours, no schema says
        case.call_and_validate(headers=BEARER)

    try:
        check()
    except Unsatisfiable:
        assert mode.is_negative, "nothing can be wrong where nothing is taken"
    return str(operation.label)


def test_the_whole_api_is_described(folder: RunFolder, machine: Any) -> None:
    app = create_app(lambda: [folder], machine=machine, token=TOKEN)
    paths = set(app.openapi()["paths"])
    assert {path.replace("/api/v1", "") for path in paths} == {
        "/runs",
        "/runs/{run}",
        "/runs/{run}/curve",
        "/runs/{run}/peers",
        "/runs/{run}/contributors",
        "/runs/{run}/peers/{peer}",
        "/runs/{run}/events",
        "/machine",
        "/machine/pause",
        "/machine/resume",
        "/machine/finish",
        "/machine/limits",
    }


def test_pages_load_nothing_from_elsewhere() -> None:
    pages = Path(create_app.__code__.co_filename).parent / "pages"
    for path in pages.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text, path.name
        assert "onclick=" not in text or path.suffix == ".js", path.name
