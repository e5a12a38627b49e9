"""A small app for tests: every record is counted in a table where a lost or doubled effect shows."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from semel.databases import connect
from semel.databases.database import is_cache, is_missing_table, is_search
from semel.databases.spec import CacheSpec, DatabaseSpec, SearchSpec
from semel.databases.valkey.effects import CacheEffects
from semel.env import Env
from semel.processing.parklog import Command, Outcome, ParkPolicy, Verb
from semel.processing.topics import Topic
from semel.sinks.contract import Claim, Slice, Unavailable
from semel.sinks.search.effects import SearchEffects
from semel.sinks.spec import SinkSpec
from semel.sinks.sql import SqlSink
from semel.sinks.sql.positions import PositionKey
from semel.sinks.sql.release import insert_command, read_outcome
from semel.types import Record, TopicPartition
from tests.services.server import Killable

TOPIC_ID = uuid.UUID("11111111-2222-3333-4444-555555555555")
CLUSTER_ID = "test-cluster"
TOPIC = Topic("purchases", str, int)
SCHEMA = """
CREATE TABLE IF NOT EXISTS counted (
  customer VARCHAR(64) PRIMARY KEY, times BIGINT NOT NULL, total BIGINT NOT NULL CHECK (total < 1000000)
);
CREATE TABLE IF NOT EXISTS seen (part INTEGER NOT NULL, record_offset BIGINT NOT NULL, customer TEXT NOT NULL);
"""
COUNT = (
    "INSERT INTO counted (customer, times, total) VALUES (?, 1, ?) ON CONFLICT (customer) DO UPDATE SET "
    "times = counted.times + 1, total = counted.total + excluded.total"
)
COUNT_ON_MARIADB = (
    "INSERT INTO counted (customer, times, total) VALUES (?, 1, ?) ON DUPLICATE KEY UPDATE "
    "times = times + 1, total = total + VALUES(total)"
)
LEDGER = {
    "settings": {"number_of_shards": 1, "number_of_replicas": 0, "refresh_interval": -1},
    "mappings": {
        "dynamic": "strict",
        "properties": {
            "part": {"type": "integer"},
            "offset": {"type": "long"},
            "customer": {"type": "keyword"},
            "cents": {"type": "long"},
        },
    },
}
NOTE = "INSERT INTO seen (part, record_offset, customer) VALUES (?, ?, ?)"


def count(records: Sequence[Any], db: Any) -> None:
    """The handler: totals by customer, and each record once more for the exact comparison. Negative amounts raise."""
    for record in records:
        if record.value < 0:
            raise ValueError(f"negative amount {record.value}")
    _add_up(db, sorted((record.key, record.value) for record in records))
    note(db, records)


def note(db: Any, records: Sequence[Any]) -> None:
    """Each record as it was applied; twice where it was applied twice."""
    if isinstance(db, CacheEffects):
        db.rpush("seen", *(f"{record.partition} {record.offset} {record.key}" for record in records))
        return
    if isinstance(db, SearchEffects):
        for record in records:
            document = {"part": record.partition, "offset": record.offset, "customer": record.key or ""}
            document["cents"] = abs(record.value)
            db.put("ledger", f"{record.partition}-{record.offset}", document, version=record)
            db.put("ledger", f"newest-{record.partition}-{record.key}", document, version=record)
        return
    db.executemany(NOTE, [(record.partition, record.offset, record.key or "") for record in records])


def _add_up(db: Any, amounts: Sequence[tuple[str, int]]) -> None:
    if isinstance(db, CacheEffects):
        for customer, amount in amounts:
            db.hincrby("times", customer)
            db.hincrby("total", customer, amount)
        return
    if isinstance(db, SearchEffects):
        return  # Documents do not count: the amounts stand in what is noted.
    db.executemany(COUNT_ON_MARIADB if db.title == "MariaDB" else COUNT, amounts)


def spec(url: str, handler: Callable[[Sequence[Any], Any], None] = count, **changes: Any) -> SinkSpec:
    database: DatabaseSpec = DatabaseSpec("database", url, SCHEMA)
    if is_cache(url):
        database = CacheSpec("cache", url)
    elif is_search(url):
        database = SearchSpec("search", url, indexes={"ledger": LEDGER})
    return replace(SinkSpec("totals", TOPIC, database, handler), **changes)


def sink(
    url: str,
    handler: Callable[[Sequence[Any], Any], None] = count,
    *,
    cluster_id: str = CLUSTER_ID,
    create_tables: bool = True,
    policy: ParkPolicy | None = None,
    **changes: Any,
) -> Any:
    """An open sink of the kind that the URL names."""
    if is_cache(url):
        from semel.sinks.valkey.sink import ValkeySink

        in_cache = ValkeySink(spec(url, handler, **changes), "shop.totals", cluster_id, env=Env(), policy=policy)
        in_cache.open()
        return in_cache
    if is_search(url):
        from semel.sinks.search.sink import SearchSink

        in_search = SearchSink(
            spec(url, handler, **changes), "shop.totals", cluster_id, env=Env(), create_indexes=create_tables,
            policy=policy,
        )  # fmt: skip
        in_search.open()
        return in_search
    env = Env(rng=random.Random(1))
    made = SqlSink(
        spec(url, handler, **changes), "shop.totals", cluster_id, env=env, create_tables=create_tables, policy=policy
    )
    made.open()
    return made


def partition(number: int) -> TopicPartition:
    return TopicPartition(TOPIC.name, number)


def claim(number: int = 0, *, log_start: int = 0, topic_id: uuid.UUID = TOPIC_ID) -> Claim:
    return Claim(partition(number), topic_id, log_start)


def accept_start(url: str) -> None:
    """Say that the sink may begin where the log does, which a store that may have lost its data asks for."""
    if is_cache(url):
        with cache(url) as (client, _):
            client.set("semel:accept_start:shop.totals", "yes")
    elif is_search(url):
        with store(url) as search:
            search.call("PUT", f"/{search.prefix}semel-sink/_doc/semel:accept_start:shop.totals", b"{}")


def record(offset: int, key: str | None, value: int | bytes, part: int = 0) -> Record:
    raw = value if isinstance(value, bytes) else str(value).encode()
    return Record(TOPIC.name, part, offset, 1_700_000_000_000 + offset, None if key is None else key.encode(), raw)


def a_slice(*records: Record, end: int | None = None, part: int = 0) -> Slice:
    return Slice(partition(part), records, end if end is not None else records[-1].offset + 1)


def write_while_it_is_killed(url: str, server: Killable, pause: float) -> None:
    """Apply record after record while the server is killed three times: each is there once."""
    tested = sink(url)
    tested.take_over([claim()])
    total, failures = 60, 0

    def strike() -> None:
        for _ in range(3):
            time.sleep(pause)
            server.kill()
            server.start()

    striking = threading.Thread(target=strike)
    striking.start()
    while (at := tested.position(partition(0)) or 0) < total or striking.is_alive():
        offset = min(at, total - 1)
        try:
            tested.apply([a_slice(record(offset, f"k{offset % 3}", 1))])
        except Unavailable:
            failures += 1
            time.sleep(0.05)  # The engine waits, too; a server that starts has the processor.
        if at >= total:
            total += 1
    striking.join()
    assert failures > 0
    assert seen(url) == [(0, offset) for offset in range(total)]
    tested.close()


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Rows as they are committed; none while the sink has not made its tables yet."""
    database = connect(url)
    try:
        return database.query(sql)
    except Exception as error:
        if is_missing_table(error):
            return []
        raise
    finally:
        database.close()


