"""Stages served over real streams: gradients are exact, counted once, and hostile input is refused."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from potluck.dht.manifest import ModelPart, TrainingPart
from potluck.errors import PotluckError, ProtocolError, RpcRefused, RpcRemoteError
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc
from potluck.swarm import stage_trainer
from potluck.swarm.activations import decode, encode
from potluck.swarm.server import Shapes, StageServer
from potluck.swarm.stage import build_stage, join_stages, stage_names
from potluck.swarm.stage_trainer import Job, StageTrainer
from potluck.swarm.trainer import PipelineBroken, PipelineTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from fake_net import FakeHost


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


VOCABULARY, HIDDEN, LAYERS = 97, 32, 4


def spec(stages: int) -> ModelPart:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return ModelPart(family="llama", config=sizes | {"tie_word_embeddings": False}, seed=1, stages=stages)


TRAINING = TrainingPart(learning_rate=0.1, batch_size=4, betas=(0.5, 0.95), precision="float32", gradient_clip=0.0)


class Peer:
    """A server of one stage, computing in a thread of its own while `working`."""

    def __init__(self, directory: Path, name: str, module: str, stages: int, shapes: Shapes, **settings: Any) -> None:
        self.rpc = Rpc(FakeHost(directory, name))
        settings = {"step_tokens": 2**40, "settle_seconds": 0.5} | settings
        training = TRAINING.model_copy(update={"learning_rate": settings.pop("learning_rate", 0.1)})
        self.trainer = StageTrainer(build_stage(spec(stages), module), training, torch.device("cpu"), **settings)
        self.theta = self.trainer.layout.gather(self.trainer.stage)
        self.server = StageServer(self.rpc, shapes)
        self.server.host(module, self.trainer)
        self.module = module
        self.working = True
        self.grads: list[Tensor] = []
        step = self.trainer.optimizer.step

        def record(*args: Any) -> Any:
            self.grads.append(torch.cat([p.grad.flatten() for p in self.trainer.stage.parameters()]))  # type: ignore
            return step(*args)

        self.trainer.optimizer.step = record  # type: ignore[method-assign]
        self.thread = threading.Thread(
            target=self.trainer.train, args=(iter(()), 10**6, 0, lambda seconds: self.working), daemon=True
        )

    @property
    def id(self) -> PeerId:
        return self.rpc.peer_id

    async def __aenter__(self) -> Peer:
        await self.rpc.start()
        self.thread.start()
        return self

    async def finish(self) -> None:
        """The round's training ends."""
        self.working = False
        await asyncio.to_thread(self.thread.join)

    async def __aexit__(self, *exc: Any) -> None:
        await self.finish()
        await self.rpc.close()


@asynccontextmanager
async def pipeline(
    directory: Path, stages: int = 2, replicas: int = 1, codec: Any = "none", **settings: Any
) -> AsyncIterator[tuple[PipelineTrainer, list[list[Peer]]]]:
    shapes = Shapes(4, 16, HIDDEN, VOCABULARY, codec)
    direct = settings.pop("direct", False)
    peers = [
        [Peer(directory, f"{name} {i}", name, stages, shapes, **settings) for i in range(replicas)]
        for name in stage_names(stages)
    ]
    rpc = Rpc(FakeHost(directory, "trainer"))
    await rpc.start()
    trainer = PipelineTrainer(rpc, stages, shapes, direct=direct)
    try:
        for k, row in enumerate(peers):
            for peer in row:
                await peer.__aenter__()
            trainer.wirings[k].update({peer.id: 1e12 for peer in row}, 0.0)
        yield trainer, peers
    finally:
        for row in peers:
            for peer in row:
                await peer.__aexit__()
        await rpc.close()


def batches(seed: int = 0) -> Iterator[Tensor]:
    dice = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, VOCABULARY, (2, 17), generator=dice)


