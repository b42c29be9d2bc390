"""How much Potluck's transfer costs over a bare libp2p stream.

Two processes, each with its own p2pd, as in real life. `raw` is the fastest honest use of a p2pd stream: the server
writes, the client reads into one buffer and throws the bytes away. `fetch` moves the same number of bytes as a
blob: requested in chunks, every chunk hashed and compared. Both read into memory that is in use already, and are
measured in turns, on the same connection. A joiner's state comes into fresh memory, whose page faults cost as much as
a third of the transfer, whoever makes it: `new_memory_ratio` is a fetch into new memory beside the bare stream plus
the same amount of new memory. `fetch_to_disk` is how contributions of more than a chunk come.

    python benchmarks/transfer.py [--quick]

The last line is JSON. Goals: fetch_ratio >= 0.8 (fetch / raw), rpc_rtt_ratio <= 1.5 (a call / a 16-byte ping-pong
on a raw stream), shaped_ratio >= 0.9 (goodput of a fetch on a 100 Mbit/s link / 100 Mbit/s; needs root and network
namespaces, else null).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from potluck.net.blobs import BlobId, BlobRef, BlobService, BlobStore, ChunkList
from potluck.net.fetch import fetch
from potluck.net.host import PeerId
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity
from potluck.net.rpc import Reply, Rpc

RAW = "/potluck/bench/raw"
PING = "/potluck/bench/ping"
SLICE = 1 << 20
PING_BYTES = 16
LINK_BITS_PER_SECOND = 100e6


# --- the server


async def serve_raw(data: memoryview, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each byte with all of `data`."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            await reader.readexactly(1)
            for start in range(0, len(data), SLICE):
                writer.write(data[start : start + SLICE])
                await writer.drain()
    writer.close()


class PingServer(asyncio.Protocol):
    def __init__(self, transport: Any, writer: asyncio.StreamWriter) -> None:
        self._writer = writer  # closes the transport when it goes
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


async def serve_ping(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As fast as asyncio can: no stream buffers, no task."""
    await reader.readexactly(PING_BYTES)
    _switch(writer, PingServer(writer.transport, writer))
    writer.write(bytes(PING_BYTES))


