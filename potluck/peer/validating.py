"""A validator's place in a run: it follows every module's rounds, and judges them with the whole model at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from potluck.dht.manifest import Manifest
from potluck.dht.records import Links, Signed
from potluck.errors import HardwareError, LedgerError, UserError
from potluck.incentives.accounts import Accounts
from potluck.incentives.audit import Audit, Rules, archived, audit
from potluck.incentives.evaluate import ModelEvaluator
from potluck.incentives.judge import Judge, Promise
from potluck.incentives.ledger import Ledger
from potluck.incentives.link_reader import LinkReader
from potluck.incentives.validator import NETWORK_SHARE, SNAPSHOT_ROUNDS, Terms, Validator
from potluck.net.blobs import BlobStore
from potluck.net.host import PeerId
from potluck.peer.build import MODULE, check_memory, outer_of, rules_of
from potluck.peer.hardware import choose_device
from potluck.peer.home import RunFolder
from potluck.peer.ledgers import LedgerService, read_claims
from potluck.peer.seat import Around
from potluck.swarm.codecs import make_codec
from potluck.swarm.data import Corpus, assigned_offsets, data_seed, load_corpus
from potluck.swarm.follower import Follower
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.model import build_module
from potluck.swarm.phases import Round
from potluck.swarm.stage import stage_layout, stage_names
from potluck.swarm.state import ReplicaState

#: In a pipeline the other stages' states belong to a round's judgement: all are archived.
SNAPSHOTS_IN_PIPELINES: Final = 1
KEPT_STATES: Final = 2


@dataclass(frozen=True)
class Whole:
    """A run's whole model on this machine, and its modules' places in it."""

    model: torch.nn.Module
    device: torch.device
    layouts: dict[str, Layout]

    @classmethod
    def build(cls, manifest: Manifest, device: str) -> Whole:
        """Seconds of work. Raises HardwareError, ManifestError: a validator needs room for all stages together."""
        where, spec = choose_device(device), manifest.model
        one = spec.model_copy(update={"stages": 1})
        try:
            check_memory(manifest.model_copy(update={"model": one}), where)
        except HardwareError as error:
            raise HardwareError(f"to validate, the whole model must fit: {error}") from None
        if spec.stages == 1:
            model = build_module(spec)
            return cls(model, where, {MODULE: Layout.of_module(model)})
        return cls(build_module(one), where, {name: stage_layout(spec, name) for name in stage_names(spec.stages)})

    def evaluator(self, module: str) -> ModelEvaluator:
        return ModelEvaluator(self.model, self.device, self.layouts[module])

    def place(self, states: Mapping[str, ReplicaState]) -> None:
        """Make these the modules' parameters."""
        for module, state in states.items():
            self.layouts[module].scatter(state.theta, self.model)


def make_judge(run_id: str, validator: PeerId, manifest: Manifest, whole: Whole, corpus: Corpus, module: str) -> Judge:
    """The judge that `validator` has for a module; anybody can make it, to audit."""
    run_seed = run_id.encode() + manifest.data.seed.to_bytes(8, "big")
    samples, most = manifest.training.batch_size, manifest.rounds.steps

    def assigned(peer: PeerId, round_: Round, promise: Promise) -> np.ndarray | None:
        seed, count = data_seed(run_seed, promise.digest), samples * min(promise.steps, most)
        return assigned_offsets(seed, MODULE, peer, round_, 0, count, corpus)

    evaluator, clip = whole.evaluator(module), manifest.aggregation.clip
    codec = make_codec(manifest.codec.name, manifest.codec.parameters)
    # What a stage trains on are others' samples; of each peer's own files nobody else knows anything.
    testable = manifest.model.stages == 1 and not manifest.data.source.startswith("text:")
    return Judge(run_id, validator, evaluator, corpus, assigned, codec=codec, clip=clip, testable=testable)


def audit_rules(manifest: Manifest, layout: Layout) -> Rules:
    codec = make_codec(manifest.codec.name, manifest.codec.parameters)
    return Rules(layout, codec, outer_of(manifest), manifest.aggregation.clip)


def terms_of(manifest: Manifest) -> Terms:
    incentives = manifest.incentives
    return Terms(incentives.trust, incentives.emission, incentives.validator_emission)


def open_archive(folder: RunFolder, quota_bytes: int) -> BlobStore:
    return BlobStore(folder.archive, quota_bytes)


