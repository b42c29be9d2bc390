"""hivemind's DHT protocol behind our bounds: what strangers may send, and what we believe of their answers.

The RPCs and their protobufs are hivemind's (`dht.proto`). What differs, and the attack that each difference
stops:

- Handlers are named by run, so that nodes of two runs behind one identity never mix.
- A node's place is the hash of its peer id, whatever it claims: nobody chooses to sit beside a key.
- Requests are bounded in keys and bytes, and each sender in rate, before anything is parsed.
- msgpack from the wire is parsed by schema: no nesting, no announced sizes.
- One bad record in a dictionary is dropped alone; hivemind drops the dictionary, so one forgery hid all
  honest ones.
- An answer's expiry is computed from its records: hivemind believes the sender, and a claim of "expires
  never" ended a search at once with whatever that sender chose to show.
- What a read finds is kept (within bounds) and served: a record is lost only when all who read it are gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Collection, Coroutine, Sequence
from functools import lru_cache
from typing import Annotated, Any, Final

import msgspec
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from msgspec import Meta

from potluck.dht.records import MAX_RECORD_BYTES, Reason, RejectedRecord
from potluck.dht.storage import DICTIONARY_EXT, MAX_KEY_BYTES, MAX_SUBKEYS, RecordStorage, new_dictionary
from potluck.dht.validator import RecordValidator, TokenBuckets
from potluck.errors import ProtocolError

log = logging.getLogger(__name__)

#: Keys in one store request. A node that hands its keys to a newcomer sends batches.
MAX_STORE_KEYS: Final = 64
#: Keys in one find request: an answer may hold `MAX_KEY_BYTES` for each.
MAX_FIND_KEYS: Final = 1
#: A full dictionary, packed: its records, and for each its peer id and expiry.
MAX_DICTIONARY_BYTES: Final = MAX_KEY_BYTES + MAX_SUBKEYS * 96
#: Bytes of values in one request. p2pd hangs up, on all calls at once, at a message beyond 1 MiB (`GoHost`).
MAX_REQUEST_BYTES: Final = 640 * 1024
#: Records that one node may hand us at once, and per second after that.
SENDER_BURST: Final = 4096
SENDER_PER_SECOND: Final = 256.0
#: How often a full bucket's oldest node is asked whether it is still there, when strangers come.
PROBE_SECONDS: Final = 30.0
#: Neighbours that are read from one answer: a node has this many in a bucket, and names as many.
MAX_NEIGHBOURS: Final = 64
#: Keys of which the last believed answer is remembered.
_REMEMBERED_ANSWERS: Final = 256
MAX_DISTANCE: Final = 2**160

# First bytes of msgpack's extension and text values: what follows is parsed as that, and nothing else.
_EXT_BYTES: Final = frozenset({0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)})
_TEXT_BYTES: Final = frozenset({*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB})
_NODE_ID_BYTES: Final = DHTID.HASH_NBYTES

_Subkey = Annotated[str, Meta(max_length=128)]
_Value = Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES + 8)]
_Items = tuple[float, float, Annotated[list[tuple[_Subkey, _Value, float]], Meta(max_length=MAX_SUBKEYS)]]
_items_decoder = msgspec.msgpack.Decoder(_Items)
_ext_decoder = msgspec.msgpack.Decoder(msgspec.msgpack.Ext)
_text_decoder = msgspec.msgpack.Decoder(str)
_bytes_decoder = msgspec.msgpack.Decoder(bytes | None)


def node_id_of(peer: PeerID) -> DHTID:
    """A peer's place in the DHT: it follows from the key, survives restarts, and cannot be chosen."""
    return _node_id_of(peer.to_bytes())


@lru_cache(maxsize=65536)
def _node_id_of(peer: bytes) -> DHTID:
    return DHTID.from_bytes(hashlib.sha1(b"potluck.node.1" + peer).digest())


@lru_cache(maxsize=65536)
def _named(peer: bytes) -> tuple[DHTID, PeerID]:
    """A node that an answer names: few names come only once."""
    peer_id = PeerID(peer)
    return node_id_of(peer_id), peer_id


