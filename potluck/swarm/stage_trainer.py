"""What a stage's replica computes: others' microbatches, one after another, in one thread; their gradients add up to
the inner optimizer's steps. It takes `LocalTrainer`'s place in a gossip round.

**Exactly once.** A microbatch has an id. Its gradient is added when its backward runs, and kept apart only on paper:
until the trainer confirms that every stage has counted it, its input and output gradient are remembered. What is not
confirmed in time is computed once more and subtracted: thrown away here as everywhere. A step waits for the
confirmations of what is in it, while gradients that come meanwhile are added up for the next.

**Fast path.** Graphs of recent forwards are kept, so that a backward needs neither its input nor another forward. A
step changes the parameters and with them invalidates the graphs; their inputs stay, for a recomputation. Correctness
never depends on either: a backward may bring its input again.

Losses are sums over tokens here, so that gradients of any microbatches add up; a step divides by its tokens.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck.errors import PotluckError, ProtocolError, RpcRefused
from potluck.swarm.layout import Flat, Layout
from potluck.swarm.local import LocalResult, TrainingSpec, autocast, learning_rate_at, make_optimizer, take_step
from potluck.swarm.stage import Stage

#: Microbatches whose answer was asked for and not confirmed; beyond it backwards are refused.
MAX_UNCONFIRMED: Final = 256
#: Bytes that may be held for them, if the cache for graphs is smaller.
LEAST_HELD: Final = 1 << 28
#: Output gradients whose length per token is this many times the usual are refused: no honest loss gives them.
GRADIENT_LIMIT: Final = 100.0
#: Length per token of an output gradient, until there are enough to say what is usual: far above any of a summed loss.
MAX_LENGTH: Final = 1e4
#: A confirmed loss is at most this many times that of guessing.
MAX_LOSS: Final = 10.0
#: Forwards remembered, however small they are.
MAX_KEPT: Final = 1024
#: What an unconfirmed sum may wait, in times that confirmations usually take, and at most.
CONFIRM_PATIENCE: Final = 4.0
LONGEST_WAIT_SECONDS: Final = 60.0
#: Logits of microbatches that are computed together.
STACK_BYTES: Final = 1 << 28
RETRY_SECONDS: Final = 0.25
#: Microbatches that are computed together, if as many wait.
MAX_STACK: Final = 8

Kind = Literal["forward", "backward", "loss"]


class InputNeeded(PotluckError):
    """This server does not have the input of that microbatch (any more): send it along."""


@dataclass
class Job:
    """One request. `x`: input (tokens or hidden states); `grad`: of the output; `train`: whether a backward follows."""

    kind: Kind
    id: bytes
    x: Tensor | None = None
    grad: Tensor | None = None
    targets: Tensor | None = None
    train: bool = True
    answer: Future[tuple[Tensor | None, float]] = field(default_factory=Future)

    @property
    def priority(self) -> int:
        """Backwards first: they free memory. Then training, then those who only look."""
        return 0 if self.kind == "backward" or (self.kind == "loss" and self.train) else 1 if self.train else 2


class JobQueue:
    """A bounded priority queue between the event loop and the computing thread. Closed, it refuses."""

    def __init__(self, limit: int) -> None:
        self._limit, self._open = limit, False
        self._jobs: list[tuple[int, int, Job]] = []
        self._numbers = itertools.count()
        self.changed = threading.Condition()

    def put(self, job: Job) -> None:
        """Raises RpcRefused when it is full or closed. For forwards three quarters of it count, for those who only look
        half: nobody's questions keep a backward out."""
        with self.changed:
            if not self._open or len(self._jobs) >= self._limit * (4 - job.priority) // 4:
                raise RpcRefused("this stage is busy" if self._open else "between two rounds", RETRY_SECONDS)
            heapq.heappush(self._jobs, (job.priority, next(self._numbers), job))
            self.changed.notify()

    def take(
        self, timeout_seconds: float, joins: Callable[[Sequence[Job], Job], bool] = lambda taken, job: False
    ) -> list[Job]:
        """The next job that is still wanted, and those to be done together with it; none after the timeout.

        `joins(taken, job)`: whether a job may be done together with those.
        """
        with self.changed:
            if not self._jobs:
                self.changed.wait(timeout_seconds)
            taken: list[Job] = []
            left: list[tuple[int, int, Job]] = []
            while self._jobs:
                entry = heapq.heappop(self._jobs)
                job = entry[2]
                if taken and not joins(taken, job):
                    left.append(entry)
                elif job.answer.set_running_or_notify_cancel():
                    taken.append(job)
            self._jobs = left  # in order, which is a heap
            return taken

    def open(self) -> None:
        with self.changed:
            self._open = True

    def close(self) -> None:
        """Refuse what is waiting, and what comes."""
        with self.changed:
            self._open = False
            jobs, self._jobs = self._jobs, []
        for _, _, job in jobs:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(RpcRefused("the round's training is over", RETRY_SECONDS))


