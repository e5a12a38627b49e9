"""Keyed state as a handler and a restart find it, over tables in memory and on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from semel.app import App
from semel.disk import disk
from semel.env import Env
from semel.errors import AbortTransaction, OutcomeUnknown
from semel.processing import stores as stores_module
from semel.processing.component import Component
from semel.processing.disktables import DiskTable, DiskTables
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.recent import MISSING, Recent
from semel.processing.tables import Entry, MemoryTables, Tables, TableTrouble
from semel.settings import Settings
from semel.types import Record, TopicPartition
from tests.processing.fake_kafka import FakeKafka

SETTINGS = Settings(instance="test", commit_interval_ms=10)
CHANGES = TopicPartition("a.semel.state.counts", 0)


@pytest.fixture(autouse=True)
def _quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_module, "STATE_FRESH_SECONDS", 0.0)


@pytest.fixture(params=["memory", "disk"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Tables:
    return MemoryTables() if request.param == "memory" else DiskTables(tmp_path, "a", uuid4)


def kafka_with(*records: tuple[str, int]) -> FakeKafka:
    kafka = FakeKafka(**{"in": 1, "out": 1, "a__semel__state__counts": 1, "a__semel__park__in": 1})
    feed(kafka, *records)
    return kafka


def feed(kafka: FakeKafka, *records: tuple[str, int]) -> None:
    """(key, time): the time is the record's, in milliseconds."""
    log = kafka.logs[TopicPartition("in", 0)]
    log += [Record("in", 0, len(log) + n, ms, key.encode(), b"1", ()) for n, (key, ms) in enumerate(records)]


def component(handler: Callable[..., Any], **options: Any) -> Component:
    app = App("a")
    source = app.topic("in", key=str, value=int)
    target = app.topic("out", key=str, value=list[Any])
    counts = app.state("counts", key=str, value=int, **options)
    app.processor(source, state=counts, name="p")(lambda record, counts: handler(record, counts, target))
    return app.components()[0]


def count(record: Any, counts: Any, target: Any) -> Iterator[Any]:
    number = counts.get(record.key, 0) + 1
    yield counts.put(record.key, number)
    yield target.record(record.key, [record.key, number])


class Trace:
    """What became of a run: the outputs, and how many records were read to restore."""

    def __init__(self, kafka: FakeKafka, metrics: Metrics) -> None:
        self.outputs = [eval(value or b"") for value in kafka.values("out")]
        self.restored = metrics.counter("semel_restored_records_total", "", ("component",)).value(component="p")


def run(kafka: FakeKafka, what: Component, tables: Tables | None, *, dies: bool = False) -> Trace:
    """A process that works off the input. `dies`: it closes nothing, and its tables are found as they are."""
    metrics = Metrics()
    engine = Engine(what, "unused", SETTINGS, Env(), metrics, kafka=kafka, tables=tables)

    async def test() -> None:
        task = asyncio.create_task(engine.run())
        async with asyncio.timeout(20):
            while kafka.lag("in") or engine._handling.pending:
                await asyncio.sleep(0.001)
                assert not task.done()
            if not dies:
                await engine.drain()
                await task
                return
        for store in engine._stores._stores.values():  # As after kill -9: what is in memory only is gone.
            table, anything = store._table, store  # type: Any, Any
            if isinstance(table, DiskTable):
                table.close()
            anything.close = lambda: None
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task

    asyncio.run(test())
    return Trace(kafka, metrics)


def numbers(kafka: FakeKafka, key: str) -> list[int]:
    return [number for name, number in Trace(kafka, Metrics()).outputs if name == key]


# --- Restarts ---


def test_a_restart_reads_the_difference_only(tables: Tables) -> None:
    kafka = kafka_with(*[(f"k{n % 7}", n) for n in range(70)])
    assert run(kafka, component(count), tables).restored == 0
    feed(kafka, *[(f"k{n % 7}", n) for n in range(70)])
    assert run(kafka, component(count), tables).restored == 0
    assert numbers(kafka, "k3") == list(range(1, 21))


