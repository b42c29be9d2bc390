"""Ledgers as pages show them: verified, indexed, proven; and what is damaged is not shown."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sample_run import VALIDATOR, peer

from potluck.dht.manifest import RunId
from potluck.errors import LedgerError
from potluck.incentives.entries import CreditEntry, LinkEntry, ScoreEntry, Standing
from potluck.incentives.ledger import Ledger
from potluck.incentives.report import history, leaderboard
from potluck.net.identity import Identity
from potluck.net.links import make_link, make_offer
from potluck.peer.home import RunFolder
from potluck.peer.web import books as module
from potluck.peer.web.books import PROOFS, Book, Shelf, Stamp
from potluck.peer.web.watch import Watch


def copy_of(folder: RunFolder) -> Path:
    return folder.ledgers / f"{VALIDATOR.peer_id}.ledger"


def test_the_index_gives_what_a_pass_over_all_entries_gives(folder: RunFolder) -> None:
    book = Book.read(copy_of(folder))
    with Ledger.read(copy_of(folder)) as ledger:
        entries = list(ledger.entries())
    assert book.rows == leaderboard(entries)
    for n in (0, 5, 7):
        assert book.rounds(peer(n)) == history(entries, peer(n))[-module.ROUNDS :]
    assert [one.round for one in book.scored(peer(0))] == [one.round for one in history(entries, peer(0))[::-1]]
    assert book.scored("nobody") == [] and book.why("nobody") == [] and book.row("nobody") is None
    book.close()


def test_a_long_history_is_cut_at_its_beginning(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 10)
    book = Book.read(copy_of(folder))
    rounds = book.rounds(peer(0))
    assert [one.round for one in rounds] == list(range(50, 60))
    assert all(one.error is not None for one in rounds) and all(one.paid for one in rounds[:-1])
    book.close()


def test_every_shown_score_is_proven_against_the_signed_root(folder: RunFolder) -> None:
    book = Book.read(copy_of(folder))
    scored = book.scored(peer(1))
    assert len(scored) > PROOFS
    assert all(one.proof and one.proof.holds and one.proof.path for one in scored[:PROOFS])
    assert all(one.proof is None for one in scored[PROOFS:])
    book.close()


def test_a_proof_of_another_entry_does_not_hold(folder: RunFolder) -> None:
    book = Book.read(copy_of(folder))
    one, other = book.rounds(peer(1))[-1], book._scores[peer(3)][-1]
    proof = book._proof(other, one)
    assert not proof.holds and proof.problem
    book.close()


def test_a_damaged_ledger_is_told_and_not_shown(folder: RunFolder, tmp_path: Path) -> None:
    data = bytearray(copy_of(folder).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.ledger").write_bytes(data)
    with pytest.raises(LedgerError):
        Book.read(tmp_path / "x.ledger")
    shelf = Shelf(tmp_path, tmp_path / "own.sqlite")
    books, wrong = shelf.books()
    assert books == [] and len(wrong) == 1 and "not used" in wrong[0] and str(tmp_path) not in wrong[0]


def test_a_ledger_is_read_again_when_it_has_changed_but_not_all_the_time(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ledger"
    shutil.copy(copy_of(folder), path)
    shelf = Shelf(tmp_path, tmp_path / "own.sqlite")
    (first,), _ = shelf.books()
    stamp = shelf.stamp()
    assert shelf.books()[0] == [first] and shelf.stamp() == stamp
    path.write_bytes(b"potluck.ledger.1 but damaged")
    assert shelf.stamp() != stamp and shelf.books()[0] == [first]  # it was read just now
    monkeypatch.setattr(shelf, "_again", {})
    assert shelf.books()[0] == [] and len(shelf.books()[1]) == 1
    path.unlink()
    assert shelf.books() == ([], [])


def test_what_nobody_looks_at_is_closed_and_opened_again(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(folder.ledgers, folder.ledger)
    assert len(shelf.books()[0]) == 1
    shelf.rest()
    assert shelf._books
    monkeypatch.setattr(module, "IDLE_SECONDS", -1.0)
    shelf.rest()
    assert not shelf._books
    shelf._again.clear()
    assert len(shelf.books()[0]) == 1
    shelf.close()


def test_credit_is_summed_by_account(tmp_path: Path) -> None:
    anna, laptop = (Identity.create(tmp_path / name) for name in ("anna", "laptop"))
    entries = [
        ScoreEntry(module="m", round=1, peer=laptop.peer_id, came=True, standing=Standing()),
        CreditEntry(
            module="m", round=1, opinions={}, incentive={}, paid={laptop.peer_id: 5.0, anna.peer_id: 2.0}, earned={}
        ),
        LinkEntry(module="m", round=2, link=make_link(make_offer(anna, laptop.peer_id, 1_700_000_000), laptop)),
    ]
    with Ledger.open(tmp_path / "ledger", RunId("a" * 52), VALIDATOR) as ledger:
        ledger.append(entries, 1_700_000_000.0)
    book = Book.read(tmp_path / "ledger")
    assert book.account(laptop.peer_id) == book.account(anna.peer_id) == (anna.peer_id, 7.0)
    assert book.account("nobody") == ("nobody", 0.0)
    assert any(anna.peer_id in line for line in book.why(laptop.peer_id))
    book.close()


def test_a_file_that_is_gone_has_no_stamp(tmp_path: Path) -> None:
    assert Stamp.of(tmp_path / "none") is None


def test_the_leaderboard_joins_what_was_heard_to_what_was_paid(folder: RunFolder) -> None:
    signed = folder.manifest()
    assert signed
    watch = Watch(folder, signed.manifest, None)
    watch.look()
    told = watch.contributors(100, 0, None)
    assert told and told.ledger and told.ledger.validator == VALIDATOR.peer_id and told.problems == []
    assert [row.place for row in told.rows] == list(range(1, 9))
    assert {row.name for row in told.rows} >= {"anna's attic", "<img src=x onerror=alert(1)>"}
    assert [curve.credit[-1] for curve in told.curves] == sorted((c.credit[-1] for c in told.curves), reverse=True)
    part = watch.contributors(3, 2, VALIDATOR.peer_id)
    assert part and [row.peer for row in part.rows] == [row.peer for row in told.rows[2:5]] and part.total == 8
    assert watch.contributors(3, 0, peer(0)) is None
    one, nobody = (watch.contributors(3, 0, only=who) for who in (peer(4), "nobody"))
    assert one and [row.peer for row in one.rows] == [peer(4)] and nobody and nobody.rows == []
    page = watch.peer(peer(5))
    assert page and page.standing and page.heard and page.scored and any("computation" in line for line in page.why)
    watch.close()
