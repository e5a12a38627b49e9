"""What the relay's tests share: rows as a writer leaves them, the topic as a reader finds it, and the count."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.databases import Database, connect
from semel.databases.database import title_of
from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.outbox.relay import Relay
from semel.outbox.rows import MSG_ID_HEADER, encode_headers, shard_of
from semel.outbox.tables import schema_sql
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import Record, TopicPartition
from tests.reading import each

PARTITIONS = 3


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, run in a loop of its own."""

    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


_INSERT = (
    "INSERT INTO semel_outbox (shard, msg_id, topic, record_key, record_value, headers, created_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)


class Outbox:
    """A database with an outbox, a topic of its own, and what was written."""

    def __init__(self, url: str, bootstrap: str) -> None:
        self.url = url
        self.bootstrap = bootstrap
        self.app = f"shop{uuid.uuid4().hex[:8]}"
        self.topic = f"{self.app}.payments"
        self.written: dict[bytes | None, list[str]] = defaultdict(list)
        """Message ids by key, in the order of their commits."""
        self.database = connect(url)
        self.database.migrate(schema_sql(title_of(url)))

    async def make_topic(self, topic: str = "", configs: dict[str, str] | None = None) -> None:
        async with KafkaClient(self.bootstrap) as client:
            await Admin(client).create_topics({topic or self.topic: TopicSpec(PARTITIONS, configs or {})})

    def write(
        self, count: int, *, keys: int = 20, topic: str = "", value: bytes = b"v", headers: Any = ()
    ) -> list[str]:
        """Commit `count` rows in one transaction; their ids."""
        rows, ids = [], []
        for number in range(count):
            key, msg_id = b"k%d" % (number % keys), str(uuid.uuid4())
            rows.append((shard_of(key, msg_id), msg_id, topic or self.topic, key, value, encode_headers(headers), 0))
            ids.append(msg_id)
        insert(self.database, rows)
        for row in rows:
            self.written[row[3]].append(row[1])
        return ids

    def left(self) -> int:
        [(count,)] = self.database.query("SELECT COUNT(*) FROM semel_outbox")
        return int(count)

    def relay(self, folder: Path, slot: int = 0, **settings: Any) -> Relay:
        values = {"data": folder, "session_timeout_ms": 6_000, **settings}
        spec = DatabaseSpec("database", self.url)
        return Relay(self.app, spec, self.bootstrap, Settings(**values), Env(), Metrics(), slot=slot)

    async def records(self, topic: str = "") -> list[Record]:
        """Every committed record of the topic, in order of partition and offset."""
        return await read_topic(self.bootstrap, topic or self.topic)

    async def check(self) -> None:
        """Every row that was written is in the topic once, and each key's in their order."""
        found: dict[bytes | None, list[str]] = defaultdict(list)
        for record in await self.records():
            found[record.key].append(msg_id(record))
        assert found == self.written

    def close(self) -> None:
        self.database.close()


def insert(database: Database, rows: Iterable[tuple[Any, ...]]) -> None:
    database.begin()
    try:
        database.executemany(_INSERT, rows)
        database.commit()
    finally:
        database.rollback()


def msg_id(record: Record) -> str:
    [value] = [value for name, value in record.headers if name == MSG_ID_HEADER]
    assert value is not None
    return value.decode()


async def read_topic(bootstrap: str, topic: str, *, partitions: int = PARTITIONS) -> list[Record]:
    at = [TopicPartition(topic, number) for number in range(partitions)]
    async with KafkaClient(bootstrap) as client:
        ends = await Admin(client).list_offsets(at, "high_watermark")
    return sorted([record async for record in each(bootstrap, ends)], key=lambda record: record[:3])


async def until(holds: Callable[[], bool], seconds: float = 60.0, *, beside: Iterable[asyncio.Task[None]] = ()) -> None:
    """Wait for a condition; what ends beside it with an error is the test's error."""
    deadline = time.monotonic() + seconds
    while not holds():
        for task in beside:
            if task.done():
                task.result()
        assert time.monotonic() < deadline, "it does not come to hold"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(*relays: Relay) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Relays at work in this process, drained at the end."""
    tasks = [asyncio.create_task(relay.run()) for relay in relays]
    try:
        yield tasks
    finally:
        for relay in relays:
            await relay.drain()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
