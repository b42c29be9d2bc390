"""Replicas on one virtual clock and a fake network: what simulations of rounds have in common."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from potluck.net.host import PeerId
from potluck.swarm.codecs import make_codec
from potluck.swarm.follower import Following, RoundRules
from potluck.swarm.layout import Layout
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round
from potluck.swarm.rounds import GossipReplica
from potluck.swarm.state import ReplicaState
from potluck.swarm.waits import WaitBoard

from fake_exchange import FakeExchange, World

MODULE = "stage.0"


class VirtualSwarm:
    """Each replica has a task; events are kept per peer."""

    layout: ClassVar[Layout]

    def __init__(self, rules: RoundRules, codec: str, momentum: float) -> None:
        self.rules, self.codec, self.momentum = rules, codec, momentum
        self.world = World()
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        self.replicas: dict[PeerId, GossipReplica] = {}
        self.tasks: dict[PeerId, asyncio.Task[Any]] = {}
        self.events: dict[PeerId, list[dict[str, Any]]] = {}

    def now(self) -> float:
        self.world.now = self.loop.time() - self.started  # also asked by the compute thread
        return self.world.now

    def following(self, peer: PeerId, session: bytes) -> Following:
        waits, events = WaitBoard(self.now), self.events.setdefault(peer, [])

        def emit(name: str, **fields: Any) -> None:
            events.append({"event": name, "at": self.now(), **fields})
            for wait in waits.current():
                assert float(wait["until"]) >= self.now() - 2.0, wait

        return Following(
            peer=peer,
            module=MODULE,
            rules=self.rules,
            codec=make_codec(self.codec, {"chunk": 64, "k": 8} if self.codec == "sparse" else {}),
            outer=OuterStep(1.0 if not self.momentum else 0.7, self.momentum),
            exchange=FakeExchange(self.world, peer),
            now=self.now,
            waits=waits,
            emit=emit,
            session=session,
        )

    def theta_0(self) -> ReplicaState:
        velocity = self.layout.zeros() if self.momentum else None
        return ReplicaState(MODULE, self.layout, Round(0), self.layout.zeros(), velocity)

    def crash(self, peer: PeerId) -> None:
        self.world.of(peer).down = True
        self.tasks[peer].cancel()

    async def until(self, time: float) -> None:
        await asyncio.sleep(time - self.now())
        for peer, task in self.tasks.items():
            if task.done() and not task.cancelled() and task.exception():
                raise AssertionError(f"{peer} died") from task.exception()

    def applied(self, peer: PeerId) -> dict[int, dict[str, Any]]:
        return {e["round"]: e for e in self.events[peer] if e["event"] == "swarm.round.applied"}

    def digests(self, round_: int) -> set[str]:
        return {self.applied(p)[round_]["digest"] for p in self.events if round_ in self.applied(p)}
