"""What a peer offers its group."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potluck.errors import CapTooLow
from potluck.net.blobs import BlobStore
from potluck.net.pace import Pace
from potluck.swarm.exchange import NetworkExchange


def offer(folder: Path, rate: float | None, size: int) -> Any:
    async def go() -> Any:
        rpc: Any = SimpleNamespace(upload=Pace(rate))
        store = BlobStore(folder, 10**9)
        exchange = NetworkExchange(None, rpc, store, 60.0, 3, pull_seconds=2.0)  # type: ignore[arg-type]
        return await exchange.offer([bytes(size)], 0.0)

    return asyncio.run(go())


def test_a_contribution_that_nobody_could_have_in_time_is_not_offered(tmp_path: Path) -> None:
    with pytest.raises(CapTooLow, match="raise the cap to 52 kB/s at least"):
        offer(tmp_path, 50_000, 100_000)
    assert not list(tmp_path.glob("*.blob"))


@pytest.mark.parametrize("rate", [None, 60_000])
def test_what_passes_in_time_is_offered(tmp_path: Path, rate: float | None) -> None:
    assert offer(tmp_path, rate, 100_000).size == 100_000
