"""What `potluck doctor` finds, and the fix beside it: findings and the recommended role from facts. Pure.

With a finding that fails a run cannot be joined; what is warned of costs speed, or the help of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from packaging.specifiers import SpecifierSet

from potluck.errors import (
    ClockError,
    DaemonError,
    HardwareError,
    IdentityError,
    ManifestError,
    NetworkError,
    PotluckError,
    UserError,
)
from potluck.net.autonat import DialBack
from potluck.net.clock import REFUSED_SECONDS, SAID_SECONDS
from potluck.net.nat import NatKind
from potluck.peer.benchmark import Speed
from potluck.peer.facts import HomeFacts, MachineFacts, NetworkFacts, Package, RunFacts, Upload
from potluck.peer.hardware import Machine
from potluck.peer.line_cache import Line

#: A worker and its libp2p daemon before any model (0.6 GB), and what the system needs to stay alive.
PEER_BYTES: Final = 10**9
#: For logs, and so that files can be replaced.
LEAST_DISK_BYTES: Final = 10**8
#: A busy peer has a socket for each stream, up to 64 maps of blobs, and its daemon up to 512 connections.
OPEN_FILES: Final = 1024
SLOW_ROUND_TRIP_SECONDS: Final = 1.0
MIB: Final = 2**20
FORWARD: Final = (
    "to be reached without a relay, let your router forward a port, and say --listen /ip4/0.0.0.0/tcp/PORT "
    "(UPnP does it where the router allows it)"
)

Status = Literal["ok", "warn", "fail"]
Role = Literal["whole", "stage", "train-only", "validator", "none"]


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where all is well. `exit_code`: of the command, if this is the first that fails."""

    name: str
    status: Status
    seen: str
    fix: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Recommendation:
    """What this machine is best used for in a run. `keeps`: besides, it has room for snapshots of other stages."""

    role: Role
    why: str
    module: str | None = None
    keeps: bool = False
    command: str = ""


# ---- the machine --------------------------------------------------------------------------------------------------


def machine_findings(facts: MachineFacts) -> list[Finding]:
    """What can be told without a run."""
    found = [_python(facts), _packages(facts.packages), _p2pd(facts.p2pd_problem), _device(facts)]
    found += [_gpu_memory(facts)] if _gpu(facts) else []
    found += [_memory(facts.machine), _home(facts.home)]
    if facts.home.problem is None:
        found += [_key(facts.home), _disk(facts.home, facts.disk_quota), _running(facts.home)]
    return [*found, _open_files(facts.open_files), _speed(facts)]


def _python(facts: MachineFacts) -> Finding:
    if _meets(facts.python, facts.python_wanted):
        return Finding("python", "ok", facts.python)
    fix = f"install Python {facts.python_wanted}, and potluck with it"
    return Finding("python", "fail", facts.python, fix, UserError.exit_code)


def _packages(packages: Sequence[Package]) -> Finding:
    """Of another version a package may work all the same: nobody has tried."""
    missing = [p for p in packages if p.installed is None]
    odd = [p for p in packages if p.installed is not None and not _meets(p.installed, p.wanted)]
    seen = ", ".join(f"{p.name} {p.installed or 'missing'}" for p in missing + odd)
    install = " ".join(f"'{p.name}{p.wanted}'" for p in missing + odd)
    if missing:
        return Finding("packages", "fail", seen, f"pip install {install}", UserError.exit_code)
    if odd:
        return Finding("packages", "warn", seen, f"pip install {install}")
    if not packages:
        return Finding("packages", "warn", "unchecked: potluck runs without being installed", "install it with pip")
    shown = ", ".join(f"{p.name} {p.installed}" for p in packages if p.name in ("torch", "transformers", "hivemind"))
    return Finding("packages", "ok", f"{shown}; {len(packages)} in all, as required")


def _meets(installed: str, wanted: str) -> bool:
    # Local parts such as 2.13.0+cpu do not count; what was installed on purpose may be a pre-release.
    return SpecifierSet(wanted).contains(installed.partition("+")[0], prereleases=True)


def _p2pd(problem: str | None) -> Finding:
    if problem is None:
        return Finding("libp2p daemon", "ok", "p2pd runs")
    fix = "pip install --force-reinstall --no-deps hivemind, on a disk that is not mounted noexec"
    return Finding("libp2p daemon", "fail", problem, fix, DaemonError.exit_code)


