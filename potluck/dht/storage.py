"""What a DHT node holds for others: signed records by key and subkey, until they expire, within fixed bounds.

It replaces hivemind's `DHTLocalStorage`, which is unbounded, hands out its own dictionaries (a reader's
merge writes into them), and lets the replay of a peer's older record delete the newer one early (its heap
keeps the later call's expiry). Here records under a subkey only ever move to a later expiry, so merging is
safe in any order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

#: Peers under one key. A group has at most 256 members; more only come from a flood of identities.
MAX_SUBKEYS: Final = 256
MAX_KEYS: Final = 4096
#: Values under one key: they travel in one message. 256 typical records have 150 KiB.
MAX_KEY_BYTES: Final = 512 * 1024
MAX_BYTES: Final = 64 * 2**20
SWEEP_SECONDS: Final = 10.0
#: msgpack's extension type of hivemind's `DictionaryDHTValue`.
DICTIONARY_EXT: Final = 0x50

_Entry = tuple[bytes, float]


def new_dictionary() -> DictionaryDHTValue:
    """hivemind's dictionary without its clock and its eviction: storage and validator judge expiry."""
    dictionary = DictionaryDHTValue()
    dictionary.frozen = True
    return dictionary


class RecordStorage:
    """Records of many peers. It has the methods of `DHTLocalStorage` that hivemind's node and protocol call.

    When full, the keys farthest (XOR) from `node_id` go first: those are the ones others are responsible for.
    """

    def __init__(
        self,
        node_id: DHTID,
        clock: Callable[[], float],
        rejected: Counter[str],
        *,
        max_keys: int = MAX_KEYS,
        max_bytes: int = MAX_BYTES,
        max_subkeys: int = MAX_SUBKEYS,
    ) -> None:
        self._node_id, self._clock, self._rejected = node_id, clock, rejected
        self._max_keys, self._max_bytes, self._max_subkeys = max_keys, max_bytes, max_subkeys
        self._records: dict[DHTID, dict[str, _Entry]] = {}
        #: Wire form of what lies under a key, until it changes: a read asks ten nodes, again and again.
        self._packed: dict[DHTID, tuple[bytes, float]] = {}
        self._bytes = 0
        self._swept_at = clock()

    @property
    def total_bytes(self) -> int:
        return self._bytes

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        """True if the storage now holds this record; False if a newer one was there, or there is no room."""
        now = self._clock()
        if expiration_time <= now:
            return False
        if now - self._swept_at >= SWEEP_SECONDS:
            self._sweep()
        self._drop_expired(key)
        entries = self._records.get(key, {})
        held = entries.get(subkey)
        if held is not None and held[1] >= expiration_time:
            return held == (value, expiration_time)
        if held is None and len(entries) >= self._max_subkeys:
            self._rejected["too_many_subkeys"] += 1
            return False
        if sum(len(other) for other, _ in entries.values()) + len(value) > MAX_KEY_BYTES:
            self._rejected["no_room"] += 1
            return False
        if not self._make_room(key, len(value)):
            self._rejected["no_room"] += 1
            return False
        self._records.setdefault(key, {})[subkey] = (value, expiration_time)
        self._packed.pop(key, None)
        self._bytes += len(value) - (len(held[0]) if held else 0)
        return True

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: str | None = None) -> bool:
        """hivemind's form. Values without a subkey are nobody's, and refused."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        """A copy of what lies under a key, as hivemind's dictionary, or None."""
        self._drop_expired(key)
        entries = self._records.get(key)
        if not entries:
            return None
        dictionary = new_dictionary()
        for subkey, (value, expiration_time) in entries.items():
            dictionary.store(subkey, value, expiration_time)
        return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)

    def packed(self, key: DHTID) -> tuple[bytes, float] | None:
        """What lies under a key as hivemind's dictionary in msgpack, and its latest expiry; equal sets, equal bytes."""
        self._drop_expired(key)
        entries = self._records.get(key)
        if not entries:
            return None
        held = self._packed.get(key)
        if held is None:
            latest = max(expiration for _, expiration in entries.values())
            items = [[subkey, *entries[subkey]] for subkey in sorted(entries)]
            data = msgspec.msgpack.encode([math.inf, latest, items])
            held = self._packed[key] = msgspec.msgpack.encode(msgspec.msgpack.Ext(DICTIONARY_EXT, data)), latest
        return held

    def held_keys(self) -> list[DHTID]:
        """Some may have expired."""
        return list(self._records)

    def items(self) -> Iterator[tuple[DHTID, ValueWithExpiration]]:
        for key in list(self._records):
            held = self.get(key)
            if held is not None:
                yield key, held

    def __contains__(self, key: DHTID) -> bool:
        self._drop_expired(key)
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __delitem__(self, key: DHTID) -> None:
        self._packed.pop(key, None)
        for value, _ in self._records.pop(key, {}).values():
            self._bytes -= len(value)

    def _drop_expired(self, key: DHTID) -> None:
        entries = self._records.get(key)
        if entries is None:
            return
        now = self._clock()
        for subkey in [subkey for subkey, entry in entries.items() if entry[1] <= now]:
            self._bytes -= len(entries.pop(subkey)[0])
            self._packed.pop(key, None)
        if not entries:
            del self._records[key]

    def _sweep(self) -> None:
        """Drop what expired under keys that nobody asks for any more, as those of past rounds are."""
        self._swept_at = self._clock()
        for key in list(self._records):
            self._drop_expired(key)

    def _make_room(self, key: DHTID, size: int) -> bool:
        """Room for one more record under `key`, at the cost of keys farther from this node than it."""
        if self._fits(key, size):
            return True
        self._sweep()
        while not self._fits(key, size):
            farthest = max([*self._records, key], key=self._node_id.xor_distance)
            if farthest == key:
                return False
            del self[farthest]
        return True

    def _fits(self, key: DHTID, size: int) -> bool:
        keys = len(self._records) + (key not in self._records)
        return keys <= self._max_keys and self._bytes + size <= self._max_bytes
