"""One round judged: what came, what it was worth, and what is written down."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from potluck.incentives.entries import encode
from potluck.incentives.judge import LEAST, MOST, Effort, Judge, Judgement, Promise, Seen
from potluck.net.host import PeerId
from potluck.sim.peer import identity_of
from potluck.swarm.aggregate import aggregate, token_weights
from potluck.swarm.codecs import make_codec
from potluck.swarm.contribution import Contribution, Dense
from potluck.swarm.data import Corpus
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.phases import Round
from potluck.swarm.state import witness

LAYOUT = Layout.of([("w", (400,))])
PEERS = [identity_of(9, n).peer_id for n in range(8)]
ME = identity_of(9, 99).peer_id
CORPUS = Corpus(np.arange(256, dtype=np.uint8).repeat(40), np.zeros(8, np.uint8), sequence_length=1)


def noise_of(token: int) -> Flat:
    return np.random.default_rng(token).standard_normal(400).astype(np.float32)


class Regression:
    """Half the mean squared distance to one target, which every sample (a token) sees with noise of its own."""

    layout = LAYOUT

    def __init__(self) -> None:
        self.target = np.random.default_rng(0).standard_normal(400).astype(np.float32)

    def _wanted(self, tokens: torch.Tensor) -> Flat:
        return self.target + np.mean([noise_of(int(t)) for t in tokens[:, 0]], axis=0).astype(np.float32)

    def loss(self, theta: Flat, tokens: torch.Tensor) -> float:
        return float(0.5 * np.mean(np.square(theta - self._wanted(tokens), dtype=np.float64)))

    def gradient(self, theta: Flat, tokens: torch.Tensor) -> tuple[float, Flat]:
        return self.loss(theta, tokens), (theta - self._wanted(tokens)) / np.float32(theta.size)


MODEL = Regression()


def offsets(peer: PeerId, round_: Round, promise: Promise) -> np.ndarray:
    seed = hashlib.sha256(f"{peer} {round_}".encode()).digest()
    return np.random.default_rng(list(seed)).integers(0, CORPUS.train.size - 1, 4 * promise.steps)


def trained(peer: PeerId, round_: Round, theta: Flat, steps: int = 4) -> Contribution:
    tokens = CORPUS.batch(offsets(peer, round_, promise(theta, peer, steps)))
    return Dense(np.float32(0.02 * steps) * (theta - MODEL._wanted(tokens)))


def state(theta: Flat) -> str:
    return hashlib.sha256(theta.tobytes()).hexdigest()


def promise(theta: Flat, peer: PeerId, steps: int = 4, **changed: object) -> Promise:
    digest = state(theta)
    fields = {"blob": state(theta + len(peer)), "size": 1600, "tokens": 128 * steps, "steps": steps}
    return Promise(**{**fields, "digest": digest, "witness": witness(theta, digest, peer), **changed})  # type: ignore[arg-type]


class Run:
    """Rounds of a swarm, judged. `act(peer, round, theta)` gives a peer's contribution, or why there is none."""

    def __init__(self, clip: bool = True) -> None:
        self.judge = Judge("a" * 52, ME, MODEL, CORPUS, offsets, clip=clip)
        self.shards = 1
        self.theta, self.round = LAYOUT.zeros(), 0
        self.promises: dict[PeerId, Promise] = {}

    def go(self, act: dict[PeerId, object] | None = None, peers: list[PeerId] = PEERS) -> Judgement:
        theta, round_ = self.theta, Round(self.round)
        came: dict[PeerId, Contribution] = {}
        missing: dict[PeerId, str] = {}
        for peer in peers:
            does = (act or {}).get(peer)
            if isinstance(does, str):
                missing[peer] = does
            else:
                came[peer] = does(round_, theta) if callable(does) else trained(peer, round_, theta)
        commits = {peer: promise(theta, peer) for peer in (*came, *missing)} | self.promises
        weights = token_weights({peer: commits[peer].tokens for peer in came})
        after = theta - aggregate(came, weights, LAYOUT)
        self.theta, self.round = after, self.round + 1
        states = state(theta), state(after)
        seen = Seen("m", round_, theta, after, *states, commits, came, missing, weights, shards=self.shards)
        return self.judge.judge(seen, Effort(windows=32, tests=8))


def entry(judgement: Judgement, peer: PeerId):  # type: ignore[no-untyped-def]
    return next(one for one in judgement.scores if one.peer == peer)


