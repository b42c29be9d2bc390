"""The trainer: drives microbatches through randomized pipelines of stage servers, and counts each exactly once.

It holds every stage's input until the microbatch is done, so that a server's death costs one resend. Which server did
what is written down, and only those are told that it counts (`stage.confirm`): whoever else may have worked on it, late
or unheard, throws it away. With `direct` the servers hand activations to each other, and this file is the fallback.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from potluck.errors import (
    CodecError,
    NetworkError,
    ProtocolError,
    RpcRefused,
    RpcRemoteError,
    RpcTimeout,
    RpcUnreached,
)
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc
from potluck.net.wire import Buffer
from potluck.swarm.activations import ActivationCodec, check, checked_shape, decode, encode_tokens, encoded_bytes
from potluck.swarm.server import ID_BYTES, MAX_IDS, Shapes, StageFailed, loss_of, seconds_of
from potluck.swarm.stage import stage_names
from potluck.swarm.wiring import Wiring

#: A server gets this many times what it is expected to take, before the microbatch goes elsewhere.
PATIENCE: Final = 4.0
LEAST_TIMEOUT_SECONDS: Final = 5.0
MOST_TIMEOUT_SECONDS: Final = 120.0
#: Attempts at one stage; then the microbatch is thrown away.
ATTEMPTS: Final = 8
#: Confirmations are sent together this often, and tried so many times.
CONFIRM_SECONDS: Final = 0.05
CONFIRM_ATTEMPTS: Final = 3
FLUSH_SECONDS: Final = 1.0
#: The longest that a busy server may make us wait before we ask again.
MOST_PAUSE_SECONDS: Final = 2.0
#: What a forward that trains nothing may take: a round's exchange, in which no stage answers, and some.
LOOK_SECONDS: Final = 120.0
#: Of a server that nobody has measured yet.
UNMEASURED_TOKENS_PER_SECOND: Final = 1000.0


class PipelineBroken(NetworkError):
    """No server of a stage did its part in time: the microbatch is thrown away in all stages."""


class BadAnswer(NetworkError):
    """A server answered with what is no answer: it failed, as if it had not answered."""


@dataclass
class TrainerStats:
    """Counts since the start. `tokens`: of microbatches that every stage has worked on. `half_counted`: how often a
    stage had thrown one away, or was gone, before it heard that all had counted it."""

    microbatches: int = 0
    tokens: int = 0
    resends: int = 0
    thrown_away: int = 0
    direct: int = 0
    half_counted: int = 0


@dataclass
class _Microbatch:
    """One on its way. `counted[k]`: the server whose gradient of stage k counts."""

    tokens_BT: Tensor
    targets_BT: Tensor
    id: bytes = field(default_factory=lambda: os.urandom(ID_BYTES))
    counted: dict[int, PeerId] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.tokens_BT.numel()


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise PipelineBroken(f"no answer through all stages within {seconds:g} s") from None


class PipelineTrainer:
    """Sends microbatches through `stages` stages. `wirings[k]`: the servers of stage k; `update` them, by `now`."""

    def __init__(
        self,
        rpc: Rpc,
        stages: int,
        shapes: Shapes,
        *,
        in_flight: int = 4,
        direct: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rpc, self._shapes, self._direct = rpc, shapes, direct
        self._names = stage_names(stages)
        self.wirings = [Wiring(UNMEASURED_TOKENS_PER_SECOND) for _ in self._names]
        self.stats = TrainerStats()
        self._in_flight, self._utc = in_flight, now
        self._confirmations: defaultdict[tuple[str, PeerId], list[tuple[bytes, float]]] = defaultdict(list)
        self._confirming: dict[tuple[str, PeerId], asyncio.Task[None]] = {}

    async def train(
        self,
        batches: Iterator[Tensor],
        may_start: Callable[[], bool],
        on_done: Callable[[float], None] = lambda seconds: None,
        timeout_seconds: float | None = None,
    ) -> float:
        """Microbatches (B, T + 1) one after another, several under way, until `may_start` says no. Mean loss, nats (not
        a number if there was none). `on_done` hears the seconds that each took; the timeout ends those under way."""
        losses: list[float] = []

        async def worker() -> None:
            while may_start():
                began = self._now()
                try:
                    losses.append(await self.microbatch(next(batches)))
                    on_done(self._now() - began)
                except PipelineBroken:
                    await asyncio.sleep(0.1)

        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as group:
                for _ in range(self._in_flight):
                    group.create_task(worker())
        except TimeoutError:
            pass  # what was still on its way is thrown away: nobody confirms it
        await self.flush()
        return sum(losses) / len(losses) if losses else float("nan")

    async def microbatch(self, tokens: Tensor, timeout_seconds: float = 300.0) -> float:
        """Train on tokens (B, T + 1): the mean loss in nats per token. Raises PipelineBroken if it is thrown away."""
        one = _Microbatch(tokens[:, :-1], tokens[:, 1:])
        try:
            async with asyncio.timeout(timeout_seconds):
                loss = await self._through(one) if self._direct else None
                if loss is None:
                    loss = await self._driven(one)
        except (TimeoutError, PipelineBroken) as error:
            self.stats.thrown_away += 1
            raise PipelineBroken(str(error) or f"not done in {timeout_seconds:g} s") from None
        mean = loss / one.size
        for k, server in one.counted.items():
            self._confirm(self._names[k], server, one.id, mean)
        self.stats.microbatches += 1
        self.stats.tokens += one.size
        return mean

    async def evaluate(self, tokens: Tensor, timeout_seconds: float = LOOK_SECONDS) -> float:
        """Mean loss in nats per token of (B, T + 1), nothing counted. Raises PipelineBroken."""
        one = _Microbatch(tokens[:, :-1], tokens[:, 1:])
        async with _within(timeout_seconds):
            head, body = await self._to_the_last(one)
            both = b"".join([body, encode_tokens(one.targets_BT)])
            _, reply = await self._ask(len(self._names) - 1, "loss", one, head, both)
        return loss_of(reply) / one.size

    async def next_token(self, tokens_BT: Tensor, timeout_seconds: float = LOOK_SECONDS) -> Tensor:
        """Logits (B, V) of the token after each sequence. Raises PipelineBroken."""
        one = _Microbatch(tokens_BT, tokens_BT)
        async with _within(timeout_seconds):
            head, body = await self._to_the_last(one)
            _, reply = await self._ask(len(self._names) - 1, "forward", one, head, body)
        return decode(reply.head["shape"], reply.body, "none")

    async def _to_the_last(self, one: _Microbatch) -> tuple[dict[str, Any], Buffer]:
        """Forward, not to be trained: head and body of the request to the last stage."""
        head: dict[str, Any] = {"shape": [*one.tokens_BT.shape], "train": False}
        body: Buffer = encode_tokens(one.tokens_BT)
        for k in range(len(self._names) - 1):
            _, reply = await self._ask(k, "forward", one, head, body)
            head, body = {**head, "shape": reply.head["shape"]}, reply.body
        return head, body

    # ---- driven from here -----------------------------------------------------------------------------------

    async def _driven(self, one: _Microbatch) -> float:
        last = len(self._names) - 1
        shape: list[int] = [*one.tokens_BT.shape]
        body: Buffer = encode_tokens(one.tokens_BT)
        inputs: list[Buffer] = []
        holders: list[PeerId | None] = []
        for k in range(last):
            inputs.append(body)
            server, reply = await self._ask(k, "forward", one, {"shape": shape, "train": True}, body)
            holders.append(server if reply.head.get("kept") is True else None)
            shape, body = reply.head["shape"], reply.body
        both = b"".join([body, encode_tokens(one.targets_BT)])
        one.counted[last], reply = await self._ask(last, "loss", one, {"shape": shape, "train": True}, both)
        loss = loss_of(reply)
        for k in reversed(range(last)):
            shape = reply.head["shape"]
            one.counted[k], reply = await self._backward(k, one, shape, reply.body, inputs[k], holders[k])
        return loss

    async def _backward(
        self, k: int, one: _Microbatch, shape: list[int], grad: Buffer, x: Buffer, holder: PeerId | None
    ) -> tuple[PeerId, Reply]:
        """Where the forward was done the gradient is enough; anybody else gets the input, too."""
        head = {"shape": shape}
        if holder is not None:
            try:
                return holder, await self._call(k, holder, "backward", one, head, grad)
            except RpcRemoteError as error:
                if error.kind != "InputNeeded":
                    self.wirings[k].failed(holder, self._utc())
            except NetworkError as error:
                self._learn(k, holder, one, error)
            self.stats.resends += 1
        return await self._ask(k, "backward", one, head, b"".join([grad, x]))

    async def _ask(
        self, k: int, method: str, one: _Microbatch, head: Mapping[str, Any], body: Buffer
    ) -> tuple[PeerId, Reply]:
        """From whichever server of stage k does it. Raises PipelineBroken. Who is busy is asked again, for as long as
        the caller waits."""
        tried: set[PeerId] = set()
        why, pause, failures = "nobody serves it", 0.0, 0
        while failures < ATTEMPTS:
            server = self.wirings[k].choose(one.size, self._utc(), tried)
            if server is None and tried:
                await asyncio.sleep(min(MOST_PAUSE_SECONDS, max(0.05, pause)))
                tried.clear()
                continue
            if server is None:
                failures += 1
                back = self.wirings[k].retry_at(self._utc())
                await asyncio.sleep(min(2.0, max(0.1, back - self._utc())) if back else 1.0)
                continue
            tried.add(server)
            try:
                return server, await self._call(k, server, method, one, head, body)
            except RpcRefused as error:
                pause = error.retry_after_seconds
            except NetworkError as error:
                why = str(error)
                self._learn(k, server, one, error)
                self.stats.resends += 1
                failures += 1
        raise PipelineBroken(f"{self._names[k]}: {why}")

    async def _call(
        self, k: int, server: PeerId, method: str, one: _Microbatch, head: Mapping[str, Any], body: Buffer
    ) -> Reply:
        """Raises NetworkError, also for an answer that is none: the next server is not blamed for what this one did."""
        began, (shape, codec) = self._now(), self._expected(k, method, one, head)
        reply = await self._rpc.call(
            server,
            f"stage.{method}",
            {"module": self._names[k], "id": one.id, **head},
            body,
            timeout_seconds=self._timeout(k, server, one),
            max_response_bytes=encoded_bytes(shape, codec) if shape else 0,
            lane="bulk",
        )
        try:
            if method == "loss":
                loss_of(reply)
            if shape:
                if checked_shape(reply.head, shape, exact_last=True) != list(shape):
                    raise ProtocolError(f"an answer of shape {reply.head['shape']}, not {shape}")
                check(shape, reply.body, codec)
        except (CodecError, ProtocolError) as error:
            raise BadAnswer(f"stage.{method} of {self._names[k]}: {error}") from None
        self.wirings[k].succeeded(server, one.size, self._now() - began)
        return reply

    def _expected(
        self, k: int, method: str, one: _Microbatch, head: Mapping[str, Any]
    ) -> tuple[tuple[int, ...] | None, ActivationCodec]:
        """Shape and codec of an answer's body."""
        B, T = one.tokens_BT.shape
        if method == "forward" and k == len(self._names) - 1:
            return (B, self._shapes.vocabulary), "none"
        has_none = (method == "backward" and k == 0) or (method == "loss" and not head["train"])
        return None if has_none else (B, T, self._shapes.hidden), self._shapes.codec

    def _timeout(self, k: int, server: PeerId, one: _Microbatch) -> float:
        expected = PATIENCE * self.wirings[k].expected_seconds(server, one.size)
        return min(max(expected, LEAST_TIMEOUT_SECONDS), MOST_TIMEOUT_SECONDS)

    def _learn(self, k: int, server: PeerId, one: _Microbatch, error: NetworkError) -> None:
        if isinstance(error, RpcTimeout) and not isinstance(error, RpcUnreached):
            self.wirings[k].late(server, one.size, self._timeout(k, server, one))
        elif not isinstance(error, RpcRefused):
            self.wirings[k].failed(server, self._utc())

    # ---- from server to server ------------------------------------------------------------------------------

    async def _through(self, one: _Microbatch) -> float | None:
        """The whole way in one call; None if some server failed: then the microbatch begins anew, under a new id."""
        route: list[PeerId] = []
        for wiring in self.wirings:
            server = wiring.choose(one.size, self._utc())
            if server is None:
                return None
            route.append(server)
        hops = [[self._names[k], server] for k, server in enumerate(route)]
        timeout = sum(self._timeout(k, server, one) for k, server in enumerate(route))
        began = self._now()
        try:
            reply = await self._rpc.call(
                route[0],
                "stage.through",
                {
                    "module": self._names[0],
                    "id": one.id,
                    "shape": [*one.tokens_BT.shape],
                    "route": hops[1:],
                    "timeout": timeout,
                },
                encode_tokens(one.tokens_BT) + encode_tokens(one.targets_BT),
                timeout_seconds=timeout,
                lane="bulk",
            )
            loss, seconds = loss_of(reply), seconds_of(reply)
            if len(seconds) != len(route):
                raise StageFailed(0, "answered without each server's seconds")
        except (NetworkError, ProtocolError) as error:
            self._learn_of_route(route, one, error)
            self.stats.resends += 1
            one.id = os.urandom(ID_BYTES)
            return None
        total = self._now() - began
        network = max(0.0, total - sum(seconds)) / len(route)
        for k, server in enumerate(route):
            self.wirings[k].succeeded(server, one.size, min(total, seconds[k]) + network)
        one.counted = dict(enumerate(route))
        self.stats.direct += 1
        return loss

    def _learn_of_route(self, route: list[PeerId], one: _Microbatch, error: Exception) -> None:
        failed = error if isinstance(error, StageFailed) else None
        if failed is None:
            failed = StageFailed.heard(error, 0) if isinstance(error, NetworkError) else StageFailed(0, str(error))
        if failed.hop >= len(route):
            failed = StageFailed(0, str(failed))  # whoever says so is the only one that we know of
        server = route[failed.hop]
        if failed.how == "late":
            self.wirings[failed.hop].late(server, one.size, self._timeout(failed.hop, server, one))
        elif failed.how == "failed":
            self.wirings[failed.hop].failed(server, self._utc())

    # ---- confirming -----------------------------------------------------------------------------------------

    def _confirm(self, module: str, server: PeerId, id_: bytes, loss: float) -> None:
        key = module, server
        self._confirmations[key].append((id_, loss))
        if key not in self._confirming:
            self._confirming[key] = asyncio.create_task(self._confirm_soon(module, server))

    async def _confirm_soon(self, module: str, server: PeerId) -> None:
        """What there is for one server, together. Each server has its own: none waits for another's silence."""
        key = module, server
        try:
            while self._confirmations.get(key):
                await asyncio.sleep(CONFIRM_SECONDS)
                done = self._confirmations.pop(key)
                for part in range(0, len(done), MAX_IDS):
                    await self._send_confirmation(module, server, done[part : part + MAX_IDS])
        finally:
            del self._confirming[key]

    async def _send_confirmation(self, module: str, server: PeerId, done: list[tuple[bytes, float]]) -> None:
        mean = sum(loss for _, loss in done) / len(done)
        head = {"module": module, "ids": [id_ for id_, _ in done], "loss": mean}
        for _ in range(CONFIRM_ATTEMPTS):
            try:
                reply = await self._rpc.call(server, "stage.confirm", head, timeout_seconds=2.0)
            except RpcRefused as error:
                await asyncio.sleep(min(MOST_PAUSE_SECONDS, error.retry_after_seconds))
            except RpcTimeout:
                pass
            except NetworkError:
                break  # it is gone, and its gradients with it
            else:
                lost = reply.head.get("lost")
                self.stats.half_counted += lost if isinstance(lost, int) and 0 <= lost <= len(done) else 0
                return
        self.stats.half_counted += len(done)

    async def flush(self) -> None:
        """Send the confirmations that wait; who does not answer soon is left to its task."""
        if self._confirming:
            await asyncio.wait(self._confirming.values(), timeout=FLUSH_SECONDS)

    async def close(self) -> None:
        """Nothing is confirmed any more."""
        tasks = list(self._confirming.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
