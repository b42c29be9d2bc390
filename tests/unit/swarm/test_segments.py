"""Dense contributions: segments are decoded alone, and codes are added up without being made values as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.errors import CodecError
from potluck.net.blobs import CHUNK_BYTES
from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate
from potluck.swarm.blocks import Blocks, squares_of
from potluck.swarm.codecs import CODEC_NAMES, make_codec
from potluck.swarm.codecs.frame import TRAILER_BYTES
from potluck.swarm.codecs.segments import DenseCodec
from potluck.swarm.contribution import Dense, Quantized
from potluck.swarm.layout import Flat, Layout

DENSE = [name for name in CODEC_NAMES if isinstance(make_codec(name), DenseCodec)]
PEERS = [PeerId(f"p{n}") for n in range(5)]


def dense(name: str) -> DenseCodec:
    codec = make_codec(name)
    assert isinstance(codec, DenseCodec)
    return codec


def normal(size: int, seed: int = 0) -> Flat:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def segments(codec: DenseCodec, layout: Layout) -> list[tuple[slice, slice]]:
    """(values, bytes) of each."""
    found = []
    for number, start in enumerate(range(0, layout.size, codec.segment_values)):
        stop, at = min(layout.size, start + codec.segment_values), number * CHUNK_BYTES
        found.append((slice(start, stop), slice(at, at + codec.segment_bytes(stop - start))))
    return found


@pytest.mark.parametrize("name", DENSE)
def test_each_chunk_of_a_blob_has_its_own_values_and_is_what_encoding_these_gives(name: str) -> None:
    codec = dense(name)
    layout = Layout.of([("a", (codec.segment_values, 2)), ("b", (777,))])
    delta = normal(layout.size)
    blob = codec.encode(delta, layout)
    whole = codec.decode(blob, layout).values
    parts = segments(codec, layout)
    assert len(parts) == 3 and len(blob) == parts[-1][1].stop + TRAILER_BYTES == codec.max_bytes(layout)
    for values, data in parts:
        assert codec.encode_segment(delta[values]) == blob[data]
        got = codec.decode_segment(memoryview(blob)[data], values.stop - values.start).values
        assert got.tobytes() == whole[values].tobytes()


@pytest.mark.parametrize("name", DENSE)
def test_a_segment_fills_its_chunk_but_for_less_than_a_block(name: str) -> None:
    codec = dense(name)
    assert CHUNK_BYTES - 512 < codec.segment_bytes(codec.segment_values) <= CHUNK_BYTES
    for block in (16, 17, 65_535) if name != "none" else ():
        other = make_codec(name, {"block": block})
        assert isinstance(other, DenseCodec)
        assert (
            other.segment_bytes(other.segment_values)
            <= CHUNK_BYTES
            < other.segment_bytes(other.segment_values + 2 * block)
        )


@pytest.mark.parametrize("name", [name for name in DENSE if name != "none"])
def test_padding_between_segments_that_is_set_is_refused(name: str) -> None:
    codec = dense(name)
    layout = Layout.of([("a", (codec.segment_values + 1,))])
    blob = bytearray(codec.encode(normal(layout.size), layout))
    for at in (codec.segment_bytes(codec.segment_values), CHUNK_BYTES - 1):
        blob[at] ^= 1
        with pytest.raises(CodecError, match="padding"):
            codec.decode(bytes(blob), layout)
        blob[at] ^= 1


@pytest.mark.parametrize("name", DENSE)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_hostile_segments_raise_only_codec_errors_and_never_give_wild_values(name: str, data: st.DataObject) -> None:
    codec, size = dense(name), data.draw(st.integers(1, 700))
    segment = bytearray(codec.encode_segment(normal(size)))
    for _ in range(data.draw(st.integers(0, 5))):
        segment[data.draw(st.integers(0, len(segment) - 1))] = data.draw(st.integers(0, 255))
    longer = data.draw(st.sampled_from([0, 0, 0, -4, -1, 1, 4]))
    changed = bytes(segment[:longer]) if longer < 0 else bytes(segment) + bytes(longer)
    try:
        got = codec.decode_segment(changed, size).values
    except CodecError:
        return
    assert longer == 0 and got.shape == (size,) and np.isfinite(got).all() and np.abs(got).max() <= 1e4


@pytest.mark.parametrize("name", [*DENSE, "sign"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_parts_of_a_contribution_are_those_of_its_values(name: str, seed: int, data: st.DataObject) -> None:
    layout = Layout.of([("a", (300,)), ("b", (5,)), ("c", (41, 17))])
    codec = make_codec(name, {} if name in ("none", "sign") else {"block": 16 + seed % 60})
    got = codec.decode(codec.encode(normal(layout.size, seed), layout), layout)
    start = data.draw(st.integers(0, layout.size))
    stop = data.draw(st.integers(start, layout.size))
    part, wanted = slice(start, stop), got.values[start:stop]
    update = np.zeros(stop - start, dtype=np.float32)
    got.add_to(update, part, 1.0)
    assert np.array_equal(update, wanted)
    assert got.square_sum(part) == pytest.approx(float(np.square(wanted, dtype=np.float64).sum()), rel=1e-6, abs=1e-30)


def test_blocks_of_any_size_have_exact_squares() -> None:
    codes = np.random.default_rng(0).integers(-127, 128, 700_000).astype(np.int8)
    wanted = int(np.square(codes, dtype=np.int64).sum())
    for block in (16, 1000, 1050, 65_536):
        squares, least = squares_of(codes, codes.size, block, 100_000)
        assert int(squares.sum(dtype=np.int64)) == wanted and least == codes.min()
        one = Blocks(codes.size, block, np.ones(-(-codes.size // block), dtype=np.float32), codes, squares)
        assert one.square_sum(0, codes.size) == wanted


@pytest.mark.parametrize("name", [*CODEC_NAMES])
def test_the_number_of_threads_and_the_order_of_arrival_change_no_bit(name: str) -> None:
    layout, codec = Layout.of([("a", (300, 1000)), ("b", (5,)), ("c", (41, 17))]), make_codec(name)
    before, updates = torch.get_num_threads(), set()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            blobs = {
                peer: codec.encode(normal(layout.size, seed) * np.float32(1 + seed), layout)
                for seed, peer in enumerate(PEERS)
            }
            for order in (PEERS, PEERS[::-1]):
                group = {peer: codec.decode(blobs[peer], layout) for peer in order}
                updates.add(aggregate(group, dict.fromkeys(order, 0.2), layout).tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(updates) == 1


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean"])
def test_codes_and_their_values_aggregate_alike(rule: str) -> None:
    layout, codec = Layout.of([("a", (300, 1000)), ("b", (5,))]), make_codec("int8")
    group = {
        peer: codec.decode(codec.encode(normal(layout.size, seed) * np.float32(1 + seed), layout), layout)
        for seed, peer in enumerate(PEERS)
    }
    assert all(isinstance(one, Quantized) for one in group.values())
    weights = dict.fromkeys(PEERS, 0.2)
    lazily = aggregate(group, weights, layout, rule=rule, liars=0.2)
    wanted = aggregate({p: Dense(one.values) for p, one in group.items()}, weights, layout, rule=rule, liars=0.2)
    np.testing.assert_allclose(lazily, wanted, rtol=1e-4, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5), st.data())
def test_a_cut_layout_is_the_part_of_the_whole_one(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    layout = Layout.of((f"t{n}", shape) for n, shape in enumerate(shapes))
    start = data.draw(st.integers(0, layout.size))
    stop = data.draw(st.integers(start, layout.size))
    part = layout.cut(start, stop)
    assert part.size == stop - start
    flat = np.arange(layout.size, dtype=np.float32)
    whole = {name: tensor.reshape(-1).tolist() for name, tensor in layout.tensors(flat).items()}
    seen = []
    for name, tensor in part.tensors(flat[start:stop]).items():
        named, _, bounds = name.partition("[")
        begin, end = map(int, bounds[:-1].split(":")) if bounds else (0, len(whole[named]))
        assert tensor.reshape(-1).tolist() == whole[named][begin:end]
        seen += tensor.reshape(-1).tolist()
    assert seen == list(range(start, stop))
    assert layout.cut(0, layout.size) == layout
