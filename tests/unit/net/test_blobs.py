from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import BlobError, BlobUnavailable, DiskFull, RpcRemoteError, UserError
from potluck.net import blobs
from potluck.net.blobs import (
    CHUNK_BYTES,
    BlobId,
    BlobNotFound,
    BlobRef,
    BlobService,
    BlobStore,
    ChunkList,
    chunk_count,
)
from potluck.net.fetch import FetchReport, fetch, fetch_chunks
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc

from fake_net import Net, network

SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]


def blob(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


async def holder(net: Net, name: str, *contents: bytes, **options: Any) -> tuple[Rpc, BlobStore]:
    rpc = await net.rpc(name)
    store = BlobStore(net.directory / f"{name}.blobs", 1 << 30, **options.pop("store", {}))
    BlobService(rpc, store)
    for content in contents:
        store.put(content)
    return rpc, store


async def get(rpc: Rpc, ref: BlobRef, holders: Sequence[Rpc], **options: Any) -> bytes:
    options = {"timeout_seconds": 20, "max_bytes": 1 << 30, **options}
    return bytes(await fetch(rpc, ref, [each.peer_id for each in holders], **options))


# --- chunk lists


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2 * CHUNK_BYTES), max_size=5))
def test_id_is_of_the_concatenation_however_it_is_cut(sizes: list[int]) -> None:
    buffers = [bytes([index]) * size for index, size in enumerate(sizes)]
    assert ChunkList.of(buffers) == ChunkList.of([b"".join(buffers)])


def test_id_depends_on_size_and_content() -> None:
    contents = [b"", b"\0", b"\0\0", blob(CHUNK_BYTES), blob(CHUNK_BYTES) + b"\0"]
    assert len({ChunkList.of([each]).blob_id for each in contents}) == len(contents)


def test_large_input_is_hashed_as_small_input_is() -> None:
    data = blob(9 * CHUNK_BYTES + 5)
    digests = b"".join(ChunkList.of([data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]]).digests for i in range(10))
    assert ChunkList.of([data]).digests == digests


# --- the store


@pytest.mark.parametrize("size", SIZES)
def test_stored_blobs_survive_a_restart(tmp_path: Path, size: int) -> None:
    ref = BlobStore(tmp_path, 1 << 30).put(blob(size))
    store = BlobStore(tmp_path, 1 << 30)
    assert store.has(ref.id) and store.read(ref.id) == blob(size) and store.used_bytes == size
    assert store.chunk_list(ref.id).ref == ref


def test_quota_evicts_the_oldest_but_never_the_pinned(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 3000)
    pinned = store.put(blob(1000, 1), pin=True)
    old, young = store.put(blob(1000, 2)), store.put(blob(1000, 3))
    new = store.put(blob(1000, 4))
    assert store.ids() == [pinned.id, young.id, new.id] and not store.has(old.id)
    with pytest.raises(UserError, match="--disk-quota"):
        store.put(blob(2001, 5))
    assert store.ids() == [pinned.id, young.id, new.id]  # nothing was thrown away for it
    store.unpin(pinned.id)
    store.quota_bytes = 1500
    assert store.evict() == [pinned.id, young.id]
    assert BlobStore(tmp_path, 3000).ids() == [new.id]


def test_same_content_is_stored_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 1500)
    assert store.put(blob(1000)) == store.put(blob(1000))
    assert store.used_bytes == 1000


def test_full_disk_names_the_path_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path, 1 << 30)

    def full(self: Path, target: Path) -> None:
        if str(target).endswith(".blob"):
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match=f"disk is full.*{tmp_path}"):
        store.put(blob(1000))
    assert os.listdir(tmp_path) == [] and not store.ids()


def test_what_is_held_is_on_disk_once_it_was_written(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 1 << 30, clock=lambda: 100.0)
    data, mark = np.frombuffer(blob(CHUNK_BYTES + 5), np.uint8), b"mark"
    ref = store.hold(data, mark, reveal_at=107.0)
    whole = data.tobytes() + mark

    def assert_served() -> None:
        assert store.has(ref.id) and not store.is_lent(ref.id) and store.read(ref.id) == whole
        assert b"".join(store.chunk(ref.id, i) for i in range(2)) == whole
        assert store.seconds_until_revealed(ref.id) == 7.0 and store.used_bytes == ref.size

    assert_served()
    assert np.shares_memory(np.frombuffer(store.chunk(ref.id, 0), np.uint8), data)
    assert store.hold(data, mark) == store.put(data, mark) == ref  # and is revealed no earlier
    store.pin(ref.id)
    store.remove_older(0)
    store.write_held()
    assert_served()
    assert not np.shares_memory(np.frombuffer(store.chunk(ref.id, 0), np.uint8), data)
    store = BlobStore(tmp_path, 1 << 30, clock=lambda: 100.0)
    assert_served()
    store.quota_bytes = 0
    assert store.evict() == []  # it was pinned before it was written


