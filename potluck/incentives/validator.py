"""The validator: follows a module's rounds, judges each, writes what it finds into its ledger, and publishes weights.

It is a follower (`swarm/follower.py`) that hears each round that it applied. Credit for a round is paid one round
later, when all validators' weights for it can be read. What its entries follow from is archived, for `audit.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from potluck.dht.records import MAX_WEIGHTS, Signed, Weights
from potluck.errors import NetworkError, PotluckError, ProtocolError
from potluck.incentives.entries import AnyEntry, Claim, CreditEntry, LinkEntry, RoundEntry, ScoreEntry, Standing
from potluck.incentives.judge import Effort, Judge, Judgement, Promise, Seen
from potluck.incentives.ledger import Head, Ledger
from potluck.incentives.score import POWER, remembered
from potluck.incentives.steering import LAG_ROUNDS, Opinions, consensus, opinions_of
from potluck.net.blobs import BlobId, BlobStore
from potluck.net.host import PeerId
from potluck.swarm.contribution import Contribution
from potluck.swarm.follower import Applied
from potluck.swarm.ownership import owned_by
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.state import ReplicaState

Emit = Callable[..., None]

#: Of a round's length: what reading the others' weights, and publishing one's own, may take each.
NETWORK_SHARE: Final = 0.2
#: Rounds from one archived state to the next; between them states follow from the contributions.
SNAPSHOT_ROUNDS: Final = 10


class Records(Protocol):
    """The part of `NetworkExchange` that validators use."""

    async def weights(
        self, module: str, round_: Round, timeout_seconds: float
    ) -> tuple[list[Signed[Weights]], bool]: ...
    async def publish_weights(self, weights: Weights, expires_at: float, timeout_seconds: float) -> bool: ...


@dataclass(frozen=True)
class Terms:
    """What the manifest says about scores. `stake`: trust in each validator."""

    stake: Mapping[PeerId, float]
    emission: float
    validator_emission: float = 0.0


#: A claimed contrast that is off by more than these parts of itself and of the credit is false. The same sums in
#: another order are off by much less.
CLAIM_TOLERANCE: Final = 0.01
CLAIM_ROUNDING: Final = 1e-4


#: A check of another validator is good for so many rounds, for each one that there is to check.
CHECK_ROUNDS: Final = 4


@dataclass(frozen=True)
class Checked:
    """When a validator was checked last, and how often in a row it passed; 0 once after it failed."""

    round: int
    passes: int

    def again(self, round_: int, passed: bool) -> Checked:
        return Checked(round_, self.passes + 1 if passed else -1)

    def holds(self, round_: int, others: int) -> bool:
        return self.passes > 0 and round_ - self.round <= CHECK_ROUNDS * (others + 1)


@dataclass(frozen=True)
class Paid:
    """What earlier payments leave for the next: bonds, and how other validators did when they were checked."""

    bonds: Opinions | None = None
    checked: Mapping[PeerId, Checked] = field(default_factory=dict)


@dataclass(frozen=True)
class Owed:
    """A round that is not paid yet: who may be paid, and which part of its share; and the round's beacon."""

    peers: Mapping[PeerId, float]
    beacon: str


