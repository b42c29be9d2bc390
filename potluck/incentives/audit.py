"""Audit: a round scored once more from the ledger and the archived blobs, and compared with what was written.

Parameters at the round's start come from the archive: the newest state before it, and the contributions since, averaged
with the weights that the ledger names, each step checked by digest. So a validator that made its numbers up is found by
anyone who has its ledger and its archive. Which commits and which other validators' weights there were is its word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import msgspec

from potluck.errors import LedgerError
from potluck.incentives.entries import CreditEntry, RoundEntry, ScoreEntry
from potluck.incentives.judge import Effort, Judge, Promise, Seen
from potluck.incentives.ledger import Ledger
from potluck.incentives.validator import Before, Terms, checked_claim, credit, opinions_in, payable
from potluck.net.blobs import BlobId, BlobStore
from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate
from potluck.swarm.codecs import Codec
from potluck.swarm.contribution import Contribution
from potluck.swarm.layout import Layout
from potluck.swarm.outer import OuterStep
from potluck.swarm.ownership import owned_by
from potluck.swarm.phases import Round
from potluck.swarm.state import ReplicaState, parse_state

#: Scores of another processor or library differ by rounding.
RELATIVE: Final = 1e-3
ABSOLUTE: Final = 1e-6


@dataclass(frozen=True)
class Rules:
    """What of the manifest states follow from."""

    layout: Layout
    codec: Codec
    outer: OuterStep
    clip: bool


@dataclass
class Audit:
    """`differences`: what the ledger says otherwise than it follows, in words. Empty: the round is as it says."""

    module: str
    round: Round
    peers: int
    largest_error: float = 0.0
    differences: list[str] = field(default_factory=list)


def audit(
    ledger: Ledger,
    archive: BlobStore,
    rules: Rules,
    judge_of: Callable[[str, PeerId], Judge],
    terms: Terms,
    module: str,
    round_: Round,
    place: Callable[[Mapping[str, str]], None] = lambda digests: None,
) -> Audit:
    """Score a round again. `judge_of(run id, validator)` makes the judge that the validator had. `place`: put the
    states of a pipeline's other modules, by digest, into the model that it evaluates.

    Raises LedgerError if the ledger has no such round, or the archive lacks what it follows from.
    """
    chain = _chain(ledger, archive, module, round_)
    entries = chain[-1]
    own, scores = entries.round, entries.scores
    replayed = _state(chain, archive, rules, module)
    contributions = _contributions(archive, rules, scores)
    after = _step(replayed, contributions, entries.weights, rules, own.steered)
    found = Audit(module, round_, len(scores))
    if after.digest != own.next_state:
        if own.shards > 1:
            raise LedgerError(f"round {round_} was averaged with other groups, whose fragments are not archived")
        found.differences.append(f"the round leads to state {after.digest[:12]}, the ledger says {own.next_state[:12]}")
    judge = judge_of(own.run, PeerId(own.validator))
    place(own.beside)
    before = Before.read(ledger, module, round_)
    if before.round is not None:
        last = before.contributions(archive, lambda blob: rules.codec.decode(blob, rules.layout))
        judge.resume(before.standings, before.round, last)
    seen = Seen(
        module=module,
        round=round_,
        theta=replayed.theta,
        next_theta=after.theta,
        state=replayed.digest,
        next_state=after.digest,
        commits={PeerId(one.peer): _promise(one) for one in scores if one.blob is not None},
        contributions=contributions,
        missing={PeerId(one.peer): one.refused for one in scores if one.blob is not None and not one.came},
        weights=entries.weights,
        beside=own.beside,
        shards=own.shards,
        steered=own.steered,
    )
    again = judge.judge(seen, Effort(own.windows, own.tests))
    _compare(found, "the round", own, again.round)
    anew = {one.peer: one for one in again.scores}
    for one in scores:
        _compare(found, f"the score of {one.peer}", one, anew.pop(one.peer, None))
    found.differences += [f"{peer} has no score in the ledger" for peer in anew]
    if entries.twice:
        found.differences.append("the ledger has this round, or the credit for it, more than once")
    if entries.credit is not None:
        claim = entries.credit.claim
        if claim is not None:
            claim = checked_claim(PeerId(claim.validator), claim.claimed, judge, seen)
        paid, _ = credit(
            module,
            round_,
            PeerId(own.validator),
            opinions_in(entries.credit),
            payable(scores),
            terms,
            before.paid(PeerId(own.validator), terms),
            claim,
            entries.credit.claimants,
        )
        _compare(found, "the credit", entries.credit, paid)
    elif entries.passed_over:
        found.differences.append("a later round is paid, and this one never was")
    return found


@dataclass
class _Round:
    round: RoundEntry
    scores: list[ScoreEntry] = field(default_factory=list)
    credit: CreditEntry | None = None
    #: Whether the ledger has it, or the credit for it, more than once.
    twice: bool = False
    #: Whether a later one is paid.
    passed_over: bool = False

    @property
    def weights(self) -> dict[PeerId, float]:
        return {PeerId(one.peer): one.weight for one in self.scores if one.came}


def _chain(ledger: Ledger, archive: BlobStore, module: str, round_: Round) -> list[_Round]:
    """The rounds from the newest whose state is archived to `round_`."""
    heads = {e.round: e for e in ledger.entries() if isinstance(e, RoundEntry) and e.module == module}
    if round_ not in heads:
        raise LedgerError(f"{ledger.path} has no round {round_} of {module}")
    start = max((r for r, e in heads.items() if r <= round_ and archive.has(BlobId(e.state))), default=None)
    if start is None:
        raise LedgerError(f"the archive has no state of round {round_} of {module} or before it")
    chain: dict[int, _Round] = {}
    for entry in ledger.entries():
        if entry.module != module or not start <= entry.round <= round_:
            if entry.module == module and isinstance(entry, CreditEntry) and entry.round > round_ in chain:
                chain[round_].passed_over = True
            continue
        one = chain.get(entry.round)
        match entry:
            case RoundEntry():
                if one is None:
                    chain[entry.round] = _Round(entry)
                else:
                    one.round, one.twice = entry, True
            case ScoreEntry() if one:
                one.scores.append(entry)
            case CreditEntry() if one:
                one.twice, one.credit = one.twice or one.credit is not None, entry
    return list(chain.values())


def archived(archive: BlobStore, module: str, digest: str, layout: Layout, has_velocity: bool) -> ReplicaState:
    """A module's state that a round's entries name. Raises LedgerError if there is none in the archive."""
    if not archive.has(BlobId(digest)):
        raise LedgerError(f"the archive lacks state {digest[:12]} of {module}, beside which a round was scored")
    return parse_state(memoryview(bytearray(archive.read(BlobId(digest)))), module, layout, has_velocity)


def _state(chain: list[_Round], archive: BlobStore, rules: Rules, module: str) -> ReplicaState:
    """The state that the chain's last round began with, from the first one's."""
    state = archived(archive, module, chain[0].round.state, rules.layout, rules.outer.momentum > 0)
    for one, following in pairwise(chain):
        contributions = _contributions(archive, rules, one.scores)
        state = _step(state, contributions, one.weights, rules, one.round.steered)
        if state.digest != following.round.state:
            raise LedgerError(
                f"round {one.round.round} of {module} leads to state {state.digest[:12]}, but round "
                f"{following.round.round} begins with {following.round.state[:12]}, and that is not in the archive"
            )
    return state


def _step(
    state: ReplicaState,
    contributions: dict[PeerId, Contribution],
    weights: dict[PeerId, float],
    rules: Rules,
    steered: bool,
) -> ReplicaState:
    """As `swarm/follower.py` applies a round without drift fragments."""
    round_ = Round(state.round + 1)
    if not contributions:
        return state.at_round(round_)
    update = aggregate(contributions, weights, rules.layout, clip=rules.clip, steered=steered)
    update = rules.codec.update_of(update, rules.layout)
    theta, velocity = rules.outer.apply(state.theta, state.velocity, update, state.round)
    return ReplicaState(state.module, rules.layout, round_, theta, velocity, state.history + len(contributions))


def _contributions(archive: BlobStore, rules: Rules, scores: list[ScoreEntry]) -> dict[PeerId, Contribution]:
    found = {}
    for one in scores:
        if not one.came or one.blob is None:
            continue
        if not archive.has(BlobId(one.blob)):
            raise LedgerError(f"the archive lacks the contribution of {one.peer} to round {one.round}")
        blob = owned_by(archive.read(BlobId(one.blob)), PeerId(one.peer), one.module, Round(one.round))
        found[PeerId(one.peer)] = rules.codec.decode(blob, rules.layout)
    return found


def _promise(one: ScoreEntry) -> Promise:
    assert one.blob is not None
    return Promise(one.blob, one.size, one.tokens, one.steps, one.digest or "", one.witness)


def _compare(found: Audit, what: str, written: Any, again: Any) -> None:
    """Field by field; numbers to a tolerance."""
    if again is None:
        found.differences.append(f"{what} does not follow from the round at all")
        return
    for name, old, new in _differing(msgspec.to_builtins(written), msgspec.to_builtins(again)):
        if isinstance(old, float) and isinstance(new, float):
            error = abs(old - new)
            found.largest_error = max(found.largest_error, error)
            if math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
                continue
        found.differences.append(f"{what}: {name} is {old} in the ledger, {new} when it is done again")


def _differing(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differing(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if old == new else [(name, old, new)]
