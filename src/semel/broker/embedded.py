"""A broker in a thread of its own, for programs and tests that do not run an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from semel.broker.broker import Broker
from semel.broker.config import BrokerConfig
from semel.broker.control import Action, Rule, rule_for
from semel.broker.node import Node
from semel.env import Env
from semel.errors import ConfigurationError

__all__ = ["EmbeddedBroker", "InstalledRule"]

T = TypeVar("T")


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
        self._allows_faults = config is not None and config.allow_faults
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

    @property
    def addresses(self) -> list[str]:
        """`host:port` of every listener, in the order of the configuration."""
        return self._broker.addresses

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

    def call(self, action: Callable[[Node], T]) -> T:
        """Do something with the node in the broker's thread, between two requests, and return what it gives."""
        assert self._loop is not None, "the broker does not run"
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(action(self._broker.node))
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result()

    def control(
        self,
        api: str | int,
        action: Action,
        *,
        on: int = 1,
        times: int = 1,
        when: Callable[[Any], bool] | None = None,
    ) -> InstalledRule:
        """Let something happen to the `on`-th request of an API and to `times` - 1 more (`semel.broker.control`).

        `when` narrows it to requests for which it is true; it gets the decoded request, whose attributes are the
        fields of Kafka's schema in snake_case. Rules end with the broker.

        Raises `ConfigurationError`: not allowed by `BrokerConfig.allow_faults`, or no such API.
        """
        if not self._allows_faults:
            raise ConfigurationError(
                "This broker lets nobody drop or falsify its answers. In a test, start it with "
                "BrokerConfig(allow_faults=True), or use the pytest fixture semel_broker."
            )
        rule = rule_for(api, action, on, times, when)
        installed = InstalledRule(self, rule)
        self.call(lambda node: node.control.add(rule))
        return installed

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


class InstalledRule:
    """A rule of `EmbeddedBroker.control` at work; a context manager that removes it."""

    def __init__(self, broker: EmbeddedBroker, rule: Rule) -> None:
        self._broker = broker
        self._rule = rule
        self._changed = threading.Condition()
        rule.on_hit = self._on_hit

    def __repr__(self) -> str:
        return f"<InstalledRule {self._rule.action!r}, {self.hits} hits>"

    @property
    def hits(self) -> int:
        """How often it acted."""
        return self._rule.hits

    def wait(self, hits: int = 1, timeout: float = 10.0) -> None:
        """Wait until it acted so often. Raises `TimeoutError` after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.hits >= hits, timeout):
                raise TimeoutError(f"{self!r}: {hits} were waited for, {timeout:g} s long")

    def remove(self) -> None:
        """Take it out; what it holds is let go. A second call does nothing."""
        self._broker.call(lambda node: node.control.remove(self._rule))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _on_hit(self) -> None:
        with self._changed:
            self._changed.notify_all()
