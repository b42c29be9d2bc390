"""A container's limits, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potluck.peer import hardware
from potluck.peer.cgroups import Allowed, allowed

MB = 2**20


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text + "\n")


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "self"
    path.write_text(text + "\n")
    return path


def test_the_narrowest_group_around_counts(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    write(root / "a", memory__max=str(800 * MB), memory__current=str(300 * MB), cpu__max="max 100000")
    write(root / "a" / "b", memory__max="max", cpu__max="150000 100000")
    (root / "a" / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MB}\nactive_file 7\n")
    found = allowed(root, own(tmp_path, "0::/a/b"))
    assert found == Allowed(800 * MB, 600 * MB, 1.5)


def test_inside_of_a_container_the_own_group_is_the_root(tmp_path: Path) -> None:
    write(tmp_path / "fs", memory__max=str(100 * MB), memory__current=str(200 * MB), cpu__max="50000 100000")
    for text in ("0::/", "0::/not/seen/here", "0::/../.."):
        assert allowed(tmp_path / "fs", own(tmp_path, text)) == Allowed(100 * MB, 0, 0.5)


def test_version_one_has_other_names(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    write(root / "memory" / "x", memory__limit_in_bytes=str(64 * MB), memory__usage_in_bytes=str(16 * MB))
    write(root / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    write(root / "cpu,cpuacct" / "x", **{"cpu__cfs_quota_us": "200000", "cpu__cfs_period_us": "100000"})
    found = allowed(root, own(tmp_path, "5:memory:/x\n4:cpu,cpuacct:/x\n1:name=systemd:/"))
    assert found == Allowed(64 * MB, 48 * MB, 2.0)


@pytest.mark.parametrize("text", ["", "garbage", "0::", "::::", "0::/\x00"])
def test_what_is_no_group_limits_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path / "fs", memory__max="much", cpu__max="-1", memory__current="")
    assert allowed(tmp_path / "fs", own(tmp_path, text)) == Allowed()
    assert allowed(tmp_path / "nothing", tmp_path / "nowhere") == Allowed()


def test_a_containers_memory_and_cores_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "allowed", lambda: Allowed(300 * MB, 200 * MB, 1.5))
    machine = hardware.detect()
    assert (machine.memory_bytes, machine.free_bytes) == (300 * MB, 200 * MB) and machine.cores <= 2
    assert hardware.free_memory(torch.device("cpu")) == 200 * MB
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert hardware.default_threads() == 1
    monkeypatch.setattr(hardware, "allowed", lambda: Allowed())
    assert hardware.default_threads() is None and hardware.free_memory(torch.device("cpu")) > 0


def test_a_gpus_cap_counts_as_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    capped: list[float] = []
    device, cuda = torch.device("cuda", 0), torch.cuda
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: type("Properties", (), {"total_memory": 1000})())
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", lambda part, _: capped.append(part))
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda _: capped[-1] if capped else 1.0)
    monkeypatch.setattr(cuda, "memory_reserved", lambda _: 100)
    monkeypatch.setattr(cuda, "mem_get_info", lambda _: (700, 1000))
    assert hardware.free_memory(device) == 700
    hardware.cap_gpu_memory(device, 400)
    assert capped == [0.4] and hardware.free_memory(device) == 300
    hardware.cap_gpu_memory(device, 5000)
    assert capped[-1] == 1.0
    hardware.cap_gpu_memory(torch.device("cpu"), 1)
    assert len(capped) == 2