def audit_rounds(
    folder: RunFolder,
    ledger: Ledger,
    archive: Path | None,
    device: str,
    data: str | None,
    rounds: Sequence[int],
    on_audit: Callable[[Audit], None],
) -> None:
    """Score rounds again, all modules of each, as this machine finds them. Blocking.

    Raises LedgerError for what cannot be scored again, UserError where the run's manifest is not here.
    """
    signed = folder.manifest()
    if signed is None or signed.run_id != ledger.run:
        raise UserError(f"this ledger is of run {ledger.run[:8]}; audit it with a --home that has joined that run")
    where = archive or folder.archive
    if not where.is_dir():
        raise UserError(f"--archive {where}: no such folder; a validator keeps it beside its ledger")
    manifest = signed.manifest
    corpus = load_corpus(manifest.data, data)
    whole, blobs = Whole.build(manifest, device), BlobStore(where, quota_bytes=2**63)

    def place(digests: Mapping[str, str]) -> None:
        if strangers := digests.keys() - whole.layouts.keys():
            raise LedgerError(f"a round was scored beside {min(strangers)}, which this run does not have")
        has_velocity = manifest.outer.momentum > 0
        whole.place({m: archived(blobs, m, digest, whole.layouts[m], has_velocity) for m, digest in digests.items()})

    for round_ in rounds:
        for module, layout in whole.layouts.items():
            make = partial(make_judge, manifest=manifest, whole=whole, corpus=corpus, module=module)
            rules, terms = audit_rules(manifest, layout), terms_of(manifest)
            on_audit(audit(ledger, blobs, rules, make, terms, module, Round(round_), place))


async def _check_continues(around: Around, whole: Whole, ledger: Ledger) -> None:
    """Raises LedgerError if this validator published another ledger than this, or more of it: to go on from a backup
    would be to sign two histories."""
    now, retain = rules_of(around.manifest).clock.round_at(around.clock.now()), around.manifest.rounds.retain
    rounds = range(now, max(-1, now - 2 - retain), -1)
    for claim in await read_claims(around.directory, whole.layouts, around.peer, rounds):
        if claim.size > ledger.size or ledger.root(claim.size).hex() != claim.root:
            raise LedgerError(
                f"{around.folder.ledger} has {ledger.size} entries, and this validator published one of {claim.size} "
                f"with {claim}: to write on would be to sign a second history. Put the newest copy in its place, or "
                f"validate as somebody else"
            )


