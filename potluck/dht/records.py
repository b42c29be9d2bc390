"""Typed DHT records: signed by the peer they speak for, expiring, at most 4 KiB.

A record travels as an envelope (`docs/protocol.md`): version, kind, signer's public key, payload, expiry
and an Ed25519 signature over all of it, bound to one run and to the DHT key it lies under. Both the key's
name and the subkey follow from the envelope's contents, so a node that only ever sees the key's hash can
still check that a record lies where it belongs. Decoding is hostile-input code: bounds before parsing, then
schema, then signature.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from potluck.dht.manifest import RunId
from potluck.errors import RecordError
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of, verify
from potluck.net.links import End, Link

#: A record's whole envelope, in bytes. hivemind takes values of any size; a value of 60 kB kills its forked
#: DHT.
MAX_RECORD_BYTES: Final = 4096
#: Peers that fit into one `Weights` record: 4096 bytes less the envelope, at 63 bytes for each peer.
MAX_WEIGHTS: Final = 54
#: Links in one `Links` record: with 320 bytes for each it is two thirds full.
MAX_LINKS: Final = 8

_VERSION: Final = 1
_DOMAIN: Final = b"potluck.record.1"

Reason = Literal[
    "oversized",  # the value, or a whole request, is larger than allowed
    "malformed",  # not an envelope, unknown version or kind, or a field out of bounds
    "wrong_key",  # lies under another key than its contents say
    "wrong_subkey",  # lies under another peer's subkey, or under none, or speaks for another peer
    "expired",
    "far_future",  # would expire later than the run allows
    "bad_signature",  # forged, or made for another run
    "too_many_subkeys",
    "too_fast",  # its signer, or the node that sent it, exceeds its rate
    "wrong_place",  # a node that claims another place in the DHT than its peer id has
    "stranger",  # weights of a peer that is none of the run's validators
    "no_room",  # our storage is full of keys that lie nearer to us
]

Module = Annotated[str, Meta(pattern=r"\A[a-z0-9./_-]{1,64}\Z")]
Round = Annotated[int, Meta(ge=0, lt=2**32)]
Shard = Annotated[int, Meta(ge=0, lt=2**16)]
ByteCount = Annotated[int, Meta(ge=0, le=2**40)]
TokenCount = Annotated[int, Meta(ge=0, le=2**40)]
StepCount = Annotated[int, Meta(ge=0, lt=2**32)]
Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
PeerIdText = Annotated[str, Meta(pattern=r"\A12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\Z")]
Address = Annotated[str, Meta(max_length=256)]
NonNegative = Annotated[float, Meta(ge=0)]


class RejectedRecord(RecordError):
    """A record that was refused; `reason` is a short stable name to count by."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all records. Raises ValueError for a number that is not finite; `decode` checks the bounds."""

    kind: ClassVar[str]
    #: Whether nodes of the DHT keep it.
    in_dht: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            numbers = value.values() if isinstance(value, dict) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} is not a finite number")

    def path(self) -> str:
        """The DHT key's name within its run."""
        raise NotImplementedError


