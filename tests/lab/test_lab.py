"""Real peers with real daemons behind real NATs and on shaped lines (`network.py` draws them)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from connections import connections
from network import Lab, Nat, Site, missing

from potluck.peer.party import Member, Party

from real import run_party, write_manifest

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=f"the lab needs more than this machine has: {missing()}"),
]

LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/4001")
ROUND = {"rounds__seconds": 6.0, "rounds__exchange_seconds": 2.5, "training__batch_size": 2}
#: For what takes libp2p a while: it asks others after 15 s whether it is behind a NAT.
PATIENCE = 150.0


def play(body: Callable[[Lab, Party], Awaitable[None]]) -> None:
    async def with_lab(party: Party) -> None:
        with Lab() as lab:
            await body(lab, party)

    run_party(with_lab)


async def host(party: Party, site: Site, **changed: Any) -> Member:
    manifest = write_manifest(party.root, **ROUND | changed)
    public = (*LISTEN, "--announce", f"/ip4/{site.address}/tcp/4001")
    return await party.start(site.name, "host", str(manifest), enter=site.enter, network=public)


async def join(party: Party, site: Site, invite: str, *options: str) -> Member:
    return await party.start(site.name, "join", invite, *options, enter=site.enter, network=LISTEN)


def peer_id(member: Member) -> str:
    return str(member.status["peer"])


def counts_all(member: Member, others: list[Member]) -> bool:
    """Its last round counted every one of them."""
    return {peer_id(other) for other in others} <= set(member.last.get("group", ()))


def assert_one_state(members: list[Member], rounds: int) -> None:
    """They had `rounds` rounds at least in which all contributed, and ended each with the same bits."""
    ends = [{event["round"]: event for event in member.applied} for member in members]
    full = [
        number
        for number, event in ends[0].items()
        if len(event["group"]) == len(members) and all(number in each for each in ends)
    ]
    assert len(full) >= rounds, [(m.name, [(e["round"], len(e["group"])) for e in m.applied]) for m in members]
    for number in full:
        assert len({each[number]["digest"] for each in ends}) == 1, number


async def paths(member: Member, other: Member) -> set[str]:
    """How it is connected with the other: "relayed", "direct", both or neither."""
    found = (await connections(member)).get(peer_id(other), [])
    return {"relayed" if "/p2p-circuit" in address else "direct" for address in found}


async def until_connected(member: Member, other: Member, how: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while how not in await paths(member, other):
            await asyncio.sleep(1)


@pytest.mark.parametrize("nat", ["cone", "symmetric"])
def test_two_behind_nats_train_together_through_the_public_one(nat: Nat) -> None:
    """Relayed: libp2p believes its own public address only from four who saw it, and punches no hole before."""

    async def body(lab: Lab, party: Party) -> None:
        hub = await host(party, lab.host("hub"))
        sites = [lab.home("anna", nat="cone"), lab.home("ben", nat=nat)]
        lab.count(*sites)
        anna, ben = [await join(party, site, hub.status["invite"]) for site in sites]
        await until_connected(anna, ben, "relayed")
        since = anna.last.get("round", -1)
        await party.until(
            "rounds together", lambda: min(m.last.get("round", -1) for m in (anna, ben)) >= since + 4, PATIENCE
        )
        assert counts_all(anna, [hub, ben]) and counts_all(ben, [hub, anna])
        assert lab.direct() == 0
        await party.leave_all([ben, anna, hub])
        assert_one_state([hub, anna, ben], rounds=4)

    play(body)


def test_home_lines_and_long_lines_keep_their_rounds_and_their_caps() -> None:
    """20 Mbit/s down and 5 up behind a NAT, and 150 ms there and back."""
    cap = 300_000

    async def body(lab: Lab, party: Party) -> None:
        hub = await host(party, lab.host("hub"))
        line = lab.home("home", nat="cone", down_mbit=20, up_mbit=5)
        far = await join(party, lab.host("far", delay_ms=75), hub.status["invite"])
        home = await join(party, line, hub.status["invite"], "--upload-limit", "300KB")
        members = [hub, far, home]
        await party.until("a common round", lambda: all(counts_all(m, members) for m in members), PATIENCE)
        since, sent = home.last.get("round", -1), [lab.sent(line)]
        for number in range(since + 1, since + 7):
            await party.until(f"round {number}", lambda n=number: home.last.get("round", -1) >= n, PATIENCE)  # type: ignore[misc]
            sent.append(lab.sent(line))
        await party.leave_all([home, far, hub])
        assert_one_state(members, rounds=5)
        per_round = [after - before for before, after in pairwise(sent)]
        # What it serves is capped; records and acknowledgements come on top.
        assert max(per_round) <= 1.1 * cap * ROUND["rounds__seconds"], per_round
        assert min(per_round) > home.last["contribution_bytes"], per_round

    play(body)


def test_a_line_that_comes_back_with_another_address_costs_the_rounds_it_was_down() -> None:
    async def body(lab: Lab, party: Party) -> None:
        hub = await host(party, lab.host("hub"))
        line = lab.home("anna", nat="cone")
        ben = await join(party, lab.host("ben"), hub.status["invite"])
        anna = await join(party, line, hub.status["invite"])
        members = [hub, ben, anna]
        await party.until("a common round", lambda: all(counts_all(m, members) for m in members), PATIENCE)
        lab.down(line)
        down_at = hub.last["round"]
        await asyncio.sleep(30)
        lab.up(line, new_address=True)
        up_at = hub.last["round"]
        # Dialling again, and finding out what was missed, may cost the round in progress and the next.
        await party.until("all together again", lambda: all(counts_all(m, members) for m in members), PATIENCE)
        back_at = hub.last["round"]
        assert back_at - up_at <= 3, (down_at, up_at, back_at)
        without = [event["round"] for event in hub.applied if peer_id(anna) not in event["group"]]
        missed = [number for number in without if number > down_at]
        assert len(missed) <= up_at - down_at + 3, (down_at, up_at, missed)
        rounds = [event["round"] for event in hub.applied]
        assert rounds == list(range(rounds[0], rounds[-1] + 1))
        await party.leave_all([anna, ben, hub])
        assert_one_state(members, rounds=2)

    play(body)


def test_doctor_tells_who_is_public_who_is_relayed_by_what_nat_and_how_fast_a_line_is() -> None:
    def examine(party: Party, site: Site, invite: str) -> dict[str, str]:
        command = [*site.enter, sys.executable, "-m", "potluck", "doctor", invite, *LISTEN]
        command += ["--home", str(party.root / site.name), "--no-benchmark", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return {finding["name"]: finding["seen"] for finding in json.loads(done.stdout)["findings"]}

    async def body(lab: Lab, party: Party) -> None:
        large = {"model__config__hidden_size": 256, "model__config__intermediate_size": 1024}
        hub, other = await host(party, lab.host("hub"), **large), lab.host("other")
        announce = ("--announce", f"/ip4/{other.address}/tcp/4001")
        second = await join(party, other, hub.status["invite"], *announce)
        public, forwarded = lab.host("public", down_mbit=20, up_mbit=5), lab.home("forwarded", nat="full-cone")
        sites = [public, forwarded, lab.home("cone", nat="cone"), lab.home("symmetric", nat="symmetric")]
        await party.until("a state", lambda: bool(hub.applied), PATIENCE)
        second_peer = f"peer=/ip4/{other.address}/tcp/4001/p2p/{peer_id(second)}"
        invite = f"{hub.status['invite'].partition('&')[0]}&{second_peer}"
        open_, *others = await asyncio.gather(*(asyncio.to_thread(examine, party, site, invite) for site in sites))
        assert open_["reachability"] == f"public: a peer dialled back to /ip4/{public.address}/tcp/4001"
        speed = {way: float(open_[way].split(" MB/s")[0]) for way in ("download", "upload")}
        assert speed["download"] < 3.0 and speed["upload"] < 0.8  # 20 and 5 Mbit/s, and a burst
        assert others[0]["reachability"] == f"public: a peer dialled back to /ip4/{forwarded.address}/tcp/4001"
        for seen in others[1:]:
            assert seen["reachability"].startswith("behind a NAT; others come through a relay"), seen
        kinds = [seen["NAT"].partition(":")[0] for seen in (open_, *others)]
        assert kinds == ["none", "one outer address for all peers", "one outer address for all peers", "symmetric"]
        await party.leave_all([hub, second])

    play(body)
