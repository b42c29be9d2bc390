"""Live events: one encoding for all, the newest for the slow, an end for everybody."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.records import Heartbeat, Signed
from potluck.net.host import PeerId
from potluck.peer.history import History
from potluck.peer.home import Home, RunFolder
from potluck.peer.web import stream
from potluck.peer.web.stream import GZIP, Event, Full, Hub, Viewer


@pytest.fixture
def live(tmp_path: Path, folder: RunFolder) -> tuple[RunFolder, History]:
    signed = folder.manifest()
    assert signed
    own = Home(tmp_path).open().run(folder.run_id)
    own.save_manifest(signed)
    return own, History.write(own.history)


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
