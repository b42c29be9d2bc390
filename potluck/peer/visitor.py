"""A visitor looks at a run without taking part: with an identity of its own, and nothing of it stays on the disk.

So the parts of a model that lies on many peers come together, as one model or only for as long as a text takes.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from potluck.dht.invite import Invite
from potluck.dht.manifest import Manifest, RunId, SignedManifest
from potluck.errors import NetworkError, PotluckError, UserError
from potluck.net.clock import RunClock
from potluck.net.identity import Identity
from potluck.peer.build import rules_of, shapes_of
from potluck.peer.control import ask
from potluck.peer.home import Home, RunFolder
from potluck.peer.node import NetworkSettings, Node
from potluck.peer.pipeline import read_stages, wire
from potluck.peer.seat import Around
from potluck.swarm.aggregate import RULE_NAMES
from potluck.swarm.codecs import CODEC_NAMES
from potluck.swarm.follower import Follower
from potluck.swarm.layout import Layout
from potluck.swarm.model import ModelSpec, build_module
from potluck.swarm.phases import Round
from potluck.swarm.presence import new_session
from potluck.swarm.stage import join_stages, stage_layout, stage_names
from potluck.swarm.state import ReplicaState
from potluck.swarm.trainer import PipelineTrainer
from potluck.swarm.waits import WaitBoard

#: A server that was announced when generation began is believed in for so much longer.
GENERATION_SECONDS: Final = 3600.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token each time."""

    tokens: int
    temperature: float
    seed: int


