"""While one transaction is on its way the next unit is worked on in memory: what may be seen of it, and what not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from semel.errors import AbortTransaction, Fenced, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import arm_failpoints, failpoint_hits
from semel.processing import engine as engine_module
from semel.processing import unit as unit_module
from semel.processing.component import Component
from semel.processing.engine import Engine
from semel.types import GroupMetadata
from tests.processing import test_engine
from tests.processing.fake_kafka import FakeKafka
from tests.processing.test_engine import (
    IN0,
    IN1,
    app_with,
    copied,
    copy,
    counted,
    engine_of,
    everything,
    headers_of,
    kafka_with,
    process,
    run_until,
)


@pytest.fixture(autouse=True)
def _quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "OVERLAP_POLL_SECONDS", 0.001)
    # A unit is cut where a test says so, not where a busy machine stood still.
    monkeypatch.setattr(test_engine, "SETTINGS", replace(test_engine.SETTINGS, commit_interval_ms=5_000))


class Held:
    """An engine whose first transaction waits for its end until the test says how it ends.

    `until(condition)` waits for the engine; `land(error)` answers EndTxn: committed, or this error instead.
    """

    def __init__(self, kafka: FakeKafka, component: Component) -> None:
        self.kafka = kafka
        self.engine: Engine = engine_of(kafka, component)
        self.groups: list[GroupMetadata] = []
        self.begun = 0
        self._answer: asyncio.Future[None] | None = None
        producer = self.engine._producer
        self._end, begin, send_offsets = producer.end_transaction, producer.begin, producer.send_offsets

        def counted_begin() -> None:
            self.begun += 1
            begin()

        async def seen_offsets(offsets: Any, group: GroupMetadata) -> None:
            self.groups.append(group)
            await send_offsets(offsets, group)

        producer.begin = counted_begin  # type: ignore[method-assign]
        producer.send_offsets = seen_offsets  # type: ignore[method-assign]
        producer.end_transaction = self._held_end  # type: ignore[method-assign]

    async def _held_end(self, commit: bool) -> None:
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            await self._answer
        await self._end(commit)

    def land(self, error: SemelError | None = None) -> None:
        assert self._answer is not None
        if error is None:
            self._answer.set_result(None)
        else:
            self._answer.set_exception(error)

    @property
    def consumer(self) -> Any:
        return self.kafka.consumer_made

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                assert not self.running.done(), self.running
                await asyncio.sleep(0.001)

    async def flying(self) -> None:
        await self.until(lambda: self._answer is not None)

    async def finished(self) -> None:
        await self.until(lambda: self.kafka.lag("in") == 0)
        await self.engine.drain()
        await self.running

    def play(self, scenario: Callable[[Held], Awaitable[None]]) -> None:
        async def main() -> None:
            self.running = asyncio.create_task(self.engine.run())
            try:
                await scenario(self)
            finally:
                self.running.cancel()
                await asyncio.gather(self.running, return_exceptions=True)
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"

        asyncio.run(main())


def noting(seen: list[int]) -> Callable[[Any, Any], Any]:
    """A handler that copies, and notes what it saw."""

    def handle(record: Any, target: Any) -> Any:
        seen.append(record.value)
        yield target.record(record.key, record.value)

    return handle


def more(kafka: FakeKafka, first: int, last: int, keys: int = 5) -> None:
    for number in range(first, last):
        kafka.append("in", b"k%d" % (number % keys), b"%d" % number, partition=number % keys % 2)


def test_the_next_records_are_worked_on_and_nothing_of_them_is_sent() -> None:
    kafka = kafka_with(10)
    seen: list[int] = []

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 10, 20)
        await held.until(lambda: len(seen) == 20)
        assert held.begun == 1
        assert kafka.calls.count("produce") == len(list(held.engine._flight.unit.seal({})))  # type: ignore[union-attr]
        assert kafka.committed == {}
        held.land()
        await held.finished()
        assert held.begun == 2, "what gathered meanwhile is one transaction"

    Held(kafka, app_with(noting(seen))).play(scenario)
    assert copied(kafka) == everything(20)
    assert len(seen) == 20, "nothing was worked on twice"


ENDS = [
    None,
    AbortTransaction("aborted"),
    OutcomeUnknown("nobody answered, and it did not happen"),
    Retriable("a mistake of ours"),
]


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_state_counts_over_a_transaction_that_is_on_its_way_however_it_ends(end: SemelError | None) -> None:
    kafka = kafka_with(20)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 20, 50)
        await held.until(lambda: held.engine._unit.records == 30)
        held.land(end)
        await held.finished()

    Held(kafka, app_with(counted, state=True)).play(scenario)
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 11)) * 5)
    more(kafka, 50, 55)
    process(kafka, app_with(counted, state=True))
    assert Counter(kafka.values("out"))[b"11"] == 5, "the next owner's state is what was committed"


def test_state_counts_when_the_answer_of_a_committed_transaction_is_lost() -> None:
    kafka = kafka_with(20)
    kafka.fail("after_end", OutcomeUnknown("it is committed, and the answer was lost"))

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 20, 50)
        await held.until(lambda: held.engine._unit.records == 30)
        held.land()
        await held.finished()

    Held(kafka, app_with(counted, state=True)).play(scenario)
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 11)) * 5)


@pytest.mark.parametrize("end", ENDS[:2], ids=repr)
def test_a_key_that_is_parked_on_its_way_holds_up_its_records_behind(end: SemelError | None) -> None:
    tried: Counter[int] = Counter()

    def handle(record: Any, target: Any) -> Any:
        tried[record.value] += 1
        if record.value == 2:
            raise ValueError("poison")
        yield target.record(record.key, record.value)

    kafka = kafka_with(5)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 5, 15)
        await held.until(lambda: held.engine._unit.records == 10)
        held.land(end)
        await held.finished()

    Held(kafka, app_with(handle)).play(scenario)
    assert kafka.values("a.semel.park.in") == [b"2", b"7", b"12"]
    assert copied(kafka) == everything(15) - Counter([b"2", b"7", b"12"])
    assert tried[7] == tried[12] == 0
    tried_headers = [headers_of(record)["semel-park-tried"] for record in kafka.records("a.semel.park.in")]
    assert tried_headers == ["1", "0", "0"]


def test_the_limit_of_parked_keys_counts_those_that_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.processing.parking.PARKED_KEYS_MAX", 3)

    def handle(record: Any, target: Any) -> Any:
        raise ValueError("poison")

    kafka = kafka_with(0)
    for number in range(2):
        kafka.append("in", b"k%d" % number, b"%d" % number)

    async def scenario(held: Held) -> None:
        await held.flying()
        for number in range(2, 6):
            kafka.append("in", b"k%d" % number, b"%d" % number)
        await held.until(lambda: bool(held.engine._inputs[IN0].stopped))
        held.land()
        await held.until(lambda: len(kafka.values("a.semel.park.in")) == 3)

    Held(kafka, app_with(handle)).play(scenario)
    assert kafka.committed[IN0] == 3


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_a_partition_that_is_given_back_takes_both_units_with_it(end: SemelError | None) -> None:
    kafka = kafka_with(20)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 20, 40)
        await held.until(lambda: held.engine._unit.records == 20)
        gone = asyncio.create_task(held.consumer.revoke(IN1))
        await asyncio.sleep(0.01)
        assert not gone.done(), "a partition must not go while its transaction is on its way"
        held.land(end)
        await gone
        if end is None:
            assert kafka.lag("in") == 0, "both units were ours to commit"
        await held.consumer.assign(IN1)
        await held.finished()

    Held(kafka, app_with(counted, state=True)).play(scenario)
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 9)) * 5)


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_of_a_lost_partition_nothing_is_committed_that_was_not_on_its_way(end: SemelError | None) -> None:
    kafka = kafka_with(20)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 20, 40)
        await held.until(lambda: held.engine._unit.records == 20)
        gone = asyncio.create_task(held.consumer.lose(IN1))
        held.land(end)
        await gone
        assert kafka.committed.get(IN1, 0) == (8 if end is None else 0)
        await held.consumer.assign(IN1)
        await held.finished()

    Held(kafka, app_with(counted, state=True)).play(scenario)
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 9)) * 5)


def test_a_unit_is_sent_as_the_member_that_worked_on_it() -> None:
    """Who became another member meanwhile may have given the partition away and got it back."""
    kafka = kafka_with(10)

    async def scenario(held: Held) -> None:
        produce = held.engine._producer.produce
        meanwhile = GroupMetadata("group", 2, "another member", "instance")

        async def slow(topic: str, partition: int, batches: Any) -> None:
            held.consumer.group_metadata = lambda: meanwhile
            await produce(topic, partition, batches)

        held.engine._producer.produce = slow  # type: ignore[method-assign]
        await held.flying()
        held.land()
        more(kafka, 10, 20)
        await held.finished()
        assert [group.generation_id for group in held.groups] == [1, 2]

    Held(kafka, app_with(copy)).play(scenario)


def test_who_is_no_member_sends_nothing_and_tries_again() -> None:
    kafka = kafka_with(10)

    async def scenario(held: Held) -> None:
        refusals = [Retriable("no member now"), Retriable("no member now")]

        def metadata() -> GroupMetadata:
            if refusals:
                raise refusals.pop()
            return GroupMetadata("group", 1, "member", "instance")

        held.consumer.group_metadata = metadata
        await held.flying()
        assert (held.begun, refusals) == (1, [])
        held.land()
        await held.finished()

    kafka_engine = Held(kafka, app_with(copy))
    kafka_engine.play(scenario)
    assert copied(kafka) == everything(10)


def test_a_full_unit_waits_for_the_one_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "UNIT_RECORDS_MAX", 7)
    kafka = kafka_with(50)
    seen: list[int] = []

    async def scenario(held: Held) -> None:
        await held.flying()
        await held.until(lambda: len(seen) == 14)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(seen) == 14, "memory must be bounded while Kafka does not answer"
        held.land()
        await held.finished()

    Held(kafka, app_with(noting(seen))).play(scenario)
    assert copied(kafka) == everything(50)


def test_a_handler_that_must_wait_behind_a_transaction_loses_nothing() -> None:
    kafka = kafka_with(10)
    tries = 0

    def handle(record: Any, target: Any) -> Any:
        nonlocal tries
        if record.value == 15:
            tries += 1
            if tries < 3:
                raise ConnectionError("away")
        yield target.record(record.key, record.value)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 10, 20)
        await held.until(lambda: tries == 1)
        held.land()
        await held.finished()

    Held(kafka, app_with(handle)).play(scenario)
    assert copied(kafka) == everything(20)
    assert kafka.values("a.semel.park.in") == []


def test_fenced_on_its_way_commits_nothing_more() -> None:
    kafka = kafka_with(10)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 10, 20)
        await held.until(lambda: held.engine._unit.records == 10)
        held.land(Fenced("PRODUCER_FENCED"))
        with pytest.raises(Fenced):
            await held.running
        assert held.begun == 1

    Held(kafka, app_with(copy)).play(scenario)
    assert kafka.values("out") == []
    assert kafka.committed == {}


def test_a_worker_that_is_cancelled_over_two_units_commits_neither() -> None:
    kafka = kafka_with(10)

    async def scenario(held: Held) -> None:
        await held.flying()
        more(kafka, 10, 20)
        await held.until(lambda: held.engine._unit.records == 10)
        held.running.cancel()
        await asyncio.gather(held.running, return_exceptions=True)

    Held(kafka, app_with(copy)).play(scenario)
    assert kafka.committed == {}
    assert "abort" in kafka.calls
    process(kafka, app_with(copy))
    assert copied(kafka) == everything(20)


@pytest.mark.parametrize("point", ["unit.under_way", "unit.before_landing"])
def test_a_worker_that_dies_between_two_units_is_succeeded_by_one_that_does_the_rest(point: str) -> None:
    kafka = kafka_with(20)
    engine = engine_of(kafka, app_with(counted, state=True))
    send_offsets = engine._producer.send_offsets

    async def slow(offsets: Any, group: GroupMetadata) -> None:
        if not kafka.committed:
            more(kafka, 20, 50)
        while point == "unit.under_way" and not failpoint_hits().get(point):
            await asyncio.sleep(0.001)
        await send_offsets(offsets, group)

    engine._producer.send_offsets = slow  # type: ignore[method-assign]
    arm_failpoints(f"{point}:raise:1")
    with pytest.raises(SemelError, match=point):
        asyncio.run(run_until(engine, lambda: False))
    process(kafka, app_with(counted, state=True))
    assert sorted(int(v or b"") for v in kafka.values("out")) == sorted(list(range(1, 11)) * 5)
