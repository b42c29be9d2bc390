"""Serving stages over RPC: what others send is checked here, computed by `StageTrainer`, and sent back.

    stage.forward   input -> output                         (in the last stage: logits of the next token, not trained)
    stage.loss      input, targets -> loss, its gradient    (the last stage: forward and backward in one call)
    stage.backward  gradient [, input] -> gradient          (the input only if this server no longer has it)
    stage.through   tokens, targets, route -> losses        (the whole way there and back, from server to server)
    stage.confirm   ids -> how many are lost here           (every stage has counted these)

In `stage.through` a server hands its output straight to the next one on the route that the trainer chose, and gets the
gradient back as that call's answer: half the hops, and the trainer sends tokens only.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from torch import Tensor

from potluck.errors import (
    CodecError,
    ManifestError,
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
from potluck.swarm.activations import (
    ActivationCodec,
    checked_shape,
    decode,
    decode_tokens,
    encode,
    encode_tokens,
    encoded_bytes,
)
from potluck.swarm.stage_trainer import Job, StageTrainer

#: Random, and known to the trainer and the servers on its route only: who can name an id may confirm it.
ID_BYTES: Final = 16
MAX_IDS: Final = 1024
#: Larger bodies are converted in a thread, so that the event loop goes on.
INLINE_BYTES: Final = 256 * 1024
MAX_STAGES: Final = 256
#: Of the time that is left, what the rest of a route gets.
ONWARD_SHARE: Final = 0.95


@dataclass(frozen=True)
class Shapes:
    """What a stage of this run may be sent: at most `batch` sequences of `length` tokens, `hidden` wide."""

    batch: int
    length: int
    hidden: int
    vocabulary: int
    codec: ActivationCodec = "none"


How = Literal["failed", "late", "busy"]


class StageFailed(NetworkError):
    """A server on the route did not do its part; `hop` is its place, 0 the one that the trainer called.

    `how`: late is slow, not broken, and busy only says when to come again.
    """

    def __init__(self, hop: int, why: str, how: How = "failed") -> None:
        super().__init__(f"hop {hop} {how}: {why}")
        self.hop, self.how = hop, how

    @classmethod
    def heard(cls, error: NetworkError, hop: int) -> StageFailed:
        """What a call to the server at `hop` raised: that one's failure, or one further down that it tells of."""
        if isinstance(error, RpcRemoteError) and error.kind == cls.__name__:
            told = re.search(r"hop (\d{1,3}) (failed|late|busy): (.*)", str(error), re.DOTALL)
            if told and int(told[1]) > hop:
                return cls(int(told[1]), told[3], cast(How, told[2]))
        late = isinstance(error, RpcTimeout) and not isinstance(error, RpcUnreached)
        return cls(hop, str(error), "late" if late else "busy" if isinstance(error, RpcRefused) else "failed")


def loss_of(reply: Reply) -> float:
    """Summed over tokens. Raises ProtocolError."""
    loss = reply.head.get("loss")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise ProtocolError("answered without a loss")
    return loss


def seconds_of(reply: Reply) -> list[float]:
    """What each server of the route says that it took. Raises ProtocolError."""
    seconds = reply.head.get("seconds")
    if not isinstance(seconds, list) or len(seconds) > MAX_STAGES:
        raise ProtocolError("answered without its seconds")
    if not all(isinstance(each, float) and 0 <= each < math.inf for each in seconds):
        raise ProtocolError("answered with seconds that are none")
    return seconds


def next_stage(module: str) -> str:
    return f"stage.{int(module.removeprefix('stage.')) + 1}"


