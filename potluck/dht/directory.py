"""The directory: who hosts what, who committed what, who counts how much. Reads and writes of records, with
deadlines.

Every read asks the network for the latest, and merges what this node holds already; whatever happens, it
returns by its deadline with what is known by then. Records are verified again here: bad ones are dropped and
counted, never raised.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from potluck.dht.manifest import RunId
from potluck.dht.node import find_nearest, network_size
from potluck.dht.protocol import RecordProtocol, node_id_of
from potluck.dht.records import (
    Commit,
    Links,
    Record,
    RejectedRecord,
    Replica,
    Signed,
    Weights,
    commits_path,
    encode,
    key_id,
    key_name,
    links_path,
    replicas_path,
    weights_path,
)
from potluck.net.host import PeerId
from potluck.net.identity import Identity

#: Nodes that a read asks at least, if there are so many: twice those that hold a record, as neighbours
#: differ.
READ_WIDTH: Final = 10
#: Keys whose nearest nodes are remembered: a round's commit is published and then read under one key.
REMEMBERED_KEYS: Final = 16

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
        #: Where lookups of the last keys ended: the next one begins there.
        self._near: OrderedDict[DHTID, list[PeerID]] = OrderedDict()

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
        # Asked for a key, a node also hands over its records: the key beside it has the same neighbours.
        near, complete = await self._lookup(key, DHTID(int(key) ^ 1), timeout_seconds / 2)
        if not complete:
            near = list(self._protocol.nearest_known(key, self._node.num_replicas).values())
        calls = [
            asyncio.create_task(self._protocol.call_store(holder, [key], [value], expires_at, [peer]))
            for holder in near[: self._node.num_replicas]
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

    async def links(self, peer: PeerId, *, timeout_seconds: float) -> DirectoryView[Links]:
        """What one peer shows about whose account its credit counts for: a record, or none."""
        return await self._read(Links, links_path(peer), timeout_seconds)

    def network_size(self) -> float:
        """How many peers the run has, about."""
        return network_size(self._node)

    async def _read(self, kind: type[R], path: str, timeout_seconds: float) -> DirectoryView[R]:
        key = DHTID.from_bytes(key_id(key_name(self._run_id, path)))
        _, complete = await self._lookup(key, key, timeout_seconds)
        # Whatever an answer brought is in our storage by now: found, cut short or failed.
        return DirectoryView(self._held(kind, key), complete)

    async def _lookup(self, key: DHTID, asked_for: DHTID, timeout_seconds: float) -> tuple[list[PeerID], bool]:
        """Peers nearest to a key, this one left out, and whether all answered in time."""
        known = {node_id_of(peer): peer for peer in self._near.get(key, ())}
        near, complete = await find_nearest(self._node, asked_for, READ_WIDTH, timeout_seconds, known)
        if complete:
            self._near[key] = near
            self._near.move_to_end(key)
            if len(self._near) > REMEMBERED_KEYS:
                self._near.popitem(last=False)
        return near, complete

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
