"""The engine alone: what a user would lose when a call to Kafka, a handler or a rebalance goes wrong."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semel.app import App
from semel.env import Env
from semel.errors import AbortTransaction, ErrorCode, Fatal, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import arm_failpoints
from semel.processing import engine as engine_module
from semel.processing import parking
from semel.processing import unit as unit_module
from semel.processing.component import Component
from semel.processing.effects import Write
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.processing.unit import UnitOfWork
from semel.processing.watermarks import Watermarks
from semel.settings import Settings
from semel.types import TopicPartition
from semel.wire.partitioner import partition_for
from tests.processing.fake_kafka import FakeKafka

SETTINGS = Settings(instance="test", commit_interval_ms=20)
IN0, IN1 = TopicPartition("in", 0), TopicPartition("in", 1)

pytestmark = pytest.mark.usefixtures("impatient")


def kafka_with(records: int = 0, keys: int = 5) -> FakeKafka:
    kafka = FakeKafka(**{"in": 2, "out": 3, "a__semel__state__counts": 2, "a__semel__park__in": 2})
    for number in range(records):
        kafka.append("in", b"k%d" % (number % keys), b"%d" % number, partition=number % keys % 2)
    return kafka


def app_with(handler: Callable[..., Any], *, state: bool = False, **options: Any) -> Component:
    app = App("a")
    source = app.topic("in", key=str, value=int)
    target = app.topic("out", key=str, value=int)
    counts = app.state("counts", key=str, value=int) if state else ()
    if state:
        app.processor(source, state=counts, name="p", **options)(lambda record, counts: handler(record, counts, target))
    else:
        app.processor(source, name="p", **options)(lambda record: handler(record, target))
    return app.components()[0]


def copy(record: Any, target: Any) -> Any:
    yield target.record(record.key, record.value)


def engine_of(kafka: FakeKafka, component: Component, metrics: Metrics | None = None) -> Engine:
    return Engine(component, "unused", SETTINGS, Env(), metrics or Metrics(), kafka=kafka)


async def run_until(engine: Engine, done: Callable[[], bool], timeout: float = 60.0) -> None:
    running = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(timeout):
            while not done() and not running.done():
                await asyncio.sleep(0.001)
    finally:
        await engine.drain()
    await running


def process(kafka: FakeKafka, component: Component, done: Callable[[], bool] | None = None) -> Engine:
    engine = engine_of(kafka, component)
    asyncio.run(run_until(engine, done or (lambda: kafka.lag("in") == 0)))
    return engine


def copied(kafka: FakeKafka) -> Counter[Any]:
    return Counter(kafka.values("out"))


def everything(records: int) -> Counter[Any]:
    return Counter(b"%d" % number for number in range(records))


# --- Once, whatever fails ---


def test_every_record_is_worked_on_once_and_goes_to_its_keys_partition(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    passed = UnitOfWork.passed
    monkeypatch.setattr(UnitOfWork, "passed", lambda unit, *args: (taken.append(args[0]), passed(unit, *args))[1])
    kafka = kafka_with(200)
    process(kafka, app_with(copy))
    assert sum(taken) == (199 if way == "quick" else 0), "the first record is what the quick way learns from"
    assert copied(kafka) == everything(200)
    for record in kafka.records("out"):
        assert record.partition == partition_for(record.key or b"", 3)
    for key in range(5):
        values = [int(r.value or b"") for r in kafka.records("out") if r.key == b"k%d" % key]
        assert values == sorted(values), "records of one key changed places"


FAILURES = [
    (call, error)
    for call in ("begin", "produce", "send_offsets", "end", "after_end")
    for error in (AbortTransaction("abort"), OutcomeUnknown("unknown"), Retriable("later"))
    if not (call == "after_end" and isinstance(error, AbortTransaction))  # What is committed is never answered so.
]


@pytest.mark.parametrize(("call", "error"), FAILURES)
@pytest.mark.parametrize("times", [1, 3])
def test_a_transaction_that_fails_at_any_call_loses_and_doubles_nothing(
    call: str, error: SemelError, times: int
) -> None:
    kafka = kafka_with(50)
    kafka.fail(call, error, times)
    process(kafka, app_with(copy))
    assert copied(kafka) == everything(50)
    assert "abort" in kafka.calls


@pytest.mark.parametrize(
    "point", ["unit.before_produce", "unit.after_produce", "unit.before_end_transaction", "unit.after_end_transaction"]
)
def test_an_exception_at_any_failpoint_loses_and_doubles_nothing(point: str) -> None:
    kafka = kafka_with(50)
    arm_failpoints(f"{point}:raise:1")
    engine = process(kafka, app_with(counted, state=True))
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 11)) * 5)
    assert engine._failure is None


def test_kafka_that_is_away_for_a_while_is_waited_for() -> None:
    kafka = kafka_with(20)
    for call in ("start", "init", "committed_offsets", "poll", "abort", "seek", "list_high_watermark"):
        kafka.fail(call, Retriable("away"), 3)
    kafka.fail("end", OutcomeUnknown("cut"), 2)
    process(kafka, app_with(copy))
    assert copied(kafka) == everything(20)


def test_a_fenced_engine_stops_and_says_who_and_what_to_do() -> None:
    kafka = kafka_with(5)
    kafka.fail("end", Fenced("PRODUCER_FENCED"))
    with pytest.raises(Fenced, match=r"a\.p\.test\.0 .*SEMEL_INSTANCE"):
        process(kafka, app_with(copy), lambda: False)
    assert kafka.values("out") == []


def test_a_fatal_refusal_ends_the_engine() -> None:
    kafka = kafka_with(5)
    kafka.fail("send_offsets", Fatal("TRANSACTIONAL_ID_AUTHORIZATION_FAILED"))
    with pytest.raises(Fatal, match="AUTHORIZATION"):
        process(kafka, app_with(copy), lambda: False)


def test_a_zombie_whose_records_are_gone_says_that_it_has_a_successor() -> None:
    kafka = kafka_with(5)
    kafka.fail("poll", Fatal("the position to read from is not in the log any more"))
    kafka.fail("check_owner", Fenced("another process owns it now as 7:3"))
    with pytest.raises(Fenced, match=r"a\.p\.test\.0 .*7:3.*SEMEL_INSTANCE"):
        process(kafka, app_with(copy), lambda: False)


def test_an_engine_that_cannot_ask_for_its_successor_keeps_its_error() -> None:
    kafka = kafka_with(5)
    kafka.fail("poll", Fatal("the position to read from is not in the log any more"), times=2)
    kafka.fail("check_owner", Retriable("away"), times=2)
    with pytest.raises(Fatal, match="not in the log"):
        process(kafka, app_with(copy), lambda: False)


@pytest.mark.parametrize("call", ["poll", "seek"])
def test_a_position_that_was_deleted_is_looked_up_anew(call: str) -> None:
    """Seed 32 of the chain's simulation: who was stopped for long found what his successor had done, and deleted."""
    kafka = kafka_with(40)
    kafka.fail("end", AbortTransaction("so that it seeks"))
    kafka.fail(call, Fatal("the position to read from is not in the log any more"))
    process(kafka, app_with(copy))
    assert copied(kafka) == everything(40)


