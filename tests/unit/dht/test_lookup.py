"""The lookup finds who is nearest, asks few, and ends in time whatever the others do."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping

from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.lookup import lookup
from potluck.dht.protocol import BoundedSerializer
from potluck.dht.storage import RecordStorage
from potluck.sim.loop import run

WIDTH = 10


class Nodes:
    """Each knows the 20 nodes nearest to itself and some others, as Kademlia's buckets give them."""

    def __init__(self, count: int, dice: random.Random) -> None:
        self.ids = [DHTID(dice.getrandbits(160)) for _ in range(count)]
        self.peers = {PeerID(b"\x00\x20" + node.to_bytes() + bytes(12)): node for node in self.ids}
        self.addresses = {node: peer for peer, node in self.peers.items()}
        self.knows = {
            node: [*sorted(self.ids, key=int(node).__xor__)[1:21], *dice.sample(self.ids, min(20, count))]
            for node in self.ids
        }
        self.dead: set[DHTID] = set()
        self.silent: set[DHTID] = set()
        self.asked: list[DHTID] = []

    async def ask(self, peer: PeerID, key: DHTID) -> Mapping[DHTID, PeerID] | None:
        node = self.peers[peer]
        self.asked.append(node)
        if node in self.silent:
            await asyncio.sleep(1e6)
        await asyncio.sleep(0.1)
        if node in self.dead:
            return None
        nearest = sorted(self.knows[node], key=int(key).__xor__)[:20]
        return {other: self.addresses[other] for other in nearest}

    def look(self, key: DHTID, known: list[DHTID], seconds: float = 1000.0) -> tuple[list[DHTID], bool]:
        async def go(_: object) -> tuple[list[PeerID], bool]:
            start = {node: self.addresses[node] for node in known}
            return await lookup(lambda peer: self.ask(peer, key), key, start, width=WIDTH, timeout_seconds=seconds)

        found, complete = run(go)
        return [self.peers[peer] for peer in found], complete


@given(count=st.integers(2, 300), seed=st.integers(0, 2**32), dead_share=st.sampled_from([0.0, 0.2, 0.5]))
def test_the_nearest_of_the_living_are_found(count: int, seed: int, dead_share: float) -> None:
    dice = random.Random(seed)
    nodes = Nodes(count, dice)
    nodes.dead = set(dice.sample(nodes.ids, int(dead_share * count)))
    living = [node for node in nodes.ids if node not in nodes.dead]
    key = DHTID(dice.getrandbits(160))
    found, complete = nodes.look(key, dice.sample(living, min(3, len(living))))
    assert complete
    assert found == sorted(found, key=int(key).__xor__) and not set(found) & nodes.dead
    assert len(nodes.asked) == len(set(nodes.asked))  # nobody is asked twice
    truth = sorted(living, key=int(key).__xor__)[:WIDTH]
    missed = len(set(truth) - set(found))
    # Of the nodes that a dead one alone would have named, some stay unknown.
    assert missed == 0 if not dead_share else missed <= WIDTH // 2


def test_who_knows_the_neighbourhood_asks_no_others() -> None:
    nodes = Nodes(300, random.Random(1))
    key = DHTID(random.Random(2).getrandbits(160))
    truth = sorted(nodes.ids, key=int(key).__xor__)
    found, _ = nodes.look(key, truth[:WIDTH])
    assert found == truth[:WIDTH] and len(nodes.asked) == WIDTH


def test_silent_nodes_cost_the_deadline_and_no_more() -> None:
    nodes = Nodes(100, random.Random(3))
    key = DHTID(5)
    truth = sorted(nodes.ids, key=int(key).__xor__)
    nodes.silent = set(truth[:2])
    found, complete = nodes.look(key, truth[:WIDTH], seconds=7.0)
    assert not complete and found and not set(found) & nodes.silent
    assert nodes.look(key, [], seconds=7.0) == ([], True)


@given(
    records=st.dictionaries(st.text("ab", min_size=1, max_size=3), st.floats(1, 100), min_size=1), seed=st.integers()
)
def test_what_is_packed_is_what_lies_there_and_equal_sets_are_equal_bytes(records: dict[str, float], seed: int) -> None:
    now = [0.0]
    stores = [RecordStorage(DHTID(0), lambda: now[0], Counter()) for _ in range(2)]
    key, names = DHTID(1), list(records)
    for store in stores:
        for name in names:
            assert store.store_subkey(key, name, name.encode(), records[name])
            store.packed(key)  # whatever was packed before must not stay
        random.Random(seed).shuffle(names)
    assert stores[0].packed(key) == stores[1].packed(key)
    now[0] = 50.0
    packed, held = stores[0].packed(key), stores[0].get(key)
    assert (packed is None) == (held is None) == (max(records.values()) <= 50)
    if packed is not None and held is not None:
        unpacked = BoundedSerializer.loads(packed[0])
        assert dict(unpacked.items()) == dict(held.value.items()) and packed[1] == held.expiration_time  # type: ignore[union-attr]
