"""Parts of a module's tensors, and what a round's report says of the time."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.swarm.layout import Layout
from potluck.swarm.parts import parts_of
from potluck.swarm.rounds import RoundReport

LAYOUTS = st.lists(st.integers(1, 50), min_size=1, max_size=9).map(
    lambda sizes: Layout.of((f"t{number:02}", (size,)) for number, size in enumerate(sizes))
)


@settings(max_examples=200, deadline=None)
@given(LAYOUTS, st.integers(1, 12))
def test_parts_are_whole_tensors_side_by_side_and_all_of_them(layout: Layout, count: int) -> None:
    parts = parts_of(layout, count)
    assert 1 <= len(parts) <= count
    assert parts[0].range.start == 0 and parts[-1].range.stop == layout.size
    assert all(before.range.stop == after.range.start for before, after in pairwise(parts))
    slots = iter(layout.slots)
    for part in parts:
        for slot in part.layout.slots:
            whole = next(slots)
            assert (slot.name, slot.shape) == (whole.name, whole.shape)
            assert slot.offset + part.range.start == whole.offset


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.integers(1, 5))
def test_the_largest_part_is_as_small_as_any_cut_makes_it(layout: Layout, count: int) -> None:
    sizes = [slot.size for slot in layout.slots]

    def largest(cuts: tuple[int, ...]) -> int:
        return max(sum(sizes[begin:end]) for begin, end in pairwise((0, *cuts, len(sizes))))

    ways = (cuts for n in range(min(count, len(sizes))) for cuts in combinations(range(1, len(sizes)), n))
    assert max(part.layout.size for part in parts_of(layout, count)) == min(map(largest, ways))


def test_utilization_is_the_share_of_the_trainers_own_time() -> None:
    seconds = {"evaluate": 0.5, "train": 7.5, "idle": 1.0, "commit": 0.2, "wait": 0.5, "pull": 0.2, "apply": 0.1}
    report = RoundReport(
        round=1,  # type: ignore[arg-type]
        group=(),
        missing={},
        alone=False,
        contributed=True,
        steps=1,
        tokens=1,
        loss=1.0,
        digest="",
        agree=True,
        bytes_sent=0,
        bytes_received=0,
        contribution_bytes=0,
        shards=1,
        seconds=seconds,
        beside={"pull": 5.0},
        late={},
    )
    assert abs(report.utilization - 0.75) < 1e-12
