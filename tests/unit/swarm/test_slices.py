"""Who aggregates what, and what a stranger may say about it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import NetworkError, ProtocolError, RpcRemoteError, RpcTimeout
from potluck.net.host import PeerId
from potluck.swarm.phases import Round
from potluck.swarm.slice_board import MOST_KEPT, MOST_WAITING_OF_PEER, NOT_HEARD, SliceBoard
from potluck.swarm.slices import (
    Accusation,
    Aggregated,
    assign,
    check_enough,
    fewest,
    members_in,
    named_by_most,
    parse_aggregated,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))

from fake_net import network

BLOB = "ab" * 32
OTHER = "cd" * 32
NAMES = [bytes.fromhex(BLOB), bytes.fromhex(OTHER)]
TOLD = Aggregated.of(NAMES[::-1], [Accusation("p3", 4, 5)])


def members(count: int) -> list[PeerId]:
    return [PeerId(f"peer-{number}") for number in range(count)]


@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 1000))
def test_nobody_aggregates_more_than_a_share_and_order_does_not_matter(segments: int, count: int, round_: int) -> None:
    owners = assign(segments, members(count), Round(round_))
    assert len(owners) == segments
    assert max(Counter(owners).values(), default=0) <= -(-segments // count)
    assert owners == assign(segments, members(count)[::-1], Round(round_))
    if owners:  # the last is mostly a short one
        *before, last = owners
        assert before.count(last) == min(map(before.count, members(count)))


def test_one_member_more_leaves_most_segments_where_they_were() -> None:
    before, after = (assign(100, members(count), Round(7)) for count in (9, 10))
    assert sum(a == b for a, b in zip(before, after, strict=True)) > 60
    assert before != assign(100, members(9), Round(8))


def test_words_survive_the_wire() -> None:
    assert parse_aggregated(msgspec.msgpack.decode(msgspec.msgpack.encode(TOLD.head()))) == TOLD


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.binary(max_size=100) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)


@given(st.fixed_dictionaries({}, optional={"counted": anything, "accused": anything, "more": anything}))
def test_any_head_is_a_word_or_a_protocol_error(head: dict[str, Any]) -> None:
    try:
        told = parse_aggregated(head)
    except ProtocolError:
        return
    assert len(told.counted) % 32 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"counted": bytes.fromhex(OTHER + BLOB)},
        {"counted": bytes.fromhex(BLOB + BLOB)},
        {"counted": bytes(33)},
        {"counted": bytes(32 * 1025)},
        {"accused": [["p", -1, 0]]},
        {"accused": TOLD.head()["accused"] * 5},
        {"extra": 1},
    ],
)
def test_malformed_words_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_aggregated(TOLD.head() | change)


def test_a_word_about_unknown_or_few_contributions_does_not_count() -> None:
    p1, p2, p3 = (PeerId(f"p{number}") for number in range(1, 4))
    names = {NAMES[0]: p1, NAMES[1]: p2, b"c" * 32: p3}
    assert members_in(TOLD, names) == {p1, p2}
    with pytest.raises(ProtocolError, match="nobody has committed"):
        members_in(TOLD, {NAMES[0]: p1})


@pytest.mark.parametrize(
    ("present", "silent", "robust", "enough"),
    [
        (10, 0, True, True),
        (9, 0, True, True),
        (8, 0, True, False),
        (8, 2, True, True),  # whoever did not answer us did not answer the aggregator either
        (7, 2, True, True),
        (6, 2, True, False),
        (5, 5, True, False),
        (6, 0, False, True),
        (5, 0, False, False),
        (5, 5, False, False),
        (0, 10, False, False),
    ],
)
def test_how_many_of_ten_are_enough(present: int, silent: int, robust: bool, enough: bool) -> None:
    commits = members(10)
    with contextlib.nullcontext() if enough else pytest.raises(ProtocolError, match=f"{present} contributions of 10"):
        check_enough(commits[:present], commits, commits[10 - silent :], robust)


def test_one_aggregators_word_makes_nobody_a_member() -> None:
    p1, p2, p3 = members(3)
    assert named_by_most([{p1, p2}, {p1, p2, p3}, {p1}]) == {p1, p2}
    assert named_by_most([{p1}, {p2}]) == set() == named_by_most([])


@given(st.integers(1, 200))
def test_a_robust_rule_has_nearly_all_and_a_mean_most(commits: int) -> None:
    assert 2 * fewest(commits, robust=False) > commits
    assert commits - max(1, commits / 8) <= fewest(commits, robust=True) <= commits


@pytest.mark.parametrize("cap", [None, 2e6])
def test_who_asks_early_has_a_segment_as_soon_as_it_is_there(tmp_path: Path, cap: float | None) -> None:
    data = bytes(range(256)) * 300

    async def main() -> None:
        async with network(tmp_path) as net:
            rpcs = [await net.rpc("ours", download=cap), await net.rpc("theirs"), await net.rpc("stranger")]
            board, other, strange = (SliceBoard(rpc) for rpc in rpcs)

            async def ask(round_: int, segment: int, size: int = len(data), seconds: float = 5.0) -> Any:
                into = memoryview(bytearray(size))
                return await board.ask(rpcs[1].peer_id, "m", round_, segment, into, seconds), bytes(into)

            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(3, 0)
            other.begin("m", 3, [0, 2], [rpcs[0].peer_id])
            early, waiting = asyncio.create_task(ask(4, 5)), asyncio.create_task(ask(3, 0))
            await asyncio.sleep(0.05)
            assert not waiting.done() and not early.done()
            for round_, segment in ((4, 5), (3, 0)):
                with pytest.raises(RpcRemoteError, match="only members"):
                    into = memoryview(bytearray(len(data)))
                    await strange.ask(rpcs[1].peer_id, "m", round_, segment, into, 5.0)
            other.tell("m", 3, 0, TOLD, data)
            assert await waiting == (TOLD, data) == await ask(3, 0)
            assert await strange.ask(rpcs[1].peer_id, "m", 3, 0, into, 5.0) == TOLD and bytes(into) == data
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(3, 1)
            with pytest.raises(RpcRemoteError, match="does not have"):
                await ask(3, 0, len(data) + 1)
            waiting = asyncio.create_task(ask(3, 2))
            await asyncio.sleep(0.05)
            other.end("m", 3)
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await waiting
            other.begin("m", 4, [5], [rpcs[0].peer_id])
            other.tell("m", 4, 5, TOLD, data)
            assert await early == (TOLD, data)
            other.forget("m", 3)
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(3, 0)
            with pytest.raises(RpcTimeout):
                await ask(5, 0, seconds=0.05)
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(2**62, 0)
            waiting = [asyncio.create_task(ask(5, n)) for n in range(MOST_WAITING_OF_PEER)]
            await asyncio.sleep(0.05)
            with pytest.raises(RpcRemoteError, match="too many wait"):
                await ask(5, 99)
            other.forget("m", 4)  # the last one: nothing of the module is left to wait for
            for one in waiting:
                with pytest.raises(RpcRemoteError, match="NothingTold"):
                    await one
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(5, 0)

    asyncio.run(main())


def test_what_was_told_is_heard_by_who_asks_until_it_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        async with network(tmp_path) as net:
            rpcs = [await net.rpc("ours"), await net.rpc("theirs")]
            board, other = (SliceBoard(rpc) for rpc in rpcs)

            async def ask(round_: int, segments: int) -> list[bytes]:
                return await board.ask_heard(rpcs[1].peer_id, "m", round_, segments, 5.0)

            digests = [b"\x01" * 32, NOT_HEARD, b"\x02" * 32]
            other.begin("m", 3, [0], [rpcs[0].peer_id])
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(3, 3)
            other.hear("m", 3, digests)
            assert await ask(3, 3) == digests
            with pytest.raises(ProtocolError, match="96 bytes for 4 segments"):
                await ask(3, 4)
            with pytest.raises(NetworkError):  # more than was asked for
                await ask(3, 2)
            with pytest.raises(RpcRemoteError, match="ProtocolError"):
                await rpcs[0].call(rpcs[1].peer_id, "slices.heard", {"module": 1, "round": "x"}, timeout_seconds=5.0)
            other.forget("m", 3)
            with pytest.raises(RpcRemoteError, match="NothingTold"):
                await ask(3, 3)
            for round_ in range(MOST_KEPT + 5):
                other.begin("m", round_, [], [])
                other.hear("m", round_, digests)
            assert len(other._heard) == MOST_KEPT

    asyncio.run(main())