class Validator:
    """`on_applied` is for the follower. `store` has the blobs that the follower fetched, `archive` keeps them.

    `beside`: the states of a pipeline's other modules at the beginning of a round; None if one is not known. `place`:
    put them into the model that all modules' judges share, in the thread that judges. `effort`: of every round,
    instead of what this machine manages in time. `links`: told a round's entries, what is to be written behind them
    about whose account credit counts for (`link_reader.py`)."""

    def __init__(
        self,
        *,
        module: str,
        judge: Judge,
        ledger: Ledger,
        terms: Terms,
        records: Records,
        store: BlobStore,
        archive: BlobStore,
        clock: RoundClock,
        retain: int,
        now: Callable[[], float],
        emit: Emit,
        in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
        beside: Callable[[Round], Mapping[str, ReplicaState] | None] = lambda round_: {},
        place: Callable[[Mapping[str, ReplicaState]], None] = lambda states: None,
        snapshot_rounds: int = SNAPSHOT_ROUNDS,
        effort: Effort | None = None,
        links: Callable[[Sequence[AnyEntry]], Sequence[LinkEntry]] = lambda entries: (),
    ) -> None:
        self.module, self.judge, self.ledger, self.terms = module, judge, ledger, terms
        self._records, self._store, self._archive = records, store, archive
        self._clock, self._retain, self._now, self._emit, self._in_thread = clock, retain, now, emit, in_thread
        self._beside, self._place, self._snapshot_rounds = beside, place, snapshot_rounds
        self._effort, self._fixed, self._links = effort or Effort(), effort is not None, links
        self._unpaid: dict[Round, Owed] = {}
        self._judged = Round(-1)
        self._paid = Paid()
        #: The last round judged, and the states that were beside it: others' claims about it are checked.
        self._last: tuple[Seen, Mapping[str, ReplicaState]] | None = None
        self._archived = ""

    def resume(self, decode: Callable[[memoryview], Contribution]) -> None:
        """Take up where the ledger ends. `decode`: of the run's codec."""
        before = Before.read(self.ledger, self.module, None)
        self._paid = before.paid(self.judge.me, self.terms)
        if before.round is None:
            return
        self._judged = Round(before.round.round)
        self._unpaid = dict(before.owed)
        self.judge.resume(before.standings, before.round, before.contributions(self._archive, decode))

    async def on_applied(self, applied: Applied) -> None:
        """Judge a round, pay for the one before, write both down, and tell. Raises LedgerError if that cannot be."""
        if not applied.view.commits or applied.round <= self._judged:
            return  # a process that was restarted, or loaded its group's state, applies a round again
        beside = self._beside(applied.round)
        late = self._now() > self._clock.window(Round(applied.round + LAG_ROUNDS)).start
        if late or beside is None:
            # Its weights would count for nobody, and judging it would make the next round's late as well.
            self._emit("incentives.round.unscored", module=self.module, round=applied.round)
            return
        seen = seen_of(applied, self.module, {name: state.digest for name, state in beside.items()})
        began = time.monotonic()
        judgement = await self._in_thread(self._judge, seen, beside)
        if not self._fixed:
            self._effort = self._effort.after(time.monotonic() - began, self._clock.seconds)
        await self._in_thread(self._keep, applied, beside)
        paid = await self._pay()
        entries: list[AnyEntry] = [judgement.round, *judgement.scores, *paid]
        entries += self._links(entries)
        head = await self._in_thread(self.ledger.append, entries, self._now())
        self._judged, self._unpaid[applied.round] = (
            applied.round,
            Owed(payable(judgement.scores), judgement.round.beacon),
        )
        self._last = seen, beside
        self._emit(
            "incentives.round.scored",
            module=self.module,
            round=applied.round,
            drop=judgement.round.loss_before - judgement.round.loss_after,
            error=judgement.round.error,
            shares={one.peer: one.share for one in judgement.scores},
            verdicts={one.peer: one.standing.verdict for one in judgement.scores},
            refused={one.peer: one.refused for one in judgement.scores if one.refused},
            paid=paid[-1].paid if paid else {},
            earned=paid[-1].earned if paid else {},
            ledger_size=head.size,
        )
        await self._publish(applied.round, judgement, head)

    async def _publish(self, round_: Round, judgement: Judgement, head: Head) -> None:
        if self.judge.me not in self.terms.stake:
            return  # nobody would store them
        best = sorted(judgement.shares.items(), key=lambda item: (-item[1], item[0]))[:MAX_WEIGHTS]
        weights = Weights(
            module=self.module,
            round=round_,
            made_at=self._now(),
            ledger_size=head.size,
            ledger_root=head.root,
            beacon=judgement.round.beacon,
            contrast=judgement.round.contrast,
            weights=dict(best),
        )
        if self._now() > self._clock.window(Round(round_ + LAG_ROUNDS)).start:
            self._emit("incentives.weights.late", module=self.module, round=round_)
        # As long as they are in force, faded or not (`steering.py`).
        expires = self._clock.window(round_).end + (self._retain + 1) * self._clock.seconds
        if expires <= self._now():
            return
        try:
            stored = await self._records.publish_weights(weights, expires, NETWORK_SHARE * self._clock.seconds)
        except (NetworkError, ProtocolError) as error:
            self._emit("incentives.weights.failed", module=self.module, round=round_, error=str(error))
        else:
            if not stored:
                self._emit("incentives.weights.failed", module=self.module, round=round_, error="nobody stored them")

    async def _pay(self) -> list[CreditEntry]:
        """Credit for rounds that were judged before: consensus of those validators whose weights were there in time.

        A round whose weights cannot all be read waits for the next one, as long as they last.
        """
        entries = []
        for round_, owed in sorted(self._unpaid.items()):
            try:
                seconds = NETWORK_SHARE * self._clock.seconds
                records, complete = await self._records.weights(self.module, round_, seconds)
            except NetworkError:
                records, complete = [], False
            last = self._now() >= self._clock.window(round_).end + self._retain * self._clock.seconds
            if not complete and not last:
                self._emit("incentives.weights.unread", module=self.module, round=round_)
                break  # rounds are paid in order
            before = self._clock.window(Round(round_ + LAG_ROUNDS)).start
            opinions = opinions_of(records, self.terms.stake, before)
            me = self.judge.me
            claims = {
                one.peer: one.record.contrast
                for one in records
                if one.peer in opinions and one.peer != me and one.record.beacon == owed.beacon
            }
            claim = await self._in_thread(self._claim, round_, claims)
            entry, self._paid = credit(
                self.module, round_, me, opinions, owed.peers, self.terms, self._paid, claim, sorted(claims)
            )
            entries.append(entry)
            del self._unpaid[round_]
        return entries

    def _judge(self, seen: Seen, beside: Mapping[str, ReplicaState]) -> Judgement:
        # Here, and not before: in a pipeline another module's judgement may have come in between.
        self._place(beside)
        return self.judge.judge(seen, self._effort)

    def _claim(self, round_: Round, claims: Mapping[PeerId, float]) -> Claim | None:
        """Checks what one other validator claims: by a lot that none can foresee, of the half that was checked longest
        ago."""
        if not claims or self._last is None or self._last[0].round != round_:
            return None
        seen, beside = self._last
        never = Checked(-1, 0)
        by_age = sorted(claims, key=lambda peer: (self._paid.checked.get(peer, never).round, peer))
        oldest = by_age[: -(-len(by_age) // 2)]
        validator = oldest[self.ledger.lot(seen.beacon) % len(oldest)]
        self._place(beside)
        return checked_claim(validator, claims[validator], self.judge, seen)

    def _keep(self, applied: Applied, beside: Mapping[str, ReplicaState]) -> None:
        """What the round's entries follow from. States between two snapshots follow from contributions."""
        for commit in applied.view.commits.values():
            if self._store.has(BlobId(commit.blob)):
                self._archive_one(commit.blob, lambda blob: self._store.read(BlobId(blob)))
        follows = applied.before.digest == self._archived and not applied.view.fragments
        kept = [] if follows and applied.round % self._snapshot_rounds else [applied.before]
        for state in (*kept, *beside.values()):
            self._archive_one(state.digest, lambda _, state=state: b"".join(state.buffers))  # type: ignore[misc]
        self._archived = applied.after.digest

    def _archive_one(self, blob: str, read: Callable[[str], bytes]) -> None:
        try:
            if not self._archive.has(BlobId(blob)):
                self._archive.put(read(blob))
        except PotluckError as error:  # dropped meanwhile, or a full disk: the round is scored, and cannot be audited
            self._emit("incentives.archive.failed", blob=blob, error=str(error))


def seen_of(applied: Applied, module: str, beside: Mapping[str, str]) -> Seen:
    view = applied.view
    return Seen(
        module=module,
        round=applied.round,
        theta=applied.before.theta,
        next_theta=applied.after.theta,
        state=applied.before.digest,
        next_state=applied.after.digest,
        commits={peer: Promise.of(commit) for peer, commit in view.commits.items()},
        contributions={peer: one for peer, one in view.contributions.items() if peer in view.commits},
        missing=view.missing,
        weights=applied.weights,
        beside=beside,
        shards=applied.shards,
        steered=applied.steered,
    )


def payable(scores: Sequence[ScoreEntry]) -> dict[PeerId, float]:
    """Whose contributions came and count, and the part of their share that is paid.

    While nobody has passed the test of computation all weigh the same next to nothing, so it is as much as speaks for
    them by then. And nobody gets more because others are not known yet: all get as if everybody had passed."""
    counted = [one for one in scores if one.came and not one.refused]
    now = math.fsum(one.score**POWER for one in counted)
    known = math.fsum(_if_known(one) ** POWER for one in counted)
    part = now / known if known > 0 else 1.0
    return {
        PeerId(one.peer): part * (1.0 if one.standing.verdict == 1 else min(1.0, one.factors.get("computation", 1.0)))
        for one in counted
    }


def _if_known(one: ScoreEntry) -> float:
    """The score of a peer if its test, still open, had been passed."""
    if one.standing.verdict != 0 or "computation" not in one.factors:
        return one.score
    others = (factor for name, factor in one.factors.items() if name != "computation")
    return max(0.0, one.standing.usefulness) * math.prod(others)


def opinions_in(entry: CreditEntry) -> Opinions:
    return {PeerId(v): {PeerId(peer): w for peer, w in row.items()} for v, row in entry.opinions.items()}


def checked_claim(validator: PeerId, claimed: float, judge: Judge, seen: Seen) -> Claim:
    """Whether the contrast that a validator claims is what its windows have."""
    found = judge.on_windows_of(validator, seen)
    off = abs(found.contrast - claimed)
    passed = off <= CLAIM_TOLERANCE * abs(found.contrast) + CLAIM_ROUNDING * abs(found.credit)
    return Claim(validator=validator, claimed=claimed, found=found.contrast, passed=passed)


def credit(
    module: str,
    round_: Round,
    me: PeerId,
    opinions: Opinions,
    peers: Mapping[PeerId, float],
    terms: Terms,
    before: Paid,
    claim: Claim | None,
    claimants: Sequence[str],
) -> tuple[CreditEntry, Paid]:
    """What is paid for a round. Of the emission each of `peers`, who contributed, gets its share by incentive, or the
    part of that which `peers` says. The validators' emission goes by dividends to this one, and to those `claimants`
    who were found to evaluate when they were last checked, not too long ago."""
    incentive, dividends, bonds = consensus(opinions, terms.stake, before.bonds)
    checked = dict(before.checked)
    shares = _parts(terms.emission, {peer: value for peer, value in incentive.items() if peer in peers})
    if claim is not None:
        who = PeerId(claim.validator)
        checked[who] = checked.get(who, Checked(round_, 0)).again(round_, claim.passed)
    others = len(claimants)
    proven = {one for one in claimants if one in checked and checked[PeerId(one)].holds(round_, others)} | {me}
    entry = CreditEntry(
        module=module,
        round=round_,
        opinions={validator: {str(peer): w for peer, w in weights.items()} for validator, weights in opinions.items()},
        incentive={peer: value for peer, value in incentive.items() if value > 0},
        dividends={str(validator): value for validator, value in dividends.items()},
        claimants=list(claimants),
        claim=claim,
        paid={peer: part for peer, share in shares.items() if (part := share * peers[PeerId(peer)]) > 0},
        earned=_parts(terms.validator_emission, {one: value for one, value in dividends.items() if one in proven}),
    )
    return entry, Paid(bonds, checked)


def _parts(amount: float, worth: Mapping[PeerId, float]) -> dict[str, float]:
    """An amount, divided among those who are worth something."""
    total = math.fsum(worth.values())
    return {peer: amount * value / total for peer, value in sorted(worth.items()) if value > 0}


@dataclass(frozen=True)
class Before:
    """What a ledger says up to some round of a module: the last round judged, and every peer's standing after it."""

    round: RoundEntry | None
    scores: list[ScoreEntry]
    standings: dict[PeerId, Standing]
    credits: list[CreditEntry]
    #: Rounds judged since the last one that was paid.
    owed: dict[Round, Owed]

    @classmethod
    def read(cls, ledger: Ledger, module: str, round_: Round | None) -> Before:
        """Of the rounds before `round_`; None: of all."""
        last: RoundEntry | None = None
        scores: list[ScoreEntry] = []
        standings: dict[PeerId, Standing] = {}
        credits: list[CreditEntry] = []
        judged: dict[Round, tuple[RoundEntry, list[ScoreEntry]]] = {}
        for entry in ledger.entries():
            if entry.module != module or (round_ is not None and entry.round >= round_):
                continue
            match entry:
                case RoundEntry():
                    last, scores = entry, []
                    judged[Round(entry.round)] = entry, scores
                case ScoreEntry():
                    scores.append(entry)
                    standings[PeerId(entry.peer)] = entry.standing
                case CreditEntry():
                    credits.append(entry)
                    # Rounds are paid in order.
                    judged = {made: one for made, one in judged.items() if made > entry.round}
        if last is not None:
            now, shards = last.round, last.shards
            standings = {peer: one for peer, one in standings.items() if remembered(one, now, shards)}
        owed = {made: Owed(payable(found), head.beacon) for made, (head, found) in judged.items()}
        return cls(last, scores, standings, credits, owed)

    def contributions(
        self, archive: BlobStore, decode: Callable[[memoryview], Contribution]
    ) -> dict[PeerId, Contribution]:
        """What came in the last round, as far as it is archived."""
        kept = [one for one in self.scores if one.came and one.blob and archive.has(BlobId(one.blob))]
        found = {}
        for one in kept:
            peer, blob = PeerId(one.peer), archive.read(BlobId(one.blob or ""))
            found[peer] = decode(owned_by(blob, peer, one.module, Round(one.round)))
        return found

    def paid(self, me: PeerId, terms: Terms) -> Paid:
        """What the payments leave for the next one."""
        paid = Paid()
        for one in self.credits:
            round_ = Round(one.round)
            _, paid = credit(one.module, round_, me, opinions_in(one), {}, terms, paid, one.claim, one.claimants)
        return paid
