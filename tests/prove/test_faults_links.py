"""Faults of the way to Kafka and to the databases, struck at random: what is done through them is exact."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.errors import AbortTransaction, OutcomeUnknown
from semel.prove.faults.contract import NotNow, Targets, inflict
from semel.prove.faults.database import DatabaseFault
from semel.prove.faults.links import Links
from semel.prove.faults.net import Net
from semel.sinks.contract import Unavailable
from semel.types import TopicPartition
from semel.wire.records import BatchBuilder
from tests.conftest import Address
from tests.moment import NOW_MS
from tests.prove.test_faults_transactions import read_all
from tests.services.postgres import PostgresServer
from tests.sinks import ledger

SETTINGS = {"socket.timeout.ms": 1_000, "delivery.timeout.ms": 60_000}
STRIKES = 15


def targets(links: Links, **more: object) -> Targets:
    return Targets(names=["worker-0"], pid=lambda _: os.getpid(), session_seconds=0.2, links=links, **more)  # type: ignore[arg-type]


async def strike_often(make: Callable[[], Net | DatabaseFault], target: str, count: int) -> list[str]:
    """So many strikes, by as many seeds as it takes; what they did."""
    done: list[str] = []
    seed = 0
    while len(done) < count:
        seed += 1
        try:
            done.append((await asyncio.wait_for(inflict(make(), target, Random(seed)), 30)).done)
        except NotNow:
            assert seed < 10 * count, f"nothing to strike; done so far: {done}"
            await asyncio.sleep(0.05)
    return done


@pytest.mark.timeout(240)
def test_transactions_through_a_spoilt_network_are_whole(embedded: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.prove.faults.net._PATIENCE_SECONDS", 0.2)  # This client has two kinds of requests only.
    topic = TopicPartition(f"net-{uuid.uuid4().hex[:8]}", 0)
    committed: list[str] = []
    unknown: list[str] = []

    async def work(producer: TransactionalProducer, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            value = str(number)
            try:
                producer.begin()
                builder = BatchBuilder()
                builder.append(None, value.encode(), NOW_MS)
                await producer.produce(*topic, builder)
                await producer.end_transaction(True)
                committed.append(value)
            except AbortTransaction:
                await producer.abort()
            except OutcomeUnknown:
                unknown.append(value)
                await producer.init_transactions()

    async def run() -> list[str]:
        links = Links(["worker-0"], embedded.bootstrap, {})
        client = KafkaClient(links.environment("worker-0")["SEMEL_KAFKA"], client_id="net", settings=SETTINGS)
        try:
            await client.start()
            await Admin(client).create_topics({topic.topic: TopicSpec(1)})
            producer = TransactionalProducer(client, topic.topic)
            await producer.init_transactions()
            stop = asyncio.Event()
            working = asyncio.create_task(work(producer, stop))
            done = await strike_often(lambda: Net(targets(links)), "worker-0", STRIKES)
            before = len(committed)
            async with asyncio.timeout(60):
                while len(committed) < before + 5:
                    assert not working.done() or working.result()
                    await asyncio.sleep(0.05)
            stop.set()
            await working
            await producer.close()
        finally:
            await client.close()
            await links.close()
        return done

    done = asyncio.run(run())
    assert len(set(done)) > STRIKES / 2, done

    async def read() -> list[str]:
        async with KafkaClient(embedded.bootstrap) as direct:
            ends = await Admin(direct).list_offsets([topic], "stable")
        return (await read_all(embedded.bootstrap, ends))[topic]

    found = asyncio.run(read())
    assert [value for value in found if value not in unknown] == committed
    assert len(set(found)) == len(found)


@pytest.mark.postgres
@pytest.mark.timeout(240)
def test_a_sink_through_a_spoilt_way_to_postgres_is_exact(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semel.prove.faults.database._LONGEST_SECONDS", 0.5)
    url = postgres.new_database()

    async def work(sink: ledger.SqlSink, stop: asyncio.Event) -> int:
        failures = offset = 0
        is_settled = False
        while not (stop.is_set() and is_settled):
            try:
                await asyncio.to_thread(sink.apply, [ledger.a_slice(ledger.record(offset, f"k{offset % 3}", 1))])
                offset += 1
                is_settled = True
            except Unavailable:
                is_settled = False
                failures += 1
                await asyncio.sleep(0.01)
        await asyncio.to_thread(sink.close)
        assert failures > 0
        return offset

    async def run() -> int:
        links = Links(["worker-0", "http-0"], "127.0.0.1:1", {"SEMEL_DATABASE": url})
        here = links.environment("worker-0")["SEMEL_DATABASE"]
        assert here != url
        assert DatabaseFault.aims(targets(links)) == ["worker-0"]
        sink = await asyncio.to_thread(ledger.sink, here)
        await asyncio.to_thread(sink.take_over, [ledger.claim()])
        stop = asyncio.Event()
        working = asyncio.create_task(work(sink, stop))
        try:
            await strike_often(lambda: DatabaseFault(targets(links)), "worker-0", STRIKES)
            stop.set()
            return await asyncio.wait_for(working, 60)
        finally:
            await links.close()

    offset = asyncio.run(run())
    assert ledger.seen(url) == [(0, number) for number in range(offset)]


def test_a_lock_on_sqlite_is_held_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "a file.db"
    where = Targets(sqlite_files=[path])
    rng = Random(1)

    def write() -> None:
        with sqlite3.connect(path, timeout=0.01, isolation_level=None) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS t (n)")
            connection.execute("INSERT INTO t VALUES (1)")
        connection.close()

    async def refused(seconds: float) -> None:
        assert 0 < seconds < 10
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            write()

    assert DatabaseFault.refusal(where) == ""
    with pytest.raises(NotNow, match="not there yet"):
        asyncio.run(inflict(DatabaseFault(where), str(path), rng))
    write()
    asyncio.run(inflict(DatabaseFault(where), str(path), rng, sleep=refused))
    write()


def test_what_no_proxy_can_read_is_refused_by_name() -> None:
    links = Links(["worker-0"], "kafka:9093", {"SEMEL_DATABASE": "postgresql://h/d?sslmode=require"}, security="SSL")
    assert "TLS" in Net.refusal(targets(links))
    assert "TLS" in DatabaseFault.refusal(targets(links))
    assert links.environment("worker-0") == {
        "SEMEL_KAFKA": "kafka:9093",
        "SEMEL_DATABASE": "postgresql://h/d?sslmode=require",
    }