class Visitor:
    """Made by `visit`. All that it gives is as the run's peers agree on it at this moment."""

    def __init__(self, around: Around, signed: SignedManifest) -> None:
        self.manifest: Manifest = around.manifest
        self.signed = signed
        self.around = around
        self._bytes: dict[str, tuple[int, int]] = {}

    async def states(self) -> dict[str, ReplicaState]:
        """Each stage's state, by majority of those who train it. Raises NetworkError where nobody gives one."""
        spec = self.manifest.model
        names = stage_names(spec.stages)
        # In one thread: libraries that import themselves lazily do not like two.
        layouts = await asyncio.to_thread(lambda: [_layout(spec, name) for name in names])
        tasks = [asyncio.create_task(self._state(name, layout)) for name, layout in zip(names, layouts, strict=True)]
        try:
            return dict(zip(names, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def model(self) -> tuple[nn.Module, Round]:
        """(the whole model, the least round of its stages). It has to fit into this machine's memory."""
        states, spec = await self.states(), self.manifest.model
        round_ = min(state.round for state in states.values())
        whole = await asyncio.to_thread(build_module, spec.model_copy(update={"stages": 1}))
        if spec.stages == 1:
            (state,) = states.values()
            state.layout.scatter(state.theta, whole)
        else:
            tensors = {name: state.layout.tensors(state.theta) for name, state in states.items()}
            whole.load_state_dict(join_stages(spec, tensors), strict=False)
        return whole.eval(), round_

    async def generate(self, ids: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> None:
        """Continue a text: each token goes through the stages' servers, between the microbatches that they train."""
        around, stages, dice = self.around, self.manifest.model.stages, torch.Generator().manual_seed(sampling.seed)
        shapes = shapes_of(self.manifest)
        driver = PipelineTrainer(around.node.rpc, stages, shapes, now=around.clock.now)
        wire(driver, await read_stages(around.directory, stages), around.clock.now(), GENERATION_SECONDS)
        for _ in range(sampling.tokens):
            logits_V = (await driver.next_token(torch.tensor([ids[-shapes.length :]])))[0]
            if sampling.temperature > 0:
                chances_V = torch.softmax(logits_V / sampling.temperature, 0)
                token = int(torch.multinomial(chances_V, 1, generator=dice))
            else:
                token = int(logits_V.argmax())
            ids.append(token)
            on_token(token)

    async def _state(self, module: str, layout: Layout) -> ReplicaState:
        around = replace(self.around, on_progress=partial(self._on_progress, module))
        exchange = around.exchange()
        follower = Follower(layout, **around.following(module, exchange, around.emit))
        velocity = layout.zeros() if self.manifest.outer.momentum > 0 else None
        try:
            found = await follower.peek(ReplicaState(module, layout, Round(0), layout.zeros(), velocity))
        finally:
            exchange.close()
        if found is None:
            raise NetworkError(f"{module}: no peer gave its state. See `potluck status` of a peer of the run")
        return found

    def _on_progress(self, module: str, done: int, total: int) -> None:
        self._bytes[module] = done, total
        self.around.on_progress(sum(d for d, _ in self._bytes.values()), sum(t for _, t in self._bytes.values()))


def _layout(spec: ModelSpec, module: str) -> Layout:
    return stage_layout(spec, module) if spec.stages > 1 else Layout.of_module(build_module(spec))


@asynccontextmanager
async def visit(
    run_id: RunId,
    addresses: list[str],
    signed: SignedManifest | None = None,
    on_progress: Progress = lambda done, total: None,
) -> AsyncIterator[Visitor]:
    """Connect to a run by the addresses of some of its peers. Raises NetworkError, ManifestError, ClockError."""
    with tempfile.TemporaryDirectory(prefix="pl") as name:  # short: unix sockets allow 107 characters of path
        folder = Home(Path(name)).run(run_id)
        identity = Identity.create(Path(name) / "identity.key")
        async with observe(folder, identity, addresses, signed, on_progress=on_progress) as visitor:
            yield visitor


@asynccontextmanager
async def observe(
    folder: RunFolder,
    identity: Identity,
    addresses: list[str],
    signed: SignedManifest | None = None,
    *,
    network: NetworkSettings = NetworkSettings(nat_port_map=False),
    emit: Callable[..., None] = lambda name, **fields: None,
    on_progress: Progress = lambda done, total: None,
) -> AsyncIterator[Visitor]:
    """`visit` with a folder and an identity that stay. Raises NetworkError, ManifestError, ClockError."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.sockets.mkdir(parents=True, mode=0o700, exist_ok=True)
    clock, run_id = RunClock(), folder.run_id
    async with Node(identity, folder, clock, emit, network) as node:
        results = await node.dial(addresses)
        if not any(isinstance(result, str) for result in results.values()):
            why = "; ".join(f"{address}: {' '.join(str(error).split())}" for address, error in results.items())
            raise NetworkError(f"no peer of the run can be reached ({why or 'no address is known'})")
        signed = signed or await node.fetch_manifest(Invite(run_id, tuple(addresses)))
        manifest = signed.manifest
        manifest.check_known(codecs=CODEC_NAMES, rules=RULE_NAMES)
        measured = await clock.measure(node.rpc, await node.connected())
        if measured is not None:
            clock.correct(measured)
        directory = await node.join_dht(run_id, manifest)
        yield Visitor(
            Around(
                run_id=run_id,
                manifest=manifest,
                folder=folder,
                node=node,
                directory=directory,
                clock=clock,
                waits=WaitBoard(clock.now),
                session=new_session(),
                name="",
                keep_checkpoints=1,
                addresses=[],
                first_round=rules_of(manifest).clock.round_at(clock.now()),
                emit=emit,
                on_progress=on_progress,
            ),
            signed,
        )


async def addresses_of(folder: RunFolder) -> list[str]:
    """Peers of a run that this home takes part in: itself if it runs now, and those it knew last. Raises UserError."""
    addresses = folder.peers()
    try:
        status = await ask(folder.control_socket, "status")
        if status.get("invite"):
            addresses = [*Invite.parse(status["invite"]).peers, *addresses]
    except (PotluckError, OSError):
        pass  # it does not run now
    if not addresses:
        raise UserError(f"run {folder.run_id[:8]}: no other peer is known here: give a fresh invite instead of its id")
    return list(dict.fromkeys(addresses))
