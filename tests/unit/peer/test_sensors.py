"""What other programs tell the sensors: here they are scripts that say what a test wants."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from potluck.peer.limits import Limits
from potluck.peer.sensors import Sensors, gpu_heat_and_power, held_bytes, on_full_screen

Say = Callable[[str, str], None]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Puts a program in front of all others; the text is a shell script."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def put(program: str, script: str) -> None:
        path = tmp_path / program
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        ("61, 215.30", (61.0, 215.3)),
        ("61, 215.30\n74, 100.0", (74.0, 315.3)),
        ("61, [N/A]", (61.0, None)),
        ("[Unknown Error], nan", (None, None)),
        ("", (None, None)),
        ("no devices were found", (None, None)),
    ],
)
def test_gpus_tell_the_hottest_and_what_all_draw(say: Say, answer: str, seen: tuple[float | None, ...]) -> None:
    say("nvidia-smi", f"printf '{answer}\\n'")
    assert gpu_heat_and_power() == seen


def test_a_gpu_that_does_not_answer_tells_nothing(say: Say) -> None:
    say("nvidia-smi", "echo 61, 215; exit 9")
    assert gpu_heat_and_power() == (None, None)


XPROP = """case "$*" in
  *_NET_ACTIVE_WINDOW*) echo '_NET_ACTIVE_WINDOW(WINDOW): window id # {window}' ;;
  *{window}*) echo '_NET_WM_STATE(ATOM) = {state}'; echo 'WM_CLASS(STRING) = "gl", "mpv"' ;;
esac"""


@pytest.mark.parametrize(
    ("window", "state", "seen"),
    [
        ("0x1400003", "_NET_WM_STATE_FULLSCREEN", "mpv"),
        ("0x1400003", "_NET_WM_STATE_ABOVE, _NET_WM_STATE_FULLSCREEN", "mpv"),
        ("0x1400003", "_NET_WM_STATE_MAXIMIZED_VERT", None),
        ("0x0", "_NET_WM_STATE_FULLSCREEN", None),
    ],
)
def test_the_program_that_fills_the_screen_is_named(
    say: Say, monkeypatch: pytest.MonkeyPatch, window: str, state: str, seen: str | None
) -> None:
    monkeypatch.setenv("DISPLAY", ":7")
    say("xprop", XPROP.format(window=window, state=state))
    assert on_full_screen() == seen
    assert Sensors().look(Limits(), ()).fullscreen == seen
    assert Sensors().look(Limits(fullscreen=True), ()).fullscreen is None
    monkeypatch.delenv("DISPLAY")
    assert on_full_screen() is None


def test_a_gpus_heat_counts_as_the_machines(say: Say) -> None:
    say("nvidia-smi", "case $1 in --query-gpu*) echo 149, 321;; esac")
    seen = Sensors().look(Limits(), ())
    assert seen.temperature == 149 and seen.gpu_watts == 321


def test_what_a_process_holds_is_counted_and_one_that_has_ended_holds_nothing() -> None:
    code = "data = bytearray(b'x') * 60_000_000; print('ready', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    with process:
        process.stdout.readline()
        assert 60_000_000 <= held_bytes([process.pid]) < 90_000_000
        process.stdin.close()
        process.wait()
    assert held_bytes([process.pid]) == 0
