"""What the DHT's tests share: identities, sample records, and hosts that call each other within the process."""

from __future__ import annotations

import asyncio
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hivemind.p2p import PeerID

from potluck.dht.manifest import RunId
from potluck.dht.records import Commit, Replica
from potluck.net.identity import Identity

RUN = RunId("a" * 52)
OTHER_RUN = RunId("b" * 52)
AHEAD_SECONDS = 100.0


@cache
def identity(number: int) -> Identity:
    with tempfile.TemporaryDirectory() as folder:
        return Identity.create(Path(folder) / str(number))


def commit(**changes: Any) -> Commit:
    fields: dict[str, Any] = {
        "module": "stage.0",
        "round": 3,
        "shard": 0,
        "blob": "ab" * 32,
        "size": 1000,
        "tokens": 2000,
        "steps": 10,
        "loss_before": 2.5,
        "loss_after": 2.25,
        "digest": "cd" * 32,
        "replicas_estimate": 4.0,
        "session": b"s" * 16,
        "committed_at": 1e9,
    }
    return Commit(**fields | changes)


def replica(**changes: Any) -> Replica:
    fields: dict[str, Any] = {
        "module": "stage.0",
        "round": 3,
        "session": b"s" * 16,
        "started": 1e9,
        "addresses": ["/ip4/127.0.0.1/tcp/1"],
    }
    return Replica(**fields | changes)


class Clock:
    """Unix time that only the test moves."""

    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeHost:
    """The unary half of a host: a call is a function call in another host of the same `network`."""

    def __init__(self, network: dict[Any, FakeHost], number: int) -> None:
        self.peer_id = PeerID.from_base58(identity(number).peer_id)
        self.frozen = False
        self._network, self._handlers = network, dict[str, Any]()
        network[self.peer_id] = self

    async def add_protobuf_handler(self, name: str, handler: Any, kind: Any, **_: Any) -> None:
        self._handlers[name] = handler

    async def remove_protobuf_handler(self, name: str, **_: Any) -> None:
        del self._handlers[name]

    async def call_protobuf_handler(self, peer_id: Any, name: str, input: Any, kind: Any) -> Any:
        remote = self._network.get(peer_id)
        if remote is None:
            raise ConnectionError("no such peer")
        if remote.frozen:
            await asyncio.sleep(3600)
        request = type(input).FromString(input.SerializeToString())
        return await remote._handlers[name](request, SimpleNamespace(remote_id=self.peer_id))
