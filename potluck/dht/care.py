"""Staying connected: a peer remembers who answered, hands newcomers to its DHT node, and dials those it lost."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

from hivemind.dht.node import DHTNode

from potluck.dht.invite import is_address
from potluck.dht.node import BUCKET_SIZE, add_peers, peers_known
from potluck.errors import NetworkError, PotluckError
from potluck.net.host import Host, PeerId

DIAL_SECONDS: Final = 10.0
#: How often a peer looks whether it is still connected, and remembers whom it knows.
CARE_SECONDS: Final = 5.0
MAX_REMEMBERED: Final = 64
#: While others are connected, some of those known and lost are dialled this often.
REDIAL_SECONDS: Final = 60.0
REDIAL_AT_ONCE: Final = 8


class AddressBook(Protocol):
    """Addresses that answered, newest first; kept over restarts."""

    def peers(self) -> list[str]: ...
    def save_peers(self, addresses: list[str]) -> None: ...


async def dial(host: Host, addresses: Sequence[str]) -> dict[str, PeerId | NetworkError]:
    """Connect to all at once. Per address: the peer id, or why it failed."""

    async def one(address: str) -> PeerId | NetworkError:
        try:
            return await host.connect(address, DIAL_SECONDS)
        except NetworkError as error:
            return error

    others = [a for a in dict.fromkeys(addresses) if not a.endswith(host.peer_id.to_base58())]
    return dict(zip(others, await asyncio.gather(*map(one, others)), strict=True))


def _to_meet(connected: AbstractSet[PeerId], known: AbstractSet[PeerId], nodes: Sequence[PeerId]) -> list[PeerId]:
    """Who of those `connected` is handed to the DHT node: who was not `known` at the last look.

    Two who both gave each other up (a machine was suspended, its connections were not) stay connected, and neither
    would ever ask the other again. So while `nodes`, those in the routing table, would fit into one bucket, some of the
    others are asked at each look.
    """
    others = connected - set(nodes)
    new, given_up = sorted(others - known), sorted(others & known)
    if len(nodes) < BUCKET_SIZE:
        new += random.sample(given_up, min(len(given_up), REDIAL_AT_ONCE))
    return new


async def keep_connected(
    host: Host,
    book: AddressBook,
    dht: Callable[[], DHTNode | None],
    emit: Callable[..., None],
    every_seconds: float = CARE_SECONDS,
) -> None:
    """Forever. Two halves of a swarm that could not reach each other for a while find together again."""
    known = set[PeerId]()
    last_dial = -math.inf
    while True:
        try:
            infos = await host.list_peers()
            peers = {PeerId(info.peer_id.to_base58()) for info in infos}
            node = dht()
            if node and (strangers := _to_meet(peers, known, peers_known(node))):
                await add_peers(node, strangers)
            known = peers
            remembered = book.peers()
            if infos:
                found = [f"{a}/p2p/{i.peer_id.to_base58()}" for i in infos for a in i.addrs]
                # Strangers of the libp2p world may connect too: what no invite could name is forgotten.
                kept = [a for a in dict.fromkeys(found + remembered) if is_address(a)]
                book.save_peers(kept[:MAX_REMEMBERED])
            now = asyncio.get_running_loop().time()
            lost = [a for a in remembered if not a.endswith((*peers, host.peer_id.to_base58()))]
            if lost and (not peers or now - last_dial > REDIAL_SECONDS):
                last_dial = now
                await dial(host, lost if not peers else random.sample(lost, min(len(lost), REDIAL_AT_ONCE)))
        except (PotluckError, OSError) as error:
            emit("net.care.failed", error=str(error))
        await asyncio.sleep(every_seconds)
