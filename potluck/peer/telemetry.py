"""Telemetry: signed heartbeats over gossipsub. Each peer says how it is, hears the others, and keeps what it heard.

Nothing of a run depends on it: who opts out trains, is scored and is paid like everybody else. It neither speaks nor
hears then. All peers together send a few heartbeats per second, however many they are: each passes all of them on.
"""

from __future__ import annotations

import asyncio
import math
import random
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from potluck import __version__
from potluck.dht.manifest import RunId
from potluck.dht.records import MAX_RECORD_BYTES, Heartbeat, RejectedRecord, Signed, decode, encode
from potluck.dht.validator import TokenBuckets
from potluck.errors import NetworkError
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.pubsub import Control, Message, publish, subscribe
from potluck.peer.history import MAX_PEERS, History
from potluck.peer.intervals import LEAST_SECONDS, SELDOMEST_SECONDS, interval_seconds, lasting_seconds
from potluck.swarm.phases import RoundClock
from potluck.swarm.presence import Role

Emit = Callable[..., None]

MAX_AHEAD_SECONDS: Final = 3600.0
#: In nats per token; what is more is no loss, and `Heartbeat` refuses it.
MAX_LOSS: Final = 1e6
#: Of one peer, and of all: what is more is not even verified.
PEER_BURST: Final = 4.0
HEARD_PER_SECOND: Final = 200.0
#: Who is farther behind the clock has no part in the run now; a round ahead is a clock that differs.
BEHIND_ROUNDS: Final = 100
#: What bears a signature is passed on by the daemon before we see it. Beyond this (five to ten times what all honest
#: peers say), over so long, the topic is left for a while.
MOST_BYTES_PER_SECOND: Final = 20_000
FLOOD_SECONDS: Final = 30.0
AWAY_SECONDS: Final = 600.0
#: Neighbours that gossipsub passes a message on to, about, and gets it from.
MESH: Final = 6
#: How often what was heard is written down.
WRITE_SECONDS: Final = 0.2


def topic_of(run_id: RunId) -> str:
    return f"potluck/1/{run_id}/heartbeats"


class Vitals:
    """A heartbeat's contents, folded from a peer's own events. `role` and `module` are set by who knows them."""

    def __init__(self, role: Role, name: str, clock: RoundClock, now: Callable[[], float]) -> None:
        self.role, self.module, self.phase, self.load = role, None, "", 0.0  # type: Role, str | None, str, float
        self._name, self._round_seconds, self._now = name[:64], clock.seconds, now
        self._started = now()
        self._round = max(0, clock.round_at(self._started))
        self._contributed, self._speed = 0, 0.0
        self._loss: float | None = None

    def on_event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "swarm.round.started" | "swarm.pipeline.trained":
                loss = event.get("loss")
                self._round = event["round"]
                if loss is not None and math.isfinite(loss) and 0 <= loss <= MAX_LOSS:
                    self._loss = loss
            case "swarm.round.applied":
                self._speed = event["tokens"] / self._round_seconds
                self._contributed += event["contributed"] and not event["alone"]
            case "incentives.round.scored":
                self._round = event["round"]

    def beat(self) -> Heartbeat:
        return Heartbeat(
            module=self.module,
            round=self._round,
            role=self.role,
            phase=self.phase[:32],
            name=self._name,
            version=__version__[:32],
            loss=self._loss,
            tokens_per_second=self._speed,
            load=self.load,
            contributed=self._contributed,
            started=self._started,
            sent_at=self._now(),
        )


class Ear:
    """Opens what comes from anybody. `rejected` counts by reason."""

    def __init__(self, run_id: RunId, now: Callable[[], float], round_now: Callable[[], int]) -> None:
        self._run_id, self._now, self._round_now = run_id, now, round_now
        self._all = TokenBuckets(2 * HEARD_PER_SECOND, HEARD_PER_SECOND, now)
        self._peers = TokenBuckets(PEER_BURST, 1 / LEAST_SECONDS, now)
        self._newest: dict[PeerId, float] = {}
        self.rejected: dict[str, int] = {}

    def open(self, message: Message) -> Signed[Heartbeat] | None:
        """None: too many, forged, of another run, or older than what was heard before."""
        try:
            if not (self._peers.take(message.sender) and self._all.take("")):
                raise RejectedRecord("too_fast", "more heartbeats than anybody sends")
            signed = decode(message.data, self._run_id, now=self._now(), max_ahead_seconds=MAX_AHEAD_SECONDS)
            beat = signed.record
            if not isinstance(beat, Heartbeat):
                raise RejectedRecord("malformed", "not a heartbeat")
            if signed.peer != message.sender:
                raise RejectedRecord("wrong_subkey", "published by another peer than signed it")
            if beat.sent_at <= self._newest.get(signed.peer, 0.0) or beat.sent_at > signed.expires_at:
                raise RejectedRecord("expired", "older than the last one")
            if not -BEHIND_ROUNDS <= beat.round - self._round_now() <= 1:
                raise RejectedRecord("far_future", f"round {beat.round} is not about now")
        except RejectedRecord as error:
            self.rejected[error.reason] = self.rejected.get(error.reason, 0) + 1
            return None
        self._newest.pop(signed.peer, None)
        self._newest[signed.peer] = beat.sent_at
        if len(self._newest) > 20_000:
            self._newest.pop(next(iter(self._newest)))
        return Signed(beat, signed.peer, signed.expires_at)


