"""The benchmarks of contributions still run, in their smallest form, and end with the figures that they promise."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def figures(name: str, *options: str) -> dict[str, Any]:
    """Of a benchmark's last line."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        try:
            said, complained = script.communicate(timeout=250)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)  # peers, too
    assert script.returncode == 0, complained[-3000:]
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def test_codecs() -> None:
    found = figures("codecs", "--parameters", "1", "--repeats", "1", "--threads", "1")
    assert {"memcpy_gb_s", "hivemind_uniform8_gb_s", "bitsandbytes_gb_s"} <= found.keys()
    assert set(found["codecs"]) == {"none", "int8", "int4", "sparse", "demo", "sign"}
    for codec in found["codecs"].values():
        assert codec["bytes_per_param"] > 0 and codec["encode_gb_s"] > 0 and codec["decode_gb_s"] > 0
    assert found["codecs"]["sparse"]["bytes_per_param"] < 0.021


def test_averaging() -> None:
    ways = "none,int8,sparse,float32,uniform8"
    found = figures(
        "averaging", "--only", "loopback", "--ways", ways, "--parameters", "1", "--peers", "2", "--syncs", "1"
    )
    assert all(found[name] > 0 for name in ("int8_speedup", "int8_cpu_ratio", "none_speedup"))
    rows = found["rows"]["loopback"]
    assert [row["one_state"] for row in rows if row["way"] in ("none", "int8", "sparse")] == [True] * 3


def test_overlap() -> None:
    found = figures("overlap", "--rounds", "4", "--seeds", "1")
    assert 0 < found["blocking_utilization"] < found["overlap_utilization"] <= 1
    assert 0.5 < found["loss_ratio"] < 2


def test_byzantine() -> None:
    found = figures("byzantine", "--steps", "10", "--peers", "4", "--liars", "1")
    assert found["honest_loss"] > 0
    assert {"mean", "trimmed_mean", "median", "nearest", "geometric_median", "centered_clip"} <= found["table"].keys()
    for losses in found["table"].values():
        assert losses.keys() == {"scale", "flip", "random", "nan", "collude"}


def test_convergence(tmp_path: Path) -> None:
    found = figures("convergence", "--quick", "--methods", "ddp,h10_none", "--out", str(tmp_path), "--json")
    assert found["ddp_loss"] > 0 and found["h10_none_ratio"] > 0
