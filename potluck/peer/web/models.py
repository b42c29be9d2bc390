"""What the JSON API answers with. Times are UTC seconds, losses nats per token, credit the run's own unit.

Everything here that a peer says of itself (names, loads, speeds, losses) is unproved; what comes from a ledger was
verified when the ledger was read.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

RunText = Annotated[str, StringConstraints(pattern=r"^[a-z2-7]{52}$")]
PeerText = Annotated[str, StringConstraints(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curve(Model):
    """Rounds as columns of one length: `loss` is the median of what peers say, `tokens_per_second` their sum."""

    every: int = Field(description="one in so many rounds is listed")
    round: list[int]
    at: list[float]
    loss: list[float | None]
    tokens_per_second: list[float]
    peers: list[int]


class Replica(Model):
    peer: str
    name: str
    role: str
    phase: str
    load: float
    tokens_per_second: float


class Module(Model):
    """A part of the model and the peers that are at it now."""

    module: str
    replicas: int
    load: float = Field(description="mean of its replicas'; 1 is busy all the time")
    tokens_per_second: float
    shown: list[Replica] = Field(description="the busiest of them")


class LedgerHead(Model):
    """The signed state of a validator's ledger."""

    validator: str
    size: int
    root: str
    made_at: float


class RunBrief(Model):
    run: str
    name: str
    round: int | None = Field(description="the latest that was heard of")
    loss: float | None
    tokens_per_second: float
    peers: int = Field(description="that were heard just now")
    heard_at: float | None = Field(description="when a peer was last heard; None: never")


class RunState(RunBrief):
    """A run as it is now. `latest` holds its last few rounds: who missed more asks for the curve."""

    now: float
    round_seconds: float
    family: str = Field(description="of the model")
    roles: dict[str, int]
    modules: list[Module]
    unserved: list[str] = Field(description="modules that no peer serves now")
    latest: Curve
    validators: list[str] = Field(description="whose scores the run trusts")
    ledgers: int = Field(description="another number after each change of a ledger that is at hand")
    invite: str | None


class RunList(Model):
    runs: list[RunBrief]
    me: str | None = Field(description="this machine's own peer, on its own page")
    machine: bool = Field(description="whether this machine can be looked at")


class Peer(Model):
    """A peer as it was heard. `uptime`: the part of the time since it was first heard that it was there."""

    peer: str
    name: str
    role: str
    module: str | None
    phase: str
    version: str
    round: int
    loss: float | None
    load: float
    tokens_per_second: float
    contributed: int
    here: bool
    first: float
    last: float
    uptime: float


class Peers(Model):
    total: int
    peers: list[Peer]


class Contributor(Model):
    """One line of the leaderboard; without a ledger only what was heard. `place` counts from 1."""

    peer: str
    name: str
    place: int | None
    here: bool
    last: float | None
    uptime: float | None
    credit: float
    share: float
    score: float | None
    verdict: str | None
    contributed: int | None
    refused: int | None
    missed: int | None
    network: int | None = Field(description="missed by the network's fault, which costs no score")
    account: str | None = Field(description="that its credit counts for, if that is another key than its own")
    account_credit: float = Field(description="of all keys whose credit counts for the same account")


class CreditCurve(Model):
    peer: str
    name: str
    round: list[int]
    credit: list[float]


class Contributors(Model):
    ledger: LedgerHead | None = Field(description="the one that this follows from")
    ledgers: list[LedgerHead] = Field(description="all that are at hand")
    problems: list[str] = Field(description="why a ledger is not at hand, or could not be used")
    total: int
    rows: list[Contributor]
    curves: list[CreditCurve] = Field(description="credit over time of those with the most")


class Proof(Model):
    """That a score is in the ledger, as checked here: its audit path leads to the root that the validator signed."""

    entry: int
    holds: bool
    path: list[str]
    problem: str = ""


class Scored(Model):
    """What a validator wrote about one round of a peer. Drops of the loss: what is positive helped."""

    round: int
    module: str
    outcome: str | None
    words: str
    reason: str
    tokens: int
    alignment: float
    random_delta: float | None
    own_delta: float | None
    score: float
    share: float
    paid: float
    factors: dict[str, float]
    proof: Proof | None


class Said(Model):
    """What a peer said of its rounds, as columns."""

    round: list[int]
    at: list[float]
    module: list[str | None]
    loss: list[float | None]
    tokens_per_second: list[float]
    contributed: list[int]


class PeerPage(Model):
    run: str
    peer: str
    heard: Peer | None
    said: Said
    standing: Contributor | None = Field(description="in the ledger")
    ledger: LedgerHead | None
    problems: list[str]
    why: list[str] = Field(description="why score and credit are what they are, in lines")
    scored: list[Scored] = Field(description="the latest first")


class Limit(Model):
    """One limit: `schema` is what is allowed, as JSON Schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str
    value: Any
    default: Any
    schema_: dict[str, Any] = Field(alias="schema")


class LimitList(Model):
    limits: list[Limit]


class Finish(Model):
    run: RunText | None = Field(default=None, description="None: all runs")


class Nothing(Model):
    """An empty object."""


class Problem(Model):
    detail: str


class Told(BaseModel):
    """What the daemon tells besides is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Wait(Told):
    """What a peer waits for (`potluck why`)."""

    what: str
    since: float
    until: float
    then: str


class Now(Told):
    phase: str
    now: float
    waits: list[Wait]
    alone: bool | None
    rounds_alone: int


class MachineRun(Told):
    run: str | None
    name: str | None = Field(default=None, description="of the run, once it is known here")
    state: str
    reason: str
    phase: str | None
    round: int | None
    contributed_rounds: int
    restarts: int
    now: Now | None = Field(description="what its worker says, if it answers")


class MachineState(Told):
    """What the daemon does now, and by which rule it does not. `until`: local time, ISO 8601."""

    peer: str | None
    works: bool
    rule: str | None
    reason: str | None
    until: str | None
    sent_this_month: int
    received_this_month: int = 0
    limits_error: str | None
    runs: list[MachineRun]
