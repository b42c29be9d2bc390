"""`potluck doctor`, put together: gathers facts of this machine, of a run's peers, and of the run on this machine.

Nothing of it stays but the benchmark's figure, and the home's folder if there was none.
"""

from __future__ import annotations

import asyncio
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final, Literal

import torch
from packaging.requirements import Requirement

from potluck.dht.invite import Invite
from potluck.dht.manifest import Manifest
from potluck.errors import HardwareError, IdentityError, ManifestError, PotluckError, UserError
from potluck.net.hosts.go import daemon_binary
from potluck.net.identity import Identity
from potluck.peer.benchmark import SpeedCache, key_of, measure
from potluck.peer.build import check_memory, memory_needed
from potluck.peer.control import MAX_SOCKET_PATH
from potluck.peer.doctor import (
    Finding,
    Recommendation,
    exit_code,
    line_findings,
    machine_findings,
    network_findings,
    recommend,
    run_findings,
)
from potluck.peer.facts import HomeFacts, MachineFacts, NetworkFacts, Package, RunFacts
from potluck.peer.hardware import choose_device, default_threads, detect, fit_micro_batch, free_memory
from potluck.peer.home import Home, RunFolder
from potluck.peer.line_cache import Line, LineCache
from potluck.peer.pipeline import MEMORY_FACTOR
from potluck.peer.probe import Asked, ask_run
from potluck.peer.settings import PeerSettings
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import check_may_read
from potluck.swarm.layout import Layout
from potluck.swarm.model import skeleton
from potluck.swarm.phases import PULL_SHARE
from potluck.swarm.stage import stage_layout, stage_names, stage_parameters
from potluck.swarm.state import state_bytes

DAEMON_SECONDS: Final = 20.0
#: The longest of a peer's sockets: 8 characters of the run's id, and the libp2p daemon's folder.
LONGEST_SOCKET: Final = "s/" + 8 * "x" + "/d/p2pclient-" + 11 * "x" + ".sock"

Benchmark = Literal["cached", "measured", "fresh"]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    facts: MachineFacts
    recommendation: Recommendation | None

    @property
    def exit_code(self) -> int:
        return exit_code(self.findings)


def check_up(home: Home, invite: Invite | None, settings: PeerSettings, speed: Benchmark, tell: Tell) -> Report:
    """Blocks for seconds, with an invite up to a minute. `speed`: `cached` measures nothing, `measured` what is not
    cached, `fresh` always. `tell` hears what is being done. Raises nothing for what it finds."""
    if threads := settings.threads or default_threads():
        torch.set_num_threads(threads)
    tell("looking at this machine")
    facts = look(home, settings)
    if facts.home.problem is None and facts.device is not None:
        facts = replace(_with_speed(facts, home, speed, tell), line=LineCache(home.path).get())
    found = machine_findings(facts)
    if invite is None:
        return Report([*found, *line_findings(facts.line)], facts, None)
    if not facts.can_host:
        return Report(found, facts, recommend(None, found, 0))
    asked = _until_stopped(ask_run(home, invite, settings, tell))
    facts = _with_line(facts, home, asked.network)
    found += network_findings(asked.network)
    run = None
    if asked.manifest is not None:
        tell("comparing the run with this machine")
        run = weigh(asked, asked.manifest, facts, settings)
        found += run_findings(run, facts)
    return Report(found, facts, recommend(run, found, free_memory(torch.device("cpu"))))


def _until_stopped(asking: Coroutine[Any, Any, Asked]) -> Asked:
    """Ctrl-C and SIGTERM end the host in order. Whatever that ends with then, it was stopped."""
    stopped = False

    async def go() -> Asked:
        me = asyncio.current_task()
        assert me

        def stop() -> None:
            nonlocal stopped
            stopped = True
            me.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        return await asking

    try:
        return asyncio.run(go())
    except (asyncio.CancelledError, Exception):
        if stopped:
            raise KeyboardInterrupt from None
        raise


# ---- this machine -------------------------------------------------------------------------------------------------


