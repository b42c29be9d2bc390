"""What a validator writes into its ledger: one entry for a round, one for each peer's score, one for what was paid, one
for each change of whose account a peer's credit counts for.

An entry is canonical msgpack: the same entry has the same bytes everywhere, and nothing else decodes to it. With the
run's manifest, the blobs that a round's entries name and the entries before it, a round can be scored again by anyone.
Losses are mean nats per token, credit is in the run's own unit (`incentives.emission`).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta

from potluck.dht.records import Hash, Module, PeerIdText, Round
from potluck.errors import IdentityError, LedgerError
from potluck.net.links import End, Link

#: An entry's bytes, checked before parsing.
MAX_ENTRY_BYTES: Final = 256 * 1024

Share = Annotated[float, Meta(ge=0, le=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Reason = Annotated[str, Meta(max_length=200)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """Base of all entries. Raises ValueError for a number that is not finite."""

    kind: ClassVar[str]

    module: Module
    round: Round

    def __post_init__(self) -> None:
        _check_finite(self)


class Standing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a validator remembers of a peer from round to round (`score.py`)."""

    #: Plackett-Luce rating (`rating.py`).
    mu: float = 25.0
    sigma: float = 25.0 / 3.0
    #: Moving average of its path credit with no weight but its tokens', relative to what is usual.
    usefulness: float = 0.0
    #: Log-likelihood ratio of the test of computation, and what it decided last: 1 trained, -1 not, 0 open.
    evidence: float = 0.0
    verdict: Annotated[int, Meta(ge=-1, le=1)] = 0
    #: Rounds with a contribution, and the last of them.
    seen: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    last: Annotated[int, Meta(ge=-1, lt=2**32)] = -1
    #: Rounds missed in a row by its own fault.
    missed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    #: Of the last contributions, the newest first: whether it made the loss worse.
    harmed: Annotated[list[bool], Meta(max_length=8)] = []
    #: Rounds in a row that it began with other parameters than the run's.
    unsynced: Annotated[int, Meta(ge=0, lt=2**32)] = 0

    def __post_init__(self) -> None:
        _check_finite(self)


class RoundEntry(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="round"):
    """A round as the validator saw it."""

    run: Annotated[str, Meta(pattern=r"\A[a-z2-7]{52}\Z")]
    validator: PeerIdText
    #: Content addresses of theta before and after the round.
    state: Hash
    next_state: Hash
    #: In a pipeline: the other modules' states, held fixed.
    beside: Annotated[dict[Module, Hash], Meta(max_length=256)] = {}
    #: Groups that the module's replicas met in.
    shards: Annotated[int, Meta(ge=1, lt=2**16)] = 1
    #: Whether it was averaged with validators' weights.
    steered: bool = False
    #: Hash of the round's commits and of the next state: what the evaluation data follow from.
    beacon: Hash
    #: On the evaluation data, at theta before and after; `credit` is the path credit of the whole step, outer momentum
    #: included: with plain averaging the sum of all contributions'.
    loss_before: float
    loss_after: float
    credit: float
    #: How much more of it is on the first half of the data than on the second: proof that they were evaluated on.
    contrast: float = 0.0
    #: What usefulness is relative to: a moving average of the peers' median.
    usual: NonNegative = 0.0
    #: Windows of data evaluated on, and most peers tested.
    windows: Annotated[int, Meta(ge=1, le=65536)]
    tests: Annotated[int, Meta(ge=0, le=65536)]
    #: Gradients along the path, and how far `credit` is from the drop, as a share of it.
    points: Annotated[int, Meta(ge=0, le=1024)]
    error: NonNegative
    #: Whether so many were missing at once that it is laid to the network.
    network_fault: bool = False


