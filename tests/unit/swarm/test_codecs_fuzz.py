"""A few thousand inputs of `tests/fuzz/fuzz_codecs.py`, which is for millions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz" / "fuzz_codecs.py"


def test_a_few_thousand_inputs_find_no_crash_and_no_hang() -> None:
    pytest.importorskip("atheris")
    done = subprocess.run([sys.executable, FUZZ, "--inputs", "3000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("all: 3000 inputs")
