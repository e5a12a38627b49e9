"""The broker as a whole: its data directory, its node, its listener and its timers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from semel.broker.cleaner import REST_SECONDS
from semel.broker.config import BrokerConfig
from semel.broker.disk import DiskThread
from semel.broker.lock import DirectoryLock
from semel.broker.node import Node, unusable
from semel.broker.security.settings import Listener
from semel.broker.security.tls import Certificates
from semel.broker.seed import SeedTopic
from semel.broker.server import Server, allow_open_files
from semel.env import Env
from semel.errors import ConfigurationError

__all__ = ["Broker", "serve"]

T = TypeVar("T")
log = logging.getLogger("semel.broker")

IDLE_CHECK_SECONDS = 30.0
EXPIRE_SECONDS = 300.0
"""Kafka's log.retention.check.interval.ms."""
EXIT_NO_MEMORY = 70
"""sysexits.h: EX_SOFTWARE."""


class Broker:
    """An embedded Kafka-compatible broker; `start` and `stop` run in one event loop."""

    def __init__(
        self,
        data: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        config: BrokerConfig | None = None,
        env: Env | None = None,
    ) -> None:
        self._data = Path(data)
        self._host = host
        self._port = port
        self._config = config or BrokerConfig()
        self._env = env or Env()
        self._lock: DirectoryLock | None = None
        self._disk: DiskThread | None = None
        self._node: Node | None = None
        self._server: Server | None = None
        self._timers: list[asyncio.Task[None]] = []
        self._executor: ThreadPoolExecutor | None = None
        self._aside_tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = f"listening on {self.address}" if self._server is not None else "stopped"
        return f"<Broker {self._data} {state}>"

    @property
    def address(self) -> str:
        """`host:port` that clients connect to."""
        return self.addresses[0]

    @property
    def addresses(self) -> list[str]:
        """`host:port` of every listener, in the order of the configuration."""
        listeners = self._listeners()
        ports = [item.port for item in listeners] if self._server is None else self._server.ports
        return [f"{item.host}:{port}" for item, port in zip(listeners, ports, strict=True)]

    def _listeners(self) -> tuple[Listener, ...]:
        return self._config.listeners or (Listener("PLAINTEXT", self._host, self._port, self._config.advertised),)

    async def start(self) -> None:
        """Lock the directory, recover, listen. When it returns, requests are served.

        Raises `ConfigurationError`: directory in use or not writable, address taken.
        """
        assert self._server is None, "the broker runs already"
        loop = asyncio.get_running_loop()
        listeners, tls = self._listeners(), self._config.security.tls
        self._config.security.check(listeners)
        certificates = Certificates(tls) if tls is not None and any(item.tls for item in listeners) else None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="semel-broker-aside")
        self._lock = DirectoryLock(self._data, "broker")
        try:
            self._disk = DiskThread(loop)
            try:
                self._node = node = Node(self._data, self._config, self._env, loop.call_later, self._disk.submit)
            except OSError as problem:
                raise unusable(self._data, problem) from problem
            node.aside = self._aside
            node.open()
            server = Server(
                node,
                node.outbox,
                max_connections=self._config.max_connections,
                max_frame_bytes=self._config.max_frame_bytes,
                idle_seconds=self._config.connection_idle_seconds,
                context=None if certificates is None else certificates.context,
                listen=self._env.listen,
            )
            server.start(listeners)
        except BaseException:
            self._release()
            raise
        self._server = server
        bound = zip(self._listeners(), self.addresses, strict=True)
        node.settings.listens([(item.protocol, address, item.advertised or address) for item, address in bound])
        self._timers = [
            loop.create_task(self._every(self._config.transaction_sweep_seconds, node.sweep)),
            loop.create_task(self._every(IDLE_CHECK_SECONDS, server.close_idle)),
            loop.create_task(self._every(EXPIRE_SECONDS, node.expire)),
            loop.create_task(self._clean(node)),
        ]
        if certificates is not None:
            self._timers.append(loop.create_task(self._every(IDLE_CHECK_SECONDS, certificates.refresh)))
        for listener in listeners:
            if not listener.is_local and not listener.sasl and not self._config.security.authorize:
                log.warning("%s: whoever reaches this port can read and write everything; see docs/broker.md", listener)
        log.info("broker listens on %s, data in %s", self.address, self._data)

    async def stop(self) -> None:
        """Close connections and files. Everything acknowledged is in the files already."""
        tasks = [*self._timers, *self._aside_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._timers = []
        if self._server is not None:
            self._server.close()
            self._server = None
        self._release()

    @property
    def node(self) -> Node:
        """What the listener serves; to be touched in the broker's event loop only."""
        assert self._node is not None, "the broker does not run"
        return self._node

    def _aside(self, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Do what takes milliseconds of arithmetic in a thread; `done` is called in the loop."""
        loop = asyncio.get_running_loop()

        async def run() -> None:
            done(await loop.run_in_executor(self._executor, work))

        task = loop.create_task(run())
        self._aside_tasks.add(task)
        task.add_done_callback(self._aside_tasks.discard)

    def _release(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
        if self._disk is not None:
            self._disk.close()
            self._disk = None
        if self._node is not None:
            self._node.close()
            self._node = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    async def _clean(self, node: Node) -> None:
        """Compact, round by round, with a rest after every slice of work."""
        while True:
            await asyncio.sleep(self._config.cleaner_backoff_seconds)
            try:
                while node.cleaner.work():
                    await asyncio.sleep(REST_SECONDS)
            except MemoryError as error:
                _tell_loop(error)
                raise
            except Exception:
                log.exception("compaction failed; it goes on in %g s", self._config.cleaner_backoff_seconds)
                node.cleaner.stop()

    @staticmethod
    async def _every(seconds: float, action: Callable[[], None]) -> None:
        """Repeat an action; its failure is logged and does not end the repetition."""
        while True:
            await asyncio.sleep(seconds)
            try:
                action()
            except MemoryError as error:
                _tell_loop(error)
                raise
            except Exception:
                log.exception("a periodic task of the broker failed; it runs again in %g s", seconds)


def _tell_loop(error: BaseException) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": "the broker failed", "exception": error})


def _end_without_memory(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End the process when an allocation failed in the midst of a step, as kill -9 would.

    What is in the files and what is in memory may differ then: a batch that is written and not counted, a transaction
    whose change stays pending for ever. Everything acknowledged is in the files, and the next start reads only these.
    """
    if not isinstance(context.get("exception"), MemoryError):
        loop.default_exception_handler(context)
        return
    try:
        log.critical(
            "out of memory: the broker ends, and is whole again when it is started", exc_info=context["exception"]
        )
    finally:
        os._exit(EXIT_NO_MEMORY)


async def serve(
    data: Path,
    listen: str,
    config: BrokerConfig | None = None,
    *,
    seed: Sequence[SeedTopic] = (),
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Run a broker until the task is cancelled. `listen` is `host:port`; `on_ready` gets the address once it serves.

    Topics of `seed` that are not there are created first; those that are stay as they are. The process is the broker's
    own: without memory it ends. Raises `ConfigurationError`.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"--listen {listen!r} is not host:port, for example 127.0.0.1:9092.")
    config = config or BrokerConfig()
    allow_open_files(config.max_connections)
    broker = Broker(data, host, int(port), config=config)
    asyncio.get_running_loop().set_exception_handler(_end_without_memory)
    await broker.start()
    try:
        for topic in seed:
            topic.create(broker.node.topics)
        on_ready(broker.address)
        await asyncio.get_running_loop().create_future()
    finally:
        await broker.stop()
