"""The audit ledger and the history of a sink's transactions: they say what the database says, also when it is hard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semel import history
from semel.databases import connect
from semel.databases.database import is_missing_table
from semel.errors import ConfigurationError, OutcomeUnknown
from semel.history import Batch, BatchPart, Event, Torn
from semel.sinks.contract import PartitionsLost, Unavailable
from semel.sinks.sql import migrate
from tests.services.postgres import PostgresServer
from tests.sinks import child, ledger
from tests.sinks.cutting_proxy import CuttingProxy, When
from tests.sinks.ledger import TOPIC, a_slice, claim, partition, record
from tests.sinks.test_commit_outcome import behind

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def events() -> Iterator[list[Event]]:
    with history.captured() as found:
        yield found


def audit(url: str) -> list[tuple[str, int, int, list[int]]]:
    """attempt, partition, owner epoch, offsets: of every call of the handler, in the order of the ledger."""
    found = ledger.rows(url, "SELECT attempt, sink, topic, part, owner_epoch, offsets FROM semel_audit ORDER BY seq")
    assert {row[1:3] for row in found} <= {("shop.totals", TOPIC.name)}
    return [(attempt, part, epoch, json.loads(offsets)) for attempt, _, _, part, epoch, offsets in found]


def told(events: list[Event]) -> dict[str, tuple[list[BatchPart], list[str]]]:
    """By attempt: what it is, and its outcomes in the order in which they became known."""
    found: dict[str, tuple[list[BatchPart], list[str]]] = {}
    for event in events:
        assert isinstance(event, Batch)
        if event.type == "invoke":
            assert event.a not in found
            assert event.component == "shop.totals"
            found[event.a] = (event.parts, [])
        else:
            found[event.a][1].append(event.type)
    return found


def check_ledger(url: str, attempts: dict[str, tuple[list[BatchPart], list[str]]]) -> None:
    """The ledger has the calls of the attempts that are committed, and of no others."""
    wanted: Counter[tuple[str, int, int]] = Counter()
    for a, (parts, outcomes) in attempts.items():
        if outcomes and outcomes[-1] == "ok":
            wanted.update((a, part.partition, offset) for part in parts for offset in part.handed)
    found = Counter((a, part, offset) for a, part, _, offsets in audit(url) for offset in offsets)
    assert found == wanted


def test_a_batch_is_told_and_its_one_call_is_in_the_ledger(url: str, events: list[Event]) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim(0), claim(1)])
    sink.apply([a_slice(record(0, "ann", 1), record(2, "bob", 1), end=5), a_slice(record(7, "eve", 1, 1), part=1)])
    sink.apply([a_slice(end=9)])
    sink.close()
    first, second = told(events).items()
    assert first[1] == (
        [BatchPart(TOPIC.name, 0, 1, 0, 5, [0, 2], []), BatchPart(TOPIC.name, 1, 1, 0, 8, [7], [])],
        ["ok"],
    )
    assert second[1] == ([BatchPart(TOPIC.name, 0, 1, 5, 9, [], [])], ["ok"])
    assert audit(url) == [(first[0], 0, 1, [0, 2]), (first[0], 1, 1, [7])]


def test_parked_records_were_handed_to_nobody(url: str, events: list[Event]) -> None:
    """The whole batch fails, then each record has a call of its own, and the refused one's leaves no trace."""
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1), record(1, "bob", -1), record(2, "eve", 1), record(3, "bob", 1))])
    sink.close()
    [(a, (parts, outcomes))] = told(events).items()
    assert parts == [BatchPart(TOPIC.name, 0, 1, 0, 4, [0, 2], [1, 3])]
    assert outcomes == ["ok"]
    assert audit(url) == [(a, 0, 1, [0]), (a, 0, 1, [2])]
    assert [row[1] for row in ledger.parked(url)] == [1, 3]


def test_a_refused_commit_failed_and_what_followed_is_told_too(deferring_url: str, events: list[Event]) -> None:
    tool = connect(deferring_url)
    tool.execute("CREATE TABLE parent (name TEXT PRIMARY KEY)")
    tool.execute("CREATE TABLE child (name TEXT REFERENCES parent (name) DEFERRABLE INITIALLY DEFERRED)")
    tool.execute("INSERT INTO parent VALUES ('ann')")
    tool.close()

    def handler(records: Any, db: Any) -> None:
        db.executemany("INSERT INTO child VALUES (?)", [(item.key,) for item in records])

    sink = ledger.sink(deferring_url, handler)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1), record(1, "bob", 1), record(2, "ann", 1))])
    sink.close()
    attempts = told(events)
    assert next(iter(attempts.values())) == ([BatchPart(TOPIC.name, 0, 1, 0, 3, [0, 1, 2], [])], ["fail"])
    check_ledger(deferring_url, attempts)
    applied = [offset for _, _, _, offsets in audit(deferring_url) for offset in offsets]
    assert applied == [0, 2]
    assert [row[1] for row in ledger.parked(deferring_url)] == [1]


def test_a_fenced_owner_tells_nothing_and_leaves_nothing_in_the_ledger(url: str, events: list[Event]) -> None:
    zombie = ledger.sink(url)
    zombie.take_over([claim()])
    heir = ledger.sink(url)
    heir.take_over([claim()])
    with pytest.raises(PartitionsLost):
        zombie.apply([a_slice(record(0, "ann", 1))])
    assert events == []
    heir.apply([a_slice(record(0, "ann", 1))])
    assert [(part, epoch, offsets) for _, part, epoch, offsets in audit(url)] == [(0, 2, [0])]
    check_ledger(url, told(events))
    zombie.close()
    heir.close()