@contextmanager
def cache(url: str) -> Iterator[tuple[Any, Any]]:
    """A plain client, and the store as the sink sees it."""
    import redis

    from semel.sinks.valkey.store import ValkeyStore

    client, store = redis.Redis.from_url(url.replace("valkey:", "redis:"), decode_responses=True), ValkeyStore(url)
    try:
        yield client, store
    finally:
        client.close()
        store.close()


def is_noting(url: str) -> bool:
    """Whether the sink's handler only notes what it wants."""
    return is_cache(url) or is_search(url)


@contextmanager
def store(url: str) -> Iterator[Any]:
    """The cache or the search as the sink sees it."""
    if is_cache(url):
        with cache(url) as (_, found):
            yield found
        return
    from semel.sinks.search.store import SearchStore

    search = SearchStore(url)
    try:
        yield search
    finally:
        search.close()


def documents(url: str) -> list[dict[str, Any]]:
    """Every document of the index as it is stored, in the order in which they were written."""
    with store(url) as search:
        search.call("POST", f"/{search.prefix}ledger/_refresh")
        query = {"size": 10_000, "version": True, "seq_no_primary_term": True, "sort": "_doc"}
        answer = search.call("POST", f"/{search.prefix}ledger/_search", json.dumps(query).encode())
    hits = answer.body["hits"]["hits"] if answer.status == 200 else []
    return sorted(hits, key=lambda hit: int(hit["_seq_no"]))