class Bench:
    """Where a validator sits: one follower and one judge for each module, one ledger for all. Made by `open`."""

    def __init__(
        self, around: Around, whole: Whole, corpus: Corpus, ledger: Ledger, archive: BlobStore, accounts: Accounts
    ) -> None:
        self._around, self._whole, self._corpus = around, whole, corpus
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self.ledger, self._archive = ledger, archive
        LedgerService(around.node.rpc, ledger, around.node.settings.upload, around.emit)
        trusted = around.manifest.incentives.trust
        self._links = LinkReader(accounts, self._shown_by, always=trusted, now=around.clock.now, emit=around.emit)
        self._validators: list[tuple[Validator, Layout]] = []
        self._exchanges = {module: around.exchange() for module in whole.layouts}
        self._presences = {module: around.presence("validator") for module in whole.layouts}
        self._announcing: set[asyncio.Task[None]] = set()
        #: Of each module, the latest states that its group agreed on, by the round that they begin.
        self._states: dict[str, dict[Round, ReplicaState]] = {module: {} for module in whole.layouts}
        self._followers = {module: self._follower(module) for module in whole.layouts}

    @classmethod
    async def open(cls, around: Around, whole: Whole, corpus: Corpus, archive_bytes: int) -> Bench:
        """Take up where the ledger ends. Raises LedgerError, UserError."""
        folder = around.folder
        ledger = await asyncio.to_thread(Ledger.open, folder.ledger, around.run_id, around.node.identity)
        archive = await asyncio.to_thread(open_archive, folder, archive_bytes)
        accounts = await asyncio.to_thread(lambda: Accounts.of(ledger.entries()))
        bench = cls(around, whole, corpus, ledger, archive, accounts)
        codec = make_codec(around.manifest.codec.name, around.manifest.codec.parameters)
        for validator, layout in bench._validators:
            await asyncio.to_thread(validator.resume, partial(codec.decode, layout=layout))
        return bench

    async def run(self) -> None:
        """Until cancelled, or told to leave. Raises IdentityError if another process has this identity, LedgerError if
        the ledger is an older one than was published."""
        following: list[asyncio.Task[None]] = []
        looking = asyncio.create_task(self._look_at_links())
        taken = [presence.taken for presence in self._presences.values()]
        try:
            await _check_continues(self._around, self._whole, self.ledger)
            for module, follower in self._followers.items():
                following.append(asyncio.create_task(follower.follow(self._nothing_yet(module))))
            ends: list[asyncio.Future[Any]] = [*following, looking, *taken]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for presence in taken:
                if presence.done():
                    raise presence.result()
            if looking.done():
                looking.result()
            await asyncio.gather(*following)
        finally:
            for task in [*following, looking, *self._announcing]:
                task.cancel()
            await asyncio.gather(*following, looking, *self._announcing, return_exceptions=True)
            # What is being judged is given up; what is being written is written.
            await asyncio.to_thread(self._compute.shutdown, wait=True, cancel_futures=True)
            for exchange in self._exchanges.values():
                exchange.close()
            self.ledger.close()

    def finish(self) -> None:
        """Leave after the round that is being judged."""
        for follower in self._followers.values():
            follower.finish()

    def status(self) -> dict[str, Any]:
        modules = {
            module: follower.state.round if follower.state and follower.state.round else None
            for module, follower in self._followers.items()
        }
        return {"modules": modules, "ledger": str(self._around.folder.ledger), "entries": self.ledger.size}

    def _follower(self, module: str) -> Follower:
        around, manifest, layout = self._around, self._around.manifest, self._whole.layouts[module]
        exchange = self._exchanges[module]
        pipeline = len(self._whole.layouts) > 1
        validator = Validator(
            module=module,
            judge=make_judge(around.run_id, around.peer, manifest, self._whole, self._corpus, module),
            ledger=self.ledger,
            terms=terms_of(manifest),
            records=exchange,
            store=around.node.store,
            archive=self._archive,
            clock=rules_of(manifest).clock,
            retain=manifest.rounds.retain,
            now=around.clock.now,
            emit=around.emit,
            in_thread=self._in_thread,
            beside=partial(self._beside, module),
            place=self._whole.place,
            snapshot_rounds=SNAPSHOTS_IN_PIPELINES if pipeline else SNAPSHOT_ROUNDS,
            links=self._links.along,
        )
        self._validators.append((validator, layout))
        following = around.following(module, exchange, around.emit)
        following["on_applied"], following["on_state"] = validator.on_applied, partial(self._on_state, module)
        following["compute"] = self._compute
        return Follower(layout, **following)

    async def _look_at_links(self) -> None:
        """Until cancelled, once a round."""
        seconds = self._around.manifest.rounds.seconds
        while True:
            await self._links.look(NETWORK_SHARE * seconds)
            await asyncio.sleep(seconds)

    async def _shown_by(self, peer: PeerId, timeout_seconds: float) -> Sequence[Signed[Links]]:
        return (await self._around.directory.links(peer, timeout_seconds=timeout_seconds)).records

    def _nothing_yet(self, module: str) -> ReplicaState:
        layout = self._whole.layouts[module]
        velocity = layout.zeros() if self._around.manifest.outer.momentum > 0 else None
        return ReplicaState(module, layout, Round(0), layout.zeros(), velocity)

    def _beside(self, module: str, round_: Round) -> dict[str, ReplicaState] | None:
        """The other modules' states at the beginning of a round: the same for all validators, in whatever order they
        apply modules' rounds. None if one of them is not known."""
        others = {name: states.get(round_) for name, states in self._states.items() if name != module}
        known = {name: state for name, state in others.items() if state is not None}
        return known if len(known) == len(others) else None

    async def _on_state(self, module: str, state: ReplicaState, residual: Flat | None) -> None:
        states = self._states[module]
        states[state.round] = state
        # The one that the next round begins with, and the one before: the other modules may be a round behind.
        for old in sorted(states)[:-KEPT_STATES]:
            del states[old]
        around, presence = self._around, self._presences[module]
        task = asyncio.create_task(presence.announce(state, 1, around.clock.now(), around.manifest.rounds.seconds))
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._compute, work, *arguments)
