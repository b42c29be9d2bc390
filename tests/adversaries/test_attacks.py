"""Every attack of the adversary suite, by peers in the real round loop: what it earns, and what it does to the run.

Real training of a tiny model, the real DHT, transfer, codec and scoring, in virtual time. The whole table, with 30
rounds of each attack and the loss beside an honest run, is `benchmarks/gauntlet.py`.
"""

from __future__ import annotations

import statistics

import pytest

from potluck.sim.plan import Lie, Plan
from potluck.sim.report import Report, amounts
from potluck.sim.world import simulate

HONEST = 6
ROUNDS = 16


def attacked(*attacks: Lie, **changed: object) -> Report:
    fields = {"seconds": 30.0, "exchange_seconds": 8.0, "steps": 4, "step_seconds": 5.0, "codec": "sparse"}
    fields |= {"model": "llama", "checkpoints": False, "validators": 1, "rounds": ROUNDS, "group_size": 32}
    plan = Plan.of({"name": "attack", "peers": HONEST + len(attacks) + 1, **fields, **changed})
    for number, attack in enumerate(attacks, HONEST):
        plan.lie(peer=number, round=0, at=0.0, lie=attack)
    report = simulate(plan)
    assert report.violations == [], report.violations[:3]
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    "attacks",
    [
        ("random", "copy", "sign"),
        ("perturb", "poison", "scale"),
        ("lazy", "stale", "withhold"),
        ("replay", "garbage", "digest"),
        ("copy_commit",),
    ],
    ids="-".join,
)
def test_an_attack_earns_next_to_nothing_and_blames_nobody(attacks: tuple[Lie, ...]) -> None:
    report = attacked(*attacks)
    last = report.scores[-1]
    earned = amounts(report, "paid", last["validator"])
    usual = statistics.median(earned[peer] for peer in range(HONEST))
    weight = statistics.median(last["shares"][peer] for peer in range(HONEST))
    for number, attack in enumerate(attacks, HONEST):
        assert earned.get(number, 0.0) < 0.2 * usual, attack
        # The lazy one does a quarter of the steps here, which an honest peer of that speed is paid for as well.
        assert last["shares"][number] < (0.4 if attack == "lazy" else 0.1) * weight, attack
    # One test in a thousand may fail an honest peer, each has some in a run, and data are of this machine's Python.
    assert sum(last["verdicts"][peer] < 0 for peer in range(HONEST)) <= 1
    assert report.loss_end < 0.9 * report.loss_start


@pytest.mark.slow
def test_claimed_tokens_and_split_identities_earn_nothing_more() -> None:
    """One machine behind four identities does a quarter of the steps for each."""
    fields = {"seconds": 30.0, "exchange_seconds": 8.0, "steps": 4, "step_seconds": 5.0, "codec": "sparse"}
    fields |= {"model": "llama", "checkpoints": False, "validators": 1, "rounds": 12, "group_size": 32}
    plan = Plan.of({"name": "sybil", "peers": 10, **fields})
    plan.lie(peer=4, round=0, at=0.0, lie="tokens")
    for number in range(5, 9):
        plan.slow(peer=number, round=0, at=0.0, factor=4.0)
    report = simulate(plan)
    earned = amounts(report, "paid", report.scores[-1]["validator"])
    honest = statistics.median(earned[peer] for peer in range(4))
    assert sum(earned.get(number, 0.0) for number in range(5, 9)) < honest
    assert earned.get(4, 0.0) == 0, "who claims other tokens than its steps have is left out by everybody"


def test_who_commits_to_anothers_contribution_harms_nobody_but_itself() -> None:
    """Where computation cannot be tested, nobody could tell whose bytes they are, were they not marked."""
    report = attacked("copy_commit", model="quadratic", codec="int8")
    earned = amounts(report, "paid", report.scores[-1]["validator"])
    usual = statistics.median(earned[peer] for peer in range(HONEST))
    assert min(earned[peer] for peer in range(HONEST)) > 0.5 * usual
    assert earned.get(HONEST, 0.0) == 0
