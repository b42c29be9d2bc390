"""Live events: one encoding for all, the newest for the slow, an end for everybody."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sqlite3
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.records import Heartbeat, Signed
from potluck.net.host import PeerId
from potluck.peer.history import History
from potluck.peer.home import Home, RunFolder
from potluck.peer.web import stream
from potluck.peer.web.app import create_app
from potluck.peer.web.serve import serve
from potluck.peer.web.stream import GZIP, Event, Full, Hub, Viewer, place_of


@pytest.fixture
def live(tmp_path: Path, folder: RunFolder) -> Iterator[tuple[RunFolder, History]]:
    signed = folder.manifest()
    assert signed
    own = Home(tmp_path).open().run(folder.run_id)
    own.save_manifest(signed)
    history = History.write(own.history)
    yield own, history
    history.close()


def say(history: History, round_: int, peer: str = "p") -> None:
    now = time.time()
    beat = Heartbeat(module="stage.0", round=round_, loss=2.0, started=now, sent_at=now)
    history.hear([Signed(beat, PeerId(peer), now + 60)], now)


def with_hub(folder: RunFolder, body: Callable[[Hub, str], Awaitable[None]], **options: Any) -> None:
    async def go() -> None:
        hub = Hub(lambda: [folder], **options)
        await hub.poll(0.0)
        await body(hub, folder.run_id)
        hub.close()
        for watch in hub.watches:
            watch.close()

    asyncio.run(asyncio.wait_for(go(), 20))


async def following(viewer: Viewer, count: int) -> list[Event]:
    found = []
    async for event in viewer.events():
        found.append(event)
        if len(found) == count:
            break
    return found


def state_in(event: Event) -> dict[str, Any]:
    head, data = event.plain.decode().split("data: ")
    assert "event: state\n" in head
    return dict(json.loads(data))


def test_a_viewer_gets_the_state_at_once_and_whenever_something_is_new(live: tuple[RunFolder, History]) -> None:
    folder, history = live
    say(history, 1)

    async def body(hub: Hub, run: str) -> None:
        async with hub.viewing(run) as viewer:
            events = viewer.events()
            assert await anext(events) == stream.RETRY
            assert state_in(await anext(events))["round"] == 1
            say(history, 2)
            await hub.poll(time.monotonic() + 1)
            event = await anext(events)
            assert state_in(event)["round"] == 2 and state_in(event)["latest"]["round"] == [1, 2]

    with_hub(folder, body)


def test_each_event_is_encoded_once_for_all(live: tuple[RunFolder, History], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, history = live
    say(history, 1)

    async def body(hub: Hub, run: str) -> None:
        watch = hub.watch(run)
        assert watch
        made, state = [], watch.state
        monkeypatch.setattr(watch, "state", lambda: made.append(1) or state())
        viewers = [hub.viewing(run) for _ in range(20)]
        opened = [await viewer.__aenter__() for viewer in viewers]
        say(history, 2)
        await hub.poll(time.monotonic() + 1)
        events = [(await following(viewer, 2))[1] for viewer in opened]
        assert len({id(event) for event in events}) == 1 and state_in(events[0])["round"] == 2
        assert len(made) == 2  # when the first one came, and for the new round
        for viewer in viewers:
            await viewer.__aexit__(None, None, None)
        assert hub.viewers == 0

    with_hub(folder, body)


@given(st.lists(st.binary(max_size=2000), max_size=8))
def test_events_that_were_compressed_one_by_one_make_up_one_stream(events: list[bytes]) -> None:
    opener, read = zlib.decompressobj(31), b""
    opener.decompress(GZIP)
    for data in events:
        read += opener.decompress(Event.of(data).packed)
        assert read.endswith(data), "each can be read when it comes"
    assert read == b"".join(events)


def test_a_slow_viewer_skips_to_the_newest_and_holds_no_more_than_one(live: tuple[RunFolder, History]) -> None:
    folder, history = live
    say(history, 1)

    async def body(hub: Hub, run: str) -> None:
        async with hub.viewing(run) as viewer:
            for round_ in range(2, 30):
                say(history, round_)
                await hub.poll(time.monotonic() + 100 * round_)
            events = await following(viewer, 2)
            assert state_in(events[1])["round"] == 29

    with_hub(folder, body)


def test_nothing_is_encoded_while_nobody_looks_and_nothing_twice_in_a_moment(live: tuple[RunFolder, History]) -> None:
    folder, history = live

    async def body(hub: Hub, run: str) -> None:
        say(history, 1)
        await hub.poll(time.monotonic() + 1)
        assert hub.events_sent == 0
        async with hub.viewing(run):
            say(history, 2)
            await hub.poll(time.monotonic() + 0.01)
            assert hub.events_sent == 1  # the one that it came with
            await hub.poll(time.monotonic() + 1)
            assert hub.events_sent == 2
            await hub.poll(time.monotonic() + 2)
            assert hub.events_sent == 2  # nothing is new
            await hub.poll(time.monotonic() + 2 + stream.AGAIN_SECONDS)
            assert hub.events_sent == 3  # but time has passed: somebody may be gone

    with_hub(folder, body)


def test_beyond_the_limit_viewers_are_turned_away_until_one_leaves(live: tuple[RunFolder, History]) -> None:
    async def body(hub: Hub, run: str) -> None:
        async with hub.viewing(run):
            async with hub.viewing(run):
                with pytest.raises(Full):
                    await hub.viewing(run).__aenter__()
            async with hub.viewing(run):
                assert hub.viewers == 2

    with_hub(live[0], body, max_viewers=2)


def test_a_silent_run_sends_comments_so_that_who_is_gone_is_noticed(
    live: tuple[RunFolder, History], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.01)

    async def body(hub: Hub, run: str) -> None:
        async with hub.viewing(run) as viewer:
            events = await following(viewer, 4)
            assert events[0] == stream.RETRY and events[2:] == [stream.BEAT, stream.BEAT]

    with_hub(live[0], body)


@pytest.mark.parametrize("how", ["closed", "left"])
def test_closing_and_a_run_that_is_left_end_every_stream(live: tuple[RunFolder, History], how: str) -> None:
    async def go() -> None:
        folders = [live[0]]
        hub = Hub(lambda: folders)
        await hub.poll(0.0)
        async with hub.viewing(live[0].run_id) as viewer:
            reading = asyncio.create_task(following(viewer, 100))
            if how == "closed":
                hub.close()
            else:
                folders.clear()
                await hub.poll(10.0)
            assert len(await asyncio.wait_for(reading, 5)) <= 3
        with pytest.raises(Full if how == "closed" else KeyError):
            await hub.viewing(live[0].run_id).__aenter__()
        for watch in hub.watches:
            watch.close()

    asyncio.run(go())


def test_live_events_outlive_a_look_that_fails_and_say_so_once(
    live: tuple[RunFolder, History], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when no file can be opened any more."""
    folder, history = live
    say(history, 1)
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(stream, "APART_SECONDS", 0.0)

    async def body(hub: Hub, run: str) -> None:
        watch = hub.watch(run)
        assert watch
        looks, good = [0], watch.look

        def failing() -> bool:
            looks[0] += 1
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(watch, "look", failing)
        polling = asyncio.create_task(hub.run())
        while looks[0] < 5:
            await asyncio.sleep(0.001)
        async with hub.viewing(run) as viewer:  # there is still room, and a state
            events = viewer.events()
            assert await anext(events) == stream.RETRY and state_in(await anext(events))["round"] == 1
            say(history, 2)
            monkeypatch.setattr(watch, "look", good)
            while state_in(await anext(events))["round"] < 2:
                pass
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling

    with caplog.at_level(logging.ERROR):
        with_hub(folder, body)
    assert [record.name for record in caplog.records] == ["potluck.peer.web.stream"]


