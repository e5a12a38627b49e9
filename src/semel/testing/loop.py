"""An event loop whose clock does not wait: when nothing can run any more, it is the time of the next timer.

Only waiting for nothing is skipped. While a thread works, or while a handler waits for a connection that is not ours,
the clock goes as clocks do. Connections to the broker of a test are pairs of local sockets: what one end has written,
the other end can read, so nobody waits for the network and two runs are the same.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

__all__ = ["Door", "InlineExecutor", "Stuck", "VirtualLoop"]

HOST, PORT = "127.0.0.1", 1
"""What the broker of a test is called; nobody listens there."""


class Stuck(RuntimeError):
    """Nothing is left that could ever run, and somebody waits."""


class InlineExecutor(Executor):
    """Work for it is done in the loop's own thread, in the loop's order."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """There is no thread to end."""


class _Wire(socket.socket):
    """One end of a connection to the broker. The loop knows its descriptor as one of ours until it is closed."""

    ours: set[int]

    def setsockopt(self, *args: Any) -> None:
        """TCP's options mean nothing here."""

    def getsockname(self) -> Any:
        return HOST, PORT

    def close(self) -> None:
        self.ours.discard(self.fileno())
        super().close()


class Door:
    """In the place of a listening socket (`Env.listen`)."""

    def __init__(self, ours: set[int]) -> None:
        self._ours = ours
        self._waiting: deque[_Wire] = deque()
        self._bell, self._button = _pair(ours)

    def fileno(self) -> int:
        return self._bell.fileno()

    def getsockname(self) -> tuple[str, int]:
        return HOST, PORT

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """The next connection. Raises `BlockingIOError` when there is none."""
        if not self._waiting:
            raise BlockingIOError
        self._bell.recv(1)
        return self._waiting.popleft(), (HOST, 0)

    def connect(self) -> socket.socket:
        """Our end of a new connection."""
        mine, theirs = _pair(self._ours)
        self._waiting.append(theirs)
        self._button.send(b"!")
        return mine

    def close(self) -> None:
        for wire in (self._bell, self._button, *self._waiting):
            wire.close()


def _pair(ours: set[int]) -> tuple[_Wire, _Wire]:
    ends = []
    for end in socket.socketpair():
        wire = _Wire(fileno=end.detach())
        wire.setblocking(False)
        wire.ours = ours
        ours.add(wire.fileno())
        ends.append(wire)
    return ends[0], ends[1]


class _Selector(selectors.BaseSelector):
    """Looks at the real descriptors, and lets the time pass that would be waited."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now = 0.0
        self.ours: set[int] = set()
        self.threads = 0
        """Calls that run in threads."""
        self.is_quiet: Callable[[], bool] = lambda: False
        """Asked when nothing can run now; true when it has made something that can."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        found: Mapping[Any, selectors.SelectorKey] | None = self._real.get_map()
        assert found is not None
        return found

    def close(self) -> None:
        self._real.close()

    @property
    def _waits_for_others(self) -> bool:
        # A set, because a descriptor of ours that nobody listens to now is not in the map.
        return self.threads > 0 or any(fd not in self.ours for fd in self.get_map())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = self._real.select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if self._waits_for_others:
            before = time.monotonic()
            found = self._real.select(timeout)
            self.now += time.monotonic() - before
            return found
        if self.is_quiet():
            return []
        if timeout is None:
            raise Stuck("nothing can ever run again, and somebody waits")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`door` takes the connections to `HOST:PORT`; all other ones are real."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        self.door: Door | None = None
        super().__init__(self._virtual)
        self._virtual.ours.add(self._ssock.fileno())  # type: ignore[attr-defined]  # the loop's own wake-up

    def time(self) -> float:
        """Seconds since the loop was made, as its timers see them."""
        return self._virtual.now

    def leap(self, seconds: float) -> None:
        """Put the clock forward; timers that are due by then go off in the order of their times."""
        self._virtual.now += seconds

    def when_quiet(self, ask: Callable[[], bool]) -> None:
        """Have `ask` called whenever nothing can run before time passes; true: it has made something that can."""
        self._virtual.is_quiet = ask

    def listen(self, _host: str, _port: int) -> Any:
        """For `Env.listen`: the broker's listening socket."""
        self.door = Door(self._virtual.ours)
        return self.door

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if (host, port) != (HOST, PORT):
            return await super().create_connection(protocol_factory, host, port, **options)
        if self.door is None:
            raise ConnectionRefusedError("the broker does not run")
        return await super().create_connection(protocol_factory, sock=self.door.connect())

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        if not isinstance(executor, InlineExecutor):
            working: asyncio.Future[Any] = super().run_in_executor(executor, func, *args)
            self._virtual.threads += 1
            working.add_done_callback(self._thread_done)
            return working
        future = self.create_future()
        self.call_soon(_run, future, func, args)
        return future

    def _thread_done(self, _: object) -> None:
        self._virtual.threads -= 1


def _run(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return
    try:
        result = func(*args)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
