"""Rounds that are not of the plain kind, on real peers: in slices, and with training going on meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from potluck.peer.party import Party

from real import digests, run_party, write_manifest

pytestmark = pytest.mark.slow


def test_members_aggregate_for_each_other_and_a_killed_one_costs_nobody_the_state() -> None:
    async def body(party: Party) -> None:
        # 3.4 MB: four segments of float32.
        manifest = write_manifest(
            party.root,
            model__config__intermediate_size=2048,
            codec__name="none",
            rounds__exchange="sliced",
        )
        organizer = await party.start("org", "host", str(manifest))
        invite = organizer.status["invite"]
        worker, victim = await asyncio.gather(*(party.start(f"w{i}", "join", invite) for i in (1, 2)))
        await party.until("all three together", lambda: any(len(e["group"]) == 3 for e in worker.applied), 120)
        await party.kill(victim)
        killed = len(worker.applied)
        await party.until("four more rounds", lambda: len(worker.applied) >= killed + 4, 60)
        await party.leave_all([organizer, worker])
        ours, theirs = digests(organizer), digests(worker)
        common = ours.keys() & theirs.keys()
        assert len(common) >= 4 and all(ours[round_] == theirs[round_] for round_ in common)
        for member in (organizer, worker, victim):
            assert not member.of("swarm.slices.lied")
        assert organizer.last["loss"] < organizer.applied[0]["loss"]

    run_party(body)


def test_training_goes_on_while_a_round_is_exchanged() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root, rounds__overlap=True, outer__momentum=0.0)
        organizer = await party.start("org", "host", str(manifest))
        worker = await party.start("w1", "join", organizer.status["invite"])
        await party.until(
            "five common rounds", lambda: sum(len(event["group"]) > 1 for event in worker.applied) >= 5, 120
        )
        await party.leave_all([organizer, worker])
        ours, theirs = digests(organizer), digests(worker)
        common = ours.keys() & theirs.keys()
        assert len(common) >= 4 and all(ours[round_] == theirs[round_] for round_ in common)
        last = worker.applied[-2]
        assert last["contributed"] and last["seconds"]["train"] > 0
        assert organizer.last["loss"] < organizer.applied[0]["loss"]

    run_party(body)
