"""Coverage-guided fuzzing of what decodes others' bytes (atheris, libFuzzer).

    python tests/fuzz/fuzz_codecs.py --codec sparse --inputs 1000000     (or --codec all)

An input is a codec, a layout and a blob. Mutations begin with real blobs, and most are given the right length and
trailer, so that they get past the first check. Each must raise CodecError, or give a well-formed contribution that can
be aggregated, without taking more memory than the module's size accounts for. Another exception, a minute of one
input or a gigabyte of memory ends the run with status 1 and the input. The last line says how many inputs there were.

Compiled code (`potluck/swarm/compiled.py`) is compiled anew with its bounds checked: an index out of range is an
exception here, and not silent.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

CACHE = tempfile.TemporaryDirectory()
os.environ |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": CACHE.name}

import atheris  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from potluck.net import blobs  # noqa: E402


def as_written(kernel: FunctionType) -> FunctionType:
    """Without atheris' instructions, which numba cannot compile."""
    path = kernel.__code__.co_filename
    module = compile(Path(path).read_text(), path, "exec")
    found = (each for each in module.co_consts if isinstance(each, CodeType) and each.co_name == kernel.__name__)
    return FunctionType(next(found), kernel.__globals__)


def njit(*arguments: Any, njit: Callable[..., Any] = numba.njit, **options: Any) -> Callable[[FunctionType], Any]:
    return lambda kernel: njit(*arguments, **options)(as_written(kernel))


numba.njit = njit

# Segments so small that a few hundred bytes have several, with padding.
blobs.CHUNK_BYTES = 256
with atheris.instrument_imports(include=["potluck.swarm"]):
    from potluck.errors import CodecError
    from potluck.net.host import PeerId
    from potluck.swarm.aggregate import aggregate
    from potluck.swarm.codecs import CODEC_NAMES, make_codec
    from potluck.swarm.codecs.frame import MAX_MAGNITUDE, TRAILER_BYTES, trailer
    from potluck.swarm.codecs.segments import DenseCodec
    from potluck.swarm.contribution import Contribution, Sparse
    from potluck.swarm.exact import _add_squares
    from potluck.swarm.layout import Layout

    for each in CODEC_NAMES:
        make_codec(each)  # imports it

LAYOUTS = [
    Layout.of([("a", (1,))]),
    Layout.of([("a", (7,)), ("b", (16, 3)), ("c", (100,))]),
    Layout.of([("a", (64, 16)), ("b", (5,))]),
    Layout.of([("a", (257,)), ("b", (2, 3, 8)), ("c", (31, 33))]),
]
#: Small chunks and blocks, so that there are several.
PARAMETERS: dict[str, dict[str, int | float]] = {
    "int8": {"block": 16},
    "int4": {"block": 17},
    "sparse": {"chunk": 128, "k": 5},
}
#: What a decoded module may take: a few float32 and indices for each parameter, and what is the same for all.
MAX_BYTES_PER_VALUE, MAX_BYTES = 64, 1 << 17
MEASURED = 97
PEERS = [PeerId("a"), PeerId("b")]


class Target:
    def __init__(self, codec: str) -> None:
        names = CODEC_NAMES if codec == "all" else (codec,)
        self.codecs = [make_codec(name, PARAMETERS.get(name)) for name in names]
        self.count = 0

    def seeds(self) -> list[bytes]:
        dice, found = np.random.default_rng(0), []
        for number, codec in enumerate(self.codecs):
            for which, layout in enumerate(LAYOUTS):
                delta = dice.standard_normal(layout.size).astype(np.float32)
                found.append(bytes([number, which]) + codec.encode(delta, layout))
        return found

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        dice = random.Random(seed)
        data = data.ljust(2, b"\0")
        codec, layout = self._chosen(data)
        length = codec.max_bytes(layout)
        if dice.random() < 0.1:
            return bytes(atheris.Mutate(data, max_size))
        payload = bytearray(data[2 : 2 + length - TRAILER_BYTES].ljust(length - TRAILER_BYTES, b"\0"))
        if dice.random() < 0.5:
            payload[:] = atheris.Mutate(bytes(payload), len(payload)).ljust(len(payload), b"\0")
        for _ in range(dice.randrange(4)):
            payload[dice.randrange(len(payload))] ^= 1 << dice.randrange(8)
        return (data[:2] + payload + trailer(codec.name, layout))[:max_size]

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        codec, layout = self._chosen(data)
        blob = data[2:]
        self.count += 1
        if self.count % MEASURED == 0:
            tracemalloc.start()
        try:
            check(codec.decode(blob, layout), layout)
        except CodecError:
            pass
        finally:
            if tracemalloc.is_tracing():
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak <= MAX_BYTES + MAX_BYTES_PER_VALUE * layout.size, peak
        if isinstance(codec, DenseCodec):
            values = min(layout.size, codec.segment_values)
            try:
                segment = codec.decode_segment(blob[: codec.segment_bytes(values)], values)
            except CodecError:
                return
            check(segment, layout.cut(0, values))

    def _chosen(self, data: bytes) -> tuple:  # type: ignore[type-arg]
        return self.codecs[data[0] % len(self.codecs)], LAYOUTS[data[1] % len(LAYOUTS)]


def check(found: Contribution, layout: Layout) -> None:
    """Whether it is well-formed, however it came about."""
    values = found.values
    assert values.dtype == np.float32 and np.isfinite(values).all() and (np.abs(values) <= MAX_MAGNITUDE).all()
    if isinstance(found, Sparse):
        indices = found.indices
        assert indices.shape == values.shape and indices.size
        assert indices[0] >= 0 and indices[-1] < layout.size and (np.diff(indices) > 0).all()
    else:
        assert values.shape == (layout.size,)
    assert np.isfinite(aggregate(dict.fromkeys(PEERS, found), dict.fromkeys(PEERS, 0.5), layout)).all()


def fuzz(codec: str, inputs: int, folder: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    torch.set_num_threads(1)
    with suppress(IndexError):
        _add_squares(np.zeros(1), np.zeros(2, dtype=np.float32), 2)
        sys.exit("compiled code does not check its bounds")
    target = Target(codec)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    longest = max(len(seed) for seed in target.seeds()) + 16
    options = [f"-runs={inputs}", f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=1024", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={folder}/", str(folder)], target, custom_mutator=target.mutate
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="all", choices=[*CODEC_NAMES, "all"])
    parser.add_argument("--inputs", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            fuzz(options.codec, options.inputs, Path(folder))
        _, status = os.waitpid(child, 0)
        log.seek(0)
        said = log.read()
        runs = re.search(r"Done (\d+) runs in (\d+) second", said)
        if status or not runs:
            print(said[-8000:])
            for crash in Path(folder).glob("*-*"):
                if not crash.name.startswith("seed"):
                    print(crash.name, crash.read_bytes().hex())
            return 1
    print(f"{options.codec}: {runs[1]} inputs in {runs[2]} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
