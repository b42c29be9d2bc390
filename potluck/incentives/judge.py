"""A validator's judgement of one round: what everybody contributed, what it was worth, and the entries that say so.

It follows from the round alone: what was committed and what came, the run's data, and the standings after the rounds
before. So anybody with the ledger and the blobs comes to the same entries (`audit.py`). Which data are evaluated on is
drawn from the hash of the round's commits, which nobody knows before they are fixed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, Protocol

import numpy as np
import torch

from potluck.dht.records import Commit
from potluck.incentives.entries import RoundEntry, ScoreEntry, Standing
from potluck.incentives.evaluate import (
    Evaluator,
    PathCredit,
    at,
    bounded,
    path_credit,
    place_by_fit,
    similarity,
    trial_delta,
)
from potluck.incentives.rating import Rating, rate
from potluck.incentives.score import Observation, Score, advance, fits_well, remembered, score, shares
from potluck.net.host import PeerId
from potluck.swarm.aggregate import clipped, median_norms, token_weights, weighted_median
from potluck.swarm.agreement import network_at_fault
from potluck.swarm.codecs import Codec
from potluck.swarm.contribution import Contribution, Dense
from potluck.swarm.data import Corpus
from potluck.swarm.layout import Flat
from potluck.swarm.phases import Round
from potluck.swarm.state import witness

#: Windows of a peer's own data that its computation is tested on; its exact deltas are taken on so many of either data.
OWN_WINDOWS: Final = 32
#: They are looked at in so many parts, in the order in which they are trained on.
PARTS: Final = 4
#: Cosine of two contributions above which one may be a copy, if the others are not like that as well, and above which
#: it is one.
ALIKE: Final = 0.5
SAME: Final = 0.98
#: Of a larger module so many parameters are looked at in tests.
MAX_PLACES: Final = 2**19
#: A peer is compared with those known to train, if there are so many.
LEAST_RIVALS: Final = 3
#: Of its random windows a validator's contrast is of so many: the first half of the common ones, and its own last ones.
PROOF_WINDOWS: Final = 16
#: Gradients below this are rounding.
SMALLEST_GRADIENT: Final = 1e-8
#: Weight of the newest round in what is usual.
USUAL_RATE: Final = 0.3
#: A contribution so many times longer than the median is no honest one.
MAX_NORMS: Final = 10.0


@dataclass(frozen=True)
class Promise:
    """What a commit says, as far as a score follows from it."""

    blob: str
    size: int
    tokens: int
    steps: int
    digest: str
    witness: str | None

    @classmethod
    def of(cls, commit: Commit) -> Promise:
        return cls(commit.blob, commit.size, commit.tokens, commit.steps, commit.digest, commit.witness)


class Assignment(Protocol):
    """Which training windows the run assigned to a peer, as far as it says that it trained."""

    def __call__(self, peer: PeerId, round_: Round, promise: Promise) -> np.ndarray | None:
        """Offsets, shape (samples,); None in a module whose replicas have no data of their own."""
        ...


@dataclass(frozen=True)
class Seen:
    """One module's round, as a validator saw it. `commits` are those that came in time, `missing` says why a
    contribution could not be had. `weights`: each one's part in the update."""

    module: str
    round: Round
    theta: Flat
    next_theta: Flat
    state: str
    next_state: str
    commits: Mapping[PeerId, Promise]
    contributions: Mapping[PeerId, Contribution]
    missing: Mapping[PeerId, str]
    weights: Mapping[PeerId, float]
    beside: Mapping[str, str] = field(default_factory=dict)
    shards: int = 1
    steered: bool = False

    @property
    def beacon(self) -> bytes:
        """What everything random follows from. Of the next state, which nobody knows while contributions are hidden: of
        the commits alone the last to commit could choose. Who saw the round beside other states has another one."""
        named = [*(f"{peer} {self.commits[peer].blob}\n" for peer in sorted(self.commits)), f"{self.next_state}\n"]
        named += [f"{module} {self.beside[module]}\n" for module in sorted(self.beside)]
        return hashlib.sha256(b"potluck.beacon.2\n" + "".join(named).encode()).digest()


