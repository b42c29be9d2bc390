"""Fault plans: who takes part, on what network, and what goes wrong when. TOML for people, methods for tests.

    plan = Plan(peers=8, rounds=10)
    plan.crash(peer=2, round=5)

Everything random follows from `seed`.
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from potluck.dht.manifest import SLICED_CODECS
from potluck.errors import PotluckError, UserError
from potluck.swarm.aggregate import RULE_NAMES
from potluck.swarm.codecs import make_codec

Kind = Literal[
    "crash",
    "restart",
    "slow",
    "freeze",
    "partition",
    "heal",
    "lie",
    "clock_skew",
    "disk_full",
    "join",
    "organizer_dies",
]
Lie = Literal[
    "garbage",  # bytes that do not decode
    "scale",  # what it trained, a hundred times
    "sign",  # against the loss
    "digest",  # of a state that nobody has, with a long history
    "tokens",  # many more than it trained
    "random",  # noise of the right length: a free rider
    "copy",  # another's contribution to the round before
    "perturb",  # the same, with noise on it
    "replay",  # its own first contribution, for ever
    "stale",  # trained from old parameters, on old samples, with the others' digest
    "poison",  # trained on wrong labels
    "lazy",  # an eighth of the steps that it claims
    "withhold",  # commits, and never serves
    "copy_commit",  # commits to what another one committed to in the same round
    "copy_weights",  # a validator that publishes what another one published
    "collude",  # a validator that gives all its weight to two friends
    "segments",  # of what it aggregates for the others of a sliced round, the opposite
    "accomplice",  # shows its contribution to who lies about segments only, and aggregates nothing
]
#: Lies of a codec's making, about what was trained.
CONTENT_LIES = ("scale", "sign", "random", "copy", "perturb", "replay")
#: Lies that only sliced rounds have room for.
SEGMENT_LIES = ("segments", "accomplice")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Fault(_Part):
    """One event. It strikes `peer`, or `count`, or a `share` of those that live, drawn from the seed."""

    kind: Kind
    round: int = Field(ge=0, le=100_000)
    at: float = Field(default=0.3, ge=0, lt=1, description="part of the round that has passed by then")
    peer: int | None = Field(default=None, ge=0)
    count: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, le=1)
    rounds: float = Field(default=0, ge=0, description="how long it lasts, where it ends by itself (0: for good)")
    factor: float = Field(default=4.0, gt=0, description="slow: how much longer a step takes")
    seconds: float = Field(default=5.0, description="clock_skew: the clock's error; drawn from [-seconds, seconds]")
    lie: Lie = "sign"

    @model_validator(mode="after")
    def _names_its_victims(self) -> Self:
        given = [value for value in (self.peer, self.count, self.share) if value is not None]
        if self.rounds and self.kind in ("heal", "organizer_dies", "restart"):
            raise ValueError(f"a {self.kind} does not end: it takes no rounds")
        if self.kind in ("heal", "organizer_dies"):
            return self
        if len(given) != 1:
            raise ValueError(f"a {self.kind} needs one of peer, count and share")
        return self


class Lines(_Part):
    """Home lines: medians in Mbit/s (0: no limit), log-normal with `spread`; shares of NAT classes."""

    up_mbit: float = Field(default=0, ge=0, description="median upload; 0: no limit")
    down_mbit: float = Field(default=0, ge=0, description="median download; 0: no limit")
    spread: float = Field(default=0.5, ge=0, le=3, description="sigma of the lines' log-normal rates")
    cone: float = Field(default=0, ge=0, le=1, description="share of peers behind a cone NAT: directly to each other")
    symmetric: float = Field(default=0, ge=0, le=1, description="behind a symmetric NAT: relayed to others behind NATs")
    regions: int = Field(default=1, ge=1, le=4, description="parts of the world, each with its latencies")


class WeatherPart(_Part):
    """What the network does to everybody."""

    latency: float = Field(default=1.0, ge=0, le=100, description="factor on the regions' latencies")
    spread: float = Field(default=0.3, ge=0, le=3, description="sigma of a pair's log-normal base latency")
    jitter: float = Field(default=0.1, ge=0, le=10, description="most that a message is later, over the latency")
    loss: float = Field(default=0, ge=0, lt=1, description="share of messages that are sent again")
    reset: float = Field(default=0, ge=0, lt=1, description="share of messages that break their stream")


class Churn(_Part):
    """Poisson arrivals; sessions are log-normal (sigma 1.5: most are short, a few last for days); a day's wave."""

    arrivals_per_round: float = Field(default=0, ge=0, description="peers that join in a round, in the mean")
    session_rounds: float = Field(default=0, ge=0, description="median session; 0: they stay")
    wave: float = Field(default=0, ge=0, le=1, description="amplitude of the day's wave on the arrivals")
    day_seconds: float = Field(default=86_400, gt=0, description="length of the wave")


