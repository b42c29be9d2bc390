"""Which tensors a round exchanges: fragment-wise synchronization, as in Streaming DiLoCo (arXiv 2501.18512).

With `rounds.stream` = F, round r exchanges part r mod F of a module's tensors. The others are trained on locally until
their turn comes, so that a round's contributions are about F times smaller. Parts are whole tensors that lie side by
side in the flat vector; the largest is as small as such a cut can make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from potluck.swarm.layout import Layout


@dataclass(frozen=True)
class Part:
    """Some of a module's tensors. `layout`: theirs alone; `range`: their place in the flat vector of all."""

    layout: Layout
    range: slice


def parts_of(layout: Layout, count: int) -> list[Part]:
    """At most `count` parts, in order; one where there is nothing to cut."""
    if count <= 1 or len(layout.slots) <= 1:
        return [Part(layout, slice(0, layout.size))]
    sizes = [slot.size for slot in layout.slots]
    least, most = max(sizes), layout.size
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if len(_cut(sizes, middle)) <= count else (middle + 1, most)
    parts, begin = [], 0
    for end in _cut(sizes, least):
        inside = layout.slots[begin:end]
        start = inside[0].offset
        part = Layout.of((slot.name, slot.shape) for slot in inside)
        parts.append(Part(part, slice(start, start + part.size)))
        begin = end
    return parts


def _cut(sizes: Sequence[int], most: int) -> list[int]:
    """Where runs end that are as long as they can be without being larger than `most`."""
    ends, room = [], most
    for number, size in enumerate(sizes):
        if size > room:
            ends.append(number)
            room = most
        room -= size
    return [*ends, len(sizes)]
