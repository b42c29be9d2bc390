"""The command line: help with examples, sizes, `run new`, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from potluck.cli.demo import _check_out as check_out
from potluck.cli.display import event_line, spark_line
from potluck.cli.main import main
from potluck.cli.options import parse_bytes
from potluck.cli.session import check_network_options
from potluck.cli.status import _text as status_text
from potluck.cli.why import _names as names_of
from potluck.cli.why import _text as why_text
from potluck.dht.records import Heartbeat, Signed
from potluck.errors import UserError
from potluck.net.host import PeerId
from potluck.peer.history import History
from potluck.peer.home import Home
from potluck.swarm.phases import Round

COMMANDS = ["host", "join", "status", "why", "leave", "export", "generate", "demo", "run new"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["potluck", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert "Example:" in text and "--json" in text


def test_exit_codes_are_documented(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    assert "Exit codes: 0 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("10GB", 10**10), ("512 mb", 512 * 10**6), ("1.5K", 1500), ("7", 7), ("9B", 9)),
        *(("8GiB", 8 * 2**30), ("1.5 kib", 1536)),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes("--disk-quota", text) == size


@pytest.mark.parametrize("way", ["upload", "download"])
def test_an_empty_limit_is_not_taken_for_none(way: str) -> None:
    limits: dict[str, Any] = {"upload_limit": None, "download_limit": None, f"{way}_limit": ""}
    with pytest.raises(UserError, match=f"--{way}-limit ''"):
        check_network_options(None, None, "1GB", **limits)


@pytest.mark.parametrize("text", ["", "ten", "-5", "5XB", "1e9", "5iB", "5Ki"])
def test_sizes_that_are_none_name_the_setting(text: str) -> None:
    with pytest.raises(UserError, match="--disk-quota"):
        parse_bytes("--disk-quota", text)


def test_run_new_writes_what_host_reads_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "run.toml")
    assert run(monkeypatch, "run", "new", path, "--set", "rounds.seconds=30", "--set", "codec.name=sparse") == 0
    settings = tomllib.loads(Path(path).read_text())
    assert settings["rounds"]["seconds"] == 30.0 and settings["codec"]["name"] == "sparse"
    assert run(monkeypatch, "run", "new", path) == 2
    assert "--force" in capsys.readouterr().err
    assert run(monkeypatch, "run", "new", path, "--force", "--preset", "nothing") == 2
    assert run(monkeypatch, "run", "new", path, "--force", "--set", "rounds.secondz=1") == 4
    assert "secondz" in capsys.readouterr().err
    assert run(monkeypatch, "no-such-command") == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["codec.name=foo"], "codec.name is 'foo', this program knows demo, int4, int8, none, sign, sparse"),
        (["aggregation.rule=foo"], "aggregation.rule is 'foo'"),
        (
            ["codec.name=sparse", "codec.parameters.k=0"],
            "codec.parameters of sparse (k = 0): k must be 1 to 4096, the values of a chunk",
        ),
        (["codec.name=sparse", "codec.parameters.k=1.5"], "codec.parameters.k is 1.5, allowed are whole numbers"),
        (["codec.name=sparse", "codec.parameters.foo=9"], "codec.parameters.foo: sparse has chunk, k, beta"),
        (["codec.name=none", "codec.parameters.k=9"], "codec.parameters.k: none has no settings"),
        (["rounds.exchange_seconds=0.0001"], "exchange_seconds"),
    ],
)
def test_run_new_refuses_what_host_would_refuse(
    settings: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    assert run(monkeypatch, "run", "new", str(path), *(each for text in settings for each in ("--set", text))) == 4
    assert said in " ".join(capsys.readouterr().err.split())
    assert not path.exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"sat_out": {"round": 7, "reason": "cap_too_low"}}, "round 7 is sat out: nobody could fetch"),
        ({"counted": False}, "your contribution did not count last round"),
        ({"missing": {"p1": "busy"}}, "missing last round: p1: busy"),
        ({"late": {"p2": 0.6}}, "late in the round before: p2: by 0.6 s"),
        ({"missing": {"p1": "busy"}, "names": {"p1": "anna"}}, "missing last round: p1 anna: busy"),
        ({"late": {"p2": 0.6}, "names": {"p2": "bert"}}, "late in the round before: p2 bert: by 0.6 s"),
        ({"leaving": True, "leaving_after_round": 7}, "leaving after round 7"),
        ({"leaving": True, "leaving_after_round": None}, "leaving as soon as it has joined"),
    ],
)
def test_why_says_what_became_of_contributions_and_of_leaving(answer: dict[str, Any], said: str) -> None:
    base = {"phase": "training", "now": 0.0, "waits": [], "alone": False, "rounds_alone": 0, "missing": {}, "late": {}}
    assert said in why_text({**base, "counted": True, "sat_out": None, **answer})


@pytest.mark.parametrize("sat_out", [None, {"round": 7, "reason": "cap_too_low"}])
def test_status_says_that_a_round_was_sat_out(sat_out: dict[str, Any] | None) -> None:
    answer = {"run": "a" * 52, "run_name": "r", "phase": "training", "round": 8, "loss": 1.0, "tokens_per_second": 1.0}
    peer = {"peer": "p", "name": "anna", "group": [], "alone": False, "pipeline": None, "validates": None}
    network = {"bytes_sent": 0, "bytes_received": 0, "invite": "potluck:..."}
    text = status_text({**answer, **peer, **network, "sat_out": sat_out})
    assert ("round 7 is sat out: nobody could fetch" in text) == (sat_out is not None)


def test_why_names_those_who_were_heard_of(tmp_path: Path) -> None:
    path, peer = tmp_path / "history.sqlite", PeerId("12D3KooWCHA12mx7eyUNJDQNmAoz4n2ds3sLWmpNzPhTgciM4uPR")
    assert names_of(path, [peer]) == {}  # without telemetry
    with closing(History.write(path)) as history:
        beat = Heartbeat(round=Round(3), name="an\u202ena", started=0.0, sent_at=0.0)
        history.hear([Signed(beat, peer, 0.0)], now=1.0)
    assert names_of(path, [peer, "p2"]) == {peer: "anna"}


@pytest.mark.parametrize(
    ("size", "contributed", "says"), [(100, False, True), (100, True, False), (0, False, False), (0, True, False)]
)
def test_a_round_says_whether_ones_own_contribution_did_not_count(size: int, contributed: bool, says: bool) -> None:
    event = {
        **{"event": "swarm.round.applied", "round": 3, "loss": 2.0, "tokens": 10, "seconds": {"train": 1.0}},
        **{"group": ["p1"], "missing": {}, "alone": False, "agree": True, "bytes_sent": 0, "bytes_received": 0},
    }
    line = event_line({**event, "contribution_bytes": size, "contributed": contributed})
    assert ("your contribution did not count" in str(line)) == says


def test_a_new_run_of_the_same_name_tells_how_to_go_on_with_the_old_one() -> None:
    line = event_line({"event": "peer.run.new", "run": "n" * 52, "other": "o" * 52})
    assert line and "a new run, nnnnnnnn:" in line and "to go on with oooooooo, undo" in line and "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["host", "x.toml", "--rounds", "0"], "--rounds"),
        (["demo", "--stages", "nine"], "--stages"),
        (["why", "--bogus"], "--bogus"),
        (["join"], "invite"),
    ],
)
def test_usage_errors_as_json_name_the_option(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments, "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert named in told["error"] and (told["kind"], told["exit_code"]) == ("UsageError", 2)


def test_an_interrupt_anywhere_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Home, "runs", interrupted)
    assert run(monkeypatch, "status", "--home", str(tmp_path)) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_the_peer_is_loaded_says_that_nothing_is_lost(number: str) -> None:
    code = "import os, signal, pathlib; from potluck.cli.session import _end_while_loading as end; "
    code += f"end(pathlib.Path('/home/anna')); os.kill(os.getpid(), signal.{number}); import torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted before it had joined: nothing is lost, /home/anna keeps what it has")


def test_a_demo_writes_over_nothing_but_an_earlier_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert run(monkeypatch, "demo", "--fast", "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"--out {tmp_path}: 'thesis.tex'" in said and "choose a new or an empty folder" in said
    out = tmp_path / "out"
    check_out(out)
    (out / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="'model' in it"):
        check_out(out)
    (out / "model" / "potluck-manifest.json").touch()
    (out / "validator.ledger").touch()
    check_out(out)
    with pytest.raises(UserError, match=r"--out .*choose another folder"):
        check_out(out / "validator.ledger")


@pytest.mark.parametrize("values", [[], [1.0], [3.0, 2.0, 1.0]])
def test_spark_lines_have_one_mark_a_value(values: list[float]) -> None:
    assert len(spark_line(values)) == len(values)


def test_events_nobody_reads_are_not_shown() -> None:
    assert event_line({"event": "swarm.round.started"}) is None
    assert "50 %" in str(event_line({"event": "swarm.state.progress", "bytes": 5, "of": 10}))


def test_ctrl_c_while_commands_are_imported_ends_without_a_traceback() -> None:
    script = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "potluck.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from potluck.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGINT and not ended.stdout and not ended.stderr


def test_who_begins_with_the_run_is_not_told_that_it_is_alone() -> None:
    def line(round_: int, from_round: int) -> str:
        return event_line({"event": "swarm.join.alone", "round": round_, "from_round": from_round}) or ""

    assert "alone" not in line(0, 0)
    assert "round 3" in line(7, 3) and "alone" in line(7, 3)