def look(home: Home, settings: PeerSettings) -> MachineFacts:
    """Everything but the speed."""
    device, problem = None, None
    try:
        device = str(choose_device(settings.device))
    except HardwareError as error:
        problem = str(error)
    python_wanted, packages = _required()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MachineFacts(
        python=platform.python_version(),
        python_wanted=python_wanted,
        packages=packages,
        machine=detect(),
        device=device,
        device_problem=problem,
        p2pd_problem=p2pd_problem(daemon_binary()),
        open_files=limit if limit != resource.RLIM_INFINITY else 2**63,
        home=look_at_home(home),
        disk_quota=settings.network.disk_quota,
    )


def _required() -> tuple[str, tuple[Package, ...]]:
    """The versions of Python and of packages that the installed potluck asks for; of packages also what is there."""
    try:
        wanted = metadata.metadata("potluck")["Requires-Python"] or ""
        requirements = [Requirement(line) for line in metadata.requires("potluck") or ()]
    except metadata.PackageNotFoundError:
        return "", ()
    needed = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return wanted, tuple(Package(one.name, str(one.specifier), _version(one.name)) for one in needed)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def p2pd_problem(program: Path) -> str | None:
    """Why the libp2p daemon's program cannot be run, None if it can."""
    try:
        done = subprocess.run([program, "-help"], capture_output=True, timeout=DAEMON_SECONDS, check=False)
    except OSError as error:
        return f"{program} cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{program} does not answer within {DAEMON_SECONDS:.0f} s"
    return f"{program} was ended by signal {-done.returncode}" if done.returncode < 0 else None


