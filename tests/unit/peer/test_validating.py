"""A validator of a pipeline: several modules' judges share one model, and each round can be scored again."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

sys.path.insert(0, str(Path(__file__).parents[2]))
from by_hand import applied

from potluck.dht.manifest import SignedManifest, sign
from potluck.dht.records import Links, Signed
from potluck.dht.template import preset_draft
from potluck.errors import LedgerError
from potluck.incentives.accounts import Accounts
from potluck.incentives.audit import Audit
from potluck.incentives.entries import LinkEntry, RoundEntry
from potluck.incentives.ledger import Ledger
from potluck.net.blobs import BlobStore
from potluck.net.host import PeerId
from potluck.net.identity import Identity, peer_id_of
from potluck.net.links import make_link, make_offer
from potluck.peer.build import outer_of, rules_of, state_of
from potluck.peer.home import Home, RunFolder
from potluck.peer.validating import Bench, Whole, audit_rounds
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import load_corpus
from potluck.swarm.follower import Applied
from potluck.swarm.model import build_module
from potluck.swarm.waits import WaitBoard

SMALL = {
    "model.stages": 2,
    "model.config.tie_word_embeddings": False,
    "model.config.hidden_size": 16,
    "model.config.num_hidden_layers": 2,
    "model.config.num_attention_heads": 2,
    "model.config.num_key_value_heads": 2,
    "model.config.intermediate_size": 32,
    "data.sequence_length": 16,
    "training.batch_size": 2,
    "rounds.seconds": 3600.0,
}
LAPTOP, ACCOUNT = (
    Identity(Path("/nowhere"), Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2)
)
LINK = make_link(make_offer(ACCOUNT, LAPTOP.peer_id, 5), LAPTOP)
PEERS = [LAPTOP.peer_id, *(PeerId(peer_id_of(bytes([n]) * 32)) for n in range(2))]


class World:
    """A pipeline's rounds as its followers apply them: what everybody contributes is drawn by lot."""

    def __init__(self, root: Path) -> None:
        home = Home(root / "home").open()
        self.identity = home.identity()
        (root / "text").mkdir()
        for number in range(40):
            (root / "text" / f"{number}.txt").write_text("to be or not to be, that is the question. " * 20)
        self.data = f"text:{root / 'text'}"
        draft = preset_draft("demo", "test", {**SMALL, "incentives.validators": [self.identity.peer_id]})
        now = time.time()
        self.signed: SignedManifest = sign(
            draft.finish(self.identity.peer_id, created=now, genesis=now - 1), self.identity
        )
        self.manifest = self.signed.manifest
        self.folder: RunFolder = home.run(self.signed.run_id)
        self.folder.save_manifest(self.signed)
        self.codec = make_codec(self.manifest.codec.name, self.manifest.codec.parameters)
        self.store = BlobStore(root / "blobs", 2**30)
        self.whole, self.corpus = Whole.build(self.manifest, "cpu"), load_corpus(self.manifest.data, self.data)
        self.states = {
            name: state_of(build_module(self.manifest.model, name), self.manifest, name) for name in self.whole.layouts
        }
        self.dice = np.random.default_rng(1)
        self.said: list[dict[str, Any]] = []

    def around(self) -> Any:
        async def weights(*asked: Any) -> tuple[list[Any], bool]:
            return [], True

        async def nothing(*arguments: Any, **named: Any) -> bool:
            return True

        async def links(peer: PeerId, timeout_seconds: float) -> Any:
            shown = [Signed(Links(peer=peer, links=[LINK]), peer, time.time() + 60)] if peer == LAPTOP.peer_id else []
            return SimpleNamespace(records=tuple(shown))

        exchange = SimpleNamespace(weights=weights, publish_weights=nothing, close=lambda: None)
        rpc = SimpleNamespace(register=lambda *arguments, **named: None)
        clock, emit = SimpleNamespace(now=time.time), lambda name, **fields: self.said.append({"event": name, **fields})
        return SimpleNamespace(
            run_id=self.signed.run_id,
            manifest=self.manifest,
            folder=self.folder,
            peer=self.identity.peer_id,
            node=SimpleNamespace(
                rpc=rpc, store=self.store, identity=self.identity, settings=SimpleNamespace(upload=None)
            ),
            directory=SimpleNamespace(links=links),
            clock=clock,
            emit=emit,
            exchange=lambda: exchange,
            presence=lambda role: SimpleNamespace(announce=nothing, taken=asyncio.Future()),
            following=lambda module, exchange, emit: {
                "peer": self.identity.peer_id,
                "module": module,
                "rules": rules_of(self.manifest),
                "codec": self.codec,
                "outer": outer_of(self.manifest),
                "exchange": exchange,
                "now": time.time,
                "waits": WaitBoard(time.time),
                "emit": emit,
                "session": bytes(16),
            },
        )

    def round(self, module: str) -> Applied:
        """Of a module, the next one."""
        before = self.states[module]
        deltas = {peer: self.dice.normal(0, 0.01, before.layout.size).astype(np.float32) for peer in PEERS}
        clip, outer = self.manifest.aggregation.clip, outer_of(self.manifest)
        one = applied(before, deltas, self.store, self.codec, outer, tokens=32, clip=clip)
        self.states[module] = one.after
        return one

    def audit(self, *rounds: int) -> list[Audit]:
        found: list[Audit] = []
        with Ledger.read(self.folder.ledger) as ledger:
            audit_rounds(self.folder, ledger, None, "cpu", self.data, rounds, found.append)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Rounds of two stages that were judged, both at once; the first one of stage.0 came too early."""
    world = World(tmp_path_factory.mktemp("world"))

    async def go() -> None:
        bench = await Bench.open(world.around(), world.whole, world.corpus, 2**30)
        validators = {validator.module: validator for validator, _ in bench._validators}

        async def applied(module: str) -> None:
            """As a follower does it."""
            one = world.round(module)
            await bench._on_state(module, one.after, None)
            await validators[module].on_applied(one)

        await applied("stage.0")
        assert bench.ledger.size == 0, "scored beside a stage that is not known yet"
        await applied("stage.1")
        for _ in range(3):
            await asyncio.gather(*map(applied, ("stage.0", "stage.1")))
            await bench._links.look(1.0)
        await asyncio.gather(*bench._announcing)
        bench._compute.shutdown()
        bench.ledger.close()

    asyncio.run(go())
    return world


def test_every_round_of_a_pipeline_scores_the_same_when_it_is_done_again(world: World) -> None:
    found = world.audit(1, 2, 3)
    assert [(one.module, one.round) for one in found] == [(m, n) for n in (1, 2, 3) for m in ("stage.0", "stage.1")]
    assert [one.differences for one in found] == [[]] * 6
    assert all(one.peers == 3 for one in found)


def test_whose_account_a_peer_counts_for_is_written_once_among_rounds_that_are_audited(world: World) -> None:
    with Ledger.read(world.folder.ledger) as ledger:
        (entry,) = (entry for entry in ledger.entries() if isinstance(entry, LinkEntry))
        accounts = Accounts.of(ledger.entries())
    assert entry.link == LINK and entry.round == 2
    assert accounts.account_of(LAPTOP.peer_id) == ACCOUNT.peer_id


def test_what_a_stage_was_scored_beside_is_in_the_archive_and_counts(world: World, tmp_path: Path) -> None:
    with Ledger.read(world.folder.ledger) as ledger:
        entries = [entry for entry in ledger.entries() if isinstance(entry, RoundEntry)]
    assert [sorted(entry.beside) for entry in entries] == [
        ["stage.1" if entry.module == "stage.0" else "stage.0"] for entry in entries
    ]
    one = next(entry for entry in entries if (entry.module, entry.round) == ("stage.1", 2))
    (beside,) = one.beside.values()
    (lost,) = world.folder.archive.glob(f"{beside}.blob")
    kept = lost.rename(tmp_path / "kept")
    try:
        with pytest.raises(LedgerError, match=r"archive .* stage.0"):
            world.audit(2)
    finally:
        kept.rename(lost)
