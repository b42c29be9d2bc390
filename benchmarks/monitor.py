"""How many viewers a public monitor serves from one core, and how soon they see what a peer says.

    python benchmarks/monitor.py [--quick] [--viewers 1000] [--peers 500] [--seconds 60]

The monitor of a run as `potluck monitor` has it, in a process of its own that may use one core only: signed heartbeats
come from the control socket of a libp2p daemon, are verified, written into the history, and served as events. Here the
daemon is a stand-in that speaks the same control protocol, and 500 identities sign their heartbeats in the intervals
that so many peers have (500 real daemons do not fit on one machine). The viewers are 1,000 HTTP connections that take
compressed events, as browsers do, on the other core.

The delay of an update is counted from the moment when a peer signs its heartbeat until a viewer has read the first
event that says that the run was heard that late (a heartbeat that waits in the socket just when others are written down
counts as heard with them: milliseconds); over all heartbeats and all viewers. Meanwhile somebody else asks for
the run's curve twice a second. The last line is JSON. Goal: p95_seconds below 1 with 1,000 viewers and 500 peers.
`--quick`: within 50 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from rich.console import Console
from rich.table import Table

from potluck.dht.manifest import sign
from potluck.dht.records import Heartbeat, encode
from potluck.dht.template import preset_draft
from potluck.net.identity import Identity
from potluck.peer.build import rules_of
from potluck.peer.home import Home, RunFolder
from potluck.peer.intervals import interval_seconds
from potluck.peer.telemetry import Telemetry

ROUND_SECONDS: Final = 60.0
STAGES: Final = 4
#: A heartbeat that is signed in the very millisecond in which others are written belongs to the next ones.
SLACK_SECONDS: Final = 0.01
console = Console(stderr=True)


# ---- the monitor, on one core ----------------------------------------------------------------------------------


async def monitor(home: Path, daemon: Path) -> None:
    from potluck.peer.web.app import create_app
    from potluck.peer.web.serve import serve

    (folder,) = Home(home).runs()

    async def control(request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(str(daemon))
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        return response, reader, writer

    def emit(name: str, **fields: Any) -> None:
        print(name, fields, file=sys.stderr)

    signed = folder.manifest()
    assert signed
    rounds = rules_of(signed.manifest).clock
    telemetry = Telemetry(control, folder.run_id, folder.history, clock=rounds, now=time.time, emit=emit)
    async with serve(create_app(lambda: [folder], max_viewers=5000)) as url:
        print(url, flush=True)
        await telemetry.run()


# ---- the stand-in for the daemon: 500 peers --------------------------------------------------------------------


class Peers:
    """Says what they say to whoever subscribes. `said`: when each heartbeat was signed."""

    def __init__(self, folder: RunFolder, count: int, scratch: Path) -> None:
        self._run, self._began = folder.run_id, time.time()
        seeds = (Ed25519PrivateKey.generate().private_bytes_raw() for _ in range(count))
        self._identities = [Identity.restore(scratch / f"{n}.key", seed) for n, seed in enumerate(seeds)]
        self._interval = interval_seconds(ROUND_SECONDS, count)
        self.said: list[float] = []
        self._writer: asyncio.StreamWriter | None = None
        self.subscribed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_pbmsg_safe(reader, p2pd_pb2.Request())
        await write_pbmsg(writer, p2pd_pb2.Response(type=p2pd_pb2.Response.OK))
        self._writer = writer
        self.subscribed.set()

    async def talk(self) -> None:
        dice, peers = random.Random(1), list(enumerate(self._identities))
        for number, identity in peers:  # all are known from the beginning
            await self._say(number, identity, dice)
            await asyncio.sleep(0.006)  # more than 200 a second are not even verified
        while True:
            dice.shuffle(peers)
            for number, identity in peers:
                await asyncio.sleep(self._interval / len(peers))
                await self._say(number, identity, dice)

    async def _say(self, number: int, identity: Identity, dice: random.Random) -> None:
        assert self._writer
        now = time.time()
        round_ = int((now - self._began) // ROUND_SECONDS)
        beat = Heartbeat(
            module=f"stage.{number % STAGES}",
            round=round_,
            phase="training",
            name=f"peer {number}",
            version="0.1.0",
            loss=dice.gauss(3.0, 0.05),
            tokens_per_second=dice.uniform(500, 5000),
            load=dice.random(),
            contributed=round_,
            started=self._began,
            sent_at=now,
        )
        data = encode(beat, identity, self._run, now + 300)
        sender = PeerID.from_base58(identity.peer_id).to_bytes()
        await write_pbmsg(self._writer, p2pd_pb2.PSMessage(data=data, **{"from": sender}))
        self.said.append(now)


# ---- viewers ---------------------------------------------------------------------------------------------------


class Viewer:
    """One connection. `seen`: (when it was read, how late the run was heard then) of each event."""

    #: All viewers get the same bytes: each event is opened once.
    opened: ClassVar[dict[bytes, float | None]] = {}

    def __init__(self, host: str, port: int, path: str) -> None:
        self._host, self._port, self._path = host, port, path
        self.seen: list[tuple[float, float]] = []
        self.bytes = 0

    async def watch(self) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        try:
            host = f"{self._host}:{self._port}"
            writer.write(f"GET {self._path} HTTP/1.1\r\nHost: {host}\r\nAccept-Encoding: gzip\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0] or b"gzip" not in head:
                raise RuntimeError(head.decode())
            while size := int(await reader.readline(), 16):
                chunk = (await reader.readexactly(size + 2))[:-2]
                self.bytes += size
                heard = self._heard_at(chunk)
                if heard is not None:
                    self.seen.append((time.time(), heard))
        finally:
            writer.close()

    def _heard_at(self, chunk: bytes) -> float | None:
        """None: no state of the run. The gzip stream's header comes in a chunk with the first words."""
        if chunk not in Viewer.opened:
            text = b"" if chunk[:2] == b"\x1f\x8b" else zlib.decompressobj(-zlib.MAX_WBITS).decompress(chunk)
            _, found, data = text.partition(b"data: ")
            Viewer.opened = dict([*Viewer.opened.items()][-15:])
            Viewer.opened[chunk] = json.loads(data)["heard_at"] if found else None
        return Viewer.opened[chunk]


