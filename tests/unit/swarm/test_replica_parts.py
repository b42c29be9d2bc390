"""State, checkpoints, model, data and local training."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potluck.dht.manifest import DataPart, ModelPart, TrainingPart
from potluck.errors import HardwareError, ManifestError, StateError, UserError
from potluck.net.host import PeerId
from potluck.swarm.checkpoints import CheckpointStore, CheckpointWriter
from potluck.swarm.codecs import CODEC_NAMES, make_codec
from potluck.swarm.data import BLOCK, assigned_offsets, load_corpus
from potluck.swarm.layout import Layout
from potluck.swarm.local import LocalTrainer, learning_rate_at
from potluck.swarm.model import build_module
from potluck.swarm.phases import Round
from potluck.swarm.state import ReplicaState, parse_state, state_bytes

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LAYOUT = Layout.of([("a", (50, 20)), ("b", (9,))])
LLAMA = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}


def state(round_: int = 3, seed: int = 0, momentum: bool = True) -> ReplicaState:
    dice = np.random.default_rng(seed)
    theta = dice.standard_normal(LAYOUT.size).astype(np.float32)
    velocity = dice.standard_normal(LAYOUT.size).astype(np.float32) if momentum else None
    return ReplicaState("stage.0", LAYOUT, Round(round_), theta, velocity, history=7)


# ---- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [True, False])
def test_a_state_comes_back_bit_for_bit(momentum: bool) -> None:
    sent = state(momentum=momentum)
    blob = memoryview(b"".join(sent.buffers))
    assert len(blob) == state_bytes(LAYOUT, momentum) == sent.ref.size
    got = parse_state(blob, "stage.0", LAYOUT, momentum)
    assert got.digest == sent.digest and got.round == 3 and got.history == 7
    assert np.array_equal(got.theta, sent.theta)


def test_digest_changes_with_one_bit_of_anything() -> None:
    base = state()
    theta = base.theta.copy()
    theta.view(np.uint32)[5] ^= 1
    others = [
        ReplicaState("stage.0", LAYOUT, Round(3), theta, base.velocity, 7),
        ReplicaState("stage.0", LAYOUT, Round(4), base.theta, base.velocity, 7),
        ReplicaState("stage.0", LAYOUT, Round(3), base.theta, base.velocity, 8),
        ReplicaState("stage.1", LAYOUT, Round(3), base.theta, base.velocity, 7),
    ]
    assert len({s.digest for s in [base, *others]}) == 5


def test_foreign_truncated_and_poisoned_states_are_refused() -> None:
    blob = b"".join(state().buffers)
    poisoned = bytearray(blob)
    poisoned[100:104] = np.float32(np.nan).tobytes()
    for bad, module in [(blob[:-1], "stage.0"), (blob, "stage.1"), (bytes(poisoned), "stage.0"), (b"", "stage.0")]:
        with pytest.raises(StateError):
            parse_state(memoryview(bad), module, LAYOUT, True)


# ---- checkpoints --------------------------------------------------------------------------------------------


def test_checkpoints_keep_the_last_ones_and_skip_damaged_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "run", keep=3)
    residual = np.arange(LAYOUT.size, dtype=np.float32)
    for number in range(6):
        store.save(state(number, seed=number), residual)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"round-{n:08d}" for n in (3, 4, 5)]
    newest = tmp_path / "round-00000005" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    saved = store.latest(LAYOUT, "stage.0")
    assert saved and saved.state.round == 4
    assert saved.state.digest == state(4, seed=4).digest
    assert saved.residual is not None and np.array_equal(saved.residual, residual)


def test_another_runs_modules_or_models_checkpoint_is_not_taken(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, "run").save(state(), None)
    assert CheckpointStore(tmp_path, "other").latest(LAYOUT, "stage.0") is None
    assert CheckpointStore(tmp_path, "run").latest(LAYOUT, "stage.1") is None
    assert CheckpointStore(tmp_path, "run").latest(Layout.of([("a", (3,))]), "stage.0") is None


def test_a_failed_write_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, "run")
    store.save(state(1), None)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("potluck.swarm.checkpoints.save_file", full)
    with pytest.raises(StateError, match="No space left"):
        store.save(state(2), None)
    saved = store.latest(LAYOUT, "stage.0")
    assert saved and saved.state.round == 1
    assert not list(tmp_path.glob(".partial*"))


SAVER = """
import sys, numpy as np
from pathlib import Path
from potluck.swarm.checkpoints import CheckpointStore, CheckpointWriter
from potluck.swarm.layout import Layout
from potluck.swarm.state import ReplicaState
layout = Layout.of([("a", (500, 200))])
store = CheckpointStore(Path(sys.argv[1]), "run")
for n in range(10**6):
    theta = np.full(layout.size, n, dtype=np.float32)
    store.save(ReplicaState("stage.0", layout, n, theta, None), None)
    print(n, flush=True)
