"""A ledger's entries with believable numbers, for tests of what is done with them."""

from __future__ import annotations

from typing import Any

from potluck.incentives.entries import RoundEntry


def round_entry(number: int, validator: str, **changes: Any) -> RoundEntry:
    fields: dict[str, Any] = {
        "module": "model",
        "run": "a" * 52,
        "state": "aa" * 32,
        "next_state": "bb" * 32,
        "beacon": "cc" * 32,
        "loss_before": 3.5,
        "loss_after": 3.25,
        "credit": 0.25,
        "windows": 48,
        "tests": 8,
        "points": 3,
        "error": 0.01,
    }
    return RoundEntry(round=number, validator=validator, **fields | changes)