def test_a_consumer_that_fails_at_once_again_ends_the_engine() -> None:
    kafka = kafka_with(5)
    kafka.fail("poll", Fatal("no use"), times=2)
    with pytest.raises(Fatal, match="no use"):
        process(kafka, app_with(copy), lambda: False)


def test_many_records_become_few_transactions() -> None:
    kafka = kafka_with(3_000)
    process(kafka, app_with(copy))
    assert copied(kafka) == everything(3_000)
    assert kafka.calls.count("end") <= 20


def test_a_filter_that_yields_nothing_still_moves_the_position() -> None:
    kafka = kafka_with(10)
    process(kafka, app_with(lambda record, target: None))
    assert kafka.committed == {IN0: 6, IN1: 4}


def test_the_position_passes_markers_behind_the_last_record() -> None:
    kafka = kafka_with(0)
    kafka.append("in", b"k", b"1")
    kafka.logs[IN0].append(None)
    process(kafka, app_with(copy))
    assert kafka.committed[IN0] == 2


def test_large_outputs_are_split_into_batches_below_the_brokers_limit() -> None:
    kafka = kafka_with(0)
    kafka.append("in", b"k", b"1")
    sizes: list[int] = []

    def handle(record: Any, _: Any) -> Any:
        return [Write("out", b"k", bytes(300_000), (), 0) for _ in range(8)] + [Write("out", b"k", bytes(1_000_000))]

    component = Component(app="a", name="p", inputs=("in",), handle=handle)
    engine = engine_of(kafka, component)
    produce = engine._producer.produce

    async def measure(topic: str, partition: int, batches: Any) -> None:
        sizes.append(len(batches.build()))
        await produce(topic, partition, batches)

    engine._producer.produce = measure  # type: ignore[method-assign]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert max(sizes) <= 1_048_588
    assert len(kafka.values("out")) == 9