def _each(url: str) -> list[tuple[str, int, int, int]]:
    """Customer, partition, offset and amount of every record's own document, as they were written."""
    found = [hit["_source"] for hit in documents(url) if not hit["_id"].startswith("newest-")]
    return [(item["customer"], item["part"], item["offset"], item["cents"]) for item in found]


def place(part: int = 0) -> Any:
    """Where a cache keeps a partition."""
    from semel.sinks.noted.place import Place

    return Place("shop.totals", CLUSTER_ID, TOPIC.name, part)


def totals(url: str) -> dict[str, tuple[int, int]]:
    if is_cache(url):
        with cache(url) as (client, _):
            times, total = client.hgetall("times"), client.hgetall("total")
        return {customer: (int(times[customer]), int(total[customer])) for customer in times}
    if is_search(url):
        amounts: dict[str, list[int]] = {}
        for customer, _, _, cents in _each(url):
            amounts.setdefault(customer, []).append(cents)
        return {customer: (len(found), sum(found)) for customer, found in amounts.items()}
    return {customer: (times, total) for customer, times, total in rows(url, "SELECT * FROM counted")}


def seen(url: str) -> list[tuple[int, int]]:
    """Every effect as (partition, offset), sorted; a doubled one stands there twice."""
    if is_cache(url):
        with cache(url) as (client, _):
            lines = [line.split(" ") for line in client.lrange("seen", 0, -1)]
        return sorted((int(part), int(offset)) for part, offset, _ in lines)
    if is_search(url):
        return sorted((part, offset) for _, part, offset, _ in _each(url))
    return sorted((part, offset) for part, offset in rows(url, "SELECT part, record_offset FROM seen"))


def position(url: str, part: int = 0) -> tuple[int, int]:
    """next_offset and owner_epoch as they are committed."""
    if is_cache(url):
        with cache(url) as (_, kept):
            [found] = [kept.position(at) for at in kept.places() if at.part == part]
            return found[0], found[1]
    if is_search(url):
        with store(url) as search:
            [held] = [search.read(at) for at in search.places() if at.part == part]
        return held.position.next_offset, held.position.owner_epoch
    [row] = rows(url, f"SELECT next_offset, owner_epoch FROM semel_position WHERE part = {part}")
    return row[0], row[1]


def parked(url: str) -> list[tuple[int, int, bytes | None, str | None]]:
    if is_noting(url):
        with store(url) as kept:
            return [
                (at.part, offset, item.key, None if item.fault is None else item.fault.error.rpartition(".")[2])
                for at in kept.places()
                for offset, item in kept.parked(at).items()
            ]
    found = rows(
        url, "SELECT part, record_offset, record_key, error_class FROM semel_parked ORDER BY part, record_offset"
    )
    return [
        (part, offset, None if key is None else bytes(key), None if error is None else error.rpartition(".")[2])
        for part, offset, key, error in found
    ]


def count_all(records: Sequence[Any], db: Any) -> None:
    """The handler when it is mended: a negative amount counts without its sign."""
    _add_up(db, sorted((record.key, abs(record.value)) for record in records))
    note(db, records)


def in_order(url: str) -> list[tuple[str, int]]:
    """Every effect as (customer, offset), as they were written."""
    if is_cache(url):
        with cache(url) as (client, _):
            lines = [line.split(" ") for line in client.lrange("seen", 0, -1)]
        return [(key, int(offset)) for _, offset, key in lines]
    if is_search(url):
        return [(customer, offset) for customer, _, offset, _ in _each(url)]
    order = {"sqlite": "ORDER BY rowid", "postgresql": "ORDER BY ctid"}.get(url.partition(":")[0], "")
    return [(key, offset) for key, offset in rows(url, f"SELECT customer, record_offset FROM seen {order}")]


def ask(url: str, verb: Verb, *offsets: int, part: int = 0, name: str = "c1", **options: Any) -> str:
    """Leave a command, as `semel park` does."""
    command = Command(id=name, verb=verb, offsets=list(offsets), by="me", **options)
    if is_noting(url):
        with store(url) as kept:
            kept.ask(place(part), command)
        return name
    database = connect(url)
    database.begin()
    insert_command(database, PositionKey("shop.totals", CLUSTER_ID, str(TOPIC_ID), part), command)
    database.commit()
    database.close()
    return name


def outcome(url: str, name: str = "c1") -> Outcome:
    """What came of a command; an empty one while nothing did."""
    if is_noting(url):
        with store(url) as kept:
            return next(filter(None, (kept.outcome(at, name) for at in kept.places())), Outcome())
    database = connect(url)
    try:
        return read_outcome(database, name) or Outcome()
    finally:
        database.close()
