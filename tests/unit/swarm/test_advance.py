"""The next round's state, made of segments in any order, is that of the whole update."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.net.blobs import ChunkList, chunk_count
from potluck.swarm.advance import Advance, Piece
from potluck.swarm.contribution import Dense
from potluck.swarm.layout import Layout, slabs
from potluck.swarm.outer import OuterStep
from potluck.swarm.phases import Round
from potluck.swarm.state import ReplicaState, state_bytes

LAYOUT = Layout.of([("w", (1100, 1000))])
ROUND = Round(3)


def _vector(seed: int, size: int = LAYOUT.size) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


@settings(max_examples=30, deadline=None)
@given(
    segment_values=st.sampled_from([262_144, 270_336, 100_000, 1_100_000]),
    momentum=st.sampled_from([0.0, 0.8]),
    has_velocity=st.booleans(),
    data=st.data(),
)
def test_in_any_order_the_state_is_that_of_the_whole_update(
    segment_values: int, momentum: float, has_velocity: bool, data: st.DataObject
) -> None:
    segments = list(slabs(0, LAYOUT.size, segment_values))
    outer, theta, velocity = OuterStep(0.7, momentum), _vector(0), _vector(1) if has_velocity else None
    one = Advance(theta, velocity, outer, ROUND, segments, np.full(LAYOUT.size, np.nan, dtype=np.float32))
    made: dict[int, Piece] = {}
    numbers = st.integers(0, len(segments) - 1)
    for number, seed in data.draw(st.lists(st.tuples(numbers, st.integers(2, 5)), max_size=3 * len(segments))):
        part = segments[number]  # some more than once: what was taken is replaced
        made[number] = Dense(_vector(seed, part.stop - part.start))
        one.take(number, made[number])
    for number in data.draw(st.sets(numbers)):
        made.pop(number, None)  # what a liar aggregated is dropped
    moved, faster = one.finish([(part, made.get(number)) for number, part in enumerate(segments)])

    update = LAYOUT.zeros()
    for number, piece in made.items():
        assert isinstance(piece, Dense)
        update[segments[number]] = piece.values
    expected, expected_velocity = outer.apply(theta, velocity, update, ROUND)
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(faster, expected_velocity)

    hashed = ReplicaState("stage.0", LAYOUT, ROUND, expected, expected_velocity, 4)
    known = ReplicaState("stage.0", LAYOUT, ROUND, moved, faster, 4, one.digests)
    assert known.chunks == ChunkList.of(hashed.buffers)
    assert known.at_round(Round(4)).digest == hashed.at_round(Round(4)).digest != hashed.digest


def test_of_all_segments_but_the_last_one_most_is_hashed_already() -> None:
    segments = list(slabs(0, LAYOUT.size, 270_336))
    for momentum, velocity in ((0.0, None), (0.8, _vector(1))):
        one = Advance(_vector(0), velocity, OuterStep(1.0, momentum), ROUND, segments, LAYOUT.zeros())
        for number, part in enumerate(segments[:-1]):
            one.take(number, Dense(_vector(2, part.stop - part.start)))
        unknown = chunk_count(state_bytes(LAYOUT, velocity is not None)) - len(one.digests)
        assert unknown <= 3 * (1 if velocity is None else 2)
