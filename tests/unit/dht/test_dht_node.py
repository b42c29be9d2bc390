"""Validator, storage, protocol and directory: honest nodes, and a node that lies, on hosts within this process."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht import protocol as wire
from potluck.dht.care import keep_connected
from potluck.dht.directory import Directory
from potluck.dht.node import add_peers, network_size, peers_known, start_dht, stop_dht
from potluck.dht.protocol import BoundedSerializer, node_id_of
from potluck.dht.records import Links, RejectedRecord, encode, key_id, key_name
from potluck.dht.storage import MAX_KEY_BYTES, RecordStorage
from potluck.dht.validator import RecordValidator, TokenBuckets
from potluck.errors import ProtocolError
from potluck.net.links import make_link, make_offer

from dht_world import AHEAD_SECONDS, OTHER_RUN, RUN, Clock, FakeHost, commit, identity, replica

NOW = 1e9
EXPIRES = NOW + 50


def packed(record: Any, signer: int, *, run=RUN, expires=EXPIRES) -> tuple[bytes, bytes, bytes, float]:
    """key, subkey, value, expiry: a record as it travels."""
    data = encode(record, identity(signer), run, expires)
    key = key_id(key_name(RUN, record.path()))
    return key, dumps(identity(signer).peer_id), dumps(data), expires


dumps = msgspec.msgpack.encode


class World:
    """`count` nodes that know each other, a directory on each, and one clock."""

    def __init__(self, count: int) -> None:
        self.count, self.clock, self.network = count, Clock(NOW), dict[Any, FakeHost]()

    async def start(self) -> None:
        self.hosts = [FakeHost(self.network, number) for number in range(self.count)]
        self.nodes = [await self.start_node(number) for number in range(self.count)]
        self.directories = [
            Directory(node, identity(number), RUN, clock=self.clock) for number, node in enumerate(self.nodes)
        ]

    async def start_node(self, number: int, run=RUN) -> Any:
        return await start_dht(
            self.hosts[number],
            run,
            initial_peers=[identity(other).peer_id for other in range(self.count) if other != number],
            max_ahead_seconds=AHEAD_SECONDS,
            wait_timeout_seconds=0.2,
            clock=self.clock,
        )

    def rejected(self, number: int) -> Counter[str]:
        return self.nodes[number].protocol.record_validator.rejected

    async def send(self, source: int, target: int, **fields: Any) -> Any:
        """A raw store request, as a hostile node would make it."""
        request = dht_pb2.StoreRequest(peer=self.nodes[source].protocol.node_info, **fields)
        return await self.nodes[source].protocol.get_stub(self.hosts[target].peer_id).rpc_store(request, 1.0)

    async def send_record(self, source: int, target: int, key, subkey, value, expires) -> bool:
        fields = {"keys": [key], "subkeys": [subkey], "values": [value], "expiration_time": [expires]}
        return list((await self.send(source, target, **fields, in_cache=[False])).store_ok) == [True]


def play(count: int, scene: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(count)
        await world.start()
        try:
            await asyncio.wait_for(scene(world), 60)
        finally:
            for node in world.nodes:
                await stop_dht(node)

    asyncio.run(main())


async def read(world: World, number: int, timeout=2.0) -> set[str]:
    view = await world.directories[number].commits("stage.0", 3, 0, timeout_seconds=timeout)
    return {signed.peer for signed in view.records}


def test_every_peer_reads_what_every_peer_published() -> None:
    async def scene(world: World) -> None:
        for directory in world.directories:
            assert await directory.publish(commit(), EXPIRES, 2.0)
        everyone = {identity(number).peer_id for number in range(4)}
        for number in range(4):
            assert await read(world, number) == everyone
        assert not any(world.rejected(number) for number in range(4))

    play(4, scene)


def test_publishing_again_is_safe_and_a_later_record_replaces_an_earlier() -> None:
    async def scene(world: World) -> None:
        first, second = world.directories[0], world.directories[1]
        assert await first.publish(replica(load=1.0), EXPIRES, 2.0)
        assert await first.publish(replica(load=1.0), EXPIRES, 2.0)
        assert await first.publish(replica(load=2.0), EXPIRES + 1, 2.0)
        await first.publish(replica(load=1.0), EXPIRES, 2.0)
        view = await second.replicas("stage.0", timeout_seconds=2.0)
        assert [signed.record.load for signed in view.records] == [2.0]

    play(3, scene)


def test_what_a_peer_shows_about_its_account_is_read_by_everybody_and_shown_by_nobody_else() -> None:
    async def scene(world: World) -> None:
        peer, account = identity(0), identity(7)
        shown = Links(peer=peer.peer_id, links=[make_link(make_offer(account, peer.peer_id, 5), peer)])
        assert await world.directories[0].publish(shown, EXPIRES, 2.0)
        for directory in world.directories:
            view = await directory.links(peer.peer_id, timeout_seconds=2.0)
            assert [signed.record for signed in view.records] == [shown] and view.complete
        with pytest.raises(RejectedRecord, match="speaks for"):
            await world.directories[1].publish(shown, EXPIRES + 1, 2.0)
        assert (await world.directories[2].links(account.peer_id, timeout_seconds=2.0)).records == ()

    play(4, scene)


def test_a_peer_alone_publishes_and_reads_its_own() -> None:
    async def scene(world: World) -> None:
        assert await world.directories[0].publish(commit(), EXPIRES, 1.0)
        assert await read(world, 0) == {identity(0).peer_id}

    play(1, scene)


def test_an_expired_record_is_gone() -> None:
    async def scene(world: World) -> None:
        await world.directories[0].publish(commit(), EXPIRES, 1.0)
        world.clock.now = EXPIRES
        assert await read(world, 1) == set()
        assert world.nodes[1].protocol.storage.total_bytes == 0

    play(2, scene)


def test_our_own_bad_record_is_said_and_not_sent() -> None:
    async def scene(world: World) -> None:
        with pytest.raises(RejectedRecord, match="far_future"):
            await world.directories[0].publish(commit(), NOW + 10 * AHEAD_SECONDS, 1.0)

    play(1, scene)


def test_frozen_peers_cost_a_deadline_and_not_a_hang() -> None:
    async def scene(world: World) -> None:
        await world.directories[0].publish(commit(), EXPIRES, 2.0)
        for host in world.hosts[1:]:
            host.frozen = True
        assert not await world.directories[0].publish(replica(), EXPIRES, 0.1)
        view = await world.directories[0].commits("stage.0", 3, 0, timeout_seconds=0.05)
        assert [signed.peer for signed in view.records] == [identity(0).peer_id]

    play(4, scene)


def test_a_search_cut_short_says_so_and_gives_what_it_found() -> None:
    async def scene(world: World) -> None:
        await world.directories[2].publish(commit(), EXPIRES, 2.0)
        world.hosts[1].frozen = True
        view = await world.directories[0].commits("stage.0", 3, 0, timeout_seconds=0.05)
        assert not view.complete
        assert identity(2).peer_id in {signed.peer for signed in view.records}

    play(3, scene)


def test_a_peer_comes_back_after_everyone_it_knew_had_died() -> None:
    async def scene(world: World) -> None:
        gone = world.network.pop(world.hosts[1].peer_id)
        await world.directories[0].commits("stage.0", 3, 0, timeout_seconds=1.0)
        assert peers_known(world.nodes[0]) == []
        await world.directories[0].publish(commit(), EXPIRES, 1.0)
        world.network[gone.peer_id] = gone
        assert await add_peers(world.nodes[0], [identity(1).peer_id, identity(0).peer_id]) == 1
        assert peers_known(world.nodes[0]) == [identity(1).peer_id]
        assert await read(world, 1) == {identity(0).peer_id}

    play(2, scene)


def test_no_node_stores_what_is_not_a_signed_record_of_the_run_in_its_place() -> None:
    async def scene(world: World) -> None:
        key, subkey, value, expires = packed(commit(), 0)
        other_key = packed(commit(round=4), 0)[0]
        foreign = packed(commit(), 0, run=OTHER_RUN)
        forged = bytearray(value)
        forged[-1] ^= 1
        attempts = {
            "bad_signature": [(key, subkey, bytes(forged), expires), foreign],
            "wrong_key": [(other_key, subkey, value, expires)],
            "wrong_subkey": [
                (key, dumps(identity(1).peer_id), value, expires),
                (key, dumps(None), value, expires),
                (key, dumps(7), value, expires),
                (key, b"x" * 200, value, expires),
            ],
            "expired": [packed(commit(), 0, expires=NOW - 1)],
            "far_future": [packed(commit(), 0, expires=NOW + 2 * AHEAD_SECONDS)],
            "oversized": [(key, subkey, dumps(b"x" * 5000), expires)],
            "malformed": [
                (key, subkey, value, expires + 1),
                (key, subkey, dumps("text"), expires),
                (key, subkey, b"", expires),
                (key, b"", b"", expires),
            ],
        }
        for reason, records in attempts.items():
            before = world.rejected(1)[reason]
            for record in records:
                assert not await world.send_record(0, 1, *record), reason
            assert world.rejected(1)[reason] == before + len(records), reason
        assert world.nodes[1].protocol.storage.total_bytes == 0
        assert await world.send_record(0, 1, key, subkey, value, expires)

    play(2, scene)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keys": [bytes(20)] * 65}, "oversized"),
        ({"keys": []}, "oversized"),
        ({"keys": [bytes(19)]}, "malformed"),
        ({"values": []}, "malformed"),
        ({"values": [bytes(700_000)]}, "oversized"),
    ],
)
def test_a_request_out_of_bounds_is_refused_whole(changes, reason) -> None:
    async def scene(world: World) -> None:
        fields = {"keys": [bytes(20)], "subkeys": [b"x"], "values": [b"x"], "expiration_time": [EXPIRES]}
        with pytest.raises(RejectedRecord, match=reason):
            await world.send(0, 1, **fields | {"in_cache": [False]} | changes)

    play(2, scene)


def test_a_find_for_many_keys_is_refused() -> None:
    async def scene(world: World) -> None:
        request = dht_pb2.FindRequest(keys=[bytes(20)] * 2, peer=world.nodes[0].protocol.node_info)
        with pytest.raises(RejectedRecord, match="oversized"):
            await world.nodes[0].protocol.get_stub(world.hosts[1].peer_id).rpc_find(request, 1.0)

    play(2, scene)


def test_a_node_cannot_choose_its_place() -> None:
    async def scene(world: World) -> None:
        liar = world.nodes[0].protocol
        liar.node_info = dht_pb2.NodeInfo(node_id=bytes(20))
        request = dht_pb2.PingRequest(peer=liar.node_info)
        with pytest.raises(RejectedRecord, match="wrong_place"):
            await liar.get_stub(world.hosts[1].peer_id).rpc_ping(request, 1.0)
        assert await world.nodes[1].protocol.call_ping(world.hosts[0].peer_id) is None
        await asyncio.sleep(0)
        assert DHTID(0) not in world.nodes[1].protocol.routing_table

    play(2, scene)


def test_a_node_that_floods_is_refused_and_others_are_not() -> None:
    async def scene(world: World) -> None:
        fields = {
            "keys": [bytes(20)] * 64,
            "subkeys": [b"x"] * 64,
            "values": [b"x"] * 64,
            "expiration_time": [EXPIRES] * 64,
            "in_cache": [False] * 64,
        }
        for _ in range(wire.SENDER_BURST // 64):
            await world.send(0, 1, **fields)
        with pytest.raises(RejectedRecord, match="too_fast"):
            await world.send(0, 1, **fields)
        assert await world.send_record(2, 1, *packed(commit(), 0))

    play(3, scene)


def dictionary(*records: tuple[bytes, bytes, bytes, float], maxsize=None, latest=None) -> DictionaryDHTValue:
    result = DictionaryDHTValue(maxsize)
    result.frozen = True
    for _, subkey, value, expires in records:
        result.store(msgspec.msgpack.decode(subkey), value, expires)
    if latest is not None:
        result.latest_expiration_time = latest
    return result


@pytest.mark.parametrize("liars_answer", ["forged", "endless", "tiny", "garbage", "crowd", "regular"])
def test_a_lying_node_cannot_hide_the_records_that_others_hold(liars_answer) -> None:
    """The liar answers every find at once, and sits in everybody's routing table."""
    honest = packed(commit(), 1)
    forged = (*packed(commit(), 2)[:2], honest[2], EXPIRES)
    crowd = [(b"", dumps(f"nobody {number}"), b"x", EXPIRES) for number in range(300)]
    key = honest[0]
    value, expires, kind = {
        "forged": (dictionary(forged, honest), EXPIRES, dht_pb2.FOUND_DICTIONARY),
        "endless": (dictionary(latest=float("inf")), float("inf"), dht_pb2.FOUND_DICTIONARY),
        "tiny": (dictionary(packed(commit(), 3), maxsize=1), float("inf"), dht_pb2.FOUND_DICTIONARY),
        "garbage": (b"\xc1" * 1000, EXPIRES, dht_pb2.FOUND_DICTIONARY),
        "crowd": (dictionary(*crowd), EXPIRES, dht_pb2.FOUND_DICTIONARY),
        "regular": (b"hello", float("inf"), dht_pb2.FOUND_REGULAR),
    }[liars_answer]
    raw = value if isinstance(value, bytes) else MSGPackSerializer.dumps(value)

    async def scene(world: World) -> None:
        liar = world.hosts[0]

        async def lie(request: Any, context: Any) -> Any:
            fakes = [node_id_of(host.peer_id).to_bytes()[::-1] for host in world.hosts]
            result = dht_pb2.FindResult(type=kind, value=raw, expiration_time=expires, nearest_node_ids=fakes)
            result.nearest_peer_ids.extend(host.peer_id.to_bytes() for host in world.hosts)
            return dht_pb2.FindResponse(results=[result], peer=world.nodes[0].protocol.node_info)

        liar._handlers[f"potluck/{RUN}::DHTProtocol.rpc_find"] = lie
        for number in (1, 2, 3):
            assert await world.send_record(0, number, *packed(commit(), 1))
        assert await world.send_record(1, 2, *packed(commit(), 2))
        for number in (1, 2, 3):
            found = await read(world, number)
            assert {identity(1).peer_id, identity(2).peer_id} <= found
            assert found <= {identity(peer).peer_id for peer in (1, 2, 3)}

    play(4, scene)
    assert key