@dataclass
class _Kept:
    """A forward that a backward may follow. `y`: its output with the graph, until the parameters change."""

    x: Tensor
    y: Tensor | None
    at: float


@dataclass
class _Counted:
    """A microbatch whose gradient is in a sum. `x` and what its gradient came from are kept until it is confirmed."""

    x: Tensor | None
    grad: Tensor | None
    targets: Tensor | None
    tokens: int
    reply: tuple[Tensor | None, float] | None
    length: float | None = None
    """Of `grad`, per token."""
    confirmed: bool = False
    at: float = field(default_factory=time.monotonic)

    @property
    def held_bytes(self) -> int:
        """That go when it is confirmed."""
        tensors = [self.x, self.grad, self.targets, self.reply[0] if self.reply else None]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass
class _Sum:
    """Gradients that are to become one step. `grads` is None while they are in the parameters' own `grad`."""

    counted: dict[bytes, _Counted] = field(default_factory=dict)
    #: Not confirmed yet, and what is held for them.
    unconfirmed: int = 0
    held_bytes: int = 0
    grads: list[Tensor | None] | None = None
    sealed_at: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.counted.values())

    @property
    def confirmed(self) -> bool:
        return not self.unconfirmed


@dataclass
class StageStats:
    """Counts since the start."""

    forwards: int = 0
    backwards: int = 0
    hits: int = 0
    recomputed: int = 0
    voided: int = 0
    busy_seconds: float = 0.0