def test_what_a_killed_process_had_not_written_is_read_from_the_changelog(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = kafka_with(*[(f"k{n % 7}", n) for n in range(70)])
    run(kafka, component(count), tables)
    monkeypatch.setattr(stores_module, "STATE_FRESH_SECONDS", 1e9)
    feed(kafka, *[("k3", n) for n in range(5)])
    run(kafka, component(count), tables, dies=True)
    feed(kafka, ("k3", 1), ("k4", 1))
    assert run(kafka, component(count), tables).restored >= 1
    assert numbers(kafka, "k3") == list(range(1, 17))
    assert numbers(kafka, "k4") == list(range(1, 12))


def test_a_commit_that_nobody_heard_of_is_in_the_state_and_an_aborted_one_is_not(tables: Tables) -> None:
    kafka = kafka_with(*[("k", n) for n in range(20)])
    kafka.fail("after_end", OutcomeUnknown("cut"), 1)
    kafka.fail("end", AbortTransaction("abort"), 1)
    run(kafka, component(count), tables)
    feed(kafka, ("k", 1))
    run(kafka, component(count), tables)
    assert numbers(kafka, "k") == list(range(1, 22))


def test_a_changelog_that_was_made_anew_brings_back_nothing_of_the_old_one(tables: Tables) -> None:
    kafka = kafka_with(("k", 1), ("k", 2))
    run(kafka, component(count), tables)
    other = kafka_with(("k", 1))
    other.identities["a.semel.state.counts"] = "fake/made anew"
    run(other, component(count), tables)
    assert numbers(other, "k") == [1]


def test_after_a_restart_of_the_machine_everything_is_restored(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = kafka_with(*[(f"k{n}", n) for n in range(30)])
    run(kafka, component(count), tables)
    monkeypatch.setattr(disk, "boot_id", lambda: "another start")
    feed(kafka, ("k3", 1))
    assert run(kafka, component(count), tables).restored == 30
    assert numbers(kafka, "k3") == [1, 2]


def test_a_deleted_key_whose_tombstone_is_gone_does_not_come_back(tables: Tables) -> None:
    def handler(record: Any, counts: Any, target: Any) -> Iterator[Any]:
        yield counts.delete("k") if record.key == "delete" else counts.put(record.key, 1)
        yield target.record(record.key, [record.key, counts.get("k", 0)])

    kafka = kafka_with(("k", 1), ("other", 2))
    run(kafka, component(handler), tables)
    feed(kafka, ("delete", 3), ("more", 4))
    run(kafka, component(handler), None)  # On another host.
    log = kafka.logs[CHANGES]  # Then the changelog is compacted, and the time of its tombstones is over.
    gone = [at for at, record in enumerate(log) if record is not None and record.key == b"k"]
    assert len(gone) == 2
    for at in gone:
        log[at] = None
    kafka.tombstones_ms = "0"
    feed(kafka, ("last", 5))
    run(kafka, component(handler), tables)
    assert Trace(kafka, Metrics()).outputs[-1] == ["last", 0]


def test_a_damaged_table_is_restored_while_the_handler_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = DiskTables(tmp_path, "a", uuid4)
    kafka = kafka_with(*[(f"key-{n:03d}", n) for n in range(200)])
    run(kafka, component(count), tables)
    [path] = tmp_path.glob("state/a/counts/0/*.db")
    data = bytearray(path.read_bytes())
    data[data.index(b"key-1231") + 7] = ord("7")
    path.write_bytes(data)
    feed(kafka, *[(f"key-{n:03d}", n) for n in range(200)])
    run(kafka, component(count), tables)
    assert [numbers(kafka, f"key-{n:03d}") for n in range(200)] == [[1, 2]] * 200
    assert "is not as it was written" in caplog.text
    assert not path.exists()


def test_a_table_that_cannot_be_written_holds_up_the_work_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, real, tries = DiskTables(tmp_path, "a", uuid4), DiskTable.write, [0]

    def full(self: DiskTable, *arguments: Any) -> None:
        tries[0] += 1
        if tries[0] in (2, 3, 5):
            raise TableTrouble("the disk is full")
        real(self, *arguments)

    monkeypatch.setattr(DiskTable, "write", full)
    kafka = kafka_with()
    for start in range(0, 60, 10):
        feed(kafka, *[(f"k{n % 3}", n) for n in range(start, start + 10)])
        run(kafka, component(count), tables)
    assert tries[0] > 5
    assert numbers(kafka, "k0") == list(range(1, 21))


# --- What a handler may do ---


def test_keys_with_a_prefix_come_in_order_over_all_layers(tables: Tables) -> None:
    def handler(record: Any, counts: Any, target: Any) -> Iterator[Any]:
        if record.key.startswith("?"):
            yield counts.put("a/new", 9)
            yield counts.delete("a/2")
            yield target.record("?", [list(item) for item in counts.items(record.key[1:])])
        else:
            yield counts.put(record.key, len(record.key))

    kafka = kafka_with(("b/1", 1), ("a/2", 1), ("a/10", 1), ("a", 1), ("a/3", 1), ("ä/1", 1))
    run(kafka, component(handler), tables)
    feed(kafka, ("a/1", 1), ("?a/", 1), ("?", 1), ("?x", 1))
    run(kafka, component(handler), tables)
    prefixed, everything, nothing = Trace(kafka, Metrics()).outputs
    assert prefixed == [["a/1", 3], ["a/10", 4], ["a/3", 3], ["a/new", 9]]
    assert [key for key, _ in everything] == ["a", "a/1", "a/10", "a/3", "a/new", "b/1", "ä/1"]
    assert nothing == []


def test_many_keys_are_walked_page_by_page(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_module, "PAGE_ROWS", 3)

    def handler(record: Any, counts: Any, target: Any) -> Iterator[Any]:
        if record.key == "?":
            yield target.record("?", [key for key, _ in counts.items("k")])
        yield counts.put(record.key, 1)

    kafka = kafka_with(*[(f"k{n * 7 % 20:02d}", n) for n in range(20)], ("?", 1))
    run(kafka, component(handler), tables)
    feed(kafka, ("?", 1))
    run(kafka, component(handler), tables)
    assert Trace(kafka, Metrics()).outputs == [[f"k{n:02d}" for n in range(20)]] * 2


def test_a_value_lives_by_the_time_of_records_and_not_by_any_clock(tables: Tables) -> None:
    kafka = kafka_with(("k", 10_000), ("k", 10_999), ("j", 11_998), ("k", 11_999), ("k", 11_000), ("k", 1_000_000))
    run(kafka, component(count, ttl_seconds=1.0), tables)
    assert Trace(kafka, Metrics()).outputs == [["k", 1], ["k", 2], ["j", 1], ["k", 1], ["k", 2], ["k", 1]]
    feed(kafka, ("k", 1_000_999), ("k", 5_000_000))
    run(kafka, component(count, ttl_seconds=1.0), tables)
    assert numbers(kafka, "k")[-2:] == [2, 1], "the time of a value outlives a restart"


def test_what_is_over_is_taken_out_with_tombstones(tables: Tables) -> None:
    kafka = kafka_with(*[(f"k{n:04d}", 1_000 + n) for n in range(2_500)])
    run(kafka, component(count, ttl_seconds=1.0), tables)
    feed(kafka, *[("late", 100_000 + n) for n in range(4)])
    run(kafka, component(count, ttl_seconds=1.0), tables)
    last = {record.key: record.value for record in kafka.records(CHANGES.topic)}
    assert [key for key, value in last.items() if value is not None] == [b"late"]
    assert len(last) == 2_501
    fresh = kafka_with()
    fresh.logs[CHANGES] = kafka.logs[CHANGES]
    feed(fresh, ("k0001", 100_001))
    run(fresh, component(count, ttl_seconds=1.0), None)
    assert numbers(fresh, "k0001") == [1]


def test_a_record_that_would_break_a_limit_is_parked_and_others_go_on(tables: Tables) -> None:
    def handler(record: Any, counts: Any, target: Any) -> Iterator[Any]:
        yield counts.put(record.key, 1)
        yield target.record(record.key, [record.key, 1])

    limited = component(handler, bytes_max=40)
    kafka = kafka_with(("0123456789", 1), ("1123456789", 1), ("2123456789", 1), ("3123456789", 1), ("0123456789", 2))
    run(kafka, limited, tables)
    feed(kafka, ("4", 1), ("5", 1), ("6", 1), ("7", 1))
    run(kafka, limited, tables)
    done = [name for name, _ in Trace(kafka, Metrics()).outputs]
    assert done == ["0123456789", "1123456789", "2123456789", "0123456789", "4", "5", "6"]
    parked = {record.key: dict(record.headers) for record in kafka.records("a.semel.park.in")}
    assert set(parked) == {b"3123456789", b"7"}
    assert b"the limit is 40" in (parked[b"7"]["semel-park-message"] or b"")


def test_a_value_above_its_limit_is_the_records_fault(tables: Tables) -> None:
    def handler(record: Any, counts: Any, target: Any) -> Iterator[Any]:
        yield counts.put(record.key, 12345)
        yield target.record(record.key, [record.key, 1])

    kafka = kafka_with(("123456", 1), ("12345", 1))
    run(kafka, component(handler, value_bytes_max=10), tables)
    assert Trace(kafka, Metrics()).outputs == [["12345", 1]]
    assert [record.key for record in kafka.records("a.semel.park.in")] == [b"123456"]


# --- What is remembered beside the tables ---


def test_what_is_asked_for_stays_and_the_rest_goes_within_the_limit() -> None:
    recent = Recent(100_000)
    recent.put(b"hot", Entry(b"1", 1))
    recent.put(b"none", None)
    assert recent.get(b"none") is None
    for number in range(5_000):
        recent.put(b"%d" % number, Entry(b"x" * 50, 1))
        assert recent.get(b"hot") == Entry(b"1", 1)
    assert recent.get(b"0") is MISSING
    assert len(recent._young) + len(recent._old) < 400
    recent.update({b"hot": None})
    assert recent.get(b"hot") is None
