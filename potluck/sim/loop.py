"""Virtual time: an event loop whose clock jumps to the next timer as soon as nothing is left to do.

Everything runs in one thread. What the program hands to threads (compute, disk) runs at once and its result arrives
when the simulated machine would be done (`Compute`): so the order of all events follows from the program alone.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import Context
from typing import Any, Protocol, TypeVar, cast

from potluck.errors import PotluckError

T = TypeVar("T")

#: Cancelled timers that may lie about before they are swept out.
_MANY = 10_000
#: Turns of the loop at one instant: beyond it tasks wake each other for ever, and time never passes.
_TURNS = 100_000


class Deadlock(PotluckError):
    """The simulation's end cannot come: nothing is scheduled any more, or what is scheduled never lets time pass."""


class VirtualLoop(asyncio.BaseEventLoop):
    """`time()` starts at 0 and passes only when all is idle. Timers of one instant fire as they were made."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._interrupted = False
        self._turns = 0
        #: asyncio's own heap compares handles in Python, and its loop asks the kernel for sockets each time.
        self._timers: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._todo: deque[Any] = cast(Any, self)._ready

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._todo.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer: Any = asyncio.TimerHandle(when, callback, args, self, context)
        timer._scheduled = True  # so that its cancellation is reported
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return cast(asyncio.TimerHandle, timer)

    def shoot_at(self, when: float, shot: Shot) -> None:
        """As `call_at`, for what is never cancelled: a message under way costs no handle."""
        heapq.heappush(self._timers, (when, next(self._numbers), shot))

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Work is done at once, and its result arrives when the machine would be done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:
            future.set_exception(error)
            return future
        if not isinstance(executor, Compute):
            future.set_result(result)
            return future

        def done() -> None:
            if not future.done():
                future.set_result(result)

        machine = executor.machine
        seconds = machine.cost()
        if seconds > 0:
            self.call_later(seconds, machine.when_awake, done)
        else:
            machine.when_awake(done)
        return future

    def _timer_handle_cancelled(self, handle: Any) -> None:
        if not handle._scheduled:
            return  # it has fired
        self._cancelled += 1
        if self._cancelled > _MANY and 2 * self._cancelled > len(self._timers):
            self._timers[:] = [item for item in self._timers if not item[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def interrupt(self) -> None:
        """From a signal handler: KeyboardInterrupt comes between two events, and into none of their tasks."""
        self._interrupted = True

    def _write_to_self(self) -> None:
        """There is no other thread that could wait to be heard."""

    def _run_once(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt
        todo, timers = self._todo, self._timers
        if not todo and not cast(Any, self)._stopping:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
                self._cancelled -= 1
            if not timers:
                raise Deadlock("the simulation stands still: every task waits for something that no timer will bring")
            if timers[0][0] > self._now:
                self._now, self._turns = timers[0][0], 0
        self._turns += 1
        if self._turns > _TURNS:
            self._turns = 0  # those who clean up get their turns, too
            raise Deadlock(f"time does not pass: {_TURNS:,} turns at {self._now!r} s")
        now = self._now
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            if timer._cancelled:
                self._cancelled -= 1
            else:
                timer._scheduled = False
                todo.append(timer)
        for _ in range(len(todo)):
            handle = todo.popleft()
            if not handle._cancelled:
                handle._run()


class Shot:
    """What the loop needs of a handle, for what nobody cancels."""

    __slots__ = ("_scheduled",)
    _cancelled = False

    def cancelled(self) -> bool:
        return False

    def _run(self) -> None:
        """When its time has come."""
        raise NotImplementedError


class Machine(Protocol):
    """What a simulated peer's processor does with work that was handed to a thread."""

    def cost(self) -> float:
        """Virtual seconds that the work just done takes."""
        ...

    def when_awake(self, then: Callable[[], None]) -> None:
        """Call `then`: now, or when the machine is thawed."""
        ...


class Compute(ThreadPoolExecutor):
    """Stands in for a simulated peer's thread; the loop does its work (`VirtualLoop.run_in_executor`)."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(max_workers=1)
        self.machine = machine

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in virtual time. No task outlives it."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main(loop))
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()
