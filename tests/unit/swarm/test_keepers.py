"""Who keeps snapshots of which stage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck.net.host import PeerId
from potluck.swarm.keepers import COPIES, keepers, kept_by

stages = st.lists(st.integers(0, 6), min_size=1, max_size=8).map(
    lambda sizes: [{PeerId(f"peer-{k}-{i}") for i in range(size)} for k, size in enumerate(sizes)]
)


@given(stages)
def test_two_others_keep_each_stage_of_two_stages_where_there_are_three(table: list[set[PeerId]]) -> None:
    for stage in range(len(table)):
        found = keepers(stage, table)
        others = [k for k in range(len(table)) if k != stage]
        assert len(set(found)) == len(found) == min(COPIES, sum(min(COPIES, len(table[k])) for k in others))
        assert not set(found) & table[stage]
        inhabited = [k for k in others if table[k]]
        assert len({k for k in others for peer in found if peer in table[k]}) == min(len(found), len(inhabited), COPIES)


@given(stages)
def test_everybody_finds_itself_where_the_others_find_it(table: list[set[PeerId]]) -> None:
    for own, peers in enumerate(table):
        for peer in peers:
            kept = kept_by(peer, own, table)
            assert kept == [k for k in range(len(table)) if k != own and peer in keepers(k, table)]


@given(stages, st.data())
def test_who_leaves_changes_only_what_it_kept(table: list[set[PeerId]], data: st.DataObject) -> None:
    everybody = sorted(peer for peers in table for peer in peers)
    if not everybody:
        return
    gone = data.draw(st.sampled_from(everybody))
    after = [peers - {gone} for peers in table]
    for stage in range(len(table)):
        before = keepers(stage, table)
        if gone not in before and gone not in table[stage]:
            assert len(set(keepers(stage, after)) & set(before)) >= len(before) - 1