class StageTrainer:
    """One stage's replica on this machine's device. Implements `swarm.rounds.Trainer`.

    Everything but `submit`, `confirm` and what only reads runs in the computing thread. `step_tokens`: tokens of one
    step of the inner optimizer. `cache_bytes`: of remembered forwards (0: none, every backward recomputes).
    """

    def __init__(
        self,
        stage: Stage,
        spec: TrainingSpec,
        device: torch.device,
        *,
        step_tokens: int,
        cache_bytes: int = 1 << 30,
        cache_seconds: float = 120.0,
        queue_limit: int = 64,
        settle_seconds: float = 2.0,
    ) -> None:
        self.layout = Layout.of_module(stage)
        self.stage = stage.to(device).train()
        self.device, self.spec = device, spec
        self.optimizer = make_optimizer(spec, stage)
        self.queue = JobQueue(queue_limit)
        self.stats = StageStats()
        self.step_tokens, self.settle_seconds = step_tokens, settle_seconds
        self._cache_bytes, self._cache_seconds = cache_bytes, cache_seconds
        self._most_held = max(LEAST_HELD, cache_bytes)
        self._parameters = list(stage.parameters())
        self._dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in stage.modules())
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._graph_bytes: dict[torch.Size, int] = {}
        self._open = _Sum()
        self._sealed: _Sum | None = None
        self._seen: set[bytes] = set()
        self._losses: deque[float] = deque(maxlen=64)
        self._lengths: deque[float] = deque(maxlen=64)
        self._vocabulary = max(2, int(stage.config.get_text_config().vocab_size))
        self._guessing = math.log(self._vocabulary)
        self._confirm_seconds = 0.0
        self._stepped: set[bytes] = set()
        self._first_step = self._steps = self._tokens = 0
        self._most = MAX_STACK
        #: Microbatches in the steps of the round's training, by now.
        self.counted: list[bytes] = []

    # ---- from the event loop --------------------------------------------------------------------------------

    def submit(self, job: Job) -> Future[tuple[Tensor | None, float]]:
        """(output, or gradient of the input, or None; loss summed over tokens, or 0). Raises RpcRefused when full."""
        waiting = [sum_ for sum_ in (self._sealed, self._open) if sum_]
        many = sum(sum_.unconfirmed for sum_ in waiting) >= MAX_UNCONFIRMED
        if job.priority == 0 and (many or sum(sum_.held_bytes for sum_ in waiting) > self._most_held):
            raise RpcRefused("too many microbatches wait for their confirmation", RETRY_SECONDS)
        self.queue.put(job)
        return job.answer

    def confirm(self, ids: Sequence[bytes], loss: float | None = None) -> int:
        """Every stage has counted these. `loss`: their mean in nats per token, as the trainer knows it.

        How many are not here (any more): those count in the other stages only. A retry is safe.
        """
        found, now = 0, time.monotonic()
        with self.queue.changed:
            for id_ in set(ids):
                sum_ = next((s for s in (self._sealed, self._open) if s and id_ in s.counted), None)
                found += sum_ is not None or id_ in self._stepped
                if sum_ is None or (one := sum_.counted[id_]).confirmed:
                    continue
                sum_.unconfirmed -= 1
                sum_.held_bytes -= one.held_bytes
                one.confirmed = True
                one.x = one.grad = one.targets = one.reply = None
                self._confirm_seconds += 0.1 * (now - one.at - self._confirm_seconds)
                if one.length is not None:
                    self._lengths.append(one.length)
            if found and loss is not None and 0 <= loss <= MAX_LOSS * self._guessing:
                self._losses.append(loss)
            self.queue.changed.notify()
        return len(set(ids)) - found

    def keeps(self, id_: bytes) -> bool:
        """Whether a backward of this microbatch need not bring its input."""
        return id_ in self._kept

    @property
    def loss(self) -> float:
        """Mean loss of the latest confirmed microbatches, nats per token."""
        losses = list(self._losses)
        return statistics.fmean(losses) if losses else self._guessing

    # ---- `swarm.rounds.Trainer` -----------------------------------------------------------------------------

    def load(self, theta: Flat) -> None:
        self._settle(0.0)
        self.layout.scatter(theta, self.stage)
        self._forget_graphs()

    def delta(self, theta: Flat) -> Flat:
        delta: Flat = theta - self.layout.gather(self.stage)
        return delta

    def evaluate(self, tokens: Tensor) -> float:
        """One stage alone has no loss: the last that trainers reported."""
        return self.loss

    def forget(self) -> None:
        self.optimizer.state.clear()

    def train(
        self,
        batches: Iterator[Tensor],
        max_steps: int,
        first_step: int,
        may_start: Callable[[float], bool] = lambda seconds: True,
    ) -> LocalResult:
        """Work for others until `max_steps` are done or `may_start` says no. `batches` are the trainers' own."""
        began, before = time.monotonic(), self.loss
        self._first_step, self._steps, self._tokens = first_step, 0, 0
        self.counted = []
        self._seen.clear()
        self._stepped.clear()
        took = 0.0
        self.queue.open()
        try:
            while self._steps < max_steps and may_start(took + self.settle_seconds):
                if jobs := self.queue.take(0.02, self._may_stack):
                    started = time.monotonic()
                    self._do(jobs)
                    seconds = time.monotonic() - started
                    took = 0.5 * took + 0.5 * seconds
                    self.stats.busy_seconds += seconds
                self._maybe_step()
        finally:
            self.queue.close()
        self._settle(self.settle_seconds)
        return LocalResult(self._steps, self._tokens, before, self.loss, time.monotonic() - began)

    # ---- microbatches ---------------------------------------------------------------------------------------

    def _do(self, jobs: Sequence[Job]) -> None:
        """Several are done together, or, if that fails, one after another: so an error is its own job's."""
        try:
            answers = [self._one(jobs[0])] if len(jobs) == 1 else self._stacked(jobs)
        except Exception as error:
            if not isinstance(error, PotluckError):
                self._make_room(jobs[0].kind != "forward")
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:
                for job in jobs:
                    self._do([job])
        else:
            for job, answer in zip(jobs, answers, strict=True):
                job.answer.set_result(answer)

    def _make_room(self, half_done: bool) -> None:
        """Out of memory, most likely: what is remembered is the first to go. If a gradient may have been added in part,
        nobody knows what the open sum holds: it is thrown away."""
        self._kept.clear()
        self._most = 1
        if not half_done:
            return
        with self.queue.changed:
            self.stats.voided += len(self._open.counted)
            self._open = _Sum()
        for p in self._parameters:
            p.grad = None

    def _may_stack(self, taken: Sequence[Job], job: Job) -> bool:
        """Jobs of one shape of which no graph is kept. What they add up to is not more than what a step still lacks."""
        first, most = taken[0], self._most
        if self._dropout or any(self._is_single(one) for one in (first, job)):
            return False
        if (first.kind, first.train) != (job.kind, job.train) or _shape(first) != _shape(job):
            return False
        if any(job.id == other.id for other in taken):
            return False  # asked again: to be counted once
        batch, length, *_ = _shape(first)
        if first.priority == 0:
            most = min(most, (self.step_tokens - self._open.tokens) // (batch * length))
        if self.stage.last:  # logits, as they come, in float32, and their gradient
            most = min(most, STACK_BYTES // (12 * batch * length * self._vocabulary))
        return len(taken) < most

    def _is_single(self, job: Job) -> bool:
        """Whether it is known already, has its graph here, or is odd: that is told to whoever sent it, and no other."""
        if job.x is None or (job.priority == 0 and job.id in self._seen):
            return True
        if job.grad is not None and job.grad.shape[:2] != job.x.shape[:2]:
            return True
        return bool(self._cache_bytes) and job.train if job.kind == "forward" else job.id in self._kept

    def _stacked(self, jobs: Sequence[Job]) -> list[tuple[Tensor | None, float]]:
        """The same as one after another, but for rounding. `jobs`: of one shape, no graph kept."""
        x = torch.cat([job.x for job in jobs if job.x is not None]).to(self.device)
        grad = targets = None
        lengths: Sequence[float | None] = [None] * len(jobs)
        match jobs[0].kind:
            case "forward":
                self.stats.forwards += len(jobs)
                with torch.no_grad(), autocast(self.spec, self.device):
                    return [(y, 0.0) for y in _parts(self._apply(x), len(jobs))]
            case "loss":
                targets = torch.cat([job.targets for job in jobs if job.targets is not None]).to(self.device)
                replies = self._losses_of(jobs, x, targets)
            case "backward":
                grad = torch.cat([job.grad for job in jobs if job.grad is not None]).to(self.device)
                parts = grad.unflatten(0, (len(jobs), -1))  # type: ignore[no-untyped-call]
                lengths = [self._checked_length(part) for part in parts]
                back, _ = self._differentiate(b"", x, grad, None)
                replies = [(part, 0.0) for part in _parts(back, len(jobs))]
        if jobs[0].train:
            self.stats.backwards += len(jobs)
            tokens = x.shape[0] * x.shape[1] // len(jobs)
            inputs, grads, wanted = (_parts(each, len(jobs)) for each in (x, grad, targets))
            for i, (job, reply) in enumerate(zip(jobs, replies, strict=True)):
                self._count(job.id, _Counted(inputs[i], grads[i], wanted[i], tokens, reply, lengths[i]))
        return replies

    def _losses_of(self, jobs: Sequence[Job], x: Tensor, targets: Tensor) -> list[tuple[Tensor | None, float]]:
        train = jobs[0].train
        leaf = self._leaf(x)
        with torch.set_grad_enabled(train), autocast(self.spec, self.device):
            logits = self._apply(leaf).flatten(0, 1).float()
            losses = functional.cross_entropy(logits, targets.flatten(), reduction="none").view(len(jobs), -1).sum(1)
            if train and not torch.isfinite(losses).all():
                raise ProtocolError("the loss is not finite")
            if train:
                losses.sum().backward()  # type: ignore[no-untyped-call]
        self.stats.forwards += len(jobs) * train
        return list(zip(_parts(leaf.grad, len(jobs)), losses.tolist(), strict=True))

    def _one(self, job: Job) -> tuple[Tensor | None, float]:
        match job.kind:
            case "forward":
                assert job.x is not None
                return self._forward(job.id, job.x, job.train), 0.0
            case "loss":
                return self._loss_of(job)
            case "backward":
                return self._backward(job)

    def _forward(self, id_: bytes, x: Tensor, train: bool) -> Tensor:
        self.stats.forwards += 1
        x = x.to(self.device)
        if not train or not self._cache_bytes:
            with torch.no_grad(), autocast(self.spec, self.device), self._dice(id_):
                return self._apply(x)
        self._prune()
        size = self._graph_bytes.get(x.shape)
        saved: dict[int, int] = {}

        def measure(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks: AbstractContextManager[object] = nullcontext()
        if size is None:
            hooks = torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor)
        x = self._leaf(x)
        with hooks, autocast(self.spec, self.device), self._dice(id_):
            y = self._apply(x)
        if size is None:
            weights = {p.untyped_storage().data_ptr() for p in self._parameters}
            held = sum(size for pointer, size in saved.items() if pointer not in weights)
            size = self._graph_bytes[x.shape] = held + x.numel() * x.element_size()
        if size <= self._cache_bytes:
            self._kept[id_] = _Kept(x, y, time.monotonic())
        return y.detach()

    def _backward(self, job: Job) -> tuple[Tensor | None, float]:
        assert job.grad is not None
        if again := self._counted_before(job):
            return again
        kept = self._kept.pop(job.id, None)
        if kept is None and job.x is None:
            raise InputNeeded(f"the input of microbatch {job.id.hex()[:8]} is not here")
        x = kept.x.detach() if kept else job.x.to(self.device)  # type: ignore[union-attr]
        grad = job.grad.to(self.device)
        if grad.shape[:2] != x.shape[:2]:
            raise ProtocolError(f"a gradient of shape {tuple(grad.shape)} for an input of shape {tuple(x.shape)}")
        length = self._checked_length(grad)
        if kept and kept.y is not None:
            self.stats.hits += 1
            kept.y.backward(grad)  # type: ignore[no-untyped-call]
            reply = kept.x.grad, 0.0
        else:
            reply = self._differentiate(job.id, x, grad, None)
        self.stats.backwards += 1
        self._count(job.id, _Counted(x, grad, None, x.shape[0] * x.shape[1], reply, length))
        return reply

    def _loss_of(self, job: Job) -> tuple[Tensor | None, float]:
        """The last stage: forward, loss and, in training, backward at once."""
        assert job.x is not None and job.targets is not None
        x, targets = job.x.to(self.device), job.targets.to(self.device)
        if not job.train:
            with torch.no_grad(), autocast(self.spec, self.device):
                return None, float(self._summed_loss(x, targets))
        if again := self._counted_before(job):
            return again
        self.stats.forwards += 1
        self.stats.backwards += 1
        reply = self._differentiate(job.id, x, None, targets)
        self._count(job.id, _Counted(x, None, targets, targets.numel(), reply))
        return reply

    def _differentiate(
        self, id_: bytes, x: Tensor, grad: Tensor | None, targets: Tensor | None
    ) -> tuple[Tensor | None, float]:
        """Forward and backward: adds to the parameters' `grad`. (gradient of the input, loss)."""
        x = self._leaf(x)
        with autocast(self.spec, self.device), self._dice(id_):
            if targets is not None:
                loss = self._summed_loss(x, targets)
                if not torch.isfinite(loss):
                    raise ProtocolError("the loss is not finite")
                loss.backward()  # type: ignore[no-untyped-call]
                return x.grad, float(loss.detach())
            self.stats.recomputed += 1
            self._apply(x).backward(grad)  # type: ignore[no-untyped-call]
        return x.grad, 0.0

    def _apply(self, x: Tensor) -> Tensor:
        y: Tensor = self.stage(x)
        return y

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self._apply(x).flatten(0, 1).float(), targets.flatten(), reduction="sum")

    def _leaf(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.is_floating_point())

    def _dice(self, id_: bytes) -> AbstractContextManager[object]:
        """Dropout falls for a recomputation as it fell the first time."""
        return _seeded(id_) if self._dropout else nullcontext()

    def _checked_length(self, grad: Tensor) -> float:
        """Per token. Compared with those of microbatches that were confirmed: only who trains through all stages has a
        say in what is usual."""
        length = float(grad.norm()) / math.sqrt(grad.shape[0] * grad.shape[1])
        usual = statistics.median(self._lengths) if len(self._lengths) >= 16 else MAX_LENGTH / GRADIENT_LIMIT
        if not length <= GRADIENT_LIMIT * usual:
            raise ProtocolError(f"a gradient {length / usual:.0f} times as long as usual")
        return length

    # ---- what is remembered of forwards ---------------------------------------------------------------------

    def _prune(self) -> None:
        """The newest stay, as far as there is room for them and one more."""
        now = time.monotonic()
        room = self._cache_bytes - max(self._graph_bytes.values(), default=0)
        for number, (id_, kept) in enumerate(reversed(list(self._kept.items()))):
            room -= self._graph_bytes.get(kept.x.shape, 0)
            if room < 0 or number >= MAX_KEPT or now - kept.at > self._cache_seconds:
                del self._kept[id_]

    def _forget_graphs(self) -> None:
        for kept in self._kept.values():
            kept.y = None

    # ---- counting, exactly once -----------------------------------------------------------------------------

    def _counted_before(self, job: Job) -> tuple[Tensor | None, float] | None:
        """What was answered then, if the trainer asks again. Raises ProtocolError when that is no more."""
        if job.id not in self._seen:
            return None
        for sum_ in (self._open, self._sealed):
            if sum_ and (one := sum_.counted.get(job.id)) and one.reply:
                return one.reply
        raise ProtocolError(f"microbatch {job.id.hex()[:8]} was counted, or thrown away")

    def _count(self, id_: bytes, one: _Counted) -> None:
        with self.queue.changed:
            self._seen.add(id_)
            self._open.counted[id_] = one
            self._open.unconfirmed += 1
            self._open.held_bytes += one.held_bytes

    def _maybe_step(self) -> None:
        if self._sealed is None and self._open.tokens >= self.step_tokens:
            self._seal()
        if self._sealed is not None:
            # The last microbatch of a sum has its way back before it; later gradients gather meanwhile.
            patience = max(self.settle_seconds, CONFIRM_PATIENCE * self._confirm_seconds)
            waited = time.monotonic() - self._sealed.sealed_at
            if self._sealed.confirmed or waited > min(patience, LONGEST_WAIT_SECONDS):
                self._finish(self._sealed)

    def _finish(self, sealed: _Sum) -> None:
        """Throw away what nobody confirmed, and step. What cannot be computed costs this sum, not the peer."""
        try:
            self._void(sealed)
            self._step()
        except (PotluckError, RuntimeError):  # out of memory, or not finite with the parameters of today
            self.stats.voided += len(sealed.counted)
            self._sealed = None
            self._make_room(half_done=False)

    def _seal(self) -> None:
        with self.queue.changed:
            self._sealed, self._open = self._open, _Sum()
        self._sealed.sealed_at = time.monotonic()
        self._sealed.grads = self._swap([None] * len(self._parameters))

    def _swap(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Put these into the parameters' `grad`; what was there."""
        old = [p.grad for p in self._parameters]
        for p, grad in zip(self._parameters, grads, strict=True):
            p.grad = grad
        return old

    def _void(self, sum_: _Sum) -> None:
        """Take out of a sealed sum what was not confirmed."""
        assert sum_.grads is not None
        with self.queue.changed:
            lost = {id_: one for id_, one in sum_.counted.items() if not one.confirmed}
            for id_ in lost:
                del sum_.counted[id_]
            sum_.unconfirmed = sum_.held_bytes = 0
        for id_, one in lost.items():
            assert one.x is not None
            self.stats.voided += 1
            aside = self._swap([None] * len(self._parameters))
            try:
                self._differentiate(id_, one.x, one.grad, one.targets)
            finally:
                gone = self._swap(aside)
            for total, back in zip(sum_.grads, gone, strict=True):
                if total is not None and back is not None:
                    total -= back

    def _step(self) -> None:
        """One step of the inner optimizer. A smaller batch, at a round's end, takes a step as much smaller."""
        sealed, self._sealed = self._sealed, None
        assert sealed is not None and sealed.grads is not None
        tokens = sealed.tokens
        if not tokens:
            return
        if not all(torch.isfinite(g).all() for g in sealed.grads if g is not None):
            raise ProtocolError("gradients are not finite")
        aside = self._swap([None if g is None else g.div_(tokens) for g in sealed.grads])
        rate = learning_rate_at(self.spec, self._first_step + self._steps) * min(1.0, tokens / self.step_tokens)
        take_step(self.optimizer, self._parameters, self.spec.gradient_clip, rate)
        self._swap(aside)
        self._forget_graphs()
        self._steps += 1
        self._tokens += tokens
        self.counted += sealed.counted
        self._stepped.update(sealed.counted)

    def _settle(self, seconds: float) -> None:
        """The round's training ends: steps with all that is confirmed within `seconds`; the rest is thrown away."""
        until = time.monotonic() + seconds
        while self._sealed is not None or self._open.counted:
            if self._sealed is None:
                self._seal()
            assert self._sealed is not None
            with self.queue.changed:
                while not self._sealed.confirmed and (left := until - time.monotonic()) > 0:
                    self.queue.changed.wait(left)
            self._finish(self._sealed)
        for p in self._parameters:
            p.grad = None


def _parts(x: Tensor | None, count: int) -> list[Tensor] | list[None]:
    """Equal parts of a batch."""
    return [None] * count if x is None else list(x.unflatten(0, (count, -1)))  # type: ignore[no-untyped-call]


def _shape(job: Job) -> torch.Size:
    assert job.x is not None
    return job.x.shape


@contextmanager
def _seeded(id_: bytes) -> Iterator[None]:
    """Random numbers that follow from a microbatch's id."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.sha256(id_).digest()[:8], "big") >> 1)
        yield