def test_a_slow_handler_keeps_polling_so_that_the_group_keeps_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "POLL_PAUSE_SECONDS", 0.05)

    async def slow(record: Any, target: Any) -> Any:
        await asyncio.sleep(0.01)
        return target.record(record.key, record.value)

    kafka = kafka_with(60)
    process(kafka, app_with(slow))
    assert copied(kafka) == everything(60)
    assert kafka.calls[: kafka.calls.index("close")].count("poll") > 8


# --- State ---


def counted(record: Any, counts: Any, target: Any) -> Any:
    count = counts.get(record.key, 0) + 1
    yield counts.put(record.key, count)
    assert counts.get(record.key) == count, "a handler must see what it has put"
    yield target.record(record.key, count)


def test_state_counts_every_record_once_over_units_aborts_and_restarts() -> None:
    kafka = kafka_with(100)
    kafka.fail("end", AbortTransaction("abort"), 2)
    kafka.fail("after_end", OutcomeUnknown("cut"), 1)
    process(kafka, app_with(counted, state=True))
    for number in range(100, 150):
        kafka.append("in", b"k%d" % (number % 5), b"1", partition=number % 5 % 2)
    engine = process(kafka, app_with(counted, state=True))
    for key in range(5):
        values = [int(r.value or b"") for r in kafka.records("out") if r.key == b"k%d" % key]
        assert values == list(range(1, 31))
    assert len(engine._stores) == 0, "state is kept after the partition was given back"


def test_state_is_carried_from_unit_to_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "UNIT_RECORDS_MAX", 7)
    kafka = kafka_with(100)
    process(kafka, app_with(counted, state=True))
    assert kafka.calls.count("end") >= 14
    assert kafka.calls.count("committed_offsets") == 1, "without a failure nothing is read back"
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 21)) * 5)


def test_state_of_a_committed_transaction_whose_answer_was_lost_is_read_back() -> None:
    kafka = kafka_with(10, keys=1)
    kafka.fail("after_end", OutcomeUnknown("cut"))
    kafka.append("in", b"k0", b"10")

    component = app_with(counted, state=True)
    engine = engine_of(kafka, component)
    assert kafka.consumer_made is not None
    kafka.consumer_made.per_poll = 3

    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert [int(value or b"") for value in kafka.values("out")] == list(range(1, 12))


def test_a_deleted_key_stays_deleted_after_a_restart() -> None:
    def handle(record: Any, counts: Any, target: Any) -> Any:
        yield target.record(record.key, counts.get(record.key, 0))
        yield counts.delete(record.key) if record.value == 1 else counts.put(record.key, 7)

    kafka = kafka_with(0)
    for value in (b"0", b"1"):
        kafka.append("in", b"k", value)
        process(kafka, app_with(handle, state=True))
    kafka.append("in", b"k", b"0")
    process(kafka, app_with(handle, state=True))
    assert kafka.values("out") == [b"0", b"7", b"0"]


def test_effects_of_a_handler_that_fails_half_way_are_dropped() -> None:
    def handle(record: Any, counts: Any, target: Any) -> Any:
        yield counts.put(record.key, 1)
        yield target.record(record.key, 1)
        raise ValueError("half way")

    kafka = kafka_with(1)
    process(kafka, app_with(handle, state=True))
    assert kafka.values("out") == []
    assert kafka.values("a.semel.state.counts") == []
    assert kafka.values("a.semel.park.in") == [b"0"]


# --- Poison ---


def headers_of(record: Any) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in record.headers}