def test_one_bad_record_in_an_honest_answer_costs_that_record_only() -> None:
    """The reader's clock is ahead: one of two records has expired for it, and not for the node that answers."""

    async def scene(world: World) -> None:
        assert await world.send_record(0, 1, *packed(commit(), 0, expires=NOW + 5))
        assert await world.send_record(0, 1, *packed(commit(), 1))
        world.nodes[2].protocol.record_validator.clock = Clock(NOW + 10)
        assert await read(world, 2) == {identity(1).peer_id}
        assert world.rejected(2)["expired"] >= 1

    play(3, scene)


def test_a_store_of_a_mixed_dictionary_keeps_the_good_records() -> None:
    async def scene(world: World) -> None:
        good = packed(commit(), 1)
        mixed = dictionary((*packed(commit(), 2)[:2], good[2], EXPIRES), good)
        stored = await world.nodes[0].protocol.call_store(
            world.hosts[1].peer_id, [DHTID.from_bytes(good[0])], [mixed], EXPIRES
        )
        assert stored == [False]
        assert await read(world, 1) == {identity(1).peer_id}

    play(2, scene)


def test_a_newcomer_is_handed_all_the_records_of_a_lonely_node() -> None:
    async def scene(world: World) -> None:
        late = world.network.pop(world.hosts[1].peer_id)
        for round in range(100):  # more than one request holds
            await world.directories[0].publish(commit(round=round), EXPIRES, 1.0)
            world.clock.now += 0.15  # as fast as a signer's rate allows
        world.network[late.peer_id] = late
        world.nodes[1].protocol.record_validator._rates = TokenBuckets(1000, 1, world.clock)
        assert await add_peers(world.nodes[0], [identity(1).peer_id]) == 1
        for _ in range(500):
            if len(world.nodes[1].protocol.storage) == 100:
                break
            await asyncio.sleep(0.01)
        assert len(world.nodes[1].protocol.storage) == 100, world.rejected(1)

    play(2, scene)


