"""hivemind in a simulation: its modules ask the machine for the time, and here they are told the simulation's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any


class HivemindInVirtualTime:
    """A context manager. hivemind's clock is a name that each of its modules imported; and hivemind spells out every
    peer id again and again, which thousands of peers would spend a fifth of their time on."""

    def __init__(self, utc: Callable[[], float]) -> None:
        self._utc = utc
        self._patched: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        import base58

        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("hivemind") and hasattr(module, "get_dht_time"):
                self._patch(module, "get_dht_time", self._utc)
        for name in ("b58encode", "b58decode"):
            self._patch(base58, name, lru_cache(maxsize=65536)(getattr(base58, name)))

    def _patch(self, module: Any, name: str, value: Any) -> None:
        self._patched.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def __exit__(self, *exc: Any) -> None:
        for module, name, value in self._patched:
            setattr(module, name, value)