def test_a_poison_record_parks_its_key_in_order_with_one_call_each() -> None:
    calls: Counter[str] = Counter()

    def handle(record: Any, target: Any) -> Any:
        calls[record.key] += 1
        if record.key == "k2" and record.value >= 50:
            raise ValueError(f"cannot do {record.value}")
        yield target.record(record.key, record.value)

    kafka = kafka_with(100)
    process(kafka, app_with(handle))
    parked = kafka.records("a.semel.park.in")
    assert [record.value for record in parked] == [b"%d" % number for number in range(52, 100, 5)]
    assert copied(kafka) == everything(100) - Counter(record.value for record in parked)
    assert calls["k2"] == 11, "later records of a parked key must not be tried"
    first, second = headers_of(parked[0]), headers_of(parked[1])
    assert first[parking.ERROR] == "ValueError"
    assert first[parking.MESSAGE] == "cannot do 52"
    assert first[parking.COMPONENT] == "p"
    assert first[parking.POSITION] == "in-0@31"
    assert (first[parking.TRIED], second[parking.TRIED]) == ("1", "0")


def test_a_parked_key_stays_parked_for_the_next_owner() -> None:
    kafka = kafka_with(0)
    kafka.append("in", b"bad", b"not a number")
    process(kafka, app_with(copy))
    kafka.append("in", b"bad", b"1")
    kafka.append("in", b"good", b"2")
    process(kafka, app_with(copy))
    assert kafka.values("out") == [b"2"]
    assert kafka.values("a.semel.park.in") == [b"not a number", b"1"]


def test_a_parked_key_of_another_component_is_not_ours() -> None:
    kafka = kafka_with(0)
    kafka.append("a.semel.park.in", b"k", b"1", headers=((parking.COMPONENT, b"other"), (parking.LANE, b"key")))
    kafka.append("in", b"k", b"2")
    process(kafka, app_with(copy))
    assert kafka.values("out") == [b"2"]


@pytest.mark.parametrize("broken", [b"\xff\xfe", None])
def test_records_whose_key_says_nothing_hold_up_only_themselves(broken: bytes | None) -> None:
    def handle(record: Any, target: Any) -> Any:
        if record.value == 0:
            raise ValueError("bad")
        yield target.record(record.key, record.value)

    kafka = kafka_with(0)
    for key, value in ((broken, b"0"), (b"k", b"1"), (broken, b"0"), (None, b"2")):
        kafka.append("in", key, value)
    process(kafka, app_with(handle))
    assert copied(kafka) == Counter([b"1", b"2"])
    assert kafka.values("a.semel.park.in") == [b"0", b"0"]


@pytest.mark.parametrize(
    "effect",
    [
        lambda target: target.record("k", "not an int"),
        lambda target: target.record(7, 7),
        lambda target: target.record("k", 1, headers=[("x", "text")]),
        lambda target: target.record("k", 1, headers=[("\ud800", b"")]),
        lambda target: Write("out", b"k", bytes(1_100_000)),
        lambda target: Write("out", b"k", b"1", (), 3),
        lambda target: "no effect",
        lambda target: object(),
    ],
)
def test_an_effect_that_cannot_be_written_parks_its_input(effect: Any) -> None:
    kafka = kafka_with(0)
    kafka.append("in", b"k", b"1")
    kafka.append("in", b"other", b"2")

    def handle(record: Any, target: Any) -> Any:
        yield effect(target) if record.key == "k" else target.record("other", 2)

    process(kafka, app_with(handle))
    assert kafka.values("a.semel.park.in") == [b"1"]
    assert kafka.values("out") == [b"2"]


def test_a_record_whose_output_the_broker_refuses_is_found_and_parked() -> None:
    kafka = kafka_with(20)
    refusal = AbortTransaction("too large for the topic")
    refusal.code = ErrorCode.MESSAGE_TOO_LARGE
    component = app_with(copy)
    engine = engine_of(kafka, component)
    produce = engine._producer.produce

    async def refuse(topic: str, partition: int, batches: Any) -> None:
        data = batches.build()
        if topic == "out" and b"\x0413" in data:
            raise refusal
        await produce(topic, partition, batches)

    engine._producer.produce = refuse  # type: ignore[method-assign]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert kafka.values("a.semel.park.in") == [b"13", b"18"], "the record that was refused, and the next of its key"
    assert copied(kafka) == everything(20) - Counter([b"13", b"18"])


