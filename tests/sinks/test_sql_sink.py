"""Fence, compare-and-set, parking: the rules of the SQL sink on both databases."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from semel.databases import connect
from semel.sinks.contract import Applied, PartitionsLost, PartitionsStopped, Stop, StopReason, Unavailable
from semel.sinks.sql import list_parked
from tests.sinks import ledger
from tests.sinks.ledger import a_slice, claim, partition, record


def test_effects_and_position_are_there_together(url: str) -> None:
    sink = ledger.sink(url)
    assert sink.take_over([claim()]) == {partition(0): 0}
    assert sink.apply([a_slice(record(0, "ann", 5), record(1, "bob", 7), end=4)]) == Applied(2, 0, 1)
    assert ledger.totals(url) == {"ann": (1, 5), "bob": (1, 7)}
    assert ledger.position(url) == (4, 1)  # Past the marker behind the records.
    assert sink.position(partition(0)) == 4
    sink.close()


def test_the_same_batch_again_changes_nothing(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    batch = [a_slice(record(0, "ann", 5), record(1, "bob", 7))]
    sink.apply(batch)
    assert sink.apply(batch) == Applied()
    assert sink.apply([a_slice(record(1, "bob", 7), record(2, "ann", 1))]) == Applied(1, 0, 1)
    assert ledger.totals(url) == {"ann": (2, 6), "bob": (1, 7)}
    sink.close()


def test_a_new_row_starts_at_the_log_start(url: str) -> None:
    sink = ledger.sink(url)
    assert sink.take_over([claim(0, log_start=40), claim(1, log_start=7)]) == {partition(0): 40, partition(1): 7}
    assert ledger.position(url, 1) == (7, 1)
    sink.close()


def test_positions_move_without_effects(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    assert sink.apply([a_slice(end=3)]) == Applied(0, 0, 1)
    assert ledger.position(url) == (3, 1)
    sink.close()


def test_a_zombie_is_fenced_before_it_does_work(url: str) -> None:
    calls: list[int] = []

    def handler(records: Sequence[Any], db: Any) -> None:
        calls.append(len(records))
        ledger.count(records, db)

    zombie, owner = ledger.sink(url, handler), ledger.sink(url)
    zombie.take_over([claim(0), claim(1)])
    zombie.apply([a_slice(record(0, "ann", 5))])
    assert owner.take_over([claim(0)]) == {partition(0): 1}
    batch = [a_slice(record(1, "ann", 5)), a_slice(record(0, "bob", 2, 1), part=1)]
    with pytest.raises(PartitionsLost, match=r"taken over by semel .*owner epoch 2, ours was 1") as lost:
        zombie.apply(batch)
    assert set(lost.value.reasons) == {partition(0)}
    assert calls == [1], "the handler ran although the fence had to stop it first"
    assert zombie.position(partition(0)) is None
    # What is still the zombie's goes on with the very same batch.
    assert zombie.apply(batch) == Applied(1, 0, 1)
    owner.apply([a_slice(record(1, "ann", 5))])
    assert ledger.seen(url) == [(0, 0), (0, 1), (1, 0)]
    zombie.close()
    owner.close()


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


def test_a_recreated_topic_stops_and_changes_nothing(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 5))])
    other = uuid.uuid4()
    stop = sink.take_over([claim(topic_id=other)])[partition(0)]
    assert isinstance(stop, Stop)
    assert stop.reason is StopReason.TOPIC_RECREATED
    assert "offset 1" in stop.detail
    assert str(other) in stop.detail
    assert sink.apply([a_slice(record(1, "ann", 5))]) == Applied()
    assert ledger.position(url) == (1, 1)
    sink.close()


def test_another_cluster_is_another_position(url: str) -> None:
    here, there = ledger.sink(url), ledger.sink(url, cluster_id="other-cluster")
    here.take_over([claim()])
    here.apply([a_slice(record(0, "ann", 5))])
    assert there.take_over([claim()]) == {partition(0): 0}
    here.apply([a_slice(record(1, "ann", 5))])
    assert ledger.totals(url) == {"ann": (2, 10)}
    here.close()
    there.close()


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


def test_records_without_key_do_not_block_each_other(url: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        for item in records:
            if item.value < 0:
                raise ValueError("negative")
            db.execute(ledger.NOTE, (item.partition, item.offset, ""))

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, None, 1), record(1, None, -1), record(2, None, 2))])
    assert ledger.seen(url) == [(0, 0), (0, 2)]
    assert ledger.parked(url) == [(0, 1, None, "ValueError")]
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


def test_a_burst_of_poison_costs_two_calls_a_record_at_most(url: str) -> None:
    calls = 0

    def handler(records: Sequence[Any], db: Any) -> None:
        nonlocal calls
        calls += 1
        raise ValueError("always")

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    for start in range(0, 300, 100):
        sink.apply([a_slice(*(record(offset, f"k{offset}", 1) for offset in range(start, start + 100)))])
    assert calls == 300 + 3
    assert len(ledger.parked(url)) == 300
    calls = 0
    sink.apply([a_slice(*(record(300 + number, f"k{number}", 1) for number in range(100)))])
    assert calls == 0
    sink.close()


def test_full_parking_stops_the_partition_and_the_others_go_on(url: str) -> None:
    sink = ledger.sink(url, max_parked_keys=2)
    sink.take_over([claim(0), claim(1)])
    batch = [
        a_slice(*(record(offset, f"k{offset}", -1) for offset in range(3))),
        a_slice(record(0, "ann", 4, 1), part=1),
    ]
    with pytest.raises(PartitionsStopped, match="semel park list") as stopped:
        sink.apply(batch)
    assert stopped.value.stops[partition(0)].reason is StopReason.PARKING_FULL
    assert ledger.parked(url) == []
    assert ledger.position(url, 0) == (0, 1)
    sink.release(stopped.value.stops)
    assert sink.apply(batch) == Applied(1, 0, 1)
    assert ledger.totals(url) == {"ann": (1, 4)}
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


def test_a_handler_without_memory_is_tried_again_for_a_while(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        if any(record.value == 7 for record in records):
            raise MemoryError
        ledger.count(records, db)

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    batch = [a_slice(record(0, "ann", 1), record(1, "bob", 7))]
    for _ in range(2):
        with pytest.raises(Unavailable, match="MemoryError"):
            sink.apply(batch)
    assert ledger.parked(url) == []
    monkeypatch.setattr("semel.processing.shortage.PATIENCE_SECONDS", 0.0)
    sink.apply(batch)
    assert [row[1] for row in ledger.parked(url)] == [1]
    assert ledger.seen(url) == [(0, 0)]
    sink.close()


def test_a_foreign_service_that_is_down_waits_and_parks_nothing(url: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        raise ConnectionRefusedError("the price service")

    sink = ledger.sink(url, handler)
    sink.take_over([claim()])
    with pytest.raises(Unavailable, match="the price service"):
        sink.apply([a_slice(record(0, "ann", 1))])
    assert ledger.parked(url) == []
    sink.close()