@dataclass(frozen=True)
class Judgement:
    round: RoundEntry
    scores: list[ScoreEntry]

    @property
    def shares(self) -> dict[PeerId, float]:
        return {PeerId(entry.peer): entry.share for entry in self.scores}


@dataclass(frozen=True)
class Effort:
    """How much a validator evaluates in a round. `windows` of random data for all contributions together, and at most
    so many `tests` of single peers' computation (all that look like copies besides)."""

    windows: int = 16
    tests: int = 4

    def after(self, seconds: float, round_seconds: float) -> Effort:
        """For the next round, by what this one took: weights that come too late count for nobody."""
        if seconds > 0.4 * round_seconds:
            part = 0.4 * round_seconds / seconds
            return Effort(max(LEAST.windows, int(self.windows * part)), max(LEAST.tests, int(self.tests * part)))
        if seconds < 0.1 * round_seconds:
            return Effort(min(MOST.windows, self.windows * 2), min(MOST.tests, self.tests * 2))
        return self


LEAST: Final = Effort(16, 2)
MOST: Final = Effort(128, 32)


class Judge:
    """Keeps what it must remember of each peer between rounds. Not `testable`: replicas of this module train on samples
    that are not theirs, or that only they have."""

    def __init__(
        self,
        run_id: str,
        me: PeerId,
        evaluator: Evaluator,
        corpus: Corpus,
        assigned: Assignment,
        *,
        codec: Codec | None = None,
        clip: bool = True,
        testable: bool = True,
    ) -> None:
        self.run_id, self.me, self._evaluator, self._corpus, self._assigned = run_id, me, evaluator, corpus, assigned
        self._codec, self._clip, self._testable = codec, clip, testable
        self.standings: dict[PeerId, Standing] = {}
        #: The last round's contributions: copies are looked for among them.
        self._last: dict[PeerId, Contribution] = {}
        self._last_round = Round(-1)
        self._usual = 0.0

    def resume(
        self, standings: Mapping[PeerId, Standing], last: RoundEntry, contributions: Mapping[PeerId, Contribution]
    ) -> None:
        """Go on after a round, as if it had just been judged: with what its entries say and what came in it."""
        self.standings, self._usual = dict(standings), last.usual
        self._last_round, self._last = Round(last.round), dict(contributions)

    def judge(self, seen: Seen, effort: Effort = Effort()) -> Judgement:
        """Evaluates on this thread, for as long as a few of a peer's local steps take."""
        refused = self._refused(seen)
        layout = self._evaluator.layout
        medians = median_norms(seen.contributions, seen.weights, layout, seen.steered) if self._clip else None
        taken = sorted(seen.contributions.keys() - refused.keys())
        usable = {peer: self._applied(clipped(seen.contributions[peer], medians, layout)) for peer in taken}
        tokens = self._random_windows(seen.beacon, effort.windows)
        path = path_credit(self._evaluator, tokens, seen.theta, seen.next_theta, usable, proof=PROOF_WINDOWS)
        alike = self._alike({peer: seen.contributions[peer] for peer in usable}, seen.round)
        tests = self._test(seen, usable, alike, path, tokens, effort.tests)
        for peer, cosine in alike.items():
            if cosine > SAME and not self._is_own(peer, tests.get(peer)):
                refused[peer] = "a copy of another contribution"
        alignment = {peer: value for peer, value in path.alignment.items() if peer not in refused}
        # As much as it trained, believed as far as aggregation does; the ledger's own weight is no merit.
        trained = token_weights({peer: seen.commits[peer].tokens for peer in usable})
        useful = {peer: value * trained[peer] for peer, value in alignment.items()}
        usual = self._usual = _moving(
            self._usual, [abs(value) for peer, value in useful.items() if seen.weights.get(peer, 0.0) > 0]
        )
        network = self._network_at_fault(seen)
        rated = rate({peer: Rating(s.mu, s.sigma) for peer, s in self.standings.items()}, useful)
        scores: dict[PeerId, Score] = {}
        for peer in sorted(self.standings.keys() | seen.commits.keys()):
            test, standing = tests.get(peer), self.standings.get(peer, Standing())
            observed = Observation(
                alignment=alignment.get(peer),
                relative=useful.get(peer, 0.0) / (usual or 1.0),
                refused=peer in refused and peer in seen.contributions,
                place=test.place if test else None,
                among=test.among if test else 0,
                away=peer not in seen.contributions and not network and seen.shards == 1,
                in_sync=self._in_sync(seen, peer),
            )
            rating = rated.get(peer, Rating(standing.mu, standing.sigma))
            scores[peer] = score(advance(standing, observed, seen.round, rating), self._testable)
        self.standings = {
            peer: one.standing for peer, one in scores.items() if remembered(one.standing, seen.round, seen.shards)
        }
        self._last, self._last_round = dict(seen.contributions), seen.round
        parts = shares({peer: one.score for peer, one in scores.items()})
        entries = []
        for peer, one in scores.items():
            why = refused.get(peer, seen.missing.get(peer, "" if peer in alignment else "no commit"))
            credited = path.alignment.get(peer, 0.0)
            entries.append(_score_entry(seen, peer, one, tests.get(peer), why, credited, parts[peer]))
        return Judgement(self._round_entry(seen, path, usual, effort, network), entries)

    def _round_entry(
        self, seen: Seen, path: PathCredit, usual: float, effort: Effort, network_fault: bool
    ) -> RoundEntry:
        return RoundEntry(
            module=seen.module,
            round=seen.round,
            run=self.run_id,
            validator=self.me,
            state=seen.state,
            next_state=seen.next_state,
            beside=dict(seen.beside),
            shards=seen.shards,
            steered=seen.steered,
            beacon=seen.beacon.hex(),
            loss_before=path.before,
            loss_after=path.after,
            credit=path.credit,
            contrast=path.contrast,
            usual=usual,
            windows=effort.windows,
            tests=effort.tests,
            points=path.points,
            error=path.error,
            network_fault=network_fault,
        )

    def on_windows_of(self, validator: PeerId, seen: Seen) -> PathCredit:
        """The credit of a round's whole step on the data with which another validator proves that it evaluated."""
        tokens = self._random_windows(seen.beacon, PROOF_WINDOWS, validator)
        return path_credit(self._evaluator, tokens, seen.theta, seen.next_theta, {}, max_points=2, proof=PROOF_WINDOWS)

    def _applied(self, one: Contribution) -> Contribution:
        """What a contribution does to parameters: of most codecs it says just that."""
        if self._codec is None or not self._codec.transforms:
            return one
        layout = self._evaluator.layout
        return Dense(self._codec.update_of(at(one, np.arange(layout.size), layout.size), layout))

    # ---- fast checks ----------------------------------------------------------------------------------------

    def _refused(self, seen: Seen) -> dict[PeerId, str]:
        """Contributions that came, and do not count for a score, whatever they say."""
        lengths = {peer: one.length for peer, one in seen.contributions.items()}
        counted = [peer for peer in sorted(lengths) if seen.weights.get(peer, 0.0) > 0]
        votes = [seen.weights[peer] if seen.steered else 1.0 for peer in counted]
        usual = weighted_median([lengths[peer] for peer in counted], votes) if counted else 0.0
        refused = {}
        for peer, length in lengths.items():
            if not math.isfinite(length) or (len(lengths) > 2 and length > MAX_NORMS * usual):
                refused[peer] = f"{length / (usual or 1.0):.3g} times as long as the median contribution"
            elif length == 0.0:
                refused[peer] = "nothing but zeros"
        return refused

    def _in_sync(self, seen: Seen, peer: PeerId) -> bool | None:
        """None where it cannot be told: of who is away, and where replicas of several groups differ by design."""
        commit = seen.commits.get(peer)
        if commit is None or seen.shards > 1:
            return None
        return commit.digest == seen.state and commit.witness == witness(seen.theta, seen.state, peer)

    def _network_at_fault(self, seen: Seen) -> bool:
        """Whether so many of those who usually come did not that it is laid to the network."""
        usual = [peer for peer, one in self.standings.items() if one.seen and not one.missed]
        members = sorted({*usual, *(peer for peer in seen.commits if peer not in self.standings)})
        gone = {peer: "" for peer in members if peer not in seen.contributions}
        return network_at_fault(members, gone)

    def _alike(self, usable: Mapping[PeerId, Contribution], round_: Round) -> dict[PeerId, float]:
        """Peers whose contribution is much like another's of this round or any of the last one, and how much."""
        layout = self._evaluator.layout
        now, before = {}, {}
        last = self._last if self._last_round == round_ - 1 else {}
        for peer, one in usable.items():
            now[peer] = [value for other, value in similarity(one, usable, layout).items() if other != peer]
            before[peer] = list(similarity(one, last, layout).values())
        usual = np.median([*chain(*now.values(), *before.values())] or [0.0])
        limit = max(ALIKE, 1.0 - 0.5 * (1.0 - float(usual)))
        most = {peer: max([*now[peer], *before[peer]], default=0.0) for peer in usable}
        return {peer: value for peer, value in most.items() if value > limit}

    def _is_own(self, peer: PeerId, test: _Test | None) -> bool:
        """Of one that is like another: whether it fits its own samples, or was not looked at and comes from one who is
        known to train."""
        if test is None:
            return self.standings.get(peer, Standing()).verdict > 0
        return fits_well(test.place, test.among)

    # ---- data and tests -------------------------------------------------------------------------------------

    def _dice(self, beacon: bytes, what: str, validator: str | None = None) -> np.random.Philox:
        """Each validator's own; of the `validator` "" those that all have in common."""
        name = b"\0".join([b"potluck.evaluation.2", beacon, (self.me if validator is None else validator).encode()])
        name += b"\0" + what.encode()
        return np.random.Philox(key=np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8"))

    def _random_windows(self, beacon: bytes, count: int, validator: PeerId | None = None) -> torch.Tensor:
        """Half of them are the same for all validators, so that honest ones hardly differ; the others are its own: none
        can say what those come to without evaluating."""
        own = count // 2
        common = self._dice(beacon, "random", "").random_raw(count - own)
        # Back to front, so that the first and the last ones are the same however many are between.
        raw = np.concatenate([common, self._dice(beacon, "random", validator).random_raw(own)[::-1]])
        last = np.uint64(self._corpus.train.size - self._corpus.sequence_length)
        return self._corpus.batch((raw % last).astype(np.int64))

    def _to_test(self, beacon: bytes, peers: Sequence[PeerId], alike: Collection[PeerId], most: int) -> list[PeerId]:
        """Whose computation is tested: who is least known, by lot among equals; and as many of those who look like
        copies, known ones first."""
        lots = dict(zip(peers, self._dice(beacon, "tests").random_raw(len(peers)).tolist(), strict=True))

        def decided(peer: PeerId) -> bool:
            return self.standings.get(peer, Standing()).verdict != 0

        copies = sorted(alike, key=lambda peer: (not decided(peer), lots[peer]))[:most]
        by_lot = sorted(peers, key=lambda peer: lots[peer])
        # However many unknown ones come, half of the tests are for those who have something to lose.
        unknown = [peer for peer in by_lot if not decided(peer)]
        known = [peer for peer in by_lot if decided(peer)][: max(most // 2, most - len(unknown))]
        return sorted({*copies, *known, *unknown[: most - len(known)]})

    def _test(
        self,
        seen: Seen,
        usable: Mapping[PeerId, Contribution],
        alike: Collection[PeerId],
        path: PathCredit,
        tokens: torch.Tensor,
        most: int,
    ) -> dict[PeerId, _Test]:
        """Exact loss deltas, and whether what a peer sent fits the samples that it says it trained on.

        What all samples have in common would make the best trained contribution fit anybody's: that is taken off.
        Each parameter's gradient is divided by its usual size, as in an adaptive optimizer's steps. Of large modules
        parameters drawn by lot stand for all.
        """
        evaluator, theta, tokens = self._evaluator, seen.theta, tokens[:OWN_WINDOWS]
        where = self._places(seen.beacon)
        common = path.gradient[where]
        own: dict[PeerId, tuple[float, np.ndarray]] = {}
        deltas: dict[PeerId, float] = {}
        random_before = bounded(evaluator.loss(theta, tokens))
        for peer in self._to_test(seen.beacon, list(usable), alike, most):
            deltas[peer] = trial_delta(evaluator, tokens, theta, usable[peer], random_before)
            offsets = self._assigned(peer, seen.round, seen.commits[peer]) if self._testable else None
            if offsets is not None and offsets.size:
                windows = self._corpus.batch(self._pick(offsets, seen.beacon, f"own {peer}"))
                parts = [part for part in torch.tensor_split(windows, PARTS) if len(part)]
                found = [evaluator.gradient(theta, part) for part in parts]
                gradients = np.stack([np.nan_to_num(gradient[where]) for _, gradient in found])
                losses = (loss * len(part) for (loss, _), part in zip(found, parts, strict=True))
                before = bounded(sum(losses) / len(windows))
                own[peer] = trial_delta(evaluator, windows, theta, usable[peer], before), gradients
        squares = np.square(common, dtype=np.float64)
        for _, gradients in own.values():
            squares += np.square(gradients, dtype=np.float64).sum(axis=0)
        size = np.sqrt(squares / (1 + sum(len(gradients) for _, gradients in own.values()))) + SMALLEST_GRADIENT
        values = {peer: at(one, where, evaluator.layout.size) for peer, one in usable.items()} if own else {}
        results = {}
        for peer, delta in deltas.items():
            place, among = None, 0
            if peer in own:
                rivals = self._rivals(peer, list(usable))
                rows = (
                    np.stack([values[rival] for rival in rivals]) if rivals else np.empty((0, where.size), np.float32)
                )
                place = place_by_fit(((own[peer][1] - common) / size).astype(np.float32), values[peer], rows)
                among = 1 + len(rivals)
            results[peer] = _Test(delta, own[peer][0] if peer in own else None, place, among)
        return results

    def _rivals(self, peer: PeerId, usable: Sequence[PeerId]) -> list[PeerId]:
        """With whom it is compared: those who are known to train. Anybody knows its samples, and newcomers without
        anything to lose could fit them on purpose, so that it looks as if it did not train."""
        others = [other for other in usable if other != peer]
        known = [other for other in others if self.standings.get(other, Standing()).verdict > 0]
        return known if len(known) >= LEAST_RIVALS else others

    def _places(self, beacon: bytes) -> np.ndarray:
        size = self._evaluator.layout.size
        if size <= MAX_PLACES:
            return np.arange(size)
        return np.unique(self._dice(beacon, "places").random_raw(MAX_PLACES) % np.uint64(size)).astype(np.int64)

    def _pick(self, offsets: np.ndarray, beacon: bytes, what: str) -> np.ndarray:
        """At most OWN_WINDOWS of them."""
        lots = self._dice(beacon, what).random_raw(offsets.size)
        chosen: np.ndarray = offsets[np.sort(np.argsort(lots, kind="stable")[:OWN_WINDOWS])]
        return chosen


def _moving(before: float, values: Sequence[float]) -> float:
    """One round whose loss hardly moved, or got worse, must not make a small difference look large."""
    if not values:
        return before
    now = float(np.median(values))
    return now if before == 0 else (1 - USUAL_RATE) * before + USUAL_RATE * now


@dataclass(frozen=True)
class _Test:
    random_delta: float
    own_delta: float | None
    place: int | None
    among: int


def _score_entry(
    seen: Seen, peer: PeerId, one: Score, test: _Test | None, refused: str, alignment: float, share: float
) -> ScoreEntry:
    commit = seen.commits.get(peer)
    return ScoreEntry(
        module=seen.module,
        round=seen.round,
        peer=peer,
        blob=commit.blob if commit else None,
        size=commit.size if commit else 0,
        tokens=commit.tokens if commit else 0,
        steps=commit.steps if commit else 0,
        digest=commit.digest if commit else None,
        witness=commit.witness if commit else None,
        came=peer in seen.contributions,
        refused=refused[:200],
        weight=seen.weights.get(peer, 0.0),
        alignment=alignment,
        random_delta=test.random_delta if test else None,
        own_delta=test.own_delta if test else None,
        place=test.place if test else None,
        among=test.among if test else 0,
        standing=one.standing,
        factors=one.factors,
        score=one.score,
        share=share,
    )
