"""What a pipeline of stage servers costs over the same compute in one process.

    python benchmarks/pipeline.py [--quick] [--hidden 512] [--layers 4] [--batch 4] [--length 256] [--microbatches 24]
                                  [--repeats 5] [--links 200 100] [--curve 300]

Real processes, each with its own p2pd: one per stage, and the trainer. The limit is the same microbatches' forward and
backward (no optimizer, as in the swarm's measured time) in one process with as many threads as there are stage servers,
each thread with the whole model and one core: no network, no waiting for each other. `with recomputation` is the limit
of servers that keep no graphs. The swarm's rate is that of a stretch of microbatches in the midst of more of them. The
two are measured in turn, `--repeats` times, and a share is the median of the pairs' ratios: on a shared machine one of
each says nothing. `single` is one process with one thread. `direct`: servers hand activations to each other. `--links`:
again with every process behind a line of so many Mbit/s up and down (namespaces and token buckets; needs root and
nftables). `--curve`: held-out loss after so many steps with 8-bit activations beside exact ones.

The overhead per call is a forward of a 256-wide FFN through our RPC and stage server, less the same module called
locally, beside hivemind's RemoteExpert with the same module in the same run.

`--quick` (within 50 s) has 2 layers, 64 tokens and three times 6 microbatches. The last line is JSON. Goals:
share_of_limit >= 0.85, overhead_ratio >= 4, gradient_error <= 1e-5.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvloop
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from potluck.dht.manifest import DataPart, ModelPart, TrainingPart
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity
from potluck.net.rpc import Rpc
from potluck.swarm.activations import decode, encode
from potluck.swarm.data import load_corpus
from potluck.swarm.server import Shapes, StageServer
from potluck.swarm.stage import build_stage, stage_names
from potluck.swarm.stage_trainer import StageTrainer
from potluck.swarm.trainer import PipelineTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "lab"))
import network

console = Console(width=130)
VOCABULARY = 256
WIDTH = 256
TRAINING = TrainingPart(learning_rate=1e-3, batch_size=4, precision="float32")


def spec(options: argparse.Namespace) -> ModelPart:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": options.hidden, "num_hidden_layers": options.layers}
    sizes |= {"intermediate_size": 4 * options.hidden, "num_attention_heads": options.hidden // 64}
    sizes |= {"num_key_value_heads": options.hidden // 64, "max_position_embeddings": options.length}
    return ModelPart(family="llama", config=sizes | {"tie_word_embeddings": False}, seed=1, stages=options.stages)


def shapes(options: argparse.Namespace) -> Shapes:
    return Shapes(options.batch, options.length, options.hidden, VOCABULARY, options.codec)


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    dice = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, VOCABULARY, (options.batch, options.length + 1), generator=dice)


# --- the servers


class FeedForward(nn.Module):
    """What hivemind's RemoteExpert is measured with; it stands where a middle stage would."""

    first = last = False
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=2))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(functional.gelu(self.inner(x)))
        return y


# Every process says on stdout that it is ready, and then answers each line of JSON on stdin with one of its own: all
# start at once, and whoever is not measured waits.