class Plan(BaseModel):
    """What `potluck simulate` runs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(default="plan", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    about: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    peers: int = Field(default=10, ge=1, le=100_000)
    rounds: int = Field(default=10, ge=1, le=100_000)
    seconds: float = Field(default=60.0, ge=2, le=86400, description="length of a round")
    exchange_seconds: float = Field(default=15.0, gt=0, description="of a round, for committing and pulling")
    steps: int = Field(default=10, ge=1, description="local steps that a usual machine does in a round")
    step_seconds: float = Field(default=3.0, gt=0, description="virtual seconds of one local step on a usual machine")
    group_size: int = Field(default=16, ge=2, le=256, description="replicas that average with each other, about")
    retain: int = Field(default=6, ge=2, description="rounds that contributions and states are kept")
    fragments: int = Field(default=8, ge=1, description="rounds in which all parameters are averaged across groups")
    sync_limit: float = Field(default=3.0, gt=0, description="drift beyond this many times the expected reloads")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of the outer step (Nesterov)")
    overlap: bool = Field(default=False, description="the next round is trained while this one is exchanged")
    stream: int = Field(default=1, ge=1, description="parts of the tensors, exchanged one after another")
    sliced: bool = Field(default=False, description="members aggregate for each other, with none, int8 or int4")
    rule: str = Field(default="mean", description=f"how a group aggregates: {', '.join(RULE_NAMES)}")
    liars: float = Field(default=0.25, ge=0, lt=0.5, description="the share of a group that a robust rule stands")
    clip: bool = Field(default=True, description="clip each contribution to the group's median norm, per tensor")
    codec: str = Field(default="int8", description="of contributions: none, int8 or sparse")
    codec_parameters: dict[str, float] = Field(default_factory=dict, description="as in a run's manifest")
    model: Literal["quadratic", "llama"] = Field(
        default="quadratic", description="quadratic: a stand-in whose gradients are known; llama: real training, tiny"
    )
    parameters: int = Field(default=1024, ge=16, le=10_000_000, description="size of the quadratic")
    train_rounds: int | None = Field(
        default=None, ge=1, description="no local steps change anything from this round on: only averaging does"
    )
    noise: float = Field(default=0.5, ge=0, description="of the quadratic's gradients, beside their length")
    validators: int = Field(default=0, ge=0, description="the last so many of the first peers score the others")
    emission: float = Field(default=100.0, ge=0, description="credit paid per round, with validators")
    validator_emission: float = Field(default=10.0, ge=0, description="credit paid to validators per round")
    dht: Literal["real", "model"] = Field(default="real", description="model: the DHT's calibrated cost and latency")
    checkpoints: bool = Field(default=True, description="real disks: checkpoints and blobs are files, and they load")
    join_over_rounds: float = Field(default=0.5, ge=0, description="the first peers arrive over this time")
    upload_cap_mbit: float = Field(default=0, ge=0, description="--upload-limit of every peer; 0: none")
    lines: Lines = Field(default_factory=Lines)
    weather: WeatherPart = Field(default_factory=WeatherPart)
    churn: Churn = Field(default_factory=Churn)
    fault: list[Fault] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exchange_seconds >= self.seconds / (1 if self.overlap else 2):
            allowed = "seconds" if self.overlap else "half of seconds"
            raise ValueError(f"exchange_seconds is {self.exchange_seconds:g}, allowed less than {allowed}")
        if self.lines.cone + self.lines.symmetric > 1:
            raise ValueError("lines: cone and symmetric together are more than all")
        try:
            make_codec(self.codec, self.codec_parameters)
        except (PotluckError, TypeError, ValueError) as error:
            raise ValueError(f"codec {self.codec}: {error}") from None
        if self.sliced and (self.codec not in SLICED_CODECS or self.stream > 1 or self.validators):
            raise ValueError(f"sliced is allowed with codec {', '.join(SLICED_CODECS)}, without validators or stream")
        if self.sliced and any(fault.kind == "lie" and fault.lie in CONTENT_LIES for fault in self.fault):
            raise ValueError("sliced: lies about what was trained are simulated with whole contributions only")
        if not self.sliced and any(fault.kind == "lie" and fault.lie in SEGMENT_LIES for fault in self.fault):
            raise ValueError(f"lies {' and '.join(SEGMENT_LIES)} need sliced = true")
        if self.rule not in RULE_NAMES or (self.rule != "mean" and self.validators):
            allowed = "mean, with validators" if self.validators else ", ".join(RULE_NAMES)
            raise ValueError(f"rule is {self.rule!r}, allowed are {allowed}")
        if self.validators >= self.peers:
            raise ValueError(f"validators is {self.validators}, allowed less than peers ({self.peers})")
        most = self.peers + sum(fault.count or 0 for fault in self.fault if fault.kind == "join")
        for number, fault in enumerate(self.fault):
            if fault.round >= self.rounds:
                raise ValueError(
                    f"fault {number} ({fault.kind}) strikes in round {fault.round}, after the last: "
                    f"rounds (or --rounds) must be at least {fault.round + 1}"
                )
            if fault.peer is not None and fault.peer >= most and not self.churn.arrivals_per_round:
                raise ValueError(f"fault {number} strikes peer {fault.peer}; the last is {most - 1}")
        return self

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises UserError that names the file and every wrong setting."""
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; a plan is a TOML file as in docs/plans/, or seed:N") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
        return cls.of(fields | {"name": fields.get("name", path.stem)}, str(path))

    @classmethod
    def of(cls, fields: dict[str, Any], where: str = "plan") -> Plan:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(
                f"{where}: {'; '.join(_told(e['loc'], e['type'], e['msg']) for e in error.errors())}"
            ) from None

    # ---- what goes wrong ------------------------------------------------------------------------------------

    def add(self, kind: Kind, round: int, **fields: Any) -> Self:
        self.fault.append(Fault(kind=kind, round=round, **fields))
        return self

    def crash(self, peer: int, round: int, **fields: Any) -> Self:
        """kill -9. With `rounds` it comes back after so many."""
        return self.add("crash", round, peer=peer, **fields)

    def restart(self, peer: int, round: int, **fields: Any) -> Self:
        return self.add("restart", round, peer=peer, **fields)

    def slow(self, peer: int, round: int, **fields: Any) -> Self:
        return self.add("slow", round, peer=peer, **fields)

    def freeze(self, peer: int, round: int, **fields: Any) -> Self:
        """SIGSTOP: nothing comes from it and nothing happens in it, its connections stay."""
        return self.add("freeze", round, peer=peer, **fields)

    def partition(self, share: float, round: int, **fields: Any) -> Self:
        return self.add("partition", round, share=share, **fields)

    def heal(self, round: int, **fields: Any) -> Self:
        return self.add("heal", round, **fields)

    def join(self, count: int, round: int, **fields: Any) -> Self:
        """Newcomers, over `rounds`."""
        return self.add("join", round, count=count, **fields)

    def organizer_dies(self, round: int, **fields: Any) -> Self:
        return self.add("organizer_dies", round, **fields)

    def lie(self, peer: int, round: int, lie: Lie = "sign", **fields: Any) -> Self:
        return self.add("lie", round, peer=peer, lie=lie, **fields)

    def clock_skew(self, peer: int, round: int, seconds: float, **fields: Any) -> Self:
        return self.add("clock_skew", round, peer=peer, seconds=seconds, **fields)

    def disk_full(self, peer: int, round: int, **fields: Any) -> Self:
        return self.add("disk_full", round, peer=peer, **fields)


