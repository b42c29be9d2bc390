"""Kill any one peer, any time, -9, twenty times over: the others go on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from potluck.peer.party import Member, Party

from real import processes_of, run_party, sockets_of, write_manifest

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.mark.timeout(600)
def test_twenty_kills_of_any_peer_at_any_time_cost_the_others_at_most_the_round_at_hand() -> None:
    async def body(party: Party) -> None:
        dice = random.Random(20)
        manifest = str(write_manifest(party.root))
        organizer = await party.start("org", "host", manifest)
        invite = organizer.status["invite"]
        await asyncio.gather(*(party.start(f"w{i}", "join", invite) for i in (1, 2, 3)))
        await party.until("a common round", lambda: all(m.applied for m in party.members), 120)
        for _ in range(KILLS):
            victim = dice.choice(party.members)
            await asyncio.sleep(dice.uniform(0.0, 4.0))  # any moment of a round
            before = {m.name: m.last["round"] for m in party.members if m is not victim}
            rounds_before = len(victim.applied)
            await party.kill(victim)
            # Back at once, in the same home; through any invite: the organizer's may be the dead one's.
            await party.restart(victim, *(("host", manifest) if victim is organizer else ("join", invite)))
            await party.until(f"{victim.name} is back", lambda v=victim, n=rounds_before: len(v.applied) > n, 90)
            for member in party.members:
                if member is not victim:
                    assert member.alive, member.error_line()
                    assert_no_gaps(member, since=before[member.name])
        # All together again at the end, with the same bits.
        target = max(m.last["round"] for m in party.members) + 2
        await party.until("the last rounds", lambda: all(m.last["round"] >= target for m in party.members), 60)
        digests = {e["digest"] for m in party.members for e in m.applied if e["round"] == target}
        assert len(digests) == 1
        await party.leave_all(party.members)
        assert processes_of(party.root) == []
        assert sockets_of(party.root) == []
        leftovers = [p for p in party.root.rglob("*") if p.name.startswith(".partial") or p.name.endswith(".tmp")]
        assert leftovers == []

    run_party(body)


def assert_no_gaps(member: Member, since: int) -> None:
    """From round `since` on, every round was applied, in order; of each kill at most one was replayed late."""
    numbers = [e["round"] for e in member.applied if e["round"] >= since]
    assert numbers == sorted(set(numbers))
    missed = (numbers[-1] - numbers[0] + 1) - len(numbers)
    assert missed <= 1, (member.name, numbers)