def test_a_node_of_another_run_is_not_answered() -> None:
    async def scene(world: World) -> None:
        await stop_dht(world.nodes[0])
        world.nodes[0] = await world.start_node(0, OTHER_RUN)
        assert peers_known(world.nodes[0]) == []

    play(2, scene)


def test_a_restarted_node_keeps_its_place() -> None:
    async def scene(world: World) -> None:
        place = world.nodes[0].node_id
        await stop_dht(world.nodes[0])
        world.nodes[0] = await world.start_node(0)
        assert world.nodes[0].node_id == place == node_id_of(world.hosts[0].peer_id)

    play(2, scene)


def test_two_who_gave_each_other_up_and_stayed_connected_meet_again() -> None:
    """As after a suspend of both machines: their libp2p connection lives on, so no new one brings them together."""

    class Book:
        def peers(self) -> list[str]:
            return []

        def save_peers(self, addresses: list[str]) -> None:
            pass

    def connected_to(other: int) -> Any:
        async def list_peers() -> list[Any]:
            return [SimpleNamespace(peer_id=PeerID.from_base58(identity(other).peer_id), addrs=[])]

        return SimpleNamespace(peer_id=PeerID.from_base58(identity(1 - other).peer_id), list_peers=list_peers)

    async def scene(world: World) -> None:
        care = asyncio.create_task(
            keep_connected(connected_to(1), Book(), lambda: world.nodes[0], lambda *_, **__: None, 0.05)
        )
        await asyncio.sleep(0.2)  # seen once, and known from then on
        for node, other in zip(world.nodes, reversed(world.nodes), strict=True):
            await node.protocol.update_routing_table(other.node_id, other.peer_id, responded=False)
        assert not peers_known(world.nodes[0]) and not peers_known(world.nodes[1])
        while not (peers_known(world.nodes[0]) and peers_known(world.nodes[1])):
            await asyncio.sleep(0.05)
        care.cancel()

    play(2, scene)


