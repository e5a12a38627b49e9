"""Threads of the simulated world: ordinary blocking code that runs in the loop, in pieces, in an order that is given.

A fiber is an executor with a thread of its own, but either the loop runs or that thread, never both: where the thread
would block it hands the turn back, and what wakes it is an event of the loop. So its process can be killed or paused
wherever it waits, and the same seed is the same run.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any

__all__ = ["FIBER", "Crash", "Fiber", "sleep"]

Resume = Callable[[Any, BaseException | None], None]


class Crash(BaseException):
    """Ends what a killed process was doing. No `except Exception` may take it for an error that passes."""


class Fiber(Executor):
    """Runs one call after the other. To be used with `SimulatedLoop.run_in_executor`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._work: tuple[Callable[[], Any], asyncio.Future[Any], Context] | None = None
        self._queue: deque[tuple[Callable[[], Any], asyncio.Future[Any], Context]] = deque()
        self._start: Callable[[Resume], None] | None = None
        self._answer: tuple[Any, BaseException | None] = (None, None)
        self._result: tuple[Any, BaseException | None] = (None, None)
        self._context = copy_context()
        self.is_over = False

    # --- In the loop ---

    def begin(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        """Run this until it is done or waits; after those that came before it."""
        if self._work is not None:
            self._queue.append((work, future, copy_context()))
            return
        context = copy_context()
        context.run(FIBER.set, self)
        self._work, self._context = (work, future, context), copy_context()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fiber", daemon=True)
            self._thread.start()
        self._switch()

    def _switch(self) -> None:
        """Let the thread run until it waits or is done."""
        self._go.release()
        self._back.acquire()
        start, self._start = self._start, None
        if start is not None:
            start(self._wake)
        elif self._work is not None:
            (_, future, _), self._work = self._work, None
            if self._queue:
                following, due, context = self._queue.popleft()
                self._loop.call_soon(self.begin, following, due, context=context)
            result, error = self._result
            if future.cancelled() or isinstance(error, Crash):
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _wake(self, value: Any, error: BaseException | None) -> None:
        """What the thread waits for is there."""
        self._loop.call_soon(self._continue, value, error)

    def _continue(self, value: Any, error: BaseException | None) -> None:
        self._answer = (value, error)
        self._switch()

    def end(self) -> None:
        """Unwind what is still waiting: the simulation is over."""
        self.is_over = True
        thread = self._thread
        while thread is not None and thread.is_alive():
            self._go.release()
            thread.join(0.01)

    # --- In the thread ---

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self.is_over or self._work is None:
                return
            work, _, context = self._work
            try:
                self._result = (context.run(work), None)
            except BaseException as error:
                self._result = (None, error)
            self._back.release()

    def wait(self, start: Callable[[Resume], None]) -> Any:
        """Hand the turn back; `start` is called in the loop with the function that wakes us."""
        if self.is_over:
            raise Crash("the simulation is over")
        self._start = start
        self._back.release()
        self._go.acquire()
        if self.is_over:
            raise Crash("the simulation is over")
        value, error = self._answer
        if error is not None:
            raise error
        return value

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The thread goes with the simulation."""

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """An event of this fiber's process."""
        self._loop.call_later(seconds, call, context=self._context)


FIBER: ContextVar[Fiber | None] = ContextVar("FIBER", default=None)


def sleep(seconds: float) -> None:
    """In the place of `time.sleep`."""
    fiber = FIBER.get()
    assert fiber is not None, "only a fiber may block"
    with suppress(TimeoutError):
        fiber.wait(lambda resume: fiber.later(seconds, lambda: resume(None, None)))
