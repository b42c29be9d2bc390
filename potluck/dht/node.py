"""A run's DHT node: hivemind's `DHTNode` in this process, on our host, with our protocol and validator."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from potluck.dht.lookup import lookup
from potluck.dht.manifest import RunId
from potluck.dht.protocol import RecordProtocol, node_id_of
from potluck.dht.validator import RecordValidator
from potluck.net.host import Host, PeerId

#: Nodes that each record is stored on. hivemind's default: any four of them may vanish within a record's
#: life.
NUM_REPLICAS: Final = 5
BUCKET_SIZE: Final = 20
#: For how long a node that did not answer is not asked again, in seconds.
BLACKLIST_SECONDS: Final = 5.0


async def start_dht(
    host: Host,
    run_id: RunId,
    *,
    initial_peers: Sequence[PeerId] = (),
    max_ahead_seconds: float,
    wait_timeout_seconds: float = 1.0,
    clock: Callable[[], float] = time.time,
    validator: RecordValidator | None = None,
    validators: Collection[PeerId] | None = None,
) -> DHTNode:
    """A running node. It starts, alone, even if no initial peer answers: see `add_peers` and `peers_known`.

    `initial_peers` are peers that the host is connected to or can find; records may expire at most
    `max_ahead_seconds` from now; each call to another node takes at most `wait_timeout_seconds`.
    `validators`: whose weights are taken.
    """
    quieten_hivemind()
    validator = validator or RecordValidator(
        run_id, max_ahead_seconds=max_ahead_seconds, clock=clock, validators=validators
    )
    node_id = node_id_of(host.peer_id)
    # Made as a client, which touches no network, because only then can its protocol be replaced by ours.
    # All caches are off: what is read must be the latest, and what was read is kept by RecordProtocol.
    node = await DHTNode.create(
        p2p=host,
        node_id=node_id,
        client_mode=True,
        num_replicas=NUM_REPLICAS,
        bucket_size=BUCKET_SIZE,
        wait_timeout=wait_timeout_seconds,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
        blacklist_time=BLACKLIST_SECONDS,
        backoff_rate=1.0,
        ensure_bootstrap_success=False,
        strict=False,
    )
    node.protocol = await RecordProtocol.open(
        host,
        node_id,
        validator,
        bucket_size=BUCKET_SIZE,
        depth_modulo=5,
        num_replicas=NUM_REPLICAS,
        wait_timeout=wait_timeout_seconds,
        parallel_rpc=64,
    )
    await add_peers(node, initial_peers)
    return node


async def add_peers(node: DHTNode, peers: Sequence[PeerId]) -> int:
    """Make nodes that are reachable through the host known to this one; returns how many answered.

    May be called at any time, also when all peers known so far have died. Takes at most about two of the
    node's `wait_timeout`; a retry is safe.
    """
    ids = [PeerID.from_base58(peer) for peer in dict.fromkeys(peers) if peer != node.peer_id.to_base58()]
    few = len(node.protocol.routing_table.peer_id_to_uid) < BUCKET_SIZE
    for peer in ids:
        node.blacklist.register_success(peer)  # a new connection is a new chance
    answers = await asyncio.gather(*(node.protocol.call_ping(peer) for peer in ids))
    answered = 0
    for peer, node_id in zip(ids, answers, strict=True):
        if node_id is not None:
            answered += 1
            await node.protocol.update_routing_table(node_id, peer, responded=True)
    if answered and few:
        # Meet our neighbours, who hand over the records that we are to hold.
        await find_nearest(node, node.node_id, BUCKET_SIZE, node.protocol.wait_timeout)
    return answered


async def find_nearest(
    node: DHTNode, key: DHTID, width: int, timeout_seconds: float, known: Mapping[DHTID, PeerID] = MappingProxyType({})
) -> tuple[list[PeerID], bool]:
    """`lookup` from this node, which is left out: it begins with `known` and the routing table."""

    async def ask(peer: PeerID) -> Mapping[DHTID, PeerID] | None:
        answer = await node._call_find_with_blacklist(peer, [key])
        if not answer:
            return None
        neighbours: dict[DHTID, PeerID] = answer[key][1]
        neighbours.pop(node.node_id, None)
        return neighbours

    start = node.protocol.nearest_known(key, 2 * width) | dict(known)
    return await lookup(ask, key, start, width=width, timeout_seconds=timeout_seconds)


def peers_known(node: DHTNode) -> list[PeerId]:
    """The nodes in the routing table: those that answered last time."""
    return [PeerId(peer.to_base58()) for peer in node.protocol.routing_table.peer_id_to_uid]


def network_size(node: DHTNode) -> float:
    """How many nodes the DHT has, this one included: counted while few, else from how densely ids lie around ours.

    Ids are hashes, spread evenly over 2^160: if the k-th nearest lies at distance d, there are about k 2^160 / d
    (Kostoulas et al., 2005). With k = 20 the error is about a quarter.
    """
    table = node.protocol.routing_table
    known = len(table.peer_id_to_uid)
    if known < 2 * BUCKET_SIZE:
        return known + 1.0
    nearest = table.get_nearest_neighbors(node.node_id, BUCKET_SIZE, exclude=node.node_id)
    farthest = int(max(node.node_id.xor_distance(uid) for uid, _ in nearest))
    return max(known + 1.0, len(nearest) * 2.0**160 / farthest)


async def stop_dht(node: DHTNode, timeout_seconds: float = 2.0) -> None:
    """Stop answering. The host stays up; a host that died already is no error."""
    try:
        await asyncio.wait_for(node.shutdown(), timeout_seconds)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("dht.stop.failed error=%r", error)


def quieten_hivemind() -> None:
    """hivemind logs each lost call as a warning; in a swarm of volunteers those are daily life."""
    if os.environ.get("POTLUCK_LOG", "").lower() != "debug":
        logging.getLogger("hivemind").setLevel(logging.ERROR)