def _gpu(facts: MachineFacts) -> bool:
    return facts.device is not None and facts.device != "cpu"


def _device(facts: MachineFacts) -> Finding:
    machine = facts.machine
    driver = f", driver {machine.nvidia_driver}" if machine.nvidia_driver else ""
    if facts.device_problem is not None or facts.device is None:
        return Finding("device", "fail", facts.device_problem or "none", "use --device auto", HardwareError.exit_code)
    if _gpu(facts):
        names = ", ".join(f"{one.name} ({one.device})" for one in machine.accelerators)
        return Finding("device", "ok", f"{facts.device} of {names}{driver}")
    cpu = f"cpu, {machine.threads} {'thread' if machine.threads == 1 else 'threads'} of {machine.cpu}"
    if machine.accelerators:
        return Finding("device", "ok", f"{cpu}; {machine.accelerators[0].name} is not used")
    if machine.nvidia_driver and machine.torch_cuda is None:
        seen = f"{cpu}; an NVIDIA GPU{driver}, but torch {machine.torch} is without CUDA"
        return Finding("device", "warn", seen, "install torch with CUDA: see pytorch.org/get-started")
    if machine.nvidia_driver:
        fix = f"update the driver, or install a torch for a CUDA older than {machine.torch_cuda}"
        return Finding("device", "warn", f"{cpu}; an NVIDIA GPU{driver}, but torch cannot use it", fix)
    return Finding("device", "ok", cpu)


def _gpu_memory(facts: MachineFacts) -> Finding:
    one = next((a for a in facts.machine.accelerators if a.device.startswith(facts.device or "")), None)
    if one is None:
        return Finding("GPU memory", "warn", "unknown", "see with nvidia-smi whether the GPU answers")
    seen = f"{gigabytes(one.free_bytes)} free of {gigabytes(one.memory_bytes)}"
    if one.free_bytes < one.memory_bytes / 2:
        return Finding("GPU memory", "warn", seen, "close other programs that use the GPU (nvidia-smi lists them)")
    return Finding("GPU memory", "ok", seen)


def _memory(machine: Machine) -> Finding:
    seen = f"{gigabytes(machine.free_bytes)} free of {gigabytes(machine.memory_bytes)}"
    if machine.free_bytes >= PEER_BYTES:
        return Finding("memory", "ok", seen)
    fix = f"close other programs: a peer takes about {gigabytes(PEER_BYTES)} before any model"
    if machine.memory_bytes < PEER_BYTES:
        fix = f"use a larger machine: a peer takes about {gigabytes(PEER_BYTES)} before any model"
    return Finding("memory", "fail", seen, fix, HardwareError.exit_code)


def _home(home: HomeFacts) -> Finding:
    if home.problem is not None:
        return Finding("home", "fail", home.problem, "choose another --home", UserError.exit_code)
    if home.socket_excess > 0:
        seen = f"{home.path} is too long for a socket by {home.socket_excess} bytes"
        return Finding("home", "fail", seen, "choose a shorter --home", UserError.exit_code)
    return Finding("home", "ok", home.path)


def _key(home: HomeFacts) -> Finding:
    if home.key_problem is not None:
        # The message names the fix.
        return Finding("key", "fail", home.key_problem, "or choose another --home", IdentityError.exit_code)
    return Finding("key", "ok", home.peer or "none yet: the first join makes one")


def _disk(home: HomeFacts, quota: int) -> Finding:
    seen = f"{gigabytes(home.free_bytes)} free for --disk-quota {gigabytes(quota)}"
    if home.stored_bytes:
        seen += f", of which {gigabytes(home.stored_bytes)} are in use"
    room = home.free_bytes + home.stored_bytes - LEAST_DISK_BYTES
    if room >= quota:
        return Finding("disk", "ok", seen)
    if home.free_bytes < LEAST_DISK_BYTES:
        return Finding("disk", "fail", seen, "free some space, or choose another --home", HardwareError.exit_code)
    fits = max(1, int(room / 10**6))
    return Finding("disk", "warn", seen, f"free some space, choose another --home, or say --disk-quota {fits}MB")


def _running(home: HomeFacts) -> Finding:
    if not home.running:
        return Finding("running", "ok", "no peer works in this home now")
    names = ", ".join(run[:8] for run in home.running)
    return Finding("running", "ok", f"a peer of {names} works here now: memory and speed are what it leaves")