class Replica(Record, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer's live copy of a module: who hosts what, and where to reach it."""

    kind: ClassVar[str] = "replica"

    module: Module
    shard: Shard = 0
    round: Round
    role: Literal["worker", "organizer", "validator", "observer"] = "worker"
    #: Content address of the state at the start of `round`; None while it has none yet.
    digest: Annotated[bytes, Meta(max_length=32)] | None = None
    #: Utilization or queue length, as the run's balancing defines it.
    load: NonNegative = 0.0
    #: Samples per second that it can serve, as it measured, for a stage of average work.
    throughput: NonNegative = 0.0
    #: On its way here, or just come: it will not move elsewhere now.
    moving: bool = False
    #: Serves this module for good.
    bound: bool = False
    #: Random, new with each start of the process: tells two processes of one identity apart.
    session: Annotated[bytes, Meta(min_length=16, max_length=16)]
    started: NonNegative
    addresses: Annotated[list[Address], Meta(max_length=8)]
    name: Annotated[str, Meta(max_length=64)] = ""

    @property
    def keeps(self) -> bool:
        """Whether it only follows the module, or has left it: it answers no calls."""
        return self.role in ("observer", "validator")

    @property
    def serves(self) -> bool:
        """Whether it can be called: it has a state to answer with."""
        return not self.keeps and self.digest is not None

    def path(self) -> str:
        return replicas_path(self.module, self.shard)


class Commit(Record, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A promise, before the commit deadline, of a contribution that is served after it."""

    kind: ClassVar[str] = "commit"

    module: Module
    round: Round
    shard: Shard
    blob: Hash
    size: ByteCount
    tokens: TokenCount
    steps: StepCount
    loss_before: float
    loss_after: float
    #: Content address of the state that theta_round is: equal digests mean bit-identical replicas.
    digest: Hash
    #: What proves that this peer has that state (`swarm/state.py`).
    witness: Hash | None = None
    #: Contributions applied since theta_0: breaks ties between states in favour of the trained one.
    history: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    replicas_estimate: NonNegative
    #: Blob of the drift fragment, if the peer offers one this round.
    fragment: Hash | None = None
    fragment_size: ByteCount = 0
    session: Annotated[bytes, Meta(min_length=16, max_length=16)]
    committed_at: NonNegative

    def path(self) -> str:
        return commits_path(self.module, self.round, self.shard)


class Weights(Record, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A validator's opinion: how much each peer's contributions to a module should count."""

    kind: ClassVar[str] = "weights"

    module: Module
    round: Round
    #: Of the validator's ledger when it published this: its size and root hash. Two histories would show.
    ledger_size: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    ledger_root: Hash | None = None
    #: Counts for rounds that begin later.
    made_at: NonNegative
    #: That it evaluated, and did not copy: how much more credit the windows that all validators have in common give the
    #: round's step than this one's own. They are drawn from the round's beacon: who saw the round can check it.
    beacon: Hash | None = None
    contrast: float = 0.0
    weights: Annotated[dict[PeerIdText, Annotated[float, Meta(ge=0, le=1)]], Meta(max_length=MAX_WEIGHTS)]

    def path(self) -> str:
        return weights_path(self.module, self.round)


class Links(Record, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a peer shows about whose account its credit, or another's, counts for (`net/links.py`). Under a key of its
    own, where nobody else can publish. Each statement bears its own signatures: the reader checks them."""

    kind: ClassVar[str] = "links"

    peer: PeerIdText
    links: Annotated[list[Link | End], Meta(max_length=MAX_LINKS)]

    def path(self) -> str:
        return links_path(self.peer)


class Heartbeat(Record, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a peer is, for whoever watches the run: over gossipsub, never in the DHT. Nothing that its other records do
    not say, or that its group does not see; nothing that the run needs."""

    kind: ClassVar[str] = "heartbeat"
    in_dht: ClassVar[bool] = False

    #: None: it trains through the others' stages, or has not chosen yet.
    module: Module | None = None
    round: Round
    role: Literal["worker", "organizer", "validator", "observer"] = "worker"
    phase: Annotated[str, Meta(max_length=32)] = ""
    name: Annotated[str, Meta(max_length=64)] = ""
    version: Annotated[str, Meta(max_length=32)] = ""
    #: Held-out, in nats per token, at the beginning of `round`.
    loss: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    tokens_per_second: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    #: Of the module, as `Replica` defines it.
    load: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    #: Rounds since `started` in which others could use what it sent.
    contributed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    started: NonNegative
    sent_at: NonNegative

    def path(self) -> str:
        return "heartbeats"


R = TypeVar("R", bound=Record, covariant=True)


@dataclass(frozen=True, slots=True)
class Signed(Generic[R]):
    """A record whose signature was checked, the peer that signed it, and when it expires (Unix seconds)."""

    record: R
    peer: PeerId
    expires_at: float


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    kind: Annotated[str, Meta(max_length=16)]
    signer: Annotated[bytes, Meta(min_length=32, max_length=32)]
    payload: Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
    expires_at: float
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)
_payload_decoders: Final[dict[str, msgspec.msgpack.Decoder[Record]]] = {
    kind.kind: msgspec.msgpack.Decoder(kind) for kind in (Replica, Commit, Weights, Links, Heartbeat)
}


def replicas_path(module: str, shard: int = 0) -> str:
    return f"replicas/{module}/{shard}"


def commits_path(module: str, round: int, shard: int) -> str:
    return f"commits/{module}/{round}/{shard}"


def weights_path(module: str, round: int) -> str:
    return f"weights/{module}/{round}"


def links_path(peer: str) -> str:
    return f"links/{peer}"


def key_name(run_id: RunId, path: str) -> str:
    """The DHT key under which a run's records with this path lie."""
    return f"{run_id}/{path}"


def key_id(name: str) -> bytes:
    """What hivemind's `DHTID.generate(name).to_bytes()` gives: SHA-1 of the msgpack of the name."""
    return hashlib.sha1(_encoder.encode(name)).digest()


def encode(record: Record, identity: Identity, run_id: RunId, expires_at: float) -> bytes:
    """Sign a record. `expires_at` (Unix seconds) must also be the DHT's expiration time.

    Raises RejectedRecord when the record breaks its own bounds: every other node would refuse it.
    """
    payload = _encoder.encode(record)
    expires_at = float(expires_at)
    _open_payload(record.kind, payload)
    message = _message(run_id, record.kind, key_name(run_id, record.path()), payload, expires_at)
    data = _encoder.encode(
        _Envelope(_VERSION, record.kind, identity.public_key, payload, expires_at, identity.sign(message))
    )
    _check_size(data)
    return data


def decode(
    data: bytes,
    run_id: RunId,
    *,
    now: float,
    max_ahead_seconds: float,
    key: bytes | None = None,
    subkey: PeerId | None = None,
) -> Signed[Record]:
    """Open an envelope that another peer sent. `now` is in Unix seconds.

    `key` (20 bytes, see `key_id`) and `subkey` are where it was found; None skips that check.
    Raises RejectedRecord, whose `reason` says what is wrong, and nothing else, whatever the bytes.
    """
    _check_size(data)
    try:
        envelope = _envelope_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RejectedRecord("malformed", f"not a record envelope ({error})") from None
    if envelope.version != _VERSION:
        raise RejectedRecord("malformed", f"record version {envelope.version}, this program knows {_VERSION}")
    # One record has one encoding: else anybody could spend a signer's rate with new spellings of an old
    # record.
    if _encoder.encode(envelope) != data:
        raise RejectedRecord("malformed", "not in canonical encoding")
    check_expiry(envelope.expires_at, now, max_ahead_seconds)
    record = _open_payload(envelope.kind, envelope.payload)
    name = key_name(run_id, record.path())
    if key is not None and key_id(name) != key:
        raise RejectedRecord("wrong_key", f"belongs under {name}")
    peer = peer_id_of(envelope.signer)
    if subkey is not None and subkey != peer:
        raise RejectedRecord("wrong_subkey", f"signed by {peer}, stored under {subkey[:64]}")
    if isinstance(record, Links) and record.peer != peer:
        raise RejectedRecord("wrong_subkey", f"signed by {peer}, and speaks for {record.peer}")
    message = _message(run_id, envelope.kind, name, envelope.payload, envelope.expires_at)
    if not verify(envelope.signer, message, envelope.signature):
        raise RejectedRecord("bad_signature", f"not signed by {peer} for this run and key")
    return Signed(record, peer, envelope.expires_at)


def check_expiry(expires_at: float, now: float, max_ahead_seconds: float) -> None:
    """Raises RejectedRecord for a record that has expired, or would live longer than allowed."""
    if not math.isfinite(expires_at):
        raise RejectedRecord("malformed", "expiry is not a finite number")
    if expires_at <= now:
        raise RejectedRecord("expired", f"{now - expires_at:.1f} s ago")
    if expires_at > now + max_ahead_seconds:
        raise RejectedRecord("far_future", f"expires in {expires_at - now:.1f} s, allowed {max_ahead_seconds:.1f} s")


def _check_size(data: bytes) -> None:
    if len(data) > MAX_RECORD_BYTES:
        raise RejectedRecord("oversized", f"{len(data)} bytes, allowed {MAX_RECORD_BYTES}")


def _open_payload(kind: str, payload: bytes) -> Record:
    decoder = _payload_decoders.get(kind)
    if decoder is None:
        raise RejectedRecord("malformed", f"unknown kind of record {kind!r}")
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RejectedRecord("malformed", f"{kind}: {error}") from None


def _message(run_id: RunId, kind: str, name: str, payload: bytes, expires_at: float) -> bytes:
    """What is signed. Each part carries its length, so that no two records share a message."""
    parts = (run_id.encode(), kind.encode(), name.encode(), payload, struct.pack(">d", expires_at))
    return _DOMAIN + b"".join(struct.pack(">I", len(part)) + part for part in parts)