def test_honest_peers_share_alike_and_everything_can_be_written_down() -> None:
    run = Run()
    for _ in range(12):
        judgement = run.go()
    assert sum(judgement.shares.values()) == pytest.approx(1.0)
    assert max(judgement.shares.values()) < 2 * min(judgement.shares.values())
    assert all(one.standing.verdict == 1 for one in judgement.scores)
    assert judgement.round.error < 0.05 and judgement.round.credit > 0
    for one in (judgement.round, *judgement.scores):
        assert encode(one)


def free_ride(round_: Round, theta: Flat) -> Contribution:
    return Dense(np.float32(0.05) * np.random.default_rng(round_).standard_normal(400).astype(np.float32))


def test_a_free_rider_a_flipper_and_a_copier_lose_their_weight() -> None:
    run, kept = Run(), {}

    def flip(round_: Round, theta: Flat) -> Contribution:
        return Dense(-trained(PEERS[1], round_, theta).values)  # type: ignore[union-attr]

    def copy(round_: Round, theta: Flat) -> Contribution:
        last, kept["last"] = kept.get("last"), trained(PEERS[7], round_, theta)
        return last or free_ride(round_, theta)

    act: dict[PeerId, object] = {PEERS[0]: free_ride, PEERS[1]: flip, PEERS[2]: copy}
    refusals = []
    for _ in range(14):
        judgement = run.go(act)
        refusals.append(entry(judgement, PEERS[2]).refused)
    for attacker in PEERS[:3]:
        assert judgement.shares[attacker] < 0.02
    # A copy that happens to fit the copier's samples, as one of four does, is not refused; nor does it speak for it.
    assert refusals.count("a copy of another contribution") > 7
    assert entry(judgement, PEERS[7]).standing.verdict == 1, "the one who was copied is not blamed"


