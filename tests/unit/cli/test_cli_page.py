"""`potluck top` and `potluck page`, as far as they need no daemon."""

from __future__ import annotations

import json
import stat
import sys
import time
import webbrowser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from sample_run import write_run

from potluck.cli.page import _open, page
from potluck.cli.top import find_folder, top
from potluck.errors import NetworkError, UserError
from potluck.peer.home import Home, RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("home"), time.time(), rounds=30, peers=6, stages=2)


def home_of(folder: RunFolder) -> Path:
    return folder.path.parent.parent


def test_top_shows_the_run_and_its_peers(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    top(folder.run_id[:8], home=home_of(folder), once=True)
    shown = capsys.readouterr().out
    assert "small-llama" in shown and "bo-4090" in shown and "stage.1" in shown and "round 29" in shown
    top(None, home=home_of(folder), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["run"]["round"] == 29 and told["run"]["peers"] == len(told["peers"]) == 4


def test_top_finds_a_run_by_invite_prefix_or_as_the_latest_also_of_a_monitor(folder: RunFolder, tmp_path: Path) -> None:
    signed = folder.manifest()
    assert signed
    watched = Home(tmp_path / "monitors").open().run(folder.run_id)
    watched.save_manifest(signed)
    for which in (None, folder.run_id[:6], f"potluck:{folder.run_id}"):
        assert find_folder(home_of(folder), which).path == folder.path
        assert find_folder(tmp_path, which).path == watched.path
    for home, which in ((tmp_path / "none", None), (home_of(folder), "zzzz")):
        with pytest.raises(UserError, match="potluck monitor"):
            find_folder(home, which)


def test_without_a_daemon_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="potluck daemon"):
        page(home=tmp_path)


def test_the_token_is_handed_to_the_browser_where_no_other_user_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    for token in ("secret", "another"):  # also over the last one's file
        _open(tmp_path / "page.html", f"http://127.0.0.1:1/?token={token}")
        assert token in (tmp_path / "page.html").read_text()
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    assert opened == [(tmp_path / "page.html").as_uri()] * 2
