"""Heartbeats: what is said, and what is believed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.manifest import RunId
from potluck.dht.records import MAX_RECORD_BYTES, Heartbeat, RejectedRecord, decode, encode
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.pubsub import Message
from potluck.peer.intervals import interval_seconds
from potluck.peer.telemetry import HEARD_PER_SECOND, PEER_BURST, Ear, Telemetry, Vitals
from potluck.swarm.phases import RoundClock

RUN, OTHER = RunId("a" * 64), RunId("b" * 64)
NOW = 1e9


@pytest.fixture(scope="module")
def me(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.create(tmp_path_factory.mktemp("id") / "key")


def said(me: Identity, run: RunId = RUN, expires: float = NOW + 60, **changes: Any) -> bytes:
    fields: dict[str, Any] = {"round": 3, "started": NOW, "sent_at": NOW} | changes
    return encode(Heartbeat(**fields), me, run, expires)


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


def test_a_heartbeat_is_heard_as_it_was_said(me: Identity) -> None:
    heard = Ear(RUN, Clock(), lambda: 3).open(Message(me.peer_id, said(me, name="Ann", loss=2.5)))
    assert heard is not None
    assert (heard.peer, heard.record.name, heard.record.loss, heard.record.round) == (me.peer_id, "Ann", 2.5, 3)


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("malformed", lambda me, other: Message(me.peer_id, b"")),
        ("bad_signature", lambda me, other: Message(me.peer_id, said(me, run=OTHER))),
        ("expired", lambda me, other: Message(me.peer_id, said(me, expires=NOW - 1))),
        ("far_future", lambda me, other: Message(me.peer_id, said(me, expires=NOW + 1e7))),
        ("expired", lambda me, other: Message(me.peer_id, said(me, sent_at=NOW + 100))),
        ("far_future", lambda me, other: Message(me.peer_id, said(me, round=5))),
        ("wrong_subkey", lambda me, other: Message(other.peer_id, said(me))),
        ("oversized", lambda me, other: Message(me.peer_id, b"x" * (MAX_RECORD_BYTES + 1))),
    ],
)
def test_what_is_not_a_peers_own_fresh_word_is_not_heard(me: Identity, why: str, message: Any, tmp_path: Any) -> None:
    ear, other = Ear(RUN, Clock(), lambda: 3), Identity.create(tmp_path / "other")
    assert ear.open(message(me, other)) is None
    assert ear.rejected == {why: 1}


def test_another_kind_of_record_is_no_heartbeat(me: Identity) -> None:
    from potluck.dht.records import Replica

    record = Replica(module="stage.0", round=1, session=b"s" * 16, started=NOW, addresses=[])
    ear = Ear(RUN, Clock(), lambda: 3)
    assert ear.open(Message(me.peer_id, encode(record, me, RUN, NOW + 60))) is None
    assert ear.rejected == {"malformed": 1}


def test_an_older_heartbeat_never_replaces_a_newer(me: Identity) -> None:
    ear = Ear(RUN, Clock(), lambda: 3)
    assert ear.open(Message(me.peer_id, said(me, sent_at=NOW + 2)))
    assert ear.open(Message(me.peer_id, said(me, sent_at=NOW + 1))) is None
    assert ear.open(Message(me.peer_id, said(me, sent_at=NOW + 2))) is None


def test_who_speaks_too_often_is_not_heard_and_others_are(me: Identity, tmp_path: Any) -> None:
    clock = Clock()
    ear = Ear(RUN, clock, lambda: 3)
    burst = [ear.open(Message(me.peer_id, said(me, sent_at=NOW + n / 1000))) for n in range(20)]
    assert sum(one is not None for one in burst) == PEER_BURST
    other = Identity.create(tmp_path / "other")
    assert ear.open(Message(other.peer_id, said(other)))
    clock.now += 10
    assert ear.open(Message(me.peer_id, said(me, sent_at=NOW + 1)))


def test_strangers_cost_no_more_than_so_many_verifications_per_second() -> None:
    ear = Ear(RUN, Clock(), lambda: 3)
    for n in range(int(5 * HEARD_PER_SECOND)):
        ear.open(Message(PeerId(f"stranger{n}"), b"?"))
    assert ear.rejected["malformed"] == 2 * HEARD_PER_SECOND
    assert ear.rejected["too_fast"] == 3 * HEARD_PER_SECOND


@given(st.binary(max_size=600))
def test_any_bytes_are_heard_or_refused_never_raised(data: bytes) -> None:
    assert Ear(RUN, Clock(), lambda: 3).open(Message(PeerId("x"), data)) is None


@given(st.floats(0.1, 1e5), st.integers(0, 10**6))
def test_all_together_send_a_few_per_second(round_seconds: float, peers: int) -> None:
    assert interval_seconds(round_seconds, peers) >= 2.0
    assert peers / interval_seconds(round_seconds, peers) <= 5.0 or not 5 * 30 < peers <= 5 * 300
    assert interval_seconds(round_seconds, peers) <= 300.0


def test_nobody_can_store_a_heartbeat_in_the_dht(me: Identity) -> None:
    import msgspec

    from potluck.dht.records import key_id, key_name
    from potluck.dht.validator import RecordValidator

    validator = RecordValidator(RUN, max_ahead_seconds=100, clock=Clock())
    data, subkey = said(me), msgspec.msgpack.encode(me.peer_id)
    with pytest.raises(RejectedRecord, match="not for the DHT"):
        validator.open(key_id(key_name(RUN, "heartbeats")), subkey, msgspec.msgpack.encode(data), NOW + 60)


def test_vitals_are_folded_from_a_peers_events(me: Identity) -> None:
    vitals = Vitals("worker", "n" * 100, RoundClock(NOW - 45, 10.0, 1.0), Clock())
    assert vitals.beat().round == 4
    for event in (
        {"event": "swarm.round.started", "round": 4, "loss": 2.25},
        {"event": "swarm.round.applied", "round": 4, "tokens": 5000, "contributed": True, "alone": False},
        {"event": "swarm.round.started", "round": 5, "loss": math.nan},
        {"event": "swarm.round.applied", "round": 5, "tokens": 6000, "contributed": True, "alone": True},
        {"event": "peer.phase", "phase": "?"},
    ):
        vitals.on_event(event)
    beat = vitals.beat()
    assert (beat.round, beat.loss, beat.tokens_per_second, beat.contributed) == (5, 2.25, 600.0, 1)
    assert decode(encode(beat, me, RUN, NOW + 1), RUN, now=NOW, max_ahead_seconds=10).record == beat


class Daemon:
    """A libp2p daemon's control socket, which says what the test says."""

    def __init__(self) -> None:
        self.readers: list[asyncio.StreamReader] = []

    async def control(self, request: Any) -> tuple[Any, asyncio.StreamReader, Any]:
        if request.pubsub.type == p2pd_pb2.PSRequest.SUBSCRIBE:
            self.readers.append(asyncio.StreamReader())
            return None, self.readers[-1], MagicMock()
        return None, asyncio.StreamReader(), MagicMock()

    def say(self, data: bytes, sender: bytes = b"") -> None:
        message = p2pd_pb2.PSMessage(data=data, **{"from": sender}).SerializeToString()
        size, varint = len(message), b""
        while size > 127:
            varint, size = varint + bytes([size & 127 | 128]), size >> 7
        self.readers[-1].feed_data(varint + bytes([size]) + message)