def _open_files(limit: int) -> Finding:
    seen = f"at most {limit} at once" if limit < 2**31 else "no limit"
    if limit >= OPEN_FILES:
        return Finding("open files", "ok", seen)
    return Finding("open files", "warn", seen, f"ulimit -n {4 * OPEN_FILES}, in the shell that starts the peer")


def _speed(facts: MachineFacts) -> Finding:
    speed = facts.speed
    if facts.speed_problem is not None:
        fix = "use --device cpu, or a torch that was built for this GPU" if _gpu(facts) else "close other programs"
        seen = f"training a small model failed: {facts.speed_problem}"
        return Finding("speed", "fail", seen, fix, HardwareError.exit_code)
    if speed is None:
        return Finding("speed", "ok", f"not measured: {facts.unmeasured or 'home and device come first'}")
    model = f"a model of {_millions(speed.parameters)} parameters"
    return Finding("speed", "ok", f"{speed.tokens_per_second:,.0f} tokens/s on {speed.device}, training {model}")


# ---- the network --------------------------------------------------------------------------------------------------


def network_findings(facts: NetworkFacts) -> list[Finding]:
    """As far as it came: without a host, or without anybody who answers, there is no more to tell."""
    if facts.taken:
        seen = "a peer of this run works in this home already: its network is left alone"
        fix = "`potluck status` and `potluck why` tell how it does; or end it with `potluck leave`, and ask again"
        return [Finding("network", "fail", seen, fix, UserError.exit_code)]
    if facts.problem is not None:
        fix = "free memory, or reinstall hivemind" if isinstance(facts.problem, DaemonError) else "do as it says"
        return [Finding("network", "fail", _line(facts.problem), fix, facts.problem.exit_code)]
    found = [_bootstrap(facts)]
    if found[0].status == "fail":
        return found
    found += [_manifest(facts.manifest_problem), reachability(facts)]
    if facts.nat is not None and not facts.loopback:
        found.append(_nat(facts.nat))
    if facts.manifest_problem is not None:
        return found
    found.append(_clock(facts.clock_offset))
    if (problem := facts.directory_problem) is not None:
        fix = "ask again in a minute; if it stays so, ask the run's people whether others can join"
        found.append(Finding("directory", "fail", _line(problem), fix, problem.exit_code))
    return [*found, _download(facts), _upload(facts.upload)]


def _bootstrap(facts: NetworkFacts) -> Finding:
    answered = [one for one in facts.invited if one.problem is None]
    others = [one for one in facts.remembered if one.problem is None]
    trips = [one.round_trip_seconds for one in answered + others if one.round_trip_seconds is not None]
    seen = f"{len(answered)} of {len(facts.invited)} answered"
    if facts.remembered:
        seen += f", and {len(others)} of {len(facts.remembered)} known from last time"
    if trips:
        seen += f"; round trip {1000 * min(trips):.1f} ms"
    failed = "; ".join(_failure(one.address, one.problem) for one in facts.invited if one.problem is not None)
    fresh = "ask for a fresh invite (`potluck status` of anyone in the run prints one)"
    if not answered and not others:
        seen = f"{seen}: {failed}" if failed else "the invite names nobody else"
        fix = f"check the address and this machine's firewall, or {fresh}"
        return Finding("bootstrap peers", "fail", seen, fix, NetworkError.exit_code)
    if not answered:
        return Finding("bootstrap peers", "warn", f"{seen}: {failed}" if failed else seen, fresh)
    if trips and min(trips) > SLOW_ROUND_TRIP_SECONDS:
        return Finding("bootstrap peers", "warn", seen, "the line is slow, or busy: see what else uses it")
    return Finding("bootstrap peers", "ok", f"{seen} ({failed})" if failed else seen)


def _failure(address: str, problem: str) -> str:
    """Without the peer id, and of the libp2p daemon's nested reasons the last."""
    return f"{address.rpartition('/p2p/')[0] or address}: {problem.rpartition('] ')[2]}"


def _manifest(problem: PotluckError | None) -> Finding:
    if problem is None:
        return Finding("manifest", "ok", "as its run id says, signed by its organizer")
    fix = "update potluck, or ask the run's people" if isinstance(problem, ManifestError) else "ask for a fresh invite"
    return Finding("manifest", "fail", _line(problem), fix, problem.exit_code)


