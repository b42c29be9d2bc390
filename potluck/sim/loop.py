"""Virtual time: an event loop whose clock jumps to the next timer as soon as nothing is left to do.

Everything runs in one thread. What the program hands to threads (compute, disk) runs at once and its result arrives
when the simulated machine would be done (`Compute`): so the order of all events follows from the program alone.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from potluck.errors import PotluckError

T = TypeVar("T")


class Deadlock(PotluckError):
    """Nothing is scheduled any more, and the simulation's end has not come: something waits without a deadline."""


class _Clock(selectors.SelectSelector):
    """Instead of waiting for sockets, time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("the simulation stands still: every task waits for something that no timer will bring")
        # Timers that lie within the clock's resolution fire together; a hair more keeps the loop from spinning.
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and passes only when all is idle."""

    def __init__(self) -> None:
        self._virtual = _Clock()
        super().__init__(self._virtual)
        self.set_default_executor(Compute(self))
        self.events = 0

    def time(self) -> float:
        return self._virtual.now

    def _write_to_self(self) -> None:
        """There is no other thread that could wait to be heard."""

    def _run_once(self) -> None:
        self.events += 1
        super()._run_once()  # type: ignore[misc]


class Machine(Protocol):
    """What a simulated peer's processor does with work that was handed to a thread."""

    def cost(self) -> float:
        """Virtual seconds that the work just done takes."""
        ...

    def when_awake(self, then: Callable[[], None]) -> None:
        """Call `then`: now, or when the machine is thawed."""
        ...


class Compute(ThreadPoolExecutor):
    """Stands in for a thread pool: work is done at once, and its result comes when the machine would be done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, machine: Machine | None = None) -> None:
        super().__init__(max_workers=1)
        self._loop, self._machine = loop, machine

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            future.set_exception(error)
            return future
        machine = self._machine
        if machine is None:
            future.set_result(result)
            return future

        def done() -> None:
            machine.when_awake(lambda: future.set_result(result))

        seconds = machine.cost()
        if seconds > 0:
            self._loop.call_later(seconds, done)
        else:
            done()
        return future

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
