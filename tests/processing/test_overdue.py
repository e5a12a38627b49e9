"""A handler that does not come back: cancelled where that is possible, else its process ends, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from semel.app import App
from semel.env import Env
from semel.errors import ConfigurationError
from semel.processing import EXIT_OVERDUE
from semel.processing import overdue as overdue_module
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.overdue import LIVES, Overdue, parse_deadline
from semel.processing.supervisor import ChildSpec, Supervisor
from semel.types import Record
from tests.conftest import Address
from tests.processing.running import HANGING, drained, feed, hanging_app, prepare, read_all
from tests.processing.test_engine import SETTINGS, app_with, copied, everything, kafka_with, process, run_until
from tests.processing.test_engine_kafka import items_of, new_name, worker_environment

pytestmark = pytest.mark.usefixtures("impatient")


def hanging(*values: int) -> Any:
    """An async handler that copies, and waits for ever over some."""

    async def handler(record: Any, target: Any) -> Any:
        if record.value in values:
            await asyncio.Event().wait()
        return [target.record(record.key, record.value)]

    return handler


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_async_handler_is_cancelled_and_its_record_parked_when_others_succeed(
    concurrency: int, caplog: pytest.LogCaptureFixture
) -> None:
    kafka = kafka_with(20)
    app = App("a")
    source, target = app.topic("in", key=str, value=int), app.topic("out", key=str, value=int)

    async def handler(record: Any) -> Any:
        return await hanging(13)(record, target)

    app.processor(source, name="p", deadline="500ms", concurrency=concurrency)(handler)
    process(kafka, app.components()[0], lambda: kafka.lag("in") == 0)
    parked = kafka.values("a.semel.park.in")
    assert parked[0] == b"13"
    assert set(copied(kafka)) == set(everything(20)) - set(parked)
    assert "the handler of p at in-" in caplog.text
    assert "took longer than its deadline of 0.5 s and was cancelled" in caplog.text


def test_what_takes_too_long_for_everybody_is_an_outage_and_parks_nothing() -> None:
    kafka = kafka_with(4)
    calls: Counter[int] = Counter()
    is_away = [True]

    async def handler(record: Any, target: Any) -> Any:
        calls[record.value] += 1
        if is_away[0]:
            is_away[0] = sum(calls.values()) < 4
            await asyncio.Event().wait()
        return [target.record(record.key, record.value)]

    process(kafka, app_with(handler, deadline="500ms"))
    assert kafka.values("a.semel.park.in") == []
    assert copied(kafka) == everything(4)


def test_a_deadline_is_stated_in_bounds() -> None:
    assert parse_deadline("30s", "x") == 30.0
    for text in ("30", "0s", "100ms", "10m", "241s", 30, None):
        with pytest.raises(ConfigurationError, match="a deadline is stated as '30s'"):
            parse_deadline(text, "x")


# --- Sync handlers ---


def record(offset: int) -> Record:
    return Record("in", 0, offset, 0, b"k", b"v")


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_thread_beats_for_a_slow_handler_and_ends_the_process_of_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overdue_module, "WATCH_SECONDS", 0.01)
    beats: list[int] = []
    ends: list[int] = []
    watch = Overdue(tmp_path, lambda: beats.append(1), ends.append)
    watch.begin("p", [record(5)], 600.0)
    until(lambda: len(beats) >= 2)
    assert not ends
    watch.done()
    watch.begin("p", [record(6)], 0.02)
    until(lambda: ends)
    assert ends == [EXIT_OVERDUE]
    heir = Overdue(tmp_path)
    assert heir.lives("p", record(6)) == 1
    assert heir.lives("p", record(5)) is heir.lives("q", record(6)) is None
    other = Overdue(tmp_path)
    heir.passed("p", [record(6)])
    assert other.lives("p", record(6)) is None, "who is through with it says so to all of the host"
    assert not Overdue(tmp_path).has_suspects


def test_of_a_batch_that_ended_its_process_every_record_is_handled_alone(tmp_path: Path) -> None:
    kafka = kafka_with(30)
    first = Overdue(tmp_path, end=lambda code: None)
    suspects = kafka.records("in")[:6]
    first._give_up(overdue_module._Call("p", suspects, 1.0, 0.0))
    seen: list[int] = []
    app = App("a")
    source = app.topic("in", key=str, value=int)

    def handler(records: Any) -> None:
        seen.append(len(records))

    app.processor(source, name="p", deadline="5s", batch=True)(handler)
    knows = Overdue(tmp_path)
    engine = Engine(app.components()[0], "unused", SETTINGS, Env(), Metrics(), kafka=kafka, overdue=knows)
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert sum(seen) == 30
    assert seen.count(1) >= 6
    assert max(seen) > 1
    assert not Overdue(tmp_path).has_suspects


@pytest.mark.timeout(300)  # Some starts of a process, on a machine that may do much else.
def test_a_sync_handler_that_hangs_ends_its_process_until_its_record_is_parked(
    embedded: Address, tmp_path: Path
) -> None:
    name, bootstrap = new_name(), embedded.bootstrap
    exits: list[int] = []
    environment = {**os.environ, **worker_environment(bootstrap), "SEMEL_DATA": str(tmp_path / "data")}
    items = items_of(30, seed=3)

    async def main() -> tuple[Counter[Any], list[Record]]:
        await prepare(bootstrap, hanging_app(name))
        await feed(bootstrap, f"{name}.in", items)
        command = [sys.executable, "-m", "tests.processing.running", name, "0", "hanging"]
        spec = ChildSpec("worker-0", command, environment, 0, tmp_path / "worker-0.log")
        supervisor = Supervisor([spec], silence_seconds=60, on_exit=lambda _, code: exits.append(code))
        running = asyncio.create_task(supervisor.run())
        await drained(bootstrap, f"{name}.count", f"{name}.in", timeout=240)
        await supervisor.drain()
        await running
        outputs = await read_all(bootstrap, f"{name}.out", 3)
        return Counter(item.value for item in outputs), await read_all(bootstrap, f"{name}.semel.park.{name}.in", 4)

    found, parked = asyncio.run(main())
    log = (tmp_path / "worker-0.log").read_text()
    assert exits[:-1] == [EXIT_OVERDUE] * LIVES, log[-2000:]
    assert parked[0].value == b"%d" % HANGING
    assert set(found.values()) == {1}
    assert len(found) + len(parked) == len(items)
    assert f"the handler of count at {name}.in-" in log
    assert f"it ended {LIVES} processes" in log