# The validator by itself


def test_a_verified_record_is_free_and_the_signers_rate_is_his_own() -> None:
    clock = Clock(NOW)
    validator = RecordValidator(RUN, max_ahead_seconds=AHEAD_SECONDS, clock=clock, signer_burst=2, signer_per_second=1)
    records = [DHTRecord(*packed(commit(round=number), 0)) for number in range(3)]
    forged = DHTRecord(records[2].key, records[2].subkey, records[2].value[:-1] + b"?", EXPIRES)
    assert not any(validator.validate(forged) for _ in range(10))
    assert all(validator.validate(records[0]) for _ in range(10))
    assert validator.validate(records[1]) and not validator.validate(records[2])
    assert validator.rejected == {"bad_signature": 10, "too_fast": 1}
    clock.now += 1
    assert validator.validate(records[2])
    clock.now = EXPIRES
    assert not validator.validate(records[0])
    assert validator.rejected["expired"] == 1


def test_buckets_remember_a_bounded_number_of_names() -> None:
    buckets = TokenBuckets(1, 1, Clock(), max_names=3)
    for name in range(100):
        assert buckets.take(name)
    assert not buckets.take(99)
    assert buckets.take(0)


# The storage by itself


def storage(clock: Clock, **bounds: int) -> RecordStorage:
    return RecordStorage(DHTID(0), clock, Counter(), **bounds)


