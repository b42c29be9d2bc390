"""Validators in whole simulated runs: steering, credit, audit, restart, disagreement."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import potluck.sim.world as world
from potluck.errors import LedgerError, PotluckError, UserError
from potluck.incentives.audit import Audit, Rules, audit
from potluck.incentives.entries import CreditEntry, RoundEntry
from potluck.incentives.judge import Judge
from potluck.incentives.ledger import Ledger
from potluck.incentives.validator import Terms, Validator
from potluck.net.blobs import BlobId, BlobStore
from potluck.sim.peer import identity_of
from potluck.sim.plan import Plan
from potluck.sim.report import Report, amounts
from potluck.sim.stand_in import MODULE, Model
from potluck.swarm.codecs import make_codec
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The simulated peers' disks as they are at the end."""
    conclude = world.World._conclude

    def keep(self: world.World) -> Report:
        shutil.copytree(self.root, tmp_path / "disks", dirs_exist_ok=True)
        return conclude(self)

    monkeypatch.setattr(world.World, "_conclude", keep)
    yield tmp_path / "disks"


def plan(peers: int = 6, validators: int = 1, rounds: int = 10, **changed: Any) -> Plan:
    base = {"seconds": 20.0, "exchange_seconds": 6.0, "steps": 4, "step_seconds": 3.0, "parameters": 256}
    return Plan.of(
        {"name": "scored", "peers": peers + validators, "validators": validators, "rounds": rounds, **base, **changed}
    )


def run(one: Plan) -> Report:
    report = world.simulate(one)
    assert report.violations == [], report.violations[:3]
    return report


class Books:
    """A simulated validator's ledger and archive, and what an audit needs besides."""

    def __init__(self, one: Plan, folder: Path, number: int) -> None:
        self.folder, self.model, self.plan = folder / str(number), Model(one), one
        codec = make_codec(one.codec, one.codec_parameters)
        self.rules = Rules(self.model.layout, codec, OuterStep(1.0, one.momentum), True)
        first = one.peers - one.validators
        self.terms = Terms(
            {identity_of(one.seed, n).peer_id: 1.0 for n in range(first, one.peers)},
            one.emission,
            one.validator_emission,
        )
        self.archive = BlobStore(self.folder / "archive", 2**40)

    def ledger(self) -> Ledger:
        return Ledger.read(self.folder / "ledger.sqlite")

    def audit(self, round_: int) -> Audit:
        def judge(run: str, validator: Any) -> Judge:
            testable = self.plan.model != "quadratic"
            model = self.model
            return Judge(run, validator, model.evaluator(), model.corpus, model.assigned, testable=testable)

        with self.ledger() as ledger:
            return audit(ledger, self.archive, self.rules, judge, self.terms, MODULE, Round(round_))


def test_credit_is_paid_for_every_round_in_proportion_to_incentive(disks: Path) -> None:
    one = plan()
    report = run(one)
    totals = amounts(report, "paid", 6)
    assert len(totals) == 6 and sum(totals.values()) == pytest.approx(100.0 * 9)  # the last round is not paid yet
    assert max(totals.values()) < 1.2 * min(totals.values())
    with Books(one, disks, 6).ledger() as ledger:
        kinds = [type(entry) for entry in ledger.entries()]
    assert kinds.count(RoundEntry) == 10 and kinds.count(CreditEntry) == 9


