"""A whole deployment whose workers are killed: history, headers and ledger tell one story, and it is the true one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from semel import history
from semel.history import PROOF, Batch, Event, Send, Torn, Unit
from semel.types import Record
from tests.conftest import Address
from tests.ops.deployment import Deployment, until
from tests.processing.running import read_all

APP = """
import msgspec
from semel import App, Created

class Job(msgspec.Struct, frozen=True):
    name: str
    number: int

app = App("NAME", request_partitions=2)
jobs = app.topic("NAME.jobs", key=str, value=Job, partitions=2)
parts = app.topic("NAME.parts", key=str, value=Job, partitions=2)
SCHEMA = "CREATE TABLE IF NOT EXISTS seen (part INTEGER NOT NULL, record_offset INTEGER NOT NULL);"
database = app.database("sqlite:///jobs.db", schema=SCHEMA)

@app.post("/jobs", request=Job)
def take(job: Job):
    yield jobs.record(job.name, job)
    return Created({"number": job.number})

@app.processor(jobs)
def cut(record):
    if record.value.number < 0:
        raise RuntimeError("this job cannot be cut")
    yield parts.record(record.key, record.value)
    yield parts.record(record.key + "b", record.value)

@app.sink(parts, database)
def note(records, db):
    db.executemany("INSERT INTO seen VALUES (?, ?)", [(r.partition, r.offset) for r in records])
"""
KILLS = 2
JOBS_A_KILL = 30
Place = tuple[str, int, int]


def place(record: Record) -> Place:
    return record.topic, record.partition, record.offset


def proof(record: Record) -> list[str]:
    [value] = [value for name, value in record.headers if name == PROOF]
    assert value is not None
    return value.decode().split("|")


class Told:
    """Attempts by name, each with its beginning and its last known outcome."""

    def __init__(self, events: Sequence[Event], kind: type[Unit] | type[Batch] | type[Send]) -> None:
        mine = [event for event in events if isinstance(event, kind)]
        self.begun: dict[str, Any] = {event.a: event for event in mine if event.type == "invoke"}
        self.ended = {event.a: event for event in mine if event.type != "invoke"}
        assert self.ended.keys() <= self.begun.keys()

    def outcome(self, attempt: str) -> str:
        return self.ended[attempt].type if attempt in self.ended else "open"


@pytest.mark.timeout(300)
def test_history_headers_and_ledger_tell_the_truth_about_killed_workers(embedded: Address, tmp_path: Path) -> None:
    name = f"h{uuid4().hex[:8]}"

    def read(topic: str) -> list[Record]:
        return asyncio.run(read_all(embedded.bootstrap, topic, 2))

    (tmp_path / "jobs.py").write_text(APP.replace("NAME", name))
    environment = {"SEMEL_HISTORY": str(tmp_path / "history"), "SEMEL_SESSION_TIMEOUT_MS": "3000"}
    wanted = 2 * KILLS * JOBS_A_KILL
    with Deployment(
        "jobs:app", tmp_path, "--kafka", embedded.bootstrap, "--workers", "2", environment=environment
    ) as running:
        running.wait_ready()
        run_jobs(running)
        until(
            lambda: len(rows(tmp_path, "SELECT part, record_offset FROM seen")) >= wanted, "every part in the table", 90
        )
        assert running.post("/jobs", "bad", {"name": "bad", "number": -1}).status == 201
        until(lambda: len(read(f"{name}.semel.park.{name}.jobs")) == 1, "the bad job in the park topic")
        assert running.stop() == 0
    topics = (f"{name}.semel.requests", f"{name}.semel.responses", f"{name}.jobs", f"{name}.parts")
    requests, responses, jobs, parts = (read(topic) for topic in topics)
    park = read(f"{name}.semel.park.{name}.jobs")
    torn: list[Torn] = []
    events = list(history.read_history(tmp_path / "history", torn))
    assert all(line.is_last for line in torn)
    assert len(parts) == wanted
    check_requests(Told(events, Send), requests)
    check_units(Told(events, Unit), {"requests": requests, "cut": jobs}, [*responses, *jobs, *parts, *park])
    check_ledger(Told(events, Batch), parts, tmp_path)


def post(running: Deployment, name: str, number: int) -> None:
    """Post one job until it is answered; the key is its number."""

    def is_taken() -> bool:
        try:
            return running.post("/jobs", f"job{number}", {"name": name, "number": number}).status == 201
        except OSError:
            return False

    until(is_taken, f"job {number}", 90)


def run_jobs(running: Deployment) -> None:
    """Post jobs, and kill a worker in the middle of each round; no client gives up."""

    with ThreadPoolExecutor(6) as pool:
        for kill in range(KILLS):
            first = kill * JOBS_A_KILL
            posted = [
                pool.submit(post, running, f"k{number % 7}", number) for number in range(first, first + JOBS_A_KILL)
            ]
            posted[JOBS_A_KILL // 3].result()
            worker = f"worker-{kill % 2}"
            os.kill(running.children()[worker]["pid"], signal.SIGKILL)
            for future in posted:
                future.result()
            until(lambda worker=worker: running.children()[worker]["state"] == "running", "the worker again", 90)


def is_kept(at: Place, records: Sequence[Record]) -> bool:
    """Whether a place is not below the log's start: answered requests are deleted after a minute."""
    return any(record[:2] == at[:2] and record.offset <= at[2] for record in records)


