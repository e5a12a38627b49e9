"""The thread in which a process' slots of one database live, and its calls from the threads of sessions."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, wait
from typing import Any, TypeVar

from semel.client.two_phase import TwoPhaseMode
from semel.dualwrite.keeper import Keeper
from semel.dualwrite.limits import CLOSE_SECONDS
from semel.dualwrite.slots import Slot
from semel.dualwrite.writing import Outgoing
from semel.errors import Fatal, Fenced, Retriable, SemelError

__all__ = ["KeeperThread"]

log = logging.getLogger("semel.dualwrite")

T = TypeVar("T")

_LOOK_SECONDS = 1.0
"""Between two looks whether the thread that is to answer lives."""
_FENCED_TRIES = 5
"""How often a claim is repeated because somebody else took the same slot: each time one of the two has got one."""


class KeeperThread:
    """Starts with the first call. `make` makes the keeper inside of the loop, and what closes its connections.

    The end of the program waits a moment until Kafka knows every decision; what it does not know then is recovered by
    the next process. A forked process must not use it.
    """

    def __init__(self, make: Callable[[], tuple[Keeper, Callable[[], Coroutine[Any, Any, None]]]], name: str) -> None:
        self._make = make
        self._name = name
        self._pid = os.getpid()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keeper: Keeper | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: Exception | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<KeeperThread {self._name} {self._keeper!r}>"

    # --- Calls from any thread ---

    def mode(self) -> TwoPhaseMode:
        """What Kafka offers. Raises `Retriable` when it does not answer."""
        return self._call(lambda keeper: keeper.mode())

    def claim(self) -> Slot:
        """A slot of one's own. Raises `Retriable` and `ConfigurationError`."""
        for _ in range(_FENCED_TRIES):
            try:
                return self._call(lambda keeper: keeper.claim())
            except Fenced as error:
                reason = error
        raise Retriable(f"{_FENCED_TRIES} times another process took the same slot: {reason}")

    def write(self, slot: Slot, records: Sequence[Outgoing]) -> str:
        """Write and prepare; what the database is to store. Raises `Retriable`, `Fenced`, `Fatal`."""
        return self._call(lambda keeper: keeper.write(slot, records))

    def decide(self, slot: Slot, *, commit: bool) -> None:
        """The database has decided; Kafka is told in the background."""
        self._tell(lambda keeper: keeper.decide(slot, commit=commit))

    def fenced(self, slot: Slot) -> None:
        """The slot's row is not ours any more."""
        self._tell(lambda keeper: keeper.fenced(slot))

    def unknown(self, slot: Slot) -> None:
        """Nobody knows what the database did: recovery finds out."""
        self._tell(lambda keeper: keeper.unknown(slot))

    def release(self, slot: Slot) -> None:
        """Give a slot back when it has nothing open; in the background."""
        self._tell(lambda keeper: keeper.giving_back(slot))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait until Kafka knows every decision, but not for long, and end the thread."""
        if self._pid != os.getpid():
            return
        with self._starting:
            self._closed = True
            thread, loop, stopping = self._thread, self._loop, self._stopping
        atexit.unregister(self.close)
        if thread is None or loop is None or stopping is None:
            return
        try:
            loop.call_soon_threadsafe(stopping.set)
        except RuntimeError:
            return  # The loop has ended.
        if thread is not threading.current_thread():
            thread.join(seconds + 5)

    def _call(self, call: Callable[[Keeper], Coroutine[Any, Any, T]]) -> T:
        keeper, loop = self._started()
        work = call(keeper)
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:
            work.close()
            raise self._ended() from None
        try:
            while not wait([future], _LOOK_SECONDS).done:
                if self._thread is None or not self._thread.is_alive():
                    raise self._ended()
            return future.result()
        except CancelledError:
            raise self._ended() from None
        except BaseException:
            future.cancel()  # An interrupted caller must not leave a call behind that nobody waits for.
            raise

    def _ended(self) -> Retriable:
        return Retriable(f"the dual write of {self._name} was closed, and nothing was committed.")

    def _tell(self, call: Callable[[Keeper], None]) -> None:
        keeper, loop = self._started(also_closed=True)
        try:
            loop.call_soon_threadsafe(call, keeper)
        except RuntimeError:
            log.debug("the thread of %s has ended; what it left open is recovered", self._name)

    # --- The thread ---

    def _started(self, *, also_closed: bool = False) -> tuple[Keeper, asyncio.AbstractEventLoop]:
        if self._pid != os.getpid():
            raise Fatal(
                f"the dual write of {self._name} was begun in process {self._pid} and is used in process "
                f"{os.getpid()}, a fork of it. Use app.transaction(...) in the process that it was made in."
            )
        with self._starting:
            if self._closed and not also_closed:
                raise Fatal(f"the dual write of {self._name} is closed: the app was closed. Nothing happened.")
            if self._thread is None:
                ready = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(ready,), name=f"semel dual write {self._name}", daemon=True
                )
                self._thread.start()
                ready.wait()
                atexit.register(self.close)
            if self._failure is not None:
                raise self._failure
            assert self._keeper is not None
            assert self._loop is not None
            return self._keeper, self._loop

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._main(ready))
        except Exception as error:
            log.exception("the dual write of %s has ended", self._name)
            self._failure = error if isinstance(error, SemelError) else Fatal(f"{self._name} has ended: {error}")
        finally:
            ready.set()

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._keeper, close = self._make()
        ready.set()
        running = asyncio.create_task(self._keeper.run(), name="recovery")
        try:
            await self._stopping.wait()
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._keeper.close()
            except TimeoutError:
                log.warning("%s: Kafka was not told every decision; the next process does it.", self._name)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await self._keeper.abandon()
            await close()
