"""A home with a run as a monitor or a daemon leaves it: manifest, history, a validator's ledger. Written through the
real classes, with believable numbers that are always the same."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sample_entries import round_entry

from potluck.dht.manifest import SignedManifest, sign
from potluck.dht.records import Heartbeat, Signed
from potluck.dht.template import preset_draft
from potluck.incentives.entries import AnyEntry, CreditEntry, ScoreEntry, Standing
from potluck.incentives.ledger import Ledger
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.peer.history import History
from potluck.peer.home import Home, RunFolder

ROUND_SECONDS: Final = 30.0
#: What strangers call themselves.
NAMES: Final = (
    "anna's attic", "bo-4090", "", "kitchen-laptop", "TU Graz, room 12", "mira", "<img src=x onerror=alert(1)>",
    "a peer with quite a long name that goes on and on until the end of it", "<b>bold</b>", "ravn", "", "lab-07",
    "zoë", "old-tower", "pi-cluster", "garage",
)  # fmt: skip


def identity(n: int) -> Identity:
    return Identity(Path("none"), Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32))


def peer(n: int) -> PeerId:
    return identity(n + 10).peer_id


VALIDATOR: Final = identity(1)


def write_run(
    home: Path, now: float, *, name: str = "small-llama", rounds: int = 160, peers: int = 14, stages: int = 4
) -> RunFolder:
    """Its last heartbeat came just before `now`."""
    overrides: dict[str, Any] = {
        "rounds.seconds": ROUND_SECONDS,
        "rounds.exchange_seconds": 8.0,
        "model.config.num_hidden_layers": 8,
        "model.config.tie_word_embeddings": False,
        "model.stages": stages,
        "incentives.validators": [VALIDATOR.peer_id],
    }
    genesis = now - rounds * ROUND_SECONDS
    draft = preset_draft("demo", name, overrides)
    signed = sign(draft.finish(identity(2).peer_id, created=genesis - 60, genesis=genesis), identity(2))
    folder = Home(home).open().run(signed.run_id)
    folder.save_manifest(signed)
    write_history(folder, now, rounds, peers, stages)
    write_ledger(folder, signed, now, rounds, peers, stages)
    return folder


def write_history(folder: RunFolder, now: float, rounds: int, peers: int, stages: int) -> None:
    history, luck = History.write(folder.history), random.Random(7)
    genesis = now - rounds * ROUND_SECONDS
    for round_ in range(rounds):
        at = genesis + (round_ + 0.9) * ROUND_SECONDS
        present = [n for n in range(peers) if n * 7 <= round_ and (n != 3 or round_ < 0.7 * rounds)]
        history.hear([beat(n, round_, at, genesis, stages, luck) for n in present], at)
    history.close()


def beat(n: int, round_: int, at: float, genesis: float, stages: int, luck: random.Random) -> Signed[Heartbeat]:
    loss = 2.1 + 3.4 * math.exp(-round_ / 38) + luck.gauss(0, 0.02)
    told = Heartbeat(
        module=f"stage.{n % stages}",
        round=round_,
        role="organizer" if n == 0 else "worker",
        phase="training",
        name=NAMES[n % len(NAMES)][:64],
        version="0.1.0",
        loss=loss,
        tokens_per_second=(900 + 700 * (n % 5)) * luck.uniform(0.9, 1.1),
        load=min(1.0, max(0.05, 0.35 + 0.11 * (n % 6) + luck.uniform(-0.1, 0.1))),
        contributed=max(0, round_ - n * 7),
        started=genesis,
        sent_at=at,
    )
    return Signed(told, peer(n), at + 60)


def write_ledger(folder: RunFolder, signed: SignedManifest, now: float, rounds: int, peers: int, stages: int) -> None:
    """A copy in its portable form, as it is fetched."""
    luck, path = random.Random(11), folder.path / "sample.sqlite"
    genesis = signed.manifest.genesis
    with Ledger.open(path, folder.run_id, VALIDATOR) as ledger:
        batch: list[AnyEntry] = []
        for round_ in range(max(0, rounds - 90), rounds):
            for stage in range(stages):
                members = [n for n in range(peers) if n % stages == stage and n * 7 <= round_]
                batch += entries(folder, f"stage.{stage}", round_, members, luck)
            ledger.append(batch, genesis + (round_ + 1) * ROUND_SECONDS)
            batch = []
        folder.ledgers.mkdir(exist_ok=True)
        ledger.export(folder.ledgers / f"{VALIDATOR.peer_id}.ledger")
    path.unlink()


def entries(folder: RunFolder, module: str, round_: int, members: list[int], luck: random.Random) -> list[AnyEntry]:
    """Of one module's round. Peer 5 copies, peer 9 misses some."""
    if not members:
        return []
    scores, weights = [], {}
    for n in members:
        missed, copied = n == 9 and round_ % 4 == 0, n == 5 and round_ % 3 == 0
        useful = 0.1 if copied else (0.55 + 0.05 * (n % 7)) * luck.uniform(0.9, 1.05)
        weights[peer(n)] = 0.0 if missed or copied else useful
        scores.append(
            ScoreEntry(
                module=module,
                round=round_,
                peer=peer(n),
                came=not missed,
                blob=None if missed else "ab" * 32,
                size=0 if missed else 180_000,
                tokens=0 if missed else 40_000,
                refused="no commit" if missed else "a copy of another contribution" if copied else "",
                weight=0.0 if missed or copied else 0.25,
                alignment=0.0 if missed else -2e-4 if copied else 1e-3 * useful,
                place=None if missed else 1 + n % 3,
                among=0 if missed else 4,
                standing=Standing(usefulness=useful, seen=round_, verdict=-1 if n == 5 else 1, missed=int(missed)),
                factors={"away": 0.75} if missed else {"computation": 0.1} if n == 5 else {},
                score=useful * (0.1 if n == 5 else 1.0),
                share=useful / 4,
            )
        )
    total = sum(weights.values()) or 1.0
    paid = {who: 100.0 * weight / total for who, weight in weights.items() if weight}
    incentive = {who: weight / total for who, weight in weights.items() if weight}
    opened = round_entry(round_, VALIDATOR.peer_id, module=module, run=folder.run_id)
    return [opened, *scores, CreditEntry(module=module, round=round_, opinions={}, incentive=incentive, paid=paid)]


__all__ = ["VALIDATOR", "peer", "write_run"]
