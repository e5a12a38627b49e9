"""A bounded pool: things that are made when they are needed, lent to one borrower at a time, first come, first served.

Threads and coroutines stand in one queue, so neither can starve the other. What is pooled may be broken when it comes
back: that is for its borrower to find out, because only the next statement can tell.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from typing import Generic, TypeVar

from semel.errors import ConfigurationError, Retriable

__all__ = ["Pool"]

T = TypeVar("T")


class Pool(Generic[T]):
    """At most `size` of what `make` makes; a borrower waits `wait_seconds` for one. `what` names it in errors."""

    def __init__(self, make: Callable[[], T], *, size: int, wait_seconds: float, what: str) -> None:
        self._make = make
        self.size = size
        self.wait_seconds = wait_seconds
        self._what = what
        self._lock = threading.Lock()
        self._idle: list[T] = []
        self._lent = 0
        self._waiting: deque[Future[T]] = deque()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Pool {self._what}: {self._lent} of {self.size} lent, {len(self._waiting)} waiting>"

    def borrow(self) -> T:
        """One of them; give it back with `give_back`. Raises `Retriable` when none came free in time."""
        future = self._ask()
        try:
            return future.result(self.wait_seconds)
        except NotInTime:
            self._give_up(future)
            raise self._too_busy() from None
        except BaseException:
            self._give_up(future)
            raise

    async def borrow_async(self) -> T:
        """The same for a coroutine: the event loop turns meanwhile."""
        future = self._ask()
        if future.done():
            return future.result()
        try:
            async with asyncio.timeout(self.wait_seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            self._give_up(future)
            raise self._too_busy() from None
        except BaseException:
            self._give_up(future)
            raise

    def give_back(self, item: T) -> None:
        """The next one who waits gets it."""
        with self._lock:
            while self._waiting:
                future = self._waiting.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_result(item)
                    return
            self._lent -= 1
            self._idle.append(item)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> list[T]:
        """Lend nothing more, and take those back that are idle: they are the caller's now, to close."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            return idle

    def _ask(self) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ConfigurationError(f"{self._what} are closed: the app was closed. Nothing happened.")
            if self._idle:
                future.set_result(self._idle.pop())  # The one that was used last: its server has it in its caches.
                self._lent += 1
            elif self._lent < self.size:
                future.set_result(self._make())
                self._lent += 1
            else:
                self._waiting.append(future)
        return future

    def _give_up(self, future: Future[T]) -> None:
        """Stop waiting; what arrived at the last moment goes to the next one."""
        if not future.cancel():
            self.give_back(future.result())
            return
        with self._lock:
            if future in self._waiting:
                self._waiting.remove(future)

    def _too_busy(self) -> Retriable:
        return Retriable(
            f"none of the {self.size} {self._what} came free within {self.wait_seconds:g} s, and nothing happened. "
            "Are transactions held open for long, or opened inside one another? Otherwise raise the pool's size."
        )
