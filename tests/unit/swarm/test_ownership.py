"""A contribution is one peer's, to one round of one module."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import CodecError
from potluck.net.host import PeerId
from potluck.swarm.ownership import MARK_BYTES, marked, owned_by
from potluck.swarm.phases import Round

peers = st.sampled_from(["anna", "boris"]).map(PeerId)
owners = st.tuples(peers, st.sampled_from(["stage.1", "stage.11"]), st.integers(0, 2).map(Round))


@given(st.binary(max_size=50), owners, owners)
def test_it_is_taken_as_its_owners_and_as_nobody_elses(blob: bytes, owner: tuple, other: tuple) -> None:  # type: ignore[type-arg]
    sent = b"".join(marked(blob, *owner))
    assert len(sent) == MARK_BYTES + len(blob)
    if owner == other:
        assert owned_by(sent, *other) == blob
    else:
        with pytest.raises(CodecError, match="is not"):
            owned_by(sent, *other)


@given(st.binary(max_size=MARK_BYTES + 4), owners)
def test_whatever_bytes_come_are_refused(blob: bytes, owner: tuple) -> None:  # type: ignore[type-arg]
    with pytest.raises(CodecError):
        owned_by(blob, *owner)
