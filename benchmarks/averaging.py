"""What it costs four peers to average a module: Potluck's rounds beside hivemind's DecentralizedAverager.

    python benchmarks/averaging.py [--quick] [--parameters 25] [--syncs 5] [--peers 4] [--mbit 100] [--ways int8,none]

Each peer is a process with its own libp2p daemon. The same processes average the same number of parameters, one way
after another: `none` and `int8` in sliced rounds, `sparse` in whole ones; hivemind in float32, float16 and uniform
8 bit. First on loopback, then in network namespaces whose lines carry `--mbit` each way (needs root).

Ours are real rounds (`GossipReplica`, DHT, signed commits, blobs) whose trainer gives a constant pseudo-gradient. A
sync is what the slowest peer takes to encode and offer its contribution, to pull and aggregate the group's, to apply
the update and know its digest. Neither the waits for the round's deadlines are counted nor (it has a column of its own)
finding the group: to publish a commit in the DHT and to read the others'. Random checks of others' segments come
behind a sync, and nothing waits for them: of them bytes and CPU seconds are counted. Of hivemind it is the
all-reduce alone: its matchmaking is over when the clock starts. CPU seconds are of a peer's whole process tree,
its daemon included; ours count everything from the round's start to its end, finding the group too. Bytes are what a
peer's line received on the shaped link, headers and what lies between two syncs included (on loopback what the RPC
layer counted, ours only). First syncs are not told (`--warm`; with `--quick` those of 8 bit on the line are):
connections and vectors are new then.

`bare-none` and `bare-int8` (not with `--quick`) are what the daemons and the lines would allow: plain libp2p streams
from each peer to each carry the bytes of such a sliced round, with nothing to compute or to wait for:
`bare_none_speedup`, `bare_int8_speedup` (beside hivemind's float32 and 8 bit on loopback) and `bare_shaped_ratio`.

The last line is JSON; ratios are hivemind's over ours, of medians over syncs: `int8_*` against its uniform 8 bit,
`none_*` against its float32, `sparse_*` against its 8 bit on the shaped line. `shaped_ratio`: the bytes that `int8`
received while it pulled over its seconds, as a part of the line's rate. Goals: int8 and none 3 times as fast at half
the CPU on loopback; shaped_ratio 0.9; sparse 20 times fewer bytes than 8 bit, 80 times fewer than float32, and 5 times
as fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lab"))

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

RUN: Final = "a" * 52
ERROR: Final = re.compile(r"[\w.]*(Error|Exception)\b")
SIDE: Final = 1000
OURS: Final = {"none": ("none", True), "int8": ("int8", True), "sparse": ("sparse", False)}
THEIRS: Final = ("float32", "float16", "uniform8")
#: For an answer: hivemind's averagers can wait for each other for ever.
PATIENCE_SECONDS: Final = 180.0
START_SECONDS: Final = 30.0
#: Bare streams: bytes a parameter of the way that they stand for.
BARE: Final = {"bare-int8": 1.02, "bare-none": 4.0}
console = Console(stderr=True)


# --- a peer


class Constant:
    """Gives the same pseudo-gradient every round. Implements `swarm.rounds.Trainer`."""

    def __init__(self, millions: int, seed: int) -> None:
        from potluck.swarm.layout import Layout

        self.layout = Layout.of([(f"layer.{n:03}", (SIDE, SIDE)) for n in range(millions)])
        dice = np.random.default_rng(seed)
        self._delta = dice.standard_normal(self.layout.size, dtype=np.float32) * np.float32(1e-3)

    def load(self, theta: Any) -> None: ...
    def forget(self) -> None: ...

    def train(self, batches: Any, max_steps: int, first_step: int, may_start: Any = None) -> Any:
        from potluck.swarm.local import LocalResult

        return LocalResult(1, 1000, 1.0, 1.0, 0.0)

    def delta(self, theta: Any) -> Any:
        return self._delta

    def evaluate(self, tokens: Any) -> float:
        return 1.0


class CpuMeter:
    """CPU seconds of this process and of those that it had started when the meter was made: to look for them anew each
    time would cost the other peers a part of the sync that is measured."""

    def __init__(self) -> None:
        self._mine = psutil.Process()
        self._others = self._mine.children(recursive=True)

    def apart(self) -> list[float]:
        """Of this one, and of the others."""
        return [_cpu_of(self._mine), sum(map(_cpu_of, self._others))]

    def seconds(self) -> float:
        return sum(self.apart())


def _cpu_of(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


class OurPeer:
    """Node, DHT and exchange as a volunteer's peer has them."""

    async def open(self, home: Path, listen: str) -> str:
        from potluck.net.clock import RunClock
        from potluck.net.identity import Identity
        from potluck.peer.home import RunFolder
        from potluck.peer.node import NetworkSettings, Node

        self.clock = RunClock(time.time, time.monotonic)
        folder = RunFolder(home, RUN)  # type: ignore[arg-type]
        folder.path.mkdir(parents=True)
        settings = NetworkSettings(listen=(f"/ip4/{listen}/tcp/0",), nat_port_map=False)
        self.identity = Identity.load_or_create(home / "key")
        self.node = Node(self.identity, folder, self.clock, lambda name, **fields: None, settings)
        await self.node.__aenter__()
        address = str((await self.node.host.get_visible_maddrs())[0])
        return address if "/p2p/" in address else f"{address}/p2p/{self.identity.peer_id}"

    async def meet(self, addresses: Sequence[str]) -> None:
        from potluck.dht.directory import Directory
        from potluck.dht.node import start_dht

        await self.node.dial([each for each in addresses if self.identity.peer_id not in each])
        self.dht = await start_dht(
            self.node.host,
            RUN,  # type: ignore[arg-type]
            initial_peers=await self.node.connected(),
            max_ahead_seconds=3600,
            clock=self.clock.now,
        )
        self.directory = Directory(self.dht, self.identity, RUN, clock=self.clock.now)  # type: ignore[arg-type]

    async def average(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """Rounds, the first `warm` of which are not told."""
        from potluck.swarm.codecs import make_codec
        from potluck.swarm.exchange import NetworkExchange
        from potluck.swarm.follower import RoundRules
        from potluck.swarm.outer import OuterStep
        from potluck.swarm.phases import Round, RoundClock
        from potluck.swarm.rounds import GossipReplica
        from potluck.swarm.state import ReplicaState
        from potluck.swarm.waits import WaitBoard

        codec, sliced = OURS[asked["way"]]
        trainer = Constant(asked["millions"], asked["number"])
        finding, pulling = [0.0], dict[str, int]()

        class Timed(NetworkExchange):
            """Notes how long finding the group takes: what hivemind calls matchmaking."""

            async def publish(self, *rest: Any) -> bool:
                began = time.perf_counter()
                published = await super().publish(*rest)
                finding[0] += time.perf_counter() - began
                return published

            async def commits(self, *rest: Any) -> Any:
                began = time.perf_counter()
                found = await super().commits(*rest)
                finding[0] += time.perf_counter() - began
                pulling.setdefault("from", self.traffic()[1])
                return found

        exchange = Timed(
            self.directory,
            self.node.rpc,
            self.node.store,
            retain_seconds=2 * asked["seconds"],
            keep_states=2,
            slices=self.node.slices,
        )
        told: list[dict[str, Any]] = []
        meter, before = CpuMeter(), [0.0, 0.0]

        def emit(name: str, **fields: Any) -> None:
            if name == "swarm.round.started":
                before[:] = meter.apart()
                finding[0] = 0.0
                pulling.clear()
            elif name == "swarm.round.applied":
                seconds, cpu = fields["seconds"], meter.apart()
                told.append(
                    {
                        "seconds": seconds["commit"] + seconds["pull"] + seconds["apply"] - finding[0],
                        "finding": finding[0],
                        "parts": {part: round(seconds[part], 3) for part in ("commit", "pull", "apply")},
                        "cpu": sum(cpu) - sum(before),
                        "daemon_cpu": cpu[1] - before[1],
                        "received": fields["bytes_received"],
                        "pulled": exchange.traffic()[1] - pulling["from"],
                        "group": len(fields["group"]),
                        "digest": fields["digest"],
                    }
                )
                if len(told) == asked["warm"] + asked["syncs"]:
                    replica.finish()
            elif "failed" in name or "lied" in name or "raw" in name or "skipped" in name or "incomplete" in name:
                sys.stderr.write(f"{time.time():.2f} {asked['number']} {asked['way']}: {name} {fields}\n")

        module = f"{asked['way']}.{asked['seconds']:g}"
        rules = RoundRules(
            clock=RoundClock(asked["genesis"], asked["seconds"], 0.96 * asked["seconds"]),
            steps=1,
            step_tokens=0,
            group_size=16,
            retain=2,
            fragments=8,
            sync_limit=3.0,
            clip=True,
            sliced=sliced,
        )
        replica = GossipReplica(
            trainer=trainer,  # type: ignore[arg-type]
            batches=lambda round_: iter(()),
            held_out=torch.zeros(1, 2, dtype=torch.long),
            peer=self.identity.peer_id,
            module=module,
            rules=rules,
            codec=make_codec(codec),
            outer=OuterStep(1.0, 0.0, True, 0),
            exchange=exchange,
            now=self.clock.now,
            waits=WaitBoard(self.clock.now),
            emit=emit,
            session=bytes(16),
        )
        await replica.run(ReplicaState(module, trainer.layout, Round(0), trainer.layout.zeros()))
        exchange.close()
        return told[asked["warm"] :]

    async def bare(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """As many bytes as a sliced round moves, from each to each at once, with nothing to compute or to wait for."""
        from hivemind.p2p import PeerID
        from transfer import RAW, RawReader, serve_raw

        data = memoryview(os.urandom(asked["bytes"]))
        await self.node.host.add_binary_stream_handler(RAW, lambda _, *ends: serve_raw(data, *ends))
        await asyncio.sleep(asked["genesis"] - time.time())
        others = [PeerID.from_base58(peer) for peer in await self.node.connected()]
        streams = [(await self.node.host.call_binary_stream_handler(other, RAW))[2] for other in others]
        readers = [RawReader(writer) for writer in streams]
        told, meter = [], CpuMeter()
        for number in range(asked["warm"] + asked["syncs"]):
            await asyncio.sleep(asked["genesis"] + (number + 1) * asked["seconds"] - time.time())
            before, began = meter.seconds(), time.perf_counter()
            await asyncio.gather(*(reader.request(b"x", len(data)) for reader in readers))
            seconds, cpu = time.perf_counter() - began, meter.seconds() - before
            told.append({"seconds": seconds, "cpu": cpu, "group": 1 + len(others)})
        for reader in readers:
            reader.close()
        return told[asked["warm"] :]

    async def close(self) -> None:
        from potluck.dht.node import stop_dht

        await stop_dht(self.dht)
        await self.node.__aexit__()


class TheirPeer:
    """hivemind's DHT and one averager per compression."""

    def open(self, listen: str, initial: Sequence[str]) -> list[str]:
        import hivemind

        self.dht = hivemind.DHT(
            initial_peers=list(initial), host_maddrs=[f"/ip4/{listen}/tcp/0"], start=True, use_ipfs=False
        )
        return [str(address) for address in self.dht.get_visible_maddrs()]

    def average(self, asked: dict[str, Any], ready: Any, go: Any) -> list[dict[str, Any]]:
        """`ready()` says that a group is found, `go()` waits until all have one."""
        import hivemind
        from hivemind.averaging import DecentralizedAverager
        from hivemind.averaging.control import AveragingStage
        from hivemind.compression import Float16Compression, NoCompression, Uniform8BitQuantization

        kinds = {"float32": NoCompression(), "float16": Float16Compression(), "uniform8": Uniform8BitQuantization()}
        dice = torch.Generator().manual_seed(asked["number"])
        tensors = [1e-3 * torch.randn(SIDE, SIDE, generator=dice) for _ in range(asked["millions"])]
        while True:
            averager = DecentralizedAverager(
                tensors,
                self.dht,
                start=False,
                prefix=f"bench-{asked['way']}",
                target_group_size=asked["peers"],
                min_group_size=asked["peers"],
                compression=kinds[asked["way"]],
                min_matchmaking_time=2.0,
                request_timeout=5.0,
            )
            try:
                averager.run_in_background(timeout=START_SECONDS)
                break
            except TimeoutError:  # rarely its process waits forever for the DHT's
                print("Error: hivemind's averager did not start; once more", file=sys.stderr)
                averager.kill()
        told, meter = [], CpuMeter()
        try:
            for _ in range(asked["warm"] + asked["syncs"]):
                step = averager.step(wait=False, require_trigger=True, timeout=120, allow_retries=True)
                until = time.monotonic() + 60
                while step.stage != AveragingStage.AWAITING_TRIGGER and time.monotonic() < until:
                    time.sleep(0.005)
                ready()
                go()
                before, began = meter.seconds(), time.perf_counter()
                step.allow_allreduce()
                found = step.result(timeout=300)
                seconds, cpu = time.perf_counter() - began, meter.seconds() - before
                told.append({"seconds": seconds, "cpu": cpu, "group": len(found or ())})
        finally:
            averager.shutdown()
        del hivemind
        return told[asked["warm"] :]


def say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def serve_ours(home: Path) -> None:
    """Commands come as lines of JSON, answers go as such. Ends with the command to close."""
    ours = OurPeer()
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        match asked["do"]:
            case "open ours":
                say(await ours.open(home, asked["listen"]))
            case "meet":
                await ours.meet(asked["addresses"])
                say("met")
            case "ours":
                say(await ours.average(asked))
            case "bare":
                say(await ours.bare(asked))
            case "close ours":
                await ours.close()
                say("closed")
                return


def serve_theirs() -> None:
    """In the main thread and without a loop, as hivemind wants it."""
    theirs = TheirPeer()
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        match asked["do"]:
            case "open theirs":
                say(theirs.open(asked["listen"], asked["initial"]))
            case "theirs":
                say(theirs.average(asked, lambda: say("ready"), sys.stdin.readline))


# --- the group


def imports(home: Path) -> None:
    """All that peers need, before they are forked off: eight times it would take longer than what is measured."""
    import hivemind
    import uvloop
    from hivemind.p2p import P2P

    import potluck.peer.node
    import potluck.swarm.rounds

    P2P._UNIX_SOCKET_PREFIX = f"/unix{home}/"
    del hivemind, uvloop, potluck


def enter(namespace: str) -> None:
    libc, file = ctypes.CDLL(None, use_errno=True), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(file, 0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def become_worker(home: Path, pipes: tuple[int, int], log: int, namespace: str | None) -> None:
    import uvloop

    for theirs, ours in zip((*pipes, log), (0, 1, 2), strict=True):
        os.dup2(theirs, ours)
    os.closerange(3, 1024)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    if namespace is not None:
        enter(namespace)
    uvloop.run(serve_ours(home))
    serve_theirs()


class Worker:
    def __init__(self, number: int, home: Path, listen: str, namespace: str | None) -> None:
        self.number, self.listen = number, listen
        home.mkdir()
        self._log = (home / "stderr").open("w+")
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                become_worker(home, (its_in, its_out), self._log.fileno(), namespace)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(its_in)
        os.close(its_out)
        self._to, self._from = os.fdopen(our_out, "w"), os.fdopen(our_in, "rb", buffering=0)

    def tell(self, do: str, **fields: Any) -> None:
        self._to.write(json.dumps({"do": do, "number": self.number, **fields}) + "\n")
        self._to.flush()

    def hear(self) -> Any:
        came, _, _ = select.select([self._from], [], [], PATIENCE_SECONDS)
        line = self._from.readline() if came else b""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"peer {self.number} {'ended' if came else 'hangs'}: {self._log.read()[-3000:]}")
        return json.loads(line)

    def complaints(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        process = psutil.Process(self._pid)
        for each in [*process.children(recursive=True), process]:  # hivemind would take its time
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        self._to.close()
        self._from.close()
        self._log.close()


class Group:
    """Peers on one network. `received()`: bytes that their lines received so far, or None on loopback."""

    def __init__(self, workers: Sequence[Worker], received: Any = None) -> None:
        self.workers, self.received = workers, received

    def all(self, do: str, **fields: Any) -> list[Any]:
        for worker in self.workers:
            worker.tell(do, **fields)
        return [worker.hear() for worker in self.workers]

    def open(self) -> None:
        addresses = [self._one(worker, "open ours", listen=worker.listen) for worker in self.workers]
        for worker in self.workers:  # one after another: each finds those before it
            self._one(worker, "meet", addresses=addresses[: worker.number])

    def open_theirs(self) -> None:
        initial: list[str] = []
        for worker in self.workers:
            initial += self._one(worker, "open theirs", listen=worker.listen, initial=initial[:1])

    def _one(self, worker: Worker, do: str, **fields: Any) -> Any:
        worker.tell(do, **fields)
        return worker.hear()

    def ours(self, way: str, millions: int, syncs: int, warm: int, seconds: float) -> dict[str, Any]:
        before = self.received() if self.received else None
        asked = {"way": way, "millions": millions, "syncs": syncs, "warm": warm, "seconds": seconds}
        told = self.all("ours", genesis=time.time() + 0.5 + 0.03 * millions, **asked)
        row = self._row(way, told, before, syncs, warm)
        row["finding"] = statistics.median(one["finding"] for peer in told for one in peer)
        row["parts"] = {
            part: statistics.median(one["parts"][part] for peer in told for one in peer)
            for part in ("commit", "pull", "apply")
        }
        row["daemon_cpu"] = statistics.median(one["daemon_cpu"] for peer in told for one in peer)
        for name, what in (("counted_mb", "received"), ("pulled_mb", "pulled")):
            row[name] = statistics.median(one[what] for peer in told for one in peer) / 1e6
        row["one_state"] = all(len({peer[n]["digest"] for peer in told}) == 1 for n in range(syncs))
        return row

    def bare(self, way: str, millions: int, syncs: int, warm: int, seconds: float) -> dict[str, Any]:
        size = int(2e6 * millions * BARE[way] / len(self.workers))
        before = self.received() if self.received else None
        asked = {"bytes": size, "syncs": syncs, "warm": warm, "seconds": seconds}
        return self._row(way, self.all("bare", genesis=time.time() + 0.5, **asked), before, syncs, warm)

    def theirs(self, way: str, millions: int, syncs: int, warm: int) -> dict[str, Any]:
        before = self.received() if self.received else None
        for worker in self.workers:
            worker.tell("theirs", way=way, millions=millions, syncs=syncs, warm=warm, peers=len(self.workers))
        for _ in range(warm + syncs):
            for worker in self.workers:
                if (said := worker.hear()) != "ready":
                    raise RuntimeError(f"hivemind's averager: {said}")
            for worker in self.workers:
                worker.tell("go")
        return self._row(way, [worker.hear() for worker in self.workers], before, syncs, warm)

    def _row(self, way: str, told: list[list[dict[str, Any]]], before: Any, syncs: int, warm: int) -> dict[str, Any]:
        groups = {one["group"] for peer in told for one in peer}
        if groups != {len(self.workers)}:
            console.print(f"{way}: groups of {groups}, not all {len(self.workers)}", style="yellow")
        received = None
        if before is not None:  # as many in syncs that are not told
            all_of_it = statistics.mean(b - a for a, b in zip(before, self.received(), strict=True))
            received = all_of_it / (warm + syncs) / 1e6
        row = {
            "way": way,
            "seconds": statistics.median(max(peer[n]["seconds"] for peer in told) for n in range(syncs)),
            "cpu": statistics.median(statistics.mean(peer[n]["cpu"] for peer in told) for n in range(syncs)),
            "line_mb": received,
        }
        console.print(
            f"{way}: {row['seconds']:.2f} s, {row['cpu']:.2f} CPU s per peer"
            + (f", {received:.1f} MB received" if received else "")
        )
        return row


@contextlib.contextmanager
def loopback(home: Path, peers: int) -> Iterator[Group]:
    workers = [Worker(n, home / f"l{n}", "127.0.0.1", None) for n in range(peers)]
    try:
        yield Group(workers)
    finally:
        _end(workers)


@contextlib.contextmanager
def shaped(home: Path, peers: int, mbit: float) -> Iterator[Group]:
    from network import Lab

    with Lab() as lab:
        sites = [lab.host(f"peer{n}", down_mbit=mbit, up_mbit=mbit) for n in range(peers)]
        workers = [Worker(n, home / f"s{n}", site.address, site.namespace) for n, site in enumerate(sites)]
        try:
            yield Group(workers, lambda: [lab.received(site) for site in sites])
        finally:
            _end(workers)


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        # An error of ours begins a line; hivemind's averager logs some when it is ended.
        said = [line for line in worker.complaints().splitlines() if "swarm." in line or ERROR.match(line)]
        if said:
            console.print(f"peer {worker.number}: " + "\n".join(said[:6]), style="dim", markup=False)
    threads = [threading.Thread(target=worker.close) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def chosen(options: argparse.Namespace, ways: Sequence[str]) -> list[str]:
    """Of these, what `--ways` asks for."""
    return [way for way in ways if not options.ways or way in options.ways.split(",")]


#: (syncs that are told, those before), by way.
Counts = Callable[[str], tuple[int, int]]


def measure(
    group: Group, ours: dict[str, float], theirs: Sequence[str], millions: int, counts: Counts
) -> dict[str, dict[str, Any]]:
    """`ours`: seconds of a round, by way."""
    rows = {}
    group.open()
    for way, seconds in ours.items():
        rows[way] = (group.bare if way in BARE else group.ours)(way, millions, *counts(way), seconds)
    group.all("close ours")
    if theirs:
        group.open_theirs()
    for way in theirs:
        rows[way] = group.theirs(way, millions, *counts(way))
    return rows


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("", "seconds", "commit + pull + apply", "group", "CPU s per peer", "MB received per peer"):
        table.add_column(column, justify="right" if column else "left")
    for way, row in rows.items():
        parts = " + ".join(f"{each:.2f}" for each in row["parts"].values()) if "parts" in row else ""
        size = row["line_mb"] or row.get("counted_mb")
        name = f"bare streams {BARE[way]:g} B" if way in BARE else f"{'Potluck' if way in OURS else 'hivemind'} {way}"
        finding = f"{row['finding']:.2f}" if "finding" in row else ""
        table.add_row(name, f"{row['seconds']:.2f}", parts, finding, f"{row['cpu']:.2f}", f"{size:.2f}" if size else "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s: fewer parameters, one or two syncs")
    parser.add_argument("--parameters", type=int, default=25, help="millions")
    parser.add_argument("--syncs", type=int, default=5)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--only", choices=["loopback", "shaped"], help="one of both networks")
    parser.add_argument("--ways", help="only these, for example int8,uniform8")
    parser.add_argument("--warm", type=int, default=3, help="syncs before those that are told")
    options = parser.parse_args()
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="pla", dir="/tmp"))
    # What hivemind's processes leave behind goes with it.
    os.environ["TMPDIR"], tempfile.tempdir = str(home), None
    imports(home)
    millions = 8 if options.quick else options.parameters
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def counts(way: str) -> tuple[int, int]:
        if not options.quick:
            return options.syncs, options.warm
        return {"none": (1, 2), "int8": (2, 3), "float32": (1, 1), "uniform8": (1, 1)}[way]

    def shaped_counts(way: str) -> tuple[int, int]:
        if not options.quick:
            return options.syncs, options.warm
        return {"int8": (1, 0), "sparse": (1, 3), "uniform8": (1, 0)}[way]

    try:
        if options.only != "shaped":
            # About three times what a sync takes on two cores; four, where there is time.
            windows = {"none": 0.3 + 0.22 * millions, "int8": 0.4 + 0.09 * millions, "sparse": 0.4 + 0.09 * millions}
            if not options.quick:
                windows = {way: 1.4 * seconds for way, seconds in windows.items()}
            windows |= {"bare-int8": windows["int8"], "bare-none": windows["none"]}
            ours = chosen(options, ("int8", "none") if options.quick else (*OURS, *BARE))
            theirs = chosen(options, ("float32", "uniform8") if options.quick else THEIRS)
            with loopback(home, options.peers) as group:
                found["loopback"] = measure(group, {way: windows[way] for way in ours}, theirs, millions, counts)
            show(f"loopback, {millions}M parameters, {options.peers} peers", found["loopback"])
        if options.only != "loopback":
            line = 8 / options.mbit  # seconds per MB
            of_line = {"none": 11.0, "int8": 2.0, "sparse": 0.3}
            windows = {way: 0.5 + 0.05 * millions + 2.6 * line * each * millions for way, each in of_line.items()}
            windows["bare-int8"] = windows["int8"]
            ours = chosen(options, ("int8", "sparse") if options.quick else (*OURS, "bare-int8"))
            theirs = chosen(options, ("uniform8",) if options.quick else THEIRS)
            with shaped(home, options.peers, options.mbit) as group:
                found["shaped"] = measure(group, {way: windows[way] for way in ours}, theirs, millions, shaped_counts)
            show(f"lines of {options.mbit:g} Mbit/s, {millions}M parameters", found["shaped"])
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(summary(found, options.mbit, millions)))


def summary(found: dict[str, dict[str, dict[str, Any]]], mbit: float, millions: int) -> dict[str, Any]:
    says: dict[str, Any] = {"parameters": millions * 1_000_000}

    def ratio(network: str, theirs: str, ours: str, what: str) -> float | None:
        rows = found.get(network, {})
        if theirs not in rows or ours not in rows:
            return None
        return round(rows[theirs][what] / rows[ours][what], 2)

    says["int8_speedup"] = ratio("loopback", "uniform8", "int8", "seconds")
    says["int8_cpu_ratio"] = ratio("loopback", "uniform8", "int8", "cpu")
    says["none_speedup"] = ratio("loopback", "float32", "none", "seconds")
    says["none_cpu_ratio"] = ratio("loopback", "float32", "none", "cpu")
    says["sparse_speedup"] = ratio("shaped", "uniform8", "sparse", "seconds")
    says["sparse_bytes_ratio"] = ratio("shaped", "uniform8", "sparse", "line_mb")
    says["sparse_bytes_ratio_to_float32"] = ratio("shaped", "float32", "sparse", "line_mb")
    says["shaped_int8_speedup"] = ratio("shaped", "uniform8", "int8", "seconds")
    says["bare_int8_speedup"] = ratio("loopback", "uniform8", "bare-int8", "seconds")
    says["bare_none_speedup"] = ratio("loopback", "float32", "bare-none", "seconds")
    for name, way in (("shaped_ratio", "int8"), ("bare_shaped_ratio", "bare-int8")):
        says[name] = None
        if row := found.get("shaped", {}).get(way):
            pulled = row["line_mb"] * row.get("pulled_mb", 1) / row.get("counted_mb", 1)
            says[name] = round(pulled * 8 / mbit / row["seconds"], 3)
    says["rows"] = {network: list(rows.values()) for network, rows in found.items()}
    return says


if __name__ == "__main__":
    main()
