"""The gate of every DHT node: which records it stores for others, and which it believes when it reads.

hivemind asks the validator about each record that a node is given or reads. It refuses whatever is not a
signed, unexpired record of this run under the key and the subkey it belongs to, and counts the refusals by
reason.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Final

import msgspec
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from potluck.dht.manifest import RunId
from potluck.dht.records import MAX_RECORD_BYTES, Record, RejectedRecord, Signed, Weights, check_expiry, decode
from potluck.net.host import PeerId

#: New records a signer may have accepted at once, and per second after that. A peer makes a handful per
#: round.
SIGNER_BURST: Final = 64
SIGNER_PER_SECOND: Final = 8.0
#: Verified records remembered, so that a record is verified once and not at every read. About 2 kB each.
MAX_VERIFIED: Final = 8192
#: msgpack's header of a byte string (`bin 16`), which hivemind puts before each value.
_HEADER_BYTES: Final = 3


class TokenBuckets:
    """A token bucket for each name, for the `max_names` seen last: a flood of names costs bounded memory."""

    def __init__(self, burst: float, per_second: float, clock: Callable[[], float], max_names: int = 8192) -> None:
        self._burst, self._per_second, self._clock, self._max_names = burst, per_second, clock, max_names
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, name: Hashable, tokens: float = 1.0) -> bool:
        """Take tokens if they are there. False: the name exceeds its rate, and nothing was taken."""
        now = self._clock()
        left, since = self._buckets.pop(name, (self._burst, now))
        left = min(self._burst, left + max(0.0, now - since) * self._per_second)
        granted = left >= tokens
        self._buckets[name] = (left - tokens if granted else left, now)
        if len(self._buckets) > self._max_names:
            self._buckets.popitem(last=False)
        return granted


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Believes signed records of one run. `rejected` counts refusals by reason (`records.Reason`)."""

    def __init__(
        self,
        run_id: RunId,
        *,
        max_ahead_seconds: float,
        clock: Callable[[], float] = time.time,
        signer_burst: float = SIGNER_BURST,
        signer_per_second: float = SIGNER_PER_SECOND,
        validators: Collection[PeerId] | None = None,
    ) -> None:
        self.run_id, self.max_ahead_seconds, self.clock = run_id, max_ahead_seconds, clock
        #: Whose weights are taken; None: anybody's.
        self.validators = validators
        self.rejected: Counter[str] = Counter()
        self._rates = TokenBuckets(signer_burst, signer_per_second, clock)
        self._verified: OrderedDict[bytes, Signed[Record]] = OrderedDict()

    def validate(self, record: DHTRecord) -> bool:
        """hivemind's question, about bytes from anyone. Never raises."""
        try:
            self.open(record.key, record.subkey, record.value, record.expiration_time)
        except RejectedRecord as error:
            self.rejected[error.reason] += 1
            return False
        return True

    def open(self, key: bytes, subkey: bytes, value: bytes, expires_at: float) -> Signed[Record]:
        """A record as it lies in the DHT: `subkey` and `value` are msgpack. Raises RejectedRecord.

        A record that was verified before costs a hash, and none of its signer's rate.
        """
        if len(value) > MAX_RECORD_BYTES + _HEADER_BYTES:
            raise RejectedRecord("oversized", f"{len(value)} bytes, allowed {MAX_RECORD_BYTES}")
        if len(subkey) > 128:
            raise RejectedRecord("wrong_subkey", f"{len(subkey)} bytes, a peer id has fewer")
        fingerprint = _fingerprint(key, subkey, value, expires_at)
        known = self._verified.get(fingerprint)
        if known is not None:
            check_expiry(known.expires_at, self.clock(), self.max_ahead_seconds)
            self._verified.move_to_end(fingerprint)
            return known
        signed = self._verify(key, subkey, value, expires_at)
        # Only what bears the signature is charged to the signer: nobody else can use up his rate.
        if not self._rates.take(signed.peer):
            raise RejectedRecord("too_fast", f"{signed.peer} publishes too many records")
        self._verified[fingerprint] = signed
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return signed

    def _verify(self, key: bytes, subkey: bytes, value: bytes, expires_at: float) -> Signed[Record]:
        peer = _text(subkey)
        if peer is None:
            raise RejectedRecord("wrong_subkey", "not stored under a peer id")
        try:
            envelope = msgspec.msgpack.decode(value, type=bytes)
        except (msgspec.MsgspecError, ValueError):
            raise RejectedRecord("malformed", "the value is not a byte string") from None
        signed = decode(
            envelope,
            self.run_id,
            now=self.clock(),
            max_ahead_seconds=self.max_ahead_seconds,
            key=key,
            subkey=PeerId(peer),
        )
        if not signed.record.in_dht:
            raise RejectedRecord("malformed", f"a {signed.record.kind} is not for the DHT")
        if signed.expires_at != expires_at:
            raise RejectedRecord("malformed", "the DHT's expiration time is not the signed one")
        if isinstance(signed.record, Weights) and self.validators is not None and signed.peer not in self.validators:
            # Else free identities could fill the key under which validators' weights lie.
            raise RejectedRecord("stranger", f"{signed.peer} is none of this run's validators")
        return signed


def _text(packed: bytes) -> str | None:
    try:
        return msgspec.msgpack.decode(packed, type=str)
    except (msgspec.MsgspecError, ValueError):
        return None


def _fingerprint(key: bytes, subkey: bytes, value: bytes, expires_at: float) -> bytes:
    lengths = struct.pack(">IId", len(key), len(subkey), expires_at)
    return hashlib.sha256(lengths + key + subkey + value).digest()
