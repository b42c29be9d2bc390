"""A run with a validator, on real peers: who earned what is written down, verifies, travels, and survives a kill."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from potluck.incentives.audit import Audit
from potluck.incentives.entries import RoundEntry
from potluck.incentives.ledger import Ledger, compare_files, verify_file
from potluck.peer.home import Home
from potluck.peer.links import accept, offer
from potluck.peer.party import Event, Member, Party
from potluck.peer.validating import audit_rounds

from real import potluck, run_party, sockets_of, write_manifest

pytestmark = pytest.mark.slow

SCORED = "incentives.round.scored"
#: Short rounds of few steps: most of each is left to the validator, and to whatever else runs here.
QUICK: dict[str, Any] = {"rounds__seconds": 3.0, "rounds__exchange_seconds": 1.4, "rounds__steps": 3}


async def start(party: Party) -> tuple[Member, Member, Member]:
    """(organizer, worker, validator), all of them in the run. The manifest names the validator."""
    me = Home(party.root / "val").open().identity().peer_id
    manifest = write_manifest(party.root, incentives__validators=[me], **QUICK)
    organizer = await party.start("org", "host", str(manifest))
    invite = str(organizer.status["invite"])
    # The worker's machine earns for the account that the organizer's is.
    account, machine = Home(party.root / "org"), Home(party.root / "w1").open()
    accept(machine, machine.identity(), offer(account, account.identity(), machine.identity().peer_id, time.time()))
    worker, validator = await asyncio.gather(party.start("w1", "join", invite), party.start("val", "validate", invite))
    return organizer, worker, validator


def paid_to(validator: Member, *members: Member, since: int = 0) -> list[int]:
    """Rounds from `since` on for which all of these were paid: that is done along with the next one that is scored."""
    peers, scored = {str(member.status["peer"]) for member in members}, validator.of(SCORED)
    rounds = [before["round"] for before, event in pairwise(scored) if peers <= event["paid"].keys()]
    return [round_ for round_ in rounds if round_ >= since]


def linked(validator: Member) -> bool:
    """Whether it wrote a link down: that is said just before the round that it goes along with is."""
    kinds = [event.get("event") for event in validator.events]
    return SCORED in kinds[kinds.index("incentives.link.written") :] if "incentives.link.written" in kinds else False


async def ledger(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`potluck ledger`, while the peers go on."""
    done = await asyncio.to_thread(potluck, "ledger", *map(str, arguments))
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> Event:
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_credit_is_paid_and_the_ledger_can_be_verified_proven_audited_and_fetched() -> None:
    async def body(party: Party) -> None:
        organizer, worker, validator = await start(party)
        await party.until("credit for both", lambda: bool(paid_to(validator, organizer, worker)), 90)
        await party.until("a link in the ledger", lambda: linked(validator), 60)
        round_, home = paid_to(validator, organizer, worker)[0], ("--home", validator.home)
        copy, proof, other = party.root / "copy.ledger", party.root / "proof.json", ("--home", party.root / "other")
        invite, peer = worker.status["invite"], worker.status["peer"]
        verified, audited, fetched, _ = await asyncio.gather(
            ledger("verify", *home, "--json"),
            ledger("audit", "--round", round_, *home, "--json"),
            ledger("fetch", invite, "-o", copy, *other, "--json"),
            ledger("prove", "--peer", peer, "--round", round_, *home, "-o", proof),
        )
        assert last_line(verified)["validator"] == validator.status["peer"]
        audit = last_line(audited)
        assert (audit["round"], audit["peers"], audit["differences"]) == (round_, 2, [])
        first = last_line(fetched)
        assert first["validator"] == validator.status["peer"] and first["size"] == first["new"] > 0
        assert first["published_round"] >= round_
        shown, proven, _ = await asyncio.gather(
            ledger("show", copy, "--json"),
            ledger("verify", proof, "--json"),
            ledger("verify", copy, "--against", validator.folder.ledger),
        )
        rows = {row["peer"]: row for row in last_line(shown)["peers"]}
        assert rows.keys() == {organizer.status["peer"], peer}  # who validates earns nothing
        assert all(row["credit"] > 0 for row in rows.values())
        credits = {e["round"] for e in validator.of(SCORED) if e["paid"]}
        assert sum(row["credit"] for row in rows.values()) <= 100.0 * len(credits) + 1e-6
        account = next(one for one in last_line(shown)["accounts"] if one["account"] == organizer.status["peer"])
        assert [one["peer"] for one in account["machines"]] == [organizer.status["peer"], peer]
        assert account["credit"] == pytest.approx(sum(row["credit"] for row in rows.values()))
        (scoring,) = last_line(shown)["validators"]
        assert scoring["peer"] == validator.status["peer"] and scoring["earned"] >= 10.0
        entry = last_line(proven)["entry"]
        assert (entry["kind"], entry["peer"], entry["round"]) == ("score", peer, round_)

        grown = lambda: validator.last_of(SCORED)["ledger_size"] > first["size"]  # noqa: E731
        await party.until("another round", grown, 60)
        mine = "--home", worker.home  # which knows the run: no invite is needed
        again = last_line(await ledger("fetch", worker.status["run"][:10], "-o", copy, *mine, "--json"))
        assert again["size"] > first["size"] == again["size"] - again["new"]
        await party.leave_all(party.members)
        compare_files(copy, validator.folder.ledger)
        assert [m.process.returncode for m in party.members if m.process] == [0, 0, 0]
        assert sockets_of(party.root) == []
        with Ledger.read(validator.folder.ledger) as left:
            assert left.head_at(again["size"])
        for where in (100, copy.stat().st_size // 2, copy.stat().st_size - 1):
            damage(copy, party.root / "damaged.ledger", where)
            refused = await ledger("verify", party.root / "damaged.ledger", code=10)
            assert "damaged.ledger" in refused.stderr

    run_party(body)


def damage(good: Path, bad: Path, where: int) -> None:
    data = bytearray(good.read_bytes())
    data[where] ^= 1
    bad.write_bytes(data)


def test_a_validator_that_is_killed_takes_its_ledger_up_again_and_nobody_misses_a_round_for_it() -> None:
    async def body(party: Party) -> None:
        organizer, worker, validator = await start(party)
        await party.until("credit for both", lambda: bool(paid_to(validator, organizer, worker)), 90)
        before = party.root / "before.ledger"
        with Ledger.read(validator.folder.ledger) as ledger_before:
            ledger_before.export(before)
        await party.kill(validator)
        acknowledged, killed_in = validator.last_of(SCORED), worker.last["round"]
        assert verify_file(validator.folder.ledger).head.size >= acknowledged["ledger_size"]

        await party.restart(validator, "validate", str(worker.status["invite"]))
        resumed = acknowledged["round"] + 2
        await party.until("credit again", lambda: bool(paid_to(validator, organizer, worker, since=resumed)), 90)
        round_ = paid_to(validator, organizer, worker, since=resumed)[0]
        await party.leave_all(party.members)

        compare_files(before, validator.folder.ledger)  # one history
        with Ledger.read(validator.folder.ledger) as after:
            # It remembered of everybody what its ledger says: the rounds since are as if it had never died.
            found: list[Audit] = []
            audit_rounds(validator.folder, after, None, "cpu", None, [round_], found.append)
            assert [one.differences for one in found] == [[]]
            assert after.head_at(acknowledged["ledger_size"])
            rounds = [entry.round for entry in after.entries() if isinstance(entry, RoundEntry)]
        assert rounds == sorted(set(rounds)) and rounds[0] < killed_in < rounds[-1]
        for member in (organizer, worker):
            applied = [event["round"] for event in member.applied]
            assert applied == list(range(applied[0], applied[-1] + 1)) and applied[-1] > killed_in + 2
            late = [event["round"] for event in member.applied[2:] if not event["contributed"]]
            assert len(late) <= 1, late  # a busy machine may be too late once; that is nobody's fault
        assert sockets_of(party.root) == []

    run_party(body)