def test_a_round_that_a_validator_never_paid_is_found(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pay = Validator._pay

    async def skipping(self: Validator) -> list[CreditEntry]:
        self._unpaid.pop(Round(3), None)
        return await pay(self)

    monkeypatch.setattr(Validator, "_pay", skipping)
    one = plan(rounds=8)
    run(one)
    books = Books(one, disks, 6)
    assert books.audit(3).differences == ["a later round is paid, and this one never was"]
    assert books.audit(4).differences == books.audit(7).differences == []


def test_scores_do_not_part_the_replicas(disks: Path) -> None:
    """Everybody averages with the same weights, so that all hold the same bits, newcomers as well."""
    one = plan(rounds=12)
    one.lie(peer=1, round=0, lie="random", at=0.0).join(2, 5, rounds=0.5).crash(3, 6, rounds=2)
    report = run(one)
    assert [row["digests"] for row in report.rounds[-3:]] == [1, 1, 1]
    assert all(row["shares"][1] < 0.02 for row in report.scores[-3:])


@pytest.mark.parametrize("model", ["quadratic", "llama"])
def test_any_round_can_be_scored_again_by_anybody(disks: Path, model: str) -> None:
    one = plan(rounds=12, model=model, momentum=0.5, codec="sparse" if model == "llama" else "int8")
    one.lie(peer=1, round=2, lie="withhold", at=0.0).lie(peer=2, round=0, lie="random", at=0.0)
    one.crash(3, 4, rounds=2)
    run(one)
    books = Books(one, disks, 6)
    for round_ in (0, 1, 5, 9, 11):
        found = books.audit(round_)
        assert found.differences == [] and found.largest_error < 1e-6
    with pytest.raises(LedgerError, match="no round 12"):
        books.audit(12)


@pytest.mark.slow
def test_every_round_of_fifty_scores_the_same_in_another_process(disks: Path) -> None:
    one = plan(5, rounds=50, model="llama", codec="sparse", momentum=0.3)
    one.lie(peer=1, round=0, lie="copy", at=0.0).lie(peer=2, round=20, lie="lazy", at=0.0)
    one.crash(3, 10, rounds=3).crash(5, 30, rounds=1.2)
    run(one)
    command = [sys.executable, __file__, one.model_dump_json(), str(disks), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["rounds"]) >= 48, "while it was dead it judged nothing"
    assert found["differences"] == [] and found["largest_error"] < 1e-6


def test_a_validator_that_wrote_something_else_is_found(disks: Path) -> None:
    one = plan(rounds=6)
    run(one)
    books = Books(one, disks, 6)
    with books.ledger() as ledger:
        entries = list(ledger.entries())
    import msgspec

    friend = next(n for n, e in enumerate(entries) if e.round == 4 and hasattr(e, "score"))
    changed = msgspec.structs.replace(entries[friend], score=9.0)
    (books.folder / "ledger.sqlite").unlink()
    with Ledger.open(books.folder / "ledger.sqlite", entries[0].run, identity_of(one.seed, 6)) as forged:  # type: ignore[union-attr]
        forged.append([*entries[:friend], changed, *entries[friend + 1 :]], 1.0)
    assert any("score is 9.0" in difference for difference in books.audit(4).differences)
    assert books.audit(2).differences == []


def test_an_archive_that_lacks_something_says_what(disks: Path) -> None:
    one = plan(rounds=4)
    run(one)
    books = Books(one, disks, 6)
    with books.ledger() as ledger:
        blob = next(e.blob for e in ledger.entries() if e.round == 2 and getattr(e, "came", False))  # type: ignore[union-attr]
    books.archive.remove(BlobId(blob))
    with pytest.raises(LedgerError, match="lacks the contribution"):
        books.audit(3)


def test_a_validator_that_dies_takes_its_ledger_up_where_it_ended(disks: Path) -> None:
    one = plan(rounds=12)
    one.crash(6, 4, rounds=2.5)
    run(one)
    books = Books(one, disks, 6)
    with books.ledger() as ledger:
        rounds = [entry.round for entry in ledger.entries() if isinstance(entry, RoundEntry)]
    assert rounds == sorted(set(rounds)) and set(rounds) >= {0, 1, 2, 10, 11}
    assert all(books.audit(round_).differences == [] for round_ in (rounds[-4], rounds[-1]))


@pytest.mark.parametrize("at", [0.05, 0.2, 0.5, 0.95])
def test_a_validator_that_is_back_within_the_round_judges_no_round_twice(disks: Path, at: float) -> None:
    one = plan(rounds=8)
    one.crash(6, 4, rounds=0.1, at=at)
    run(one)
    books = Books(one, disks, 6)
    with books.ledger() as ledger:
        entries = [
            (type(entry), entry.round) for entry in ledger.entries() if isinstance(entry, RoundEntry | CreditEntry)
        ]
    assert len(entries) == len(set(entries))
    for round_ in range(8):
        if (RoundEntry, round_) in entries:
            assert books.audit(round_).differences == []


def test_without_validators_for_long_all_count_alike_again(disks: Path) -> None:
    """A liar's weight is back, too: what scores are for ends with the validators. Newcomers hold the same state."""
    one = plan(rounds=20)
    one.lie(1, 0, lie="random", at=0.0).crash(6, 6).join(2, 12)
    report = run(one)
    assert report.rounds[-1]["contributed"] == 8 and [row["digests"] for row in report.rounds[-4:]] == [1] * 4
    assert not any(row["round"] > 7 for row in report.scores) and report.scores[-1]["shares"][1] < 0.02


def test_a_link_that_was_down_costs_the_rounds_that_it_was_down() -> None:
    one = plan(rounds=24)
    one.freeze(2, 10, rounds=3)
    report = run(one)
    shares = report.scores[-1]["shares"]
    others = sorted(share for peer, share in shares.items() if peer != 2)
    assert shares[2] > 0.7 * others[2]
    paid_rounds = [row for row in report.scores if 2 in row["paid"]]
    assert 18 <= len(paid_rounds) <= 21


def test_three_validators_agree_on_who_earned_what(disks: Path) -> None:
    one = plan(validators=3, rounds=10)
    one.lie(peer=1, round=0, lie="sign", at=0.0)
    report = run(one)
    books = [amounts(report, "paid", number) for number in (6, 7, 8)]
    for peer in range(6):
        assert books[0].get(peer, 0.0) == pytest.approx(books[1].get(peer, 0.0), rel=0.05, abs=1.0)
    assert all(book.get(1, 0.0) < 10 for book in books)


def test_a_validator_that_copies_weights_earns_nothing(disks: Path) -> None:
    """In the books of those who evaluate; and every check can be done again by anybody."""
    one = plan(5, validators=3, rounds=12, model="llama", codec="sparse")
    one.lie(peer=7, round=0, lie="copy_weights", at=0.0)
    report = run(one)
    copier = identity_of(one.seed, 7).peer_id
    for number in (5, 6):
        books = amounts(report, "earned", number)
        assert sum(books.values()) == pytest.approx(10.0 * 11)
        assert books.get(7, 0.0) == 0.0 and all(books[other] > 20 for other in (5, 6))
        with Books(one, disks, number).ledger() as ledger:
            checks = {e.round: e.claim for e in ledger.entries() if isinstance(e, CreditEntry) and e.claim}
        assert {check.validator == copier for check in checks.values()} == {True, False}
        assert all(check.passed == (check.validator != copier) for check in checks.values())
        again = [Books(one, disks, number).audit(round_) for round_ in (min(checks), max(checks))]
        assert all(found.differences == [] for found in again)


def test_a_validator_whose_claims_are_false_later_on_earns_until_it_is_checked() -> None:
    one = plan(4, validators=3, rounds=16, model="llama", codec="sparse")
    one.lie(peer=6, round=8, lie="copy_weights", at=0.0)
    rows = [row for row in run(one).scores if row["validator"] == 4]
    assert any(6 in row["earned"] for row in rows if row["round"] <= 8)
    assert not any(6 in row["earned"] for row in rows if row["round"] >= 14)


def test_a_colluding_validator_moves_little(disks: Path) -> None:
    def one(*lies: int) -> dict[int, float]:
        a = plan(validators=3, rounds=16)
        for liar in lies:
            a.lie(peer=liar, round=0, lie="collude", at=0.0)
        totals = amounts(run(a), "paid", 6)
        return {peer: amount / sum(totals.values()) for peer, amount in totals.items()}

    calm, colluded = one(), one(8)
    assert all(abs(colluded[peer] / calm[peer] - 1) <= 0.05 for peer in range(6))


def test_a_plan_of_nobody_but_validators_is_refused() -> None:
    with pytest.raises((UserError, PotluckError), match="validators is 3"):
        Plan.of({"name": "x", "peers": 3, "validators": 3})


def audit_all(plan_json: str, folder: str, number: str) -> None:
    books = Books(Plan.model_validate_json(plan_json), Path(folder), int(number))
    with books.ledger() as ledger:
        rounds = [entry.round for entry in ledger.entries() if isinstance(entry, RoundEntry)]
    audits = [books.audit(round_) for round_ in rounds]
    differences = [difference for one in audits for difference in one.differences]
    largest = max(one.largest_error for one in audits)
    print(json.dumps({"rounds": rounds, "differences": differences, "largest_error": largest}))


if __name__ == "__main__":
    audit_all(*sys.argv[1:])
