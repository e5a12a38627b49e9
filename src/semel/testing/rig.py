"""The parts of an app under test, put together: broker, topics, engines, sinks, ingress, in one loop.

It is what `semel run` starts as processes, with four things exchanged: the clock, the sockets, how engines read
(`semel.testing.kafka`), and the app's databases, which become SQLite files of the test.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from semel.app import App
from semel.broker.broker import Broker
from semel.broker.config import BrokerConfig
from semel.broker.node import Node
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.producer import Producer
from semel.databases.sqlite import SqliteDatabase
from semel.env import Env
from semel.errors import ConfigurationError, SemelError
from semel.processing.component import Component
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.topology import prepare_topics
from semel.processing.worker import Runnable
from semel.settings import Settings
from semel.sinks.engine import SinkEngine
from semel.sinks.spec import SinkSpec
from semel.sinks.sql.sink import SqlSink
from semel.testing.handlers import Report, watch
from semel.testing.kafka import Committed, LocalConsumer, LocalKafka, LocalSource
from semel.testing.local_outbox import LocalOutbox
from semel.testing.loop import HOST, PORT, InlineExecutor, VirtualLoop
from semel.testing.values import Answer
from semel.types import Header, TopicPartition
from semel.wire.partitioner import partition_for

if TYPE_CHECKING:
    from semel.ingress.asgi import Ingress

__all__ = ["NotSettled", "Rig", "prepared"]

log = logging.getLogger("semel.testing")

PARTITIONS = 4
"""Of topics that do not say how many: as `semel run` makes them, so that keys of a test spread as they will."""
SETTLE_SECONDS = 600.0
"""How long, by the app's clock, it may take to come to rest: longer than any back-off. What is tried again and again
for so long costs a test about a second."""
STOP_SECONDS = 30.0


class NotSettled(AssertionError):
    """The app does not come to rest: something is tried again and again."""


class _ScratchSqlite(SqliteDatabase):
    """A file that nobody needs after the test: it need not survive a loss of power."""

    def connect(self) -> None:
        super().connect()
        self.execute("PRAGMA synchronous=OFF")


def prepared(app: App, databases: Mapping[str, str], report: Report, *, replay: bool) -> App:
    """A copy of the app with watched handlers, and its databases at these URLs."""
    shadow = copy.copy(app)
    shadow.databases = {name: replace(spec, url=databases[name]) for name, spec in app.databases.items()}
    shadow.processors = {
        name: replace(spec, handler=watch(spec.handler, f"processor {name}", report, replay=replay))
        for name, spec in app.processors.items()
    }
    shadow.endpoints = {
        route: replace(spec, handler=watch(spec.handler, f"endpoint {route}", report, replay=replay))
        for route, spec in app.endpoints.items()
    }
    shadow.sinks = {
        name: replace(
            spec,
            handler=watch(spec.handler, f"sink {name}", report, replay=replay),
            database=shadow.databases[spec.database.name],
        )
        for name, spec in app.sinks.items()
    }
    return shadow


class Rig:
    """`app` at work in `folder`. Its methods run in the loop; what is only looked at may be looked at any time."""

    def __init__(self, app: App, folder: Path, loop: VirtualLoop, wall_ms: Callable[[], int]) -> None:
        self.app = app
        self.settings = Settings(
            kafka=f"{HOST}:{PORT}",
            data=folder,
            instance="test",
            # Nothing waits for it: the clock is put forward. Short, so that few other timers go off meanwhile.
            commit_interval_ms=1,
            partitions=app.request_partitions or PARTITIONS,
        )
        self._loop = loop
        rng = random.Random(0)  # The same in every run, ids too.
        self._env = Env(
            monotonic=loop.time,
            wall_ms=wall_ms,
            rng=rng,
            new_id=lambda: UUID(int=rng.getrandbits(128), version=4),
            listen=loop.listen,
        )
        self._broker = Broker(folder / "broker", config=BrokerConfig(auto_create_topics=False), env=self._env)
        self._client = KafkaClient(self.settings.kafka, client_id="test", env=self._env)
        self._producer = Producer(self._client)
        self._committed = Committed()
        self._consumers: dict[str, LocalConsumer] = {}
        self._sinks: dict[str, SqlSink] = {}
        self._groups: dict[str, tuple[str, Callable[[TopicPartition], int | None]]] = {}
        """By component or sink: its group, and the next offset that it has not committed."""
        self._engines: dict[str, Runnable] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._quiet: asyncio.Future[None] | None = None
        self._ingress: Ingress | None = None
        self._outboxes: list[LocalOutbox] = []
        loop.when_quiet(self._look)

    @property
    def node(self) -> Node:
        """The broker's."""
        return self._broker.node

    @property
    def parked_in_databases(self) -> int:
        """How many keys of the sinks are parked."""
        return sum(
            sink.parked_keys(TopicPartition(spec.topic.name, number))
            for name, sink in self._sinks.items()
            for spec in [self.app.sinks[name]]
            for number in range(self.partitions(spec.topic.name))
        )

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has."""
        found = self.node.topics.get(topic)
        assert found is not None, f"topic {topic} was made at the start"
        return len(found.partitions)

    # --- Life ---

    async def start(self) -> None:
        """Start everything."""
        await self._broker.start()
        await self._client.start()
        await self._producer.start()
        admin, own = Admin(self._client), {}
        if self.app.endpoints:
            from semel.ingress.link import topic_specs  # Here, as below: the ingress is for apps that have one.

            own = topic_specs(self.app.name, self.settings.partitions)
        await prepare_topics(admin, self.app.topics.values(), self._components(), PARTITIONS, more=own)
        self._outboxes = [LocalOutbox(spec) for spec in self.app.databases.values() if spec.sends]
        await self.start_worker()
        if self.app.endpoints:
            from semel.ingress.asgi import Ingress
            from semel.testing.http import LocalLink

            link = LocalLink(lambda: self.node, self.app.name, self.settings.partitions, self.settings, self._env)
            self._ingress = Ingress(self.app.name, list(self.app.endpoints.values()), link, env=self._env)
            await self._ingress.start()

    async def start_worker(self) -> None:
        """Start the engines and sinks."""
        metrics = Metrics()
        for component in self._components():
            self._engines[component.name] = self._engine(component, metrics)
        for spec in self.app.sinks.values():
            self._engines[spec.name] = self._sink(spec, metrics)
        self._tasks = {name: self._loop.create_task(item.run(), name=name) for name, item in self._engines.items()}

    async def stop_worker(self) -> None:
        """Let the engines finish what is in hand, and end."""
        for engine in self._engines.values():
            await engine.drain()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=STOP_SECONDS)
            for task in late:
                log.warning("%s does not end; it is cancelled", task.get_name())
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for kept in (self._engines, self._tasks, self._groups, self._consumers, self._sinks):
            kept.clear()

    async def stop(self) -> None:
        """Stop everything."""
        await self.stop_worker()
        with suppress(SemelError):
            if self._ingress is not None:
                await self._ingress.close()
            await self._producer.close()
            await self._client.close()
        for outbox in self._outboxes:
            outbox.close()
        await self._broker.stop()

    def _components(self) -> list[Component]:
        components = self.app.components()
        if self.app.endpoints:
            from semel.ingress.owner import owner_component

            endpoints = self.app.endpoints.values()
            owner = owner_component(self.app.name, endpoints, wall_ms=self._env.wall_ms, trace=self.app.trace)
            components.append(self.app.compressing(owner))
        return components

    def _joined(self, consumer: LocalConsumer) -> None:
        self._consumers[consumer.group] = consumer

    def _engine(self, component: Component, metrics: Metrics) -> Engine:
        kafka = LocalKafka(lambda: self.node, self._joined, self.settings, self._env, component.name)
        self._groups[component.name] = component.group, lambda at: self._committed.of(component.group, at)
        return Engine(
            component,
            self.settings.kafka,
            self.settings,
            self._env,
            metrics,
            kafka=kafka,
            watermarks=self._committed,
        )

    def _sink(self, spec: SinkSpec, metrics: Metrics) -> SinkEngine:
        group = spec.identity(self.app.name)
        source = LocalSource(
            lambda: self.node,
            self._joined,
            self.settings,
            self._env,
            group=group,
            topic=spec.topic.name,
            member=f"{group}.test",
        )

        def make_sink(cluster_id: str) -> SqlSink:
            database = _ScratchSqlite(spec.database.url) if spec.database.url.startswith("sqlite:") else None
            sink = SqlSink(spec, group, cluster_id, env=self._env, create_tables=True, database=database)
            self._sinks[spec.name] = sink
            self._groups[spec.name] = group, sink.position
            return sink

        self._groups[spec.name] = group, lambda _: None

        return SinkEngine(
            self.app.name,
            spec,
            self.settings.kafka,
            self.settings,
            self._env,
            metrics,
            source=source,
            make_sink=make_sink,
            executor=InlineExecutor(),
        )

    # --- Work ---

    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The ingress' answer to one request. Raises `ConfigurationError` when the app has no endpoints."""
        if self._ingress is None:
            raise ConfigurationError(f"app {self.app.name} has no endpoints: nobody can answer {method} {path}.")
        from semel.testing.http import ask

        return await ask(self._ingress, method, path, body, headers)

    async def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Sequence[Header]
    ) -> None:
        """Write a record as any producer would."""
        await self._producer.send(topic, partition, key, value, headers, self._env.wall_ms())

    async def settle(self) -> None:
        """Wait until everything is done that was caused. Raises `NotSettled`, or what ended an engine."""
        await self._rest()
        while await self._publish():
            await self._rest()

    async def _publish(self) -> int:
        """What relays do: how many records of the outboxes are in Kafka now."""
        count = 0
        for outbox in self._outboxes:
            for row in outbox.rows():
                partitions = self.partitions(row.topic)
                at = partition_for(row.key if row.key is not None else row.msg_id.encode(), partitions)
                await self.append(row.topic, at, row.key, row.value, row.record_headers)
                outbox.delete(row)
                count += 1
        return count

    async def _rest(self) -> None:
        self._quiet = self._loop.create_future()
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._quiet
        except TimeoutError:
            raise NotSettled(
                f"app {self.app.name} did not come to rest in {SETTLE_SECONDS:g} s of its clock. {self._unrest()} "
                "An engine that waits tells why in its log (logging.getLogger('semel'))."
            ) from None
        finally:
            self._quiet = None
        for task in self._tasks.values():
            if task.done():
                task.result()

    def _look(self) -> bool:
        """Asked whenever nothing can run before time passes: is everything done?"""
        waiting = self._quiet
        if waiting is None or waiting.done():
            return False
        if any(task.done() for task in self._tasks.values()) or not self._left():
            waiting.set_result(None)
            return True
        return False

    def _left(self) -> dict[str, dict[TopicPartition, int]]:
        """By component or sink: partitions with work left, and how many offsets that is at most."""
        found: dict[str, dict[TopicPartition, int]] = {}
        for name, (group, committed) in self._groups.items():
            consumer = self._consumers.get(group)
            engine = self._engines[name]
            stopped = engine.stopped if isinstance(engine, Engine) else ()
            left = {} if consumer is None else consumer.behind(committed, stopped)
            if consumer is None or left:
                found[name] = left
        return found

    def _unrest(self) -> str:
        """Who has work left, and why, if that is known."""
        parts = []
        for name, left in self._left().items():
            engine = self._engines[name]
            problems = engine.problems if isinstance(engine, SinkEngine) else []
            where = ", ".join(f"{at} (up to {count} offsets)" for at, count in sorted(left.items()))
            parts.append(
                f"{name} has work left at {where or 'its start'}{': ' if problems else ''}{'; '.join(problems)}."
            )
        return " ".join(parts)
