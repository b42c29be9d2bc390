"""Credit by account: what earlier links and later ones do to a ledger's sums, and how links come into a ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from potluck.dht.records import Links, Signed
from potluck.errors import NetworkError
from potluck.incentives.accounts import Accounts
from potluck.incentives.entries import AnyEntry, CreditEntry, LinkEntry, ScoreEntry, Standing
from potluck.incentives.link_reader import MAX_AHEAD_SECONDS, READS_PER_ROUND, RECENT_ROUNDS, LinkReader
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.links import End, Link, make_end, make_link, make_offer


def identity(number: int) -> Identity:
    return Identity(Path("/nowhere"), Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


ANNA, LAPTOP, DESKTOP, THIEF, SAFE = map(identity, range(1, 6))
NOW = 1_700_000_000


def link(peer: Identity, account: Identity, at: int = NOW) -> Link:
    return make_link(make_offer(account, peer.peer_id, at), peer)


def written(one: Link | End, round_: int = 0) -> LinkEntry:
    return LinkEntry(module="m", round=round_, link=one)


def end(peer: Identity, account: Identity, at: int) -> End:
    return make_end(account, peer.peer_id, at)


def score(peer: Identity, round_: int = 0, came: bool = True) -> ScoreEntry:
    return ScoreEntry(module="m", round=round_, peer=peer.peer_id, came=came, standing=Standing())


def paid(*amounts: tuple[Identity, float], earned: tuple[tuple[Identity, float], ...] = ()) -> CreditEntry:
    to = [{peer.peer_id: amount for peer, amount in pairs} for pairs in (amounts, earned)]
    return CreditEntry(module="m", round=0, opinions={}, incentive={}, paid=to[0], earned=to[1])


def sums(*entries: AnyEntry) -> dict[str, dict[str, float]]:
    """By account, each machine's credit."""
    return {
        row.account: {one.peer: one.credit for one in row.machines if one.credit or not one.linked}
        for row in Accounts.of(entries).rows()
    }


def test_without_links_everybody_is_an_account() -> None:
    assert sums(paid((ANNA, 2.0), (LAPTOP, 1.0)), paid((ANNA, 3.0))) == {
        ANNA.peer_id: {ANNA.peer_id: 5.0},
        LAPTOP.peer_id: {LAPTOP.peer_id: 1.0},
    }


def test_machines_earn_for_one_account_what_they_earned_before_included() -> None:
    entries = [
        paid((ANNA, 1.0), (LAPTOP, 2.0)),
        written(link(LAPTOP, ANNA)),
        paid((LAPTOP, 4.0), earned=((ANNA, 0.5),)),
    ]
    (row,) = Accounts.of(entries).rows()
    assert (row.account, row.credit) == (ANNA.peer_id, 7.5)
    assert [(one.peer, one.credit, one.linked) for one in row.machines] == [
        (ANNA.peer_id, 1.5, True),
        (LAPTOP.peer_id, 6.0, True),
    ]


def test_what_a_lost_machine_earned_stays_and_what_a_finder_earns_with_it_does_not_count() -> None:
    entries = [
        score(LAPTOP),
        written(link(LAPTOP, ANNA)),
        paid((LAPTOP, 4.0)),
        written(link(LAPTOP, THIEF, NOW + 1)),  # the finder's try, before anybody noticed: nothing
        paid((LAPTOP, 1.0)),
        written(end(LAPTOP, ANNA, NOW + 2)),
        paid((LAPTOP, 8.0)),
        written(link(LAPTOP, THIEF, NOW + 3)),
        paid((LAPTOP, 16.0)),
    ]
    assert sums(*entries) == {ANNA.peer_id: {LAPTOP.peer_id: 5.0}, THIEF.peer_id: {LAPTOP.peer_id: 24.0}}


def test_a_rotated_key_takes_its_credit_and_its_machines_along() -> None:
    entries = [
        paid((ANNA, 1.0), (LAPTOP, 2.0)),
        written(link(LAPTOP, ANNA)),
        written(link(ANNA, SAFE, NOW + 1)),
        paid((LAPTOP, 4.0), (SAFE, 8.0), (ANNA, 16.0)),
        written(link(ANNA, THIEF, NOW + 2)),  # who stole the old key is too late
        paid((LAPTOP, 32.0)),
    ]
    assert sums(*entries) == {SAFE.peer_id: {SAFE.peer_id: 8.0, ANNA.peer_id: 17.0, LAPTOP.peer_id: 38.0}}


def test_nothing_is_kept_about_strangers() -> None:
    accounts = Accounts.of([score(LAPTOP), written(link(DESKTOP, ANNA))])
    assert accounts.refusal(link(DESKTOP, ANNA)) and accounts.account_of(DESKTOP.peer_id) == DESKTOP.peer_id
    assert accounts.refusal(link(ANNA, SAFE))
    accounts.add(written(link(LAPTOP, ANNA)))
    assert accounts.refusal(link(ANNA, SAFE, NOW + 1)) is None  # it is somebody's account now


# ---- how they come into a ledger ----------------------------------------------------------------------------