def test_what_is_held_is_gone_without_a_trace_after_a_crash_or_when_it_is_removed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 2500)
    crashed = store.hold(blob(1000)).id
    assert not BlobStore(tmp_path / "other", 2500).has(crashed) and len(os.listdir(tmp_path)) == 2
    store = BlobStore(tmp_path, 2500)
    assert not store.has(crashed) and os.listdir(tmp_path) == ["other"]
    first, second = store.hold(blob(1000, 1)).id, store.hold(blob(1000, 2)).id
    third = store.hold(blob(1000, 3)).id  # for which there is room without the first
    store.remove(second)
    assert store.ids() == [third] and store.used_bytes == 1000
    for gone in (first, second):
        with pytest.raises(BlobNotFound):
            store.chunk(gone, 0)
    store.write_held()
    assert sorted(os.listdir(tmp_path)) == sorted(["other", f"{third}.blob", f"{third}.meta"])
    with pytest.raises(UserError, match="--disk-quota"):
        store.hold(blob(2501, 4))
    assert store.ids() == [third]


def test_what_is_removed_and_held_again_while_it_is_written_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path, 1 << 30)
    ref = store.hold(blob(1000))
    write, calls = blobs._write_views, 0

    def interrupted(file: Any, views: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            store.remove(ref.id)
            store.hold(blob(1000))
        write(file, views)

    monkeypatch.setattr(blobs, "_write_views", interrupted)
    store.write_held()
    assert calls == 1 and store.read(ref.id) == blob(1000) and not list(tmp_path.glob("*.blob"))
    store.write_held()
    assert BlobStore(tmp_path, 1 << 30).read(ref.id) == blob(1000)


def test_a_disk_too_full_for_what_is_held_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = BlobStore(tmp_path, 1 << 30)
    with monkeypatch.context() as patch, pytest.raises(DiskFull, match=f"disk is full.*{tmp_path}"):
        patch.setattr(os, "posix_fallocate", full)
        store.hold(blob(1000))
    assert os.listdir(tmp_path) == [] and not store.ids() and store.used_bytes == 0
    ref = store.hold(blob(1000))
    with monkeypatch.context() as patch, pytest.raises(DiskFull, match=f"disk is full.*{tmp_path}"):
        patch.setattr(blobs, "_write_views", full)
        store.write_held()
    assert store.read(ref.id) == blob(1000) and not BlobStore(tmp_path / "other", 1 << 30).has(ref.id)
    store.write_held()
    assert BlobStore(tmp_path, 1 << 30).read(ref.id) == blob(1000)


def test_unfinished_and_damaged_files_are_removed_at_start(tmp_path: Path) -> None:
    ref = BlobStore(tmp_path, 1 << 30).put(blob(1000))
    other = BlobStore(tmp_path, 1 << 30).put(blob(2000))
    (tmp_path / f"{other.id}.blob").write_bytes(b"short")
    (tmp_path / "x.blob.123.tmp").write_bytes(b"half")
    (tmp_path / "orphan.blob").write_bytes(b"?")
    (tmp_path / "bad.meta").write_bytes(b"\xc1")
    assert BlobStore(tmp_path, 1 << 30).ids() == [ref.id]
    assert sorted(os.listdir(tmp_path)) == [f"{ref.id}.blob", f"{ref.id}.meta"]


def test_arrays_are_served_from_memory_without_a_copy(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 0)
    arrays = [np.arange(300_000, dtype=np.float32), np.ones((700, 500), np.float16), np.zeros(0)]
    chunks = ChunkList.of(arrays)
    ref = store.add_memory(chunks, arrays)
    whole = b"".join(array.tobytes() for array in arrays)
    assert store.read(ref.id) == whole
    assert b"".join(store.chunk(ref.id, i) for i in range(chunk_count(ref.size))) == whole
    assert np.shares_memory(np.frombuffer(store.chunk(ref.id, 0), np.uint8), arrays[0])
    store.drop_memory(ref.id)
    with pytest.raises(BlobNotFound):
        store.open(ref.id)


# --- fetching


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["memory", "store", "into"])
def test_fetched_is_what_was_stored(short_dir: Path, size: int, where: str) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, _ = await holder(net, "a", blob(size))
            b, store = await holder(net, "b")
            ref, report = ChunkList.of([blob(size)]).ref, FetchReport()
            into = memoryview(bytearray(size))
            options = {"store": {"store": store}, "into": {"into": into}}.get(where, {})
            progress: list[int] = []
            got = await get(
                b, ref, [a], report=report, on_progress=lambda done, total: progress.append(done), **options
            )
            assert got == blob(size)
            if where == "store" and size:
                assert store.read(ref.id) == got and not list(store.root.glob("*.part"))
            if where == "into":
                assert bytes(into) == got
            if size:
                assert progress[-1] == size and report.bytes_by_holder[a.peer_id] >= size

    asyncio.run(main())


