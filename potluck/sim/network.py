"""The simulated internet: lines with fair sharing, latency by region, loss, NAT, partitions. One seed, one history.

- A message passes the sender's uplink, the distance, the receiver's downlink. A busy line is shared between its
  streams by turns of 32 KiB, which is fair sharing as fluid models have it, down to that size.
- The distance is a base for each pair (log-normal around its regions' value) and a little jitter for each message.
- A lost message costs a retransmission timeout; now and then one breaks its stream.
- Two peers behind NATs talk directly where both are cones (hole punching), else through a living public relay, whose
  line they use. A channel keeps its relay; when that dies, what it was to forward is lost and its channels break.
- Between partitioned peers, to a frozen peer and out of one messages are held, and go on from there when it is over.
"""

from __future__ import annotations

import asyncio
import math
import random
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from potluck.net.host import PeerId
from potluck.net.hosts.memory import Arrive, Channel
from potluck.sim.loop import Shot, VirtualLoop

Nat = Literal["public", "cone", "symmetric"]

_TURN_BYTES = 32 * 1024
#: Sending times below this are summed up before they cost an event of their own.
_SMALL_SECONDS = 0.001
_RETRANSMIT_SECONDS = 0.2
#: One-way milliseconds between regions: (a home in) Europe, North America, Asia, South America.
REGIONS = ((18, 48, 110, 105), (48, 22, 85, 70), (110, 85, 30, 150), (105, 70, 150, 25))


@dataclass(frozen=True)
class Line:
    """A peer's connection: bytes per second (None: no limit), region (index into REGIONS), kind of NAT."""

    up: float | None = None
    down: float | None = None
    region: int = 0
    nat: Nat = "public"


@dataclass(frozen=True)
class Weather:
    """What the network does to everybody. `spread`: sigma of the log-normal base latency. Rates are per message."""

    latency: float = 1.0
    """Factor on the regions' latencies; 0 for none."""
    spread: float = 0.3
    jitter: float = 0.1
    loss: float = 0.0
    reset: float = 0.0


@dataclass
class Traffic:
    """Bytes. What a peer relayed is in `sent` and `received` too."""

    sent: int = 0
    received: int = 0
    relayed: int = 0


