"""From a manifest to what trains: data, model, device, and the rules of its rounds. Blocking work, no network."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from potluck.dht.manifest import Manifest
from potluck.peer.hardware import choose_device, fit_micro_batch
from potluck.swarm.data import Corpus, load_corpus
from potluck.swarm.layout import Layout
from potluck.swarm.local import LocalTrainer
from potluck.swarm.model import build_module
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round, RoundClock
from potluck.swarm.rounds import RoundRules
from potluck.swarm.state import ReplicaState

#: The module of a data-parallel run: a pipeline of one stage.
MODULE = "stage.0"


@dataclass(frozen=True)
class Parts:
    """What is built from a manifest before the first round."""

    trainer: LocalTrainer
    corpus: Corpus
    theta_0: ReplicaState


def build(manifest: Manifest, device: str, threads: int | None, data: str | None, own_manifest: bool) -> Parts:
    """Seconds of work. `data`: the volunteer's own source; `own_manifest`: it may name local files.

    Raises ManifestError, UserError (data) or HardwareError (device, memory).
    """
    if threads:
        torch.set_num_threads(threads)
    where = choose_device(device)
    corpus = load_corpus(manifest.data, data, own_manifest)
    module = build_module(manifest.model, MODULE)
    theta_0 = state_of(module, manifest)
    micro_batch = fit_micro_batch(manifest.training.batch_size, manifest.data.sequence_length, module, where)
    return Parts(LocalTrainer(module, manifest.training, where, micro_batch=micro_batch), corpus, theta_0)


def initial_state(manifest: Manifest) -> ReplicaState:
    """theta_0 from the manifest's seed, its digest computed. Blocking."""
    return state_of(build_module(manifest.model, MODULE), manifest)


def state_of(module: torch.nn.Module, manifest: Manifest) -> ReplicaState:
    layout = Layout.of_module(module)
    velocity = layout.zeros() if manifest.outer.momentum > 0 else None
    state = ReplicaState(MODULE, layout, Round(0), layout.gather(module), velocity)
    _ = state.digest
    return state


def rules_of(manifest: Manifest) -> RoundRules:
    rounds = manifest.rounds
    return RoundRules(
        clock=RoundClock(manifest.genesis, rounds.seconds, rounds.exchange_seconds),
        steps=rounds.steps,
        group_size=rounds.group_size,
        retain=rounds.retain,
        fragments=rounds.fragments,
        sync_limit=rounds.sync_limit,
        clip=manifest.aggregation.clip,
    )


def outer_of(manifest: Manifest) -> OuterStep:
    outer = manifest.outer
    return OuterStep(outer.learning_rate, outer.momentum, outer.nesterov, outer.momentum_warmup_rounds)


def same_draft(manifest: Manifest, draft: Manifest) -> bool:
    """Whether a run was started from this draft: equal but for what `host` fills in."""
    filled = {"created": draft.created, "genesis": draft.genesis, "organizer": draft.organizer}
    model = manifest.model.model_copy(update={"initial_state": None, "initial_bytes": 0})
    return manifest.model_copy(update={**filled, "model": model}) == draft and manifest.organizer == draft.organizer
