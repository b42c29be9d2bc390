"""Which stage a newcomer serves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from potluck.dht.directory import DirectoryView
from potluck.dht.manifest import ModelPart
from potluck.dht.records import Replica, Signed
from potluck.dht.shards import shard_of
from potluck.errors import HardwareError, NetworkError, UserError
from potluck.net.host import PeerId
from potluck.peer.pipeline import READ_SHARDS, choose_stage, read_stages, shards_to_read, table_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SPEC = ModelPart(family="llama", config=SIZES | {"tie_word_embeddings": False}, seed=1, stages=3)


def record(peer: str, stage: int, **fields: Any) -> Signed[Replica]:
    defaults = {"round": 1, "session": bytes(16), "started": 0.0, "addresses": [], "throughput": 10.0}
    return Signed(Replica(module=f"stage.{stage}", **(defaults | fields)), PeerId(peer), 1e9)


class Records:
    def __init__(self, *records: Signed[Replica]) -> None:
        self.records = records

    async def replicas(self, module: str, shard: int = 0, *, timeout_seconds: float) -> DirectoryView[Replica]:
        return DirectoryView(
            tuple(r for r in self.records if (r.record.module, r.record.shard) == (module, shard)), True
        )


class Unreachable:
    async def replicas(self, *_: Any, **__: Any) -> None:
        raise NetworkError("nobody answers")


def fits_all(name: str) -> None:
    pass


def choose(directory: Any, wanted: int | None = None, held: tuple[str, ...] = (), fits: Any = fits_all) -> str:
    return asyncio.run(choose_stage(directory, PeerId("me"), SPEC, wanted, set(held), fits))


def test_a_newcomer_goes_where_it_is_missed_unless_it_is_told_or_has_a_checkpoint() -> None:
    some = Records(record("a", 0), record("b", 0), record("c", 1), record("d", 2), record("e", 2))
    assert choose(some) == "stage.1"
    assert choose(some, wanted=2) == "stage.2"
    assert choose(some, held=("stage.0",)) == "stage.0"
    assert choose(some, held=("stage.0", "stage.1")) == "stage.1"
    assert choose(Unreachable()) in {"stage.0", "stage.1", "stage.2"}
    with pytest.raises(UserError, match="--stage 3"):
        choose(some, wanted=3)


def test_keepers_serve_nothing_and_are_not_counted() -> None:
    some = Records(record("a", 0), record("b", 1, role="observer"), record("c", 2))
    assert choose(some) == "stage.1"


def test_only_what_fits_into_this_machine_is_chosen() -> None:
    def check(name: str) -> None:
        if name != "stage.2":
            raise HardwareError(f"{name} does not fit")

    assert choose(Records(record("c", 2)), fits=check) == "stage.2"

    def nothing(name: str) -> None:
        raise HardwareError(f"{name} does not fit")

    with pytest.raises(HardwareError, match="does not fit"):
        choose(Records(), fits=nothing)


def test_who_has_not_measured_counts_as_the_middle_of_those_who_have() -> None:
    rows = [[record("a", 0, throughput=4.0), record("b", 0, throughput=0.0)], [record("c", 1, throughput=8.0)]]
    table = table_of(rows, PeerId("c"))
    assert table[0][PeerId("b")].throughput == 4.0 and not table[1]


def test_of_a_large_stage_a_sample_is_read_in_which_the_reader_itself_is() -> None:
    names = [f"peer {i}" for i in range(200)]
    records = [record(name, 1, shard=shard_of(PeerId(name), 0, 8)) for name in names]
    for name in names[:20]:
        shards = shards_to_read(PeerId(name), 8)
        assert 0 in shards and len(shards) <= READ_SHARDS + 1
        none, seen, _ = asyncio.run(read_stages(Records(*records), 3, shards))  # type: ignore[arg-type]
        assert not none and name in {one.peer for one in seen} and 40 < len(seen) < 160
    assert shards_to_read(PeerId("me"), 1) == [0]