def test_a_partition_that_goes_with_a_refused_record_leaves_the_others_working() -> None:
    kafka = kafka_with(20)
    refusal = AbortTransaction("too large for the topic")
    refusal.code = ErrorCode.MESSAGE_TOO_LARGE
    engine = engine_of(kafka, app_with(copy))
    consumer = kafka.consumer_made
    assert consumer is not None
    produce, poll = engine._producer.produce, consumer.poll
    gone: list[TopicPartition] = []

    async def refuse(topic: str, partition: int, batches: Any) -> None:
        if topic == "out" and b"\x0413" in batches.build():
            raise refusal
        await produce(topic, partition, batches)

    async def back() -> None:
        await consumer.revoke(IN1)

    async def again() -> None:
        await consumer.assign(IN1)

    async def poll_and_move(max_records: int, timeout: float) -> Any:
        if engine._handling.refused and not gone:
            gone.append(IN1)
            kafka.append("in", b"k0", b"99", partition=0)
            consumer.script = [back, again]
        return await poll(max_records, timeout)

    engine._producer.produce = refuse  # type: ignore[method-assign]
    consumer.poll = poll_and_move  # type: ignore[method-assign]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0 and bool(gone)))
    assert copied(kafka) == everything(20) + Counter([b"99"]) - Counter([b"13", b"18"])
    assert kafka.values("a.semel.park.in") == [b"13", b"18"]


def test_a_target_that_is_away_is_waited_for_and_nothing_is_parked() -> None:
    failures = [ConnectionError("refused"), TimeoutError("slow"), Retriable("busy")]

    def handle(record: Any, target: Any) -> Any:
        if record.value == 11 and failures:
            raise failures.pop()
        yield target.record(record.key, record.value)

    kafka = kafka_with(30)
    process(kafka, app_with(handle))
    assert copied(kafka) == everything(30)
    assert kafka.values("a.semel.park.in") == []
    assert not failures


def test_a_shortage_is_waited_for_and_a_record_that_always_has_one_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = [MemoryError(), OSError(errno.EMFILE, "Too many open files")]

    def handle(record: Any, target: Any) -> Any:
        if record.value == 11 and failures:
            raise failures.pop()
        if record.value == 17 and is_greedy:
            raise MemoryError
        yield target.record(record.key, record.value)

    is_greedy = False
    kafka = kafka_with(30)
    process(kafka, app_with(handle))
    assert not failures
    assert copied(kafka) == everything(30)
    assert kafka.values("a.semel.park.in") == []
    is_greedy = True
    monkeypatch.setattr("semel.processing.shortage.PATIENCE_SECONDS", 0.05)
    kafka = kafka_with(30)
    process(kafka, app_with(handle))
    assert b"17" in kafka.values("a.semel.park.in")


def test_an_output_topic_that_is_missing_is_waited_for() -> None:
    kafka = kafka_with(3)
    kafka.counts.pop("out")
    logs = {at: kafka.logs.pop(at) for at in list(kafka.logs) if at.topic == "out"}

    async def later() -> None:
        await asyncio.sleep(0.02)
        kafka.counts["out"] = 3
        kafka.logs.update(logs)

    async def both() -> None:
        await asyncio.gather(run_until(engine_of(kafka, app_with(copy)), lambda: kafka.lag("in") == 0), later())

    asyncio.run(both())
    assert copied(kafka) == everything(3)


def test_with_order_by_partition_a_poison_record_stops_its_partition_only() -> None:
    def handle(record: Any, target: Any) -> Any:
        if record.value == 10:
            raise ValueError("bad")
        yield target.record(record.key, record.value)

    kafka = kafka_with(50)
    metrics = Metrics()
    engine = engine_of(kafka, app_with(handle, ordering="partition"), metrics)
    asyncio.run(run_until(engine, lambda: kafka.committed.get(IN1) == 20 and bool(kafka.consumer_made.paused)))  # type: ignore[union-attr]
    assert kafka.consumer_made is not None
    assert kafka.consumer_made.paused == {IN0}
    assert kafka.committed[IN0] == 6, "the position must stay before the record"
    assert metrics.gauge("semel_stopped_partitions", "", ("component",)).value(component="p") == 1


def test_too_many_parked_keys_stop_the_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "PARKED_KEYS_MAX", 3)
    kafka = kafka_with(0)
    for number in range(6):
        kafka.append("in", b"k%d" % number, b"bad")
    kafka.append("in", b"fine", b"1", partition=1)
    process(kafka, app_with(copy), lambda: bool(kafka.consumer_made and kafka.consumer_made.paused))
    assert len(kafka.values("a.semel.park.in")) == 3
    assert kafka.committed[IN0] == 3, "the record that could not be parked must be read again"