class ScoreEntry(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="score"):
    """One peer's round: what came, what it did to the loss, and what follows for its score."""

    peer: PeerIdText
    blob: Hash | None = None
    size: Annotated[int, Meta(ge=0, le=2**40)] = 0
    tokens: Annotated[int, Meta(ge=0, le=2**40)] = 0
    steps: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    #: The state that it says it began with, and its proof of that (`swarm/state.py`).
    digest: Hash | None = None
    witness: Hash | None = None
    #: Whether its contribution could be had: then it was averaged, with `weight`.
    came: bool = False
    #: Why its contribution does not count; empty if it does.
    refused: Reason = ""
    #: Its weight in the round's update.
    weight: Share = 0.0
    #: Path credit, of a weight of 1: by how much the clipped contribution lowered the loss along the round's path.
    alignment: float = 0.0
    #: Exact drop of the loss on random and on its own assigned data, where it was sampled for that.
    random_delta: float | None = None
    own_delta: float | None = None
    #: Its place among so many contributions, the best fit to its own samples being 1; None where that was not tested.
    place: Annotated[int, Meta(ge=1, lt=2**16)] | None = None
    among: Annotated[int, Meta(ge=0, lt=2**16)] = 0
    standing: Standing
    #: What its score was multiplied with, by name, where that is not 1.
    factors: Annotated[dict[Annotated[str, Meta(max_length=32)], NonNegative], Meta(max_length=16)] = {}
    score: NonNegative = 0.0
    #: Its share of this validator's weights.
    share: Share = 0.0


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Another validator's claim that it evaluated a round: the contrast that it says its windows have, and what they
    have (`RoundEntry.contrast`)."""

    validator: PeerIdText
    claimed: float
    found: float
    passed: bool

    def __post_init__(self) -> None:
        _check_finite(self)


class CreditEntry(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="credit"):
    """What all validators' weights for a round come to (`consensus.py`), and what is paid for it."""

    #: Validator -> peer -> weight, as published.
    opinions: Annotated[dict[PeerIdText, dict[PeerIdText, Share]], Meta(max_length=64)]
    incentive: dict[PeerIdText, Share]
    #: Each validator's part in what is paid to validators, whether or not it is known to evaluate.
    dividends: dict[PeerIdText, Share] = {}
    #: Other validators whose weights bear a claim about the round as this one saw it: only they can be paid for it.
    claimants: Annotated[list[PeerIdText], Meta(max_length=64)] = []
    #: What one of them, drawn by lot, claims to have evaluated.
    claim: Claim | None = None
    #: Peer -> credit; validator -> credit.
    paid: dict[PeerIdText, NonNegative]
    earned: dict[PeerIdText, NonNegative] = {}


class LinkEntry(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="link"):
    """From here on a peer's credit counts for another account (`accounts.py`). Written along with the round that it
    names. Raises ValueError for a link that is not signed by those whom it takes: there is no such entry."""

    link: Link | End

    def __post_init__(self) -> None:
        try:
            self.link.check()
        except IdentityError as error:
            raise ValueError(str(error)) from None


def _check_finite(struct: msgspec.Struct) -> None:
    """Raises ValueError."""
    for name in struct.__struct_fields__:
        if not _is_finite(getattr(struct, name)):
            raise ValueError(f"{name} is not a finite number")


def _is_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


AnyEntry = RoundEntry | ScoreEntry | CreditEntry | LinkEntry

_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder: Final = msgspec.msgpack.Decoder(AnyEntry)


def encode(entry: AnyEntry) -> bytes:
    """Canonical bytes. Raises LedgerError for an entry that breaks its own bounds."""
    data = _encoder.encode(entry)
    decode(data)
    return data


def decode(data: bytes) -> AnyEntry:
    """Raises LedgerError, and nothing else, whatever the bytes."""
    if len(data) > MAX_ENTRY_BYTES:
        raise LedgerError(f"an entry of {len(data)} bytes, allowed {MAX_ENTRY_BYTES}")
    try:
        entry: AnyEntry = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LedgerError(f"not a ledger entry ({error})") from None
    if _encoder.encode(entry) != data:
        raise LedgerError("an entry that is not in canonical encoding")
    return entry
