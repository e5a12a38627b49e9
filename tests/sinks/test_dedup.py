"""Copies of messages: known by version or by id, on both databases, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from semel import App, Inbox, Version, history
from semel.env import Env
from semel.errors import ConfigurationError
from semel.ops.guarantees import edges_of
from semel.processing.topics import DataError
from semel.prove.check.ledgers import read_ledger, read_parked
from semel.sinks.contract import Applied, Unavailable
from semel.sinks.dedup import DAY_MS, check_window, version_of
from semel.sinks.sql import SqlSink, inbox
from semel.types import Record
from tests.sinks import child, ledger
from tests.sinks.ledger import a_slice, claim
from tests.sinks.test_crashes import start
from tests.sinks.test_engine import Run

NOW_MS = 1_700_000_000_000
TODAY = NOW_MS // DAY_MS


def uuid7(at_ms: int, number: int) -> str:
    """A UUIDv7 (RFC 9562, section 5.7) of this time."""
    return str(uuid.UUID(int=at_ms << 80 | 7 << 76 | 2 << 62 | number))


def message(offset: int, key: str | None, value: int, number: int, *, at_ms: int = NOW_MS, part: int = 0) -> Record:
    """A record at any offset that brings message `number`."""
    plain = ledger.record(offset, key, value, part)
    return plain._replace(headers=(("semel-id", uuid7(at_ms, number).encode()),))


@dataclass
class Clock:
    now_ms: int = NOW_MS

    def __call__(self) -> int:
        return self.now_ms


def inbox_sink(
    url: str,
    clock: Clock | None = None,
    handler: Any = ledger.count,
    *,
    identity: str = "shop.totals",
    **changes: Any,
) -> SqlSink:
    options = {"dedup": Inbox()} | changes
    spec = ledger.spec(url, handler, **options)
    made = SqlSink(spec, identity, ledger.CLUSTER_ID, env=Env(wall_ms=clock or Clock()), create_tables=True)
    made.open()
    made.take_over([claim(0), claim(1)])
    return made


def test_a_message_is_applied_once_however_often_it_comes(url: str) -> None:
    sink = inbox_sink(url)
    first = [message(0, "ann", 1, 1), message(1, "bob", 2, 2)]
    assert sink.apply([a_slice(*first)]) == Applied(2, 0, 1, 0)
    # At other offsets, in one batch with a new one, twice in one batch, and in another partition.
    again = [message(2, "bob", 2, 2), message(3, "ann", 1, 1), message(4, "ann", 4, 3), message(5, "ann", 4, 3)]
    assert sink.apply([a_slice(*again), a_slice(message(0, "ann", 1, 1, part=1), part=1)]) == Applied(5, 0, 1, 4)
    assert ledger.seen(url) == [(0, 0), (0, 1), (0, 4)]
    assert ledger.totals(url) == {"ann": (2, 5), "bob": (1, 2)}
    assert ledger.position(url) == (6, 1), "copies are passed over, the position is behind them"
    sink.close()


def test_copies_are_known_to_the_next_owner_and_after_a_new_connection(url: str) -> None:
    inbox_sink(url).apply([a_slice(message(0, "ann", 1, 1))])
    heir = inbox_sink(url)
    assert heir.apply([a_slice(message(1, "ann", 1, 1))]) == Applied(1, 0, 1, 1)
    heir._database.close()
    assert heir.apply([a_slice(message(2, "ann", 1, 1), message(3, "ann", 3, 2))]) == Applied(2, 0, 1, 1)
    assert ledger.seen(url) == [(0, 0), (0, 3)]
    heir.close()


def test_an_id_of_a_record_that_failed_is_not_kept_and_its_copy_is_applied_once(url: str) -> None:
    """The first copy is parked; the second has another key, so nothing holds it; the release then finds it done."""
    handler: dict[str, Callable[..., None]] = {"now": ledger.count}
    sink = inbox_sink(url, handler=lambda records, db: handler["now"](records, db))
    assert sink.apply([a_slice(message(0, "bob", -1, 1), message(1, "ann", 1, 2))]) == Applied(2, 1, 1, 0)
    assert sink.apply([a_slice(message(2, "eve", 5, 1))]) == Applied(1, 0, 1, 0)
    handler["now"] = ledger.count_all
    ledger.ask(url, "retry", 0)
    sink.carry_out()
    assert ledger.outcome(url).released == [0]
    assert ledger.parked(url) == []
    assert ledger.seen(url) == [(0, 1), (0, 2)]
    sink.close()


def test_a_released_message_is_known_afterwards(url: str) -> None:
    handler: dict[str, Callable[..., None]] = {"now": ledger.count}
    sink = inbox_sink(url, handler=lambda records, db: handler["now"](records, db))
    sink.apply([a_slice(message(0, "bob", -1, 1), message(1, "bob", 2, 2))])
    sink.close()
    sink = inbox_sink(url, handler=lambda records, db: handler["now"](records, db))
    handler["now"] = ledger.count_all
    ledger.ask(url, "retry", 0)
    sink.carry_out()
    assert ledger.in_order(url) == [("bob", 0), ("bob", 1)]
    assert sink.apply([a_slice(message(2, "bob", 1, 1), message(3, "bob", 2, 2))]) == Applied(2, 0, 1, 2)
    sink.close()


def days_kept(url: str) -> list[int]:
    found = {day for (day,) in ledger.rows(url, "SELECT day FROM semel_inbox")}
    if url.startswith("postgres"):
        found |= {int(name.rpartition("_")[2]) for (name,) in ledger.rows(url, inbox._PARTITIONS)}
    return sorted(found)


def test_what_is_past_the_window_is_parked_and_its_days_are_dropped(url: str) -> None:
    clock = Clock()
    sink = inbox_sink(url, clock)
    sink.apply([a_slice(message(0, "ann", 1, 1), message(1, "bob", 2, 2, at_ms=NOW_MS - 3 * DAY_MS))])
    assert days_kept(url) == [TODAY - 3, TODAY]
    clock.now_ms += 12 * DAY_MS
    sink.apply([a_slice(message(2, "eve", 1, 3, at_ms=clock.now_ms))])
    assert days_kept(url) == [TODAY, TODAY + 12], "bob's day is past its window"
    # ann's copy is known; bob's is not, and cannot be; the next of bob waits behind it.
    late = [message(3, "ann", 1, 1), message(4, "bob", 2, 2, at_ms=NOW_MS - 3 * DAY_MS), message(5, "bob", 7, 4)]
    assert sink.apply([a_slice(*late)]) == Applied(3, 2, 1, 1)
    assert ledger.parked(url) == [(0, 4, b"bob", "Unprovable"), (0, 5, b"bob", None)]
    assert ledger.totals(url) == {"ann": (1, 1), "bob": (1, 2), "eve": (1, 1)}
    # A retry does not apply it; the operator who says so does, and what waits behind it follows.
    ledger.ask(url, "retry", 4)
    sink.carry_out()
    assert [row[1] for row in ledger.parked(url)] == [4, 5]
    ledger.ask(url, "assume", 4, name="c2")
    sink.carry_out()
    assert ledger.outcome(url, "c2").released == [4, 5]
    assert ledger.totals(url)["bob"] == (3, 11)
    sink.close()


def test_a_floor_that_rose_meanwhile_is_seen_in_the_transaction(url: str) -> None:
    """An owner decoded a record while its day was still kept; another process dropped the day before the id was in."""
    clock = Clock()
    sink = inbox_sink(url, clock)
    old = message(0, "bob", 2, 1, at_ms=NOW_MS - 13 * DAY_MS)
    sink.apply([a_slice(old)])
    other = inbox_sink(url, Clock(NOW_MS + 5 * DAY_MS), identity="shop.other")
    other.apply([a_slice(end=1)])  # Its calendar is five days on: it drops bob's day.
    heir = inbox_sink(url, clock)
    heir._guard._floor_ms = 0  # type: ignore[union-attr]  # As if it had been read before the floor rose.
    with pytest.raises(Unavailable, match="5 transactions in a row"):
        heir.apply([a_slice(message(1, "bob", 2, 1, at_ms=NOW_MS - 13 * DAY_MS))])
    # Nothing was applied; the engine reads on from the position, and now the floor is known.
    assert ledger.seen(url) == [(0, 0)]
    assert heir.apply([a_slice(message(1, "bob", 2, 1, at_ms=NOW_MS - 13 * DAY_MS))]) == Applied(1, 1, 1, 0)
    for one in (sink, other, heir):
        one.close()


def test_a_day_is_dropped_in_pieces_where_it_is_no_partition(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "DELETES_AT_ONCE", 3)
    monkeypatch.setattr(inbox, "DELETES_IN_A_ROW", 2)
    clock = Clock()
    sink = inbox_sink(url, clock)
    sink.apply([a_slice(*(message(offset, "ann", 1, offset) for offset in range(10)))])
    clock.now_ms += 20 * DAY_MS
    left = [10]
    for offset in range(10, 14):
        sink.apply([a_slice(message(offset, "ann", 1, offset, at_ms=clock.now_ms))])
        [(count,)] = ledger.rows(url, f"SELECT COUNT(*) FROM semel_inbox WHERE day = {TODAY}")
        left.append(count)
    assert left == ([10, 0, 0, 0, 0] if url.startswith("postgres") else [10, 4, 0, 0, 0])
    assert len(ledger.rows(url, "SELECT * FROM semel_inbox")) == 4
    sink.close()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (ledger.record(0, "ann", 1), "no header semel-id"),
        (ledger.record(0, "ann", 1)._replace(headers=(("semel-id", b"a"), ("semel-id", b"b"))), "2 header"),
        (ledger.record(0, "ann", 1)._replace(headers=(("semel-id", str(uuid.UUID(int=4)).encode()),)), "no UUIDv7"),
        (ledger.record(0, "ann", 1)._replace(headers=(("semel-id", b"\xff"),)), "no text"),
        (message(0, "ann", 1, 1, at_ms=NOW_MS + 3 * DAY_MS), "a clock is wrong"),
    ],
)
def test_a_record_without_a_usable_id_is_parked_and_makes_no_day(url: str, record: Record, said: str) -> None:
    sink = inbox_sink(url)
    assert sink.apply([a_slice(record)]) == Applied(1, 1, 1, 0)
    [(text,)] = ledger.rows(url, "SELECT error_message FROM semel_parked")
    assert said in text
    assert days_kept(url) == []
    sink.close()


def test_ids_of_ones_own_and_their_times(url: str) -> None:
    dedup = Inbox(id=lambda record: f"evt-{record.value}", at=lambda record: record.timestamp_ms)
    sink = inbox_sink(url, dedup=dedup)
    sink.apply([a_slice(ledger.record(0, "ann", 5), ledger.record(1, "ann", 6), ledger.record(2, "bob", 5))])
    assert ledger.seen(url) == [(0, 0), (0, 1)]
    sink.close()


def test_a_sink_with_a_past_says_from_when_on_ids_are_known(url: str) -> None:
    plain = ledger.sink(url)
    plain.take_over([claim()])
    plain.apply([a_slice(message(0, "ann", 1, 1))])
    plain.close()
    with pytest.raises(ConfigurationError, match="has applied 1 records without an inbox"):
        inbox_sink(url)
    assert ledger.rows(url, "SELECT * FROM semel_inbox_floor") == [], "it was refused and changed nothing"
    sink = inbox_sink(url, dedup=Inbox(since=datetime.fromtimestamp(NOW_MS / 1000, UTC)))
    assert sink.apply([a_slice(message(1, "ann", 1, 1, at_ms=NOW_MS - 1))]) == Applied(1, 1, 1, 0)
    assert sink.apply([a_slice(message(2, "eve", 1, 2))]) == Applied(1, 0, 1, 0)
    sink.close()
    inbox_sink(url, dedup=Inbox(since=datetime.fromtimestamp(NOW_MS / 1000, UTC))).close()


# --- Versions ---


def version_sink(url: str, **changes: Any) -> SqlSink:
    made = ledger.sink(url, dedup=Version(lambda record: record.value), **changes)
    made.take_over([claim(0), claim(1)])
    return made


def test_what_is_not_newer_than_its_key_is_passed_over(url: str) -> None:
    sink = version_sink(url)
    batch = [("ann", 1), ("ann", 3), ("ann", 2), ("bob", 1), ("ann", 3), ("ann", 4)]
    done = sink.apply([a_slice(*(ledger.record(offset, key, value) for offset, (key, value) in enumerate(batch)))])
    assert done == Applied(6, 0, 1, 2)
    assert ledger.seen(url) == [(0, 0), (0, 1), (0, 3), (0, 5)]
    sink.close()
    heir = version_sink(url)
    assert heir.apply([a_slice(ledger.record(6, "ann", 4), ledger.record(7, "bob", 2))]) == Applied(2, 0, 1, 1)
    assert heir.apply([a_slice(ledger.record(0, "ann", 9, 1), part=1)]) == Applied(1, 0, 1, 0)
    assert heir.apply([a_slice(ledger.record(8, "ann", 8))]) == Applied(1, 0, 1, 1), "another partition was ahead"
    heir.close()


def test_a_version_that_failed_is_not_kept(url: str) -> None:
    handler: dict[str, Callable[..., None]] = {"now": ledger.count}
    sink = ledger.sink(url, lambda records, db: handler["now"](records, db), dedup=Version(lambda r: abs(r.value)))
    sink.take_over([claim()])
    sink.apply([a_slice(ledger.record(0, "ann", -5), ledger.record(1, "ann", 6))])
    assert ledger.rows(url, "SELECT * FROM semel_version") == []
    handler["now"] = ledger.count_all
    ledger.ask(url, "retry", 0)
    sink.carry_out()
    assert ledger.totals(url) == {"ann": (2, 11)}
    assert sink.apply([a_slice(ledger.record(2, "ann", 5))]) == Applied(1, 0, 1, 1)
    sink.close()


def test_a_record_that_tells_no_version_is_parked(url: str) -> None:
    sink = ledger.sink(url, dedup=Version("number"))
    sink.take_over([claim()])
    assert sink.apply([a_slice(ledger.record(0, "ann", 5), ledger.record(1, None, 5))]) == Applied(2, 2, 1, 0)
    found = [text for (text,) in ledger.rows(url, "SELECT error_message FROM semel_parked ORDER BY record_offset")]
    assert "no 'number'" in found[0]
    assert "no key" in found[1]
    sink.close()


def test_versions_are_read_from_structs_and_mappings() -> None:
    @dataclass
    class Row:
        value: Any

    @dataclass
    class Order:
        version: Any

    assert version_of(Version("version"), Row(Order(3))) == 3
    assert version_of(Version("version"), Row({"version": 4})) == 4
    for bad in (Order(True), Order("5"), Order(2**63), {"other": 1}, None):
        with pytest.raises(DataError):
            version_of(Version("version"), Row(bad))


# --- Under kill -9 ---


@pytest.mark.parametrize("nth", [1, 4])
@pytest.mark.parametrize("point", ["sink.inbox_written", "sink.before_db_commit", "sink.after_db_commit"])
def test_a_kill_anywhere_leaves_each_message_once(url: str, point: str, nth: int) -> None:
    """Every message stands in the topic three times: at another offset, and in the other partition."""
    process = start(url, f"{point}:kill:{nth}", DEDUP="inbox")
    assert process.wait(30) == -signal.SIGKILL, "the failpoint was not reached"
    process.communicate()
    child.work_copies(url)
    [(messages, most)] = ledger.rows(url, "SELECT COUNT(*), MAX(times) FROM counted")
    assert (messages, most) == (child.MESSAGES, 1)
    assert len(ledger.seen(url)) == child.MESSAGES
    assert [ledger.position(url, part)[0] for part in range(child.PARTITIONS)] == [
        len(child.copies(part)) for part in range(child.PARTITIONS)
    ]


def test_a_kill_between_floor_and_drop_is_made_good(url: str) -> None:
    sink = inbox_sink(url)
    sink.apply([a_slice(message(0, "ann", 1, 1))])
    sink.close()
    process = start(url, "sink.inbox_floor_raised:kill:1", DEDUP="inbox", NOW_MS=str(NOW_MS + 20 * DAY_MS))
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()
    assert days_kept(url) == [TODAY], "the floor is raised, the day is still there"
    sink = inbox_sink(url, Clock(NOW_MS + 20 * DAY_MS))
    assert sink.apply([a_slice(message(1, "ann", 1, 1))]) == Applied(1, 1, 1, 0)
    assert days_kept(url) == []
    sink.close()


# --- What is said ---


def test_a_window_that_is_too_short_is_refused_with_the_numbers() -> None:
    week = 7 * DAY_MS
    check_window(Inbox(), "shop.totals", "purchases", week)
    with pytest.raises(ConfigurationError, match=r"window_days=12.* 7 retention.ms \+ 5 .* = 13 days"):
        check_window(Inbox(window_days=12), "shop.totals", "purchases", week)
    with pytest.raises(ConfigurationError, match="for ever"):
        check_window(Inbox(), "shop.totals", "purchases", -1)
    with pytest.raises(ConfigurationError, match="= 6 days"):
        Inbox(window_days=4)
    for bad in (
        {"window_days": 0},
        {"window_days": 401},
        {"parked_days": -1},
        {"id": "x"},
        {"since": NOW_MS},
    ):
        with pytest.raises(ConfigurationError):
            Inbox(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="name of a field"):
        Version("not a name")


def test_the_guarantee_report_shows_how_messages_are_known() -> None:
    app = App("shop")
    topic, database = app.topic("purchases", value=int), app.database("sqlite:///x.db")
    for name, dedup in (("plain", None), ("newest", Version("v")), ("once", Inbox())):
        app.sink(topic, database, dedup=dedup, name=name)(ledger.count)
    said = [edge.dedup for edge in edges_of(app, 2)]
    assert said[0] == "position row"
    assert "version guard" in said[1]
    assert "kept 14 days >= the topic's retention + 5 parked + 1 upstream days" in said[2]
    with pytest.raises(ConfigurationError, match="neither Version"):
        app.sink(topic, database, dedup="id", name="bad")(ledger.count)  # type: ignore[arg-type]


def test_copies_are_in_the_ledger_apart_so_that_a_proof_counts_them_as_done(
    url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.start(str(tmp_path), "worker", 0)
    try:
        sink = inbox_sink(url)
        sink.apply([a_slice(message(0, "ann", 1, 1), message(1, "ann", 1, 1), message(2, "bob", 2, 2))])
        sink.close()
    finally:
        history.stop()
    assert [list(row.offsets) for row in read_ledger(url)] == [[0, 2]]
    assert [tuple(row) for row in read_parked(url)] == [("shop.totals", "purchases", 0, 1)]


@pytest.mark.parametrize(("kept_days", "said"), [(30, "30 retention.ms"), (None, ""), (7, "")])
def test_a_sink_whose_window_is_too_short_does_not_start(tmp_path: Path, kept_days: int | None, said: str) -> None:
    async def start_and_stop() -> None:
        run = Run(f"sqlite:///{tmp_path}/sink.db", tmp_path, dedup=Inbox())
        run.source.kept_ms = kept_days and kept_days * DAY_MS
        task = asyncio.create_task(run.engine.run())
        if said:
            with pytest.raises(ConfigurationError, match=said):
                await task
            assert not (tmp_path / "sink.db").exists(), "it was refused before the database was touched"
            return
        await run.until(lambda: hasattr(run, "sink") and not run.engine.problems, "the sink works")
        await run.engine.drain()
        await task

    asyncio.run(start_and_stop())
