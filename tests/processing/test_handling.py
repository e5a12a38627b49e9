"""Batches and async handlers: what they give is the same as record by record, whoever of them fails."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from semel.app import App
from semel.errors import AbortTransaction, ErrorCode, OutcomeUnknown, Retriable, SemelError
from semel.processing import handling as handling_module
from semel.processing import parking
from semel.processing import unit as unit_module
from semel.processing.component import Component
from tests.processing.fake_kafka import FakeKafka
from tests.processing.test_engine import (
    FAILURES,
    IN0,
    copied,
    engine_of,
    everything,
    headers_of,
    kafka_with,
    process,
    run_until,
)

pytestmark = pytest.mark.usefixtures("impatient")


def component(make: Callable[..., Any], *, state: bool = False, **options: Any) -> Component:
    """The processor `make(target)` or `make(target, counts)` of an app."""
    app = App("a")
    source = app.topic("in", key=str, value=int)
    target = app.topic("out", key=str, value=int)
    counts = app.state("counts", key=str, value=int)
    app.processor(source, state=counts if state else (), name="p", **options)(make(target))
    return app.components()[0]


def copying_batch(target: Any) -> Any:
    def handle(records: Any) -> Any:
        for record in records:
            if record.value < 0:
                raise ValueError(f"cannot copy {record.value}")
        return [target.record(record.key, record.value) for record in records]

    return handle


def copying_async(target: Any) -> Any:
    rng = random.Random(7)

    async def handle(record: Any) -> Any:
        await asyncio.sleep(0.002 * rng.random())
        if record.value < 0:
            raise ValueError(f"cannot copy {record.value}")
        yield target.record(record.key, record.value)

    return handle


MODES = {"batch": (copying_batch, {"batch": True}), "async": (copying_async, {"concurrency": 8})}


def in_order_of_keys(kafka: FakeKafka) -> None:
    by_key: dict[Any, list[int]] = defaultdict(list)
    for record in kafka.records("out"):
        by_key[record.key].append(int(record.value or b""))
    for key, values in by_key.items():
        assert values == sorted(values), f"records of {key!r} changed places"


# --- Both ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("call", "error"), [*FAILURES, ("poll", Retriable("away"))])
def test_whatever_fails_nothing_is_lost_or_doubled(mode: str, call: str, error: SemelError) -> None:
    make, options = MODES[mode]
    kafka = kafka_with(60)
    kafka.fail(call, error)
    process(kafka, component(make, **options))
    assert copied(kafka) == everything(60)
    in_order_of_keys(kafka)


@pytest.mark.parametrize("mode", MODES)
def test_failing_records_park_their_keys_in_order_and_none_of_them_is_lost(mode: str) -> None:
    make, options = MODES[mode]
    kafka = kafka_with(0)
    good: list[bytes] = []
    parked: dict[bytes, list[bytes]] = defaultdict(list)
    for number in range(120):
        key = b"k%d" % (number % 12)
        is_poison = number in (24, 25, 40)  # Two neighbours, and another one: keys 0, 1 and 4.
        value = b"-%d" % number if is_poison else b"%d" % number
        if is_poison or key in parked:
            parked[key].append(value)
        else:
            good.append(value)
        kafka.append("in", key, value, partition=number % 12 % 2)
    process(kafka, component(make, **options))
    assert copied(kafka) == Counter(good)
    in_order_of_keys(kafka)
    found: dict[Any, list[Any]] = defaultdict(list)
    for record in kafka.records("a.semel.park.in"):
        found[record.key].append(record.value)
    assert found == parked
    tried = [headers_of(record)[parking.TRIED] for record in kafka.records("a.semel.park.in")]
    assert Counter(tried) == {"1": 3, "0": sum(map(len, parked.values())) - 3}


@pytest.mark.parametrize("mode", MODES)
def test_with_order_by_partition_what_stands_before_the_failing_record_is_done(mode: str) -> None:
    make, options = MODES[mode]
    kafka = kafka_with(0)
    for number in range(10):
        kafka.append("in", b"k%d" % number, b"-1" if number == 6 else b"%d" % number)
        kafka.append("in", b"other", b"%d" % (100 + number), partition=1)
    engine = engine_of(kafka, component(make, ordering="partition", **options))
    asyncio.run(run_until(engine, lambda: kafka.committed.get(IN0) == 6 and len(kafka.values("out")) == 16))
    assert copied(kafka) == Counter([b"%d" % number for number in [*range(6), *range(100, 110)]])
    assert kafka.committed[IN0] == 6


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_the_broker_refuses_parks_its_input(mode: str) -> None:
    make, options = MODES[mode]
    kafka = kafka_with(20)
    refusal = AbortTransaction("too large for the topic")
    refusal.code = ErrorCode.MESSAGE_TOO_LARGE
    engine = engine_of(kafka, component(make, **options))
    produce = engine._producer.produce

    async def refuse(topic: str, partition: int, batches: Any) -> None:
        if topic == "out" and b"\x0413" in batches.build():
            raise refusal
        await produce(topic, partition, batches)

    engine._producer.produce = refuse  # type: ignore[method-assign]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert kafka.values("a.semel.park.in") == [b"13", b"18"], "the record that was refused, and the next of its key"
    assert copied(kafka) == everything(20) - Counter([b"13", b"18"])


@pytest.mark.parametrize("mode", MODES)
def test_full_units_are_cut_and_carry_on(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "UNIT_RECORDS_MAX", 7)
    monkeypatch.setattr(handling_module, "BATCH_RECORDS_MAX", 3)
    make, options = MODES[mode]
    kafka = kafka_with(200)
    process(kafka, component(make, **options))
    assert copied(kafka) == everything(200)
    in_order_of_keys(kafka)
    assert kafka.calls.count("end") >= 4


# --- Batches ---


def test_a_batch_is_of_one_partition_and_in_order() -> None:
    seen: list[list[tuple[int, int]]] = []

    def make(target: Any) -> Any:
        def handle(records: Any) -> Any:
            seen.append([(record.partition, record.offset) for record in records])
            yield target.record("sum", sum(record.value for record in records))

        return handle

    kafka = kafka_with(90)
    process(kafka, component(make, batch=True))
    assert all(len({partition for partition, _ in batch}) == 1 for batch in seen)
    assert [place for batch in seen for place in batch if place[0] == 0] == [(0, at) for at in range(54)]
    assert len(seen) <= 6, "many records must come in few calls"
    assert sum(int(value or b"") for value in kafka.values("out")) == sum(range(90))


@pytest.mark.parametrize("poison", [1, 7, 64])
def test_a_burst_of_poison_costs_calls_in_proportion_to_the_records(poison: int) -> None:
    calls = 0

    def make(target: Any) -> Any:
        def handle(records: Any) -> Any:
            nonlocal calls
            calls += 1
            if any(record.value < 0 for record in records):
                raise ValueError("poison")
            return [target.record(record.key, record.value) for record in records]

        return handle

    kafka = kafka_with(0)
    for number in range(64):
        kafka.append("in", b"k%d" % number, b"-1" if number < poison else b"%d" % number)
    process(kafka, component(make, batch=True))
    assert len(kafka.values("a.semel.park.in")) == poison
    assert copied(kafka) == Counter(b"%d" % number for number in range(poison, 64))
    assert calls <= 2 * 64


def test_a_batch_reads_what_the_batches_before_it_changed() -> None:
    def make(target: Any) -> Any:
        def handle(records: Any, counts: Any) -> Any:
            seen: Counter[str] = Counter()
            for record in records:
                seen[record.key] += 1
                yield target.record(record.key, counts.get(record.key, 0) + seen[record.key])
            for key, number in seen.items():
                yield counts.put(key, counts.get(key, 0) + number)

        return handle

    kafka = kafka_with(100)
    kafka.fail("end", AbortTransaction("abort"))
    process(kafka, component(make, state=True, batch=True))
    kafka.append("in", b"k0", b"0")
    process(kafka, component(make, state=True, batch=True))
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted([*list(range(1, 21)) * 5, 21])


def test_a_batch_whose_target_is_away_is_tried_again_whole_and_nothing_is_parked() -> None:
    sizes: list[int] = []

    def make(target: Any) -> Any:
        def handle(records: Any) -> Any:
            sizes.append(len(records))
            if len(sizes) < 4:
                raise ConnectionError("away")
            return [target.record(record.key, record.value) for record in records]

        return handle

    kafka = kafka_with(0)
    for number in range(30):
        kafka.append("in", b"k", b"%d" % number)
    process(kafka, component(make, batch=True))
    assert copied(kafka) == everything(30)
    assert kafka.values("a.semel.park.in") == []
    assert set(sizes) == {30}, "a batch is not halved for what is not its fault"


# --- Async handlers ---


def test_async_calls_overlap_and_their_effects_stand_in_the_order_of_the_input() -> None:
    most = running = 0

    def make(target: Any) -> Any:
        async def handle(record: Any) -> Any:
            nonlocal most, running
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02 if record.value % 8 == 0 else 0)
            running -= 1
            return target.record("all", record.value)

        return handle

    kafka = kafka_with(0)
    for number in range(64):
        kafka.append("in", b"k%d" % number, b"%d" % number)
    process(kafka, component(make, concurrency=8))
    assert kafka.values("out") == [b"%d" % number for number in range(64)]
    assert most == 8


def test_async_calls_of_one_partition_take_turns_where_they_share_state() -> None:
    """Every key counts in the same row: calls that overlapped would read the same number twice."""

    def make(target: Any) -> Any:
        async def handle(record: Any, counts: Any) -> Any:
            number = counts.get("all", 0) + 1
            await asyncio.sleep(0)
            yield counts.put("all", number)
            yield target.record(record.key, number)

        return handle

    kafka = kafka_with(100)
    kafka.fail("end", OutcomeUnknown("cut"))
    process(kafka, component(make, state=True, concurrency=8))
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted([*range(1, 61), *range(1, 41)])


def test_an_async_call_whose_target_is_away_holds_up_what_is_behind_it_only() -> None:
    tried: Counter[int] = Counter()

    def make(target: Any) -> Any:
        async def handle(record: Any) -> Any:
            tried[record.value] += 1
            await asyncio.sleep(0)
            if record.value == 20 and tried[20] < 3:
                raise TimeoutError("away")
            yield target.record(record.key, record.value)

        return handle

    kafka = kafka_with(40)
    process(kafka, component(make, concurrency=4))
    assert copied(kafka) == everything(40)
    assert kafka.values("a.semel.park.in") == []
    in_order_of_keys(kafka)


def test_a_partition_that_is_given_back_waits_for_the_calls_that_run() -> None:
    kafka = kafka_with(40)
    started = asyncio.Event()

    def make(target: Any) -> Any:
        async def handle(record: Any) -> Any:
            started.set()
            await asyncio.sleep(0.001)
            yield target.record(record.key, record.value)

        return handle

    engine = engine_of(kafka, component(make, concurrency=8))
    consumer = kafka.consumer_made
    assert consumer is not None

    async def main() -> None:
        async def give_back() -> None:
            await started.wait()
            await consumer.revoke(IN0)
            done = len(copied(kafka))
            assert done == 40 - kafka.lag("in"), "what was worked on is committed before the partition goes"
            await consumer.assign(IN0)

        running = asyncio.create_task(run_until(engine, lambda: kafka.lag("in") == 0))
        await give_back()
        await running

    asyncio.run(main())
    assert copied(kafka) == everything(40)


def test_a_worker_that_is_cancelled_leaves_no_call_behind() -> None:
    kafka = kafka_with(20)
    ended: list[int] = []

    def make(target: Any) -> Any:
        async def handle(record: Any) -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(record.value)
            yield target.record(record.key, record.value)

        return handle

    async def main() -> None:
        engine = engine_of(kafka, component(make, concurrency=5))
        running = asyncio.create_task(engine.run())
        while len(engine._handling.pending) == 20 or not kafka.calls.count("poll"):
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert len(ended) == 5
    assert kafka.committed == {}