class _Pipe:
    """One direction of a line."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rate: float) -> None:
        self._loop, self.rate = loop, rate
        self._queues: OrderedDict[Channel, deque[tuple[list[int], Arrive]]] = OrderedDict()
        self._busy = False
        self._debt = 0.0

    def push(self, channel: Channel, size: int, then: Arrive) -> None:
        if not self._busy and self._debt + size / self.rate < _SMALL_SECONDS:
            self._debt += size / self.rate
            then()
            return
        self._queues.setdefault(channel, deque()).append(([size], then))
        if not self._busy:
            self._turn()

    def _turn(self) -> None:
        if not self._queues:
            self._busy = False
            return
        self._busy = True
        channel = next(iter(self._queues))
        left = self._queues[channel][0][0]
        part = min(left[0], _TURN_BYTES)
        left[0] -= part
        seconds, self._debt = part / self.rate + self._debt, 0.0
        self._loop.call_later(seconds, self._sent, channel)

    def _sent(self, channel: Channel) -> None:
        queue = self._queues[channel]
        left, then = queue[0]
        if left[0]:
            self._queues.move_to_end(channel)
        else:
            queue.popleft()
            if queue:
                self._queues.move_to_end(channel)
            else:
                del self._queues[channel]
            then()
        self._turn()


@dataclass
class _Port:
    line: Line
    up: _Pipe | None
    down: _Pipe | None
    traffic: Traffic = field(default_factory=Traffic)


class _Flight(Shot):
    """A message on one hop of its way."""

    __slots__ = ("arrive", "at", "channel", "hops", "network", "size", "source", "target")

    def __init__(
        self, network: Network, hops: tuple[PeerId, ...], at: int, size: int, arrive: Arrive, channel: Channel
    ) -> None:
        self.network, self.hops, self.at, self.size = network, hops, at, size
        self.source, self.target = hops[at], hops[at + 1]
        self.arrive, self.channel = arrive, channel

    def leave(self) -> None:
        port = self.network._ports[self.source]
        port.traffic.sent += self.size
        if port.up is None:
            self.fly()
        else:
            port.up.push(self.channel, self.size, self.fly)

    def fly(self) -> None:
        network, source, channel = self.network, self.source, self.channel
        if self.at and source not in network._living:
            network._loop.call_soon(channel.break_off)
            return
        if source in network._frozen:
            network._unsent.setdefault(source, []).append(self.fly)
            return
        when = network._loop.time() + network._seconds(source, self.target, channel)
        # A stream keeps its order; timers of one instant would not.
        channel.last = when = max(when, channel.last + 1e-9)
        network._loop.shoot_at(when, self)

    def _run(self) -> None:
        port = self.network._ports.get(self.target)
        if port is None or port.down is None:
            self.landed()
        else:
            port.down.push(self.channel, self.size, self.landed)

    def landed(self) -> None:
        network, target = self.network, self.target
        to_relay = self.at + 2 < len(self.hops)
        if to_relay and target not in network._living:
            network._loop.call_soon(self.channel.break_off)
            return
        if network._blocked(self.source, target):
            network._held.append(self.landed)
            return
        port = network._ports.get(target)
        if port is not None:
            port.traffic.received += self.size
            if to_relay:
                port.traffic.relayed += self.size
        if to_relay:
            _Flight(network, self.hops, self.at + 1, self.size, self.arrive, self.channel).leave()
        else:
            self.arrive()


class Network:
    """Implements `net.hosts.memory.Wire`. Peers are `add`ed before they send."""

    def __init__(self, loop: VirtualLoop, seed: int, weather: Weather | None = None) -> None:
        self._loop, self._seed = loop, seed
        self.weather = weather or Weather()
        self._dice = random.Random(f"network {seed}")
        self._ports: dict[PeerId, _Port] = {}
        self._living: set[PeerId] = set()
        self._relays: list[PeerId] = []
        self._distances: dict[tuple[PeerId, PeerId], float] = {}
        self._sides: dict[PeerId, int] = {}
        self._frozen: set[PeerId] = set()
        #: What waits where it arrived, and what a frozen peer could not send: functions that try again.
        self._held: list[Callable[[], None]] = []
        self._unsent: dict[PeerId, list[Callable[[], None]]] = {}

    def add(self, peer: PeerId, line: Line) -> None:
        """Also changes the line of a known peer; what is under way keeps its speed."""
        traffic = self._ports[peer].traffic if peer in self._ports else Traffic()
        up, down = (_Pipe(self._loop, rate) if rate else None for rate in (line.up, line.down))
        self._ports[peer] = _Port(line, up, down, traffic)
        if peer in self._living:
            self.up(peer)

    def traffic(self, peer: PeerId) -> Traffic:
        return self._ports[peer].traffic

    @property
    def median_latency(self) -> float:
        """One-way seconds between two peers of the first region."""
        return self.weather.latency * REGIONS[0][0] / 1000

    def charge(self, peer: PeerId, size: int) -> None:
        """Bytes that a model says it sent (of both directions, half is its own)."""
        self._ports[peer].traffic.sent += size // 2
        self._ports[peer].traffic.received += size // 2

    # --- trouble

    def partition(self, *sides: Collection[PeerId]) -> None:
        """From now on only peers of one side hear each other; who is on no side is on the first."""
        self._sides = {peer: number for number, side in enumerate(sides) for peer in side}
        self._release()

    def heal(self) -> None:
        self.partition()

    def freeze(self, peer: PeerId) -> None:
        self._frozen.add(peer)

    def thaw(self, peer: PeerId) -> None:
        self._frozen.discard(peer)
        self._release(peer)

    def _apart(self, one: PeerId, other: PeerId) -> bool:
        return bool(self._sides) and self._sides.get(one, 0) != self._sides.get(other, 0)

    def _blocked(self, source: PeerId, target: PeerId) -> bool:
        """Whether nothing arrives. What a peer sent before it froze does."""
        return target in self._frozen or self._apart(source, target)

    def _release(self, peer: PeerId | None = None) -> None:
        # First what `peer` had to send: what arrives makes it send more, and a channel keeps its order.
        for fly in self._unsent.pop(peer, ()) if peer else ():
            fly()
        held, self._held = self._held, []
        for landed in held:
            landed()

    # --- Wire

    def up(self, peer: PeerId) -> None:
        self._living.add(peer)
        if peer in self._relays:
            self._relays.remove(peer)
        if peer in self._ports and self._ports[peer].line.nat == "public":
            self._relays.append(peer)

    def down(self, peer: PeerId) -> None:
        self._living.discard(peer)
        if peer in self._relays:
            self._relays.remove(peer)
            self._release(peer)

    def can_dial(self, source: PeerId, target: PeerId) -> bool:
        if source in self._frozen or self._blocked(source, target):
            return False
        if target not in self._ports or not self._needs_relay(source, target):
            return True
        relay = self._relay(source, target)
        return relay is not None and not self._blocked(source, relay) and not self._apart(relay, target)

    def send(self, source: PeerId, target: PeerId, size: int, arrive: Arrive, channel: Channel) -> None:
        hops: tuple[PeerId, ...] = (source, target)
        if target in self._ports and self._needs_relay(source, target):
            if channel.relay not in self._living:
                channel.relay = self._relay(source, target)
            if channel.relay is None:
                self._loop.call_soon(channel.break_off)
                return
            hops = (source, channel.relay, target)
        _Flight(self, hops, 0, size, arrive, channel).leave()

    def _seconds(self, source: PeerId, target: PeerId, channel: Channel) -> float:
        weather = self.weather
        seconds = self._distance(source, target) * (1 + weather.jitter * self._dice.random())
        if weather.loss and self._dice.random() < weather.loss:
            seconds += _RETRANSMIT_SECONDS + 2 * seconds
        if weather.reset and self._dice.random() < weather.reset:
            self._loop.call_soon(channel.break_off)
        return seconds

    def _distance(self, source: PeerId, target: PeerId) -> float:
        pair = (source, target) if source < target else (target, source)
        known = self._distances.get(pair)
        if known is None:
            a, b = (self._ports[p].line.region if p in self._ports else 0 for p in pair)
            known = self.weather.latency * REGIONS[a][b] / 1000 * math.exp(self.weather.spread * self._normal(pair))
            if len(self._distances) > 500_000:
                self._distances.clear()
            self._distances[pair] = known
        return known

    def _normal(self, pair: tuple[PeerId, PeerId]) -> float:
        """The pair's own standard normal number: it does not depend on who met whom when."""
        return random.Random(zlib.crc32(f"{self._seed} {pair[0]} {pair[1]}".encode())).gauss(0.0, 1.0)

    # --- NAT

    def _needs_relay(self, source: PeerId, target: PeerId) -> bool:
        one, other = self._ports[source].line.nat, self._ports[target].line.nat
        # A public peer that wants a NATed one asks it, through a relay, to dial back: the connection is direct.
        return one != "public" and other != "public" and (one == "symmetric" or other == "symmetric")

    def _relay(self, source: PeerId, target: PeerId) -> PeerId | None:
        """A living public peer, one that both reach if there is any: a pair's first or the next that will do."""
        relays, pair = self._relays, "".join(sorted((source, target)))
        if not relays:
            return None
        first = zlib.crc32(pair.encode()) % len(relays)
        if not self._apart(source, target):
            for number in range(first, first + len(relays)):
                relay = relays[number % len(relays)]
                if not self._blocked(source, relay) and not self._apart(relay, target):
                    return relay
        return relays[first]
