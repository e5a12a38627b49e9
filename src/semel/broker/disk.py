"""The disk's thread: what may take long runs there, and its end is told in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["DiskThread"]


class DiskThread:
    """One thread, first come, first served; it starts with its first work."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="semel-disk")

    def submit(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Run `work` in the thread, then `done` in the loop."""
        self._loop.run_in_executor(self._thread, work).add_done_callback(lambda _: done())

    def close(self) -> None:
        """Wait for the end of all work. The loop must still be open."""
        self._thread.shutdown()