def telemetry(daemon: Daemon, path: Path, events: list[str], me: Identity | None = None) -> Telemetry:
    clock = RoundClock(NOW - 35, 10.0, 1.0)
    vitals = Vitals("worker", "", clock, Clock())
    return Telemetry(
        daemon.control,
        RUN,
        path,
        clock=clock,
        now=Clock(),
        emit=lambda name, **fields: events.append(name),
        identity=me,
        describe=vitals.beat if me else None,
    )


def while_it_runs(one: Telemetry, scene: Callable[[], Awaitable[None]]) -> None:
    async def go() -> None:
        running = asyncio.create_task(one.run())
        try:
            async with asyncio.timeout(20):
                await scene()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(go())


def test_a_history_that_is_removed_or_cannot_be_written_stops_nothing(tmp_path: Path, me: Identity) -> None:
    path, events, daemon = tmp_path / "history.sqlite", list[str](), Daemon()
    path.mkdir()
    one, sender = telemetry(daemon, path, events), PeerID.from_base58(me.peer_id).to_bytes()

    async def scene() -> None:
        while not daemon.readers:
            await asyncio.sleep(0.01)
        daemon.say(said(me), sender)
        while "peer.history.unwritten" not in events:
            await asyncio.sleep(0.01)
        path.rmdir()
        for number in range(2):
            daemon.say(said(me, sent_at=NOW + 1 + number), sender)
            while not path.exists():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            path.unlink()

    while_it_runs(one, scene)
    assert events == ["peer.history.unwritten"]


def test_a_flood_is_left_for_a_while(tmp_path: Path) -> None:
    events, daemon = list[str](), Daemon()
    one = telemetry(daemon, tmp_path / "history.sqlite", events)

    async def scene() -> None:
        while not daemon.readers:
            await asyncio.sleep(0.01)
        for _ in range(100):
            daemon.say(bytes(10_000))
        while "peer.heartbeats.flooded" not in events:
            await asyncio.sleep(0.01)

    while_it_runs(one, scene)
    assert one.bytes_passed >= 6 * 20_000 * 30
    assert len(daemon.readers) == 1
