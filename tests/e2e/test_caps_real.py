"""Caps on a real line: two hosts with their libp2p daemons, and between them a relay that counts every byte."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("hivemind")

from potluck.net.blobs import BlobRef, BlobService, BlobStore
from potluck.net.fetch import fetch
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity
from potluck.net.pace import OVERHEAD
from potluck.net.rpc import Rpc

WINDOW = 10.0
EVERY = 0.1
#: Ethernet carries 1500 bytes, 52 of them TCP's and IP's; a relay does not see these.
HEADERS = 1500 / 1448


class Relay:
    """Forwards TCP connections to a port, and counts. `down`: bytes from that port to those who connected."""

    def __init__(self, port: int) -> None:
        self._port, self._writers = port, list[asyncio.StreamWriter]()
        self.up = self.down = 0
        self.listens = 0

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Relay]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.listens = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            await asyncio.sleep(0.05)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, to]

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, up: bool) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    self.up += len(data) if up else 0
                    self.down += 0 if up else len(data)
                    target.write(data)
                    await target.drain()

        await asyncio.gather(carry(reader, to, True), carry(there, writer, False))


@pytest.fixture
def short_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="pl"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


async def give(rpc: Rpc, folder: Path, size: int) -> BlobRef:
    await rpc.start()
    store = BlobStore(folder, 1 << 30)
    BlobService(rpc, store)
    return store.put(bytes(size))


def most_in_a_window(counts: Sequence[tuple[float, ...]], column: int) -> float:
    """Of counts that only grow, each with its time before it: what was added within any `WINDOW` seconds."""
    most, first = 0.0, 0
    for row in counts:
        while row[0] - counts[first][0] > WINDOW:
            first += 1
        most = max(most, row[column] - counts[first][column])
    return most


@pytest.mark.slow
def test_any_ten_seconds_on_a_real_line_stay_within_five_percent_both_ways(short_dir: Path) -> None:
    up, down, seconds = 1_500_000.0, 2_500_000.0, 13.0

    async def main() -> None:
        home, world = [
            await GoHost.start(Identity.load_or_create(short_dir / f"{name}.key"), short_dir / name) for name in "ab"
        ]
        try:
            match = re.search(r"/tcp/(\d+)", str((await home.get_visible_maddrs())[0]))
            assert match
            async with Relay(int(match[1])).run() as relay:
                await world.connect(f"/ip4/127.0.0.1/tcp/{relay.listens}/p2p/{home.identity.peer_id}", 20)
                mine, others = Rpc(home, upload=up, download=down), Rpc(world)
                refs = [
                    await give(mine, short_dir / "mine", int(2 * up * seconds)),
                    await give(others, short_dir / "others", int(2 * down * seconds)),
                ]
                getting = [
                    asyncio.create_task(fetch(to, ref, [source.peer_id], timeout_seconds=90, max_bytes=1 << 30))
                    for to, source, ref in ((others, mine, refs[0]), (mine, others, refs[1]))
                ]
                counts = list[tuple[float, int, int, int, int]]()
                began = now = time.monotonic()
                while now < began + seconds:
                    counts.append((now, relay.down, mine.bytes_sent, relay.up, mine.bytes_received))
                    await asyncio.sleep(EVERY)
                    now = time.monotonic()
                assert not any(task.done() for task in getting)
                for task in getting:
                    task.cancel()
                await asyncio.gather(*getting, return_exceptions=True)
                await mine.close()
                await others.close()
        finally:
            await asyncio.gather(home.shutdown(), world.shutdown())
        for cap, line, ours in ((up, 1, 2), (down, 3, 4)):
            on_line, of_ours = most_in_a_window(counts, line), most_in_a_window(counts, ours)
            whole = [counts[-1][column] - counts[0][column] for column in (0, line, ours)]
            print(
                f"cap {cap:.0f}: {on_line * HEADERS / cap / WINDOW:.4f} of it at most, "
                f"{whole[1] * HEADERS / cap / whole[0]:.4f} in all, libp2p adds {whole[1] / whole[2] - 1:.2%}"
            )
            assert on_line * HEADERS <= 1.05 * cap * WINDOW
            assert of_ours * OVERHEAD <= 1.05 * cap * WINDOW
            # And it is used; half of it on a machine that is busy with other things.
            assert whole[1] * HEADERS >= 0.5 * cap * whole[0]

    asyncio.run(main())
