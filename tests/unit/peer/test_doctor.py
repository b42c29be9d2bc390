"""`doctor.py`: what is found from facts, and the fix beside it; and the sensors that need no network."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from potluck.dht.manifest import Manifest, ModelPart
from potluck.dht.template import preset_draft
from potluck.errors import DaemonError, HardwareError, ManifestError, NetworkError, RpcRemoteError
from potluck.net.autonat import DialBack
from potluck.net.blobs import CHUNK_BYTES, BlobId, ChunkList
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.nat import NatKind
from potluck.net.pace import Pace
from potluck.net.rpc import Reply
from potluck.peer import benchmark, checkup, hardware
from potluck.peer.benchmark import Speed, SpeedCache
from potluck.peer.checkup import look_at_home, p2pd_problem, weigh
from potluck.peer.doctor import (
    Finding,
    exit_code,
    line_findings,
    machine_findings,
    network_findings,
    reachability,
    recommend,
    run_findings,
    settled,
    step_seconds,
)
from potluck.peer.facts import Dialled, Download, HomeFacts, MachineFacts, NetworkFacts, Package, RunFacts, Upload
from potluck.peer.hardware import Accelerator, Machine
from potluck.peer.home import Home
from potluck.peer.line_cache import Line, LineCache
from potluck.peer.probe import Asked, sample
from potluck.peer.settings import PeerSettings

PEER = PeerId("12D3KooWCHA12mx7eyUNJDQNmAoz4n2ds3sLWmpNzPhTgciM4uPR")
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
GB = 10**9

GPU = Accelerator("cuda:0", "NVIDIA T4", 16 * GB, 15 * GB)
MACHINE = Machine("Linux", "a CPU", 8, 4, 32 * GB, 24 * GB, (), None, "2.13.0+cpu", None)
HOME = HomeFacts("/home/anna/potluck", free_bytes=100 * GB)
FACTS = MachineFacts(
    python="3.12.1",
    python_wanted=">=3.11",
    packages=(Package("torch", ">=2.4", "2.13.0+cpu"), Package("numpy", "<2.4,>=1.26", "2.3.5")),
    machine=MACHINE,
    device="cpu",
    device_problem=None,
    p2pd_problem=None,
    open_files=4096,
    home=HOME,
    disk_quota=10 * GB,
    speed=Speed(1000.0, 12_000_000, "cpu", 0.0),
)
NETWORK = NetworkFacts(
    invited=(Dialled(ADDRESS, None, 0.02),),
    dial_backs=(DialBack("reached", "/ip4/198.51.100.1/tcp/4001"),),
    clock_offset=0.01,
    download=Download(4 * CHUNK_BYTES, 2.0, 1),
    upload=Upload(2 * CHUNK_BYTES, 2.0),
    nat=NatKind("one"),
)
RUN = RunFacts(
    name="test",
    family="llama",
    parameters=25_000_000,
    stages=1,
    module="stage.0",
    module_parameters=25_000_000,
    problem=None,
    peers=3,
    validates=False,
    source="python-stdlib",
    data_problem=None,
    packages_missing=(),
    step_tokens=1024,
    train_seconds=30.0,
    starts_in_seconds=-5.0,
    state_bytes=2 * 10**8,
    checkpoint_bytes=10**9,
    contribution_bytes=2 * GB,
    snapshot_bytes=0,
    memory_bytes=GB,
)
PIPELINE = replace(RUN, stages=4, module="stage.2", module_parameters=6_000_000, snapshot_bytes=GB)


def home(**changed: Any) -> MachineFacts:
    return replace(FACTS, home=replace(HOME, **changed))


def machine(**changed: Any) -> MachineFacts:
    return replace(FACTS, machine=replace(MACHINE, **changed))


def one(found: Sequence[Finding], name: str) -> Finding:
    [finding] = [finding for finding in found if finding.name == name]
    return finding


# ---- the machine --------------------------------------------------------------------------------------------------

#: Facts, the finding that they make, its status and the command's exit code, and a word of the fix.
MACHINES: list[tuple[MachineFacts, str, str, int, str]] = [
    (replace(FACTS, python="3.10.2"), "python", "fail", 2, "Python"),
    (replace(FACTS, packages=(Package("torch", ">=2.4", None),)), "packages", "fail", 2, "pip install 'torch>=2.4'"),
    (replace(FACTS, packages=(Package("numpy", "<2.4", "2.4.1"),)), "packages", "warn", 0, "'numpy<2.4'"),
    (replace(FACTS, packages=()), "packages", "warn", 0, "pip"),
    (replace(FACTS, p2pd_problem="Exec format error"), "libp2p daemon", "fail", 6, "hivemind"),
    (replace(FACTS, device=None, device_problem="--device mps: no"), "device", "fail", 5, "--device auto"),
    (machine(nvidia_driver="550.1"), "device", "warn", 0, "torch with CUDA"),
    (machine(nvidia_driver="450.1", torch_cuda="12.8"), "device", "warn", 0, "update the driver"),
    (machine(free_bytes=GB // 2), "memory", "fail", 5, "close other programs"),
    (machine(free_bytes=GB // 2, memory_bytes=GB - 1), "memory", "fail", 5, "larger machine"),
    (home(problem="--home /x: not writable"), "home", "fail", 2, "--home"),
    (home(socket_excess=3), "home", "fail", 2, "shorter"),
    (home(key_problem="other users can read it: chmod 600"), "key", "fail", 3, "--home"),
    (home(free_bytes=10**7), "disk", "fail", 5, "free some space"),
    (home(free_bytes=3 * GB), "disk", "warn", 0, "--disk-quota 2900MB"),
    (replace(FACTS, open_files=256), "open files", "warn", 0, "ulimit -n 4096"),
    (replace(FACTS, speed=None, speed_problem="no kernel image"), "speed", "fail", 5, "close other"),
]


def test_a_healthy_machine_needs_no_fix() -> None:
    found = machine_findings(FACTS)
    assert {finding.status for finding in found} == {"ok"} and not any(finding.fix for finding in found)
    assert exit_code(found) == 0


@pytest.mark.parametrize(("facts", "name", "status", "code", "fix"), MACHINES)
def test_what_is_wrong_with_a_machine_names_its_fix(
    facts: MachineFacts, name: str, status: str, code: int, fix: str
) -> None:
    found = machine_findings(facts)
    finding = one(found, name)
    assert finding.status == status and fix in finding.fix and exit_code(found) == code
    assert [other for other in found if other.status != "ok"] == [finding]


def test_the_first_failure_gives_the_exit_code() -> None:
    facts = replace(FACTS, p2pd_problem="gone", home=replace(HOME, key_problem="damaged"))
    assert exit_code(machine_findings(facts)) == 6
    assert exit_code(list(reversed(machine_findings(facts)))) == 3


def test_contributions_that_lie_there_count_as_room_for_the_quota() -> None:
    assert one(machine_findings(home(free_bytes=3 * GB, stored_bytes=8 * GB)), "disk").status == "ok"


def test_a_gpu_is_named_with_its_memory_and_one_that_others_use_is_warned_of() -> None:
    facts = replace(FACTS, device="cuda", machine=replace(MACHINE, accelerators=(GPU,), nvidia_driver="550.1"))
    found = machine_findings(facts)
    assert "NVIDIA T4" in one(found, "device").seen and "550.1" in one(found, "device").seen
    assert one(found, "GPU memory").status == "ok"
    busy = replace(facts, machine=replace(facts.machine, accelerators=(replace(GPU, free_bytes=2 * GB),)))
    assert one(machine_findings(busy), "GPU memory").status == "warn"
    gone = replace(facts, machine=replace(facts.machine, accelerators=()))
    assert one(machine_findings(gone), "GPU memory").status == "warn"
    idle = replace(facts, device="cpu")
    assert "not used" in one(machine_findings(idle), "device").seen


def test_a_speed_that_was_not_measured_says_why_and_is_no_failure() -> None:
    finding = one(machine_findings(replace(FACTS, speed=None, unmeasured="--no-benchmark")), "speed")
    assert finding.status == "ok" and "--no-benchmark" in finding.seen


# ---- the network --------------------------------------------------------------------------------------------------

REFUSED = NetworkError("refused")
NETWORKS: list[tuple[NetworkFacts, str, str, int, str]] = [
    (NetworkFacts(taken=True), "network", "fail", 2, "potluck status"),
    (NetworkFacts(problem=DaemonError("died")), "network", "fail", 6, "hivemind"),
    (replace(NETWORK, invited=(Dialled(ADDRESS, "refused"),)), "bootstrap peers", "fail", 6, "fresh invite"),
    (replace(NETWORK, invited=()), "bootstrap peers", "fail", 6, "fresh invite"),
    (
        replace(NETWORK, invited=(Dialled(ADDRESS, "refused"),), remembered=(Dialled(ADDRESS, None, 0.1),)),
        "bootstrap peers",
        "warn",
        0,
        "fresh invite",
    ),
    (replace(NETWORK, invited=(Dialled(ADDRESS, None, 1.5),)), "bootstrap peers", "warn", 0, "line"),
    (replace(NETWORK, manifest_problem=ManifestError("codec.name")), "manifest", "fail", 4, "update potluck"),
    (replace(NETWORK, manifest_problem=REFUSED), "manifest", "fail", 6, "fresh invite"),
    (replace(NETWORK, clock_offset=None), "clock", "warn", 0, "NTP"),
    (replace(NETWORK, clock_offset=-1.1), "clock", "warn", 0, "NTP"),
    (replace(NETWORK, clock_offset=30.1), "clock", "fail", 8, "NTP"),
    (replace(NETWORK, directory_problem=REFUSED), "directory", "fail", 6, "again"),
    (replace(NETWORK, download=Download(0, 10.0, 2)), "download", "warn", 0, "line"),
    (replace(NETWORK, nat=NatKind("many")), "NAT", "warn", 0, "forward a port"),
    (replace(NETWORK, nat=NatKind("one", nested=True)), "NAT", "warn", 0, "IPv6"),
]


def test_a_good_line_needs_no_fix() -> None:
    found = network_findings(NETWORK)
    assert {finding.status for finding in found} == {"ok"} and not any(finding.fix for finding in found)
    assert one(found, "download").seen == "2.1 MB/s from one peer"
    assert one(found, "upload").seen == "1.0 MB/s to one peer" and "one outer address" in one(found, "NAT").seen
    assert "20.0 ms" in one(found, "bootstrap peers").seen


def test_what_was_not_measured_says_so_and_a_cap_of_our_own_is_named() -> None:
    found = network_findings(replace(NETWORK, upload=None, nat=NatKind("unknown", why="nobody told")))
    assert "not measured" in one(found, "upload").seen and "nobody told" in one(found, "NAT").seen
    capped = network_findings(replace(NETWORK, upload=Upload(CHUNK_BYTES, 1.0, capped=True), loopback=True))
    assert "--upload-limit" in one(capped, "upload").seen and not [f for f in capped if f.name == "NAT"]
    capped = network_findings(replace(NETWORK, download=Download(CHUNK_BYTES, 1.0, 1, capped=True)))
    assert "--download-limit" in one(capped, "download").seen
    capped = network_findings(replace(NETWORK, download=Download(0, 5.0, 1, capped=True)))
    assert "--download-limit" in one(capped, "download").fix


@pytest.mark.parametrize(("facts", "name", "status", "code", "fix"), NETWORKS)
def test_what_is_wrong_with_a_line_names_its_fix(
    facts: NetworkFacts, name: str, status: str, code: int, fix: str
) -> None:
    found = network_findings(facts)
    finding = one(found, name)
    assert finding.status == status and fix in finding.fix and exit_code(found) == code
    assert [other for other in found if other.status != "ok"] == [finding]


@pytest.mark.parametrize(("offset", "status"), [(1.0, "ok"), (-1.0, "ok"), (29.9, "warn"), (-30.0, "warn")])
def test_clocks_are_judged_as_at_joining(offset: float, status: str) -> None:
    assert one(network_findings(replace(NETWORK, clock_offset=offset)), "clock").status == status


def test_a_failed_dial_is_told_without_the_daemons_nesting() -> None:
    problem = (
        f"failed to dial: failed to dial {PEER}: all dials failed * [/ip4/203.0.113.7/tcp/4001] connection refused"
    )
    seen = one(network_findings(replace(NETWORK, invited=(Dialled(ADDRESS, problem),))), "bootstrap peers").seen
    assert seen == "0 of 1 answered: /ip4/203.0.113.7/tcp/4001: connection refused"


CIRCUIT = f"{ADDRESS}/p2p-circuit/p2p/{PEER}"
FAILED, SILENT = DialBack("failed", "dial failed"), DialBack("silent", "no answer")
NOT_TRIED = DialBack("refused", "blocked observed address")


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({"dial_backs": (FAILED, DialBack("reached", "/ip4/9.9.9.9/tcp/1"))}, "ok", "public"),
        ({"dial_backs": (NOT_TRIED,), "loopback": True}, "ok", "this machine only"),
        ({"dial_backs": (FAILED,), "addresses": (CIRCUIT,)}, "warn", "relay"),
        ({"dial_backs": (SILENT,), "addresses": (CIRCUIT,)}, "warn", "relay"),
        ({"dial_backs": (FAILED,)}, "warn", "no relay"),
        ({"dial_backs": (FAILED,), "announced": ("/ip4/9.9.9.9/tcp/1",)}, "warn", "announced"),
        ({"dial_backs": (NOT_TRIED, SILENT)}, "warn", "unknown: no peer could try (blocked observed address)"),
        ({"dial_backs": ()}, "warn", "unknown"),
    ],
)
def test_reachability_is_told_by_those_who_tried(changed: dict[str, Any], status: str, says: str) -> None:
    finding = reachability(replace(NETWORK, **changed))
    assert finding.status == status and says in finding.seen and bool(finding.fix) == (status != "ok")


@pytest.mark.parametrize(
    ("said", "addresses", "done"),
    [
        ((), (), False),
        ((NOT_TRIED,), (), False),
        ((NOT_TRIED, SILENT), (), True),
        ((DialBack("reached", ""),), (), True),
        ((FAILED, NOT_TRIED), (), False),
        ((FAILED,), (CIRCUIT,), True),
    ],
)
def test_waiting_ends_when_it_tells_no_more(said: tuple[DialBack, ...], addresses: tuple[str, ...], done: bool) -> None:
    assert settled(said, addresses, asked=2) is done


# ---- the run ------------------------------------------------------------------------------------------------------

FITS_NOT = HardwareError("this run's model needs about 80 GiB")
RUNS: list[tuple[RunFacts, str, str, int, str]] = [
    (replace(RUN, problem=FITS_NOT), "model", "fail", 5, "smaller run"),
    (replace(RUN, problem=ManifestError("no such family")), "model", "fail", 4, "version of potluck"),
    (replace(PIPELINE, module=None, problem=FITS_NOT), "model", "warn", 0, "--train-only"),
    (replace(RUN, packages_missing=("bitsandbytes",)), "packages for this run", "fail", 5, "pip install bitsandbytes"),
    (replace(RUN, source="text:/etc", data_problem="asks to read"), "data", "fail", 4, "--data 'text:/etc'"),
    (replace(RUN, checkpoint_bytes=200 * GB), "disk for this run", "fail", 5, "free some space"),
    (replace(RUN, contribution_bytes=20 * GB), "disk for this run", "warn", 0, "--disk-quota 20000MB"),
    (replace(RUN, checkpoint_bytes=99 * GB), "disk for this run", "warn", 0, "full disk"),
    (replace(RUN, step_tokens=100_000), "pace", "warn", 0, "GPU"),
]


def test_a_run_that_fits_needs_no_fix() -> None:
    for run in (RUN, PIPELINE, replace(RUN, starts_in_seconds=7200.0), replace(RUN, source="hf:some/text")):
        found = run_findings(run, FACTS)
        assert {finding.status for finding in found} == {"ok"} and not any(finding.fix for finding in found)


@pytest.mark.parametrize(("run", "name", "status", "code", "fix"), RUNS)
def test_what_a_run_lacks_here_names_its_fix(run: RunFacts, name: str, status: str, code: int, fix: str) -> None:
    found = run_findings(run, FACTS)
    finding = one(found, name)
    assert finding.status == status and fix in finding.fix and exit_code(found) == code
    assert [other for other in found if other.status != "ok"] == [finding]


def test_every_finding_has_a_fix_unless_it_is_well_and_a_failure_an_exit_code() -> None:
    found = itertools.chain(
        *(machine_findings(facts) for facts, *_ in MACHINES),
        *(network_findings(facts) for facts, *_ in NETWORKS),
        *(run_findings(facts, FACTS) for facts, *_ in RUNS),
    )
    for finding in found:
        assert bool(finding.fix) == (finding.status != "ok"), finding
        assert bool(finding.exit_code) == (finding.status == "fail"), finding


def test_the_pace_of_a_larger_model_is_estimated_and_a_smaller_one_is_not_believed_to_be_faster() -> None:
    speed = Speed(1000.0, 10_000_000, "cpu", 0.0)
    steps = {size: step_seconds(replace(RUN, module_parameters=size), speed) for size in (10**6, 10**7, 10**8)}
    assert steps == {10**6: pytest.approx(1.024), 10**7: pytest.approx(1.024), 10**8: pytest.approx(10.24)}


@pytest.mark.parametrize(
    ("run", "role", "module", "keeps"),
    [
        (RUN, "whole", "stage.0", False),
        (PIPELINE, "stage", "stage.2", True),
        (replace(PIPELINE, snapshot_bytes=24 * GB), "stage", "stage.2", False),
        (replace(PIPELINE, module=None, problem=FITS_NOT), "train-only", None, False),
        (replace(RUN, validates=True), "validator", None, False),
        (replace(RUN, problem=FITS_NOT), "none", None, False),
        (replace(RUN, data_problem="asks to read"), "none", None, False),
    ],
)
def test_the_role_follows_from_what_fits(run: RunFacts, role: str, module: str | None, keeps: bool) -> None:
    best = recommend(run, run_findings(run, FACTS), free_bytes=24 * GB)
    assert (best.role, best.module, best.keeps) == (role, module, keeps)
    assert bool(best.command) == (role != "none")


def test_who_fails_anywhere_cannot_take_part_and_is_told_where() -> None:
    found = [*machine_findings(home(key_problem="damaged")), *run_findings(RUN, FACTS)]
    assert recommend(RUN, found, 24 * GB).why.endswith(": key")
    assert recommend(None, network_findings(NetworkFacts(taken=True)), 0).role == "none"


def test_who_is_too_slow_is_told_so_beside_the_role() -> None:
    slow = replace(RUN, step_tokens=10**6)
    assert "too slow" in recommend(slow, run_findings(slow, FACTS), 24 * GB).why


# ---- sensors ------------------------------------------------------------------------------------------------------


def manifest_of(**changed: Any) -> Manifest:
    settings = {name.replace("__", "."): value for name, value in changed.items()}
    return preset_draft("demo", "x", settings).finish(PEER, created=0.0, genesis=0.0)


def weighed(manifest: Manifest, module: str | None = None, **settings: Any) -> RunFacts:
    return weigh(Asked(NetworkFacts(), manifest, module), manifest, FACTS, PeerSettings(**settings))


def test_a_run_is_weighed_without_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = weighed(manifest_of())
    assert run.problem is None and run.module == "stage.0" and run.parameters == run.module_parameters > 500_000
    assert run.state_bytes == 64 + 8 * run.parameters  # the demo's outer optimizer has momentum
    assert run.step_tokens == 8 * 128 and run.train_seconds == 3.5 and run.data_problem is None
    monkeypatch.setattr(hardware, "free_memory", lambda device: 2**20)
    assert isinstance(weighed(manifest_of()).problem, HardwareError)


def test_a_stage_is_weighed_by_itself() -> None:
    manifest = manifest_of(model__stages=4, model__config__tie_word_embeddings=False)
    run, none = weighed(manifest, "stage.1"), weighed(manifest)
    assert run.module_parameters < run.parameters == none.parameters and run.snapshot_bytes > 0
    assert run.step_tokens == 4 * 128
    assert none.module is None and none.state_bytes == none.memory_bytes == 0


def test_what_a_run_asks_of_files_and_packages_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec, hidden = checkup.util.find_spec, ("bitsandbytes", "datasets")  # others may look for theirs meanwhile
    monkeypatch.setattr(checkup.util, "find_spec", lambda name, *of: None if name in hidden else find_spec(name, *of))
    own_files = manifest_of(data__source="text:/etc", training__optimizer="adamw8bit")
    run = weighed(own_files)
    assert "/etc" in str(run.data_problem) and run.packages_missing == ("bitsandbytes",)
    assert weighed(own_files, data="text:/etc").data_problem is None
    assert weighed(manifest_of(data__source="hf:some/text")).packages_missing == ("datasets",)
    broken = weighed(manifest_of(model__family="no_such_family"))
    assert isinstance(broken.problem, ManifestError)


def test_a_home_is_looked_at_and_not_changed(tmp_path: Path) -> None:
    where = Home(tmp_path / "home")
    assert look_at_home(where).peer is None and not where.key_path.exists()
    identity = Identity.create(where.key_path)
    assert look_at_home(where).peer == identity.peer_id
    where.key_path.chmod(0o644)
    assert "chmod 600" in str(look_at_home(where).key_problem)
    blobs = where.path / "runs" / ("a" * 52) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "one").write_bytes(b"x" * 1000)
    assert look_at_home(where).stored_bytes == 1000
    (tmp_path / "file").write_text("")
    assert look_at_home(Home(tmp_path / "file" / "home")).problem is not None
    assert look_at_home(Home(tmp_path / ("x" * 120))).socket_excess > 0


def test_a_run_in_which_a_peer_works_is_seen_and_the_lock_is_left_as_it_was(tmp_path: Path) -> None:
    from potluck.dht.manifest import sign

    where = Home(tmp_path).open()
    identity = where.identity()
    signed = sign(preset_draft("demo", "x").finish(identity.peer_id, created=0.0, genesis=0.0), identity)
    folder = where.run(signed.run_id)
    folder.save_manifest(signed)
    with folder.left_alone() as free:
        assert free and not (folder.path / "lock").exists()
    with folder.locked():
        assert look_at_home(where).running == (signed.run_id,)
    assert look_at_home(where).running == ()
    with folder.left_alone() as free, (folder.path / "lock").open() as lock, pytest.raises(BlockingIOError):
        assert free
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_gpus_are_detected_and_one_that_does_not_answer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(number: int) -> tuple[int, int]:
        if number == 1:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        return 15 * GB, 16 * GB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA T4")
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, driver in (("echo 550.54.15; echo 550.54.15", "550.54.15"), ("exit 9", None), ("true", None)):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        found = hardware.detect()
        assert found.accelerators == (GPU,) and found.nvidia_driver == driver
    assert found.cores >= found.threads >= 1 and found.cpu and 0 < found.free_bytes <= found.memory_bytes


def test_a_daemon_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    program = tmp_path / "p2pd"
    assert "No such file" in str(p2pd_problem(program))
    program.write_text("#!/bin/sh\nexit 2\n")
    assert "Permission denied" in str(p2pd_problem(program))
    program.chmod(0o755)
    assert p2pd_problem(program) is None
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    assert "signal 9" in str(p2pd_problem(program))


def test_a_measurement_holds_for_its_machine_only_and_a_damaged_file_for_none(tmp_path: Path) -> None:
    cache, speed = SpeedCache(tmp_path), Speed(1000.0, 12_000_000, "cpu", 1.0)
    key = benchmark.key_of(MACHINE, "cpu")
    cache.put(key, speed)
    assert cache.get(key) == speed
    others = [replace(MACHINE, cpu="another"), replace(MACHINE, torch="3.0"), replace(MACHINE, threads=1)]
    assert all(cache.get(benchmark.key_of(other, "cpu")) is None for other in others)
    assert cache.get(benchmark.key_of(replace(MACHINE, accelerators=(GPU,)), "cuda")) is None
    (tmp_path / "benchmark.json").write_text("{")
    assert cache.get(key) is None
    cache.put(key, speed)
    assert cache.get(key) == speed


def test_the_benchmark_counts_the_tokens_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
    config = {**benchmark._MODEL.config, **sizes, "num_hidden_layers": 1}
    monkeypatch.setattr(benchmark, "_MODEL", ModelPart(family="llama", config=config))
    before = torch.get_rng_state()
    for seconds in (0.0, 0.05):  # not even one step more, and some
        speed = benchmark.measure("cpu", seconds)
        assert speed.tokens_per_second > 0 and speed.device == "cpu" and 30_000 < speed.parameters < 50_000
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(HardwareError, match="--device"):
        benchmark.measure("cuda:99", 0.0)


class Served:
    """A peer's blobs, or garbage in their place; calls of others fail."""

    def __init__(self, blobs: dict[str, bytes], lies: bool = False) -> None:
        self.blobs, self.lies, self.asked = blobs, lies, 0
        self.download = Pace(None)

    async def call(self, peer: PeerId, method: str, head: dict[str, Any], **limits: Any) -> Reply:
        blob = self.blobs.get(head["id"])
        if blob is None:
            raise RpcRemoteError("BlobNotFound", "not here")
        if method == "blob.list":
            chunks = ChunkList.of([blob])
            return Reply({"size": len(blob)}, chunks.digests)
        self.asked += 1
        start = head["index"] * CHUNK_BYTES
        return Reply({}, b"\0" * CHUNK_BYTES if self.lies else blob[start : start + CHUNK_BYTES])