class StageServer:
    """All stages that this peer serves: those that it was told to `host`."""

    def __init__(self, rpc: Rpc, shapes: Shapes) -> None:
        self._rpc, self._shapes = rpc, shapes
        self._hosted: dict[str, StageTrainer] = {}
        activations = encoded_bytes((shapes.batch, shapes.length, shapes.hidden), shapes.codec)
        tokens = 4 * shapes.batch * shapes.length
        most = rpc.limits.buffered_bytes_per_peer
        if 2 * activations + tokens > most:
            raise ManifestError(
                f"pipeline.microbatch: {shapes.batch} sequences of {shapes.length} tokens, {shapes.hidden} wide, make "
                f"requests of {(2 * activations + tokens) / 2**20:.0f} MiB, allowed {most / 2**20:.0f}: lower it"
            )
        for name, handler, most in (
            ("forward", self._forward, max(activations, tokens)),
            ("loss", self._loss, activations + tokens),
            ("backward", self._backward, activations + max(activations, tokens)),
            ("through", self._through, activations + tokens),
            ("confirm", self._confirm, 0),
        ):
            rpc.register(f"stage.{name}", handler, max_request_bytes=most)

    def host(self, module: str, trainer: StageTrainer) -> None:
        self._hosted[module] = trainer

    def leave(self, module: str) -> None:
        self._hosted.pop(module, None)

    # ---- handlers -------------------------------------------------------------------------------------------

    async def _forward(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        trainer, id_ = self._addressed(head)
        train = head.get("train") is True
        x = await self._input(trainer, head, body)
        if trainer.stage.last and train:
            raise ProtocolError("stage.forward trains no last stage: use stage.loss")
        y, _ = await self._run(trainer, Job("forward", id_, x=x, train=train))
        assert y is not None
        if trainer.stage.last:
            y = y[:, -1]  # logits of the next token: (B, V)
            shape, answer = await self._encode(y, "none")
        else:
            shape, answer = await self._encode(y)
        return Reply({"shape": shape, "kept": trainer.keeps(id_)}, answer)

    async def _loss(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        trainer, id_ = self._addressed(head)
        if not trainer.stage.last:
            raise ProtocolError("stage.loss is the last stage's")
        train = head.get("train") is True
        x, targets = await self._with_targets(trainer, head, body)
        grad, loss = await self._run(trainer, Job("loss", id_, x=x, targets=targets, train=train))
        return await self._graded(grad, loss)

    async def _backward(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        trainer, id_ = self._addressed(head)
        shapes = self._shapes
        shape = checked_shape(head, (shapes.batch, shapes.length, shapes.hidden), exact_last=True)
        split = encoded_bytes(shape, shapes.codec)
        grad = await self._decode(shape, body[:split])
        x = None
        if len(body) > split:
            given = shape[:2] if trainer.stage.first else shape
            x = await self._input(trainer, {"shape": given}, body[split:])
        answer, _ = await self._run(trainer, Job("backward", id_, x=x, grad=grad))
        return await self._graded(answer, 0.0)

    async def _through(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        trainer, id_ = self._addressed(head)
        route = head.get("route")
        if not isinstance(route, list) or not all(
            isinstance(hop, list) and len(hop) == 2 and all(isinstance(x, str) for x in hop) for hop in route
        ):
            raise ProtocolError("stage.through without a route")
        if trainer.stage.last:
            began = asyncio.get_running_loop().time()
            graded = await self._loss(peer, head | {"train": True}, body)
            return Reply({**graded.head, "seconds": [asyncio.get_running_loop().time() - began]}, graded.body)
        if not route or route[0][0] != next_stage(head["module"]):
            raise ProtocolError("stage.through: the route does not lead to the next stage")
        timeout = head.get("timeout")
        if not isinstance(timeout, int | float) or not 0 < timeout <= 3600:
            raise ProtocolError("stage.through without a timeout in seconds")
        began = asyncio.get_running_loop().time()
        x, targets = await self._with_targets(trainer, head, body)
        y, _ = await self._run(trainer, Job("forward", id_, x=x))
        assert y is not None
        worked = asyncio.get_running_loop().time() - began
        (module, server), rest = route[0], route[1:]
        # Less at each hop: so the hop that hangs is named by the one before it, and not by the trainer's own clock.
        left = ONWARD_SHARE * (timeout - worked)
        if left <= 0:
            raise StageFailed(0, "no time left for the rest of the route", "late")
        hop = 1 + (here if isinstance(here := head.get("hop"), int) and 0 <= here < 256 else 0)
        shape, activations = await self._encode(y)
        onward = {"module": module, "id": id_, "shape": shape, "route": rest, "timeout": left, "hop": hop}
        try:
            reply = await self._rpc.call(
                PeerId(server),
                "stage.through",
                onward,
                b"".join([activations, encode_tokens(targets)]),
                timeout_seconds=left,
                max_response_bytes=encoded_bytes(shape, self._shapes.codec),
                lane="bulk",
            )
            loss, seconds = loss_of(reply), seconds_of(reply)
            grad = await self._decode(shape, reply.body)
        except NetworkError as error:
            raise StageFailed.heard(error, hop) from None
        except (CodecError, ProtocolError) as error:
            raise StageFailed(hop, str(error)) from None
        began = asyncio.get_running_loop().time()
        answer, _ = await self._run(trainer, Job("backward", id_, x=x, grad=grad))
        worked += asyncio.get_running_loop().time() - began
        graded = await self._graded(answer, loss)
        return Reply({**graded.head, "seconds": [worked, *seconds][:MAX_STAGES]}, graded.body)

    async def _confirm(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        trainer = self._trainer(head)
        ids, loss = head.get("ids"), head.get("loss")
        if not isinstance(ids, list) or len(ids) > MAX_IDS or not all(isinstance(i, bytes) for i in ids):
            raise ProtocolError("stage.confirm without a list of ids")
        return Reply({"lost": trainer.confirm(ids, loss if isinstance(loss, float) else None)})

    # ---- parsing --------------------------------------------------------------------------------------------

    def _trainer(self, head: Mapping[str, Any]) -> StageTrainer:
        module = head.get("module")
        trainer = self._hosted.get(module) if isinstance(module, str) else None
        if trainer is None:
            raise ProtocolError(f"no {str(module)[:32]} here")
        return trainer

    def _addressed(self, head: Mapping[str, Any]) -> tuple[StageTrainer, bytes]:
        id_ = head.get("id")
        if not isinstance(id_, bytes) or len(id_) != ID_BYTES:
            raise ProtocolError(f"a microbatch's id has {ID_BYTES} bytes")
        return self._trainer(head), id_

    async def _input(self, trainer: StageTrainer, head: Mapping[str, Any], body: memoryview) -> Tensor:
        shapes = self._shapes
        if trainer.stage.first:
            shape = checked_shape(head, (shapes.batch, shapes.length), exact_last=False)
            return decode_tokens(shape, body, shapes.vocabulary)
        shape = checked_shape(head, (shapes.batch, shapes.length, shapes.hidden), exact_last=True)
        return await self._decode(shape, body)

    async def _with_targets(
        self, trainer: StageTrainer, head: Mapping[str, Any], body: memoryview
    ) -> tuple[Tensor, Tensor]:
        """The input, and behind it the targets, of equal (B, T)."""
        shape = head.get("shape")
        if not isinstance(shape, list) or len(shape) < 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ProtocolError("a request without a shape")
        split = len(body) - 4 * shape[0] * shape[1]
        if split < 0:
            raise ProtocolError("a request without its targets")
        targets = decode_tokens(shape[:2], body[split:], self._shapes.vocabulary)
        return await self._input(trainer, head, body[:split]), targets

    # ---- computing ------------------------------------------------------------------------------------------

    async def _run(self, trainer: StageTrainer, job: Job) -> tuple[Tensor | None, float]:
        return await asyncio.wrap_future(trainer.submit(job))

    async def _graded(self, grad: Tensor | None, loss: float) -> Reply:
        if grad is None:
            return Reply({"loss": loss})
        shape, body = await self._encode(grad)
        return Reply({"loss": loss, "shape": shape}, body)

    async def _encode(self, x: Tensor, codec: ActivationCodec | None = None) -> tuple[list[int], Buffer]:
        if 4 * x.numel() <= INLINE_BYTES:
            return encode(x, codec or self._shapes.codec)
        return await asyncio.to_thread(encode, x, codec or self._shapes.codec)

    async def _decode(self, shape: list[int], body: Buffer) -> Tensor:
        if len(body) <= INLINE_BYTES:
            return decode(shape, body, self._shapes.codec)
        return await asyncio.to_thread(decode, shape, body, self._shapes.codec)