def test_a_replayed_older_record_never_shortens_a_newer() -> None:
    clock = Clock(NOW)
    store = storage(clock)
    assert store.store_subkey(DHTID(1), "a", b"new", NOW + 10)
    assert not store.store_subkey(DHTID(1), "a", b"old", NOW + 5)
    clock.now = NOW + 6
    assert store.get(DHTID(1)).value.get("a").value == b"new"


def test_a_reader_cannot_write_into_the_storage() -> None:
    store = storage(Clock(NOW))
    store.store_subkey(DHTID(1), "a", b"x", NOW + 10)
    store.get(DHTID(1)).value.store("b", b"y", NOW + 10)
    assert store.get(DHTID(1)).value.get("b") is None


def test_subkeys_and_bytes_under_a_key_are_bounded() -> None:
    store = storage(Clock(NOW), max_subkeys=2)
    assert [store.store_subkey(DHTID(1), name, b"x", NOW + 10) for name in "abc"] == [True, True, False]
    assert store.store_subkey(DHTID(1), "a", b"y", NOW + 11)
    assert store._rejected == {"too_many_subkeys": 1}
    assert not store.store_subkey(DHTID(2), "a", bytes(MAX_KEY_BYTES + 1), NOW + 10)
    assert not store.store(DHTID(3), b"nobody's", NOW + 10)


