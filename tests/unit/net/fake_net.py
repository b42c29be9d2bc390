"""A host on unix sockets (real asyncio transports, no libp2p) for tests of what runs on hosts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from potluck.net.identity import peer_id_of
from potluck.net.rpc import Rpc, RpcLimits


class FakeId:
    """What Potluck uses of hivemind's PeerID."""

    def __init__(self, text: str) -> None:
        self._text = text

    def to_base58(self) -> str:
        return self._text

    @classmethod
    def from_base58(cls, text: str) -> FakeId:
        return cls(text)


class FakeHost:
    """Streams between hosts of one directory. A stream begins with the caller's id and the protocol."""

    def __init__(self, directory: Path, name: str) -> None:
        self.peer_id = FakeId(peer_id_of(hashlib.sha256(name.encode()).digest()))
        self._directory = directory
        self._handlers: dict[str, Any] = {}
        self._server: asyncio.Server | None = None
        self.transports: list[Any] = []
        self.opened = 0

    def _path(self, peer: FakeId) -> Path:
        return self._directory / peer.to_base58()[-12:]

    async def add_binary_stream_handler(self, name: str, handler: Any, balanced: bool = False) -> None:
        self._handlers[name] = handler
        if self._server is None:
            self._server = await asyncio.start_unix_server(self._accept, self._path(self.peer_id))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.transports.append(writer.transport)
        peer, _, protocol = (await reader.readline()).decode().strip().partition(" ")
        await self._handlers[protocol](SimpleNamespace(peer_id=FakeId(peer)), reader, writer)

    async def call_binary_stream_handler(self, peer_id: Any, handler_name: str) -> tuple[Any, Any, Any]:
        reader, writer = await asyncio.open_unix_connection(self._path(peer_id))
        writer.write(f"{self.peer_id.to_base58()} {handler_name}\n".encode())
        self.transports.append(writer.transport)
        self.opened += 1
        return None, reader, writer

    def die(self) -> None:
        """As a killed process: every stream breaks and nobody listens any more."""
        if self._server is not None:
            self._server.close()
        self._path(self.peer_id).unlink(missing_ok=True)
        for transport in self.transports:
            transport.abort()


class Net:
    """Named peers with an `Rpc` each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rpcs: list[Rpc] = []

    async def rpc(self, name: str, limits: RpcLimits | None = None, **options: Any) -> Rpc:
        rpc = Rpc(FakeHost(self.directory, name), limits, **options)  # type: ignore[arg-type]
        await rpc.start()
        self.rpcs.append(rpc)
        return rpc

    async def raw(self, rpc: Rpc, name: str = "stranger") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to `rpc` on which a test says what it likes."""
        host = FakeHost(self.directory, name)
        _, reader, writer = await host.call_binary_stream_handler(rpc.host.peer_id, "/potluck/rpc/1")
        return reader, writer


@contextlib.asynccontextmanager
async def network(directory: Path) -> AsyncIterator[Net]:
    net = Net(directory)
    try:
        yield net
    finally:
        for rpc in net.rpcs:
            await rpc.close()
            rpc.host.die()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(left, timeout=2) if left else None
        assert not [task for task in left if not task.done()], "tasks outlive their owner"