class BoundedSerializer(MSGPackSerializer):  # type: ignore[misc]
    """hivemind's msgpack, reading only texts, bytes, and dictionaries of records."""

    @classmethod
    def loads(cls, buf: bytes) -> str | bytes | DictionaryDHTValue | None:
        """Raises ProtocolError for anything else, whatever the bytes."""
        if len(buf) > MAX_DICTIONARY_BYTES:
            raise ProtocolError(f"a DHT value of {len(buf)} bytes, allowed {MAX_DICTIONARY_BYTES}")
        try:
            first = buf[0] if buf else 0
            if first in _EXT_BYTES:
                return _dictionary(_ext_decoder.decode(buf))
            return _text_decoder.decode(buf) if first in _TEXT_BYTES else _bytes_decoder.decode(buf)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"malformed DHT value: {error}") from None


def _dictionary(packed: msgspec.msgpack.Ext) -> DictionaryDHTValue:
    if packed.code != DICTIONARY_EXT:
        raise ValueError(f"unknown extension type {packed.code}")
    # The announced size limit and latest expiry are the sender's claims; what counts is the records
    # themselves.
    _max_size, _latest, items = _items_decoder.decode(packed.data)
    dictionary = new_dictionary()
    for subkey, value, expiration_time in items:
        dictionary.store(subkey, value, expiration_time)
    return dictionary