@pytest.mark.postgres
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unanswered_commit_is_unknown_until_the_rows_were_read(
    postgres: PostgresServer, when: When, events: list[Event]
) -> None:
    url, proxy = postgres.new_database(), CuttingProxy(postgres.port)
    batch = [a_slice(record(0, "ann", 5)), a_slice(record(0, "eve", 2, 1), part=1)]
    try:
        sink = behind(proxy, url)
        proxy.when = when
        with pytest.raises(Unavailable):
            sink.apply(batch)
        [(_, outcomes)] = told(events).values()
        assert outcomes == ["info"]
        sink.apply(batch)
        outcomes = [found for _, found in told(events).values()]
        assert outcomes == ([["info", "ok"]] if when == "after" else [["info", "fail"], ["ok"]])
        check_ledger(url, told(events))
        sink.close()
    finally:
        proxy.close()


@pytest.mark.postgres
@pytest.mark.parametrize("is_released", [False, True])
def test_whoever_is_fenced_in_doubt_says_only_what_it_knows(
    postgres: PostgresServer, is_released: bool, events: list[Event]
) -> None:
    """Everything went to another owner before the rows were read: they do not tell any more how the COMMIT ended."""
    url, proxy = postgres.new_database(), CuttingProxy(postgres.port)
    try:
        sink = behind(proxy, url)
        proxy.when = "after"
        with pytest.raises(Unavailable):
            sink.apply([a_slice(record(0, "ann", 5))])
        heir = ledger.sink(url)
        heir.take_over([claim(0), claim(1)])
        if is_released:
            sink.release([partition(0), partition(1)])
            sink.apply([])
        else:
            with pytest.raises(PartitionsLost):
                sink.apply([])
        assert [found for _, found in told(events).values()] == [["info"]]
        heir.close()
        sink.close()
    finally:
        proxy.close()


def test_a_commit_that_the_disk_refused_is_unknown_until_the_file_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    url = f"sqlite:///{tmp_path}/sink.db"
    sink = ledger.sink(url)
    sink.take_over([claim()])
    database = sink._database
    commit = database.commit

    def broken(is_written: bool) -> None:
        if is_written:
            commit()
        database.close()
        raise OutcomeUnknown("disk I/O error")

    for offset, is_written in enumerate([True, False]):
        monkeypatch.setattr(database, "commit", lambda is_written=is_written: broken(is_written))
        with pytest.raises(Unavailable):
            sink.apply([a_slice(record(offset, "ann", 1))])
        monkeypatch.setattr(database, "commit", commit)
        sink.apply([a_slice(record(offset, "ann", 1))])
    sink.close()
    assert [found for _, found in told(events).values()] == [["info", "ok"], ["info", "fail"], ["ok"]]
    check_ledger(url, told(events))


def test_off_there_is_no_table(url: str) -> None:
    sink = ledger.sink(url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    sink.close()
    tool = connect(url)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each driver has its own
        tool.query("SELECT * FROM semel_audit")
    assert is_missing_table(raised.value)
    tool.close()


def test_where_tables_are_not_made_the_ledger_is_asked_for(url: str, events: list[Event]) -> None:
    migrate(url, schema=ledger.SCHEMA)
    with pytest.raises(ConfigurationError, match="table semel_audit is not in"):
        ledger.sink(url, create_tables=False)
    assert "semel_audit" in migrate(url, audit=True)
    sink = ledger.sink(url, create_tables=False)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 1))])
    sink.close()
    assert len(audit(url)) == 1


@pytest.mark.parametrize(
    ("kind", "point", "nth"),
    [
        ("sqlite", "sink.before_effects", 4),
        ("sqlite", "sink.before_db_commit", 2),
        ("sqlite", "sink.after_db_commit", 2),
        pytest.param("postgres", "sink.after_db_commit", 2, marks=pytest.mark.postgres),
    ],
)
def test_history_and_ledger_agree_wherever_the_process_was_killed(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, point: str, nth: int
) -> None:
    """Each process dies after a batch or two, until the work is done; then the two are compared."""
    url = f"sqlite:///{tmp_path}/sink.db" if kind == "sqlite" else request.getfixturevalue("postgres").new_database()
    folder, total, deaths = tmp_path / "history", 20, 0
    while True:
        process = subprocess.run(
            [sys.executable, "-m", "tests.sinks.child", url, str(total)],
            cwd=ROOT,
            env=os.environ | {"SEMEL_FAILPOINT": f"{point}:kill:{nth}", "SEMEL_HISTORY": str(folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if process.returncode == 0:
            break
        assert process.returncode == -9, process.stderr
        deaths += 1
    assert deaths >= 2
    torn: list[Torn] = []
    attempts = told(list(history.read_history(folder, torn)))
    assert torn == []
    open_ones = {a for a, (_, outcomes) in attempts.items() if not outcomes}
    ledgered = {a for a, *_ in audit(url)}
    if point == "sink.before_db_commit":
        assert not open_ones  # Nothing was tried when the process died.
    assert ledgered <= attempts.keys()
    for a in open_ones & ledgered:
        attempts[a][1].append("ok")  # The ledger proves it.
    check_ledger(url, attempts)
    handed = Counter((part, offset) for _, part, _, offsets in audit(url) for offset in offsets)
    parked = {(part, offset) for part, offset, _, _ in ledger.parked(url)}
    everything = {(part, item.offset) for part in range(child.PARTITIONS) for item in child.all_records(part, total)}
    assert handed == Counter(everything - parked)
    assert sorted(handed) == ledger.seen(url)
