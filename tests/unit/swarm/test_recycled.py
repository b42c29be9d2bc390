"""A vector is used again only when nobody can see it any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from potluck.swarm.recycled import MOST, Recycled


def test_what_nobody_refers_to_is_given_again() -> None:
    recycled = Recycled(100)
    first = recycled.any()
    place = first.ctypes.data
    del first
    assert recycled.any().ctypes.data == place


@pytest.mark.parametrize(
    "hold", [lambda a: a, lambda a: a[:0], lambda a: a.data, torch.from_numpy, lambda a: memoryview(a).cast("B")[3:]]
)
def test_what_somebody_can_see_stays_as_it_is(hold: Callable[[Any], Any]) -> None:
    recycled = Recycled(100)

    def cleared() -> Any:
        vector = recycled.any()
        vector.fill(0)
        return vector

    held = [hold(cleared()) for _ in range(3)]
    taken = [recycled.any() for _ in range(3)]
    for vector in taken:
        vector.fill(7)
    assert all(not np.asarray(one).any() for one in held)
    assert len({vector.ctypes.data for vector in taken}) == 3


def test_it_keeps_no_more_than_its_share() -> None:
    recycled = Recycled(10)
    held = [recycled.any() for _ in range(3 * MOST)]
    del held
    assert len(recycled._given) == MOST
