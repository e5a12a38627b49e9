"""An asyncio loop with a clock of its own: one thread, no waiting, the same order of everything for the same seed.

It replaces the event loop alone: tasks, futures, locks and time-outs are asyncio's. Who runs is a `Process`, known by
a context variable that everything scheduled inherits: a process that was killed never runs again, whatever it had
scheduled, and one that is paused runs all of it later, as after SIGKILL and SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import warnings
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

from tests.simulation.fibers import Crash, Fiber

__all__ = ["PROCESS", "Crash", "Process", "SimulatedLoop", "Stuck"]


class Stuck(AssertionError):
    """Nothing is left that could ever run: a lost wake-up."""


class Process:
    """Somebody who can be killed and paused: the broker, or one life of a client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.held: list[asyncio.Handle] = []
        self.context: Context = copy_context()
        self.context.run(PROCESS.set, self)

    def __repr__(self) -> str:
        return f"<Process {self.name} {'paused' if self.paused else 'alive' if self.alive else 'dead'}>"


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs what is ready in the order of its scheduling; when nothing is, time jumps to the next timer.

    What happens when between processes is decided by the network's and the disk's latencies, which come from the seed;
    within a process the order is asyncio's.
    """

    def __init__(self, executor_latency: Callable[[], float]) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.readers: dict[int, asyncio.Handle] = {}
        self.writers: dict[int, asyncio.Handle] = {}
        self.on_interest: Callable[[int], None] = lambda _: None
        """Called when somebody begins to wait for a socket."""
        self.connect: Callable[..., Any] | None = None
        self._executor_latency = executor_latency

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        if not ready:
            timers = self._scheduled  # type: ignore[attr-defined]
            while timers and timers[0]._cancelled:
                heapq.heappop(timers)._scheduled = False
            if not timers:
                raise Stuck("nothing can ever run again")
            timer = heapq.heappop(timers)
            timer._scheduled = False
            self.now = max(self.now, timer._when)
            ready.append(timer)
        handle = ready.popleft()
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS)
        if process is not None:
            if not process.alive:
                return
            if process.paused:
                process.held.append(handle)
                return
        self.steps += 1
        handle._run()

    def _process_events(self, event_list: Any) -> None:
        raise NotImplementedError

    def _write_to_self(self) -> None:
        """One thread: nobody has to be woken."""

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task = super().create_task(coro, **options)
        self.tasks.append(task)
        return task

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a process."""
        return self.create_task(work, context=process.context)

    def resume(self, process: Process) -> None:
        """Let a paused process go on with everything that came meanwhile."""
        process.paused = False
        held, process.held = process.held, []
        for handle in held:
            self._ready.append(handle)  # type: ignore[attr-defined]

    # --- Threads and sockets ---

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """The thread's work happens at once in some later moment, and its end is heard of in one after that.

        In a fiber it takes as long as what it waits for.
        """
        future = self.create_future()
        if isinstance(executor, Fiber):
            self.call_later(self._executor_latency(), executor.begin, lambda: func(*args), future)
            return future

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:
                self.call_later(self._executor_latency(), self._settle, future, None, error)
            else:
                self.call_later(self._executor_latency(), self._settle, future, result, None)

        self.call_later(self._executor_latency(), work)
        return future

    @staticmethod
    def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        self.readers[fd] = asyncio.Handle(callback, args, self, None)
        self.on_interest(fd)

    def remove_reader(self, fd: Any) -> bool:
        return self.readers.pop(fd, None) is not None

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        self.writers[fd] = asyncio.Handle(callback, args, self, None)
        self.on_interest(fd)

    def remove_writer(self, fd: Any) -> bool:
        return self.writers.pop(fd, None) is not None

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        assert self.connect is not None
        return await self.connect(protocol_factory, host, port)

    def abandon(self) -> None:
        """Forget every task that has not ended, without a word about it; the simulation is over."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # Some were never begun.
            for task in self.tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with contextlib.suppress(BaseException):  # Nobody is left to see how it ends.
                        task.get_coro().close()  # type: ignore[union-attr]
                elif not task.cancelled():
                    task.exception()
            self.tasks.clear()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()