def look_at_home(home: Home) -> HomeFacts:
    """Makes the folder if there is none; no key."""
    path = home.path
    try:
        home.open()
        free = shutil.disk_usage(path).free
    except UserError as error:
        return HomeFacts(str(path), problem=str(error))
    peer, key_problem = None, None
    try:
        peer = Identity.load(home.key_path).peer_id if home.key_path.exists() else None
    except IdentityError as error:
        key_problem = str(error)
    longest = os.fsencode(path / LONGEST_SOCKET)
    return HomeFacts(
        path=str(path),
        key_problem=key_problem,
        peer=peer,
        free_bytes=free,
        stored_bytes=sum(_size(blob) for blob in (path / "runs").glob("*/blobs/*")),
        socket_excess=len(longest) - MAX_SOCKET_PATH,
        running=tuple(folder.run_id for folder in home.runs() if _is_taken(folder)),
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed meanwhile
        return 0


def _is_taken(folder: RunFolder) -> bool:
    with folder.left_alone() as free:
        return not free


def _with_speed(facts: MachineFacts, home: Home, benchmark: Benchmark, tell: Tell) -> MachineFacts:
    assert facts.device
    cache, key = SpeedCache(home.path), key_of(facts.machine, facts.device)
    cached = cache.get(key) if benchmark != "fresh" else None
    if cached is not None:
        return replace(facts, speed=cached)
    if benchmark == "cached":
        return replace(facts, unmeasured="--no-benchmark")
    if facts.home.running:
        return replace(facts, unmeasured="a peer works here now, `potluck status` tells its speed")
    tell("measuring how fast this machine trains, some seconds")
    try:
        speed = measure(facts.device)
    except (PotluckError, RuntimeError) as error:  # torch's own, for a GPU that it was not built for
        return replace(facts, speed_problem=" ".join(str(error).split())[:300])
    with suppress(UserError):  # a full disk is another finding
        cache.put(key, speed)
    return replace(facts, speed=speed)


def _with_line(facts: MachineFacts, home: Home, network: NetworkFacts) -> MachineFacts:
    """What was measured now, beside what is known from before. A cap of our own says nothing of the line."""
    up, down, old = network.upload, network.download, facts.line
    upload = up.bytes / up.seconds if up and not up.capped else old.upload if old else None
    download = down.bytes / down.seconds if down and down.bytes and not down.capped else old.download if old else None
    nat = network.nat.mapping if network.nat else old.nat if old else None
    if (upload, download, nat) == (None, None, None):
        return facts
    line = Line(upload, download, nat, time.time())
    if home.key_path.exists():  # nothing is left in a home that is not one yet
        with suppress(UserError):  # a full disk is another finding
            LineCache(home.path).put(line)
    return replace(facts, line=line)


# ---- the run on this machine --------------------------------------------------------------------------------------


def weigh(asked: Asked, manifest: Manifest, machine: MachineFacts, settings: PeerSettings) -> RunFacts:
    """What the run asks of this machine: nothing is built or allocated. Blocks for some seconds."""
    spec, data, training, rounds = manifest.model, manifest.data, manifest.training, manifest.rounds
    names, has_velocity = stage_names(spec.stages), manifest.outer.momentum > 0
    module, problem, parameters = names[0] if spec.stages == 1 else asked.module, asked.problem, 0
    state = checkpoints = contributions = memory = snapshot = size = blob = 0
    try:
        device = choose_device(settings.device)
        if spec.stages == 1:
            whole = skeleton(spec)
            layout = Layout.of_module(whole)
            parameters = layout.size
            check_memory(manifest, device)
            fit_micro_batch(training.batch_size, data.sequence_length, whole, device, training.optimizer)
        else:
            sizes = stage_parameters(spec)
            parameters, largest = sum(sizes), max(sizes)
            snapshot = MEMORY_FACTOR * 4 * largest * (2 if has_velocity else 1)
            layout = stage_layout(spec, module or names[0])
        if module is not None:
            size, memory = layout.size, memory_needed(manifest, device, module)
            codec = make_codec(manifest.codec.name, manifest.codec.parameters)
            state = state_bytes(layout, has_velocity)
            saved = state + (4 * size if codec.has_residual else 0)
            checkpoints = (settings.keep_checkpoints + 1) * saved  # one is written before the oldest goes
            blob = codec.max_bytes(layout)
            contributions = (rounds.retain + 2) * rounds.group_size * blob
    except PotluckError as error:
        problem = problem or error
    own = manifest.organizer == machine.home.peer
    sequences = training.batch_size if spec.stages == 1 else manifest.pipeline.microbatch
    return RunFacts(
        name=manifest.name,
        family=spec.family,
        parameters=parameters,
        stages=spec.stages,
        module=module,
        module_parameters=size,
        problem=problem,
        peers=asked.peers,
        validates=machine.home.peer in manifest.incentives.validators,
        source=settings.data or data.source,
        data_problem=_data_problem(manifest, settings, own),
        packages_missing=tuple(_packages_missing(manifest, settings)),
        step_tokens=sequences * data.sequence_length,
        train_seconds=rounds.seconds - rounds.exchange_seconds,
        starts_in_seconds=manifest.genesis - time.time() - (asked.network.clock_offset or 0.0),
        state_bytes=state,
        checkpoint_bytes=checkpoints,
        contribution_bytes=contributions,
        snapshot_bytes=snapshot,
        memory_bytes=memory,
        blob_bytes=rounds.uploads * blob,
        pull_bytes=_pulled_contributions(manifest, asked.peers) * blob,
        pull_seconds=PULL_SHARE * rounds.exchange_seconds,
        upload_cap=settings.network.upload,
        download_cap=settings.network.download,
    )


def _pulled_contributions(manifest: Manifest, others: int | None) -> int:
    """How many contributions a peer of a module's group receives in a round, at most. In slices come two, about."""
    rounds = manifest.rounds
    here = rounds.group_size if others is None else math.ceil(others / manifest.model.stages)
    return min(here, rounds.group_size - 1, 2 if rounds.exchange == "sliced" else rounds.group_size)


def _data_problem(manifest: Manifest, settings: PeerSettings, own: bool) -> str | None:
    try:
        check_may_read(manifest.data, settings.data, own)
    except ManifestError as error:
        return str(error)
    return None


def _packages_missing(manifest: Manifest, settings: PeerSettings) -> Iterator[str]:
    """Optional ones that this run needs."""
    if manifest.training.optimizer == "adamw8bit" and util.find_spec("bitsandbytes") is None:
        yield "bitsandbytes"
    if (settings.data or manifest.data.source).startswith("hf:") and util.find_spec("datasets") is None:
        yield "datasets"
