"""What is shown follows from what was heard, and what strangers say of themselves does little harm."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.records import Heartbeat, Signed
from potluck.net.host import PeerId
from potluck.peer import telemetry
from potluck.peer.history import Heard, History, PeerPoint, Point
from potluck.peer.home import Home, RunFolder
from potluck.peer.intervals import lasting_seconds
from potluck.peer.web import watch as watching
from potluck.peer.web.views import (
    SHOWN,
    About,
    clean,
    here,
    modules_of,
    peer_view,
    run_state,
    said_by,
    uptime,
)
from potluck.peer.web.watch import Kept, Watch

NOW = 1e9
ABOUT = About("a" * 52, "run", "llama", 30.0, ("stage.0", "stage.1"), ())  # type: ignore[arg-type]


def heard(peer: str, **changes: Any) -> Heard:
    fields: dict[str, Any] = {"first": NOW - 1000, "last": NOW - 5, "present": 500.0, "beats": 3}
    beat: dict[str, Any] = {"module": "stage.0", "round": 7, "started": NOW, "sent_at": NOW}
    for name, value in changes.items():
        (fields if name in fields else beat)[name] = value
    return Heard(peer=peer, latest=Heartbeat(**beat), **fields)


def point(round_: int, loss: float | None = 2.0, speed: float = 100.0) -> Point:
    return Point(round_, NOW + round_, 3, loss, speed)


@given(st.floats(2, 86400), st.integers(0, 100_000))
def test_who_sends_as_often_as_peers_do_is_never_taken_for_gone(seconds: float, peers: int) -> None:
    assert lasting_seconds(seconds, peers) >= 3 * telemetry.interval_seconds(seconds, peers)


def test_who_was_not_heard_for_three_intervals_is_away() -> None:
    peers = [heard("a"), heard("b", last=NOW - 89), heard("c", last=NOW - 91)]
    assert [one.peer for one in here(peers, 30.0, NOW)] == ["a", "b"]


def test_a_module_that_nobody_serves_is_shown_and_named() -> None:
    state = run_state(ABOUT, [point(1)], [heard("a")], NOW, 0, None)
    assert [(module.module, module.replicas) for module in state.modules] == [("stage.0", 1), ("stage.1", 0)]
    assert state.unserved == ["stage.1"]
    nobody = run_state(ABOUT, [point(1)], [heard("a", last=NOW - 1000)], NOW, 0, None)
    assert (nobody.peers, nobody.unserved, nobody.tokens_per_second, nobody.heard_at) == (0, [], 0.0, NOW - 1000)


def test_the_map_is_bounded_whatever_peers_call_their_modules() -> None:
    odd = [heard(f"p{n}", module=f"odd/{n}") for n in range(2000)]
    many = [heard(f"q{n}", load=n / 1000) for n in range(1000)]
    modules = modules_of([*odd, *many], ABOUT.modules)
    assert len(modules) <= SHOWN and sum(len(module.shown) for module in modules) <= 2 * SHOWN
    (first,) = modules_of(many, ["stage.0"])
    assert first.replicas == 1000 and len(first.shown) == SHOWN and first.shown[0].peer == "q999"


def test_validators_and_observers_are_no_replicas() -> None:
    assert modules_of([heard("a", role="validator"), heard("b", role="observer")], ["stage.0"])[0].replicas == 0


def test_the_newest_round_counts_for_the_loss_and_the_last_whole_one_for_the_speed() -> None:
    state = run_state(
        ABOUT, [point(1), point(2, speed=300.0), point(3, loss=None, speed=20.0)], [heard("a")], NOW, 0, None
    )
    assert (state.round, state.loss, state.tokens_per_second) == (3, 2.0, 300.0)
    assert state.latest.round == [1, 2, 3] and state.latest.loss == [2.0, 2.0, None]


@given(st.text())
def test_names_neither_turn_nor_hide_nor_break_lines(name: str) -> None:
    assert clean(name).isprintable()


def test_a_name_keeps_its_letters() -> None:
    assert clean(" zoë\u202e<b>\n ") == "zoë<b>"


def test_uptime_is_the_part_that_it_was_there() -> None:
    assert uptime(heard("a"), NOW) == 0.5
    assert uptime(heard("a", first=NOW - 10, present=0.0), NOW) == 1.0
    assert uptime(heard("a", first=NOW + 50), NOW) == 1.0
    assert peer_view(heard("a"), True, NOW).uptime == 0.5


def test_columns_are_of_one_length() -> None:
    said = said_by([PeerPoint(1, "stage.0", None, 5.0, 1, NOW), PeerPoint(2, None, 2.0, 6.0, 2, NOW + 30)])
    assert {len(column) for column in said.model_dump().values()} == {2}


def watch_of(home: Path, folder: RunFolder) -> Watch:
    signed = folder.manifest()
    assert signed
    own = Home(home).open().run(folder.run_id)
    own.save_manifest(signed)
    return Watch(own, signed.manifest, None)


def test_a_run_whose_files_are_not_there_yet_is_empty_and_then_fills(tmp_path: Path, folder: RunFolder) -> None:
    watch = watch_of(tmp_path, folder)
    watch.look()
    assert watch.state().round is None and watch.curve(0, 10).round == [] and watch.peers(10, 0).total == 0
    assert watch.contributors(10, 0, None).total == 0 and watch.peer("x") is None  # type: ignore[union-attr]
    assert watch.look() is False
    history = History.write(watch.folder.history)
    beat = Heartbeat(module="stage.0", round=1, loss=2.0, started=time.time(), sent_at=time.time())
    history.hear([Signed(beat, PeerId("p"), time.time() + 60)], time.time())
    assert watch.look() is True and watch.state().round == 1
    history.hear([Signed(beat, PeerId("q"), time.time() + 60)], time.time())
    assert watch.look() is True and watch.look() is False
    history.close()
    watch.close()


def test_a_round_that_is_not_yet_does_not_lead_the_curve(tmp_path: Path, folder: RunFolder) -> None:
    watch = watch_of(tmp_path, folder)
    history = History.write(watch.folder.history)
    beats = [Heartbeat(round=n, loss=2.0, started=0.0, sent_at=1.0) for n in (3, 4, 4_000_000_000)]
    history.hear([Signed(one, PeerId(f"p{n}"), 2.0) for n, one in enumerate(beats)], time.time())
    history.close()
    watch.look()
    assert watch.state().round == 4 and watch.curve(0, 10).round == [3, 4]
    watch.close()


@pytest.mark.parametrize("points, every", [(1000, 1), (30, 2), (7, 9)])
def test_a_long_curve_is_thinned_from_its_beginning_to_its_end(folder: RunFolder, points: int, every: int) -> None:
    signed = folder.manifest()
    assert signed
    watch = Watch(folder, signed.manifest, None)
    watch.look()
    curve = watch.curve(0, points)
    assert curve.every == every and len(curve.round) <= points
    assert curve.round[0] < every and curve.round[-1] >= 60 - every
    watch.close()


def test_what_was_answered_is_answered_again_until_something_changes(folder: RunFolder) -> None:
    signed = folder.manifest()
    assert signed
    watch = Watch(folder, signed.manifest, None)
    watch.look()
    made = []

    def make() -> Any:
        made.append(1)
        return watch.state()

    first = watch.answer("state", make)
    assert watch.answer("state", make) is first and len(made) == 1
    watch.version = (0, 0, 0)
    assert watch.answer("state", make) is not first and len(made) == 2
    watch.close()


def test_the_history_is_decoded_once_whatever_is_asked(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watch_of(tmp_path, folder)
    history = History.write(watch.folder.history)
    beat = Heartbeat(module="stage.0", round=1, loss=2.0, started=time.time(), sent_at=time.time())
    history.hear([Signed(beat, PeerId(f"p{n}"), time.time() + 60) for n in range(50)], time.time())
    watch.look()
    decoded, all_peers = [], History.peers
    monkeypatch.setattr(History, "peers", lambda self, since=0.0: decoded.append(since) or all_peers(self, since))
    for n in range(20):
        assert watch.answer(f"peers 10 {n}", partial(watch.peers, 10, n))
        assert watch.answer_from_ledgers(f"contributors 10 {n}", partial(watch.contributors, 10, n))
        assert watch.live(patient=True)
    assert len(decoded) == 2, "once for whoever asks, once for live events"
    history.close()
    watch.close()


def test_what_took_long_is_made_again_after_a_while_and_for_live_events_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    kept = Kept("x", (1, 1, 1), made_at=100.0, took=0.1)
    assert kept.good((1, 1, 1)) and not kept.good((1, 2, 1)) and kept.good((1, 2, 1), patient=True)
    now[0] += 2.1  # a twentieth of the time
    assert kept.good((1, 1, 1)) and not kept.good((1, 2, 1), patient=True)
    now[0] += 3.0
    assert not kept.good((1, 1, 1)) and not Kept("x", (1, 1, 1), 100.0, took=60.0).good((1, 2, 1), patient=True)


def test_many_threads_may_ask_at_once_while_it_is_looked_at_and_closed(tmp_path: Path, folder: RunFolder) -> None:
    watch = watch_of(tmp_path, folder)
    history = History.write(watch.folder.history)
    beat = Heartbeat(module="stage.0", round=1, loss=2.0, started=time.time(), sent_at=time.time())
    history.hear([Signed(beat, PeerId(f"p{n}"), time.time() + 60) for n in range(20)], time.time())
    start = threading.Barrier(5)

    def asks(number: int) -> None:
        start.wait(10)
        for n in range(200):
            key = f"{number} {n}"
            if number == 0:
                watch.look()
                watch.version = (0, n, 0)
            elif number == 1:
                watch.live()
            else:
                watch.answer(key, partial(watch.peers, 5, n))
                watch.answer_from_ledgers(key, partial(watch.peer, f"p{n % 20}"))
        watch.close()

    with ThreadPoolExecutor(5) as threads:
        for done in [threads.submit(asks, number) for number in range(5)]:
            done.result(20)
    with watch._history.reading() as closed:
        assert closed is None
    history.close()