@given(st.lists(st.tuples(st.integers(0, 2**160 - 1), st.integers(0, 60), st.integers(1, 30)), max_size=60))
def test_the_nearest_keys_are_kept_within_the_bounds(stores) -> None:
    clock = Clock(NOW)
    store = storage(clock, max_keys=5, max_bytes=200)
    for place, size, seconds in stores:
        store.store_subkey(DHTID(place), "a", bytes(size), clock.now + seconds)
        assert len(store) <= 5 and store.total_bytes <= 200
        clock.now += 1
    held = sum(len(item.value) for _, entry in store.items() for _, item in entry.value.items())
    assert store.total_bytes == held
    clock.now += 100
    assert list(store.items()) == [] and store.total_bytes == 0


# The parser of what comes off the wire


@given(st.binary(max_size=300))
def test_arbitrary_wire_values_raise_nothing_but_protocol_errors(raw) -> None:
    for data in (raw, msgspec.msgpack.encode(msgspec.msgpack.Ext(0x50, raw))):
        try:
            BoundedSerializer.loads(data)
        except ProtocolError:
            pass


def test_the_parser_reads_hiveminds_dictionaries_and_nothing_nested() -> None:
    items = [packed(commit(), number) for number in range(3)]
    parsed = BoundedSerializer.loads(MSGPackSerializer.dumps(dictionary(*items, maxsize=1)))
    assert parsed.maxsize == float("inf")
    bomb = b"\x91" * 10_000
    for bad in (bomb, b"\xc1", b"", MSGPackSerializer.dumps((1, 2)), b"x" * 1_000_000, dumps({"a": 1})):
        with pytest.raises(ProtocolError):
            BoundedSerializer.loads(bad)
    shuffled = random.Random(0).sample(items, 3)
    assert len(BoundedSerializer.loads(MSGPackSerializer.dumps(dictionary(*shuffled)))) == 3


@pytest.mark.parametrize("nodes", [1, 5, 39, 100, 1000, 10_000])
def test_the_size_of_the_network_is_known_within_a_factor_of_two(nodes: int) -> None:
    dice = random.Random(nodes)
    me = DHTID(dice.getrandbits(160))
    table = RoutingTable(me, bucket_size=20, depth_modulo=5)
    for number in range(nodes - 1):
        table.add_or_update_node(DHTID(dice.getrandbits(160)), PeerID(number.to_bytes(32, "big")))
    node: Any = SimpleNamespace(node_id=me, protocol=SimpleNamespace(routing_table=table))
    size = network_size(node)
    assert nodes / 2 <= size <= nodes * 2
    assert nodes > 39 or size == nodes  # few are counted
