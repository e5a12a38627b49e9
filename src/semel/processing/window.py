"""Several calls at once whose results come in the order of their items, one call at a time in each lane."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

__all__ = ["WAITING_PER_CALL", "Window"]

WAITING_PER_CALL = 4
"""Items a window holds for each call that may run: they wait for their lane or for an earlier, slower item."""

T = TypeVar("T")
R = TypeVar("R")


class _Call(Generic[T, R]):
    __slots__ = ("item", "lane", "task")

    def __init__(self, item: T, lane: Hashable) -> None:
        self.item = item
        self.lane = lane
        self.task: asyncio.Task[R] | None = None


class Window(Generic[T, R]):
    """Runs `run(item)` for at most `limit` items at once, and gives the results in the order of the items.

    Items of one `lane` run one after the other: the next begins when the result of the one before was taken. A lane
    of None is no lane. `close` must be called; it cancels what still runs.
    """

    def __init__(self, limit: int, run: Callable[[T], Coroutine[Any, Any, R]], lane: Callable[[T], Hashable]) -> None:
        self._limit = limit
        self._run = run
        self._lane = lane
        self._calls: deque[_Call[T, R]] = deque()
        self._lanes: dict[Hashable, deque[_Call[T, R]]] = {}
        self._ready: deque[_Call[T, R]] = deque()
        self._running: set[asyncio.Task[R]] = set()

    def __repr__(self) -> str:
        return f"<Window {len(self._running)} of {self._limit} run, {len(self._calls)} items>"

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def has_room(self) -> bool:
        """Whether it takes another item."""
        return len(self._calls) < self._limit * (1 + WAITING_PER_CALL)

    def admit(self, item: T) -> None:
        """Run this item when its lane is free and a call may begin."""
        call = _Call[T, R](item, self._lane(item))
        self._calls.append(call)
        if call.lane is not None:
            queue = self._lanes.setdefault(call.lane, deque())
            queue.append(call)
            if len(queue) > 1:
                return
        self._ready.append(call)
        self._start()

    async def take(self) -> tuple[T, R]:
        """The first item and its result, when it is there. Raises what its call raised."""
        call = self._calls[0]
        while call.task is None:  # Its lane was freed a moment ago, and as many others run as may.
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        return call.item, await call.task

    def taken(self) -> None:
        """The first item is dealt with: the next one of its lane may begin."""
        call = self._calls.popleft()
        if call.lane is not None:
            queue = self._lanes[call.lane]
            queue.popleft()
            if queue:
                self._ready.append(queue[0])
            else:
                del self._lanes[call.lane]
        self._start()

    async def close(self) -> None:
        """Cancel every call that still runs, and wait until they have ended."""
        self._ready.clear()
        self._calls.clear()
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self) -> None:
        while self._ready and len(self._running) < self._limit:
            call = self._ready.popleft()
            call.task = asyncio.create_task(self._run(call.item))
            self._running.add(call.task)
            call.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[R]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # Whoever takes it sees it; of one that nobody takes nobody wants to hear.
        self._start()
