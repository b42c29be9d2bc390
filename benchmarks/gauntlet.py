"""What scoring costs, how true it is, and what each attack earns.

    python benchmarks/gauntlet.py [--quick] [--seed 0]

Four parts:

- Path credit on real sparse contributions of a model of about a million parameters: how well all shares add up to the
  measured loss drop, and their rank correlation with leaving each peer out and with each peer's exact loss delta. Its
  cost (the two or more gradients, clipping, and all dot products of 64 contributions) beside exact evaluation of all 64
  on random and on their own data, as Gauntlet does it for a few.
- Honest peers that do all, a half and a quarter of the steps, in simulated runs of the real round loop: AUC of the
  final scores over all pairs of unequal speed.
- Each attack by peers in the same round loop, 30 % of each run, three kinds at a time: credit as a share of the median
  honest peer's, rounds until the attacker's weight stays under a tenth of that peer's, honest peers wrongly found not
  to train, and the final loss beside a run of the honest peers alone.

- Three validators, one of which copies another's weights: what it earns beside the others. And what they published when
  all three were honest, but as if one of them, with 45 % of the stake, had given all its weight to two friends: how far
  that moves honest peers' incentive, in the second half of the rounds.

Simulated time, but real training, codecs, DHT, transfer and scoring. `--quick` (within 50 s) has fewer peers, rounds
and attacks, and evaluates a part of the 64 exactly. The last line is JSON. Goals: auc >= 0.95,
|1 - path_credit_sum_ratio| <= 0.05, correlation >= 0.95, cost_ratio >= 20, credit shares <= 0.1, false positives
< 0.01, loss_ratio <= 1.02, validator_copy_share < 1, collusion_shift <= 0.05.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from potluck.dht.manifest import DataPart, ModelPart, TrainingPart
from potluck.incentives.evaluate import ModelEvaluator, dot, path_credit, trial_delta
from potluck.incentives.steering import consensus
from potluck.net.host import PeerId
from potluck.sim.plan import Plan
from potluck.sim.report import Report, amounts
from potluck.sim.world import simulate
from potluck.swarm.aggregate import aggregate, clipped, median_norms, token_weights
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import assigned_offsets, load_corpus
from potluck.swarm.local import LocalTrainer
from potluck.swarm.model import build_module
from potluck.swarm.phases import Round

console = Console(stderr=True, width=120)

ATTACKS = (
    ("random", "copy", "sign"),
    ("perturb", "poison", "scale"),
    ("lazy", "stale", "withhold"),
    ("replay", "garbage", "tokens"),
    ("copy_commit", "digest"),
)
VALIDATORS = 3
HONEST = 7
SCORED = 64


# --- path credit, and what it costs


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def credit_of_a_round(options: argparse.Namespace) -> dict[str, float]:
    """One round of real local training, after a few to warm up; then everything that can be known about it."""
    torch.set_num_threads(1)
    peers = 12 if options.quick else SCORED
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"vocab_size": 256, "intermediate_size": 384, "max_position_embeddings": 64, "tie_word_embeddings": True}
    spec = ModelPart(family="llama", config=sizes, seed=options.seed)
    corpus = load_corpus(DataPart(sequence_length=64))
    training = TrainingPart(learning_rate=2e-3, batch_size=4, precision="float32")
    trainer = LocalTrainer(build_module(spec), training, torch.device("cpu"))
    layout, codec = trainer.layout, make_codec("sparse")
    theta, dice = layout.gather(trainer.module), np.random.default_rng(options.seed)
    warm = iter(lambda: corpus.batch(dice.integers(0, corpus.train.size - 65, 4)), None)
    trainer.train(warm, 20, 0)
    theta = layout.gather(trainer.module)
    names = [PeerId(f"peer-{n:02}") for n in range(peers)]
    own, contributions, tokens = {}, {}, {}
    for n, peer in enumerate(names):
        steps = int(dice.integers(1, 4 if options.quick else 8))
        own[peer] = corpus.batch(assigned_offsets(b"benchmark", "stage.0", peer, Round(0), 0, 4 * steps, corpus))
        trainer.load(theta)
        trainer.train(iter(torch.split(own[peer], 4)), steps, 20)
        delta = trainer.delta(theta)
        if n % 6 == 5:
            delta = -delta if n % 12 == 5 else delta.std() * dice.standard_normal(layout.size).astype(np.float32)
        blob = codec.encode(delta, layout, layout.zeros())
        contributions[peer], tokens[peer] = codec.decode(blob, layout), own[peer].numel()
    weights = token_weights(tokens)
    next_theta = theta - aggregate(contributions, weights, layout)
    evaluator = ModelEvaluator(trainer.module, torch.device("cpu"))
    windows = corpus.batch(dice.integers(0, corpus.train.size - 65, 32))

    evaluator.gradient(theta, windows)  # the first time costs more, whoever comes first

    # A round of 64, whatever was trained: what is sent twice costs twice as much to score.
    many = {PeerId(f"{names[n % peers]}-{n}"): contributions[names[n % peers]] for n in range(SCORED)}
    began = time.perf_counter()
    medians = median_norms(many, dict.fromkeys(many, 1.0), layout, False)
    taken = {peer: clipped(one, medians, layout) for peer, one in many.items()}
    path = path_credit(evaluator, windows, theta, next_theta, taken)
    cheap = time.perf_counter() - began
    medians = median_norms(contributions, weights, layout, False)
    alone = {peer: clipped(one, medians, layout) for peer, one in contributions.items()}
    credit = {peer: weights[peer] * path.alignment[PeerId(f"{peer}-{n}")] for n, peer in enumerate(names)}

    before, exact = evaluator.loss(theta, windows), {}
    began = time.perf_counter()
    for peer in names:
        exact[peer] = trial_delta(evaluator, windows, theta, alone[peer], before)
        part = own[peer][: windows.shape[0]].repeat(-(-windows.shape[0] // own[peer].shape[0]), 1)[: windows.shape[0]]
        trial_delta(evaluator, part, theta, alone[peer], evaluator.loss(theta, part))
    dear = (time.perf_counter() - began) / peers * SCORED
    after, without = evaluator.loss(next_theta, windows), {}
    for peer in names:
        others = {name: one for name, one in alone.items() if name != peer}
        update = aggregate(others, weights, layout, clip=False)  # its own part taken away, the others' as they were
        without[peer] = evaluator.loss(theta - update, windows) - after
    return {
        "parameters": layout.size,
        "drop": before - after,
        "path_credit_sum_ratio": sum(credit.values()) / (before - after),
        "points": path.points,
        "correlation_without": rank_correlation([credit[p] for p in names], [without[p] for p in names]),
        "correlation_exact": rank_correlation([dot(path.gradient, alone[p]) for p in names], [exact[p] for p in names]),
        "correlation_credit_exact": rank_correlation(
            [path.alignment[PeerId(f"{p}-{n}")] for n, p in enumerate(names)], [exact[p] for p in names]
        ),
        "path_seconds": cheap,
        "exact_seconds": dear,
        "cost_ratio": dear / cheap,
    }


# --- runs


def plan_of(options: argparse.Namespace, name: str, peers: int, rounds: int) -> Plan:
    return Plan(
        name=name,
        seed=options.seed,
        model="llama",
        peers=peers + 1,
        validators=1,
        rounds=rounds,
        steps=4 if options.quick else 8,
        step_seconds=10.0 if options.quick else 5.0,  # a usual machine's steps just fill the round
        group_size=32,
        codec="sparse",
        codec_parameters={"k": 64},
        checkpoints=False,
    )


def run(plan: Plan) -> Report:
    return simulate(plan)


def speeds(options: argparse.Namespace) -> tuple[Plan, list[float]]:
    """Peers of three speeds, and the speed of each."""
    each = 2 if options.quick else 4
    plan = plan_of(options, "speeds", 3 * each, 16 if options.quick else 20)
    speed = [1.0] * each + [0.5] * each + [0.25] * each
    for peer, share in enumerate(speed):
        if share < 1:
            plan.slow(peer=peer, round=0, at=0, factor=1 / share)
    return plan, speed


def auc(score: dict[int, float], speed: list[float]) -> float:
    pairs = [(a, b) for a, fast in enumerate(speed) for b, slow in enumerate(speed) if fast > slow]
    return statistics.fmean(
        1.0 if score.get(a, 0) > score.get(b, 0) else 0.5 if score.get(a, 0) == score.get(b, 0) else 0.0
        for a, b in pairs
    )


def attacked(options: argparse.Namespace, attacks: tuple[str, ...]) -> Plan:
    plan = plan_of(options, "-".join(attacks) or "honest", HONEST + len(attacks), 12 if options.quick else 30)
    for number, attack in enumerate(attacks):
        plan.lie(peer=HONEST + number, round=0, at=0, lie=attack)  # type: ignore[arg-type]
    return plan


def of_validators(options: argparse.Namespace, lie: str | None) -> Plan:
    plan = plan_of(options, lie or "validators", HONEST, 30)
    plan.peers, plan.validators = HONEST + VALIDATORS, VALIDATORS
    if lie:
        plan.lie(peer=plan.peers - 1, round=0, at=0, lie=lie)  # type: ignore[arg-type]
    return plan


def by_round(report: Report) -> list[dict[int, dict[int, float]]]:
    """What each validator gave each peer, round by round, of those rounds that all of them scored."""
    rounds: dict[int, dict[int, dict[int, float]]] = {}
    for row in report.scores:
        rounds.setdefault(row["round"], {})[row["validator"]] = row["shares"]
    return [rows for _, rows in sorted(rounds.items()) if len(rows) == VALIDATORS]


def collusion(rows: dict[int, dict[int, float]]) -> list[float]:
    """By how much each honest peer's incentive moves if the last validator gives all to two friends."""
    names = sorted(rows)
    stake = dict(zip(map(PeerId, map(str, names)), (0.275, 0.275, 0.45), strict=True))
    honest = {PeerId(str(v)): {PeerId(str(p)): w for p, w in rows[v].items()} for v in names}
    colluding = {**honest, PeerId(str(names[-1])): {PeerId("0"): 0.5, PeerId("1"): 0.5}}
    calm, moved = consensus(honest, stake)[0], consensus(colluding, stake)[0]
    return [abs(moved.get(peer, 0.0) / value - 1) for peer, value in calm.items() if value > 0]