"""


def test_kill_9_while_saving_loses_at_most_the_round_at_hand(tmp_path: Path) -> None:
    layout = Layout.of([("a", (500, 200))])
    for attempt in range(4):
        root = tmp_path / str(attempt)
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(root)], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        for _ in range(3):
            child.stdout.readline()
        time.sleep(0.011 * attempt)
        os.kill(child.pid, signal.SIGKILL)
        acknowledged = [int(line) for line in child.stdout.read().split()] or [2]
        child.wait()
        saved = CheckpointStore(root, "run").latest(layout, "stage.0")
        assert saved and saved.state.round >= acknowledged[-1]
        assert (saved.state.theta == saved.state.round).all()
        assert not list(root.glob(".partial*"))


# ---- model --------------------------------------------------------------------------------------------------


def test_the_seed_gives_the_same_bits_and_leaves_the_global_generator_alone() -> None:
    spec = ModelPart(family="llama", config=LLAMA, seed=5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = build_module(spec)
    assert torch.equal(torch.rand(3), expected)
    layout = Layout.of_module(one)
    assert np.array_equal(layout.gather(one), layout.gather(build_module(spec)))
    assert not np.array_equal(layout.gather(one), layout.gather(build_module(spec.model_copy(update={"seed": 6}))))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_codecs_take_tensors_of_any_device_dtype_and_stride(codec: str, device: str) -> None:
    values = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    given = {"weight": values.to(device).t().requires_grad_(), "bias": torch.arange(5.0, device=device)}
    layout = Layout.of((name, tuple(tensor.shape)) for name, tensor in given.items())
    flat = layout.flatten(given)
    assert np.array_equal(layout.tensors(flat)["weight"], values.t().float())
    plain = np.concatenate([np.arange(5, dtype=np.float32), values.t().float().numpy().ravel()])
    assert bytes(make_codec(codec).encode(flat, layout)) == bytes(make_codec(codec).encode(plain, layout))
    with pytest.raises(ValueError, match="bias has shape"):
        layout.flatten({**given, "bias": torch.zeros(6)})


def test_tied_embeddings_count_once_and_survive_a_round_trip() -> None:
    model = build_module(ModelPart(family="llama", config=LLAMA))
    layout = Layout.of_module(model)
    assert layout.size == sum(p.numel() for p in model.parameters())
    assert not any("lm_head" in slot.name for slot in layout.slots)
    flat = layout.gather(model) + np.float32(1.0)
    layout.scatter(flat, model)
    assert np.array_equal(layout.gather(model), flat)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_other_families_build() -> None:
    config = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    assert Layout.of_module(build_module(ModelPart(family="gpt2", config=config))).size > 0


@pytest.mark.parametrize(
    ("family", "config"),
    [("no_such", {}), ("llama", {"no_such_key": 1}), ("llama", {"hidden_size": 33, "vocab_size": 256})],
)
def test_models_that_cannot_be_built_are_manifest_errors(family: str, config: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        build_module(ModelPart(family=family, config=config))


# ---- data ---------------------------------------------------------------------------------------------------


def data(source: str, **changed: Any) -> DataPart:
    return DataPart(source=source, sequence_length=changed.pop("sequence_length", 32), **changed)


def test_held_out_blocks_are_never_trained_on(tmp_path: Path) -> None:
    for number in range(64):
        (tmp_path / f"{number:02d}.txt").write_bytes(bytes([number]) * 3000)
    corpus = load_corpus(data(f"text:{tmp_path}", held_out_fraction=0.3), own_manifest=True)
    train, held_out = set(np.unique(corpus.train)), set(np.unique(corpus.held_out))
    assert train and held_out and not train & held_out
    assert len(train) + len(held_out) == 64
    again = load_corpus(data(f"text:{tmp_path}", held_out_fraction=0.3, seed=1), own_manifest=True)
    assert set(np.unique(again.held_out)) != held_out


def test_one_small_file_still_gives_both_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(256)) * 4)
    corpus = load_corpus(data(f"text:{path}"), own_manifest=True)
    assert corpus.train.size + corpus.held_out.size == 1024
    assert corpus.held_out_batch(4).shape == (4, 33)
    assert BLOCK > 1024


def test_assignments_are_a_function_of_run_module_peer_and_round(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(os.urandom(100_000))
    corpus = load_corpus(data(f"text:{path}"), own_manifest=True)

    def offsets(run: bytes = b"r", module: str = "m", peer: str = "p", round_: int = 1) -> tuple[int, ...]:
        return tuple(assigned_offsets(run, module, PeerId(peer), round_, 0, 16, corpus).tolist())

    assert offsets() == offsets()
    variants = {offsets(), offsets(run=b"s"), offsets(module="n"), offsets(peer="q"), offsets(round_=2)}
    assert len(variants) == 5
    later = assigned_offsets(b"r", "m", PeerId("p"), 1, 8, 8, corpus).tolist()
    assert offsets()[8:] == tuple(later)
    batch = corpus.batch(np.array(offsets()))
    assert batch.shape == (16, 33) and int(batch.max()) < 256


def test_a_strangers_manifest_reads_no_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    for source in (f"text:{tmp_path}", f"hf:{tmp_path}", "hf:./here"):
        with pytest.raises(ManifestError, match="--data"):
            load_corpus(data(source))
    assert load_corpus(data("text:/etc"), override=f"text:{tmp_path}").train.size > 0


def test_data_that_is_not_there_names_the_setting(tmp_path: Path) -> None:
    for source, says in (("text:/no/such/place", "does not exist"), (f"hf:{tmp_path}", "does not load")):
        with pytest.raises(UserError, match=says):
            load_corpus(data(source), own_manifest=True)


def test_hf_data_sets_load_from_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = "".join(f'{{"body": "document number {i} {"text " * 30}"}}\n' for i in range(50))
    (folder / "train.jsonl").write_text(rows)
    corpus = load_corpus(data(f"hf:{folder}", text_field="body", held_out_fraction=0.2), own_manifest=True)
    assert corpus.train.size > corpus.held_out.size > 0
    with pytest.raises(UserError, match="text_field"):
        load_corpus(data(f"hf:{folder}", text_field="text"), own_manifest=True)
    streamed = load_corpus(
        data(f"hf:{folder}", text_field="body", held_out_fraction=0.2, documents=20), own_manifest=True
    )
    assert streamed.train.size + streamed.held_out.size < 0.5 * (corpus.train.size + corpus.held_out.size)
    assert streamed.train.tobytes() in corpus.train.tobytes()


def test_reading_files_tells_its_progress_and_an_unreadable_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 1000)
    told: list[tuple[int, int]] = []
    load_corpus(data(f"text:{tmp_path}"), own_manifest=True, on_progress=lambda *step: told.append(step))
    assert told == [(1000, 2000), (2000, 2000)]

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match=r"cannot read .*a: Permission denied"):
        load_corpus(data(f"text:{tmp_path}"), own_manifest=True)


# ---- local training -----------------------------------------------------------------------------------------

TRAINING = TrainingPart(learning_rate=1e-2, batch_size=4, warmup_steps=0, precision="float32")


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(seed))


def trained(micro_batch: int, spec: TrainingPart = TRAINING, steps: int = 3) -> np.ndarray:
    trainer = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), spec, torch.device("cpu"))
    trainer.micro_batch = micro_batch
    result = trainer.train(iter([tokens(i) for i in range(steps)]), steps, 0)
    assert result.steps == steps and result.tokens == steps * 4 * 16
    return trainer.layout.gather(trainer.module)


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    whole = trained(4)
    assert np.abs(trained(1) - whole).max() < 1e-4
    assert np.abs(trained(3) - whole).max() < 1e-4


def test_out_of_memory_halves_the_micro_batch_and_the_step_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), TRAINING, torch.device("cpu"))
    forward = trainer._forward

    def small_memory(part: torch.Tensor) -> torch.Tensor:
        if part.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(part)

    monkeypatch.setattr(trainer, "_forward", small_memory)
    result = trainer.train(iter([tokens(i) for i in range(3)]), 3, 0)
    assert (result.steps, trainer.micro_batch, trainer.halvings) == (3, 1, 2)
    assert np.abs(trainer.layout.gather(trainer.module) - trained(4)).max() < 1e-4


def test_a_rounds_first_step_starts_only_if_steps_of_late_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), TRAINING, torch.device("cpu"))
    asked: list[float] = []

    def may_start(seconds: float) -> bool:
        asked.append(seconds)
        return seconds < 3.0

    trainer._step_seconds = 10.0
    batches = iter([tokens(i) for i in range(3)])
    assert [trainer.train(batches, 1, 0, may_start).steps for _ in range(3)] == [0, 0, 1]  # a slow step is forgotten
    assert asked == [10.0, 5.0, 2.5]


def test_out_of_memory_in_evaluation_halves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), TRAINING, torch.device("cpu"))
    whole, forward = trainer.evaluate(tokens()), trainer._forward

    def small_memory(part: torch.Tensor) -> torch.Tensor:
        if part.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(part)

    monkeypatch.setattr(trainer, "_forward", small_memory)
    assert abs(trainer.evaluate(tokens()) - whole) < 1e-5 and trainer.micro_batch == 2


def test_of_states_that_come_while_one_is_written_only_the_newest_is_saved(tmp_path: Path) -> None:
    class SlowDisk(CheckpointStore):
        go_on = threading.Event()

        def save(self, *arguments: Any) -> Path:
            assert self.go_on.wait(30)
            return super().save(*arguments)

    async def go() -> None:
        layout = Layout.of([("w", (4,))])
        disk = SlowDisk(tmp_path, "run", keep=9)
        writer = CheckpointWriter(disk, lambda error: None)
        for number in range(5):
            writer.save(ReplicaState("stage.0", layout, Round(number), layout.zeros()), None)
            await asyncio.sleep(0)
        disk.go_on.set()
        await writer.close()
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["round-00000000", "round-00000004"]

    asyncio.run(go())


def test_out_of_memory_with_one_sequence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), TRAINING, torch.device("cpu"))

    def none_left(part: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer, "_forward", none_left)
    with pytest.raises(HardwareError, match="smaller model"):
        trainer.train(iter([tokens()]), 1, 0)


def test_adamw8bit_trains_like_adamw() -> None:
    eight = trained(4, TRAINING.model_copy(update={"optimizer": "adamw8bit"}))
    start = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), TRAINING, torch.device("cpu"))
    moved = np.linalg.norm(eight - start.layout.gather(start.module))
    assert moved > 0
    assert np.linalg.norm(eight - trained(4)) < 0.3 * moved


def test_delta_is_the_way_back_and_the_stop_flag_is_obeyed() -> None:
    trainer = LocalTrainer(build_module(ModelPart(family="llama", config=LLAMA)), TRAINING, torch.device("cpu"))
    theta = trainer.layout.gather(trainer.module)
    asked: list[float] = []

    def may_start(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) <= 2

    result = trainer.train(iter([tokens(i) for i in range(9)]), 9, 0, may_start)
    assert result.steps == 2 and asked[0] == 0.0 and asked[1] > 0.0
    assert np.abs(theta - trainer.delta(theta) - trainer.layout.gather(trainer.module)).max() < 1e-6


def test_learning_rate_warms_up_then_follows_the_cosine() -> None:
    spec = TrainingPart(learning_rate=1.0, batch_size=1, warmup_steps=10, schedule="cosine", total_steps=100)
    assert learning_rate_at(spec, 0) == pytest.approx(0.1, rel=0.01)
    assert learning_rate_at(spec, 100) == pytest.approx(0.1)
    assert learning_rate_at(spec, 50) == pytest.approx(0.55)
    assert learning_rate_at(spec.model_copy(update={"schedule": "constant"}), 99) == 1.0