def tell(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def questions() -> AsyncIterator[Any]:
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


async def serve(options: argparse.Namespace) -> None:
    """A stage's replica. Asked with an address it connects to that."""
    torch.set_num_threads(1)
    home = Path(options.home)
    host = await GoHost.start(Identity.load_or_create(home / "key"), home / "run", listen=[options.listen])
    rpc = Rpc(host)
    ffn = options.role == "ffn"
    stage: Any = FeedForward() if ffn else build_stage(spec(options), options.role)
    trainer = StageTrainer(
        stage, TRAINING, torch.device("cpu"), step_tokens=2**50, cache_bytes=0 if options.no_cache else 4 << 30
    )
    server = StageServer(rpc, Shapes(128, 1, WIDTH, 2) if ffn else shapes(options))
    server.host(options.role, trainer)
    working = True
    thread = threading.Thread(target=trainer.train, args=(iter(()), 10**9, 0, lambda seconds: working))
    try:
        await rpc.start()
        thread.start()
        tell({"address": await address_of(host), "peer": rpc.peer_id})
        async for address in questions():
            await host.connect(address, 10.0)
            tell(None)
    finally:
        working = False
        await rpc.close()
        await host.shutdown()


async def address_of(host: GoHost) -> str:
    """Not the loopback one, if there is another."""
    found = [str(a) for a in await host.get_visible_maddrs()]
    return next((a for a in found if a.startswith("/ip4/11.")), found[0])


def settings_of(options: argparse.Namespace) -> list[str]:
    names = ("hidden", "layers", "batch", "length", "stages", "codec", "in_flight", "microbatches")
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    return flags + ["--no-cache"] * options.no_cache + ["--direct"] * options.direct


class Process:
    """This script again, as `--role` NAME; killed when the context ends."""

    def __init__(self, options: argparse.Namespace, role: str, home: Path, enter: Sequence[str] = ()) -> None:
        home.mkdir(parents=True)
        command = [*enter, sys.executable, __file__, "--role", role, "--home", str(home), *settings_of(options)]
        command += ["--listen", "/ip4/0.0.0.0/tcp/0"] if enter else []  # in a namespace of its own
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._about: dict[str, Any] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What it said when it was ready: waits for that."""
        if self._about is None:
            self._about = self._answer()
        return self._about

    def ask(self, question: Any) -> Any:
        assert self.about is not None and self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark died; its error is above")
        return json.loads(line)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()


class Pipeline:
    """A process for each stage and one for the trainer, each behind a line of `mbit` Mbit/s (0: loopback)."""

    def __init__(self, stack: ExitStack, options: argparse.Namespace, mbit: float = 0.0) -> None:
        enter: list[list[str]] = [[] for _ in range(options.stages + 1)]
        if mbit:
            lab = stack.enter_context(network.Lab())
            enter = [lab.host(f"h{i}", down_mbit=mbit, up_mbit=mbit).enter for i in range(options.stages + 1)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-bench-")))
        roles = [*stage_names(options.stages), "drive"]
        *self.servers, self.trainer = (
            stack.enter_context(Process(options, role, folder / role, where))
            for role, where in zip(roles, enter, strict=True)
        )

    def measure(self) -> tuple[float, int]:
        """(tokens per second, microbatches that were sent again: on a thin line some answers come too late)."""
        for server, following in itertools.pairwise(self.servers):
            server.ask(following.about["address"])
        rate, resends = self.trainer.ask([server.about for server in self.servers])
        return float(rate), int(resends)


@dataclass(frozen=True)
class Measured:
    """Tokens per second of one case, and of its limit."""

    limit: float
    rate: float
    share: float
    resends: int


def beside(limits: Process, pipeline: Pipeline, options: argparse.Namespace) -> Measured:
    """The limit and the swarm in turn: medians."""
    pairs = [
        (limits.ask([options.stages, options.no_cache, options.microbatches]), *pipeline.measure())
        for _ in range(options.repeats)
    ]
    return Measured(
        statistics.median(most for most, _, _ in pairs),
        statistics.median(rate for _, rate, _ in pairs),
        statistics.median(rate / most for most, rate, _ in pairs),
        sum(resends for _, _, resends in pairs),
    )


async def drive(options: argparse.Namespace) -> None:
    """The trainer. Asked with the servers it trains through them, and says how many tokens per second."""
    home = Path(options.home)
    host = await GoHost.start(Identity.load_or_create(home / "key"), home / "run", listen=[options.listen])
    rpc = Rpc(host)
    try:
        await rpc.start()
        tell({})
        async for servers in questions():
            trainer = PipelineTrainer(
                rpc, options.stages, shapes(options), in_flight=options.in_flight, direct=options.direct
            )
            for wiring, server in zip(trainer.wirings, servers, strict=True):
                await host.connect(server["address"], 10.0)
                wiring.update({server["peer"]: 1e12}, 0.0)
            source = batches(options)
            seconds = await _seconds(trainer, source, options.microbatches, options.in_flight)
            tell([options.microbatches * options.batch * options.length / seconds, trainer.stats.resends])
    finally:
        await rpc.close()
        await host.shutdown()


async def _seconds(trainer: PipelineTrainer, source: Iterator[Tensor], microbatches: int, in_flight: int) -> float:
    """Of so many microbatches in the midst of others: as many are under way all the time."""
    times: list[float] = []
    started = itertools.count(1)
    total = microbatches + 2 * in_flight
    await trainer.train(source, lambda: next(started) <= total, on_done=lambda _: times.append(time.perf_counter()))
    return times[in_flight - 1 + microbatches] - times[in_flight - 1]


# --- the limit


def limit(options: argparse.Namespace, threads: int, recompute: bool, microbatches: int) -> float:
    """Tokens per second of `threads` threads with one core and the whole model each."""
    torch.set_num_threads(1)
    models = [[build_stage(spec(options), name) for name in stage_names(options.stages)] for _ in range(threads)]
    source = batches(options)
    work = [next(source) for _ in range(microbatches + threads)]

    def run(stages: list[Any], tokens: Tensor) -> None:
        x, targets = tokens[:, :-1], tokens[:, 1:]
        entered = []
        for stage in stages[:-1]:
            entered.append(x if stage.first else x.detach().requires_grad_())
            with torch.no_grad() if recompute else torch.enable_grad():
                y = stage(entered[-1])
            x = y
            entered[-1] = (entered[-1], y)
        x = x.detach().requires_grad_()
        logits = stages[-1](x)
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        grad = x.grad
        for stage, (x, y) in zip(reversed(stages[:-1]), reversed(entered), strict=True):
            (stage(x) if recompute else y).backward(grad)
            grad = None if stage.first else x.grad

    for stages in models:
        run(stages, work.pop())

    def worker(stages: list[Any]) -> None:
        while True:
            try:
                tokens = work.pop()
            except IndexError:
                return
            run(stages, tokens)

    began = time.perf_counter()
    pool = [threading.Thread(target=worker, args=(stages,)) for stages in models]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return microbatches * options.batch * options.length / (time.perf_counter() - began)


def limits(options: argparse.Namespace) -> None:
    """Asked with (threads, whether to recompute, microbatches) it says how many tokens per second."""
    limit(options, 1, False, 1)  # what is loaded at the first use
    tell({})
    for line in sys.stdin:
        tell(limit(options, *json.loads(line)))


# --- exactness, and the overhead of one call


async def gradient_error() -> float:
    """Largest relative error of any parameter's gradient: four stages, two replicas, against one process."""
    test = Path(__file__).parents[1] / "tests" / "unit" / "swarm"
    sys.path.insert(0, str(test))
    import test_pipeline as reference

    with tempfile.TemporaryDirectory() as folder:
        async with reference.pipeline(Path(folder), 4, 2) as (trainer, peers):
            source = reference.batches()
            sent = [next(source) for _ in range(8)]
            await asyncio.gather(*map(trainer.microbatch, sent))
            await trainer.flush()
            for row in peers:
                for peer in row:
                    await peer.finish()
            wanted = reference.whole_gradient(4, sent)
            return max(
                float((got - wanted[name]).norm() / wanted[name].norm())
                for row in peers
                for name, got in reference.stage_gradient(row).items()
            )


async def _stepped(trainer: StageTrainer) -> None:
    """Until all that it counted is in a step."""
    for _ in range(10_000):
        if not trainer._open.counted and not trainer._sealed:
            return
        await asyncio.sleep(0.001)
    raise RuntimeError("a stage does not make its step")


async def held_out_loss(options: argparse.Namespace, codec: str) -> float:
    """After `--curve` steps of 4 microbatches through 4 stages, on Python's own source: nats per byte."""
    test = Path(__file__).parents[1] / "tests" / "unit" / "swarm"
    sys.path.insert(0, str(test))
    import test_pipeline as reference

    corpus = load_corpus(DataPart(sequence_length=16))
    dice = torch.Generator().manual_seed(0)

    def batch(count: int, held_out: bool = False) -> Tensor:
        if held_out:
            return corpus.held_out_batch(count) % reference.VOCABULARY
        offsets = torch.randint(0, corpus.train.size - 17, (count,), generator=dice).numpy()
        return corpus.batch(offsets) % reference.VOCABULARY

    with tempfile.TemporaryDirectory() as folder:
        settings = {"step_tokens": 4 * 4 * 16, "learning_rate": 3e-3}
        async with reference.pipeline(Path(folder), 4, 1, codec, **settings) as (trainer, peers):
            for _ in range(options.curve):
                await asyncio.gather(*(trainer.microbatch(batch(4)) for _ in range(4)))
                await trainer.flush()
                await asyncio.gather(*(_stepped(peer.trainer) for row in peers for peer in row))
            losses = [await trainer.evaluate(window) for window in batch(256, held_out=True).split(4)]
            return statistics.fmean(losses)


async def rpc_overhead(server: Process, calls: int) -> float:
    """Milliseconds of a remote forward of the FFN at batch 1, less a local one."""
    torch.set_num_threads(1)
    module, x = FeedForward(), torch.randn(1, 1, WIDTH)
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        host = await GoHost.start(Identity.load_or_create(Path(folder) / "key"), Path(folder) / "run")
        rpc = Rpc(host)
        try:
            await rpc.start()
            await host.connect(server.about["address"], 10.0)
            remote = []
            for i in range(calls + 20):
                began = time.perf_counter()
                shape, body = encode(x, "none")
                head = {"module": "ffn", "id": i.to_bytes(16, "big"), "shape": shape, "train": False}
                reply = await rpc.call(server.about["peer"], "stage.forward", head, body, timeout_seconds=10.0)
                y = decode(reply.head["shape"], reply.body, "none")
                remote.append(time.perf_counter() - began)
            assert torch.allclose(y, module(x), atol=1e-5)
        finally:
            await rpc.close()
            await host.shutdown()
    return 1000 * (statistics.median(remote[20:]) - _local(module, x))


def _local(module: nn.Module, x: Tensor) -> float:
    times = []
    with torch.no_grad():
        for _ in range(200):
            began = time.perf_counter()
            module(x)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def hivemind_overhead(calls: int) -> float:
    """The same through hivemind's server and RemoteExpert, in a process of its own."""
    code = f"""
import statistics, sys, time, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from hivemind.dht import DHT
from hivemind.moe.client.expert import create_remote_experts
from hivemind.moe.server import ModuleBackend, Server
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from pipeline import FeedForward, WIDTH, _local
if __name__ == "__main__":
    torch.set_num_threads(1)
    module = FeedForward()
    backend = ModuleBackend(name="ffn.0", module=module, optimizer=None, scheduler=None,
        args_schema=(BatchTensorDescriptor(WIDTH),), outputs_schema=BatchTensorDescriptor(WIDTH), max_batch_size=128)
    dht = DHT(start=True)
    server = Server(dht, {{"ffn.0": backend}}, num_connection_handlers=1)
    server.start()
    server.ready.wait()
    client = DHT(initial_peers=dht.get_visible_maddrs(), start=True)
    (expert,) = create_remote_experts([ExpertInfo("ffn.0", dht.peer_id)], dht=client)
    x, times = torch.randn(1, WIDTH), []
    with torch.no_grad():
        for _ in range({calls} + 10):
            began = time.perf_counter()
            y = expert(x)
            times.append(time.perf_counter() - began)
    assert torch.allclose(y, module(x), atol=1e-4)
    print("RESULT", 1000 * (statistics.median(times[10:]) - _local(module, x)), flush=True)
    server.shutdown(); client.shutdown(); dht.shutdown()
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, script.name], capture_output=True, text=True, timeout=120, env=environment
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise RuntimeError(f"hivemind's server did not answer:\n{done.stderr[-2000:]}")
    return float(lines[0].split()[1])


def cases(options: argparse.Namespace) -> list[tuple[float, str, bool, bool]]:
    """(Mbit/s, codec, without cache, direct), the headline first."""
    if options.quick:
        return [(0.0, "none", False, False)]
    choices = itertools.product((False, True), ("none", "int8"), (False, True))
    loopback = [(0.0, codec, no_cache, direct) for no_cache, codec, direct in choices]
    shaped = [
        (m, codec, False, direct) for m in options.links for codec in ("none", "int8") for direct in (False, True)
    ]
    if shaped and (why := network.missing()):
        console.print(f"--links left out: {why}")
        shaped = []
    return [*loopback, *shaped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of limit and swarm per case")
    parser.add_argument("--in-flight", type=int, default=8, help="a run's 4 of each server's peer")
    parser.add_argument("--codec", choices=("none", "int8"), default="none")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--links", type=float, nargs="*", default=[], help="Mbit/s")
    parser.add_argument("--curve", type=int, default=0, help="steps")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    parser.add_argument("--listen", default="/ip4/127.0.0.1/tcp/0", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "limits":
        limits(options)
    elif options.role:
        uvloop.run(drive(options) if options.role == "drive" else serve(options))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    if options.quick:
        options.microbatches, options.layers, options.length, options.repeats = 6, 2, 64, 3
    headline = cases(options)[0]
    measured: dict[tuple[float, str, bool, bool], Measured] = {}
    calls = 100 if options.quick else 500
    with ExitStack() as stack:
        homes = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-bench-")))
        alone = stack.enter_context(Process(options, "limits", homes / "limits"))
        for case in cases(options):
            mbit, options.codec, options.no_cache, options.direct = case
            with ExitStack() as inner:
                pipeline = Pipeline(inner, options, mbit)
                processes = [alone, pipeline.trainer, *pipeline.servers]
                if case == headline:
                    ffn = inner.enter_context(Process(options, "ffn", homes / "ffn"))
                    processes.append(ffn)
                for process in processes:
                    _ = process.about  # all have started: nothing else runs from here on
                measured[case] = beside(alone, pipeline, options)
                if case == headline:
                    ours = uvloop.run(rpc_overhead(ffn, calls))
        few = options.microbatches // 2
        single, again = alone.ask([1, False, few]), alone.ask([options.stages, True, options.stages * few])
    table = Table(
        title=f"{options.layers} layers of {options.hidden}, microbatches of {options.batch} x {options.length}"
    )
    for column in ("run", "limit, tokens / s", "swarm", "share", "resent"):
        table.add_column(column, justify="right")
    table.add_row("one process, one thread", f"{single:,.0f}", "", "", "")
    table.add_row(f"{options.stages} threads, recomputing", f"{again:,.0f}", "", "", "")
    names = {
        case: f"{f'{case[0]:g} Mbit/s' if case[0] else 'loopback'}, {case[1]}, "
        f"cache {'off' if case[2] else 'on'}, {'direct' if case[3] else 'driven'}"
        for case in measured
    }
    for case, one in measured.items():
        table.add_row(names[case], f"{one.limit:,.0f}", f"{one.rate:,.0f}", f"{one.share:.3f}", str(one.resends))
    console.print(table)
    curve = {codec: asyncio.run(held_out_loss(options, codec)) for codec in ("none", "int8")} if options.curve else {}
    theirs = hivemind_overhead(calls)
    line = {
        "single_tokens_s": round(single, 1),
        "limit_tokens_s": round(measured[headline].limit, 1),
        "limit_with_recomputation_tokens_s": round(again, 1),
        "swarm_tokens_s": round(measured[headline].rate, 1),
        "share_of_limit": round(measured[headline].share, 4),
        "shares": {names[case]: round(one.share, 4) for case, one in measured.items()},
        "rpc_overhead_ms": round(ours, 3),
        "hivemind_overhead_ms": round(theirs, 3),
        "overhead_ratio": round(theirs / ours, 2),
        "gradient_error": asyncio.run(gradient_error()),
        **({"curve": curve, "curve_ratio": round(curve["int8"] / curve["none"], 4)} if curve else {}),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