def _clock(offset: float | None) -> Finding:
    fix = "set it, for example with NTP: timedatectl set-ntp true"
    if offset is None:
        return Finding("clock", "warn", "no connected peer told its own", f"ask again, or look yourself; {fix}")
    if abs(offset) < 0.05:
        return Finding("clock", "ok", "within 0.05 s of its peers'")
    seen = f"{abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} its peers'"
    if abs(offset) > REFUSED_SECONDS:
        return Finding("clock", "fail", seen, fix, ClockError.exit_code)
    if abs(offset) > SAID_SECONDS:
        return Finding("clock", "warn", f"{seen}: corrected for the run", fix)
    return Finding("clock", "ok", seen)


def reachability(facts: NetworkFacts) -> Finding:
    """Whether others can dial this machine: by those who tried, and by what the daemon was given."""
    said = {outcome: [one.text for one in facts.dial_backs if one.outcome == outcome] for outcome in _OUTCOMES}
    relays = [address for address in facts.addresses if "/p2p-circuit" in address]
    if said["reached"]:
        return Finding("reachability", "ok", f"public: a peer dialled back to {said['reached'][0]}")
    if facts.loopback:
        return Finding("reachability", "ok", "this machine only (--loopback)")
    if said["failed"] and facts.announced:
        seen = f"{', '.join(facts.announced)} is announced, but a peer that dialled back had no answer"
        return Finding("reachability", "warn", seen, "see that it is forwarded to this peer's --listen address")
    if relays:
        seen = "behind a NAT; others come through a relay, a bootstrap peer"
        return Finding("reachability", "warn", seen, FORWARD)
    if said["failed"]:
        seen = "behind a NAT or a firewall, and no relay has taken it yet; it can dial others"
        return Finding("reachability", "warn", seen, FORWARD)
    why = (said["refused"] + said["silent"] or ["nobody was asked"])[0]
    seen = f"unknown: no peer could try ({why})"
    fix = "ask again with an invite that names a peer outside of your network; `potluck join` works without knowing"
    return Finding("reachability", "warn", seen, fix)


def settled(said: Sequence[DialBack], addresses: Sequence[str], asked: int) -> bool:
    """Whether waiting tells no more about how others reach us: somebody did, nobody can try, or a relay has come."""
    outcomes = {one.outcome for one in said}
    if "reached" in outcomes:
        return True
    if "failed" in outcomes:
        return any("/p2p-circuit" in address for address in addresses)
    return len(said) == asked


_OUTCOMES: Final = ("reached", "failed", "refused", "silent")


def _download(facts: NetworkFacts) -> Finding:
    done = facts.download
    if done is None:
        return Finding("download", "ok", f"not measured: {facts.undownloaded or 'there was nothing to fetch'}")
    who = "one peer" if done.peers == 1 else f"{done.peers} peers"
    within = ", within --download-limit" if done.capped else ""
    if done.bytes == 0:
        fix = "raise --download-limit" if done.capped else "the line is slow, or busy: see what else uses it"
        seen = f"less than {MIB / 1e6:.0f} MB in {done.seconds:.0f} s from {who}{within}"
        return Finding("download", "warn", seen, fix)
    return Finding("download", "ok", f"{done.bytes / done.seconds / 1e6:.1f} MB/s from {who}{within}")


def _upload(done: Upload | None) -> Finding:
    if done is None:
        return Finding("upload", "ok", "not measured: no bootstrap peer takes bytes for it now")
    within = ", within --upload-limit" if done.capped else ""
    return Finding("upload", "ok", f"{done.bytes / done.seconds / 1e6:.1f} MB/s to one peer{within}")


def _nat(nat: NatKind) -> Finding:
    if nat.nested:
        seen = "a second NAT lies behind the router's (a provider's own, perhaps): no port of it can be forwarded"
        fix = "ask the provider for a public address, or use IPv6; without it, others come through a relay"
        return Finding("NAT", "warn", seen, fix)
    if nat.mapping == "none":
        return Finding("NAT", "ok", "none: peers see this machine's own address")
    if nat.mapping == "one":
        return Finding("NAT", "ok", "one outer address for all peers")
    if nat.mapping == "many":
        seen = "symmetric: another outer port for each peer, so that those behind NATs only come through a relay"
        return Finding("NAT", "warn", seen, FORWARD)
    return Finding("NAT", "ok", f"of an unknown kind: {nat.why}")


# ---- the run ------------------------------------------------------------------------------------------------------


