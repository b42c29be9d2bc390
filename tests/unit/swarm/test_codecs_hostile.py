"""Codecs: what is sent arrives, error feedback loses nothing, and hostile blobs raise only CodecError."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import CodecError, ManifestError
from potluck.swarm.codecs import CODEC_NAMES, make_codec
from potluck.swarm.codecs.frame import MAX_MAGNITUDE
from potluck.swarm.contribution import Contribution, Sparse
from potluck.swarm.layout import Flat, Layout

LAYOUT = Layout.of([("a", (30, 17)), ("b", (5,)), ("c", (1,)), ("d", (64, 64)), ("e", (70, 70))])


def delta(seed: int = 0, scale: float = 1e-2) -> Flat:
    return (np.random.default_rng(seed).standard_normal(LAYOUT.size) * scale).astype(np.float32)


def dense(contribution: Contribution) -> Flat:
    if not isinstance(contribution, Sparse):
        return contribution.values
    values = LAYOUT.zeros()
    values[contribution.indices] = contribution.values
    return values


def test_none_is_exact() -> None:
    codec = make_codec("none")
    assert np.array_equal(dense(codec.decode(codec.encode(delta(), LAYOUT), LAYOUT)), delta())


@given(st.integers(0, 10_000), st.floats(1e-8, 10.0))
def test_int8_errs_by_at_most_half_a_step_of_its_block(seed: int, scale: float) -> None:
    codec = make_codec("int8", {"block": 256})
    wanted = delta(seed, scale)
    got = dense(codec.decode(codec.encode(wanted, LAYOUT), LAYOUT))
    for start in range(0, LAYOUT.size, 256):
        part = slice(start, start + 256)
        step = np.abs(wanted[part]).max().astype(np.float64) / 127
        assert np.abs(got[part].astype(np.float64) - wanted[part]).max() <= 0.5001 * step + 1e-12


def test_sparse_keeps_the_largest_of_each_chunk() -> None:
    codec = make_codec("sparse", {"chunk": 4096, "k": 64})
    wanted = delta()
    got = codec.decode(codec.encode(wanted, LAYOUT), LAYOUT)
    assert isinstance(got, Sparse)
    slot = next(s for s in LAYOUT.slots if s.name == "d")
    inside = got.indices[(got.indices >= slot.offset) & (got.indices < slot.offset + slot.size)] - slot.offset
    largest = np.argsort(-np.abs(wanted[slot.range]))[:64]
    assert set(inside) == set(largest)
    assert np.corrcoef(dense(got)[got.indices], wanted[got.indices])[0, 1] > 0.9


def test_error_feedback_loses_nothing() -> None:
    """With beta 1, what was sent over all rounds plus the residual is the sum of all deltas."""
    codec = make_codec("sparse", {"chunk": 256, "k": 8, "beta": 1.0})
    residual, sent, wanted = LAYOUT.zeros(), np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for seed in range(30):
        wanted += delta(seed)
        sent += dense(codec.decode(codec.encode(delta(seed), LAYOUT, residual), LAYOUT))
    assert np.abs(sent + residual - wanted).max() < 1e-5
    assert np.linalg.norm(residual) < np.linalg.norm(wanted)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_blob_has_exactly_the_announced_size(name: str) -> None:
    codec = make_codec(name)
    assert len(codec.encode(delta(), LAYOUT)) == codec.max_bytes(LAYOUT)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_constant_and_zero_deltas_survive(name: str) -> None:
    codec = make_codec(name)
    for value in (0.0, 1e-3):
        wanted = np.full(LAYOUT.size, value, dtype=np.float32)
        got = codec.update_of(dense(codec.decode(codec.encode(wanted, LAYOUT), LAYOUT)), LAYOUT)
        assert np.isfinite(got).all()
        assert np.allclose(got[got != 0], value, rtol=1e-2)


@pytest.mark.parametrize("name", CODEC_NAMES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_blobs_raise_only_codec_errors_and_never_give_wild_values(name: str, data: st.DataObject) -> None:
    codec = make_codec(name)
    blob = bytearray(codec.encode(delta(), LAYOUT))
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    try:
        got = codec.decode(bytes(blob[: len(blob) - cut]), LAYOUT)
    except CodecError:
        return
    assert cut == 0
    values = dense(got)
    assert np.isfinite(values).all() and np.abs(values).max() <= MAX_MAGNITUDE
    if isinstance(got, Sparse):
        assert (np.diff(got.indices) > 0).all() and got.indices[0] >= 0 and got.indices[-1] < LAYOUT.size


@pytest.mark.parametrize("name", CODEC_NAMES)
@given(st.binary(max_size=4096))
def test_random_bytes_raise_codec_error(name: str, blob: bytes) -> None:
    with pytest.raises(CodecError):
        make_codec(name).decode(blob, LAYOUT)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_another_codecs_layouts_or_versions_blob_is_refused(name: str) -> None:
    codec = make_codec(name)
    other = Layout.of([("z", (30, 17)), ("b", (5,)), ("c", (1,)), ("d", (64, 64)), ("e", (70, 70))])
    blob = bytes(codec.encode(delta(), LAYOUT))
    with pytest.raises(CodecError):
        codec.decode(blob, other)
    with pytest.raises(CodecError):
        codec.decode(blob.replace(b"PLC3", b"PLC2"), LAYOUT)
    for another in CODEC_NAMES:
        if another != name:
            with pytest.raises(CodecError):
                make_codec(another).decode(blob, LAYOUT)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 2 * MAX_MAGNITUDE])
def test_poisoned_values_are_refused_on_arrival(poison: float) -> None:
    codec = make_codec("none")
    bad = delta()
    bad[3] = poison
    with pytest.raises(CodecError):
        codec.decode(codec.encode(bad, LAYOUT), LAYOUT)
    for name in sorted(set(CODEC_NAMES) - {"none"}):
        encoder = make_codec(name)
        if np.isfinite(poison) and name in ("demo", "sign"):
            encoder.decode(encoder.encode(bad, LAYOUT), LAYOUT)  # it is one of many in what they send
        elif np.isfinite(poison):
            with pytest.raises(CodecError):
                encoder.decode(encoder.encode(bad, LAYOUT), LAYOUT)
        else:
            with pytest.raises(ValueError, match="finite"):
                encoder.encode(bad, LAYOUT)


def test_unknown_codecs_and_parameters_name_the_setting() -> None:
    with pytest.raises(ManifestError, match=r"codec\.name"):
        make_codec("zip")
    with pytest.raises(ManifestError, match=r"codec\.parameters"):
        make_codec("sparse", {"k": 0})
    with pytest.raises(ManifestError, match=r"codec\.parameters"):
        make_codec("int8", {"blocks": 3})
