"""What a peer offers its group."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potluck.errors import BlobError, CapTooLow
from potluck.net.blobs import CHUNK_BYTES, BlobNotFound, BlobRef, BlobStore, ChunkList
from potluck.net.host import PeerId
from potluck.net.pace import Pace
from potluck.swarm.exchange import NetworkExchange


def offer(folder: Path, rate: float | None, size: int, uploads: int = 1) -> Any:
    async def go() -> Any:
        rpc: Any = SimpleNamespace(upload=Pace(rate))
        store = BlobStore(folder, 10**9)
        exchange = NetworkExchange(None, rpc, store, 60.0, 3, pull_seconds=2.0, uploads=uploads)  # type: ignore[arg-type]
        return await exchange.offer([bytes(size)], 0.0)

    return asyncio.run(go())


def test_a_contribution_that_nobody_could_have_in_time_is_not_offered(tmp_path: Path) -> None:
    with pytest.raises(CapTooLow, match="raise the cap to 104 kB/s"):
        offer(tmp_path, 50_000, 100_000)
    assert not list(tmp_path.glob("*.blob"))


def test_in_slices_what_is_aggregated_has_to_pass_an_upload_cap_too(tmp_path: Path) -> None:
    with pytest.raises(CapTooLow, match=r"of 0.10 MB is to be had, and as much .*raise the cap to 104 kB/s"):
        offer(tmp_path, 103_000, 100_000, uploads=2)
    assert offer(tmp_path, 104_000, 100_000, uploads=2).size == offer(tmp_path, 103_000, 100_000).size == 100_000


@pytest.mark.parametrize(("rate", "enough"), [(None, True), (60_000, True), (50_000, False)])
def test_a_download_cap_that_is_too_low_is_named_with_what_would_do(
    rate: float | None, enough: bool, tmp_path: Path
) -> None:
    async def go() -> None:
        rpc: Any = SimpleNamespace(download=Pace(rate))
        NetworkExchange(None, rpc, BlobStore(tmp_path, 10**9), 60.0, 3).check_download(100_000, 2.0)  # type: ignore[arg-type]

    if enough:
        asyncio.run(go())
    else:
        with pytest.raises(CapTooLow, match=r"download cap of 50 kB/s is too low.* raise the cap to 104 kB/s"):
            asyncio.run(go())


def test_chunks_of_a_blob_here_that_has_another_size_are_refused(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 10**9)
    ref = store.put(b"small")
    exchange = NetworkExchange(None, None, store, 60.0, 3)  # type: ignore[arg-type]
    wrong = BlobRef(ref.id, 5 * CHUNK_BYTES)
    with pytest.raises(BlobError, match="does not have"):
        asyncio.run(exchange.fetch_chunks(wrong, PeerId("p"), [3], 1.0, lambda index, data: None))


@pytest.mark.parametrize("how", ["settled", "closed"])
def test_what_was_offered_outlives_the_process_once_it_is_settled(tmp_path: Path, how: str) -> None:
    async def go() -> BlobRef:
        rpc: Any = SimpleNamespace(upload=Pace(None))
        exchange = NetworkExchange(None, rpc, BlobStore(tmp_path, 10**9), 60.0, 3)  # type: ignore[arg-type]
        ref = await exchange.offer([b"contri", b"bution"], 1e10)
        assert not list(tmp_path.glob("*.blob"))
        if how == "settled":
            await exchange.settle()
        else:
            exchange.close()
        return ref

    ref = asyncio.run(go())
    again = BlobStore(tmp_path, 10**9)
    assert again.read(ref.id) == b"contribution" and again.seconds_until_revealed(ref.id) > 0


@pytest.mark.parametrize("rate", [None, 60_000])
def test_what_passes_in_time_is_offered(tmp_path: Path, rate: float | None) -> None:
    assert offer(tmp_path, rate, 100_000).size == 100_000


def test_chunks_that_were_kept_go_with_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = BlobStore(tmp_path, 10**9), bytes(1000)
    ref = ChunkList.of([data]).ref

    async def fetched(rpc: Any, ref: BlobRef, holder: PeerId, indexes: Any, *, kept: Any, **options: Any) -> None:
        store.add_chunk(ChunkList.of([data]), 0, memoryview(data))
        kept.append((ref.id, 0))

    monkeypatch.setattr("potluck.swarm.exchange.fetch_chunks", fetched)

    async def go() -> None:
        one, other = (NetworkExchange(None, None, store, 60.0, 3) for _ in range(2))  # type: ignore[arg-type]
        for exchange in (one, other):
            await exchange.fetch_chunks(ref, PeerId("p"), [0], 1.0, lambda index, data: None, [])
        one.close()
        assert bytes(store.chunk(ref.id, 0)) == data
        other.close()
        with pytest.raises(BlobNotFound):
            store.chunk(ref.id, 0)

    asyncio.run(go())
