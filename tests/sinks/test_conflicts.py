"""Deadlocks and serialization failures are tried again; a lock that stays makes the batch wait. Nothing is parked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from semel.databases import connect, sqlite
from semel.sinks.contract import Applied, Unavailable
from tests.services.postgres import PostgresServer
from tests.sinks import ledger
from tests.sinks.ledger import a_slice, claim, partition, record


@pytest.mark.postgres
def test_a_deadlock_of_two_sinks_is_resolved(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    tool = connect(url)
    tool.execute("CREATE TABLE account (name TEXT PRIMARY KEY, hits BIGINT)")
    tool.executemany("INSERT INTO account VALUES (?, 0)", [("a",), ("b",)])
    tool.close()
    both = threading.Barrier(2)
    tries: list[str] = []

    def handler(order: str) -> Any:
        def handle(records: Sequence[Any], db: Any) -> None:
            tries.append(order)
            for name in order:
                db.execute("UPDATE account SET hits = hits + 1 WHERE name = ?", (name,))
                if name == order[0] and len(tries) <= 2:
                    both.wait(10)  # Both hold their first row now.

        return handle

    def run(part: int, order: str) -> None:
        sink = ledger.sink(url, handler(order))
        sink.take_over([claim(part)])
        applied.append(sink.apply([a_slice(record(0, "ann", 1, part), part=part)]))
        sink.close()

    applied: list[Applied] = []
    threads = [threading.Thread(target=run, args=(part, order)) for part, order in enumerate(["ab", "ba"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert applied == [Applied(1, 0, 1), Applied(1, 0, 1)]
    assert ledger.rows(url, "SELECT hits FROM account") == [(2,), (2,)]
    assert len(tries) >= 3, "PostgreSQL ends one of the two, and that one is repeated, on a busy machine more than once"
    assert ledger.parked(url) == []


@pytest.mark.postgres
def test_serialization_failures_are_tried_again(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    name = url.rpartition("/")[2]
    tool = connect(url)
    tool.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    tool.execute("CREATE TABLE total (amount BIGINT)")
    tool.execute("INSERT INTO total VALUES (0)")
    tool.close()

    def handler(records: Sequence[Any], db: Any) -> None:
        [(amount,)] = db.query("SELECT amount FROM total")
        db.execute("UPDATE total SET amount = ?", (amount + len(records),))

    def run(part: int) -> None:
        sink = ledger.sink(url, handler)
        sink.take_over([claim(part)])
        for offset in range(30):
            while (sink.position(partition(part)) or 0) <= offset:
                try:
                    sink.apply([a_slice(record(offset, "ann", 1, part), part=part)])
                except Unavailable as error:
                    waits.append(str(error))
        sink.close()

    waits: list[str] = []
    threads = [threading.Thread(target=run, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ledger.rows(url, "SELECT amount FROM total") == [(60,)]
    assert ledger.parked(url) == []
    assert all("deadlock or serialization" in text for text in waits)


def test_another_writer_that_keeps_sqlite_locked_makes_the_batch_wait(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/sink.db"
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.1)
    sink = ledger.sink(url)
    sink.take_over([claim()])
    writer = connect(url)
    writer.begin()
    with pytest.raises(Unavailable, match="locked"):
        sink.apply([a_slice(record(0, "ann", 1))])
    writer.rollback()
    writer.close()
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    assert ledger.parked(url) == []
    sink.close()


@pytest.mark.postgres
def test_sessions_that_an_administrator_ends_come_back(postgres: PostgresServer) -> None:
    url = postgres.new_database()

    def handler(records: Sequence[Any], db: Any) -> None:
        if not ended:
            ended.append(True)
            tool = connect(url)
            tool.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                       "AND pid <> pg_backend_pid()")  # fmt: skip
            tool.close()
        ledger.count(records, db)

    ended: list[bool] = []
    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    with pytest.raises(Unavailable):
        sink.apply([a_slice(record(0, "ann", 1))])
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    assert ledger.parked(url) == []
    sink.close()


@pytest.mark.postgres
def test_a_handler_that_hides_a_broken_connection_behind_its_own_error_parks_nothing(postgres: PostgresServer) -> None:
    url = postgres.new_database()

    def handler(records: Sequence[Any], db: Any) -> None:
        try:
            if not ended:
                ended.append(True)
                db.query("SELECT pg_terminate_backend(pg_backend_pid())")
            ledger.count(records, db)
        except Exception as error:
            raise ValueError("could not store") from error

    ended: list[bool] = []
    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    with pytest.raises(Unavailable):
        sink.apply([a_slice(record(0, "ann", 1))])
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    assert ledger.parked(url) == []
    sink.close()