def check_requests(sends: Told, requests: Sequence[Record]) -> None:
    """What the HTTP instance said to have appended is there, once, and nothing else is."""
    found = {proof(record)[0]: place(record) for record in requests}
    assert len(found) == len(requests)
    assert found.keys() <= sends.begun.keys()
    for attempt in sends.begun:
        outcome = sends.outcome(attempt)
        end = sends.ended.get(attempt)
        if end is not None and outcome == "ok" and is_kept((end.topic, end.partition, end.offset), requests):
            assert found[attempt] == (end.topic, end.partition, end.offset)
        assert outcome != "fail" or attempt not in found


def check_units(units: Told, inputs: dict[str, Sequence[Record]], outputs: Sequence[Record]) -> None:
    """A unit's outputs are there whole or not at all, as it said; every input was worked on in one unit that counts."""
    visible: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for record in outputs:
        attempt, *which = proof(record)
        visible[attempt][tuple(which)] += 1
    assert visible.keys() <= units.begun.keys()
    done: dict[str, Counter[Place]] = defaultdict(Counter)
    for attempt, unit in units.begun.items():
        wanted: Counter[tuple[str, ...]] = Counter()
        for topic, partition, offsets, counts in unit.inputs:
            for offset, count in zip(offsets, counts, strict=True):
                wanted.update((topic, str(partition), str(offset), str(j), str(count)) for j in range(count))
        wanted.update((topic, str(part), str(offset), "0", "1", "parked") for topic, part, offset in unit.parked)
        outcome = units.outcome(attempt)
        assert visible[attempt] == wanted or (not visible[attempt] and outcome != "ok"), attempt
        assert not visible[attempt] or outcome != "fail", attempt
        if visible[attempt]:
            done[unit.component].update(
                (topic, int(part), int(offset)) for topic, part, offset, j, *_ in wanted if j == "0"
            )
    assert done.keys() == inputs.keys()
    for component, records in inputs.items():
        kept = Counter({at: count for at, count in done[component].items() if is_kept(at, records)})
        assert kept == Counter(place(record) for record in records), component
        assert set(done[component].values()) == {1}


def check_ledger(batches: Told, parts: Sequence[Record], folder: Path) -> None:
    """Every part was handed over once, in a transaction that says so; and that is what the handler wrote."""
    ledger = rows(folder, "SELECT attempt, topic, part, offsets FROM semel_audit ORDER BY seq")
    handed = Counter((topic, part, offset) for _, topic, part, offsets in ledger for offset in json.loads(offsets))
    assert handed == Counter(place(record) for record in parts)
    seen = Counter((parts[0].topic, *row) for row in rows(folder, "SELECT part, record_offset FROM seen"))
    assert seen == handed
    written = {row[0] for row in ledger}
    assert written <= batches.begun.keys()
    for attempt, batch in batches.begun.items():
        outcome = batches.outcome(attempt)
        assert outcome != "fail" or attempt not in written
        if outcome == "ok":
            assert (attempt in written) == any(part.handed for part in batch.parts)


def rows(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    try:
        with closing(sqlite3.connect(folder / "jobs.db", timeout=10)) as connection:
            return connection.execute(sql).fetchall()
    except sqlite3.OperationalError:
        return []  # The tables are made by the sink.