def test_a_row_of_another_version_ends_nothing(
    live: tuple[RunFolder, History], caplog: pytest.LogCaptureFixture
) -> None:
    folder, history = live
    say(history, 1)
    with sqlite3.connect(folder.history) as database:
        database.execute("INSERT INTO peers VALUES ('odd', 1, ?, 1, 1, ?)", (time.time(), b"\x81\xa5round\xa3new"))
    database.close()

    async def body(hub: Hub, run: str) -> None:
        watch = hub.watch(run)
        assert watch
        async with hub.viewing(run) as viewer:
            await hub.poll(time.monotonic() + 1)
            watch.answer("peers", lambda: watch.peers(10, 0))
            watch.answer_from_ledgers("contributors", lambda: watch.contributors(10, 0))
            with sqlite3.connect(folder.history) as again:
                again.execute("DELETE FROM peers WHERE peer = 'odd'")
            again.close()
            await hub.poll(time.monotonic() + 2)
            events = await following(viewer, 2)
            assert state_in(events[1])["round"] == 1 and state_in(events[1])["peers"] == 1

    with_hub(folder, body)
    assert caplog.records == []


def test_requests_do_not_hold_live_events_up(live: tuple[RunFolder, History]) -> None:
    """Every thread for requests is busy, one with the history and one with the ledgers."""
    folder, history = live
    say(history, 1)
    end = threading.Event()

    async def body(hub: Hub, run: str) -> None:
        watch = hub.watch(run)
        assert watch
        busy = threading.Barrier(3)

        def slow() -> None:
            busy.wait(10)
            end.wait(10)

        def slow_query() -> None:
            with watch._history.reading():
                slow()

        asking = [asyncio.create_task(asyncio.to_thread(watch.answer, "slow", slow_query))]
        asking += [asyncio.create_task(asyncio.to_thread(watch.answer_from_ledgers, "slow", slow))]
        while busy.n_waiting < 2:
            await asyncio.sleep(0.001)
        busy.wait(10)
        asking += [asyncio.create_task(asyncio.to_thread(end.wait, 10)) for _ in range(64)]  # more than it has threads
        try:
            async with asyncio.timeout(5), hub.viewing(run) as viewer:
                say(history, 2)
                await hub.poll(time.monotonic() + 1)
                assert state_in((await following(viewer, 2))[1])["round"] == 2
        finally:
            end.set()
            await asyncio.gather(*asking)

    with_hub(folder, body)


