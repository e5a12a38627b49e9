"""The proxy before PostgreSQL meets COMMIT where it is told to, in every protocol; behind it our sink is exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import psycopg
import pytest

from semel.prove.faults.postgres_proxy import PostgresProxy
from semel.prove.faults.rules import Action, Cut, Drop, Hold, Trap
from semel.sinks.contract import Unavailable
from tests.services.postgres import PostgresServer
from tests.sinks import ledger

pytestmark = pytest.mark.postgres
SECONDS = 20.0


@asynccontextmanager
async def before(url: str) -> AsyncIterator[PostgresProxy]:
    proxy = PostgresProxy(url)
    try:
        yield proxy
    finally:
        await proxy.close()


def simply(connection: psycopg.Connection, number: int) -> None:
    connection.execute("BEGIN")
    connection.execute("INSERT INTO t VALUES (%s)", [number])
    connection.execute("commit -- in the simple protocol")


def in_a_pipeline(connection: psycopg.Connection, number: int) -> None:
    with connection.pipeline():
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (%s)", [number])
        connection.execute("COMMIT")


def prepared(connection: psycopg.Connection, number: int) -> None:
    connection.execute("BEGIN", prepare=True)
    connection.execute("INSERT INTO t VALUES (%s)", [number], prepare=True)
    connection.execute("COMMIT", prepare=True)


WAYS = [simply, in_a_pipeline, prepared]
Write = Callable[[psycopg.Connection, int], None]


@pytest.mark.parametrize("write", WAYS)
def test_commit_is_met_and_nothing_else(postgres: PostgresServer, write: Write) -> None:
    url = postgres.new_database()

    async def run() -> None:
        async with before(url) as proxy:
            await asyncio.to_thread(in_order, proxy.url)
            lost = proxy.on_commit(Trap(Cut("request"), on=2))
            assert await asyncio.to_thread(attempt, proxy.url, write, 1) == "committed"
            assert await asyncio.to_thread(attempt, proxy.url, write, 2) == "broken"
            assert (lost.seen, lost.hits) == (2, 1)
            proxy.remove(lost)
            in_doubt = proxy.on_commit(Trap(Cut("response")))
            assert await asyncio.to_thread(attempt, proxy.url, write, 3) == "broken"
            assert in_doubt.answer is not None
            assert in_doubt.answer.startswith(b"C")
            proxy.remove(in_doubt)
            assert await asyncio.to_thread(attempt, proxy.url, write, 4) == "committed"

    def in_order(url: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE t (number INT)")
            # Large and many: what is no COMMIT passes whole, in whatever pieces it comes.
            rows = connection.execute("SELECT repeat('x', n) FROM generate_series(1, 3000) n").fetchall()
            assert [len(text) for (text,) in rows] == list(range(1, 3001))
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO t VALUES (%s)", [(-n,) for n in range(500)])
            connection.execute("DELETE FROM t")

    asyncio.run(run())
    with psycopg.connect(url) as connection:
        assert sorted(connection.execute("SELECT number FROM t").fetchall()) == [(1,), (3,), (4,)]


def attempt(url: str, write: Write, number: int) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        try:
            write(connection, number)
        except psycopg.OperationalError:
            return "broken"
        return "committed"


def test_a_commit_that_stalls_and_one_whose_answer_does(postgres: PostgresServer) -> None:
    url = postgres.new_database()

    def rows() -> int:
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*) FROM t").fetchone()
            assert row is not None
            return int(row[0])

    async def run() -> None:
        async with before(url) as proxy:
            for number, action in enumerate([Hold("request"), Hold("response")]):
                trap = proxy.on_commit(Trap(action))
                writing = asyncio.create_task(asyncio.to_thread(attempt, proxy.url, simply, number))
                event = trap.struck if action.of == "request" else trap.answered
                await asyncio.wait_for(event.wait(), SECONDS)
                assert await asyncio.to_thread(rows) == number + (action.of == "response")
                assert not writing.done()
                proxy.remove(trap)
                assert await asyncio.wait_for(writing, SECONDS) == "committed"

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (number INT)")
    asyncio.run(run())
    assert rows() == 2


ACTIONS: list[Action] = [
    Cut("request"),
    Cut("request", at=4),
    Cut("request", reset=True),
    Cut("response"),
    Cut("response", reset=True),
    *(Cut("response", at=at) for at in range(1, 18, 4)),
    Hold("request", 0.02),
    Hold("response", 0.02),
    Drop("request"),
    Drop("response"),
]


def test_the_sink_loses_and_doubles_nothing_whatever_becomes_of_its_commits(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    broken = 0

    async def run() -> None:
        nonlocal broken
        async with before(url) as proxy:
            sink = await asyncio.to_thread(ledger.sink, proxy.url)
            await asyncio.to_thread(sink.take_over, [ledger.claim()])
            rng, offset = Random(1), 0
            for action in ACTIONS * 2:
                trap = proxy.on_commit(Trap(action))
                records = [ledger.record(offset + n, f"k{rng.randrange(3)}", 1) for n in range(rng.randint(1, 4))]
                offset += len(records)
                applying = asyncio.create_task(apply(sink, records))
                await asyncio.wait_for(trap.struck.wait(), SECONDS)
                if isinstance(action, Drop):
                    # Nobody would ever answer: keepalives are answered by the proxy's own kernel.
                    if action.of == "response":
                        await asyncio.wait_for(trap.answered.wait(), SECONDS)
                    proxy.reset()
                broken += await asyncio.wait_for(applying, SECONDS)
                proxy.remove(trap)
            await asyncio.to_thread(sink.close)
            assert ledger.seen(url) == [(0, number) for number in range(offset)]
            assert ledger.position(url)[0] == offset

    asyncio.run(run())
    assert broken >= 2 * (len(ACTIONS) - 2)


async def apply(sink: ledger.SqlSink, records: list[ledger.Record]) -> int:
    """Apply until it is done, as the engine does; how often the database was away."""
    failures = 0
    while (sink.position(ledger.partition(0)) or 0) <= records[-1].offset:
        try:
            await asyncio.to_thread(sink.apply, [ledger.a_slice(*records)])
        except Unavailable:
            failures += 1
    return failures


def test_a_database_behind_tls_or_a_socket_is_refused_by_name() -> None:
    assert PostgresProxy.refusal("postgresql://u:secret@db.example:5432/shop?sslmode=prefer") == ""
    for url in ("postgresql://db.example/shop?sslmode=verify-full", "postgresql:///shop?host=/run/postgresql"):
        reason = PostgresProxy.refusal(url)
        assert reason.endswith(".")
        assert "secret" not in reason
