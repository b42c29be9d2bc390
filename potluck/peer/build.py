"""From a manifest to what trains: data, model, device, and the rules of its rounds. Blocking work, no network."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from potluck.dht.manifest import Manifest
from potluck.errors import ManifestError
from potluck.peer.hardware import check_fits, choose_device, demands, fit_micro_batch, free_memory
from potluck.swarm.data import Corpus, OnProgress, load_corpus
from potluck.swarm.follower import RoundRules
from potluck.swarm.layout import Layout
from potluck.swarm.local import LocalTrainer
from potluck.swarm.model import build_module, count_parameters, transformers_config
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.server import Shapes
from potluck.swarm.stage import Stage, hidden_size, stage_names, stage_parameters
from potluck.swarm.stage_trainer import StageTrainer
from potluck.swarm.state import ReplicaState

#: Of the free memory, for graphs of microbatches that wait for their backward.
CACHE_SHARE = 0.25
#: The module of a data-parallel run: a pipeline of one stage.
MODULE = "stage.0"


@dataclass(frozen=True)
class Parts:
    """What is built from a manifest before the first round."""

    trainer: LocalTrainer | StageTrainer
    corpus: Corpus
    theta_0: ReplicaState


def build(
    manifest: Manifest,
    device: str,
    threads: int | None,
    data: str | None,
    own_manifest: bool,
    on_progress: OnProgress | None = None,
    name: str = MODULE,
    halvings: int = 0,
) -> Parts:
    """Seconds of work, for the module `name`. `data`: the volunteer's own source; `own_manifest`: it may name files;
    `halvings`: of the micro-batch.

    Raises ManifestError, UserError (data) or HardwareError (device, memory).
    """
    if threads:
        torch.set_num_threads(threads)
    where = choose_device(device)
    check_memory(manifest, where, name)
    corpus = load_corpus(manifest.data, data, own_manifest, on_progress)
    module = build_module(manifest.model, name)
    check_vocabulary(corpus, module)
    theta_0 = state_of(module, manifest, name)
    training = manifest.training
    if isinstance(module, Stage):
        stage_trainer = StageTrainer(
            module,
            training,
            where,
            step_tokens=training.batch_size * manifest.data.sequence_length,
            cache_bytes=int(CACHE_SHARE * free_memory(where)),
            settle_seconds=settle_seconds(manifest),
        )
        return Parts(stage_trainer, corpus, theta_0)
    micro_batch = fit_micro_batch(training.batch_size, manifest.data.sequence_length, module, where, training.optimizer)
    micro_batch = max(1, micro_batch >> halvings)
    return Parts(LocalTrainer(module, manifest.training, where, micro_batch=micro_batch), corpus, theta_0)


def shapes_of(manifest: Manifest) -> Shapes:
    """What stages of the run may be sent."""
    text = transformers_config(manifest.model).get_text_config()
    pipeline, length = manifest.pipeline, manifest.data.sequence_length
    hidden, vocabulary = hidden_size(manifest.model), int(text.vocab_size)
    return Shapes(pipeline.microbatch, length, hidden, vocabulary, pipeline.activations)


def settle_seconds(manifest: Manifest) -> float:
    """Of a round's training, kept free at its end for confirmations that are on their way."""
    return min(2.0, max(0.2, 0.05 * manifest.rounds.seconds))


def initial_state(manifest: Manifest, device: str = "cpu") -> ReplicaState:
    """theta_0 from the manifest's seed, its digest computed. Blocking. Raises ManifestError or HardwareError."""
    check_memory(manifest, choose_device(device))
    return state_of(build_module(manifest.model, MODULE), manifest)


def check_memory(manifest: Manifest, device: torch.device, name: str = MODULE) -> None:
    """Raises HardwareError before a module is built that does not fit."""
    check_fits(*_size(manifest, name), device)


def memory_needed(manifest: Manifest, device: torch.device, name: str = MODULE) -> int:
    """Bytes of main memory that a replica of a module takes, besides those on a GPU."""
    return sum(needed for where, needed in demands(*_size(manifest, name), device) if where.type == "cpu")


def _size(manifest: Manifest, name: str) -> tuple[int, str]:
    """What memory goes by: parameters and optimizer."""
    spec = manifest.model
    parameters = stage_parameters(spec)[stage_names(spec.stages).index(name)] if spec.stages > 1 else None
    return parameters or count_parameters(spec), manifest.training.optimizer


def check_vocabulary(corpus: Corpus, module: torch.nn.Module) -> None:
    """Raises ManifestError if the tokenizer gives tokens that the model has no embedding for."""
    size = int(module.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    largest = max(int(corpus.train.max()), int(corpus.held_out.max()))
    if largest >= size:
        raise ManifestError(
            f"model.config.vocab_size is {size}, but data.tokenizer gives tokens up to {largest}: raise it to at least "
            f"{largest + 1}, or choose another tokenizer"
        )


def state_of(module: torch.nn.Module, manifest: Manifest, name: str = MODULE) -> ReplicaState:
    layout = Layout.of_module(module)
    velocity = layout.zeros() if manifest.outer.momentum > 0 else None
    state = ReplicaState(name, layout, Round(0), layout.gather(module), velocity)
    _ = state.digest
    return state


def rules_of(manifest: Manifest) -> RoundRules:
    rounds = manifest.rounds
    return RoundRules(
        clock=RoundClock(manifest.genesis, rounds.seconds, rounds.exchange_seconds),
        steps=rounds.steps,
        step_tokens=manifest.training.batch_size * manifest.data.sequence_length if manifest.model.stages == 1 else 0,
        group_size=rounds.group_size,
        retain=rounds.retain,
        fragments=rounds.fragments,
        sync_limit=rounds.sync_limit,
        clip=manifest.aggregation.clip,
        rule=manifest.aggregation.rule,
        liars=manifest.aggregation.liars,
        sliced=manifest.rounds.exchange == "sliced",
        stream=manifest.rounds.stream,
    )


def outer_of(manifest: Manifest) -> OuterStep:
    outer = manifest.outer
    return OuterStep(outer.learning_rate, outer.momentum, outer.nesterov, outer.momentum_warmup_rounds)


def same_draft(manifest: Manifest, draft: Manifest) -> bool:
    """Whether a run was started from this draft: equal but for what `host` fills in."""
    filled = {"created": draft.created, "genesis": draft.genesis, "organizer": draft.organizer}
    model = manifest.model.model_copy(update={"initial_state": None, "initial_bytes": 0})
    return manifest.model_copy(update={**filled, "model": model}) == draft and manifest.organizer == draft.organizer