def judged(report: Report, attacks: tuple[str, ...]) -> tuple[dict[str, dict[str, Any]], float]:
    """(what became of each attacker, share of honest peers' rounds in which they were found not to train)."""
    paid = amounts(report, "paid", HONEST + len(attacks))
    honest = statistics.median(paid.get(peer, 0.0) for peer in range(HONEST))
    found: dict[str, dict[str, Any]] = {}
    for number, attack in enumerate(attacks, HONEST):
        low = [row["shares"].get(number, 0.0) <= 0.1 * _usual(row["shares"]) for row in report.scores]
        since = next((n for n in range(len(low)) if all(low[n:])), None)
        found[attack] = {"credit_share": round(paid.get(number, 0.0) / honest, 4), "rounds_to_detect": since}
    wrong = [row["verdicts"].get(peer, 0) < 0 for row in report.scores for peer in range(HONEST)]
    return found, statistics.fmean(wrong)


def _usual(shares: dict[int, float]) -> float:
    return statistics.median(shares.get(peer, 0.0) for peer in range(HONEST))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    groups = ATTACKS[:1] if options.quick else ATTACKS
    ranked, speed = speeds(options)
    # Measured alone; the runs' own seconds matter to nobody.
    credit = credit_of_a_round(options)
    with ProcessPoolExecutor(max_workers=2) as pool:
        of_peers = [attacked(options, ()), *(attacked(options, group) for group in groups), ranked]
        lies = () if options.quick else (None, "copy_weights")
        alone, *rest = pool.map(run, [*of_peers, *(of_validators(options, lie) for lie in lies)])
    under_attack, fast_and_slow, scoring = rest[: len(groups)], rest[len(groups)], rest[len(groups) + 1 :]
    for report in (alone, *under_attack, fast_and_slow, *scoring):
        assert not report.violations, report.violations[:3]
    order = auc(fast_and_slow.scores[-1]["shares"], speed)
    _, wrong = judged(alone, ())
    found: dict[str, dict[str, Any]] = {}
    rates, ratios = [wrong], []
    for group, report in zip(groups, under_attack, strict=True):
        each, wrong = judged(report, group)
        ratio = report.loss_end / alone.loss_end
        found |= {attack: {**one, "loss_ratio": round(ratio, 4)} for attack, one in each.items()}
        rates.append(wrong)
        ratios.append(ratio)

    table = Table(title=f"path credit of {SCORED} sparse contributions, {credit['parameters']:,.0f} parameters")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in credit.items():
        table.add_row(name, f"{value:,.4g}")
    console.print(table)
    table = Table(title=f"{HONEST} honest peers, 3 attackers, {attacked(options, ()).rounds} rounds, 1 validator")
    for column in ("attack", "credit share", "rounds to detect", "loss of that run"):
        table.add_column(column, justify="right")
    for attack, one in found.items():
        since = "never" if one["rounds_to_detect"] is None else str(one["rounds_to_detect"])
        table.add_row(attack, f"{one['credit_share']:.3f}", since, f"{one['loss_ratio']:.4f}")
    console.print(table)
    of_scoring = {}
    if scoring:
        calm, copied = scoring
        earned = amounts(copied, "earned", HONEST)
        usual = statistics.median(earned.get(HONEST + n, 0.0) for n in range(VALIDATORS - 1))
        rounds = by_round(calm)
        shifts = [collusion(rows) for rows in rounds[len(rounds) // 2 :]]
        of_scoring = {
            "validator_copy_share": round(earned.get(HONEST + VALIDATORS - 1, 0.0) / usual, 4),
            "collusion_shift": round(statistics.median(statistics.median(row) for row in shifts), 4),
            "collusion_shift_of_worst_peer": round(statistics.median(max(row) for row in shifts), 4),
        }
        console.print(f"{VALIDATORS} validators, one of them dishonest: {of_scoring}")
    shares = fast_and_slow.scores[-1]["shares"]
    by_speed = {
        s: [round(shares.get(p, 0.0), 3) for p, own in enumerate(speed) if own == s] for s in sorted(set(speed))
    }
    console.print(f"weights by speed after {ranked.rounds} rounds: {by_speed}")
    print(
        json.dumps(
            {
                "auc": round(order, 4),
                "path_credit_sum_ratio": round(credit["path_credit_sum_ratio"], 4),
                "path_credit_rank_correlation": round(credit["correlation_without"], 4),
                "exact_delta_rank_correlation": round(credit["correlation_credit_exact"], 4),
                "cost_ratio": round(credit["cost_ratio"], 1),
                "attackers": found,
                "false_positive_rate": round(statistics.fmean(rates), 4),
                "loss_ratio": round(max(ratios), 4),
                **of_scoring,
            }
        )
    )


if __name__ == "__main__":
    main()