def run_findings(run: RunFacts, machine: MachineFacts) -> list[Finding]:
    """What this run asks of this machine."""
    found = [_run(run), *_model(run), *_extras(run), _data(run), _run_disk(run, machine), *_pace(run, machine.speed)]
    return [*found, *_uplink(run, machine.line), *_downlink(run, machine.line)]


def _uplink(run: RunFacts, line: Line | None) -> list[Finding]:
    """Whether others can have this peer's contribution in time."""
    what = f"a round sends {run.blob_bytes / 1e6:.2f} MB at most, to be had in {run.pull_seconds:.1f} s: it takes"
    needed, measured = run.blob_bytes / run.pull_seconds, line.upload if line else None
    return _link("upload", what, needed, measured, run.upload_cap, "rounds are sat out otherwise")


def _downlink(run: RunFacts, line: Line | None) -> list[Finding]:
    """Whether this peer can have the others' contributions in time."""
    what = f"a round's contributions of others have {run.pull_bytes / 1e6:.2f} MB at most, to be had in "
    what += f"{run.pull_seconds:.1f} s: they take"
    needed, measured = run.pull_bytes / run.pull_seconds, line.download if line else None
    return _link("download", what, needed, measured, run.download_cap, "the state is loaded again and again otherwise")


def _link(way: str, what: str, needed: float, measured: float | None, cap: float | None, cost: str) -> list[Finding]:
    """Rates in bytes per second."""
    name, most = f"{way.removesuffix('load')}link", min(measured or math.inf, cap or math.inf)
    if math.isinf(most) or not needed:
        return []
    whose = f"the {way} limit" if cap == most else f"the line's {way}"
    seen = f"{what} {needed / 1e6:.2f} MB/s, and {whose} is {most / 1e6:.2f} MB/s"
    if needed <= most:
        return [Finding(name, "ok", seen)]
    fix = f"raise --{way}-limit" if cap == most else "join a run with another codec or a longer exchange"
    return [Finding(name, "warn", seen, f"{fix}; {cost}")]


def line_findings(line: Line | None) -> list[Finding]:
    """Of a line that was measured before."""
    if line is None:
        return []
    rates = (("upload", line.upload), ("download", line.download))
    told = [f"{name} {rate / 1e6:.1f} MB/s" for name, rate in rates if rate is not None]
    told += [f"NAT: {line.nat}"] if line.nat else []
    when = datetime.fromtimestamp(line.measured_at).strftime("%Y-%m-%d %H:%M")
    return [Finding("line", "ok", f"{', '.join(told)}; measured {when}, and again with an INVITE")]


def _run(run: RunFacts) -> Finding:
    stages = f" in {run.stages} stages" if run.stages > 1 else ""
    seen = f"{run.name}: a {run.family} of {_millions(run.parameters)} parameters{stages}"
    if run.starts_in_seconds > 0:
        seen += f"; it starts in {_duration(run.starts_in_seconds)}"
    elif run.peers is not None:
        seen += f"; about {run.peers} {'peer is' if run.peers == 1 else 'peers are'} in it"
    return Finding("run", "ok", seen)


def _model(run: RunFacts) -> list[Finding]:
    if run.problem is None and run.module is None:
        return []  # the directory did not tell which stage
    if run.problem is None:
        what = "the whole model" if run.stages == 1 else f"{run.module} ({_millions(run.module_parameters)} parameters)"
        return [Finding("model", "ok", f"{what} fits: about {gigabytes(run.memory_bytes)} of main memory")]
    if run.stages > 1 and isinstance(run.problem, HardwareError):
        return [Finding("model", "warn", f"no stage fits: {_line(run.problem)}", "join with --train-only")]
    fix = "close other programs, use another --device, or join a smaller run"
    if isinstance(run.problem, ManifestError):
        fix = "ask the run's people: this version of potluck cannot build it"
    return [Finding("model", "fail", _line(run.problem), fix, run.problem.exit_code)]


def _extras(run: RunFacts) -> list[Finding]:
    if not run.packages_missing:
        return []
    seen = f"this run needs {' and '.join(run.packages_missing)}"
    fix = f"pip install {' '.join(run.packages_missing)}"
    return [Finding("packages for this run", "fail", seen, fix, HardwareError.exit_code)]


def _data(run: RunFacts) -> Finding:
    if run.data_problem is not None:
        fix = f"allow it with --data {run.source!r}, or name your own text with --data text:PATH"
        return Finding("data", "fail", run.data_problem, fix, ManifestError.exit_code)
    if run.source.startswith("hf:"):
        seen = f"{run.source} is downloaded from the Hugging Face Hub at joining"
        return Finding("data", "ok", seen)
    return Finding("data", "ok", f"{run.source}: no download")


