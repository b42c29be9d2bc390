"""What codecs are made of: bit planes, exact top-k, Elias-Fano indices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import CodecError
from potluck.swarm.codecs import make_codec
from potluck.swarm.codecs.bits import pack_planes, planes_bytes, unpack_planes
from potluck.swarm.codecs.sparse import SparseCodec
from potluck.swarm.codecs.top_k import top_k
from potluck.swarm.contribution import Quantized, Sparse
from potluck.swarm.layout import Layout


@given(st.integers(0, 16).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))))
def test_bit_planes_give_back_what_they_got(case: tuple[int, list[int]]) -> None:
    bits, values = case
    array = np.array(values, dtype=np.int64)
    packed = pack_planes(array, bits)
    assert len(packed) == planes_bytes(len(values), bits)
    assert unpack_planes(np.frombuffer(packed, np.uint8), len(values), bits).tolist() == values


def test_padding_that_is_set_is_refused() -> None:
    with pytest.raises(CodecError, match="padding"):
        unpack_planes(np.array([0b10000001], dtype=np.uint8), 5, 1)


@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([16, 100, 256, 4096]),
    count=st.integers(1, 5),
    share=st.sampled_from([0.01, 0.1, 1.0]),
    few=st.booleans(),
)
def test_top_k_takes_the_largest_of_each_row(seed: int, width: int, count: int, share: float, few: bool) -> None:
    """`few`: many equal magnitudes, of which the first are taken."""
    dice, keep = np.random.default_rng(seed), max(1, int(share * width))
    values = dice.integers(-2, 3, (count, width)) if few else dice.standard_normal((count, width))
    sizes = np.abs(values.astype(np.float32))
    found = (
        top_k(values.astype(np.float32).reshape(-1), width, keep).reshape(count, keep)
        - width * np.arange(count)[:, None]
    )
    wanted = np.argsort(-sizes, axis=1, kind="stable")[:, :keep]
    assert np.array_equal(found, np.sort(wanted, axis=1))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_top_k_of_what_is_not_finite_is_refused(wrong: float) -> None:
    values = np.zeros(3 * 4096, dtype=np.float32)
    values[5000] = wrong
    with pytest.raises(ValueError, match="not finite"):
        top_k(values, 4096, 64)


@given(
    seed=st.integers(0, 10_000),
    chunk=st.sampled_from([16, 100, 4096, 65536]),
    k=st.integers(1, 200),
    size=st.integers(1, 9000),
)
def test_sparse_indices_come_back_exactly(seed: int, chunk: int, k: int, size: int) -> None:
    layout, codec = Layout.of([("a", (size,)), ("b", (3,))]), SparseCodec(chunk, min(k, chunk))
    delta = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    residual = layout.zeros()
    got = codec.decode(codec.encode(delta, layout, residual), layout)
    assert isinstance(got, Sparse)
    assert bool((np.diff(got.indices) > 0).all())
    sent = layout.zeros()
    sent[got.indices] = got.values
    np.testing.assert_allclose(sent + residual, delta, atol=1e-6)
    for slot in layout.slots:
        for start in range(slot.offset, slot.offset + slot.size, chunk):
            stop = min(start + chunk, slot.offset + slot.size)
            inside = got.indices[(got.indices >= start) & (got.indices < stop)]
            least = np.abs(delta[inside]).min()
            assert int((np.abs(delta[start:stop]) > least).sum()) < inside.size


def test_sparse_at_64_of_4096_takes_less_than_a_fiftieth_of_a_byte_per_parameter() -> None:
    layout = Layout.of([(f"layer.{n}", (1024, 1024)) for n in range(4)])
    assert make_codec("sparse").max_bytes(layout) / layout.size < 0.020


@given(st.integers(0, 10_000), st.floats(1e-6, 10.0))
def test_int4_errs_by_at_most_half_a_step_of_its_block(seed: int, scale: float) -> None:
    layout, codec = Layout.of([("a", (1001,))]), make_codec("int4", {"block": 64})
    wanted = (np.random.default_rng(seed).standard_normal(layout.size) * scale).astype(np.float32)
    got = codec.decode(codec.encode(wanted, layout), layout)
    assert isinstance(got, Quantized)
    for start in range(0, layout.size, 64):
        part = slice(start, start + 64)
        step = np.abs(wanted[part]).max() / 7
        assert np.abs(got.values[part] - wanted[part]).max() <= 0.5001 * step


def test_signs_follow_lions_momentum_and_have_its_size() -> None:
    layout, codec = Layout.of([("a", (400,)), ("b", (30,))]), make_codec("sign", {"beta1": 0.9, "beta2": 0.99})
    dice = np.random.default_rng(1)
    momentum, expected = layout.zeros(), np.zeros(layout.size)
    for _ in range(5):
        delta = dice.standard_normal(layout.size).astype(np.float32)
        update = 0.9 * expected + 0.1 * delta
        got = codec.decode(codec.encode(delta, layout, momentum), layout)
        expected = 0.99 * expected + 0.01 * delta
        assert isinstance(got, Quantized)
        np.testing.assert_allclose(momentum, expected, atol=1e-6)
        clear = np.abs(update) > 1e-6
        assert bool((np.sign(got.values[clear]) == np.sign(update[clear])).all())
        for slot in layout.slots:
            np.testing.assert_allclose(np.abs(got.values[slot.range]), np.abs(update[slot.range]).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["none", "int8", "int4", "sparse", "sign"])
def test_what_is_not_finite_is_never_encoded(name: str) -> None:
    layout, codec = Layout.of([("a", (5000,))]), make_codec(name)
    for wrong in (np.nan, np.inf):
        delta = layout.zeros()
        delta[4999] = wrong
        try:
            blob = codec.encode(delta, layout)
        except ValueError:
            continue
        with pytest.raises(CodecError):
            codec.decode(blob, layout)
