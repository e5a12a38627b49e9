"""A store with a thread of its own, for a loop that must not stand still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

from semel.dualwrite.store import Store

__all__ = ["Rows"]

P = ParamSpec("P")
T = TypeVar("T")


class Rows:
    """`await rows.run(rows.store.claim, slot, owner)`; the executor has one thread."""

    def __init__(self, store: Store, executor: Executor) -> None:
        self.store = store
        self._executor = executor

    def __repr__(self) -> str:
        return f"<Rows of {self.store!r}>"

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One call of the store, in its thread. Who is cancelled does not wait for its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def end(self) -> None:
        """Close the store and end the thread, after the call that it is at."""
        try:
            self._executor.submit(self.store.close)
        except RuntimeError:  # The interpreter ends, and so did the thread.
            self.store.close()
        self._executor.shutdown(wait=False)
