"""What peers tell each other about their lines, and what kind of NAT follows from it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potluck.errors import RpcRefused
from potluck.net import line
from potluck.net.host import PeerId
from potluck.net.line import Endpoint, LineService, endpoint, seen_by, upload_speed
from potluck.net.nat import NatKind, Sighting, kind_of_nat
from potluck.net.rpc import Reply, Rpc

from fake_net import FakeId, network

PLAIN = "/ip4/198.51.100.7/tcp/4001"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (PLAIN, Endpoint("198.51.100.7", 4001)),
        (f"{PLAIN}/p2p/12D3KooW", Endpoint("198.51.100.7", 4001)),
        ("/ip6/2001:db8::1/tcp/1", Endpoint("2001:db8::1", 1)),
        (f"{PLAIN}/p2p/12D3KooW/p2p-circuit", None),
        ("/ip4/198.51.100.7/udp/4001/quic", None),
        ("/ip4/198.51.100.7/tcp/65536", None),
        ("/ip4/" + "1" * 99 + "/tcp/1", None),
        ("", None),
    ],
)
def test_only_plain_tcp_is_an_endpoint(address: str, found: Endpoint | None) -> None:
    assert endpoint(address) == found


def connect(rpc: Rpc, *peers: tuple[Rpc, str]) -> None:
    """What the host says of its connections."""

    async def list_peers() -> list[Any]:
        return [SimpleNamespace(peer_id=FakeId(other.peer_id), addrs=[address]) for other, address in peers]

    rpc.host.list_peers = list_peers  # type: ignore[method-assign]


def test_a_peer_tells_where_it_sees_us_and_an_answer_that_is_none_is_none(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b, liar, mute = [await net.rpc(name) for name in ("a", "b", "liar", "mute")]
            connect(a, (b, PLAIN), (liar, f"{PLAIN}/p2p/{liar.peer_id}/p2p-circuit"))
            LineService(a)

            async def lie(peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
                return Reply({"address": ["/ip4/1.2.3.4/tcp/1"]})

            liar.register(line.SEEN_METHOD, lie)
            assert await seen_by(b, a.peer_id, 5.0) == Endpoint("198.51.100.7", 4001)
            assert await seen_by(liar, a.peer_id, 5.0) is None  # it is relayed
            assert await seen_by(b, liar.peer_id, 5.0) is None
            assert await seen_by(b, mute.peer_id, 5.0) is None

    asyncio.run(main())


def test_who_asks_too_often_is_refused(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            a, b = await net.rpc("a"), await net.rpc("b")
            connect(a, (b, PLAIN))
            now = 0.0
            LineService(a, clock=lambda: now)
            for _ in range(line.SEEN_PER_SECOND):
                await b.call(a.peer_id, line.SEEN_METHOD, timeout_seconds=5)
            with pytest.raises(RpcRefused):
                await b.call(a.peer_id, line.SEEN_METHOD, timeout_seconds=5)
            now = 1.0
            await b.call(a.peer_id, line.SEEN_METHOD, timeout_seconds=5)

    asyncio.run(main())


def test_bytes_are_taken_up_to_a_budget_for_each_and_for_all(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "PEER_BYTES", 5 * line.BODY_BYTES)
    monkeypatch.setattr(line, "ALL_BYTES", 7 * line.BODY_BYTES)

    async def main() -> None:
        async with network(short_dir) as net:
            a, b, c = [await net.rpc(name) for name in "abc"]
            now = 0.0
            LineService(a, clock=lambda: now)
            sent, seconds = await upload_speed(b, a.peer_id, most_bytes=3 * line.BODY_BYTES)
            assert sent == 3 * line.BODY_BYTES and seconds > 0
            assert (await upload_speed(b, a.peer_id, most_bytes=9 * line.BODY_BYTES))[0] == 2 * line.BODY_BYTES
            assert (await upload_speed(c, a.peer_id, most_bytes=9 * line.BODY_BYTES))[0] == 2 * line.BODY_BYTES
            assert await upload_speed(c, a.peer_id) == (0, 0.0)
            assert await upload_speed(a, b.peer_id) == (0, 0.0), "who does not know the method takes none"
            now = line.BUDGET_SECONDS
            assert (await upload_speed(c, a.peer_id, most_bytes=line.BODY_BYTES))[0] == line.BODY_BYTES

    asyncio.run(main())


def test_empty_bodies_do_not_make_it_remember_more_and_more_peers(short_dir: Path) -> None:
    async def main() -> None:
        async with network(short_dir) as net:
            service = LineService(await net.rpc("a"))
            for number in range(line.ALL_BYTES // line.LEAST_BYTES):
                await service._take(PeerId(str(number)), {}, memoryview(b""))
            with pytest.raises(RpcRefused):
                await service._take(PeerId("one more"), {}, memoryview(b""))

    asyncio.run(main())


# ---- kinds of NAT -----------------------------------------------------------------------------------------------

OWN = "192.168.1.10"
OUTER = "203.0.114.5"
LOCAL = Endpoint(OWN, 4001)


def sighting(observer: str, ip: str = OUTER, port: int = 4001, local: Endpoint | None = LOCAL) -> Sighting:
    return Sighting(observer, Endpoint(ip, port), local)


ONE, OTHER, THIRD = "11.0.1.2", "11.0.2.2", "11.0.3.2"


@pytest.mark.parametrize(
    ("sightings", "mapping"),
    [
        ([sighting(ONE), sighting(OTHER)], "one"),
        ([sighting(ONE, port=5), sighting(OTHER, port=5), sighting(THIRD, port=5)], "one"),
        ([sighting(ONE, port=5), sighting(OTHER, port=6)], "many"),
        ([sighting(ONE), sighting(OTHER, ip="203.0.114.6")], "many"),
        ([sighting(ONE, ip=OWN)], "unknown"),
        ([sighting(ONE, ip="11.9.9.9"), sighting(OTHER, ip="11.9.9.9")], "none"),
        ([sighting(ONE)], "unknown"),
        # Another local port may always get another outer one; two ports of one peer tell nothing of other peers.
        ([sighting(ONE, port=5), sighting(OTHER, port=6, local=Endpoint(OWN, 39999))], "unknown"),
        ([sighting(ONE, port=5), sighting(OTHER, port=6, local=None)], "unknown"),
        ([sighting(ONE, port=5), sighting(ONE, port=6)], "unknown"),
        # What peers of the same network see says nothing, and neither do they as destinations.
        ([sighting("192.168.1.7", ip=OWN), sighting("192.168.1.8", ip=OWN)], "unknown"),
        ([sighting("192.168.1.7"), sighting(ONE)], "unknown"),
        ([sighting(ONE, ip="garbage"), sighting(OTHER, ip="")], "unknown"),
        ([], "unknown"),
        # IPv6 has no NATs, and says nothing about the one for IPv4.
        ([sighting("2a00::1", ip="2a00::9"), sighting(ONE), sighting(OTHER)], "one"),
        ([sighting("2a00::1", ip="2a00::9")], "none"),
    ],
)
def test_the_mapping_follows_from_who_saw_what(sightings: list[Sighting], mapping: str) -> None:
    found = kind_of_nat(sightings, {OWN, "11.9.9.9", "2a00::9"})
    assert found.mapping == mapping and bool(found.why) == (mapping == "unknown") and not found.nested


@pytest.mark.parametrize(
    ("own", "router", "nested"),
    [
        ({OWN}, set(), False),
        ({OWN}, {OUTER}, False),
        ({OWN}, {"100.72.3.4"}, True),
        ({"100.64.0.9"}, set(), True),
        ({OWN}, {"10.20.30.40"}, True),
        ({OWN}, {"203.0.114.99"}, True),
        ({OWN}, {"2a00::7"}, False),
        ({"100.128.0.1"}, set(), False),
    ],
)
def test_a_router_whose_outer_address_nobody_sees_is_behind_another_nat(
    own: set[str], router: set[str], nested: bool
) -> None:
    assert kind_of_nat([sighting(ONE), sighting(OTHER)], own, router) == NatKind("one", nested)