# --- Partitions come and go ---


def test_work_in_hand_is_committed_when_a_partition_is_given_back() -> None:
    kafka = kafka_with(40)
    engine = engine_of(kafka, app_with(copy))
    consumer = kafka.consumer_made
    assert consumer is not None
    consumer.per_poll = 10

    async def one() -> None:
        return None

    async def back() -> None:
        await consumer.revoke(IN1)
        assert kafka.committed.get(IN1, 0) + kafka.committed.get(IN0, 0) > 0

    async def again() -> None:
        await consumer.assign(IN1)

    consumer.script = [one, back, one, again]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert copied(kafka) == everything(40)


@pytest.mark.parametrize("error", [AbortTransaction("ILLEGAL_GENERATION"), OutcomeUnknown("cut")])
def test_a_refused_commit_at_revocation_loses_and_doubles_nothing(error: SemelError) -> None:
    kafka = kafka_with(40)
    engine = engine_of(kafka, app_with(counted, state=True))
    consumer = kafka.consumer_made
    assert consumer is not None
    consumer.per_poll = 10

    async def one() -> None:
        return None

    async def back() -> None:
        kafka.fail("send_offsets" if isinstance(error, AbortTransaction) else "after_end", error)
        await consumer.revoke(IN1)

    async def again() -> None:
        await consumer.assign(IN1)

    consumer.script = [one, back, one, again]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 9)) * 5)


@pytest.mark.parametrize("lost", [(IN0, IN1), (IN1,)])
def test_work_in_hand_of_a_lost_partition_is_dropped_and_done_by_the_next_owner(lost: tuple[TopicPartition]) -> None:
    kafka = kafka_with(40)
    engine = engine_of(kafka, app_with(counted, state=True))
    consumer = kafka.consumer_made
    assert consumer is not None
    consumer.per_poll = 10

    async def one() -> None:
        return None

    async def lose() -> None:
        assert engine._unit.records > 0
        await consumer.lose(*lost)

    async def again() -> None:
        await consumer.assign(*lost)

    consumer.script = [one, lose, again]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 9)) * 5)


def test_a_partition_that_goes_and_comes_back_within_one_poll_loses_nothing() -> None:
    kafka = kafka_with(40)
    engine = engine_of(kafka, app_with(copy))
    consumer = kafka.consumer_made
    assert consumer is not None
    consumer.per_poll = 10

    async def one() -> None:
        return None

    async def there_and_back() -> None:
        await consumer.revoke(IN0)
        await consumer.assign(IN0)

    consumer.script = [one, there_and_back]
    asyncio.run(run_until(engine, lambda: kafka.lag("in") == 0))
    assert copied(kafka) == everything(40)


def test_the_offset_is_asked_for_before_the_changelogs_end() -> None:
    kafka = kafka_with(5)
    process(kafka, app_with(counted, state=True))
    first = kafka.calls.index("committed_offsets")
    assert "list_high_watermark" not in kafka.calls[:first]


def test_a_partition_whose_unread_records_were_deleted_stops_and_the_other_goes_on() -> None:
    kafka = kafka_with(10)
    kafka.committed = {IN0: 1, IN1: 0}
    kafka.starts[IN0] = 3
    metrics = Metrics()
    engine = engine_of(kafka, app_with(copy), metrics)
    asyncio.run(run_until(engine, lambda: kafka.committed[IN1] == 4 and bool(kafka.consumer_made.paused)))  # type: ignore[union-attr]
    assert kafka.committed[IN0] == 1
    assert {int(value or b"") % 5 % 2 for value in kafka.values("out")} == {1}


def test_records_that_are_deleted_before_a_recovery_stop_their_partition_only() -> None:
    kafka = kafka_with(10)
    kafka.fail("end", AbortTransaction("abort"))
    engine = engine_of(kafka, app_with(copy))
    abort = engine._producer.abort

    async def retention() -> None:
        kafka.committed[IN0] = 1
        kafka.starts[IN0] = 3
        await abort()

    engine._producer.abort = retention  # type: ignore[method-assign]
    asyncio.run(run_until(engine, lambda: kafka.committed.get(IN1) == 4 and bool(kafka.consumer_made.paused)))  # type: ignore[union-attr]
    assert kafka.committed[IN0] == 1
    assert {int(value or b"") % 5 % 2 for value in kafka.values("out")} == {1}


