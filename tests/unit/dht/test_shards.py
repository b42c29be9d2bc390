from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.shards import count_replicas, estimate_replicas, next_shards, shard_of

from dht_world import identity

estimates = st.floats(0, 1e6)
groups = st.integers(2, 256)
powers = st.integers(0, 14).map(lambda power: 2**power)


@given(st.integers(0, 2**32), st.integers(1, 2**15))
def test_a_shard_is_in_range_and_repeatable(round, shards) -> None:
    shard = shard_of(identity(0).peer_id, round, shards)
    assert 0 <= shard < shards
    assert shard == shard_of(identity(0).peer_id, round, shards)


def test_shards_fill_evenly_and_reshuffle() -> None:
    peers = [f"peer {number}" for number in range(1600)]
    counts = Counter(shard_of(peer, 5, 16) for peer in peers)
    assert all(50 < count < 150 for count in counts.values()) and len(counts) == 16
    stayed = sum(shard_of(peer, 5, 16) == shard_of(peer, 6, 16) for peer in peers)
    assert stayed < 200


def test_no_shards_is_our_own_mistake() -> None:
    with pytest.raises(ValueError):
        shard_of(identity(0).peer_id, 0, 0)


@given(estimates, groups, powers)
def test_shards_are_stable_for_a_stable_estimate(estimate, group, current) -> None:
    shards = next_shards(estimate, group, current)
    assert next_shards(estimate, group, shards) == shards
    assert shards & (shards - 1) == 0


@given(estimates, groups, powers)
def test_one_group_is_never_split(estimate, group, current) -> None:
    shards = next_shards(estimate, group, current)
    assert (shards == 1) == (estimate <= group)


@given(estimates, groups, powers)
def test_groups_hold_about_their_size(estimate, group, current) -> None:
    shards = next_shards(estimate, group, current)
    if 1 < shards < 2**15:
        assert estimate <= 1.25 * shards * group
        assert shards == 2 or estimate * 1.25 >= shards * group / 2


def test_a_swarm_at_a_boundary_does_not_flap() -> None:
    shards = 4
    for estimate in [64, 66, 60, 68, 63, 70, 64] * 3:
        shards = next_shards(estimate, 16, shards)
        assert shards == 4


@given(estimates, st.integers(0, 256), powers, st.lists(estimates, max_size=20))
def test_an_estimate_lies_within_what_was_said(own, members, shards, others) -> None:
    said = [own, count_replicas(members, shards), *others]
    assert max(1.0, min(said)) <= estimate_replicas(own, members, shards, others) <= max(1.0, *said)


@given(st.lists(st.floats(), max_size=6))
def test_a_minority_of_liars_moves_nothing(lies) -> None:
    assert estimate_replicas(16, 16, 1, [16.0] * 6 + lies) == 16


def test_a_growing_swarm_is_noticed_when_counts_are_published() -> None:
    own, shards, published = 16.0, 1, 16.0
    for _ in range(3):
        own = estimate_replicas(own, 20, shards, [published] * 19)
        published = count_replicas(20, shards)
    assert own == 20


def test_a_lonely_peer_comes_back_to_one_shard() -> None:
    own, shards = 256.0, 16
    for _ in range(12):
        own = estimate_replicas(own, 1, shards, [])
        shards = next_shards(own, 16, shards)
    assert shards == 1