def delays(said: np.ndarray, seen: list[tuple[float, float]]) -> np.ndarray:
    """Of each heartbeat, until this viewer saw it; those that it did not see are left out."""
    if not seen:
        return np.zeros(0)
    read, heard = np.array(seen).T
    first = np.searchsorted(heard, said + SLACK_SECONDS)
    told = first < len(read)
    return np.asarray(read[first[told]] - said[told])


async def ask_now_and_then(url: str, answers: list[float]) -> None:
    def ask() -> float:
        began = time.monotonic()
        with urllib.request.urlopen(url, timeout=30) as answer:
            answer.read()
        return time.monotonic() - began

    while True:
        answers.append(await asyncio.to_thread(ask))
        await asyncio.sleep(0.5)


async def measure(home: Home, viewers: int, peers: int, seconds: float) -> dict[str, Any]:
    folder = make_run(home)
    crowd, socket = Peers(folder, peers, home.path), home.path / "d"
    daemon = await asyncio.start_unix_server(crowd.serve, str(socket))
    cores = sorted(os.sched_getaffinity(0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--monitor", str(home.path), str(socket)),
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]),
    )
    os.sched_setaffinity(0, cores[1:] or cores)
    tasks: list[asyncio.Task[None]] = []
    answers: list[float] = []
    try:
        assert process.stdout
        url = (await process.stdout.readline()).decode().strip()
        host, _, port = url.removeprefix("http://").rpartition(":")
        path = f"/api/v1/runs/{folder.run_id}"
        await crowd.subscribed.wait()
        tasks.append(asyncio.create_task(crowd.talk()))
        watching = [Viewer(host, int(port), f"{path}/events") for _ in range(viewers)]
        for viewer in watching:
            tasks.append(asyncio.create_task(viewer.watch()))
            await asyncio.sleep(0.004)
        await until_all_see(watching, tasks)
        tasks.append(asyncio.create_task(ask_now_and_then(f"{url}{path}/curve", answers)))
        server = psutil.Process(process.pid)
        began, used, got = time.time(), sum(server.cpu_times()[:2]), sum(viewer.bytes for viewer in watching)
        await asyncio.sleep(seconds)
        took, used = time.time() - began, sum(server.cpu_times()[:2]) - used
        got = sum(viewer.bytes for viewer in watching) - got
        memory = server.memory_info().rss
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        process.terminate()
        await process.wait()
        daemon.close()
    said = np.array([at for at in crowd.said if began <= at <= began + took - 5])
    every = np.concatenate([delays(said, viewer.seen) for viewer in watching])
    events = sum(sum(read >= began for read, _ in viewer.seen) for viewer in watching)
    return {
        "viewers": viewers,
        "peers": peers,
        "heartbeats": len(said),
        "seen_of_all": round(len(every) / max(1, len(said) * viewers), 4),
        "p50_seconds": round(float(np.percentile(every, 50)), 3),
        "p95_seconds": round(float(np.percentile(every, 95)), 3),
        "longest_seconds": round(float(every.max()), 3),
        "events_per_second": round(events / took),
        "kilobits_per_viewer_and_second": round(8e-3 * got / viewers / took, 1),
        "answer_seconds_median": round(statistics.median(answers), 4),
        "answer_seconds_longest": round(max(answers), 4),
        "cpu_share": round(used / took, 3),
        "monitor_mb": round(memory / 1e6),
    }


async def until_all_see(watching: list[Viewer], tasks: list[asyncio.Task[None]]) -> None:
    async with asyncio.timeout(120):
        while not all(viewer.seen for viewer in watching):
            for task in tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.1)


def make_run(home: Home) -> RunFolder:
    """A manifest is all that pages need of a run."""
    identity, now = home.identity(), time.time()
    stages = {"model.stages": STAGES, "model.config.tie_word_embeddings": False}
    draft = preset_draft("demo", "watched", stages | {"rounds.seconds": ROUND_SECONDS})
    signed = sign(draft.finish(identity.peer_id, created=now, genesis=now), identity)
    folder = home.run(signed.run_id)
    folder.save_manifest(signed)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--viewers", type=int, default=1000)
    parser.add_argument("--peers", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--monitor", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if options.monitor:
        import uvloop

        uvloop.run(monitor(Path(options.monitor[0]), Path(options.monitor[1])))
        return
    with tempfile.TemporaryDirectory(prefix="pl", dir="/tmp") as folder:
        seconds = 20.0 if options.quick else options.seconds
        found = asyncio.run(measure(Home(Path(folder)).open(), options.viewers, options.peers, seconds))
    table = Table(title="a monitor on one core")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
