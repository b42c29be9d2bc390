"""A free rider among the replicas of one stage is found by the loss with that stage alone swapped.

Four replicas of each of two stages train Python's own source through real streams; after each round a validator, which
has the whole model, judges stage.1 beside the stage.0 that the round had.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "swarm"))
sys.path.insert(0, str(Path(__file__).parents[2]))
import test_pipeline as reference
from by_hand import applied

from potluck.dht.manifest import DataPart
from potluck.incentives.judge import Effort, Judge
from potluck.incentives.validator import seen_of
from potluck.net.blobs import BlobStore
from potluck.net.host import PeerId
from potluck.peer.validating import Whole
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import Corpus, load_corpus
from potluck.swarm.layout import Flat
from potluck.swarm.model import build_module
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round
from potluck.swarm.stage import stage_layout, stage_names
from potluck.swarm.state import ReplicaState

ROUNDS, MICROBATCHES, REPLICAS = 10, 24, 4
MODULES = stage_names(2)


def corpus() -> Corpus:
    source = load_corpus(DataPart(sequence_length=16))
    return Corpus(source.train % reference.VOCABULARY, source.held_out % reference.VOCABULARY, sequence_length=16)


def batches(data: Corpus) -> Iterator[torch.Tensor]:
    dice = np.random.default_rng(3)
    while True:
        yield data.batch(dice.integers(0, data.train.size - 17, 4))


async def train(trainer: reference.PipelineTrainer, row: list[reference.Peer], source: Iterator[torch.Tensor]) -> None:
    for peer in row:
        if not peer.thread.is_alive():
            peer.working = True
            peer.thread = threading.Thread(
                target=peer.trainer.train, args=(iter(()), 10**6, 0, lambda seconds, p=peer: p.working), daemon=True
            )
            peer.thread.start()
    for _ in range(MICROBATCHES // 8):
        await asyncio.gather(*(trainer.microbatch(next(source)) for _ in range(8)))
    await trainer.flush()
    for peer in row:
        await peer.finish()


@pytest.mark.parametrize("lie", ["noise", "sign", "nothing"])
def test_a_free_rider_of_one_stage_is_found_by_swapping_that_stage(tmp_path: Path, lie: str) -> None:
    data, model = corpus(), reference.spec(1)
    whole = Whole(build_module(model), torch.device("cpu"), {m: stage_layout(reference.spec(2), m) for m in MODULES})
    store = BlobStore(tmp_path / "blobs", 2**30)
    judge = Judge("run", PeerId("validator"), whole.evaluator("stage.1"), data, lambda *asked: None, testable=False)
    dice, shares = np.random.default_rng(1), []

    async def run() -> list[float]:
        losses = []
        settings = {"step_tokens": 4 * 16 * 2, "learning_rate": 3e-3}
        async with reference.pipeline(tmp_path, 2, REPLICAS, **settings) as (trainer, peers):
            source = batches(data)
            theta: dict[str, Flat] = {m: row[0].theta for m, row in zip(MODULES, peers, strict=True)}
            for number in range(ROUNDS):
                for module, row in zip(MODULES, peers, strict=True):
                    for peer in row:
                        peer.trainer.load(theta[module])
                await train(trainer, [peer for row in peers for peer in row], source)
                after = {}
                for module, row in zip(MODULES, peers, strict=True):
                    deltas = {peer.id: peer.trainer.delta(theta[module]) for peer in row}
                    if module == "stage.1":
                        deltas[row[0].id] = lies(deltas[row[0].id], lie)
                    before = ReplicaState(module, row[0].trainer.layout, Round(number), theta[module], None)
                    one = applied(before, deltas, store, make_codec("none"), OuterStep(1.0, 0.0), tokens=512)
                    if module == "stage.0":
                        beside = before
                    else:
                        whole.place({"stage.0": beside})
                        judgement = judge.judge(seen_of(one, module, {"stage.0": beside.digest}), Effort(32, 0))
                        shares.append([judgement.shares[peer.id] for peer in row])
                        losses.append(judgement.round.loss_before)
                    after[module] = one.after.theta
                theta = after
        return losses

    def lies(delta: Flat, lie: str) -> Flat:
        if lie == "noise":
            size = np.float32(np.sqrt(np.mean(np.square(delta))))
            return size * dice.standard_normal(delta.size).astype(np.float32)
        return -delta if lie == "sign" else 0 * delta

    losses = asyncio.run(run())
    assert losses[-1] < losses[0] - 0.2, "the pipeline trains"
    free_rider, *honest = shares[-1]
    assert free_rider < 0.1 * statistics.median(honest)
    assert min(honest) > 0.4 * statistics.median(honest)