def sampled(served: Served, *wanted: str) -> tuple[Download | None, str]:
    rpc: Any = served
    return asyncio.run(sample(rpc, [PEER], [BlobId(blob) for blob in wanted]))


def test_a_sample_of_a_download_is_a_few_verified_chunks_of_what_is_there() -> None:
    large = blake3(b"x").digest(length=6 * CHUNK_BYTES + 5)
    served = Served({str(ChunkList.of([large]).blob_id): large})
    [name] = served.blobs
    download, _ = sampled(served, "gone", name)
    assert download is not None and download.bytes == 4 * CHUNK_BYTES and served.asked == 4
    liar, _ = sampled(Served(served.blobs, lies=True), name)
    assert liar is not None and liar.bytes == 0
    assert sampled(Served({"forged": large}), "forged")[0] is None
    nothing, why = sampled(served, "gone")
    assert nothing is None and "no bootstrap peer" in why
    small = Served({str(ChunkList.of([b"ab"]).blob_id): b"ab"})
    nothing, why = sampled(small, *small.blobs)
    assert nothing is None and "too little" in why and small.asked == 0


# ---- the line ------------------------------------------------------------------------------------------------------

UPLOADING = replace(RUN, blob_bytes=1_000_000, pull_seconds=2.0)


@pytest.mark.parametrize(
    ("cap", "line", "status", "says"),
    [
        (None, Line(2e6, None, None, 0.0), "ok", "the line's upload is 2.00 MB/s"),
        (None, Line(1e5, None, None, 0.0), "warn", "the line's upload is 0.10 MB/s"),
        (1e5, Line(2e6, None, None, 0.0), "warn", "the upload limit is 0.10 MB/s"),
        (1e6, None, "ok", "the upload limit is 1.00 MB/s"),
    ],
)
def test_an_upload_that_is_too_slow_for_a_contribution_is_told(
    cap: float | None, line: Line | None, status: str, says: str
) -> None:
    run = replace(UPLOADING, upload_cap=cap)
    found = run_findings(run, replace(FACTS, line=line))
    uplink = one(found, "uplink")
    assert (uplink.status, says in uplink.seen, "0.50 MB/s" in uplink.seen) == (status, True, True)
    assert ("upload is too slow" in recommend(run, found, 24 * GB).why) == (status == "warn")


