"""What a ledger says about peers: sums, histories and reasons that follow from its entries and nothing else."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from sample_entries import round_entry

from potluck.dht.manifest import RunId
from potluck.errors import UserError
from potluck.incentives.entries import AnyEntry, Claim, CreditEntry, RoundEntry, ScoreEntry, Standing
from potluck.incentives.ledger import Head
from potluck.incentives.report import (
    credit_over_time,
    explain,
    find_peer,
    find_score,
    history,
    leaderboard,
    validators,
    write_csv,
    write_json,
    write_plot,
)
from potluck.net.identity import peer_id_of

ANNA, BORIS, CARLA, DORA = (peer_id_of(bytes([n]) * 32) for n in range(1, 5))
HASH = "ab" * 32


def a_round(number: int, network_fault: bool = False, module: str = "model") -> RoundEntry:
    return round_entry(number, DORA, module=module, error=0.013, network_fault=network_fault)


def score(peer: str, number: int, **changes: Any) -> ScoreEntry:
    fields = {"module": "model", "round": number, "peer": peer, "standing": Standing(), "came": True, "blob": HASH}
    return ScoreEntry(**{**fields, **changes})


def missed(peer: str, number: int, **changes: Any) -> ScoreEntry:
    return score(peer, number, came=False, blob=None, refused="no commit", **changes)


def credit(number: int, module: str = "model", **paid: float) -> CreditEntry:
    names = {"anna": ANNA, "boris": BORIS, "carla": CARLA, "dora": DORA}
    to = {names[name]: amount for name, amount in paid.items()}
    return CreditEntry(module=module, round=number, opinions={}, incentive={ANNA: 0.5}, paid=to)


#: As a validator writes it: a round, its scores, then the credit for the round before.
LEDGER: list[AnyEntry] = [
    a_round(0),
    score(ANNA, 0, weight=0.6, alignment=0.002, score=0.9, share=0.7, standing=Standing(usefulness=0.9, seen=1)),
    score(BORIS, 0, weight=0.4, alignment=-0.001, refused="a copy of another contribution"),
    a_round(1),
    score(ANNA, 1, random_delta=0.0012, own_delta=0.0021, place=2, among=9, weight=0.25, alignment=0.00031),
    missed(BORIS, 1, factors={"away": 0.75}, standing=Standing(missed=1)),
    credit(0, anna=3.0, dora=1.0),
    a_round(2, network_fault=True),
    score(ANNA, 2, score=0.8, share=1.0, standing=Standing(usefulness=0.8, seen=3, verdict=1)),
    missed(BORIS, 2, standing=Standing(missed=1)),
    missed(CARLA, 2),
    credit(1, anna=4.0),
    a_round(3),
    score(ANNA, 3, score=0.7, standing=Standing(usefulness=0.7, verdict=1)),
    missed(BORIS, 3, standing=Standing(missed=2)),
    missed(
        CARLA,
        3,
        score=0.0,
        factors={"computation": 0.0, "sync": 0.0, "harmful": 0.25, "away": 0.5625, "later": 0.5},
        standing=Standing(usefulness=0.6, verdict=-1, missed=2, unsynced=3, harmed=[True] * 5 + [False] * 3),
    ),
]


def test_the_leaderboard_adds_up_what_was_paid_and_counts_whose_fault_a_miss_was() -> None:
    rows = leaderboard(LEDGER)
    assert [(row.peer, row.credit, row.share) for row in rows][:2] == [(ANNA, 7.0, 7 / 8), (DORA, 1.0, 1 / 8)]
    assert {row.peer for row in rows} == {ANNA, BORIS, CARLA, DORA}
    counts = {row.peer: (row.contributed, row.refused, row.missed, row.network) for row in rows}
    assert counts == {ANNA: (4, 0, 0, 0), BORIS: (0, 1, 2, 1), CARLA: (0, 0, 1, 1), DORA: (0, 0, 0, 0)}
    assert {row.peer: (row.score, row.verdict) for row in rows} == {
        ANNA: (0.7, "trained"),
        BORIS: (0.0, "open"),
        CARLA: (0.0, "not trained"),
        DORA: (0.0, "open"),
    }


def test_a_ledger_that_paid_nothing_has_no_shares() -> None:
    assert [row.share for row in leaderboard(LEDGER[:6])] == [0.0, 0.0]
    assert leaderboard([]) == []


def test_a_history_has_each_round_with_what_was_paid_for_it_later() -> None:
    rounds = history(LEDGER, ANNA)
    assert [(one.round, one.outcome, one.paid) for one in rounds] == [
        (0, "contributed", 3.0),
        (1, "contributed", 4.0),
        (2, "contributed", 0.0),
        (3, "contributed", 0.0),
    ]
    assert (rounds[1].random_delta, rounds[1].own_delta, rounds[1].error) == (0.0012, 0.0021, 0.013)
    assert (rounds[1].place, rounds[1].among) == (2, 9)
    assert [one.outcome for one in history(LEDGER, BORIS)] == ["refused", "missed", "network", "missed"]
    assert [(one.round, one.outcome, one.paid) for one in history(LEDGER, DORA)] == [(0, None, 1.0)]


def test_modules_are_kept_apart() -> None:
    both = [
        a_round(5, network_fault=True, module="stage/0"),
        a_round(5, module="stage/1"),
        missed(ANNA, 5, module="stage/0"),
        missed(ANNA, 5, module="stage/1"),
        credit(5, "stage/1", anna=1.0),
    ]
    rounds = history(both, ANNA)
    assert [(one.module, one.outcome, one.paid) for one in rounds] == [
        ("stage/0", "network", 0.0),
        ("stage/1", "missed", 1.0),
    ]
    with pytest.raises(UserError, match=r"2 \(stage/0\), 3 \(stage/1\)"):
        find_score(both, ANNA, 5)


def explained(peer: str, last: int = 20) -> str:
    rows = leaderboard(LEDGER)
    row = find_peer(rows, peer)
    return "\n".join(explain(row, rows.index(row) + 1, history(LEDGER, peer), last))


def test_an_explanation_names_every_factor_penalty_and_missed_round() -> None:
    text = explained(CARLA)
    assert "not trained" in text and "0 contributed, 0 refused, 1 missed; 1 missed by the network" in text
    for reason in (
        "x 0 computation: it was found not to train",
        "x 0 sync: it began 3 rounds in a row with other parameters",
        "x 0.25 harmful: 5 of its last 8 contributions made the loss worse",
        "x 0.5625 away: it missed 2 rounds in a row",
        "x 0.5 later",
    ):
        assert reason in text
    text = explained(BORIS, last=0)
    assert "missed: 1, 3" in text and "missed by the network's fault: 2" in text and "refused: 0" in text


def test_an_explanation_has_the_numbers_of_each_round() -> None:
    text = explained(ANNA)
    assert "credit    7, 87.5% of all that was paid: place 1" in text
    assert "3 up to round 0, 7 up to round 1" in text
    line = next(line for line in text.splitlines() if line.startswith("round     1"))
    for part in (
        "weight 0.2500",
        "alignment +3.100e-04 (sum within 1.3%)",
        "random data +1.200e-03",
        "its own data +2.100e-03",
        "fits its own samples as number 2 of 9",
        "paid 4",
    ):
        assert part in line
    assert "a copy of another contribution" in explained(BORIS)
    assert "round     0" not in explained(ANNA, last=3) and "the last 3 of 4 rounds" in explained(ANNA, last=3)


def test_a_strangers_text_cannot_move_the_cursor() -> None:
    entries: list[AnyEntry] = [a_round(0), score(ANNA, 0, refused="\x1b[2Jgone\nround 1", factors={"\x1b[31mred": 0.5})]
    lines = explain(leaderboard(entries)[0], 1, history(entries, ANNA), 5)
    assert all(line.isprintable() for line in lines) and any("?[2Jgone?round 1" in line for line in lines)


def test_credit_over_time_never_falls_and_ends_with_the_sum() -> None:
    curves = credit_over_time([*LEDGER, credit(7, "stage/1", anna=0.5), credit(7, anna=0.25)], [ANNA, BORIS])
    assert curves == {ANNA: [(0, 3.0), (1, 7.0), (7, 7.75)], BORIS: []}


def test_a_peer_is_found_by_the_first_characters_of_its_id() -> None:
    rows = leaderboard(LEDGER)
    assert find_peer(rows, ANNA[:20]).peer == ANNA and find_peer(rows, ANNA[8:30]).peer == ANNA
    assert find_peer(rows, BORIS).peer == BORIS
    for prefix, problem in (("12D3KooW", "more characters"), ("nobody", "no such peer"), ("", "no such peer")):
        with pytest.raises(UserError, match=problem):
            find_peer(rows, prefix)


def test_the_entry_of_a_score_is_found() -> None:
    assert LEDGER[find_score(LEDGER, BORIS, 2)] == LEDGER[9]
    with pytest.raises(UserError, match="--round 9"):
        find_score(LEDGER, BORIS, 9)


def test_csv_has_every_number_of_every_entry() -> None:
    file = io.BytesIO()
    write_csv(LEDGER, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue().decode())))
    assert sum(float(row["paid"]) for row in rows if row["kind"] == "credit") == 8.0
    assert [row["kind"] for row in rows].count("score") == sum(isinstance(one, ScoreEntry) for one in LEDGER)
    row = next(row for row in rows if row["entry"] == "4")
    assert (row["peer"], float(row["random_delta"]), row["round"]) == (ANNA, 0.0012, "1")
    assert "away=0.5625" in next(row for row in rows if row["entry"] == "15")["factors"]
    assert float(rows[0]["loss_before"]) == 3.5


def test_json_has_all_entries_and_the_head() -> None:
    head = Head(RunId("a" * 52), DORA, len(LEDGER), HASH, 5, bytes(64))
    file = io.BytesIO()
    write_json(head, LEDGER, file)
    document = json.loads(file.getvalue())
    assert msgspec.convert(document["head"], Head) == head
    assert msgspec.convert(document["entries"], list[AnyEntry]) == LEDGER
    empty = io.BytesIO()
    write_json(head, [], empty)
    assert json.loads(empty.getvalue())["entries"] == []


def test_a_plot_is_an_image_and_without_matplotlib_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    write_plot(credit_over_time(LEDGER, [ANNA, BORIS]), file, "png")
    assert file.getvalue().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"potluck\[plot\]"):
        write_plot({}, io.BytesIO(), "png")


def test_validators_are_listed_with_what_they_earned_and_their_checks() -> None:
    def paid(number: int, *, passed: bool, **earned: float) -> CreditEntry:
        names = {"anna": ANNA, "boris": BORIS}
        claim = Claim(validator=BORIS, claimed=1.0, found=1.0 if passed else 2.0, passed=passed)
        return CreditEntry(
            module="model",
            round=number,
            opinions={ANNA: {}, BORIS: {}},
            incentive={},
            claim=claim,
            paid={},
            earned={names[name]: amount for name, amount in earned.items()},
        )

    rows = validators([paid(0, passed=True, anna=4.0, boris=6.0), paid(1, passed=False, anna=10.0)])
    assert [(row.peer, row.earned, row.passed, row.failed) for row in rows] == [(ANNA, 14.0, 0, 0), (BORIS, 6.0, 1, 1)]
    file = io.BytesIO()
    write_csv([paid(0, passed=True, anna=4.0)], file)
    assert file.getvalue().decode().splitlines()[1].endswith(",4.0")