def test_one_address_does_not_take_the_room_of_all(
    live: tuple[RunFolder, History], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "VIEWERS_OF_PLACE", 2)

    async def body(hub: Hub, run: str) -> None:
        async with hub.viewing(run, "203.0.113.7"), hub.viewing(run, "::ffff:203.0.113.7"):
            with pytest.raises(Full, match="one address"):
                await hub.viewing(run, "203.0.113.7").__aenter__()
            async with hub.viewing(run, "203.0.113.8"):
                pass
        async with hub.viewing(run, "203.0.113.7"):
            assert hub.viewers == 1
        async with hub.viewing(run, "127.0.0.1"), hub.viewing(run, "127.0.0.1"), hub.viewing(run, "127.0.0.1"):
            assert hub.viewers == 3, "a reverse proxy asks for everybody"
        assert not hub._places

    with_hub(live[0], body)


@pytest.mark.parametrize(
    "address, place",
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8::1", "20010db800000000/64"),
        ("2001:db8::ffff:1", "20010db800000000/64"),
        *(("127.0.0.1", None), ("127.9.9.9", None), ("::1", None), ("::ffff:127.0.0.1", None)),
        *(("fe80::1%eth0", "fe80000000000000/64"), ("", None), ("testclient", None)),
    ],
)
def test_who_is_counted_together(address: str, place: str | None) -> None:
    assert place_of(address) == place


def test_a_viewer_that_never_reads_is_not_written_to_without_end(folder: RunFolder) -> None:
    """The server stops 64 KiB beyond what the system takes, and a viewer has room for one event."""

    async def go() -> int:
        app = create_app(lambda: [folder])
        hub: Hub = app.state.hub
        async with serve(app) as url:
            address = urlsplit(url)
            with socket.socket() as silent:
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # else the system takes much of it
                silent.connect((address.hostname, address.port))
                path = f"/api/v1/runs/{folder.run_id}/events"
                silent.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
                while not hub.events_sent:
                    await asyncio.sleep(0.005)
                (viewer,) = hub._channels[folder.run_id].viewers
                while viewer._event:  # the state, which is small
                    await asyncio.sleep(0.005)
                return sum([await taken(viewer) for _ in range(60)])

    async def taken(viewer: Viewer) -> bool:
        """Whether the server took what it was offered."""
        event = Event(b":" + b" " * 1_000_000 + b"\n\n", b"")
        viewer.offer(event)
        for _ in range(20):
            await asyncio.sleep(0)
        return viewer._event is not event

    assert 0 < asyncio.run(asyncio.wait_for(go(), 20)) < 30
