"""What was heard of a run, on disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.records import Heartbeat, Signed
from potluck.net.host import PeerId
from potluck.peer import history as module
from potluck.peer.history import AWAY_SECONDS, PEERS_SECONDS, ROUNDS_SECONDS, History

NOW = 1e9


def beat(peer: str, **changes: Any) -> Signed[Heartbeat]:
    fields: dict[str, Any] = {"module": "stage.0", "round": 1, "loss": 2.0, "tokens_per_second": 100.0}
    fields |= {"started": NOW, "sent_at": NOW} | changes
    return Signed(Heartbeat(**fields), PeerId(peer), NOW + 60)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History.write(tmp_path / "history.sqlite")


def test_the_curve_follows_what_most_peers_say(history: History) -> None:
    honest = [beat(f"p{n}", loss=2.0 + n / 100) for n in range(9)]
    history.hear([*honest, beat("liar", loss=1e6, tokens_per_second=1e12)], NOW)
    (point,) = history.curve()
    assert (point.round, point.peers, point.at) == (1, 10, NOW)
    assert point.loss == pytest.approx(2.045)
    assert point.tokens_per_second == 9 * 100.0 + module.MOST_MEDIANS * 100.0


def test_of_a_pipeline_the_same_tokens_count_once(history: History) -> None:
    history.hear([beat("a"), beat("b"), beat("c", module="stage.1"), beat("d", module="stage.1")], NOW)
    assert history.curve()[0].tokens_per_second == 200.0


def test_one_more_heartbeat_in_a_round_replaces_the_last(history: History) -> None:
    history.hear([beat("a", loss=3.0, contributed=0)], NOW)
    history.hear([beat("a", loss=2.5, contributed=1)], NOW + 5)
    (told,) = history.rounds_of("a")
    assert (told.loss, told.contributed, told.at) == (2.5, 1, NOW + 5)
    assert history.curve()[0].loss == 2.5


def test_who_was_silent_for_long_was_away(history: History) -> None:
    for at in (0, 10, 20, 30 + AWAY_SECONDS, 40 + AWAY_SECONDS):
        history.hear([beat("a")], NOW + at)
    heard = history.peer("a")
    assert heard is not None
    assert (heard.first, heard.present, heard.beats) == (NOW, 30.0, 5)
    assert history.peers(since=NOW + AWAY_SECONDS) == [heard]
    assert history.peer("b") is None


def test_what_is_old_is_forgotten_and_the_curve_stays(tmp_path: Path) -> None:
    history = History.write(tmp_path / "history.sqlite")
    history.hear([beat("a")], NOW)
    history.hear([beat("b", round=2)], NOW + ROUNDS_SECONDS + 1)
    assert history.rounds_of("a") == []
    assert history.peer("a") is not None
    history.hear([beat("b", round=3)], NOW + PEERS_SECONDS + 1)
    assert history.peer("a") is None
    assert [point.round for point in history.curve()] == [1, 2, 3]
    assert [point.round for point in history.curve(since_round=2, at_most=1)] == [3]


def test_a_flood_of_identities_takes_no_more_room(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 3)
    history.hear([beat(f"p{n}") for n in range(9)], NOW)
    history.hear([beat("p0"), beat("p9")], NOW + 1)
    assert {heard.peer for heard in history.peers()} == {"p0", "p1", "p2"}
    assert history.curve()[0].peers == 3


def test_a_reader_sees_what_another_connection_writes(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    writer = History.write(path)
    reader = History.read(path)
    before = reader.version()
    writer.hear([beat("a")], NOW)
    assert reader.version() != before
    assert [heard.peer for heard in reader.peers()] == ["a"]
    with pytest.raises(sqlite3.OperationalError):
        reader.hear([beat("b")], NOW)


def test_who_names_another_round_counts_in_the_one_in_which_it_is_heard(history: History) -> None:
    history.hear([beat("a", round=7), beat("b", round=7)], NOW, 7, 15.0)
    history.hear([beat("a", round=8), beat("slow", round=3, loss=5.0)], NOW + 10, 8, 15.0)
    assert [(point.round, point.peers, point.at) for point in history.curve()] == [(7, 2, NOW), (8, 3, NOW + 10)]
    history.hear([beat("a", round=9)], NOW + 20, 9, 15.0)
    assert history.curve()[-1].peers == 2  # b was last heard twenty seconds ago
    assert history.rounds_of("slow")[0].round == 8


def test_rounds_take_bounded_room_and_made_up_peers_make_room(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 5)
    monkeypatch.setattr(module, "MAX_ROWS", 8)
    for round_ in range(5):
        history.hear([beat("true")] + [beat(f"made up {n}") for n in range(9) if not round_], NOW + round_, round_)
    assert len(history.peers()) == 5
    history.hear([beat("true")], NOW + 2000, 6)
    assert [heard.peer for heard in history.peers()] == ["true"]
    for round_ in range(7, 30):
        history.hear([beat("true")], NOW + 2000 * round_, round_)
    assert len(history.rounds_of("true")) <= 10
    assert len(history.curve()) == 29


def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    history = History.write(path)
    history.hear([beat("a")], NOW)
    assert len(history.peers()) == 1


def test_what_another_version_wrote_is_left_out(history: History) -> None:
    history.hear([beat("a"), beat("b")], NOW)
    with history._db:
        history._db.execute("UPDATE peers SET latest = x'c1' WHERE peer = 'a'")
    assert [heard.peer for heard in history.peers()] == ["b"]
    assert history.peer("a") is None


def test_a_file_that_was_removed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    history = History.write(path)
    assert history.is_there()
    path.unlink()
    assert not history.is_there()
    History.write(path)
    assert not history.is_there()


def test_there_is_nothing_to_read_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        History.read(tmp_path / "none.sqlite").peers()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.none() | st.floats(0, 1e6)), max_size=20))
def test_each_round_of_the_curve_counts_its_peers(told: list[tuple[str, int, float | None]]) -> None:
    history = History(sqlite3.connect(":memory:"))
    history._db.executescript(module._TABLES)
    for second, (peer, round_, loss) in enumerate(told):
        history.hear([beat(peer, round=round_, loss=loss)], NOW + second)
    latest = {(peer, round_): loss for peer, round_, loss in told}
    for point in history.curve():
        losses = [loss for (_, round_), loss in latest.items() if round_ == point.round]
        assert point.peers == len(losses)
        known = [loss for loss in losses if loss is not None]
        assert (point.loss is None) == (not known)
        assert point.loss is None or min(known) <= point.loss <= max(known)