def _run_disk(run: RunFacts, machine: MachineFacts) -> Finding:
    quota = machine.disk_quota
    needed = run.checkpoint_bytes + min(quota, run.contribution_bytes) + LEAST_DISK_BYTES
    room = machine.home.free_bytes + machine.home.stored_bytes
    seen = f"up to {gigabytes(needed)} of {gigabytes(room)}, {gigabytes(run.state_bytes)} are downloaded at joining"
    if room < run.checkpoint_bytes + LEAST_DISK_BYTES:
        fix = "free some space, or choose another --home"
        return Finding("disk for this run", "fail", seen, fix, HardwareError.exit_code)
    if quota < run.contribution_bytes and room >= run.checkpoint_bytes + run.contribution_bytes + LEAST_DISK_BYTES:
        megabytes = math.ceil(run.contribution_bytes / 10**6)
        fix = f"--disk-quota {megabytes}MB: with less, peers that missed rounds may not catch up from here"
        return Finding("disk for this run", "warn", seen, fix)
    if room < needed:
        return Finding("disk for this run", "warn", seen, "free some space: a full disk ends the peer")
    return Finding("disk for this run", "ok", seen)


def step_seconds(run: RunFacts, speed: Speed) -> float:
    """Of the least that counts, estimated: a larger model than the benchmark's is slower by its parameters; that a
    smaller one is faster is not relied on."""
    tokens_per_second = speed.tokens_per_second * min(1.0, speed.parameters / max(1, run.module_parameters))
    return run.step_tokens / tokens_per_second


def _pace(run: RunFacts, speed: Speed | None) -> list[Finding]:
    if speed is None or run.module is None or run.problem is not None:
        return []
    seconds = step_seconds(run, speed)
    what = "a local step" if run.stages == 1 else "a microbatch"
    seen = f"{what} of {run.step_tokens:,} tokens takes about {_duration(seconds)} or less"
    seen += f"; a round trains for {_duration(run.train_seconds)}"
    if seconds <= run.train_seconds:
        return [Finding("pace", "ok", seen)]
    return [Finding("pace", "warn", seen, "use a GPU (--device), or join a run with longer rounds or a smaller model")]


# ---- what to do ---------------------------------------------------------------------------------------------------


def recommend(run: RunFacts | None, findings: Sequence[Finding], free_bytes: int) -> Recommendation:
    """`findings`: all there are; without a `run` one of them says why it is not known. `free_bytes`: of main memory."""
    failed = [one for one in findings if one.status == "fail"]
    if failed or run is None:
        names = ", ".join(one.name for one in failed)
        return Recommendation("none", f"cannot take part before this is mended: {names}")
    if run.validates:
        why = "the run's manifest trusts this home's peer as a validator"
        return Recommendation("validator", why, command="potluck validate INVITE")
    warned = {one.name for one in findings if one.status == "warn"}
    hint = ", but it may be too slow to finish a step within a round" if "pace" in warned else ""
    hint += ", but its upload is too slow for a contribution within a round" if "uplink" in warned else ""
    hint += ", but its download is too slow for a round's contributions" if "downlink" in warned else ""
    if run.stages == 1:
        why = f"the whole model fits on this machine{hint}"
        return Recommendation("whole", why, module=run.module, command="potluck join INVITE")
    if run.problem is not None:
        why = "no stage fits on this machine, but it can train through the others'"
        return Recommendation("train-only", why, command="potluck join INVITE --train-only")
    keeps = free_bytes - run.memory_bytes >= run.snapshot_bytes
    room = "with" if keeps else "without"
    why = f"of the stages that fit, {run.module} misses another peer most; {room} room for snapshots of others{hint}"
    return Recommendation("stage", why, run.module, keeps, "potluck join INVITE")


def exit_code(findings: Sequence[Finding]) -> int:
    """Of the command: the first failure's, 0 if there is none."""
    return next((one.exit_code for one in findings if one.status == "fail"), 0)


# ---- words --------------------------------------------------------------------------------------------------------


def gigabytes(count: float) -> str:
    """As people buy them; megabytes where there are few."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} million" if count >= 10**5 else f"{count:,}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


def _line(error: PotluckError) -> str:
    return " ".join(str(error).split())
