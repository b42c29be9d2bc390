"""The documents: what can be checked of them."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from potluck.sim.plan import Churn, Fault, Lines, Plan, WeatherPart

DOCS = Path(__file__).parents[2] / "docs"


def test_the_glossary_has_each_word_once() -> None:
    rows = [line.split("|")[1] for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    words = [word.strip() for row in rows for word in row.split(",")]
    assert len(words) > 20 and len(words) == len(set(words))


def test_the_settings_of_a_plan_are_all_there_with_their_defaults() -> None:
    rows = (line.split(" | ") for line in (DOCS / "simulation.md").read_text().splitlines() if line.startswith("| `"))
    told = {row[0].strip("|` "): row[1] for row in rows if len(row) == 3}
    parts: dict[str, type[BaseModel]] = {"fault": Fault, "lines": Lines, "weather": WeatherPart, "churn": Churn}
    settings = {name: field for name, field in Plan.model_fields.items() if name not in parts}
    for part, model in parts.items():
        settings |= {f"{part}.{name}": field for name, field in model.model_fields.items()}
    defaults = {
        name: "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        for name, field in settings.items()
    }
    assert told == {name: text.replace("null", "none") for name, text in defaults.items()}