def test_validators_have_half_their_windows_in_common_and_prove_themselves_by_few_of_the_others() -> None:
    me, other = (Judge("a" * 52, who, MODEL, CORPUS, offsets) for who in (ME, PEERS[0]))
    beacon = b"b" * 32
    for count in (16, 32, 64):
        mine, theirs = (judge._random_windows(beacon, count)[:, 0].tolist() for judge in (me, other))
        assert mine[: count // 2] == theirs[: count // 2] and mine[count // 2 :] != theirs[count // 2 :]
        assert me._random_windows(beacon, count, PEERS[0])[:, 0].tolist() == theirs
    run = Run()
    run.go()
    theta, after = run.theta, run.theta * np.float32(0.9)
    seen = Seen("m", Round(1), theta, after, state(theta), state(after), {}, {}, {}, {})
    claims = [Judge("a" * 52, ME, MODEL, CORPUS, offsets).judge(seen, Effort(n, 2)).round.contrast for n in (16, 64)]
    assert claims[0] == pytest.approx(claims[1]) and claims[0] != 0
    assert other.on_windows_of(ME, seen).contrast == pytest.approx(claims[0])
    assert other.on_windows_of(PEERS[1], seen).contrast != pytest.approx(claims[0])


def test_a_round_seen_beside_other_states_is_another_one() -> None:
    theta = LAYOUT.zeros()
    one = Seen("m", Round(1), theta, theta, "a", "b", {}, {}, {}, {}, beside={"n": "c"})
    assert len({one.beacon, replace(one, beside={"n": "d"}).beacon, replace(one, beside={}).beacon}) == 3


def test_however_many_newcomers_come_half_of_the_tests_are_for_those_who_passed() -> None:
    run = Run()
    for _ in range(10):
        run.go()
    assert all(one.verdict == 1 for one in run.judge.standings.values())
    strangers = [identity_of(9, n).peer_id for n in range(20, 40)]
    for most, known in ((4, 2), (2, 1), (32, 8)):
        drawn = run.judge._to_test(b"b" * 32, [*PEERS, *strangers], (), most)
        assert len(set(drawn) & set(PEERS)) == known and len(drawn) == min(most, 28)
    # Those of them who look like copies come first, and none is refused untested.
    drawn = run.judge._to_test(b"b" * 32, [*PEERS, *strangers], [*strangers, PEERS[0]], 2)
    assert PEERS[0] in drawn and run.judge._is_own(PEERS[1], None) and not run.judge._is_own(strangers[0], None)


def test_what_is_much_too_long_or_nothing_at_all_has_no_score() -> None:
    run = Run()
    act: dict[PeerId, object] = {
        PEERS[0]: lambda r, t: Dense(100 * trained(PEERS[0], r, t).values),  # type: ignore[union-attr]
        PEERS[1]: lambda r, t: Dense(LAYOUT.zeros()),
    }
    judgement = run.go(act)
    assert "times as long" in entry(judgement, PEERS[0]).refused
    assert entry(judgement, PEERS[1]).refused == "nothing but zeros"
    assert judgement.shares[PEERS[0]] == judgement.shares[PEERS[1]] == 0.0


def test_who_commits_and_does_not_serve_loses_the_round_unless_everybody_is_missing() -> None:
    run = Run()
    for _ in range(10):
        run.go()
    before = entry(run.go(), PEERS[0]).score
    one = run.go({PEERS[0]: "BlobUnavailable"})
    assert entry(one, PEERS[0]).standing.missed == 1 and not entry(one, PEERS[0]).came and not one.round.network_fault
    assert entry(run.go(), PEERS[0]).score == pytest.approx(before, rel=0.2), "a round lost is a round lost"
    many = run.go(dict.fromkeys(PEERS[:6], "BlobUnavailable"))
    assert many.round.network_fault and all(entry(many, p).standing.missed == 0 for p in PEERS[:6])
    cut_off = run.go(peers=PEERS[6:])
    assert cut_off.round.network_fault, "those who could not even commit are counted as well"
    assert all(entry(cut_off, p).standing.missed == 0 for p in PEERS[:6])


def test_another_state_or_a_copied_digest_is_out_of_sync() -> None:
    run = Run()
    run.promises = {
        PEERS[0]: promise(run.theta + 1, PEERS[0]),
        PEERS[1]: promise(run.theta, PEERS[1], witness="ab" * 32),
    }
    judgement = run.go()
    unsynced = {peer: entry(judgement, peer).standing.unsynced for peer in PEERS[:3]}
    assert unsynced == {PEERS[0]: 1, PEERS[1]: 1, PEERS[2]: 0}
    theta = np.ones(8, np.float32)
    assert witness(theta, state(theta), PEERS[0]) != witness(theta, state(theta), PEERS[1])


def test_the_same_round_is_judged_the_same_by_whoever_resumes_from_the_entries() -> None:
    one, other = Run(), Run()
    for _ in range(5):
        last = one.go({PEERS[0]: free_ride})
        other.go({PEERS[0]: free_ride})
    kept = {peer: trained(peer, Round(4), np.zeros(400, np.float32)) for peer in PEERS}
    fresh = Judge("a" * 52, ME, MODEL, CORPUS, offsets)
    fresh.resume({PeerId(s.peer): s.standing for s in last.scores}, last.round, kept)
    one.judge.resume(one.judge.standings, last.round, kept)
    other.judge = fresh
    assert one.go() == other.go()


def test_a_round_of_nobody_new_and_of_one_alone() -> None:
    run = Run()
    alone = run.go(peers=PEERS[:1])
    assert alone.shares == {PEERS[0]: 0.0} and entry(alone, PEERS[0]).place == 1, "among one it shows nothing"
    nothing = run.go({PEERS[0]: "BlobUnavailable"}, peers=PEERS[:1])
    assert nothing.round.credit == 0.0 and entry(nothing, PEERS[0]).refused == "BlobUnavailable"


def test_who_names_no_witness_is_out_of_sync_and_staying_away_does_not_hide_it() -> None:
    run = Run()
    run.promises = {PEERS[0]: promise(run.theta, PEERS[0], witness=None)}
    assert entry(run.go(), PEERS[0]).standing.unsynced == 1
    run.promises = {}
    assert entry(run.go(peers=PEERS[1:]), PEERS[0]).standing.unsynced == 1
    run.promises = {PEERS[0]: promise(run.theta, PEERS[0], witness=None)}
    assert entry(run.go(), PEERS[0]).factors["sync"] == 0.0


def test_replicas_of_several_groups_differ_and_are_away_by_design() -> None:
    run = Run()
    run.shards, run.promises = 4, {PEERS[0]: promise(run.theta + 1, PEERS[0])}
    run.go()
    judgement = run.go(peers=PEERS[:4])
    assert entry(judgement, PEERS[0]).standing.unsynced == 0
    assert all(entry(judgement, peer).standing.missed == 0 for peer in PEERS)


def test_newcomers_who_fit_a_victims_samples_on_purpose_do_not_frame_it() -> None:
    run = Run()
    for _ in range(12):
        run.go(peers=PEERS[:6])
    assert entry(run.go(peers=PEERS[:6]), PEERS[0]).standing.verdict == 1

    def frame(round_: Round, theta: Flat) -> Contribution:
        return trained(PEERS[0], round_, theta)

    act: dict[PeerId, object] = {PEERS[6]: frame, PEERS[7]: frame}
    for _ in range(12):
        judgement = run.go(act)
    assert entry(judgement, PEERS[0]).standing.verdict == 1 and judgement.shares[PEERS[0]] > 0.1
    assert judgement.shares[PEERS[6]] + judgement.shares[PEERS[7]] < 0.05


def test_fresh_identities_have_no_weight_before_they_have_shown_that_they_train() -> None:
    run = Run()
    for _ in range(12):
        run.go(peers=PEERS[:6])
    judgement = run.go({PEERS[6]: free_ride, PEERS[7]: free_ride})
    assert judgement.shares[PEERS[6]] < 0.01 and judgement.shares[PEERS[7]] < 0.01


def test_numbers_that_are_none_are_the_worst_and_end_nothing() -> None:
    run = Run()
    huge = Dense(np.full(400, 3e38, np.float32))
    with np.errstate(all="ignore"):
        judgement = run.go({PEERS[0]: lambda r, t: huge, PEERS[1]: lambda r, t: huge})
        run.theta = np.full(400, np.nan, np.float32)
        ruined = run.go()
    for one in (judgement.round, *judgement.scores, ruined.round, *ruined.scores):
        assert encode(one)


def test_tiny_contributions_of_those_without_weight_make_nobody_look_long() -> None:
    run = Run()
    tiny = {peer: lambda r, t, p=peer: Dense(np.float32(1e-4) * trained(p, r, t).values) for peer in PEERS[:5]}  # type: ignore[misc, union-attr]
    theta, round_ = run.theta, Round(0)
    came = {p: (tiny[p](round_, theta) if p in tiny else trained(p, round_, theta)) for p in PEERS}
    weights = {p: (0.01 if p in tiny else 0.95 / 3) for p in PEERS}
    after = theta - aggregate(came, weights, LAYOUT)
    commits = {p: promise(theta, p) for p in PEERS}
    judgement = run.judge.judge(
        Seen("m", round_, theta, after, state(theta), state(after), commits, came, {}, weights, steered=True)
    )
    assert not any(entry(judgement, p).refused for p in PEERS[5:])


def test_evaluation_data_follow_from_what_was_committed() -> None:
    first = Run().go()
    again = Run().go()
    other = Run().go(peers=PEERS[:7])
    assert first.round.beacon == again.round.beacon != other.round.beacon
    assert first == again


def test_effort_follows_the_time_that_judging_takes() -> None:
    effort = Effort()
    for _ in range(20):
        effort = effort.after(9.0, 10.0)
    assert effort == LEAST
    for _ in range(20):
        effort = effort.after(0.1, 10.0)
    assert effort == MOST and effort.after(2.0, 10.0) == MOST


def test_contributions_in_another_basis_are_credited_for_what_they_do_to_parameters() -> None:
    codec, theta, round_ = make_codec("demo", {"k": 1024}), LAYOUT.zeros(), Round(0)
    deltas = {peer: trained(peer, round_, theta).values for peer in PEERS}
    came = {peer: codec.decode(codec.encode(delta, LAYOUT), LAYOUT) for peer, delta in deltas.items()}
    commits = {peer: promise(theta, peer) for peer in PEERS}
    weights = token_weights({peer: commits[peer].tokens for peer in PEERS})
    after = theta - codec.update_of(aggregate(came, weights, LAYOUT), LAYOUT)
    seen = Seen("m", round_, theta, after, state(theta), state(after), commits, came, {}, weights)
    judged = Judge("a" * 52, ME, MODEL, CORPUS, offsets, codec=codec).judge(seen, Effort(windows=32, tests=8))
    credited = sum(weights[peer] * entry(judged, peer).alignment for peer in PEERS)
    assert credited == pytest.approx(judged.round.credit, rel=1e-3) and credited > 0
    assert all(entry(judged, peer).random_delta > 0 for peer in PEERS)