def _told(location: tuple[int | str, ...], kind: str, message: str) -> str:
    name = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return f"{name}: no such setting"
    if name == "fault" and kind == "list_type":
        return "fault: each fault is a table of its own, [[fault]]"
    message = message.removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def random_plan(seed: int) -> Plan:
    """A small swarm with random faults: what the nightly hunt for bugs runs."""
    dice = random.Random(f"plan {seed}")
    # What came later has dice of its own: a seed that once found a bug replays it.
    later = random.Random(f"scores {seed}")
    scored = later.random() < 0.25
    peers = 5 + int(16 * dice.random() ** 4)  # most are small, so that many seeds can be tried
    rounds = dice.randint(5, 8)
    plan = Plan(
        name=f"seed-{seed}",
        seed=seed,
        peers=peers,
        rounds=rounds,
        seconds=20.0,
        exchange_seconds=6.0,
        steps=5,
        step_seconds=2.0,
        group_size=dice.choice([3, 4, 8, 16]),
        fragments=dice.choice([1, 4]),
        retain=dice.choice([2, 6]),
        codec=dice.choice(["none", "int8", "sparse"]),
        momentum=dice.choice([0.0, 0.8]),
        parameters=64,
        weather=WeatherPart(loss=dice.choice([0, 0.02]), reset=dice.choice([0, 0.001])),
        lines=Lines(cone=dice.choice([0, 0.5]), symmetric=dice.choice([0, 0.2]), regions=dice.randint(1, 4)),
    )
    if scored:
        plan.validators, plan.peers = 1, plan.peers + 1
    for _ in range(dice.randint(0, 8)):
        kind: Kind = dice.choice(["crash", "slow", "freeze", "partition", "lie", "clock_skew", "disk_full", "join"])
        when: dict[str, Any] = {"round": dice.randint(0, rounds - 1), "at": dice.randrange(1000) / 1000}
        lasts = round(dice.choice([0.2, 1, 3]) * dice.random(), 3)
        if kind == "partition":
            plan.add(kind, share=0.5, rounds=lasts, **when)
        elif kind == "lie":
            lie: Lie = dice.choice(["garbage", "scale", "sign", "digest", "tokens"])
            plan.add(kind, count=1, lie=later.choice([lie, "copy", "withhold", "stale"]) if scored else lie, **when)
        else:
            plan.add(kind, count=dice.randint(1, max(1, peers // 3)), rounds=lasts, **when)
    if dice.random() < 0.25:
        plan.organizer_dies(dice.randint(0, rounds - 1), at=dice.randrange(1000) / 1000)
    if dice.random() < 0.25:
        plan.churn = Churn(arrivals_per_round=0.7, session_rounds=dice.choice([1.0, 4.0]))
    if dice.random() < 0.25:
        plan.lines = plan.lines.model_copy(update={"up_mbit": 1.0, "down_mbit": 4.0})
        plan.upload_cap_mbit = dice.choice([0.0, 0.5])
    return plan