def test_size_is_checked_before_anybody_is_asked(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            b = await net.rpc("b")
            with pytest.raises(BlobError, match="at most 10"):
                await get(b, BlobRef(BlobId("00"), 1 << 60), [], max_bytes=10)

    asyncio.run(main())


class Lying(BlobStore):
    """Every chunk has one wrong byte."""

    def chunk(self, blob_id: BlobId, index: int) -> memoryview:
        data = bytearray(super().chunk(blob_id, index))
        data[-1] ^= 1
        return memoryview(data)


@pytest.mark.parametrize("size", [1000, 20 * CHUNK_BYTES])
def test_liar_is_dropped_and_named_and_its_chunks_come_from_others(short_dir: Path, size: int) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, _ = await holder(net, "a", blob(size))
            liar = await net.rpc("liar")
            lying = Lying(short_dir / "lying", 1 << 30)
            BlobService(liar, lying)
            ref, report = lying.put(blob(size)), FetchReport()
            b = await net.rpc("b")
            assert await get(b, ref, [liar, a], report=report) == blob(size)
            assert report.liars == [liar.peer_id] and liar.peer_id in report.reasons
            with pytest.raises(BlobUnavailable, match=f"{liar.peer_id[-8:]}.*hash"):
                await get(b, ref, [liar])

    asyncio.run(main())


def test_false_chunk_list_is_a_lie(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            data = blob(3 * CHUNK_BYTES)
            a, _ = await holder(net, "a", data)
            liar, b = await net.rpc("liar"), await net.rpc("b")

            async def lie(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                return Reply({}, bytes(96))

            liar.register("blob.list", lie)
            report = FetchReport()
            assert await get(b, ChunkList.of([data]).ref, [liar, a], report=report) == data
            assert report.liars == [liar.peer_id]

    asyncio.run(main())


def test_holder_that_dies_in_the_middle_is_replaced(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            data = blob(40 * CHUNK_BYTES)
            a, _ = await holder(net, "a", data)
            c, _ = await holder(net, "c", data)
            b = await net.rpc("b")
            report = FetchReport()

            def progress(done: int, total: int) -> None:
                if done > 5 * CHUNK_BYTES:
                    a.host.die()  # type: ignore[attr-defined]

            got = await get(b, ChunkList.of([data]).ref, [a, c], report=report, on_progress=progress)
            assert got == data and report.bytes_by_holder[c.peer_id] > 0 and not report.liars

    asyncio.run(main())


def test_frozen_holder_does_not_hold_up_the_end(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            data = blob(12 * CHUNK_BYTES)
            a, _ = await holder(net, "a", data)
            frozen, _ = await holder(net, "frozen", data)
            b = await net.rpc("b")

            async def never(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                await asyncio.Future()
                return Reply()

            frozen._methods.pop("blob.get")
            frozen.register("blob.get", never)
            report = FetchReport()
            got = await get(b, ChunkList.of([data]).ref, [frozen, a], report=report, timeout_seconds=60)
            assert got == data and report.bytes_by_holder.get(frozen.peer_id, 0) <= 32 * 12
            assert not frozen._loads or await _drained(frozen)

    asyncio.run(main())


async def _drained(rpc: Rpc) -> bool:
    async with asyncio.timeout(10):
        while rpc._loads:
            await asyncio.sleep(0.01)
    return True


def test_late_holder_is_asked_again(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, store = await holder(net, "a")
            b = await net.rpc("b")
            data = blob(2 * CHUNK_BYTES)
            report = FetchReport()
            call = asyncio.create_task(get(b, ChunkList.of([data]).ref, [a], report=report))
            while not report.retries:
                await asyncio.sleep(0.01)
            store.put(data)
            assert await call == data and report.retries >= 1

    asyncio.run(main())


def test_blob_is_served_from_its_reveal_on(short_dir: Path) -> None:
    async def main() -> None:
        now = 100.0
        async with network(short_dir) as net:
            a, store = await holder(net, "a", store={"clock": lambda: now})
            b = await net.rpc("b")
            ref = store.put(b"secret", reveal_at=110.5)
            assert store.read(ref.id) == b"secret"  # to its owner at once
            with pytest.raises(RpcRemoteError, match=r"10\.5") as error:
                await b.call(a.peer_id, "blob.get", {"id": ref.id, "index": 0}, timeout_seconds=10)
            assert error.value.kind == "BlobNotRevealed"
            with pytest.raises(BlobUnavailable, match="BlobNotRevealed"):
                await get(b, ref, [a], timeout_seconds=0.3)
            store = BlobStore(store.root, 1 << 30, clock=lambda: now)
            assert store.seconds_until_revealed(ref.id) == 10.5  # also after a restart
            now = 110.5
            assert await get(b, ref, [a]) == b"secret"

    asyncio.run(main())


def test_interrupted_fetch_resumes_from_disk(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            data = blob(10 * CHUNK_BYTES + 3)
            ref = ChunkList.of([data]).ref
            a, _ = await holder(net, "a", data)
            b, store = await holder(net, "b")
            half = asyncio.Event()
            call = asyncio.create_task(
                get(
                    b,
                    ref,
                    [a],
                    store=store,
                    window=1,
                    on_progress=lambda done, total: half.set() if done > total // 2 else None,
                )
            )
            await half.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert not store.has(ref.id) and store.used_bytes == len(data)
            again, report = BlobStore(store.root, 1 << 30), FetchReport()  # as after a restart
            assert await get(b, ref, [a], store=again, report=report) == data
            assert report.resumed_bytes > len(data) // 2
            assert sum(report.bytes_by_holder.values()) == len(data) - report.resumed_bytes
            assert BlobStore(store.root, 1 << 30).read(ref.id) == data

    asyncio.run(main())


def test_two_fetches_of_one_blob_into_one_store_do_not_disturb_each_other(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            data = blob(6 * CHUNK_BYTES)
            ref = ChunkList.of([data]).ref
            a, _ = await holder(net, "a", data)
            b, store = await holder(net, "b")
            both = await asyncio.gather(*(get(b, ref, [a], store=store) for _ in range(2)))
            assert both == [data, data] and store.read(ref.id) == data

    asyncio.run(main())


def test_nobody_has_it_lists_every_reason(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, _ = await holder(net, "a")
            gone, b = await net.rpc("gone"), await net.rpc("b")
            gone.host.die()  # type: ignore[attr-defined]
            with pytest.raises(BlobUnavailable) as error:
                await get(b, ChunkList.of([b"x"]).ref, [a, gone], timeout_seconds=0.5)
            assert a.peer_id[-8:] in str(error.value) and gone.peer_id[-8:] in str(error.value)
            assert "BlobNotFound" in str(error.value) and "not reached" in str(error.value)
            with pytest.raises(BlobUnavailable, match="no holder is known"):
                await get(b, ChunkList.of([b"x"]).ref, [])

    asyncio.run(main())


@pytest.mark.parametrize("part", [{"start": 7}, {"start": 7, "size": 0}, {"size": 5}, {"start": 7, "size": 13}])
def test_a_part_of_a_chunk_is_those_bytes(short_dir: Path, part: dict[str, int]) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            data = blob(20)
            a, _ = await holder(net, "a", data)
            b = await net.rpc("b")
            head = {"id": ChunkList.of([data]).blob_id, "index": 0, **part}
            reply = await b.call(a.peer_id, "blob.get", head, timeout_seconds=10)
            start = part.get("start", 0)
            assert bytes(reply.body) == data[start : start + part.get("size", 20)]

    asyncio.run(main())


@pytest.mark.parametrize("head", [{}, {"id": 3}, {"id": "x"}, {"id": "x", "index": "y"}, {"id": "../../etc"}])
def test_malformed_requests_are_answered_with_an_error(short_dir: Path, head: dict[str, Any]) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, _ = await holder(net, "a", b"content")
            b = await net.rpc("b")
            for method in ("blob.get", "blob.list"):
                with pytest.raises(RpcRemoteError) as error:
                    await b.call(a.peer_id, method, head, timeout_seconds=10)
                assert error.value.kind in ("ProtocolError", "BlobNotFound")

    asyncio.run(main())


@pytest.mark.parametrize("part", [{"start": -1}, {"start": 8}, {"size": -1}, {"start": 3, "size": 5}, {"start": "0"}])
def test_a_part_outside_of_its_chunk_is_refused(short_dir: Path, part: dict[str, Any]) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, store = await holder(net, "a", b"content")
            b = await net.rpc("b")
            with pytest.raises(RpcRemoteError) as error:
                await b.call(a.peer_id, "blob.get", {"id": store.ids()[0], "index": 0, **part}, timeout_seconds=10)
            assert error.value.kind == "ProtocolError"

    asyncio.run(main())


def test_what_an_earlier_session_left_goes_unless_pinned(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 1 << 20)
    old, pinned = store.put(b"old").id, store.put(b"pinned", pin=True).id
    for path in tmp_path.iterdir():
        os.utime(path, (1.0, 1.0))
    new = store.put(b"new").id
    again = BlobStore(tmp_path, 1 << 20)
    again.remove_older(3600)
    assert (again.has(old), again.has(pinned), again.has(new)) == (False, True, True)


def test_a_slow_disk_does_not_keep_readers_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path, 1 << 20)
    ready = store.put(b"ready").id
    writing, go_on = threading.Event(), threading.Event()
    write = BlobStore._write

    def slow(self: BlobStore, path: Path, data: Any, sync: bool) -> None:
        writing.set()
        assert go_on.wait(30)
        write(self, path, data, sync)

    monkeypatch.setattr(BlobStore, "_write", slow)
    thread = threading.Thread(target=store.put, args=(b"slow",))
    thread.start()
    assert writing.wait(30)
    assert bytes(store.chunk(ready, 0)) == b"ready" and store.used_bytes == len(b"ready") + len(b"slow")
    go_on.set()
    thread.join()
    assert store.used_bytes == len(b"ready") + len(b"slow") and len(store.ids()) == 2


def test_memory_that_two_have_lent_stays_until_both_take_it_back(tmp_path: Path) -> None:
    store, data = BlobStore(tmp_path / "s", 10**6), b"x" * 100
    chunks = ChunkList.of([data])
    for _ in range(2):
        store.add_memory(chunks, [data])
    store.drop_memory(chunks.blob_id)
    assert bytes(store.chunk(chunks.blob_id, 0)) == data
    store.drop_memory(chunks.blob_id)
    assert not store.has(chunks.blob_id)
    store.drop_memory(chunks.blob_id)
    store.add_memory(chunks, [data])
    assert store.has(chunks.blob_id)


@pytest.mark.parametrize("size", [1000, 3 * CHUNK_BYTES + 7])
def test_chunks_that_were_kept_are_shown_to_others_who_check_them(short_dir: Path, size: int) -> None:
    content = blob(size)

    async def main() -> None:
        async with network(short_dir) as net:
            (owner, theirs), (between, kept), (asker, none) = [
                await holder(net, name, *contents) for name, contents in [("a", [content]), ("b", []), ("c", [])]
            ]
            ref, noted = BlobRef(theirs.ids()[0], size), list[Any]()

            async def chunk(rpc: Rpc, store: BlobStore, of: Rpc, index: int, kept: Any = None) -> bytes:
                found: dict[int, memoryview] = {}
                await fetch_chunks(
                    rpc,
                    ref,
                    of.peer_id,
                    [index],
                    timeout_seconds=0.5 if of is between else 20,
                    on_chunk=found.__setitem__,
                    room=lambda size: memoryview(bytearray(size)),
                    store=store,
                    kept=kept,
                )
                return bytes(found[index])

            last = chunk_count(size) - 1
            right = content[last * CHUNK_BYTES :]
            for _ in range(2):
                assert await chunk(between, kept, owner, last, noted) == right
            assert noted == 2 * [(ref.id, last)]
            assert not kept.has(ref.id) and kept.used_bytes == 0
            assert await chunk(asker, none, between, last) == right
            if last:
                with pytest.raises(BlobUnavailable):
                    await chunk(asker, none, between, 0)
            kept.drop_chunk(ref.id, last)
            assert await chunk(asker, none, between, last) == right
            kept.drop_chunk(ref.id, last)
            with pytest.raises(BlobUnavailable):
                await chunk(asker, none, between, last)
            kept.drop_chunk(ref.id, last)
            assert not kept._loose and not kept._loose_added

    asyncio.run(main())
