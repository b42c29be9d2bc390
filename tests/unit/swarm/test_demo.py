"""`demo`: a DCT that gives the same bits everywhere, coefficients that arrive, error feedback in their basis."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import CodecError
from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate
from potluck.swarm.codecs import demo as under_test
from potluck.swarm.codecs import make_codec
from potluck.swarm.codecs.demo import DemoCodec, Grid, coefficients_of, parameters_of
from potluck.swarm.contribution import Sparse
from potluck.swarm.layout import Flat, Layout

SHAPES = [(30, 17), (5,), (1,), (), (64, 64), (67, 71), (128, 192), (4, 3, 8), (1, 640), (640, 1)]
LAYOUT = Layout.of([(f"tensor {n}", shape) for n, shape in enumerate(SHAPES)])


def some(seed: int = 0, scale: float = 1e-2, layout: Layout = LAYOUT) -> Flat:
    return (np.random.default_rng(seed).standard_normal(layout.size) * scale).astype(np.float32)


def dct_matrix(side: int) -> np.ndarray:
    frequency, place = np.mgrid[:side, :side]
    wave = np.sqrt(2 / side) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * side))
    wave[0] = np.sqrt(1 / side)
    return wave


def reference(values: Flat, layout: Layout) -> np.ndarray:
    """Each block by itself, in float64."""
    out = np.empty(layout.size)
    for slot in layout.slots:
        grid, first = Grid.of(slot.shape), slot.shape[0] if len(slot.shape) > 1 else 1
        rows, found = values[slot.range].astype(np.float64).reshape(first, -1), []
        for top in range(0, rows.shape[0], grid.height):
            for left in range(0, rows.shape[1], grid.width):
                block = rows[top : top + grid.height, left : left + grid.width]
                found.append((dct_matrix(grid.height) @ block @ dct_matrix(grid.width).T).ravel())
        out[slot.range] = np.concatenate(found)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_cover_a_tensor_with_the_largest_divisors_up_to_64(shape: tuple[int, ...]) -> None:
    grid = Grid.of(shape)
    assert grid.rows * grid.height * grid.columns * grid.width == math.prod(shape)
    assert max(grid.height, grid.width) <= 64
    assert Grid.of((1024, 96)) == Grid(16, 64, 2, 48)


def test_coefficients_are_those_of_a_dct_in_float64() -> None:
    wanted = reference(some(), LAYOUT)
    np.testing.assert_allclose(coefficients_of(some(), LAYOUT), wanted, atol=1e-6 * np.abs(wanted).max())


@given(st.integers(0, 10_000), st.floats(1e-20, 1e4))
def test_parameters_come_back_to_a_hundred_thousandth_of_the_largest(seed: int, scale: float) -> None:
    values = some(seed, scale)
    back = parameters_of(coefficients_of(values, LAYOUT), LAYOUT)
    for slot in LAYOUT.slots:
        np.testing.assert_allclose(back[slot.range], values[slot.range], atol=1e-5 * np.abs(values[slot.range]).max())


def test_norms_of_tensors_stay_as_they_are() -> None:
    values, found = some(), coefficients_of(some(), LAYOUT)
    for slot in LAYOUT.slots:
        assert np.linalg.norm(found[slot.range]) == pytest.approx(np.linalg.norm(values[slot.range]), rel=1e-5)


def test_updates_have_the_same_bits_in_any_order_of_summation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, slabs and blocks one by one change the order and the routine; the digest is what this code gave once:
    another machine must give it too."""
    coefficients = np.ldexp(np.arange(LAYOUT.size) * 2654435761 % 1000003 - 500000, -30).astype(np.float32)
    whole = parameters_of(coefficients, LAYOUT)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert np.array_equal(parameters_of(coefficients, LAYOUT), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(under_test, "SLAB_VALUES", 1)
    assert np.array_equal(parameters_of(coefficients, LAYOUT), whole)
    for slot in LAYOUT.slots:
        assert np.array_equal(by_hand(coefficients[slot.range], slot.shape), whole[slot.range])
    assert hashlib.sha256(whole.astype("<f4").tobytes()).hexdigest()[:16] == "807a2d86a804e4d0"


def by_hand(coefficients: Flat, shape: tuple[int, ...]) -> Flat:
    """The inverse in Python's integers, which have no order of summation: columns first, numbers shuffled."""
    grid, first = Grid.of(shape), shape[0] if len(shape) > 1 else 1
    down, across = (
        np.rint(dct_matrix(side) * 2**22).astype(np.int64).astype(object) for side in (grid.height, grid.width)
    )
    exponent = 23 - math.frexp(float(np.abs(coefficients).max()))[1]
    blocks = coefficients.astype(np.float64).reshape(-1, grid.height, grid.width)
    out = np.empty((first, math.prod(shape) // first), dtype=np.float32)
    across_count = out.shape[1] // grid.width
    for number, block in enumerate(blocks):
        whole = np.rint(block * 2.0**exponent).astype(np.int64).astype(object)
        order = np.random.default_rng(number).permutation(grid.width)
        half = np.rint((whole[:, order] @ across[order]).astype(np.float64) / 2**22).astype(np.int64).astype(object)
        full = (half if grid.height == 1 else down.T @ half).astype(np.float64)
        top, left = divmod(number, across_count)
        rows = slice(top * grid.height, (top + 1) * grid.height)
        columns = slice(left * grid.width, (left + 1) * grid.width)
        out[rows, columns] = full * 2.0 ** -(exponent + (0 if grid.height == 1 else 22))
    return out.ravel()


def test_no_entry_of_a_basis_is_near_a_half() -> None:
    """So that a cosine that is off by rounding gives the same integer."""
    for side in range(1, 65):
        part = np.abs(dct_matrix(side) * 2**22) % 1
        assert np.abs(part - 0.5).min() > 1e-4


def test_what_is_largest_in_each_block_arrives() -> None:
    codec = DemoCodec(k=32)
    got = codec.decode(codec.encode(some(), LAYOUT), LAYOUT)
    assert isinstance(got, Sparse)
    wanted = coefficients_of(some(), LAYOUT)
    slot = next(s for s in LAYOUT.slots if s.shape == (64, 64))
    inside = got.indices[(got.indices >= slot.offset) & (got.indices < slot.offset + slot.size)] - slot.offset
    assert set(inside) == set(np.argsort(-np.abs(wanted[slot.range]))[:32])
    assert np.corrcoef(got.values, wanted[got.indices])[0, 1] > 0.9


def test_error_feedback_loses_nothing() -> None:
    """With beta 1, what was sent over all rounds and the residual are the sum of all deltas, once both are turned
    into parameters."""
    codec = DemoCodec(k=256, beta=1.0)
    residual, sent, wanted = LAYOUT.zeros(), np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for seed in range(20):
        wanted += some(seed)
        got = codec.decode(codec.encode(some(seed), LAYOUT, residual), LAYOUT)
        assert isinstance(got, Sparse)
        sent[got.indices] += got.values
    left = codec.update_of((sent + residual).astype(np.float32), LAYOUT)
    assert np.abs(left - wanted).max() < 1e-5
    assert np.linalg.norm(residual) < np.linalg.norm(wanted)


def test_a_groups_mean_of_coefficients_is_the_mean_of_its_updates() -> None:
    codec = DemoCodec(k=512)
    group = {PeerId(f"peer-{n}"): codec.decode(codec.encode(some(n), LAYOUT), LAYOUT) for n in range(3)}
    weights = dict.fromkeys(group, 1 / 3)
    update = codec.update_of(aggregate(group, weights, LAYOUT, clip=False), LAYOUT)
    alone = [codec.update_of(aggregate({peer: one}, {peer: 1.0}, LAYOUT), LAYOUT) for peer, one in group.items()]
    np.testing.assert_allclose(update, np.mean(alone, axis=0), atol=1e-7)


@settings(deadline=None)
@given(data=st.data())
def test_mutated_blobs_raise_only_codec_errors_and_never_give_wild_updates(data: st.DataObject) -> None:
    codec = make_codec("demo", {"k": 8})
    blob = bytearray(codec.encode(some(), LAYOUT))
    for _ in range(data.draw(st.integers(1, 20))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = codec.decode(bytes(blob), LAYOUT)
    except CodecError:
        return
    update = codec.update_of(aggregate({PeerId("a"): got}, {PeerId("a"): 1.0}, LAYOUT), LAYOUT)
    assert np.isfinite(update).all()
