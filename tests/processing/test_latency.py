"""A stated latency in the engine: units wait as long as it allows, and for nothing that ends the work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from semel.app import App
from semel.processing import engine as engine_module
from semel.processing.component import Component
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.pace import FixedPace
from tests.processing.fake_kafka import FakeKafka
from tests.processing.test_engine import IN0, IN1, copied, engine_of, everything, kafka_with


@pytest.fixture(autouse=True)
def _quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "OVERLAP_POLL_SECONDS", 0.001)


def copying(latency: str | None, seen: list[int], *, app_latency: str | None = None, batch: bool = False) -> Component:
    app = App("a", latency=app_latency)
    source = app.topic("in", key=str, value=int)
    target = app.topic("out", key=str, value=int)

    def one(record: Any) -> Any:
        seen.append(record.value)
        yield target.record(record.key, record.value)

    def many(records: Any) -> Any:
        seen.append(len(records))
        return [target.record(record.key, record.value) for record in records]

    app.processor(source, name="p", latency=latency, batch=batch)(many if batch else one)
    return app.components()[0]


def play(engine: Engine, scenario: Callable[[Callable[..., Awaitable[None]]], Awaitable[None]]) -> None:
    async def main() -> None:
        running = asyncio.create_task(engine.run())

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not condition():
                    assert not running.done(), running
                    await asyncio.sleep(0.001)

        try:
            await scenario(until)
        finally:
            await engine.drain()
            await running

    asyncio.run(main())


def trickle(kafka: FakeKafka, number: int) -> None:
    kafka.append("in", b"k%d" % (number % 5), b"%d" % number, partition=number % 5 % 2)


def test_records_that_come_one_by_one_share_a_transaction_and_a_drain_does_not_wait() -> None:
    kafka, seen = kafka_with(1), list[int]()
    engine = engine_of(kafka, copying("60s", seen))

    async def scenario(until: Any) -> None:
        await until(lambda: kafka.calls.count("end") == 1)  # The first one measures; nothing is held back for it.
        for number in range(1, 30):
            trickle(kafka, number)
            await until(lambda number=number: len(seen) == number + 1)
        assert kafka.calls.count("end") == 1

    play(engine, scenario)
    assert copied(kafka) == everything(30)
    assert kafka.calls.count("end") == 2


def test_without_a_stated_latency_nothing_waits_for_more() -> None:
    kafka, seen = kafka_with(1), list[int]()
    engine = engine_of(kafka, copying(None, seen))

    async def scenario(until: Any) -> None:
        for number in range(1, 6):
            await until(lambda: kafka.lag("in") == 0)
            trickle(kafka, number)
        await until(lambda: kafka.lag("in") == 0)

    play(engine, scenario)
    assert kafka.calls.count("end") == 6


def test_a_unit_that_waits_is_committed_when_its_interval_is_over() -> None:
    kafka, seen = kafka_with(1), list[int]()
    engine = engine_of(kafka, copying("200ms", seen))

    async def scenario(until: Any) -> None:
        for number in range(1, 6):
            await until(lambda: kafka.lag("in") == 0)
            trickle(kafka, number)
        await until(lambda: kafka.lag("in") == 0)

    play(engine, scenario)
    assert copied(kafka) == everything(6)


def test_a_unit_that_waits_is_committed_before_its_partition_goes() -> None:
    kafka, seen = kafka_with(1), list[int]()
    engine = engine_of(kafka, copying("60s", seen))

    async def scenario(until: Any) -> None:
        await until(lambda: kafka.calls.count("end") == 1)
        for number in range(1, 11):
            trickle(kafka, number)
        await until(lambda: len(seen) == 11)
        consumer = kafka.consumer_made
        assert consumer is not None
        await consumer.revoke(IN0, IN1)
        assert kafka.lag("in") == 0

    play(engine, scenario)
    assert copied(kafka) == everything(11)


class SmallUnits(FixedPace):
    """A stated latency for which seven records are as many as can be."""

    objective = 60.0
    records = 7


@pytest.mark.parametrize("batch", [False, True])
def test_a_unit_takes_no_more_records_than_were_chosen(batch: bool) -> None:
    kafka, seen = kafka_with(30), list[int]()
    engine = engine_of(kafka, copying(None, seen, batch=batch))
    engine._pace = SmallUnits(60.0)
    sizes: list[int] = []
    transact = engine._transact

    async def measured(unit: Any, *args: Any) -> None:
        sizes.append(unit.records)
        await transact(unit, *args)

    engine._transact = measured  # type: ignore[method-assign]

    async def scenario(until: Any) -> None:
        await until(lambda: bool(sizes))

    play(engine, scenario)
    assert sizes[0] == 7
    if batch:
        assert max(seen) <= 7


def test_what_was_chosen_and_what_came_of_it_can_be_seen() -> None:
    kafka, metrics = kafka_with(10), Metrics()
    engine = engine_of(kafka, copying("50ms", []), metrics)

    async def scenario(until: Any) -> None:
        await until(lambda: kafka.lag("in") == 0)

    play(engine, scenario)
    text = metrics.render()
    assert 'semel_latency_objective_seconds{component="p"} 0.05' in text
    assert 0 <= metrics_value(text, 'semel_commit_interval_seconds{component="p"}') <= 0.05
    assert metrics_value(text, 'semel_unit_records_limit{component="p"}') >= 1
    assert metrics_value(text, 'semel_unit_latency_seconds{component="p",quantile="0.99"}') > 0


def metrics_value(text: str, series: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(series))


def test_an_apps_latency_is_what_a_processor_has_that_states_none() -> None:
    assert copying(None, [], app_latency="50ms").latency == pytest.approx(0.05)
    assert copying("20ms", [], app_latency="50ms").latency == pytest.approx(0.02)
    assert copying(None, []).latency is None
