"""Compiled code gives the bits that NumPy gives, refuses what does not fit, and works where nothing can be cached."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core import caching

from potluck.swarm import contribution, exact
from potluck.swarm.blocks import Blocks, dequantized, squares_of
from potluck.swarm.codecs.int4 import Int4Codec
from potluck.swarm.codecs.int8 import quantize
from potluck.swarm.codecs.residual import blend
from potluck.swarm.compiled import INT, compiled
from potluck.swarm.contribution import Dense, Leveled, Quantized
from potluck.swarm.layout import Flat
from potluck.swarm.outer import OuterStep

seeds, sizes = st.integers(0, 10_000), st.integers(0, 700)
blocks = st.sampled_from([16, 17, 64, 256, 1000])
factors = st.sampled_from([np.float32(1), np.float32(0), np.float32(0.3), np.float32(-1e-30)])


def some(seed: int, size: int) -> Flat:
    """Any bits of exponents that do not overflow; zeros of both signs, and numbers less than float32 can divide by."""
    dice = np.random.default_rng(seed)
    values = dice.integers(0, 2**32, size, dtype=np.uint32)
    values &= np.uint32(0xBFFFFFFF)
    special = np.array([0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.5], dtype=np.float32)
    if seed % 3:
        values[:: 1 + seed % 5] = dice.choice(special, values[:: 1 + seed % 5].size).view(np.uint32)
    if seed % 7 == 0:
        values[: size // 2] = 0
    return values.view(np.float32)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def unaligned(values: np.ndarray) -> np.ndarray:
    """As a part of a blob: only to be read, at an odd address."""
    return np.frombuffer(b"x" + values.tobytes(), dtype=values.dtype, offset=1)


@given(seeds, sizes, blocks, st.sampled_from([127, 7]))
def test_scales_and_codes_are_numpys(seed: int, size: int, block: int, levels: int) -> None:
    values = some(seed, size)
    scales, codes = quantize(unaligned(values), block, levels)
    for number, start in enumerate(range(0, size, block)):
        part = values[start : start + block]
        scale = np.abs(part).max() * np.float32(1 / levels)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / scale
        wanted = np.rint(part * (inverse if np.isfinite(inverse) else np.float32(0))).astype(np.int8)
        assert same(scales[number : number + 1], np.array([scale])) and same(codes[start : start + block], wanted)
    assert len(scales) == -(-size // block) and len(codes) == size


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_quantized(wrong: float) -> None:
    values = np.zeros(100, dtype=np.float32)
    values[99] = wrong
    with pytest.raises(ValueError, match="finite"):
        quantize(values, 16)


@given(seeds, st.integers(1, 700), blocks, factors, st.data())
def test_codes_times_scales_are_numpys(
    seed: int, size: int, block: int, factor: np.float32, data: st.DataObject
) -> None:
    codes = np.random.default_rng(seed).integers(-128, 128, size).astype(np.int8)
    scales = np.abs(some(seed, -(-size // block)))
    squares, least = squares_of(unaligned(codes), size, block, 64)
    assert least == min(0, codes.min())
    assert squares.tolist() == [
        int(np.square(codes[at : at + block].astype(np.int64)).sum()) for at in range(0, size, block)
    ]
    one = Blocks(size, block, unaligned(scales), unaligned(codes), squares)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    which = np.arange(size) // block
    read, update = np.empty(end - begin, dtype=np.float32), some(seed + 1, end - begin)
    one.read(begin, end, read)
    assert same(read, (codes.astype(np.float32) * scales[which])[begin:end])
    wanted = update + (codes.astype(np.float32) * (scales * factor)[which])[begin:end]
    one.add_to(update, begin, end, factor)
    assert same(update, wanted)
    assert same(dequantized(codes, scales, block), codes.astype(np.float32) * scales[which])
    theta, into = some(seed + 2, end - begin), np.empty(end - begin, dtype=np.float32)
    OuterStep(float(factor)).move_by(unaligned(theta), None, Quantized([one]), slice(begin, end), into, 3)
    assert same(into, theta - read * factor)
    with pytest.raises(IndexError):
        one.add_to(np.zeros(end - begin + 1, dtype=np.float32), begin, end, factor)
    with pytest.raises(IndexError):
        one.move(np.zeros(end - begin + 1, dtype=np.float32), begin, end, into, factor)


@given(seeds, sizes, factors)
def test_dense_sums_and_residuals_are_numpys(seed: int, size: int, factor: np.float32) -> None:
    values, update = some(seed, size), some(seed + 1, size)
    with pytest.raises(IndexError):
        Dense(values).add_to(np.zeros(size + 1, dtype=np.float32), slice(0, size), factor)
    wanted = update + values * factor
    Dense(unaligned(values)).add_to(update, slice(0, size), factor)
    assert same(update, wanted)
    residual = update * np.float32(0.95) + values * factor
    blend(update, 0.95, values, float(factor))
    assert same(update, residual)
    with pytest.raises(IndexError):
        blend(update, 0.95, np.zeros(size + 1, dtype=np.float32))


@given(seeds, st.integers(0, 50))
def test_sums_are_made_in_the_order_that_is_written_down(seed: int, size: int) -> None:
    values, most = some(seed, size), 8
    lanes, found = np.zeros(min(size, most)), np.zeros(min(size, most))
    for start in range(0, size, most):
        part = values[start : start + most].astype(np.float64)
        lanes[: part.size] += part * part
    exact._add_squares(found, unaligned(values), most)
    assert same(found, lanes)
    halves = list(values.astype(np.float64))
    while len(halves) > 1:
        half, last = len(halves) // 2, halves[-1]
        odd = len(halves) % 2
        halves = [low + high for low, high in zip(halves[:half], halves[half : 2 * half], strict=True)]
        halves[0] += last * odd
    assert exact.tree_sum(values.astype(np.float64)) == (halves[0] if size else 0.0)


@given(seeds, st.integers(1, 300), factors, st.sampled_from([np.int32, np.int64]), st.data())
def test_leveled_sums_are_numpys(seed: int, size: int, factor: np.float32, dtype: type, data: st.DataObject) -> None:
    dice = np.random.default_rng(seed)
    indices = np.flatnonzero(dice.random(size) < 0.3).astype(dtype)
    codes, levels = dice.integers(0, 4, indices.size).astype(np.uint8), some(seed, 8).reshape(2, 4)
    cut = indices.size // 3
    one = Leveled(indices, codes, levels, [0, cut, indices.size])
    tensor = np.arange(indices.size) >= cut
    assert same(one.values, levels[tensor.astype(int), codes])
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    inside = (indices >= begin) & (indices < end)
    update = some(seed + 1, end - begin)
    wanted = update.copy()
    wanted[indices[inside] - begin] += (levels * factor)[tensor.astype(int), codes][inside]
    one.add_to(update, slice(begin, end), factor)
    assert same(update, wanted)
    squares = np.square(one.values[inside].astype(np.float64)).sum()
    assert one.square_sum(slice(begin, end)) == pytest.approx(squares, rel=1e-12)


@pytest.mark.parametrize("wrong", [([0, 9, 3], 1), ([1, -5, 3], 1), ([1, 2, 4], 1), ([1, 2, 3], 4)])
def test_indices_and_codes_that_are_out_of_range_after_all_write_nothing_elsewhere(
    wrong: tuple[list[int], int],
) -> None:
    around = np.zeros(30, dtype=np.float32)
    codes, levels = np.full(3, wrong[1], dtype=np.uint8), np.ones(4, dtype=np.float32)
    assert not contribution._scatter(around[10:14], np.array(wrong[0]), 0, codes, levels)
    assert not around[:10].any() and not around[14:].any()


@given(seeds, st.integers(1, 300), st.data())
def test_nibbles_are_two_to_a_byte(seed: int, size: int, data: st.DataObject) -> None:
    codes, codec = np.random.default_rng(seed).integers(-7, 8, size).astype(np.int8), Int4Codec()
    half = -(-size // 2)
    packed = np.empty(half, dtype=np.uint8)
    # With 7 in each block its scale is 1: codes are what the values are.
    values = np.where(np.arange(size) % codec.block == 0, 7, codes).astype(np.float32)
    codec.quantize_into(packed, np.empty(-(-size // codec.block), dtype=np.float32), values)
    codes = values.astype(np.int8)
    low, high = codes[:half] + 8, np.append(codes[half:] + 8, np.zeros(size % 2, dtype=np.int8))
    assert packed.tolist() == (low + 16 * high.astype(np.int64)).tolist()
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    assert same(codec.unpack(unaligned(packed), size)[begin:end], codes[begin:end])


def test_arguments_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError):
        exact.square_sum(np.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("trouble", ["no folder", "a full disk"])
def test_what_cannot_be_cached_is_compiled_all_the_same(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    names: dict[str, Callable[[int], int]] = {}
    # No folder belongs to a source that is in no file.
    exec(compile("def twice(n): return 2 * n", "<nowhere>" if trouble == "no folder" else __file__, "exec"), names)
    if trouble == "a full disk":
        monkeypatch.setattr(caching.FunctionCache, "save_overload", full)
    assert compiled((INT,))(names["twice"])(21) == 42


def test_nothing_is_compiled_or_imported_for_the_command_line_and_the_daemon() -> None:
    """numba takes 0.3 s and 100 MB."""
    check = "import sys, potluck.cli.main, potluck.peer.supervisor; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, env=os.environ, timeout=60)


@given(seeds, sizes, factors, st.sampled_from([None, 0.0, 0.9]), st.booleans())
def test_the_outer_step_is_numpys(
    seed: int, size: int, rate: np.float32, momentum: float | None, nesterov: bool
) -> None:
    theta, update, velocity = (some(seed + n, size) for n in range(3))
    step = OuterStep(float(rate), momentum or 0.0, nesterov, 0)
    moved, faster = step.apply(unaligned(theta), None if momentum is None else velocity, update.copy(), 3)
    with np.errstate(over="ignore", invalid="ignore"):
        if not momentum:
            assert same(moved, theta - update * rate) and (faster is velocity or momentum is None)
            return
        mu = np.float32(momentum)
        wanted = velocity * mu + update
        move = update + wanted * mu if nesterov else wanted
        assert same(faster, wanted) and same(moved, theta - move * rate)


@given(seeds, st.integers(1, 700), st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0]))
def test_all_finite_is_numpys(seed: int, size: int, special: float) -> None:
    values = some(seed, size)
    values[seed % size] = special
    assert exact.all_finite(values) == bool(np.isfinite(values).all())
    for most in (1e4, 1.5, float("inf")):
        assert exact.all_within(values, most) == bool((np.abs(values) <= np.float32(most)).all())


@given(seeds, st.integers(1, 3000))
def test_square_distance_is_numpys(seed: int, size: int) -> None:
    one, other = some(seed, size), some(seed + 1, size)
    wanted = float(np.square(one - other, dtype=np.float64).sum())
    assert exact.square_distance(one, other) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(IndexError):
        exact.square_distance(one, other[:-1])
