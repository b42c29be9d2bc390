"""The documents: what can be checked of them."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_glossary_has_each_word_once() -> None:
    rows = [line.split("|")[1] for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    words = [word.strip() for row in rows for word in row.split(",")]
    assert len(words) > 20 and len(words) == len(set(words))
