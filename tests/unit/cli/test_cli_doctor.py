"""`potluck doctor` without an invite: what is printed, what is kept, exit codes."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.cli.main import main
from potluck.net.identity import Identity
from potluck.peer import checkup
from potluck.peer.benchmark import Speed


def potluck(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["potluck", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture
def home() -> Iterator[Path]:
    """Short: pytest's own folders are too long for sockets, which is a finding."""
    folder = Path(tempfile.mkdtemp(prefix="pl", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that were measured, instead of measuring them."""
    devices: list[str] = []

    def measure(device: str) -> Speed:
        devices.append(device)
        return Speed(1234.0, 12_000_000, device, 1.0)

    monkeypatch.setattr(checkup, "measure", measure)
    return devices


def diagnosis(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = potluck("doctor", "--json", "--device", "cpu", *arguments)
    return code, json.loads(capsys.readouterr().out)


def test_help_has_examples_and_the_options_of_join(capsys: pytest.CaptureFixture[str]) -> None:
    assert potluck("doctor", "--help") == 0
    text = capsys.readouterr().out
    assert text.count("Example:") == 2
    for option in ("--json", "--home", "--loopback", "--listen", "--announce", "--disk-quota", "--fresh"):
        assert option in text


def test_the_speed_is_measured_once(home: Path, measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--home", home)
    assert diagnosis(capsys, *where, "--no-benchmark")[1]["machine"]["speed"] is None and measured == []
    for _ in range(2):
        code, said = diagnosis(capsys, *where)
        assert code == 0 and said["machine"]["speed"]["tokens_per_second"] == 1234.0 and measured == ["cpu"]
    assert diagnosis(capsys, *where, "--no-benchmark")[1]["machine"]["speed"] is not None
    assert diagnosis(capsys, *where, "--fresh")[0] == 0 and measured == ["cpu", "cpu"]
    assert diagnosis(capsys, *where, "--threads", "1")[0] == 0
    assert [path.name for path in home.iterdir()] == ["benchmark.json"]


def test_json_is_one_object_with_findings_and_the_machine(
    home: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = diagnosis(capsys, "--home", home)
    assert code == 0 and said["ok"] is True and said["recommendation"] is None
    assert all(finding.keys() == {"name", "status", "seen", "fix"} for finding in said["findings"])
    names = [finding["name"] for finding in said["findings"]]
    assert {"python", "packages", "libp2p daemon", "device", "memory", "disk", "key", "open files", "speed"} <= set(
        names
    )
    assert said["machine"]["device"] == "cpu" and said["machine"]["home"] == str(home)
    assert said["machine"]["cores"] >= 1 and said["machine"]["memory_bytes"] > 0


def test_people_read_a_table_with_the_fix_beside_the_finding(
    home: Path, measured: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    Identity.create(home / "identity.key")
    (home / "identity.key").chmod(0o644)
    assert potluck("doctor", "--device", "cpu", "--home", home) == 3
    [key] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert "key" in key and "chmod 600" in key and "choose another --home" in key


def test_a_key_that_others_can_read_ends_with_the_exit_code_of_joining(
    home: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with an invite: no libp2p daemon starts with such a key."""
    Identity.create(home / "identity.key")
    (home / "identity.key").chmod(0o644)
    invite = f"potluck:{'a' * 52}"
    code, said = diagnosis(capsys, invite, "--home", home)
    assert code == 3 and not said["ok"] and said["recommendation"]["role"] == "none"
    assert "bootstrap peers" not in [finding["name"] for finding in said["findings"]]


def test_a_home_that_cannot_be_made_is_a_finding(
    home: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").write_text("")
    code, said = diagnosis(capsys, "--home", home / "file" / "home")
    [failed] = [finding for finding in said["findings"] if finding["status"] == "fail"]
    assert code == 2 and failed["name"] == "home" and "--home" in failed["fix"] and measured == []


def test_a_benchmark_that_fails_is_a_finding(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: str) -> Speed:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(checkup, "measure", measure)
    code, said = diagnosis(capsys, "--home", home)
    [failed] = [finding for finding in said["findings"] if finding["status"] == "fail"]
    assert code == 5 and failed["name"] == "speed" and "no kernel image" in failed["seen"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["garbage"], 4, "potluck:"),
        (["--disk-quota", "10KB"], 2, "--disk-quota"),
        (["--listen", "4001"], 2, "--listen"),
        (["--fresh", "--no-benchmark"], 2, "--fresh"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_looked_at(
    arguments: list[str], code: int, says: str, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert potluck("doctor", "--json", *arguments) == code
    out, err = capsys.readouterr()
    assert says in err and json.loads(out)["exit_code"] == code and measured == []