def whole_gradient(stages: int, microbatches: list[Tensor]) -> dict[str, Tensor]:
    """Of the mean loss over all tokens, by one process that has the whole model."""
    from transformers import AutoModelForCausalLM

    from potluck.swarm.model import transformers_config

    parts = {name: dict(build_stage(spec(stages), name).state_dict()) for name in stage_names(stages)}
    whole = AutoModelForCausalLM.from_config(transformers_config(spec(stages)), dtype=torch.float32)
    whole.load_state_dict(join_stages(spec(stages), parts))
    for tokens in microbatches:
        logits = whole(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        (loss / (len(microbatches) * tokens[:, 1:].numel())).backward()
    return {name: p.grad for name, p in whole.named_parameters()}


def stage_gradient(row: list[Peer]) -> dict[str, Tensor]:
    """Of all replicas together: the mean weighted by the tokens that each counted."""
    total = sum(peer.trainer._tokens for peer in row)
    flat = sum(peer.grads[0] * (peer.trainer._tokens / total) for peer in row if peer.grads)
    named, start = {}, 0
    for name, p in row[0].trainer.stage.named_parameters():
        named[name] = flat[start : start + p.numel()].view(p.shape)  # type: ignore[index]
        start += p.numel()
    return named


async def check_exact(trainer: PipelineTrainer, peers: list[list[Peer]], sent: list[Tensor], tolerance: float) -> None:
    for row in peers:
        for peer in row:
            await peer.finish()
    wanted = whole_gradient(len(peers), sent)
    for row in peers:
        assert sum(peer.trainer._tokens for peer in row) == sum(t[:, 1:].numel() for t in sent)
        for name, got in stage_gradient(row).items():
            error = (got - wanted[name]).norm() / wanted[name].norm()
            assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@in_loop
async def test_four_stages_of_two_replicas_give_the_gradients_of_one_process(
    tmp_path: Path, direct: bool, cache_bytes: int
) -> None:
    async with pipeline(tmp_path, 4, 2, direct=direct, cache_bytes=cache_bytes) as (trainer, peers):
        source = batches()
        sent = [next(source) for _ in range(12)]
        await asyncio.gather(*map(trainer.microbatch, sent))
        await trainer.flush()
        await check_exact(trainer, peers, sent, 1e-5)
        assert trainer.stats.microbatches == 12 and trainer.stats.resends == 0
        assert trainer.stats.direct == (12 if direct else 0)
        hits = sum(peer.trainer.stats.hits for row in peers for peer in row)
        assert hits == (36 if cache_bytes else 0)


@in_loop
async def test_eight_bit_activations_give_nearly_the_same_gradients(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 2, codec="int8") as (trainer, peers):
        source = batches()
        sent = [next(source) for _ in range(8)]
        await asyncio.gather(*map(trainer.microbatch, sent))
        await trainer.flush()
        await check_exact(trainer, peers, sent, 0.05)


@in_loop
async def test_a_server_that_dies_costs_a_resend_and_no_microbatch_is_counted_twice(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 3, 2) as (trainer, peers):
        source = batches()
        sent = [next(source) for _ in range(16)]
        first = [asyncio.create_task(trainer.microbatch(one)) for one in sent[:8]]
        await asyncio.sleep(0.02)
        dead = peers[1].pop()
        dead.rpc.host.die()  # type: ignore[attr-defined]
        await dead.rpc.close()
        await asyncio.gather(*first, *(trainer.microbatch(one) for one in sent[8:]))
        await trainer.flush()
        for row in peers:
            for peer in row:
                await peer.finish()
        # What the dead one had counted is gone with it; everybody else counted everything once.
        total = 16 * 32
        assert sum(peer.trainer._tokens for peer in peers[0]) == total
        assert sum(peer.trainer._tokens for peer in peers[2]) == total
        assert peers[1][0].trainer._tokens + dead.trainer._tokens <= total
        dead.working = False


@in_loop
async def test_what_is_not_confirmed_is_taken_out_again(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 2) as (trainer, peers):
        source = batches()
        sent = [next(source) for _ in range(5)]
        for one in sent[:3]:
            await trainer.microbatch(one)
        # A trainer that dies between the last stage's backward and the first's.
        real = trainer._backward
        trainer._backward = lambda *a: (_ for _ in ()).throw(PipelineBroken("the trainer died"))  # type: ignore
        with pytest.raises(PipelineBroken):
            await trainer.microbatch(sent[3])
        trainer._backward = real  # type: ignore[method-assign]
        await trainer.microbatch(sent[4])
        await trainer.flush()
        await check_exact(trainer, peers, [*sent[:3], sent[4]], 1e-5)
        assert peers[1][0].trainer.stats.voided == 1 and peers[0][0].trainer.stats.voided == 0


@in_loop
async def test_steps_between_microbatches_leave_the_pipeline_training(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 2, step_tokens=64, learning_rate=0.003) as (trainer, peers):
        tokens = next(batches())
        losses = [await trainer.microbatch(tokens) for _ in range(30)]
        # Stages step when they come to it: on a busy machine 30 microbatches may be few steps.
        while min(losses) >= losses[0] - 0.5 and len(losses) < 150:
            losses.append(await trainer.microbatch(tokens))
        await trainer.flush()
        assert min(losses) < losses[0] - 0.5 and await trainer.evaluate(tokens) < losses[0] - 0.3
        for row in peers:
            await row[0].finish()
            assert row[0].trainer._tokens == len(losses) * 32 and row[0].trainer._steps >= 3


@in_loop
async def test_a_second_ask_for_a_backward_answers_the_same_and_counts_once(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 2) as (trainer, peers):
        last, tokens = peers[1][0], next(batches())
        x = torch.randn(2, 16, HIDDEN)
        shape, body = encode(x, "none")
        both = bytes(body) + tokens[:, 1:].to(torch.int32).numpy().tobytes()
        head = {"module": "stage.1", "id": b"i" * 16, "shape": shape, "train": True}

        async def ask() -> Any:
            return await trainer._rpc.call(
                last.id, "stage.loss", head, both, timeout_seconds=5, max_response_bytes=10**6
            )

        one, two = await ask(), await ask()
        assert bytes(one.body) == bytes(two.body) and one.head == two.head
        await trainer._rpc.call(
            last.id, "stage.confirm", {"module": "stage.1", "ids": [b"i" * 16], "loss": 4.0}, timeout_seconds=5
        )
        with pytest.raises(RpcRemoteError, match="was counted"):
            await ask()
        await last.finish()
        assert last.trainer._tokens == 32


def hostile() -> list[tuple[str, dict[str, Any], bytes, str]]:
    good = bytes(encode(torch.randn(2, 16, HIDDEN), "none")[1])
    targets = torch.zeros(2, 16, dtype=torch.int32).numpy().tobytes()
    nan = torch.full((2, 16, HIDDEN), float("nan")).numpy().tobytes()
    huge = torch.full((2, 16, HIDDEN), 3e38).numpy().tobytes()
    shape = [2, 16, HIDDEN]
    loss = {"id": b"x" * 16, "train": True}
    return [
        ("loss", {**loss, "shape": shape}, nan + targets, "not finite"),
        ("loss", {**loss, "shape": shape}, huge + targets, "too large"),
        ("loss", {**loss, "shape": [2, 16, HIDDEN + 1]}, good + targets, "shape"),
        ("loss", {**loss, "shape": [2, 16]}, good + targets, "shape"),
        ("loss", {**loss, "shape": [10**9, 16, HIDDEN]}, good + targets, "targets"),
        ("loss", {**loss, "shape": "big"}, good + targets, "shape"),
        ("loss", {**loss, "shape": shape}, good[:-4] + targets, "bytes for activations"),
        ("loss", {**loss, "shape": shape}, good + b"\xff" * len(targets), "vocabulary"),
        ("loss", {**loss, "shape": shape, "id": b"short"}, good + targets, "16 bytes"),
        ("backward", {"id": b"y" * 16, "shape": shape}, good, "InputNeeded"),
        ("forward", {"id": b"y" * 16, "shape": shape, "train": True}, good, "stage.loss"),
        ("through", {"id": b"y" * 16, "shape": shape}, good + targets, "route"),
        ("confirm", {"ids": ["no bytes"]}, b"", "ids"),
    ]


@pytest.mark.parametrize("case", range(len(hostile())))
@in_loop
async def test_garbage_is_refused_with_a_typed_error_and_the_server_goes_on(tmp_path: Path, case: int) -> None:
    method, head, body, says = hostile()[case]
    async with pipeline(tmp_path, 2) as (trainer, peers):
        with pytest.raises(RpcRemoteError, match=says):
            await trainer._rpc.call(
                peers[1][0].id,
                f"stage.{method}",
                {"module": "stage.1", **head},
                body,
                timeout_seconds=5,
                max_response_bytes=10**6,
            )
        sent = [next(batches())]
        await trainer.microbatch(sent[0])
        await trainer.flush()
        await check_exact(trainer, peers, sent, 1e-5)


@in_loop
async def test_a_flood_is_refused_and_memory_stays_bounded(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 2, queue_limit=4) as (trainer, peers):
        first = peers[0][0]
        tokens = next(batches())[:, :-1].to(torch.int32).numpy().tobytes()

        async def forward(i: int) -> str:
            head = {"module": "stage.0", "id": i.to_bytes(16, "big"), "shape": [2, 16], "train": True}
            try:
                await trainer._rpc.call(
                    first.id, "stage.forward", head, tokens, timeout_seconds=20, max_response_bytes=10**6, lane="bulk"
                )
            except PotluckError as error:
                return type(error).__name__
            return "done"

        outcomes = await asyncio.gather(*map(forward, range(60)))
        assert "RpcRefused" in outcomes and "done" in outcomes and set(outcomes) <= {"RpcRefused", "done"}


def test_remembered_graphs_stay_within_the_cache() -> None:
    trainer = bare("backward", cache_bytes=1 << 40)
    (one,) = jobs_of("forward", 1)
    work_off(trainer, [one], together=False)
    graph = trainer._graph_bytes[one.x.shape]  # type: ignore[union-attr]
    assert graph > one.x.numel() * 4  # type: ignore[union-attr]
    trainer = bare("backward", cache_bytes=3 * graph)
    work_off(trainer, jobs_of("forward", 20), together=False)
    assert 1 <= len(trainer._kept) <= 3


@pytest.mark.parametrize("loss", [1.7e308, -5.0, float("nan"), float("inf"), 1e9])
def test_a_strangers_loss_is_no_ones(loss: float) -> None:
    trainer = bare("loss")
    assert trainer.confirm([], loss) == 0 and trainer.confirm([b"?" * 16], loss) == 1
    jobs = jobs_of("loss", 2)
    work_off(trainer, jobs, together=True)
    before = trainer.loss
    assert trainer.confirm([jobs[0].id], loss) == 0
    assert trainer.loss == before
    trainer.confirm([jobs[1].id], 3.0)
    assert trainer.loss == 3.0


def test_a_gradient_of_no_honest_loss_is_refused_from_the_beginning_and_teaches_nothing() -> None:
    trainer = bare("backward")
    for number in range(40):
        (job,) = jobs_of("backward", 1)
        job.id, job.grad = bytes([number]) * 16, torch.full((2, 16, HIDDEN), 1e29)
        work_off(trainer, [job], together=False)
        assert isinstance(job.answer.exception(), ProtocolError)
    usual = jobs_of("backward", 20)
    work_off(trainer, usual, together=True)
    trainer.confirm([job.id for job in usual])
    (large,) = jobs_of("backward", 1, batch=3)
    assert large.grad is not None
    large.grad *= 1000
    work_off(trainer, [large], together=False)
    assert "as long as usual" in str(large.answer.exception())


def test_what_waits_for_its_confirmation_is_bounded_and_what_is_confirmed_is_not_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_trainer, "MAX_UNCONFIRMED", 20)
    trainer = bare("loss")
    for batch in range(3):
        jobs = [replace(job, id=bytes([batch]) * 8 + job.id[8:], answer=Future()) for job in jobs_of("loss", 15)]
        work_off(trainer, jobs, together=True)
        trainer.confirm([job.id for job in jobs])
    assert len(trainer._open.counted) == 45 and trainer._open.held_bytes == 0
    with pytest.raises(RpcRefused, match="confirmation"):
        for job in jobs_of("loss", 40):
            work_off(trainer, [replace(job, id=b"other id" + job.id[8:], answer=Future())], together=False)
    assert trainer._open.unconfirmed == 20


