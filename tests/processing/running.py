"""Running engines against a real broker: topics, input, output, and a child process to kill.

`python -m tests.processing.running APP SLOT [DELIVERY]` is the child: a worker with the processor of `counting_app`, or
of `copying_app` where a delivery mode is given, or of `hanging_app` where that is "hanging".
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.producer import Producer
from semel.env import Env
from semel.errors import Fenced
from semel.failpoints import arm_failpoints
from semel.processing import EXIT_FENCED
from semel.processing.engine import Engine
from semel.processing.heartbeat import Heartbeat
from semel.processing.metrics import Metrics
from semel.processing.overdue import Overdue
from semel.processing.topology import prepare_topics
from semel.processing.worker import Worker
from semel.settings import Settings
from semel.types import Record, TopicPartition
from semel.wire.partitioner import partition_for
from tests.reading import each

PARTITIONS = 4


def counting_app(name: str) -> App:
    """Counts each key's records in state and writes the count, with the input's value, to `<name>.out`."""
    app = App(name)
    source = app.topic(f"{name}.in", key=str, value=int, partitions=PARTITIONS)
    target = app.topic(f"{name}.out", key=str, value=list[int], partitions=3)
    counts = app.state("counts", key=str, value=int)

    @app.processor(source, state=counts)
    def count(record: Any, counts: Any) -> Any:
        if record.value < 0:
            raise ValueError(f"cannot count {record.value}")
        number = counts.get(record.key, 0) + 1
        yield counts.put(record.key, number)
        yield target.record(record.key, [record.value, number])

    return app


def copying_app(name: str, delivery: Any) -> App:
    """Writes each input's value to `<name>.out`."""
    app = App(name)
    source = app.topic(f"{name}.in", key=str, value=int, partitions=PARTITIONS)
    target = app.topic(f"{name}.out", key=str, value=int, partitions=3)

    @app.processor(source, delivery=delivery)
    def count(record: Any) -> Any:
        yield target.record(record.key, record.value)

    return app


HANGING = 7
"""The value over which the handler of `hanging_app` never comes back."""


def hanging_app(name: str) -> App:
    """Writes each input's value to `<name>.out`, slowly, and hangs over one."""
    app = App(name)
    source = app.topic(f"{name}.in", key=str, value=int, partitions=PARTITIONS)
    target = app.topic(f"{name}.out", key=str, value=int, partitions=3)

    @app.processor(source, deadline="2s")
    def count(record: Any) -> Any:
        time.sleep(3600 if record.value == HANGING else 0.01)
        yield target.record(record.key, record.value)

    return app


@asynccontextmanager
async def cluster(bootstrap: str) -> Any:
    """A started client and its admin."""
    client = KafkaClient(bootstrap)
    await client.start()
    try:
        yield client, Admin(client)
    finally:
        await client.close()


async def prepare(bootstrap: str, app: App) -> None:
    async with cluster(bootstrap) as (_, admin):
        await prepare_topics(admin, app.topics.values(), app.components(), 4)


async def feed(bootstrap: str, topic: str, items: Sequence[tuple[str, int]]) -> None:
    """Write records keyed as every client keys them."""
    async with cluster(bootstrap) as (client, _):
        producer = Producer(client)
        await producer.start()
        await asyncio.gather(
            *(
                producer.send(topic, partition_for(key.encode(), PARTITIONS), key.encode(), b"%d" % value)
                for key, value in items
            )
        )
        await producer.close()


async def each_of(bootstrap: str, topic: str, partitions: int) -> AsyncIterator[Record]:
    """Every committed record, each partition in order."""
    wanted = [TopicPartition(topic, number) for number in range(partitions)]
    async with cluster(bootstrap) as (_, admin):
        ends = await admin.list_offsets(wanted, at="stable")
    async for record in each(bootstrap, ends):
        yield record


async def read_all(bootstrap: str, topic: str, partitions: int) -> list[Record]:
    """Every committed record, partition by partition."""
    return sorted([record async for record in each_of(bootstrap, topic, partitions)])


async def drained(bootstrap: str, group: str, topic: str, timeout: float = 60) -> None:
    """Wait until the group's committed offsets are at the ends of the topic."""
    wanted = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    async with cluster(bootstrap) as (_, admin), asyncio.timeout(timeout):
        while True:
            ends = await admin.list_offsets(wanted, at="high_watermark")
            done = await admin.committed_offsets(group, wanted, require_stable=True)
            if all(done.get(at, -1) >= end or end == 0 for at, end in ends.items()):
                return
            await asyncio.sleep(0.05)


def settings_for(bootstrap: str, **options: Any) -> Settings:
    return Settings(kafka=bootstrap, instance="test", session_timeout_ms=3_000, commit_interval_ms=50, **options)


def engine_for(bootstrap: str, app: App, slot: int = 0, metrics: Metrics | None = None) -> Engine:
    return Engine(app.components()[0], bootstrap, settings_for(bootstrap), Env(), metrics or Metrics(), slot=slot)


async def while_running(engines: Sequence[Engine], body: Callable[[], Awaitable[None]]) -> None:
    """Run engines while `body` runs; the first engine that fails ends both."""
    tasks = [asyncio.create_task(engine.run()) for engine in engines]
    work = asyncio.create_task(body())
    await asyncio.wait({work, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for engine in engines:
        await engine.drain()
    if not work.done():
        work.cancel()
    results = await asyncio.gather(work, *tasks, return_exceptions=True)
    for result in results[1:] + results[:1]:
        if isinstance(result, BaseException):
            raise result


def check_counts(records: Sequence[Record], items: Sequence[tuple[str, int]]) -> None:
    """Every input counted once, in order per key, with no gap in the numbers of a key."""
    wanted: dict[str, list[bytes]] = {}
    for key, value in items:
        seen = wanted.setdefault(key, [])
        seen.append(b"[%d,%d]" % (value, len(seen) + 1))
    found: dict[str, list[bytes]] = {}
    for record in records:
        found.setdefault((record.key or b"").decode(), []).append(record.value or b"")
    assert {key: values for key, values in found.items() if values != wanted.get(key)} == {}
    assert found.keys() == wanted.keys()


async def _child(name: str, slot: int, delivery: str = "") -> None:
    settings = Settings.from_environment()
    arm_failpoints(settings.failpoint)
    app = counting_app(name)
    if delivery:
        app = hanging_app(name) if delivery == "hanging" else copying_app(name, delivery)
    heartbeat = Heartbeat.from_environment()
    overdue = Overdue(settings.data, heartbeat.beat)
    engine = Engine(app.components()[0], settings.kafka, settings, Env(), Metrics(), slot=slot, overdue=overdue)
    await Worker({"count": engine}, heartbeat=heartbeat).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        asyncio.run(_child(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
    except Fenced as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_FENCED)
