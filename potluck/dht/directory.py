"""The directory: who hosts what, who committed what, who counts how much. Reads and writes of records, with
deadlines.

Every read asks the network for the latest, and merges what this node holds already; whatever happens, it
returns by its deadline with what is known by then. Records are verified again here: bad ones are dropped and
counted, never raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID

from potluck.dht.manifest import RunId
from potluck.dht.node import network_size
from potluck.dht.protocol import RecordProtocol
from potluck.dht.records import (
    Commit,
    Record,
    RejectedRecord,
    Replica,
    Signed,
    Weights,
    commits_path,
    encode,
    key_id,
    key_name,
    replicas_path,
    weights_path,
)
from potluck.net.identity import Identity

#: Nodes that a read asks at least, if there are so many: twice those that hold a record, as neighbours
#: differ.
READ_WIDTH: Final = 10

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class DirectoryView(Generic[R]):
    """What a read found, by peer id. `complete` is False when the deadline cut the search short."""

    records: tuple[Signed[R], ...]
    complete: bool


class Directory:
    """One peer's view of a run's records."""

    def __init__(
        self, node: DHTNode, identity: Identity, run_id: RunId, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._node, self._identity, self._run_id, self._clock = node, identity, run_id, clock
        self._protocol: RecordProtocol = node.protocol
        self._searches: set[asyncio.Task[Any]] = set()

    async def publish(self, record: Record, expires_at: float, timeout_seconds: float) -> bool:
        """Sign a record and store it here and on the nodes nearest to its key. `expires_at` in Unix seconds.

        True if at least one other node holds it, or if this node knows no other. A retry is safe: publish
        the same record again. Raises RejectedRecord if the record breaks its own bounds or would be refused
        by every node.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_seconds
        expires_at = float(expires_at)
        key = DHTID.from_bytes(key_id(key_name(self._run_id, record.path())))
        peer = self._identity.peer_id
        serializer = self._protocol.serializer
        value = serializer.dumps(encode(record, self._identity, self._run_id, expires_at))
        self._protocol.record_validator.open(key.to_bytes(), serializer.dumps(peer), value, expires_at)
        self._protocol.storage.store_subkey(key, peer, value, expires_at)
        if not self._protocol.routing_table.peer_id_to_uid:
            return True
        # Half of the time at most goes into finding the nearest nodes; else those we know will do.
        nearest = await self._nearest(key, timeout_seconds / 2)
        calls = [
            asyncio.create_task(self._protocol.call_store(holder, [key], [value], expires_at, [peer]))
            for holder in nearest
        ]
        if not calls:
            return False
        done, late = await asyncio.wait(calls, timeout=max(0.0, deadline - now()))
        for call in late:
            call.cancel()
        return any(call.exception() is None and call.result() == [True] for call in done)

    async def replicas(self, module: str, shard: int = 0, *, timeout_seconds: float) -> DirectoryView[Replica]:
        """The live replicas of a module."""
        return await self._read(Replica, replicas_path(module, shard), timeout_seconds)

    async def commits(self, module: str, round: int, shard: int, *, timeout_seconds: float) -> DirectoryView[Commit]:
        """A shard's commits in a round: reading them is finding one's group."""
        return await self._read(Commit, commits_path(module, round, shard), timeout_seconds)

    async def weights(self, module: str, round: int, *, timeout_seconds: float) -> DirectoryView[Weights]:
        """Each validator's weights for a round. The caller decides whom of them to trust."""
        return await self._read(Weights, weights_path(module, round), timeout_seconds)

    def network_size(self) -> float:
        """How many peers the run has, about."""
        return network_size(self._node)

    async def close(self) -> None:
        """Ends the searches that outlived their callers' deadlines."""
        searches = list(self._searches)
        for search in searches:
            search.cancel()
        await asyncio.gather(*searches, return_exceptions=True)

    async def _read(self, kind: type[R], path: str, timeout_seconds: float) -> DirectoryView[R]:
        key = DHTID.from_bytes(key_id(key_name(self._run_id, path)))
        futures = await self._node.get_many_by_id(
            [key], sufficient_expiration_time=float("inf"), beam_size=READ_WIDTH, return_futures=True
        )
        done, _ = await asyncio.wait({futures[key]}, timeout=timeout_seconds)
        futures[key].cancel()  # ends the search, if it is still on
        # Whatever the search verified on its way is in our storage by now: found, cut short or failed.
        return DirectoryView(self._held(kind, key), complete=bool(done))

    def _held(self, kind: type[R], key: DHTID) -> tuple[Signed[R], ...]:
        """Raises nothing for others' bad data: that is dropped, and counted by the validator."""
        held = self._protocol.storage.get(key)
        validator = self._protocol.record_validator
        found: list[Signed[R]] = []
        for subkey, (value, expires_at) in held.value.items() if held is not None else ():
            try:
                signed = validator.open(key.to_bytes(), self._protocol.serializer.dumps(subkey), value, expires_at)
            except RejectedRecord as error:
                validator.rejected[error.reason] += 1
                continue
            if isinstance(signed.record, kind):
                found.append(signed)  # type: ignore[arg-type]
        return tuple(sorted(found, key=lambda signed: signed.peer))

    async def _nearest(self, key: DHTID, timeout_seconds: float) -> list[Any]:
        """Peers nearest to a key, this one left out, at most as many as a record has replicas."""
        count = self._node.num_replicas
        search = asyncio.create_task(
            self._node.find_nearest_nodes([key], k_nearest=count, beam_size=READ_WIDTH, exclude_self=True)
        )
        # Not cancelled when late: hivemind leaks the tasks of a cancelled search; it ends by itself.
        self._searches.add(search)
        search.add_done_callback(self._searches.discard)
        done, _ = await asyncio.wait({search}, timeout=timeout_seconds)
        if done and search.exception() is None:
            return list(search.result()[key].values())[:count]
        return [peer for _, peer in self._protocol.routing_table.get_nearest_neighbors(key, count)]
