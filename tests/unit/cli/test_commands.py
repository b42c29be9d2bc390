"""The command line: help with examples, sizes, `run new`, exit codes."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from potluck.cli.display import event_line, spark_line
from potluck.cli.main import main
from potluck.cli.options import parse_bytes
from potluck.cli.why import _text as why_text
from potluck.errors import UserError

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


@pytest.mark.parametrize(("text", "size"), [("10GB", 10**10), ("512 mb", 512 * 10**6), ("1.5K", 1500), ("7", 7)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes("--disk-quota", text) == size


@pytest.mark.parametrize("text", ["", "ten", "-5", "5XB", "1e9"])
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
        (["codec.name=sparse", "codec.parameters.k=0"], "codec.parameters of sparse (k = 0): k must be 1 to chunk"),
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
    ],
)
def test_why_says_what_became_of_ones_own_contribution(answer: dict[str, Any], said: str) -> None:
    base = {"phase": "training", "now": 0.0, "waits": [], "alone": False, "rounds_alone": 0, "missing": {}, "late": {}}
    assert said in why_text({**base, "counted": True, "sat_out": None, **answer})


@pytest.mark.parametrize("values", [[], [1.0], [3.0, 2.0, 1.0]])
def test_spark_lines_have_one_mark_a_value(values: list[float]) -> None:
    assert len(spark_line(values)) == len(values)


def test_events_nobody_reads_are_not_shown() -> None:
    assert event_line({"event": "swarm.round.started"}) is None
    assert "50 %" in str(event_line({"event": "swarm.state.progress", "bytes": 5, "of": 10}))
