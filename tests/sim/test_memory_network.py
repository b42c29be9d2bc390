"""The simulated internet and the in-memory host: real bytes, real streams, exact times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto.dht_pb2 import PingRequest

from potluck.errors import NetworkError, RpcError
from potluck.net.host import Host, PeerId
from potluck.net.hosts import memory
from potluck.net.hosts.memory import Channel, Lan, MemoryHost
from potluck.net.rpc import Reply, Rpc
from potluck.sim.loop import Deadlock, VirtualLoop, run
from potluck.sim.network import Line, Nat, Network, Weather
from potluck.sim.peer import identity_of

STILL = Weather(latency=1.0, spread=0.0, jitter=0.0)
ONE_WAY = 0.018


def peer(number: int) -> PeerId:
    return identity_of(0, number).peer_id


def in_network(
    *lines: Line, weather: Weather = STILL
) -> Callable[[Callable[[VirtualLoop, Network, list[MemoryHost]], Coroutine[Any, Any, None]]], None]:
    """Runs a body with one host for each line, in virtual time."""

    def go(body: Callable[[VirtualLoop, Network, list[MemoryHost]], Coroutine[Any, Any, None]]) -> None:
        async def main(loop: VirtualLoop) -> None:
            network = Network(loop, 1, weather)
            lan = Lan(network)
            hosts = []
            for number, line in enumerate(lines):
                network.add(peer(number), line)
                hosts.append(MemoryHost(lan, peer(number)))
            await body(loop, network, hosts)

        run(main)

    return go


def test_time_passes_only_when_all_is_idle_and_a_standstill_is_said() -> None:
    async def sleeps(loop: VirtualLoop) -> float:
        await asyncio.sleep(86_400)
        return loop.time()

    assert run(sleeps) == pytest.approx(86_400)

    async def waits_for_ever(loop: VirtualLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="stands still"):
        run(waits_for_ever)

    async def waits_for_less_than_the_clock_can_tell(loop: VirtualLoop) -> None:
        await asyncio.sleep(1000.0)
        while True:
            await asyncio.sleep(1e-20)

    with pytest.raises(Deadlock, match="does not pass"):
        run(waits_for_less_than_the_clock_can_tell)


def test_it_is_a_host() -> None:
    @in_network(Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        assert isinstance(hosts[0], Host)


def test_streams_share_a_line_fairly_and_small_messages_pass() -> None:
    @in_network(Line(up=1e6), Line(), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        times: dict[str, float] = {}
        for name, size, target in (("a", 10**6, 1), ("b", 10**6, 2), ("small", 1000, 1)):
            network.send(peer(0), peer(target), size, lambda name=name: times.update({name: loop.time()}), Channel())  # type: ignore[misc]
        await asyncio.sleep(10)
        assert times["a"] == pytest.approx(2.0 + ONE_WAY, abs=0.1)
        assert times["b"] == pytest.approx(2.0 + ONE_WAY, abs=0.1)
        assert times["small"] < 0.15
        assert network.traffic(peer(0)).sent == 2_001_000 == sum(network.traffic(peer(n)).received for n in (1, 2))


def test_the_slower_of_two_lines_decides() -> None:
    @in_network(Line(up=1e7), Line(down=1e6))
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        done: list[float] = []
        network.send(peer(0), peer(1), 10**6, lambda: done.append(loop.time()), Channel())
        await asyncio.sleep(10)
        assert done[0] == pytest.approx(1.1 + ONE_WAY, abs=0.01)


def test_a_channel_keeps_its_order_whatever_the_jitter_and_the_loss() -> None:
    @in_network(Line(), Line(), weather=Weather(jitter=3.0, loss=0.3))
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        seen: list[int] = []
        channel = Channel()
        for number in range(200):
            network.send(peer(0), peer(1), 100, lambda number=number: seen.append(number), channel)  # type: ignore[misc]
            await asyncio.sleep(0.001)
        await asyncio.sleep(10)
        assert seen == list(range(200))


def test_partitioned_and_frozen_peers_hear_nothing_until_it_is_over() -> None:
    @in_network(Line(), Line(), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        seen: list[int] = []
        network.partition([peer(0), peer(1)], [peer(2)])
        for target in (1, 2):
            network.send(peer(0), peer(target), 100, lambda target=target: seen.append(target), Channel())  # type: ignore[misc]
        await asyncio.sleep(1)
        assert seen == [1] and not network.can_dial(peer(0), peer(2))
        network.heal()
        assert seen == [1, 2]
        network.freeze(peer(1))
        network.send(peer(0), peer(1), 100, lambda: seen.append(3), Channel())
        await asyncio.sleep(1)
        assert seen == [1, 2]
        network.thaw(peer(1))
        assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("one", "other", "relayed"),
    [
        ("cone", "cone", False),
        ("public", "symmetric", False),
        ("cone", "symmetric", True),
        ("symmetric",) * 2 + (True,),
    ],
)
def test_nats_that_cannot_be_punched_need_a_public_relay(one: Nat, other: Nat, relayed: bool) -> None:
    @in_network(Line(nat=one), Line(nat=other), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        done: list[float] = []
        network.send(peer(0), peer(1), 1000, lambda: done.append(loop.time()), Channel())
        await asyncio.sleep(1)
        assert done[0] == pytest.approx(ONE_WAY * (2 if relayed else 1), abs=0.001)
        assert network.traffic(peer(2)).relayed == (1000 if relayed else 0)
        assert network.traffic(peer(2)).sent == (1000 if relayed else 0)
        hosts[2].crash()
        assert network.can_dial(peer(0), peer(1)) != relayed
        MemoryHost(hosts[0]._lan, peer(2))
        assert network.can_dial(peer(0), peer(1))


BEHIND_RELAYS = (Line(nat="symmetric"), Line(nat="symmetric"), Line(), Line())


def relays(network: Network, last: int = 3) -> list[int]:
    return [number for number in range(2, last + 1) if network.traffic(peer(number)).relayed]


def test_relayed_traffic_crosses_no_partition_and_goes_on_from_where_it_was_held() -> None:
    @in_network(*BEHIND_RELAYS[:3])
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        seen: list[float] = []
        network.partition([peer(0)], [peer(1), peer(2)])
        network.send(peer(0), peer(1), 100, lambda: seen.append(loop.time()), Channel())
        await asyncio.sleep(1)
        assert not seen and network.traffic(peer(2)).received == 0
        network.heal()
        await asyncio.sleep(1)
        assert seen == [pytest.approx(1 + ONE_WAY)]


@pytest.mark.parametrize("near", [2, 3])
def test_the_relay_is_one_that_both_ends_reach(near: int) -> None:
    @in_network(*BEHIND_RELAYS)
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        network.partition([peer(0), peer(1), peer(near)], [peer(5 - near)])
        assert network.can_dial(peer(0), peer(1))
        network.send(peer(0), peer(1), 100, lambda: None, Channel())
        await asyncio.sleep(1)
        assert relays(network) == [near]
        network.freeze(peer(near))
        assert not network.can_dial(peer(0), peer(1))
        network.heal()
        assert network.can_dial(peer(0), peer(1))
        network.partition([peer(0), peer(1)], [peer(2), peer(3)])
        assert not network.can_dial(peer(0), peer(1))


def test_a_frozen_relay_holds_what_it_forwards_in_order_and_what_left_a_frozen_source_arrives() -> None:
    @in_network(*BEHIND_RELAYS)
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        seen: dict[int, float] = {}
        channel = Channel()

        def send(number: int, target: int, channel: Channel) -> None:
            network.send(peer(0), peer(target), 100, lambda: seen.update({number: loop.time()}), channel)

        send(0, 1, channel)
        await asyncio.sleep(0.1)
        (relay,) = relays(network)
        network.freeze(peer(relay))
        send(1, 1, channel)
        send(2, 1, channel)
        await asyncio.sleep(0.9)
        assert len(seen) == 1
        network.thaw(peer(relay))
        await asyncio.sleep(1)
        assert list(seen) == [0, 1, 2] and seen[1] == pytest.approx(1 + ONE_WAY)

        direct = Channel()
        send(3, 2, direct)
        network.freeze(peer(0))
        send(4, 2, direct)
        await asyncio.sleep(1)
        network.thaw(peer(0))
        await asyncio.sleep(1)
        assert seen[3] == pytest.approx(2 + ONE_WAY) and seen[4] == pytest.approx(3 + ONE_WAY)


@pytest.mark.parametrize("others", [0, 1], ids=["the only relay", "one of two"])
@pytest.mark.parametrize("held", [False, True], ids=["in flight", "held"])
def test_a_dead_relay_breaks_the_streams_and_calls_that_it_forwards(others: int, held: bool) -> None:
    @in_network(*BEHIND_RELAYS[: 3 + others])
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        ends: list[asyncio.StreamReader] = []

        async def keep(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ends.append(reader)
            await asyncio.Event().wait()

        await hosts[1].add_binary_stream_handler("keep", keep)
        await serve_forever(hosts[1])
        _, reader, writer = await hosts[0].call_binary_stream_handler(hosts[1].peer_id, "keep")
        (relay,) = relays(network, 2 + others)
        writer.write(b"lost")
        call = asyncio.create_task(ping(hosts[0], hosts[1]))
        await asyncio.sleep(0.001)
        if held:
            network.freeze(peer(relay))
            await asyncio.sleep(1)
        before = loop.time()
        hosts[relay].crash()
        for end in (reader, *ends):
            with pytest.raises(ConnectionResetError):
                await end.read(1)
        with pytest.raises(P2PHandlerError):
            await call
        assert loop.time() - before < 4 * ONE_WAY
        assert not hosts[0]._ends and not hosts[1]._ends


def test_a_reset_fails_a_call() -> None:
    @in_network(Line(), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        await serve_forever(hosts[1])
        await hosts[0]._dial(peer(1))
        network.weather = replace(STILL, reset=1.0)
        with pytest.raises(P2PHandlerError, match="reset"):
            await ping(hosts[0], hosts[1])


def test_a_call_to_a_peer_that_crashes_while_it_serves_fails_when_the_reset_arrives() -> None:
    @in_network(Line(), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        await serve_forever(hosts[1])
        call = asyncio.create_task(ping(hosts[0], hosts[1]))
        await asyncio.sleep(1)
        hosts[1].crash()
        with pytest.raises(P2PHandlerError, match="reset"):
            await call
        assert loop.time() == pytest.approx(1 + ONE_WAY)


async def serve_forever(host: MemoryHost) -> None:
    async def forever(request: PingRequest, context: Any) -> PingRequest:
        await asyncio.Event().wait()
        return request

    await host.add_protobuf_handler("forever", forever, PingRequest)


async def ping(caller: MemoryHost, target: MemoryHost) -> None:
    async with asyncio.timeout(60):
        await caller.call_protobuf_handler(target.peer_id, "forever", PingRequest(), PingRequest)


def test_too_many_connections_cost_the_oldest_without_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.MAX_CONNECTIONS == 384
    monkeypatch.setattr(memory, "MAX_CONNECTIONS", 3)

    @in_network(*[Line()] * 7)
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        async def keep(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.close()

        await hosts[1].add_binary_stream_handler("keep", keep)
        _, _, writer = await hosts[0].call_binary_stream_handler(hosts[1].peer_id, "keep")
        for number in (2, 3, 4):
            await hosts[number]._dial(peer(0))
        assert list(hosts[0]._connected) == [peer(1), peer(3), peer(4)]
        assert hosts[2].connections == 0 and hosts[1].connections == hosts[3].connections == 1
        writer.close()
        await asyncio.sleep(1)
        for number in (5, 6):
            await hosts[0]._dial(peer(number))
        assert list(hosts[0]._connected) == [peer(4), peer(5), peer(6)]
        assert hosts[1].connections == hosts[3].connections == 0


def test_calls_and_large_bodies_cross_it_and_take_their_time() -> None:
    @in_network(Line(up=1e6), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        a, b = Rpc(hosts[0]), Rpc(hosts[1])
        await a.start()
        await b.start()
        body = bytes(range(256)) * 8192

        async def give(caller: PeerId, head: dict[str, Any], data: memoryview) -> Reply:
            return Reply({"from": caller}, body)

        a.register("give", give)
        reply = await b.call(peer(0), "give", timeout_seconds=60, max_response_bytes=1 << 22, lane="bulk")
        assert bytes(reply.body) == body and reply.head["from"] == peer(1)
        assert 2.1 < loop.time() < 2.6  # two megabytes at one megabyte a second, and the way there
        before = loop.time()
        await b.call(peer(0), "give", timeout_seconds=60, max_response_bytes=1 << 22, lane="bulk")
        assert loop.time() - before == pytest.approx(2.1 + 2 * ONE_WAY, abs=0.1)
        await a.close()
        await b.close()


def test_a_crash_breaks_calls_at_once_and_nobody_can_be_dialled() -> None:
    @in_network(Line(), Line(), Line())
    async def _(loop: VirtualLoop, network: Network, hosts: list[MemoryHost]) -> None:
        a, b = Rpc(hosts[0]), Rpc(hosts[1])
        await a.start()

        async def forever(caller: PeerId, head: dict[str, Any], data: memoryview) -> Reply:
            await asyncio.Event().wait()
            return Reply()

        a.register("forever", forever)
        call = asyncio.create_task(b.call(peer(0), "forever", timeout_seconds=600))
        await asyncio.sleep(5)
        hosts[0].crash()
        with pytest.raises(RpcError):
            await call
        assert loop.time() < 6
        with pytest.raises(NetworkError, match="refused"):
            await hosts[2].connect(f"/ip4/10.0.0.1/tcp/4001/p2p/{peer(0)}", 30)
        network.partition([peer(1)], [peer(2)])
        with pytest.raises(NetworkError, match="no answer"):
            await hosts[1].connect(f"/ip4/10.0.0.1/tcp/4001/p2p/{peer(2)}", 30)
        await b.close()