class RecordProtocol(DHTProtocol):  # type: ignore[misc]
    """One node's side of the DHT of one run. Made by `potluck.dht.node.start_dht`."""

    serializer = BoundedSerializer
    # ServicerBase caches these on the class where it first finds them: the parent's would carry the parent's
    # names.
    _rpc_handlers = None
    _stub_type = None

    storage: RecordStorage
    record_validator: RecordValidator
    _namespace: str
    _senders: TokenBuckets
    _answers: OrderedDict[DHTID, bytes]
    _probed: dict[int, float]
    _tasks: dict[asyncio.Task[None], None]
    #: By key and count: many ask for the same key, and the routing table rarely changes.
    _nearest: dict[tuple[DHTID, int], dict[DHTID, PeerID]]
    #: How near the nearest node that we know is to a key that we hold.
    _closest: dict[DHTID, int]

    @classmethod
    async def open(
        cls,
        p2p: Any,
        node_id: DHTID,
        validator: RecordValidator,
        *,
        bucket_size: int,
        depth_modulo: int,
        num_replicas: int,
        wait_timeout: float,
        parallel_rpc: int,
    ) -> RecordProtocol:
        """Serve the DHT's RPCs on a host. `wait_timeout` bounds each call, in seconds."""
        # As a client first: hivemind would register the handlers before our storage is in place.
        self: RecordProtocol = await cls.create(
            p2p,
            node_id,
            bucket_size,
            depth_modulo,
            num_replicas,
            wait_timeout,
            parallel_rpc,
            client_mode=True,
            record_validator=validator,
        )
        self._namespace = f"potluck/{validator.run_id}"
        self._senders = TokenBuckets(SENDER_BURST, SENDER_PER_SECOND, validator.clock)
        self._answers, self._probed, self._tasks = OrderedDict(), {}, {}
        self._nearest = {}
        self._closest = {}
        self.storage = RecordStorage(node_id, validator.clock, validator.rejected)
        # Reads are always `latest` and end up in `storage`: the second cache stays empty.
        self.cache = RecordStorage(node_id, validator.clock, validator.rejected, max_keys=0)
        self.node_info = dht_pb2.NodeInfo(node_id=node_id.to_bytes())
        self.client_mode = False
        await self.add_p2p_handlers(p2p, namespace=self._namespace)
        return self

    async def shutdown(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.remove_p2p_handlers(self.p2p, namespace=self._namespace)

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return f"{namespace}::DHTProtocol.{method_name}"

    def get_stub(self, peer: PeerID) -> Any:
        self._collect_rpc_handlers()
        assert self._stub_type is not None
        return self._stub_type(self.p2p, peer, self._namespace)

    # What others ask of us. A raised error goes back to the sender as its call's failure.

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        self._check_place(request.peer, context.remote_id)
        return await super().rpc_ping(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Keeps the good records of a request. False for a key of which not all were good, or none newer."""
        self._check_place(request.peer, context.remote_id)
        count = len(request.keys)
        lists = (request.subkeys, request.values, request.expiration_time, request.in_cache)
        self._check_keys(request.keys, MAX_STORE_KEYS)
        if any(len(values) != count for values in lists):
            raise self._refuse("malformed", "lists of different lengths")
        if sum(map(len, request.values)) > MAX_REQUEST_BYTES:
            raise self._refuse("oversized", f"more than {MAX_REQUEST_BYTES} bytes of values")
        if not self._senders.take(context.remote_id, count):
            raise self._refuse("too_fast", "too many records from this node")
        if request.peer.node_id:
            self._meet(DHTID.from_bytes(request.peer.node_id), context.remote_id)
        stored = [
            self._store_one(key, tag, value, expiration_time)
            for key, tag, value, expiration_time in zip(
                request.keys, request.subkeys, request.values, request.expiration_time, strict=True
            )
        ]
        return dht_pb2.StoreResponse(store_ok=stored, peer=self.node_info)

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """What lies under a key here, and the nodes nearest to it that we know."""
        self._check_place(request.peer, context.remote_id)
        self._check_keys(request.keys, MAX_FIND_KEYS)
        sender = DHTID.from_bytes(request.peer.node_id) if request.peer.node_id else None
        if sender is not None:
            self._meet(sender, context.remote_id)
        key = DHTID.from_bytes(request.keys[0])
        packed = self.storage.packed(key)
        if packed is None:
            result = dht_pb2.FindResult(type=dht_pb2.NOT_FOUND)
        else:
            value, expires_at = packed
            result = dht_pb2.FindResult(type=dht_pb2.FOUND_DICTIONARY, value=value, expiration_time=expires_at)
        # Their places follow from their peer ids, and are not sent.
        nearest = self.nearest_known(key, self.bucket_size + 1)
        result.nearest_peer_ids.extend(peer.to_bytes() for node, peer in nearest.items() if node != sender)
        return dht_pb2.FindResponse(results=[result], peer=self.node_info)

    def _store_one(self, key: bytes, tag: bytes, value: bytes, expiration_time: float) -> bool:
        if tag != self.IS_DICTIONARY:
            if not self._validate_record(key, tag, value, expiration_time):
                return False
            subkey = self.serializer.loads(tag)
            return isinstance(subkey, str) and self._keep(DHTID.from_bytes(key), subkey, value, expiration_time)
        try:
            dictionary = self.serializer.loads(value)
        except ProtocolError:
            dictionary = None
        if not isinstance(dictionary, DictionaryDHTValue):
            self.record_validator.rejected["malformed"] += 1
            return False
        announced = len(dictionary)
        self._validate_dictionary(key, dictionary)
        kept = [
            self._keep(DHTID.from_bytes(key), subkey, item.value, item.expiration_time)
            for subkey, item in dictionary.items()
        ]
        return len(kept) == announced > 0 and all(kept)

    def _keep(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        return self.storage.store_subkey(key, subkey, value, expiration_time)

    def _check_place(self, sender: dht_pb2.NodeInfo, peer: PeerID) -> None:
        """A sender that gives a node id must give its own. One that gives none is a client: answer it."""
        if sender.node_id and sender.node_id != node_id_of(peer).to_bytes():
            raise self._refuse("wrong_place", "the node id is not the hash of the sender's peer id")

    def _check_keys(self, keys: Sequence[bytes], most: int) -> None:
        if not 0 < len(keys) <= most:
            raise self._refuse("oversized", f"{len(keys)} keys, allowed 1 to {most}")
        if any(len(key) != _NODE_ID_BYTES for key in keys):
            raise self._refuse("malformed", f"a key that has not {_NODE_ID_BYTES} bytes")

    def _refuse(self, reason: Reason, detail: str) -> RejectedRecord:
        self.record_validator.rejected[reason] += 1
        return RejectedRecord(reason, detail)

    # What we ask of others.

    async def call_ping(self, peer: PeerID, validate: bool = False, strict: bool = True) -> DHTID | None:
        """The peer's node id, or None when it does not answer or claims a place that is not its own."""
        try:
            claimed = await super().call_ping(peer, validate=validate, strict=strict)
        except AssertionError:  # hivemind's, for a node id of the wrong length
            return None
        return claimed if claimed == node_id_of(peer) else None

    async def call_store(
        self,
        peer: PeerID,
        keys: Sequence[DHTID],
        values: Sequence[Any],
        expiration_time: float | Sequence[float],
        subkeys: Sequence[Any] | None = None,
        in_cache: bool | Sequence[bool] | None = None,
    ) -> list[bool] | None:
        """hivemind's, in as many requests as the bounds need: it hands a newcomer all its keys in one."""
        expirations = [expiration_time] * len(keys) if isinstance(expiration_time, float) else list(expiration_time)
        tags = list(subkeys) if subkeys is not None else [None] * len(keys)
        stored: list[bool] = []
        for start, stop in _batches(values):
            part = slice(start, stop)
            answer = await super().call_store(
                peer, keys[part], values[part], expirations[part], tags[part], in_cache=False
            )
            if answer is None or len(answer) != stop - start:
                return None
            stored.extend(answer)
        return stored

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, tuple[None, dict[DHTID, PeerID]]]:
        """The neighbours that a node names, per key; empty if it does not answer.

        Its records, verified, go into our storage and nowhere else: there a read finds them, and hivemind's search
        does not merge them once more.
        """
        keys = list(keys)
        request = dht_pb2.FindRequest(keys=[key.to_bytes() for key in keys], peer=self.node_info)
        try:
            name = self._get_handle_name(self._namespace, "rpc_find")
            async with self.rpc_semaphore, asyncio.timeout(self.wait_timeout):
                response = await self.p2p.call_protobuf_handler(peer, name, request, dht_pb2.FindResponse)
            if len(response.results) != len(keys):
                raise ProtocolError(f"{len(response.results)} answers to {len(keys)} keys")
            believed = {
                key: (None, self._believe(key, result)) for key, result in zip(keys, response.results, strict=True)
            }
        except Exception as error:  # whatever the stub or a stranger's bytes raise
            log.debug("dht.find.failed peer=%s error=%r", peer, error)
            self._forget(peer)
            return {}
        if response.peer.node_id == node_id_of(peer).to_bytes():
            self._meet(node_id_of(peer), peer)
        elif response.peer.node_id:
            self.record_validator.rejected["wrong_place"] += 1
        return believed

    def _believe(self, key: DHTID, result: dht_pb2.FindResult) -> dict[DHTID, PeerID]:
        """Keep the good records of an answer; return the neighbours it names, nearest first."""
        if result.type == dht_pb2.FOUND_DICTIONARY:
            # The holders of a key mostly say the same. What was refused (too many at once, say) is looked at again.
            digest = hashlib.blake2b(result.value, digest_size=16).digest()
            known = self._answers.get(key) == digest and key in self.storage
            if not known and self._store_one(key.to_bytes(), self.IS_DICTIONARY, result.value, result.expiration_time):
                self._answers[key] = digest
                self._answers.move_to_end(key)
                if len(self._answers) > _REMEMBERED_ANSWERS:
                    self._answers.popitem(last=False)
        named = dict(map(_named, result.nearest_peer_ids[:MAX_NEIGHBOURS]))
        return {node: named[node] for node in sorted(named, key=int(key).__xor__)[: self.bucket_size]}

    def _meet(self, node_id: DHTID, peer: PeerID) -> None:
        """A node asked or answered. As `update_routing_table`, but nothing is done where nothing would change.

        For each stranger hivemind pings the oldest node of a full bucket, goes through all records for those that the
        stranger should hold, and remembers him for good. Here a full bucket is probed now and then, and strangers to
        it are forgotten. Nodes near to us, which share our keys, never meet a full one: their bucket is split.
        """
        table = self.routing_table
        if node_id in table:
            table.add_or_update_node(node_id, peer)
            return
        bucket = table.buckets[table.get_bucket_index(node_id)]
        splits = bucket.has_in_range(table.node_id) or bucket.depth % table.depth_modulo != 0
        if len(bucket.nodes_to_peer_id) >= bucket.size and not splits:
            now = self.record_validator.clock()
            if abs(now - self._probed.get(bucket.lower, -math.inf)) < PROBE_SECONDS:
                return
            self._probed[bucket.lower] = now
        self._learn(node_id, peer)

    def _background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def nearest_known(self, key: DHTID, count: int) -> dict[DHTID, PeerID]:
        """Of the nodes that we know those nearest to a key, nearest first. Not to be changed."""
        known = self._nearest.get((key, count))
        if known is None:
            table = self.routing_table.uid_to_peer_id
            if len(self._nearest) >= _REMEMBERED_ANSWERS:
                self._nearest.clear()
            known = {node: table[node] for node in sorted(table, key=int(key).__xor__)[:count]}
            self._nearest[key, count] = known
        return known

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """hivemind's calls (ping, store) end here."""
        if not responded:
            self._forget(peer_id)
        elif node_id == node_id_of(peer_id):
            self._learn(node_id, peer_id)
        else:
            self.record_validator.rejected["wrong_place"] += 1

    def _forget(self, peer: PeerID) -> None:
        node_id = self.routing_table.get(peer_id=peer)
        if node_id is not None:
            self._nearest.clear()
            self._closest.clear()
            del self.routing_table[node_id]

    def _learn(self, node_id: DHTID, peer: PeerID) -> None:
        """Into the routing table; a new node gets the records that it should hold from the nearest who holds them."""
        handed = None
        if node_id not in self.routing_table:
            handed = [(key, held) for key in self._keys_for(node_id) if (held := self.storage.get(key)) is not None]
            if handed:
                values, expirations = [held.value for _, held in handed], [held.expiration_time for _, held in handed]
                self._background(self.call_store(peer, [key for key, _ in handed], values, expirations))
            self._nearest = {
                asked: near for asked, near in self._nearest.items() if not _belongs(node_id, *asked, near)
            }
        oldest = self.routing_table.add_or_update_node(node_id, peer)
        if handed is not None and node_id in self.routing_table:
            for key, distance in self._closest.items():
                self._closest[key] = min(distance, int(key) ^ int(node_id))
        if oldest is not None:
            # There was no room. If the oldest of that bucket answers no more, the next who is met takes its place.
            self._background(self.call_ping(oldest[1]))

    def _keys_for(self, node_id: DHTID) -> list[DHTID]:
        """Keys that belong to a new node (it is among the nearest) and are ours to hand over (we are the nearest)."""
        own, new, known = int(self.node_id), int(node_id), self.routing_table.uid_to_peer_id
        keys, held = [], self.storage.held_keys()
        if len(self._closest) > 2 * len(held):
            self._closest.clear()
        for key in held:
            distance = int(key).__xor__
            closest = self._closest.get(key)
            if closest is None:
                closest = self._closest[key] = min(map(distance, known), default=MAX_DISTANCE)
            if distance(own) < closest:
                replicas = list(self.nearest_known(key, self.num_replicas))
                if not replicas or distance(new) < distance(replicas[-1]):
                    keys.append(key)
        return keys

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Drops the bad records of a dictionary from it. False when nothing is left."""
        for subkey, (value, expiration_time) in list(dictionary.items()):
            if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expiration_time):
                del dictionary[subkey]
        expirations = [item.expiration_time for _, item in dictionary.items()]
        dictionary.latest_expiration_time = max(expirations, default=float("-inf"))
        return bool(expirations)


def _belongs(node_id: DHTID, key: DHTID, count: int, near: dict[DHTID, PeerID]) -> bool:
    """Whether a node is among the `count` nearest to a key, of which those so far are `near`, nearest first."""
    return len(near) < count or int(key) ^ int(node_id) < int(key) ^ int(next(reversed(near)))


def _batches(values: Sequence[Any]) -> list[tuple[int, int]]:
    """(start, stop) of runs of values that fit one request each."""
    batches: list[tuple[int, int]] = []
    start, size = 0, 0
    for index, value in enumerate(values):
        nbytes = len(value) if isinstance(value, bytes) else len(value.packb())
        if index > start and (size + nbytes > MAX_REQUEST_BYTES or index - start == MAX_STORE_KEYS):
            batches.append((start, index))
            start, size = index, 0
        size += nbytes
    if values:
        batches.append((start, len(values)))
    return batches
