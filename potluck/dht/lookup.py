"""Kademlia's node lookup (Maymounkov and Mazières, 2002, section 2.3): who is nearest to a key.

Asking a node for a key also brings the records that it holds under it (`RecordProtocol.call_find`): a read is a lookup,
and nothing else. Where the neighbourhood is known from before, exactly `width` nodes are asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

#: Calls under way at once.
PARALLEL: Final = 5

#: Asks a node; its neighbours, or None if it does not answer.
Ask = Callable[[PeerID], Awaitable[Mapping[DHTID, PeerID] | None]]


async def lookup(
    ask: Ask, key: DHTID, known: Mapping[DHTID, PeerID], *, width: int, timeout_seconds: float
) -> tuple[list[PeerID], bool]:
    """(the `width` nearest of those who answer, nearest first; whether all of them were heard in time).

    Begins with `known`, and asks whoever is nearest and was not asked, until the `width` nearest have answered.
    """
    distance = int(key).__xor__
    candidates = dict(known)
    answered: set[DHTID] = set()
    failed: set[DHTID] = set()
    asking: dict[asyncio.Future[Mapping[DHTID, PeerID] | None], DHTID] = {}
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    try:
        while True:
            nearest = sorted(candidates, key=distance)[:width]
            under_way = set(asking.values())
            for node in nearest:
                if len(asking) < PARALLEL and node not in answered and node not in under_way:
                    asking[asyncio.ensure_future(ask(candidates[node]))] = node
            if not asking or answered.issuperset(nearest):
                return [candidates[node] for node in nearest], True
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(asking, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return [candidates[node] for node in nearest if node in answered], False
            # In the order in which they were asked: a set's order differs between processes.
            for call in [call for call in asking if call in done]:
                node = asking.pop(call)
                neighbours = call.result() if call.exception() is None else None
                if neighbours is None:
                    failed.add(node)
                    del candidates[node]
                else:
                    answered.add(node)
                    new = neighbours.keys() - candidates.keys() - failed
                    candidates |= {other: peer for other, peer in neighbours.items() if other in new}
    finally:
        for call in asking:
            call.cancel()
