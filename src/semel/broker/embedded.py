"""A broker in a thread of its own, for programs and tests that do not run an event loop."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from semel.broker.broker import Broker
from semel.broker.config import BrokerConfig
from semel.env import Env

__all__ = ["EmbeddedBroker"]


class EmbeddedBroker:
    """A broker with blocking `start` and `stop`; a context manager too. It serves sync and async code alike."""

    def __init__(
        self,
        data: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        config: BrokerConfig | None = None,
        env: Env | None = None,
    ) -> None:
        self._broker = Broker(data, host, port, config=config, env=env)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._started: Future[None] = Future()

    def __repr__(self) -> str:
        return f"<EmbeddedBroker {self._broker!r}>"

    @property
    def address(self) -> str:
        """`host:port`, as in bootstrap.servers."""
        return self._broker.address

    def start(self) -> Self:
        """Start and wait until it serves. Raises `ConfigurationError` as `Broker.start` does."""
        assert self._thread is None, "the broker runs already"
        self._started = Future()
        self._thread = threading.Thread(target=self._run, name="semel-broker", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise
        return self

    def stop(self) -> None:
        """Stop and wait for the end; a second call does nothing."""
        if self._thread is None:
            return
        assert self._loop is not None
        assert self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            await self._broker.start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        await self._stopping.wait()
        await self._broker.stop()
