"""A ledger's writer, and a whole validator, killed at any instant: the ledger opens, verifies, and has every entry that
was acknowledged; and the validator goes on as if nothing had been.

Run as a script this file is the processes that die (`deaths.py`).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from by_hand import applied
from deaths import Deaths, serve

from potluck.dht.manifest import RunId
from potluck.incentives.audit import Rules, audit
from potluck.incentives.entries import CreditEntry, RoundEntry, ScoreEntry, Standing
from potluck.incentives.judge import Effort, Judge
from potluck.incentives.ledger import Ledger, verify_file
from potluck.incentives.validator import Terms, Validator
from potluck.net.blobs import BlobStore
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.sim.peer import identity_of
from potluck.sim.plan import Plan
from potluck.sim.stand_in import MODULE, Model
from potluck.swarm.codecs import make_codec
from potluck.swarm.follower import Applied
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.state import ReplicaState

RUN = RunId("a" * 52)
KILLS = 220
KILLS_OF_ONE_LEDGER = 20


def entry(number: int, peer: str) -> ScoreEntry:
    return ScoreEntry(module="model", round=number, peer=peer, standing=Standing(), refused="x" * (number % 200))


def write_until_killed(path: Path, identity: Identity) -> None:
    """Batches of growing and shrinking size; after each `append` one line with the size that is acknowledged."""
    with Ledger.open(path, RUN, identity) as ledger:
        for turn in count():
            batch = [entry(ledger.size + n, identity.peer_id) for n in range(1 + turn * 7 % 40)]
            head = ledger.append(batch, time.time())
            os.write(1, f"{head.size} {head.root}\n".encode())


@pytest.mark.slow
def test_every_acknowledged_entry_survives_a_kill_at_any_instant(tmp_path: Path) -> None:
    identity = Identity.create(tmp_path / "identity.key")
    dice = random.Random(5)
    acknowledged: dict[int, str] = {}
    in_append, lost = 0, 0
    with Deaths(__file__, "writer", str(identity.path)) as deaths:
        for kill in range(KILLS):
            path = tmp_path / f"{kill // KILLS_OF_ONE_LEDGER}.sqlite"
            if kill % KILLS_OF_ONE_LEDGER == 0:
                acknowledged = {}
            # Opening takes some milliseconds of it, each append one or two.
            said = deaths.kill(str(path), dice.uniform(0, 0.06))
            acknowledged |= {int(size): root for size, root in map(str.split, said)}

            with Ledger.open(path, RUN, identity) as ledger:
                last = max(acknowledged, default=0)
                assert ledger.size >= last
                assert [e.round for e in ledger.entries()] == list(range(ledger.size))
                assert all(e == entry(e.round, identity.peer_id) for e in ledger.entries(start=max(0, last - 40)))
                heads = {head.size: head.root for head in ledger.heads()}
                assert heads.items() >= acknowledged.items()
                # At most the one batch that was being written when it died is there without having been acknowledged.
                assert len(heads) <= len(acknowledged) + 1
                in_append += len(heads) - len(acknowledged)
                acknowledged = heads
            if ledger.size:
                assert verify_file(path).heads == len(heads)
            lost += 0 if acknowledged else 1
    stores = {f"{n}.sqlite" for n in range(KILLS // KILLS_OF_ONE_LEDGER)}
    assert set(os.listdir(tmp_path)) == {"identity.key", *stores}
    print(f"{KILLS} kills; {in_append} batches on the disk unacknowledged, {lost} kills before the first batch")


# ---- a whole validator --------------------------------------------------------------------------------------

PLAN = Plan.of({"name": "crash", "peers": 2, "parameters": 256})
PEERS = [identity_of(0, number).peer_id for number in range(5)]
RULES = Rules(Model(PLAN).layout, make_codec("int8", {}), OuterStep(1.0, 0.5), True)
CLOCK = RoundClock(genesis=1000.0, seconds=60.0, exchange_seconds=15.0)


def rounds(store: BlobStore) -> Iterator[Applied]:
    """A run, the same in every process: contributions of five peers towards a quadratic's minimum."""
    model = Model(PLAN)
    target = model.trainer(type("Anybody", (), {"number": 0, "pace": None})()).target  # type: ignore[attr-defined]
    state = ReplicaState(MODULE, model.layout, Round(0), model.theta_0, model.layout.zeros(), 0)
    for number in count():
        dice = np.random.default_rng(number)
        noise = {peer: dice.standard_normal(model.layout.size).astype(np.float32) for peer in PEERS}
        deltas = {peer: np.float32(0.05) * (state.theta - target + one) for peer, one in noise.items()}
        one = applied(state, deltas, store, RULES.codec, RULES.outer, tokens=1000)
        yield one
        state = one.after


