"""A worker process: several engines in one event loop, with the heartbeat beside them.

SIGTERM and SIGINT drain. The first engine that fails ends all: the supervisor starts the process again, and a
successor goes on from what is committed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping
from typing import Protocol

from semel.errors import ConfigurationError, Fenced
from semel.processing.heartbeat import Heartbeat
from semel.processing.memory import prepare_memory

__all__ = ["Runnable", "Worker"]

log = logging.getLogger("semel.worker")

FAILED_DRAIN_SECONDS = 5.0
"""How long the other engines may take to finish when one failed."""


class Runnable(Protocol):
    """What a worker runs: an `Engine`, or a sink's."""

    async def run(self) -> None:
        """Work until drained. Raises `Fenced` when another owner took over, `Fatal` when a person must look."""

    async def drain(self) -> None:
        """Ask `run` to finish what is in hand and return; returns at once."""


class Worker:
    """Runs engines by name until a signal or `drain`."""

    def __init__(
        self, runnables: Mapping[str, Runnable], *, drain_seconds: float = 25.0, heartbeat: Heartbeat | None = None
    ) -> None:
        self._runnables = dict(runnables)
        self._drain_seconds = drain_seconds
        self._heartbeat = heartbeat or Heartbeat.from_environment()
        self._draining = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Worker {', '.join(self._runnables)}>"

    def drain(self) -> None:
        """Finish what is in hand and stop."""
        self._draining.set()

    async def run(self, *, handle_signals: bool = True) -> None:
        """Run until drained. Raises what the first failing engine raised: `Fenced` and configuration errors first."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT) if handle_signals else ()
        for number in numbers:
            loop.add_signal_handler(number, self.drain)
        prepare_memory()
        self._heartbeat.start()
        tasks = {asyncio.create_task(runnable.run(), name=name): runnable for name, runnable in self._runnables.items()}
        drained = asyncio.create_task(self._draining.wait(), name="drain")
        try:
            await asyncio.wait({drained, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            await self._stop(tasks, self._drain_seconds if self._draining.is_set() else FAILED_DRAIN_SECONDS)
        finally:
            drained.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(drained, *tasks, return_exceptions=True)
            await self._heartbeat.stop()
            for number in numbers:
                loop.remove_signal_handler(number)
        self._raise_first(list(tasks))

    async def _stop(self, tasks: Mapping[asyncio.Task[None], Runnable], seconds: float) -> None:
        running = [task for task in tasks if not task.done()]
        for task in running:
            await tasks[task].drain()
        if running:
            _, late = await asyncio.wait(running, timeout=seconds)
            for task in late:
                log.warning("%s did not drain within %.0f s: its unit of work is dropped", task.get_name(), seconds)

    def _raise_first(self, tasks: list[asyncio.Task[None]]) -> None:
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
        for error in errors:
            # These say what to do; of anything else one wants to see where it came from.
            known = isinstance(error, Fenced | ConfigurationError)
            log.error("a component ended: %s", error, exc_info=None if known else error)
        for kind in (Fenced, ConfigurationError, BaseException):
            for error in errors:
                if isinstance(error, kind):
                    raise error
        if not self._draining.is_set():
            names = ", ".join(task.get_name() for task in tasks if not task.cancelled())
            log.error("ended without being asked to: %s", names)
