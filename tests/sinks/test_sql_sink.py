"""Fence, compare-and-set, parking: the rules of the SQL sink on both databases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from semel.databases import connect
from semel.sinks.contract import Applied, PartitionsLost, Unavailable
from semel.sinks.sql import list_parked
from tests.sinks import ledger
from tests.sinks.ledger import a_slice, claim, partition, record


def test_a_database_that_went_back_in_time_is_noticed(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 5), record(1, "ann", 5))])
    tool = connect(url)
    tool.execute("UPDATE semel_position SET next_offset = 1")
    tool.execute("DELETE FROM counted")
    tool.close()
    with pytest.raises(PartitionsLost, match="set back"):
        sink.apply([a_slice(record(2, "ann", 5))])
    assert sink.take_over([claim()]) == {partition(0): 1}
    sink.close()


def test_a_poison_record_parks_its_key_and_nobody_else(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    batch = a_slice(
        record(0, "ann", 1), record(1, "bob", -1), record(2, "ann", 2), record(3, "bob", 3), record(4, "eve", b"oops")
    )
    assert sink.apply([batch]) == Applied(5, 3, 1)
    assert ledger.totals(url) == {"ann": (2, 3)}
    assert ledger.parked(url) == [
        (0, 1, b"bob", "ValueError"),
        (0, 3, b"bob", None),
        (0, 4, b"eve", "DataError"),
    ]
    assert ledger.position(url) == (5, 1)
    # Later records of a parked key are not tried, and the new owner knows the key.
    sink.apply([a_slice(record(5, "bob", 9), record(6, "eve", 9), record(7, "ann", 9))])
    successor = ledger.sink(url)
    successor.take_over([claim()])
    successor.apply([a_slice(record(8, "bob", 9), record(9, "ann", 1))])
    assert ledger.totals(url) == {"ann": (4, 13)}
    assert [offset for _, offset, key, _ in ledger.parked(url) if key == b"bob"] == [1, 3, 5, 8]
    tool = connect(url)
    listed = list_parked(tool)
    tool.close()
    assert [(row.offset, row.record_key) for row in listed][:2] == [(1, b"bob"), (3, b"bob")]
    assert listed[0].fault is not None
    assert (listed[0].fault.error, listed[0].fault.message) == ("ValueError", "negative amount -1")
    assert listed[1].fault is None, "it was not tried"
    sink.close()
    successor.close()


def test_a_key_that_an_operator_freed_is_applied_again(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "bob", -1))])
    tool = connect(url)
    tool.execute("DELETE FROM semel_parked")
    tool.close()
    sink.apply([a_slice(record(1, "bob", 4))])
    assert ledger.totals(url) == {"bob": (1, 4)}
    assert ledger.parked(url) == []
    sink.close()


def test_a_constraint_of_the_database_parks(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    assert sink.apply([a_slice(record(0, "ann", 5), record(1, "bob", 1_000_001), record(2, "ann", 1))]).parked == 1
    assert ledger.totals(url) == {"ann": (2, 6)}
    assert [row[1:3] for row in ledger.parked(url)] == [(1, b"bob")]
    sink.close()


def test_a_deferred_constraint_that_only_commit_reports_parks(deferring_url: str) -> None:
    tool = connect(deferring_url)
    tool.execute("CREATE TABLE parent (name TEXT PRIMARY KEY)")
    tool.execute("CREATE TABLE child (name TEXT REFERENCES parent (name) DEFERRABLE INITIALLY DEFERRED)")
    tool.execute("INSERT INTO parent VALUES ('ann')")
    tool.close()

    def handler(records: Sequence[Any], db: Any) -> None:
        db.executemany("INSERT INTO child VALUES (?)", [(item.key,) for item in records])

    sink = ledger.sink(deferring_url, handler)
    sink.take_over([claim()])
    applied = sink.apply([a_slice(record(0, "ann", 1), record(1, "bob", 1), record(2, "ann", 1), end=9)])
    assert (applied.records, applied.parked) == (3, 1)
    assert ledger.rows(deferring_url, "SELECT name FROM child") == [("ann",), ("ann",)]
    assert [row[1:3] for row in ledger.parked(deferring_url)] == [(1, b"bob")]
    assert ledger.position(deferring_url) == (9, 1)
    sink.close()


@pytest.mark.parametrize(
    "statement", ["COMMIT", "/* x */ rollback", "BEGIN", "INSERT INTO seen VALUES (1, 1, 'x'); COMMIT", "SAVEPOINT a"]
)
def test_a_handler_cannot_end_the_transaction(url: str, statement: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        db.execute(ledger.NOTE, (0, 0, "before"))
        db.execute(statement)

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    assert ledger.seen(url) == []
    assert ledger.parked(url) == [(0, 0, b"ann", "StatementRefused")]
    sink.close()


def test_a_handler_that_swallows_a_database_error_loses_nothing(url: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        for item in records:
            db.execute(ledger.NOTE, (item.partition, item.offset, item.key))
            try:
                db.execute("INSERT INTO counted VALUES (?, 1, ?)", (item.key, item.value))
            except Exception:
                continue

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1), record(1, "bob", 2_000_000))])
    # SQLite undoes the statement only and goes on; PostgreSQL undoes all, so the record is parked, not lost.
    kept = len(ledger.seen(url)) + len(ledger.parked(url))
    assert kept == 2
    assert ledger.totals(url) == {"ann": (1, 1)}
    assert ledger.position(url) == (2, 1)
    sink.close()


def test_db_is_dead_after_the_handler(url: str) -> None:
    kept: list[Any] = []

    def handler(records: Sequence[Any], db: Any) -> None:
        kept.append(db)

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    with pytest.raises(Exception, match="after the handler ended"):
        kept[0].execute(ledger.NOTE, (0, 0, "late"))
    sink.close()


def test_a_missing_table_waits_and_parks_nothing(url: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        db.execute("INSERT INTO not_there_yet VALUES (?)", (1,))

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    with pytest.raises(Unavailable, match="not_there_yet"):
        sink.apply([a_slice(record(0, "ann", 1))])
    assert ledger.parked(url) == []
    assert ledger.position(url) == (0, 1)
    tool = connect(url)
    tool.execute("CREATE TABLE not_there_yet (x INTEGER)")
    tool.close()
    assert sink.apply([a_slice(record(0, "ann", 1))]) == Applied(1, 0, 1)
    sink.close()