class Nobody:
    """The records of a run with no other validator."""

    async def weights(self, module: str, round_: Round, timeout_seconds: float) -> tuple[list[object], bool]:
        return [], True

    async def publish_weights(self, weights: object, expires_at: float, timeout_seconds: float) -> bool:
        return True


def make_judge(run: str, me: PeerId) -> Judge:
    model = Model(PLAN)
    return Judge(run, me, model.evaluator(), model.corpus, model.assigned, testable=False)


def validate_until_killed(folder: Path, identity: Identity) -> None:
    """Judges round after round; after each one a line with the size of the ledger that is acknowledged."""
    now = 0.0
    store, archive = BlobStore(folder / "blobs", 2**30), BlobStore(folder / "archive", 2**30)
    with Ledger.open(folder / "ledger.sqlite", RUN, identity) as ledger:
        validator = Validator(
            module=MODULE,
            judge=make_judge(RUN, identity.peer_id),
            ledger=ledger,
            terms=Terms({identity.peer_id: 1.0}, 100.0, 10.0),
            records=Nobody(),  # type: ignore[arg-type]
            store=store,
            archive=archive,
            clock=CLOCK,
            retain=8,
            now=lambda: now,
            emit=lambda name, **fields: None,
            effort=Effort(8, 2),
        )
        validator.resume(lambda blob: RULES.codec.decode(blob, RULES.layout))
        for one in rounds(store):
            now = CLOCK.window(one.round).end
            asyncio.run(validator.on_applied(one))
            os.write(1, f"{one.round} {ledger.size}\n".encode())


@pytest.mark.slow
def test_a_validator_that_is_killed_at_any_instant_goes_on_where_its_ledger_ends(tmp_path: Path) -> None:
    identity = Identity.create(tmp_path / "identity.key")
    dice = random.Random(6)
    judged, again = 0, 0
    with Deaths(__file__, "validator", str(identity.path)) as deaths:
        for kill in range(KILLS):
            folder = tmp_path / str(kill // KILLS_OF_ONE_LEDGER)
            folder.mkdir(exist_ok=True)
            said = deaths.kill(str(folder), dice.uniform(0, 0.25))
            acknowledged = {int(round_): int(size) for round_, size in map(str.split, said)}

            path = folder / "ledger.sqlite"
            if not path.exists():
                assert not acknowledged
                continue
            with Ledger.open(path, RUN, identity) as ledger:
                assert ledger.size >= max(acknowledged.values(), default=0)
                entries = list(ledger.entries())
                heads = [e.round for e in entries if isinstance(e, RoundEntry)]
                paid = [e.round for e in entries if isinstance(e, CreditEntry)]
                assert heads == list(range(len(heads))) and set(acknowledged) <= set(heads)
                assert paid == list(range(max(0, len(heads) - 1))), "every round but the last is paid, once"
                scored = Counter((e.peer, e.round) for e in entries if isinstance(e, ScoreEntry))
                assert set(scored.values()) <= {1} and len(scored) == 5 * len(heads)
                if heads:
                    assert verify_file(path).heads == len(heads)
                    archive = BlobStore(folder / "archive", 2**30)
                    terms = Terms({identity.peer_id: 1.0}, 100.0, 10.0)
                    one = Round(dice.choice(heads))
                    found = audit(ledger, archive, RULES, make_judge, terms, MODULE, one)
                    assert found.differences == []
                    again += 1
            judged += len(acknowledged)
    print(f"{KILLS} kills of a validator; {judged} rounds acknowledged, {again} audits")
    assert again > KILLS / 2


if __name__ == "__main__":
    who = Identity.load(Path(sys.argv[2]))
    work = {"writer": write_until_killed, "validator": validate_until_killed}[sys.argv[1]]
    serve(lambda folder: work(Path(folder), who))