async def serve(args: argparse.Namespace) -> None:
    home = Path(args.home)
    host = await GoHost.start(Identity.load_or_create(home / "key"), home / "run", listen=[args.listen])
    rpc = Rpc(host)
    try:
        await rpc.start()
        store = BlobStore(home / "blobs", 8 << 30)
        BlobService(rpc, store)

        async def echo(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
            return Reply(head, bytes(body))

        rpc.register("echo", echo)
        blob = store.put(np.random.default_rng(0).bytes(args.bytes))
        # The same bytes from the same place: a small buffer that stays in the cache would be another race.
        await host.add_binary_stream_handler(RAW, lambda _, *ends: serve_raw(store.open(blob.id), *ends))
        await host.add_binary_stream_handler(PING, serve_ping)
        state = [np.random.default_rng(i).random(args.bytes // 64, np.float32) for i in range(16)]
        memory = store.add_memory(ChunkList.of(state), state)
        address = str((await host.get_visible_maddrs())[0])
        print(json.dumps({"address": address, "blob": blob, "state": memory}), flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the client closes it
    finally:
        await rpc.close()
        await host.shutdown()


# --- the client


class RawReader(asyncio.BufferedProtocol):
    """Reads into one buffer and counts."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._buffer = memoryview(bytearray(SLICE))
        self._left = 0
        self._done: asyncio.Future[None] | None = None
        _switch(writer, self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left == 0 and self._done is not None:
            self._done.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError())

    async def request(self, sent: bytes, expected: int) -> None:
        self._left, self._done = expected, asyncio.get_running_loop().create_future()
        self._writer.transport.write(sent)
        await self._done

    def close(self) -> None:
        self._writer.close()


def _switch(writer: asyncio.StreamWriter, protocol: asyncio.BaseProtocol) -> None:
    transport: Any = writer.transport
    transport.pause_reading()
    transport.set_protocol(protocol)
    transport.resume_reading()


async def seconds(work: Callable[[], Awaitable[Any]]) -> float:
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


@contextlib.asynccontextmanager
async def client(home: Path, address: str, listen: str) -> AsyncIterator[tuple[GoHost, Rpc, PeerId]]:
    host = await GoHost.start(Identity.load_or_create(home / "key"), home / "run", listen=[listen])
    rpc = Rpc(host)
    try:
        yield host, rpc, await host.connect(address, 20)
    finally:
        await rpc.close()
        await host.shutdown()


async def measure_loopback(home: Path, server: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    async with client(home, server["address"], "/ip4/127.0.0.1/tcp/0") as (host, rpc, peer):
        remote = type(host.peer_id).from_base58(peer)
        raw = RawReader((await host.call_binary_stream_handler(remote, RAW))[2])
        ping = RawReader((await host.call_binary_stream_handler(remote, PING))[2])
        blob, state = (BlobRef(BlobId(each[0]), each[1]) for each in (server["blob"], server["state"]))

        async def raw_once() -> None:
            await raw.request(b"!", blob.size)

        target = memoryview(bytearray(os.urandom(SLICE) * -(-blob.size // SLICE)))

        async def fetch_once(ref: BlobRef, **options: Any) -> None:
            await fetch(rpc, ref, [peer], timeout_seconds=300, max_bytes=ref.size, **options)

        async def fetch_into(ref: BlobRef) -> None:
            await fetch_once(ref, into=target[: ref.size])

        async def to_disk() -> None:
            store = BlobStore(home / "fetched", 8 << 30)
            await fetch_once(blob, store=store)
            store.remove(blob.id)

        async def raw_into_new() -> None:
            """What a joiner's state needs whoever brings it: memory that was never touched, and the bare stream."""
            bytearray(blob.size)
            await raw_once()

        raws, fetches, states, disks, new, raw_news = [], [], [], [], [], []
        await raw_once()
        await fetch_into(blob)
        for _ in range(args.repeats):
            raws.append(await seconds(raw_once))
            fetches.append(await seconds(lambda: fetch_into(blob)))
        for _ in range(5):
            raw_news.append(await seconds(raw_into_new))
            states.append(await seconds(lambda: fetch_into(state)))
            new.append(await seconds(lambda: fetch_once(blob)))
            disks.append(await seconds(to_disk))

        pings, calls = [], []
        for turn in range(args.turns + 1):
            for _ in range(100):
                started = time.perf_counter()
                await ping.request(bytes(PING_BYTES), PING_BYTES)
                middle = time.perf_counter()
                await rpc.call(peer, "echo", {}, bytes(PING_BYTES), timeout_seconds=30)
                ended = time.perf_counter()
                if turn:  # the first turn warms up
                    pings.append(middle - started)
                    calls.append(ended - middle)
        raw.close()
        ping.close()

    def speed(size: int, times: list[float]) -> float:
        return round(size / 1e6 / statistics.median(times), 1)

    return {
        "raw_stream_mb_s": speed(blob.size, raws),
        "fetch_mb_s": speed(blob.size, fetches),
        # Of neighbours in time: the machine's speed drifts more than the two differ.
        "fetch_ratio": round(statistics.median(r / f for r, f in zip(raws, fetches, strict=True)), 3),
        "fetch_new_memory_mb_s": speed(blob.size, new),
        "raw_new_memory_mb_s": speed(blob.size, raw_news),
        "new_memory_ratio": round(statistics.median(r / f for r, f in zip(raw_news, new, strict=True)), 3),
        "fetch_to_disk_mb_s": speed(blob.size, disks),
        "state_fetch_mb_s": speed(state.size, states),
        "raw_rtt_ms": round(1e3 * statistics.median(pings), 4),
        "rpc_rtt_ms": round(1e3 * statistics.median(calls), 4),
        "rpc_rtt_ratio": round(statistics.median(calls) / statistics.median(pings), 3),
        "bytes": blob.size,
    }


async def measure_shaped(args: argparse.Namespace) -> None:
    """The client inside its namespace; prints seconds."""
    server = json.loads(args.shaped_client)
    blob = BlobRef(BlobId(server["blob"][0]), server["blob"][1])
    async with client(Path(args.home), server["address"], args.listen) as (_, rpc, peer):
        await rpc.call(peer, "echo", timeout_seconds=30, lane="bulk")

        async def fetch_once() -> None:
            await fetch(rpc, blob, [peer], timeout_seconds=300, max_bytes=blob.size)

        print(json.dumps({"seconds": await seconds(fetch_once)}), flush=True)


# --- processes and namespaces


@contextlib.contextmanager
def serving(home: Path, listen: str, size: int, prefix: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    command = [*prefix, sys.executable, __file__, "--serve", "--home", str(home), "--listen", listen]
    process = subprocess.Popen(
        [*command, "--bytes", str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start")
        yield json.loads(line)
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def shaped_namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a link of 100 Mbit/s in each direction."""
    tag = f"pl{os.getpid()}"
    names = (f"{tag}a", f"{tag}b")
    links = (f"{tag}x"[-15:], f"{tag}y"[-15:])
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for index, (name, link) in enumerate(zip(names, links, strict=True)):
            _run("ip", "link", "set", link, "netns", name)
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "addr", "add", f"10.213.0.{index + 1}/24", "dev", link)
            _run(*inside, "ip", "link", "set", link, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            shape = ("rate", f"{LINK_BITS_PER_SECOND / 1e6:.0f}mbit", "burst", "64kb", "latency", "50ms")
            _run(*inside, "tc", "qdisc", "add", "dev", link, "root", "tbf", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", links[0]], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def shaped(home: Path, size: int) -> dict[str, Any]:
    try:
        with shaped_namespaces() as (server_ns, client_ns):
            inside = ("ip", "netns", "exec")
            listen = "/ip4/10.213.0.{}/tcp/0"
            with serving(home / "c", listen.format(1), size, (*inside, server_ns)) as server:
                command = [*inside, client_ns, sys.executable, __file__, "--home", str(home / "d")]
                command += ["--listen", listen.format(2), "--shaped-client", json.dumps(server)]
                output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            took = json.loads(output.stdout.splitlines()[-1])["seconds"]
            mbit_s = server["blob"][1] * 8 / took / 1e6
            return {
                "shaped_mbit_s": round(mbit_s, 2),
                "shaped_ratio": round(mbit_s * 1e6 / LINK_BITS_PER_SECOND, 3),
            }
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = getattr(error, "stderr", None) or error
        return {"shaped_ratio": None, "shaped_skipped": str(reason).strip()[-300:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data and fewer turns: under 50 s")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shaped-client", help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    parser.add_argument("--listen", default="/ip4/127.0.0.1/tcp/0", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args))
        return
    if args.shaped_client:
        uvloop.run(measure_shaped(args))
        return
    # An ordinary exit unwinds the namespaces and processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.repeats, args.turns = (9, 8) if args.quick else (15, 30)
    size = (256 << 20) if args.quick else (1 << 30)
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="plb"))
    try:
        for name in "abcd":
            (home / name).mkdir()
        with serving(home / "a", args.listen, size) as server:
            results = uvloop.run(measure_loopback(home / "b", server, args))
        results |= shaped(home, (64 << 20) if args.quick else (128 << 20))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    goals = {"fetch_ratio": ">= 0.8", "rpc_rtt_ratio": "<= 1.5", "shaped_ratio": ">= 0.9"}
    table = Table("measure", "value", "goal", title="Potluck's transfer and a bare p2pd stream")
    for name, value in results.items():
        table.add_row(name, str(value), goals.get(name, ""))
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