# --- Draining and measuring ---


def test_a_topic_that_is_made_again_under_us_stops_and_the_next_owner_stops_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LAG_SECONDS", 0.01)
    kafka = kafka_with(10)
    topic_id = ["old"]

    async def identity(topic: str) -> str:
        return f"fake/{topic}/{topic_id[0]}"

    kafka.topic_identity = identity  # type: ignore[method-assign]
    marks = Watermarks(tmp_path)

    def run(done: Callable[[], bool]) -> list[str]:
        engine = Engine(app_with(copy), "unused", SETTINGS, Env(), Metrics(), kafka=kafka, watermarks=marks)
        seen: list[str] = []

        def stopped() -> bool:
            seen[:] = [held.stopped for held in engine._inputs.values()] or seen
            return done() if not seen or not all(seen) else True

        asyncio.run(run_until(engine, stopped))
        return seen

    def made_again() -> bool:
        if kafka.lag("in") == 0 and topic_id[0] == "old":
            topic_id[0] = "new"
            kafka.append("in", b"k0", b"99")  # It stands where the old topic had something else.
        return False

    for why in (run(made_again), run(lambda: False)):
        assert len(why) == 2
        assert all(text.startswith("TOPIC_RECREATED") and str(tmp_path) not in text[:20] for text in why)
    assert copied(kafka) <= everything(10) + Counter([b"99"])
    assert sum(copied(kafka).values()) >= 10


@pytest.mark.parametrize("lacks", ["a.semel.park.in", "a.semel.state.counts"])
def test_a_partition_that_was_added_stops_alone_where_a_topic_beside_it_lacks_it(lacks: str) -> None:
    kafka = FakeKafka(**{"in": 3, "out": 3, "a__semel__state__counts": 3, "a__semel__park__in": 3})
    kafka.create(lacks, 2)
    kafka.logs.pop(TopicPartition(lacks, 2))
    for partition in range(3):
        kafka.append("in", b"k%d" % partition, b"1", partition)
    engine = engine_of(kafka, app_with(counted, state=True))
    added = TopicPartition("in", 2)
    asyncio.run(
        run_until(engine, lambda: kafka.lag("in") == 1 and bool(kafka.consumer_made and kafka.consumer_made.paused))
    )
    assert kafka.consumer_made is not None
    assert kafka.consumer_made.paused == {added}
    assert engine._inputs.get(added) is None or lacks in engine._inputs[added].stopped
    assert len(kafka.values("out")) == 2


def test_a_drain_commits_what_is_in_hand() -> None:
    async def slow(record: Any, target: Any) -> Any:
        await asyncio.sleep(0.001)
        return target.record(record.key, record.value)

    kafka = kafka_with(100)
    engine = engine_of(kafka, app_with(slow))
    asyncio.run(run_until(engine, lambda: "end" in kafka.calls))
    done = len(kafka.values("out"))
    assert 0 < done <= 100
    assert done == 100 - kafka.lag("in"), "outputs and position must agree"
    assert kafka.calls[-1] == "close"


def test_a_worker_that_is_cancelled_within_a_transaction_commits_no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "IDLE_COMMIT_SECONDS", 0.0)
    kafka = kafka_with(30)
    engine = engine_of(kafka, app_with(copy))

    async def main() -> None:
        stuck = asyncio.Event()

        async def never(topic: str, partition: int, batches: Any) -> None:
            stuck.set()
            await asyncio.Event().wait()

        engine._producer.produce = never  # type: ignore[method-assign]
        running = asyncio.create_task(engine.run())
        await stuck.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    assert kafka.committed == {}
    process(kafka, app_with(copy))
    assert copied(kafka) == everything(30)


def test_transactions_are_counted_by_outcome() -> None:
    kafka = kafka_with(30)
    kafka.fail("end", AbortTransaction("abort"))
    kafka.fail("after_end", OutcomeUnknown("cut"))
    metrics = Metrics()
    asyncio.run(run_until(engine_of(kafka, app_with(copy), metrics), lambda: kafka.lag("in") == 0))
    text = metrics.render()
    assert 'semel_transactions_total{component="p",outcome="aborted"} 1' in text
    assert 'semel_transactions_total{component="p",outcome="unknown"} 1' in text
    assert 'semel_open_transaction_age_seconds{component="p"} 0' in text
