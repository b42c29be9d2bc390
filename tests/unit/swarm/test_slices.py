"""Who aggregates what, and what a stranger may say about it."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import ProtocolError, RpcRemoteError
from potluck.net.host import PeerId
from potluck.swarm.phases import Round
from potluck.swarm.slice_board import SliceBoard
from potluck.swarm.slices import Accusation, Aggregated, agrees, assign, parse_aggregated

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))

from fake_net import network

BLOB = "ab" * 32
TOLD = Aggregated(BLOB, 10, (0, 3), {"p1": BLOB, "p2": "cd" * 32}, (Accusation("p3", 4, 5),))


def members(count: int) -> list[PeerId]:
    return [PeerId(f"peer-{number}") for number in range(count)]


@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 1000))
def test_nobody_aggregates_more_than_a_share_and_order_does_not_matter(segments: int, count: int, round_: int) -> None:
    owners = assign(segments, members(count), Round(round_))
    assert len(owners) == segments
    assert max(Counter(owners).values(), default=0) <= -(-segments // count)
    assert owners == assign(segments, members(count)[::-1], Round(round_))


def test_one_member_more_leaves_most_segments_where_they_were() -> None:
    before, after = (assign(100, members(count), Round(7)) for count in (9, 10))
    assert sum(a == b for a, b in zip(before, after, strict=True)) > 60
    assert before != assign(100, members(9), Round(8))


def test_words_survive_the_wire() -> None:
    assert parse_aggregated(TOLD.encode()) == TOLD


@given(st.binary(max_size=200))
def test_any_bytes_are_a_word_or_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_aggregated(data)


@given(st.data())
def test_a_bent_word_is_a_word_or_a_protocol_error(data: Any) -> None:
    bent = bytearray(TOLD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        bent[data.draw(st.integers(0, len(bent) - 1))] = data.draw(st.integers(0, 255))
    try:
        told = parse_aggregated(bytes(bent))
    except ProtocolError:
        return
    assert list(told.segments) == sorted(set(told.segments))


@pytest.mark.parametrize(
    "change",
    [{"segments": [3, 0]}, {"segments": [-1]}, {"size": -1}, {"blob": "x"}, {"members": {"p": 1}}, {"extra": 1}],
)
def test_malformed_words_are_refused(change: dict[str, Any]) -> None:
    fields = msgspec.to_builtins(TOLD) | change
    with pytest.raises(ProtocolError):
        parse_aggregated(msgspec.msgpack.encode(fields))


def test_a_word_about_unknown_or_few_contributions_does_not_count() -> None:
    commits = {PeerId("p1"): BLOB, PeerId("p2"): "cd" * 32, PeerId("p3"): "ef" * 32}
    assert agrees(TOLD, commits)
    assert not agrees(TOLD, commits | {PeerId("p2"): BLOB})
    assert not agrees(TOLD, {PeerId("p1"): BLOB})
    assert not agrees(TOLD, commits | {PeerId("p4"): BLOB})


def test_who_asks_early_hears_as_soon_as_there_is_something_to_say(tmp_path: Path) -> None:
    async def main() -> None:
        async with network(tmp_path) as net:
            rpcs = [await net.rpc("ours"), await net.rpc("theirs")]
            board, other = (SliceBoard(rpc) for rpc in rpcs)
            peer = rpcs[1].peer_id
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await board.ask(peer, "m", 3, 5.0)
            other.begin("m", 3)
            asked = asyncio.create_task(board.ask(peer, "m", 3, 5.0))
            await asyncio.sleep(0.05)
            assert not asked.done()
            other.tell("m", 3, TOLD)
            assert await asked == TOLD == await board.ask(peer, "m", 3, 5.0)
            other.begin("m", 4)
            asked = asyncio.create_task(board.ask(peer, "m", 4, 5.0))
            await asyncio.sleep(0.05)
            other.tell("m", 4, None)
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await asked

    asyncio.run(main())