class Shown:
    """What peers show, and whom a reader looked at."""

    def __init__(self) -> None:
        self.by_peer: dict[str, list[Link | End]] = {}
        self.looked: list[PeerId] = []
        self.said: list[dict[str, Any]] = []
        self.broken: set[PeerId] = set()

    async def read(self, peer: PeerId, timeout_seconds: float) -> Sequence[Signed[Links]]:
        self.looked.append(peer)
        if peer in self.broken:
            raise NetworkError("nobody answers")
        links = self.by_peer.get(peer)
        return [] if links is None else [Signed(Links(peer=peer, links=links), peer, NOW + 60.0)]

    def reader(self, *entries: AnyEntry, always: Sequence[Identity] = ()) -> LinkReader:
        return LinkReader(
            Accounts.of(entries),
            self.read,
            always=[one.peer_id for one in always],
            now=lambda: float(NOW),
            emit=lambda name, **fields: self.said.append({"event": name, **fields}),
        )


def look(reader: LinkReader, times: int = 1) -> None:
    for _ in range(times):
        asyncio.run(reader.look(1.0))


def test_a_link_is_written_once_along_with_a_round() -> None:
    shown, made = Shown(), link(LAPTOP, ANNA)
    reader = shown.reader()
    shown.by_peer[LAPTOP.peer_id] = [made]
    assert reader.along([score(LAPTOP, 3)]) == []
    look(reader)
    assert reader.along([score(LAPTOP, 4)]) == [LinkEntry(module="m", round=4, link=made)]
    assert shown.said == [
        {"event": "incentives.link.written", "peer": made.peer, "account": made.account, "made_at": NOW}
    ]
    look(reader)
    assert reader.along([score(LAPTOP, 5)]) == []
    # nor again after a restart
    again = shown.reader(score(LAPTOP, 3), written(made, 4))
    again.along([score(LAPTOP, 6)])
    look(again)
    assert again.along([score(LAPTOP, 7)]) == []


def test_a_rotation_that_another_peer_shows_is_written_behind_the_link_that_leads_to_it() -> None:
    shown = Shown()
    shown.by_peer = {SAFE.peer_id: [link(ANNA, SAFE, NOW + 1)], LAPTOP.peer_id: [link(LAPTOP, ANNA)]}
    reader = shown.reader(score(LAPTOP), score(SAFE), always=[SAFE])
    reader.along([score(LAPTOP, 1)])
    look(reader)
    assert [one.link.account for one in reader.along([score(SAFE, 2)])] == [ANNA.peer_id, SAFE.peer_id]
    assert reader.accounts.account_of(LAPTOP.peer_id) == SAFE.peer_id


@pytest.mark.parametrize(
    "vain",
    [
        link(LAPTOP, ANNA, NOW + int(MAX_AHEAD_SECONDS) + 1),
        link(DESKTOP, ANNA),  # who never took part
        end(LAPTOP, ANNA, NOW),  # there is nothing to end
    ],
)
def test_what_counts_for_nothing_is_not_written(vain: Link | End) -> None:
    shown = Shown()
    shown.by_peer[LAPTOP.peer_id] = [vain, link(LAPTOP, SAFE, NOW + 1)]
    reader = shown.reader()
    reader.along([score(LAPTOP, 1)])
    look(reader)
    assert [one.link.account for one in reader.along([score(LAPTOP, 2)])] == [SAFE.peer_id]
    assert [event["event"] for event in shown.said] == ["incentives.link.written"]


def test_a_forged_link_is_said_and_costs_nobody_else() -> None:
    shown = Shown()
    forged = msgspec.structs.replace(link(LAPTOP, THIEF), peer_signature=bytes(64))
    shown.by_peer = {THIEF.peer_id: [forged], LAPTOP.peer_id: [link(LAPTOP, ANNA, NOW + 1)]}
    reader = shown.reader()
    reader.along([score(LAPTOP, 1), score(THIEF, 1)])
    look(reader)
    assert [one.link.account for one in reader.along([score(LAPTOP, 2)])] == [ANNA.peer_id]
    assert [event["event"] for event in shown.said] == ["incentives.link.refused", "incentives.link.written"]


def test_a_few_are_looked_at_each_round_whoever_waited_longest_first() -> None:
    shown, peers = Shown(), [identity(number) for number in range(20, 20 + 3 * READS_PER_ROUND)]
    shown.broken = {peers[0].peer_id}
    reader = shown.reader()
    reader.along([score(peer, 1) for peer in peers])
    look(reader)
    assert len(shown.looked) == READS_PER_ROUND
    look(reader, 2)
    assert sorted(shown.looked) == sorted(peer.peer_id for peer in peers)
    assert [event["peer"] for event in shown.said] == [peers[0].peer_id]


def test_who_is_gone_is_not_looked_at_any_more() -> None:
    shown = Shown()
    reader = shown.reader(always=[ANNA])
    reader.along([score(LAPTOP, 1), score(DESKTOP, 1, came=False)])
    look(reader)
    assert set(shown.looked) == {ANNA.peer_id, LAPTOP.peer_id}
    reader.along([score(DESKTOP, 1 + RECENT_ROUNDS)])
    shown.looked.clear()
    look(reader)
    assert set(shown.looked) == {ANNA.peer_id, DESKTOP.peer_id}
