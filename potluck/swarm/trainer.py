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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from potluck.errors import NetworkError, RpcRefused, RpcRemoteError, RpcTimeout, RpcUnreached
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc
from potluck.net.wire import Buffer
from potluck.swarm.activations import checked_shape, decode, encode_tokens, encoded_bytes
from potluck.swarm.server import ID_BYTES, Shapes, StageFailed
from potluck.swarm.stage import stage_names
from potluck.swarm.wiring import Wiring

#: A server gets this many times what it is expected to take, before the microbatch goes elsewhere.
PATIENCE: Final = 4.0
LEAST_TIMEOUT_SECONDS: Final = 5.0
MOST_TIMEOUT_SECONDS: Final = 120.0
#: Attempts at one stage; then the microbatch is thrown away.
ATTEMPTS: Final = 8
#: Confirmations are sent together this often.
CONFIRM_SECONDS: Final = 0.05


class PipelineBroken(NetworkError):
    """No server of a stage did its part in time: the microbatch is thrown away in all stages."""


@dataclass
class TrainerStats:
    """Counts since the start. `tokens`: of microbatches that every stage counted."""

    microbatches: int = 0
    tokens: int = 0
    resends: int = 0
    thrown_away: int = 0
    direct: int = 0


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
        self.wirings = [Wiring() for _ in self._names]
        self.stats = TrainerStats()
        self._in_flight, self._utc = in_flight, now
        self._confirmations: defaultdict[tuple[str, PeerId], list[tuple[bytes, float]]] = defaultdict(list)
        self._confirming: asyncio.Task[None] | None = None

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

    async def evaluate(self, tokens: Tensor) -> float:
        """Mean loss in nats per token of (B, T + 1), nothing counted. Raises PipelineBroken."""
        one = _Microbatch(tokens[:, :-1], tokens[:, 1:])
        head, body = await self._to_the_last(one)
        both = b"".join([body, encode_tokens(one.targets_BT)])
        _, reply = await self._ask(len(self._names) - 1, "loss", one, head, both)
        return float(reply.head["loss"]) / one.size

    async def next_token(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, V) of the token after each sequence. Raises PipelineBroken."""
        one = _Microbatch(tokens_BT, tokens_BT)
        head, body = await self._to_the_last(one)
        allowed = tokens_BT.shape[0], self._shapes.vocabulary
        _, reply = await self._ask(len(self._names) - 1, "forward", one, head, body, encoded_bytes(allowed, "none"))
        return decode(checked_shape(reply.head, allowed, exact_last=True), reply.body, "none")

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
        loss = float(reply.head["loss"])
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
        self, k: int, method: str, one: _Microbatch, head: Mapping[str, Any], body: Buffer, most: int | None = None
    ) -> tuple[PeerId, Reply]:
        """From whichever server of stage k does it. `most`: bytes of the answer, activations' by default. Raises
        PipelineBroken."""
        tried: set[PeerId] = set()
        why = "nobody serves it"
        failures = 0
        while failures < ATTEMPTS:
            server = self.wirings[k].choose(one.size, self._utc(), tried) or self.wirings[k].choose(
                one.size, self._utc()
            )
            if server is None:
                failures += 1
                back = self.wirings[k].retry_at(self._utc())
                await asyncio.sleep(min(2.0, max(0.1, back - self._utc())) if back else 1.0)
                continue
            try:
                return server, await self._call(k, server, method, one, head, body, most)
            except RpcRefused as error:
                await asyncio.sleep(error.retry_after_seconds)
            except NetworkError as error:
                why = str(error)
                self._learn(k, server, one, error)
                self.stats.resends += 1
                failures += 1
                tried.add(server)
        raise PipelineBroken(f"{self._names[k]}: {why}")

    async def _call(
        self,
        k: int,
        server: PeerId,
        method: str,
        one: _Microbatch,
        head: Mapping[str, Any],
        body: Buffer,
        most: int | None = None,
    ) -> Reply:
        shapes, began = self._shapes, self._now()
        reply = await self._rpc.call(
            server,
            f"stage.{method}",
            {"module": self._names[k], "id": one.id, **head},
            body,
            timeout_seconds=self._timeout(k, server, one),
            max_response_bytes=most or encoded_bytes((*one.tokens_BT.shape, shapes.hidden), shapes.codec),
            lane="bulk",
        )
        self.wirings[k].succeeded(server, one.size, self._now() - began)
        return reply

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
            loss = reply.head.get("loss")
            if not isinstance(loss, float):
                raise StageFailed(0, "answered without a loss")
        except NetworkError as error:
            failed = error if isinstance(error, StageFailed) else StageFailed.heard(error, 0)
            if failed.hop < len(route) and not isinstance(error, RpcRefused | RpcTimeout):
                self.wirings[failed.hop].failed(route[failed.hop], self._utc())
            self.stats.resends += 1
            one.id = os.urandom(ID_BYTES)
            return None
        share = (self._now() - began) / len(route)
        for k, server in enumerate(route):
            self.wirings[k].succeeded(server, one.size, share)
        one.counted = dict(enumerate(route))
        self.stats.direct += 1
        return loss

    # ---- confirming -----------------------------------------------------------------------------------------

    def _confirm(self, module: str, server: PeerId, id_: bytes, loss: float) -> None:
        self._confirmations[module, server].append((id_, loss))
        if self._confirming is None or self._confirming.done():
            self._confirming = asyncio.create_task(self._confirm_soon())

    async def _confirm_soon(self) -> None:
        while self._confirmations:
            await asyncio.sleep(CONFIRM_SECONDS)
            await self._send_confirmations()

    async def flush(self) -> None:
        """Send the confirmations that wait."""
        await self._send_confirmations()
        if self._confirming:
            await self._confirming

    async def _send_confirmations(self) -> None:
        waiting, self._confirmations = self._confirmations, defaultdict(list)

        async def send(module: str, server: PeerId, done: list[tuple[bytes, float]]) -> None:
            mean = sum(loss for _, loss in done) / len(done)
            head = {"module": module, "ids": [id_ for id_, _ in done], "loss": mean}
            try:
                await self._rpc.call(server, "stage.confirm", head, timeout_seconds=2.0)
            except NetworkError:
                pass  # it is gone, and its gradients with it; or it throws these away

        await asyncio.gather(*(send(module, server, done) for (module, server), done in waiting.items()))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
