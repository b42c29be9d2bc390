"""What a plan's faults do to a simulated swarm."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from potluck.sim.peer import QUOTA_BYTES, SimPeer
from potluck.sim.plan import Fault

if TYPE_CHECKING:
    from potluck.sim.world import World


class Faults:
    """Strikes the peers of a world. Whom a fault hits follows from its dice."""

    def __init__(self, world: World) -> None:
        self._world = world

    def strike(self, fault: Fault, dice: random.Random) -> None:
        if fault.kind == "join":
            count = fault.count or max(1, round((fault.share or 0) * len(self._world.peers)))
            over = max(0.0, fault.rounds) * self._world.plan.seconds
            for _ in range(count):
                self._world.loop.call_later(dice.uniform(0, over), self._world.arrive)
            return
        if fault.kind == "heal":
            self._world.network.heal()
            return
        if fault.kind == "organizer_dies":
            self._world.peers[0].struck = True
            self._world.peers[0].crash()
            return
        victims = self._victims(fault, dice)
        if fault.kind == "partition":
            self._world.network.partition(
                [p.id for p in self._world.peers if p not in victims], [p.id for p in victims]
            )
            if fault.rounds:
                self._world.loop.call_later(fault.rounds * self._world.plan.seconds, self._world.network.heal)
            return
        for victim in victims:
            victim.struck = True
            self._hit(victim, fault, dice)

    def _note(self, fault: Fault, what: str) -> None:
        self._world.report.notes.append(f"round {fault.round}: {fault.kind} {what}")

    def _victims(self, fault: Fault, dice: random.Random) -> list[SimPeer]:
        if fault.peer is not None:
            if fault.peer >= len(self._world.peers):
                self._note(fault, f"strikes nobody: there is no peer {fault.peer}")
                return []
            return [self._world.peers[fault.peer]]
        if fault.kind == "restart":
            candidates = [peer for peer in self._world.peers if not peer.alive]
        else:
            candidates = [peer for peer in self._world.peers if peer.alive]
        count = fault.count or round((fault.share or 0.0) * len(candidates))
        if count > len(candidates):
            self._note(fault, f"strikes {len(candidates)}, not {count}: there are no more")
        return sorted(dice.sample(candidates, min(count, len(candidates))), key=lambda peer: peer.number)

    def _hit(self, peer: SimPeer, fault: Fault, dice: random.Random) -> None:
        undo: Callable[[], None] | None = None
        match fault.kind:
            case "crash":
                peer.crash()
                undo = lambda: self._restart(peer)  # noqa: E731
            case "restart":
                self._restart(peer)
            case "slow":
                peer.pace.slowness = fault.factor
                undo = lambda: setattr(peer.pace, "slowness", 1.0)  # noqa: E731
            case "freeze":
                peer.freeze()
                undo = peer.thaw
            case "lie":
                peer.lie = fault.lie
                self._world.report.liars.append(peer.number)
                undo = lambda: setattr(peer, "lie", None)  # noqa: E731
            case "clock_skew":
                error = fault.seconds if fault.peer is not None else dice.uniform(-fault.seconds, fault.seconds)
                peer.set_clock(error)
                undo = lambda: peer.set_clock(0.0)  # noqa: E731
            case "disk_full":
                self._fill_disk(peer, True)
                undo = lambda: self._fill_disk(peer, False)  # noqa: E731
        if undo and fault.rounds:
            self._world.loop.call_later(fault.rounds * self._world.plan.seconds, undo)

    def _restart(self, peer: SimPeer) -> None:
        if not peer.alive:
            peer.start(self._world.bootstrap())

    def _fill_disk(self, peer: SimPeer, full: bool) -> None:
        peer.disk_full = full
        if peer.store:
            peer.store.quota_bytes = 0 if full else QUOTA_BYTES
        if not full and peer.ended and not peer.alive:
            self._restart(peer)  # the volunteer made room
