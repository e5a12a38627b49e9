"""One HTTP instance's way to the log: it appends requests and waits for their replies.

It holds no authority. What it knows of a request is whether the append was acknowledged, and the reply, if one came in
time; `Gateway.submit` says exactly that. Everything else can be thrown away at any moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Protocol

from semel.env import Env
from semel.errors import Fatal, OutcomeUnknown, SemelError
from semel.failpoints import failpoint
from semel.ingress.requests import LookUp, Reply, Request, read_reply, write
from semel.processing.topics import DataError
from semel.types import Record
from semel.wire.partitioner import murmur2

__all__ = ["Compose", "Gateway", "Link", "NotTaken", "Route"]

log = logging.getLogger("semel.ingress")

REOPEN_SECONDS = (0.1, 5.0)
"""First and longest pause before the log is tried again."""
PROBE_SECONDS = 1.0
REPEAT_SECONDS = 10.0
"""How often it is told that the log is still away."""


class Route(Protocol):
    """What a link found when it was opened."""

    @property
    def partitions(self) -> int:
        """Of the requests topic."""

    @property
    def reply_partition(self) -> int:
        """Of the responses topic, whose end was reached."""


class Link(Protocol):
    """The log as the gateway uses it. Errors say what happened: see `semel.errors`."""

    async def open(self, instance: bytes) -> Route:
        """Make and check the topics, and read to the end of the reply partition. May be called again after `close`."""

    async def append(self, partition: int, key: bytes, value: bytes) -> None:
        """Append to the requests topic. Raises `OutcomeUnknown`, or another `SemelError` when nothing was appended."""

    async def replies(self) -> Sequence[Record]:
        """The next records of the reply partition; may return none after a while."""

    async def probe(self) -> None:
        """Raise when the log cannot be reached now."""

    async def close(self) -> None:
        """Give everything back; pending appends end."""


class NotTaken(SemelError):
    """The request is not in the log, for certain."""


Compose = Callable[[bytes, int, int], Request | LookUp]
"""Makes the record for this instance id, number and reply partition."""


class Gateway:
    """Appends requests and hands replies to whoever waits for them.

    Between `start` and `close` a task reads replies, and opens the log again whenever reading from it failed.
    """

    def __init__(self, link: Link, env: Env) -> None:
        self.instance = env.new_id().bytes
        """16 bytes that name this instance in its requests and replies; new in every process."""
        self.fatal: SemelError | None = None
        """Why this can never work as it is set up; `failed` is set with it."""
        self.failed = asyncio.Event()
        self.trouble: str = "starting"
        """Why requests are not taken, for /readyz and answers; empty when they are."""
        self._link = link
        self._env = env
        self._route: Route | None = None
        self._waiting: dict[int, asyncio.Future[Reply | None]] = {}
        self._numbers = count(1)
        self._task: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._append_failed = False
        self._told_at: float | None = None
        """When it was last told that the log is away; None while it is there."""

    def __repr__(self) -> str:
        return f"<Gateway {self.instance.hex()[:8]} [{self.trouble or 'ready'}, {len(self._waiting)} waiting]>"

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self._route is not None and not self._is_draining

    @property
    def is_started(self) -> bool:
        return self._task is not None

    @property
    def in_flight(self) -> int:
        """Requests that wait for their append or their reply."""
        return len(self._waiting)

    # --- Life ---

    def start(self) -> None:
        """Begin to open the log, in the background. Nothing happens the second time."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="semel-ingress-replies")

    async def wait_open(self, seconds: float) -> bool:
        """Wait until the first attempt succeeded or can never succeed; False when the time was over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._opened.wait()
        return self._opened.is_set()

    async def close(self, drain_seconds: float) -> None:
        """Take no more requests, wait for the replies that are due, and let go of the log."""
        self._is_draining = True
        self.trouble = "shutting down"
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await self._idle.wait()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for future in self._waiting.values():
            _settle(future, None)

    async def check(self) -> str:
        """Why this instance should get no requests now; empty when it should. Asks the log when in doubt."""
        if self.trouble or not self._append_failed:
            return self.trouble
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._link.probe()
        except (SemelError, TimeoutError) as error:
            return f"the log cannot be reached: {error or 'no answer in time'}"
        self._append_failed = False
        return ""

    async def _run(self) -> None:
        pause, longest = REOPEN_SECONDS
        while True:
            try:
                self._route = await self._link.open(self.instance)
                self._opened.set()
                if not self._is_draining:
                    self.trouble = ""
                self._found()
                pause = REOPEN_SECONDS[0]
                while True:
                    records = await self._link.replies()
                    if records:
                        failpoint("ingress.replies_read")
                        self._deliver(records)
            except Fatal as error:
                if self._route is None:
                    self._give_up(error)
                    return
                self._lost(error)
            except Exception as error:
                self._lost(error)
            finally:
                self._route = None
                await self._link.close()
            await asyncio.sleep(pause * (0.8 + 0.4 * self._env.rng.random()))
            pause = min(pause * 2, longest)

    def _give_up(self, error: SemelError) -> None:
        self.fatal = error
        self.trouble = str(error)
        self._opened.set()
        self.failed.set()

    def _lost(self, error: Exception) -> None:
        if not self._is_draining:
            self.trouble = f"the log cannot be reached: {error}"
        now = self._env.monotonic()
        if self._told_at is None or now - self._told_at >= REPEAT_SECONDS:
            self._told_at = now
            unexpected = None if isinstance(error, SemelError | OSError) else error
            log.warning("requests are not taken until the log is back: %s", error, exc_info=unexpected)

    def _found(self) -> None:
        if self._told_at is not None:
            log.info("the log is back: requests are taken again")
        self._told_at = None

    # --- Requests and replies ---

    async def submit(self, scope: bytes, compose: Compose, wait_seconds: float) -> Reply | None:
        """Append one request and wait for its reply; None when it is in the log and the wait is over.

        Raises `NotTaken` when it is not in the log, and `OutcomeUnknown` when nobody can say and no reply came.
        """
        route = self._route
        if route is None or self._is_draining:
            raise NotTaken(self.trouble)
        failpoint("ingress.admitted")
        number = next(self._numbers)
        value = write(compose(self.instance, number, route.reply_partition))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply | None] = loop.create_future()
        self._waiting[number] = future
        self._idle.clear()
        timer = loop.call_later(wait_seconds, _settle, future, None)
        try:
            unknown = await self._append((murmur2(scope) & 0x7FFFFFFF) % route.partitions, scope, value)
            reply = await future
            failpoint("ingress.after_reply")
            if reply is None and unknown is not None:
                raise unknown
            return reply
        finally:
            timer.cancel()
            del self._waiting[number]
            if not self._waiting:
                self._idle.set()

    async def _append(self, partition: int, scope: bytes, value: bytes) -> OutcomeUnknown | None:
        """Append; None when it was acknowledged, an error when nobody can say. Raises `NotTaken`."""
        failpoint("ingress.before_append")
        try:
            await self._link.append(partition, scope, value)
        except OutcomeUnknown as error:
            self._append_failed = True
            return error
        except SemelError as error:
            self._append_failed = True
            raise NotTaken(str(error)) from error
        self._append_failed = False
        failpoint("ingress.after_append")
        return None

    def _deliver(self, records: Sequence[Record]) -> None:
        instance, waiting = self.instance, self._waiting
        for record in records:
            if record.key != instance or record.value is None:
                continue
            try:
                reply = read_reply(record.value)
            except DataError as error:
                log.error("a reply at %s-%d@%d: %s", record.topic, record.partition, record.offset, error)
                continue
            future = waiting.get(reply.number)
            if future is not None:
                _settle(future, reply)


def _settle(future: asyncio.Future[Reply | None], reply: Reply | None) -> None:
    if not future.done():
        future.set_result(reply)