@pytest.mark.parametrize(
    ("cap", "line", "status", "says"),
    [
        (None, Line(None, 2e6, None, 0.0), "ok", "the line's download is 2.00 MB/s"),
        (None, Line(None, 1e6, None, 0.0), "warn", "the line's download is 1.00 MB/s"),
        (1e6, Line(None, 9e6, None, 0.0), "warn", "the download limit is 1.00 MB/s"),
        (2e6, None, "ok", "the download limit is 2.00 MB/s"),
    ],
)
def test_a_download_that_is_too_slow_for_a_rounds_contributions_is_told(
    cap: float | None, line: Line | None, status: str, says: str
) -> None:
    run = replace(RUN, pull_bytes=3_000_000, pull_seconds=2.0, download_cap=cap)
    found = run_findings(run, replace(FACTS, line=line))
    downlink = one(found, "downlink")
    assert (downlink.status, says in downlink.seen, "1.50 MB/s" in downlink.seen) == (status, True, True)
    assert ("raise --download-limit" in downlink.fix) == (status == "warn" and cap is not None)
    assert ("download is too slow" in recommend(run, found, 24 * GB).why) == (status == "warn")


def test_a_round_brings_the_contributions_of_a_group_or_of_those_who_are_there() -> None:
    def pulled(others: int | None, **changed: Any) -> float:
        manifest = manifest_of(rounds__group_size=8, model__config__tie_word_embeddings=False, **changed)
        run = weigh(Asked(NetworkFacts(), manifest, "stage.0", peers=others), manifest, FACTS, PeerSettings())
        return manifest.rounds.uploads * run.pull_bytes / run.blob_bytes

    assert [pulled(others) for others in (None, 100, 3, 0)] == [7, 7, 3, 0]
    assert [pulled(others, rounds__exchange="sliced") for others in (100, 1)] == [2, 1]
    assert pulled(6, model__stages=4) == 2


def test_nothing_is_told_of_a_line_that_was_never_measured() -> None:
    found = run_findings(replace(UPLOADING, pull_bytes=10**6), FACTS)
    assert not [finding for finding in found if finding.name in ("uplink", "downlink")]
    assert line_findings(None) == []
    (told,) = line_findings(Line(1.5e6, None, "many", 0.0))
    assert "upload 1.5 MB/s, NAT: many; measured 1970" in told.seen


def test_a_line_is_kept_for_its_machine(tmp_path: Path) -> None:
    cache = LineCache(tmp_path)
    assert cache.get() is None
    cache.put(Line(1.0, 2.0, "one", 3.0))
    assert LineCache(tmp_path).get() == Line(1.0, 2.0, "one", 3.0)
    (tmp_path / "line.json").write_text("{")
    assert cache.get() is None