@pytest.mark.parametrize("answer", ["nothing", "shape", "length", "nan"])
@in_loop
async def test_whoever_answers_nonsense_is_banned_and_nobody_else(tmp_path: Path, answer: str) -> None:
    async with pipeline(tmp_path, 3, 2) as (trainer, peers):
        liar = peers[1][0]

        async def lie(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
            wrong = {"shape": [2, 15, HIDDEN]} if answer == "shape" else {"shape": [2, 16, HIDDEN]}
            size = 4 * 2 * 15 * HIDDEN if answer in ("shape", "length") else 4 * 2 * 16 * HIDDEN
            return Reply() if answer == "nothing" else Reply(wrong, b"\xff" * size)

        for method in ("forward", "backward"):
            liar.rpc._methods.pop(f"stage.{method}")
            liar.rpc.register(f"stage.{method}", lie, max_request_bytes=10**6)
        source = batches()
        sent = [next(source) for _ in range(6)]
        for one in sent:
            await trainer.microbatch(one)
        await trainer.flush()
        assert trainer.stats.resends >= 1
        banned = [peer for wiring in trainer.wirings for peer, known in wiring._servers.items() if known.failures]
        assert banned == [liar.id]
        liar.grads = []
        await check_exact(trainer, [peers[0], [peers[1][1]], peers[2]], sent, 1e-5)


@in_loop
async def test_a_hop_that_hangs_is_named_by_the_one_before_it(tmp_path: Path) -> None:
    async with pipeline(tmp_path, 3, 2, direct=True) as (trainer, peers):
        stuck = peers[2][0]

        async def hang(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
            await asyncio.sleep(3600)
            return Reply()

        stuck.rpc._methods.pop("stage.through")
        stuck.rpc.register("stage.through", hang, max_request_bytes=10**6)
        trainer._timeout = lambda k, server, one: 1.0  # type: ignore[method-assign]
        for one in [next(batches()) for _ in range(4)]:
            await trainer.microbatch(one)
        await trainer.flush()
        paces = {peer: wiring._pace(known) for wiring in trainer.wirings for peer, known in wiring._servers.items()}
        assert max(paces, key=lambda peer: paces[peer]) == stuck.id
        assert trainer.stats.half_counted == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 65), (4, 16, 32)])
