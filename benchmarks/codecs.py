"""How fast codecs are, and how small: beside a memory copy, hivemind's uniform 8 bit and bitsandbytes' blockwise 8 bit.

    python benchmarks/codecs.py [--quick] [--parameters 25] [--repeats 9] [--threads 2]

All in one process, in turns, on the same random values: what disturbs one disturbs the others. Speeds are of float32
input (4 bytes per parameter), the median of the repeats. `decode` checks a blob and gives all values as float32, into
memory that is used again, as in a run (of `none`, `sparse` and `demo` what was sent, and indices). `new` is the same
into new memory, which the system has to clear first: bitsandbytes' and hivemind's interfaces allow no other. Beside
both a memory copy: no decoder can be much faster. `received` is what happens when a blob comes: it is checked, and a
dense one keeps its codes. Of `aggregate` 16 contributions are decoded and aggregated, into memory that is used again;
its speed is counted in parameters of the module (16 contributions to it count once). Bytes are those of a blob on the
wire. Our code runs in one thread; `--threads` are the others'.

The last line is JSON. Goals: `sparse` at most 0.020 byte per parameter, encode 0.5 GB/s, decode and aggregate 1 GB/s;
`int8` three times as fast as hivemind's and bitsandbytes'. `--quick`: within 50 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate
from potluck.swarm.codecs import CODEC_NAMES, make_codec
from potluck.swarm.contribution import SLAB_VALUES, Contribution, Quantized
from potluck.swarm.layout import Flat, Layout, slabs
from potluck.swarm.recycled import Recycled

SIDE: Final = 1000
GROUP: Final = 16
AGGREGATED: Final = ("sparse", "int8")
console = Console(stderr=True)


def in_turns(works: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first one takes the memory that the others find
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def rivals(values: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """(encode, decode) of the others."""
    import bitsandbytes.functional as blockwise
    from hivemind.compression import Uniform8BitQuantization
    from hivemind.compression.base import CompressionInfo
    from hivemind.utils.tensor_descr import TensorDescriptor

    uniform, info = Uniform8BitQuantization(), CompressionInfo(0, TensorDescriptor.from_tensor(values))
    sent = uniform.compress(values, info)
    codes, state = blockwise.quantize_blockwise(values, blocksize=256)
    return {
        "hivemind_uniform8": (lambda: uniform.compress(values, info), lambda: uniform.extract(sent)),
        "bitsandbytes": (
            lambda: blockwise.quantize_blockwise(values, blocksize=256),
            lambda: blockwise.dequantize_blockwise(codes, state),
        ),
    }


def group_of(name: str, layout: Layout) -> Callable[[], Any]:
    """Decodes and aggregates a full group's contributions."""
    codec, dice = make_codec(name), np.random.default_rng(1)
    group = {
        PeerId(f"peer-{n:02}"): codec.encode(dice.standard_normal(layout.size, dtype=np.float32), layout)
        for n in range(GROUP)
    }
    weights, vectors = {peer: 1 / GROUP for peer in group}, Recycled(layout.size)

    def together() -> None:
        contributions = {peer: codec.decode(blob, layout) for peer, blob in group.items()}
        aggregate(contributions, weights, layout, out=vectors.any())

    return together


def read(contribution: Contribution, into: Flat) -> None:
    """All values, in `into` unless they are there already, or the few of a sparse one."""
    if isinstance(contribution, Quantized):
        for part in slabs(0, into.size, SLAB_VALUES):  # as the outer step takes it
            contribution.read(part, into[part])
    else:
        _ = contribution.values


def measure(millions: int, repeats: int) -> dict[str, Any]:
    layout = Layout.of([(f"layer.{n}", (SIDE, SIDE)) for n in range(millions)])
    delta = np.random.default_rng(0).standard_normal(layout.size, dtype=np.float32) * np.float32(1e-3)
    values, copied = torch.from_numpy(delta), torch.empty(layout.size)
    works: dict[str, Callable[[], Any]] = {"memcpy": lambda: copied.copy_(values), "memcpy into new memory": delta.copy}
    for name, (encode, decode) in rivals(values).items():
        works[f"{name} encode"], works[f"{name} decode"] = encode, decode
    blobs = {}
    for name in CODEC_NAMES:
        codec = make_codec(name)
        residual = layout.zeros() if codec.has_residual else None
        blob = blobs[name] = codec.encode(delta, layout, residual)
        works[f"{name} encode"] = lambda codec=codec, residual=residual: codec.encode(delta, layout, residual)
        works[f"{name} received"] = lambda codec=codec, blob=blob: codec.decode(blob, layout)
        works[f"{name} new"] = lambda codec=codec, blob=blob: codec.decode(blob, layout).values
        works[f"{name} decode"] = lambda codec=codec, blob=blob: read(codec.decode(blob, layout), copied.numpy())
    for name in AGGREGATED:
        works[f"{name} aggregate"] = group_of(name, layout)
    # Nothing is left to compile: importing did that, and each has run once.
    seconds, gigabytes = in_turns(works, repeats), 4 * layout.size / 1e9
    speed = {name: round(gigabytes / taken, 3) for name, taken in seconds.items()}
    return {
        "parameters": layout.size,
        "threads": torch.get_num_threads(),
        "memcpy_gb_s": speed["memcpy"],
        "memcpy_new_gb_s": speed["memcpy into new memory"],
        "hivemind_uniform8_gb_s": speed["hivemind_uniform8 encode"],
        "hivemind_uniform8_decode_gb_s": speed["hivemind_uniform8 decode"],
        "bitsandbytes_gb_s": speed["bitsandbytes encode"],
        "bitsandbytes_decode_gb_s": speed["bitsandbytes decode"],
        "codecs": {
            name: {
                "bytes_per_param": round(len(blobs[name]) / layout.size, 5),
                "encode_gb_s": speed[f"{name} encode"],
                "decode_gb_s": speed[f"{name} decode"],
                "decode_new_gb_s": speed[f"{name} new"],
                "received_gb_s": speed[f"{name} received"],
            }
            for name in CODEC_NAMES
        },
        **{f"{name}_aggregate_of_16_gb_s": speed[f"{name} aggregate"] for name in AGGREGATED},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--parameters", type=int, default=25, help="millions")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    found = measure(options.parameters, 3 if options.quick else options.repeats)
    table = Table(title=f"{found['parameters'] / 1e6:.0f}M parameters, {found['threads']} threads, GB/s of float32")
    for column in ("", "encode", "decode", "new", "received", "bytes per parameter"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("memory copy", "", f"{found['memcpy_gb_s']:.2f}", f"{found['memcpy_new_gb_s']:.2f}", "", "")
    for name, bytes_ in (("hivemind_uniform8", "1"), ("bitsandbytes", "1.016")):
        table.add_row(name, f"{found[f'{name}_gb_s']:.2f}", "", f"{found[f'{name}_decode_gb_s']:.2f}", "", bytes_)
    for name, one in found["codecs"].items():
        speeds = (f"{one[f'{what}_gb_s']:.2f}" for what in ("encode", "decode", "decode_new", "received"))
        table.add_row(name, *speeds, f"{one['bytes_per_param']:.4f}")
    for name in AGGREGATED:
        speed = found[f"{name}_aggregate_of_16_gb_s"]
        table.add_row(f"{name}: {GROUP} decoded and aggregated", "", f"{speed:.2f}", "", "", "")
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