class Telemetry:
    """`run` until cancelled. `describe` gives what to say now; None: only listen."""

    def __init__(
        self,
        control: Control,
        run_id: RunId,
        history: Path,
        *,
        clock: RoundClock,
        now: Callable[[], float],
        emit: Emit,
        identity: Identity | None = None,
        describe: Callable[[], Heartbeat] | None = None,
    ) -> None:
        self._control, self._run_id, self._path = control, run_id, history
        self._round_seconds, self._now, self._emit = clock.seconds, now, emit
        self._identity, self._describe = identity, describe
        self._round_now: Callable[[], int] = lambda: clock.round_at(now())
        self.ear = Ear(run_id, now, self._round_now)
        self._heard: dict[PeerId, Signed[Heartbeat]] = {}
        #: When each peer was heard last.
        self._present: dict[PeerId, float] = {}
        self._unwritten = False
        #: Of all messages on the topic, as they came to us; and in this span of `FLOOD_SECONDS`.
        self.bytes_heard, self._span, self._span_bytes = 0, 0, 0

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hear())
                tasks.create_task(self._write())
                if self._identity and self._describe:
                    tasks.create_task(self._speak(self._identity, self._describe))
        except Exception as error:  # nothing depends on telemetry: it must not end a peer
            self._emit("peer.telemetry.failed", error=repr(error))

    @property
    def bytes_passed(self) -> int:
        """Sent by gossip, about, and as many received: with opt-out nothing is."""
        return MESH * self.bytes_heard

    async def _hear(self) -> None:
        while True:
            await self._hear_until_flooded()
            self._emit("peer.heartbeats.flooded", bytes_per_second=self._span_bytes / FLOOD_SECONDS, away=AWAY_SECONDS)
            await asyncio.sleep(AWAY_SECONDS)
            self._span_bytes = 0

    def _count(self, size: int) -> None:
        self.bytes_heard += size
        span = int(self._now() // FLOOD_SECONDS)
        if span != self._span:
            self._span, self._span_bytes = span, 0
        self._span_bytes += size

    async def _hear_until_flooded(self) -> None:
        topic = topic_of(self._run_id)
        heard = subscribe(self._control, topic, max_bytes=MAX_RECORD_BYTES, on_bytes=self._count)
        async with aclosing(heard):
            async for message in heard:
                if message is not None:
                    self._hear_one(message)
                if self._span_bytes > MOST_BYTES_PER_SECOND * FLOOD_SECONDS:
                    return

    def _hear_one(self, message: Message) -> None:
        if (signed := self.ear.open(message)) is None:
            return
        self._heard[signed.peer] = signed
        self._present.pop(signed.peer, None)
        self._present[signed.peer] = self._now()
        if len(self._present) > MAX_PEERS:
            del self._present[next(iter(self._present))]

    async def _speak(self, identity: Identity, describe: Callable[[], Heartbeat]) -> None:
        while True:
            now = self._now()
            self._present = {peer: at for peer, at in self._present.items() if now - at < 2 * SELDOMEST_SECONDS}
            lasts = lasting_seconds(self._round_seconds, len(self._present))
            try:
                data = encode(describe(), identity, self._run_id, now + min(lasts, MAX_AHEAD_SECONDS / 2))
                await publish(self._control, topic_of(self._run_id), data)
            except (NetworkError, RejectedRecord) as error:
                self._emit("peer.heartbeat.failed", error=str(error))
            await asyncio.sleep(self._interval * random.uniform(0.8, 1.2))

    async def _write(self) -> None:
        """What cannot be written is forgotten: a full disk must not stop a peer. It is told once."""
        history: History | None = None
        try:
            while True:
                await asyncio.sleep(WRITE_SECONDS)
                if not self._heard:
                    continue
                heard, self._heard = list(self._heard.values()), {}
                try:
                    if history is not None and not history.is_there():
                        history.close()
                        history = None
                    if history is None:
                        history = await asyncio.to_thread(History.write, self._path)
                    lasting = 1.5 * max(self._round_seconds, self._interval)
                    await asyncio.to_thread(history.hear, heard, self._now(), self._round_now(), lasting)
                    self._unwritten = False
                except (sqlite3.Error, OSError) as error:
                    if not self._unwritten:
                        self._emit("peer.history.unwritten", error=str(error))
                    self._unwritten = True
        finally:
            if history is not None:
                history.close()

    @property
    def _interval(self) -> float:
        return interval_seconds(self._round_seconds, len(self._present))