def test_eight_bit_values_are_within_half_a_step_of_their_blocks_scale(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    got_shape, body = encode(x, "int8")
    y = decode(got_shape, bytearray(body), "int8")
    assert y.shape == x.shape and float((x - y).abs().max()) <= float(x.abs().max()) / 127 / 2 * 1.01


def bare(kind: str, **settings: Any) -> StageTrainer:
    """A replica of a middle stage, or for losses of the last, without a network; its queue is open."""
    module, stages = ("stage.1", 2) if kind == "loss" else ("stage.1", 3)
    settings = {"step_tokens": 2**40, "cache_bytes": 0} | settings
    trainer = StageTrainer(build_stage(spec(stages), module), TRAINING, torch.device("cpu"), **settings)
    trainer.queue.open()
    return trainer


def jobs_of(kind: Any, count: int, batch: int = 2) -> list[Job]:
    dice = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        x, grad = (torch.randn(batch, 16, HIDDEN, generator=dice) for _ in range(2))
        targets = torch.randint(0, VOCABULARY, (batch, 16), generator=dice)
        id_ = bytes([batch]) * 15 + bytes([i])
        found.append(Job(kind, id_, x=x, targets=targets) if kind == "loss" else Job(kind, id_, x=x, grad=1e-3 * grad))
    return found


def work_off(trainer: StageTrainer, jobs: list[Job], together: bool) -> list[int]:
    """How many were done at once, each time."""
    for job in jobs:
        trainer.submit(job)
    sizes = []
    while taken := trainer.queue.take(0.0, *([trainer._may_stack] if together else [])):
        sizes.append(len(taken))
        trainer._do(taken)
    return sizes


def gradient(trainer: StageTrainer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.stage.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["loss", "backward"])
def test_microbatches_that_wait_are_computed_together_and_each_counts_by_itself(kind: str) -> None:
    results = []
    for together in (True, False):
        trainer = bare(kind)
        jobs = [*jobs_of(kind, 5), *jobs_of(kind, 2, batch=3), *jobs_of(kind, 1)]  # the last one is asked for again
        sizes = work_off(trainer, jobs, together)
        assert sorted(sizes) == ([1, 2, 5] if together else [1] * 8)
        assert len(trainer._open.counted) == 7
        results.append((gradient(trainer), [job.answer.result() for job in jobs]))
    (mine, answers), (wanted, singles) = results
    assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-6)
    for (back, loss), (other, other_loss) in zip(answers, singles, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert back is not None and other is not None and torch.allclose(back, other, rtol=1e-4, atol=1e-6)


def test_what_is_thrown_away_of_a_stack_leaves_the_others() -> None:
    trainer, wanted = bare("loss", settle_seconds=0.0), bare("loss", settle_seconds=0.0)
    work_off(trainer, jobs_of("loss", 5), together=True)
    work_off(wanted, jobs_of("loss", 3), together=False)
    trainer.confirm([job.id for job in jobs_of("loss", 3)])
    trainer._seal()
    assert trainer._sealed and trainer._sealed.grads
    trainer._void(trainer._sealed)
    assert trainer.stats.voided == 2 and trainer._sealed.tokens == 3 * 32
    mine = torch.cat([grad.flatten() for grad in trainer._sealed.grads if grad is not None])
    assert torch.allclose(mine, gradient(wanted), rtol=1e-4, atol=1e-5)


def test_one_bad_microbatch_fails_alone() -> None:
    trainer = bare("loss")
    jobs = jobs_of("loss", 4)
    jobs[2].x = torch.full((2, 16, HIDDEN), torch.nan)
    work_off(trainer, jobs, together=True)
    failed = [job for job in jobs if job.answer.exception()]
    assert failed == [jobs[2]] and len(trainer._open.counted) == 3
    trainer = bare("backward")
    odd = jobs_of("backward", 3)
    odd[1].grad = torch.randn(3, 16, HIDDEN)
    assert work_off(trainer, odd, together=True) == [2, 1]
    failed += [job for job in odd if job.answer.exception()]
    assert failed == [jobs[2], odd[1]] and len(trainer._open.counted) == 2
    assert all(isinstance(job.answer.exception(), ProtocolError) for job in failed)


def test_a_stack_is_not_larger_than_the_step() -> None:
    trainer = bare("loss", step_tokens=96)  # three microbatches
    for job in jobs_of("loss", 5):
        trainer.submit(job)
    assert len(trainer.queue.take(0.0, trainer._may_stack)) == 3


def test_out_of_memory_in_a_backward_throws_the_open_sum_away(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = bare("loss")
    work_off(trainer, jobs_of("loss", 2), together=True)
    monkeypatch.setattr(trainer, "_apply", lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    jobs = jobs_of("loss", 2, batch=3)
    work_off(trainer, jobs, together=True)
    assert all(isinstance(job.answer.exception(), torch.OutOfMemoryError) for job in jobs)
    assert not trainer._open.counted and all(p.grad is None for p in trainer.stage.parameters())
