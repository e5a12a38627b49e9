"""Parked records that are released: in order, once, by the owner, whatever fails on the way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from semel import history
from semel.app import App
from semel.env import Env
from semel.errors import AbortTransaction, ErrorCode, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import arm_failpoints, failpoint_hits
from semel.processing import engine as engine_module
from semel.processing import parking
from semel.processing import release as release_module
from semel.processing.component import Component
from semel.processing.engine import Engine
from semel.processing.faults import Fault, build_at_least
from semel.processing.metrics import Metrics
from semel.processing.parklog import OUTCOME, Command, Outcome, ParkLog, command_record
from semel.settings import Settings
from semel.types import Record, TopicPartition
from tests.processing.fake_kafka import FakeBatch, FakeKafka, FakeReader
from tests.processing.test_engine import run_until

IN0 = TopicPartition("in", 0)
PARK = "a.semel.park.in"
SETTINGS = Settings(instance="test", commit_interval_ms=20, build="1")


@pytest.fixture(autouse=True)
def _quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PARK_LOOK_SECONDS", 0.005)


class World:
    """A topic of one partition, a handler that refuses what is in `bad`, and engines over it."""

    def __init__(self) -> None:
        self.kafka = FakeKafka(**{"in": 1, "out": 1, "a__semel__park__in": 1, "a__semel__state__counts": 1})
        self.bad: set[int] = set()
        self.away: list[Exception] = []
        self.calls: Counter[int] = Counter()
        self.numbers = 0

    def component(self) -> Component:
        app = App("a")
        source = app.topic("in", key=str, value=int)
        target = app.topic("out", key=str, value=list[int])
        counts = app.state("counts", key=str, value=int)

        @app.processor(source, state=counts, name="p")
        def handle(record: Any, counts: Any) -> Any:
            self.calls[record.value] += 1
            number = counts.get(record.key, 0) + 1
            yield counts.put(record.key, number)
            if record.value in self.bad:
                raise ValueError(f"cannot do {record.value}")
            if self.away:
                raise self.away.pop()
            yield target.record(record.key, [record.value, number])

        return app.components()[0]

    def feed(self, key: str, *values: int) -> None:
        for value in values:
            self.kafka.append("in", key.encode(), b"%d" % value)

    def ask(self, verb: Any, *offsets: int, **options: Any) -> str:
        self.numbers += 1
        command = Command(id=f"c{self.numbers}", verb=verb, offsets=list(offsets), by="me", **options)
        value, headers = command_record(command, "p")
        self.kafka.append(PARK, None, value, headers=headers)
        return command.id

    def run(self, done: Callable[[], bool], settings: Settings = SETTINGS, timeout: float = 10.0) -> Engine:
        engine = Engine(self.component(), "unused", settings, Env(), Metrics(), kafka=self.kafka)
        asyncio.run(run_until(engine, done, timeout))
        return engine

    def through(self) -> bool:
        return self.kafka.lag("in") == 0

    def finished(self) -> bool:
        """Whether every command has come to its end, and the input too."""
        return self.through() and not self.log().commands

    def log(self) -> ParkLog:
        log = ParkLog("p")
        for record in self.kafka.records(PARK):
            log.take(record)
        return log

    def outcomes(self) -> list[Outcome]:
        records = self.kafka.records(PARK)
        return [
            msgspec.json.decode(record.value or b"", type=Outcome)
            for record in records
            if dict(record.headers).get(parking.KIND) == OUTCOME
        ]

    def out(self, key: str) -> list[list[int]]:
        return [msgspec.json.decode(r.value or b"") for r in self.kafka.records("out") if r.key == key.encode()]


def parked_world() -> World:
    """Key k: 0 done, 1 poison, 2 and 3 wait behind it; key j: 10 done."""
    world = World()
    world.bad = {1}
    world.feed("k", 0, 1, 2, 3)
    world.feed("j", 10)
    world.run(world.through)
    assert list(world.log().waiting) == [1, 2, 3]
    assert world.calls == {0: 1, 1: 1, 10: 1}
    return world


def test_a_released_key_is_worked_on_in_order_and_goes_on_live() -> None:
    world = parked_world()
    world.bad = set()
    world.ask("retry", 1)
    world.feed("k", 4)
    world.run(world.finished)
    world.feed("k", 5)
    world.run(world.through)
    assert world.out("k") == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]], "order, and the state of each once"
    assert world.calls == {value: 1 + (value == 1) for value in (0, 1, 2, 3, 4, 5, 10)}
    assert not world.log().waiting
    assert not world.log().lanes


def test_a_running_owner_sees_a_command_and_needs_no_restart() -> None:
    world = parked_world()
    world.bad = set()
    asked: list[str] = []

    def later() -> bool:
        if not asked and "poll" in world.kafka.calls[-3:]:
            asked.append(world.ask("retry", 3))
            world.feed("j", 11)
        return bool(asked) and world.finished()

    world.kafka.calls.clear()
    world.run(later)
    assert [value for value, _ in world.out("k")] == [0, 1, 2, 3], "naming a later record releases from the first on"


def test_what_comes_while_a_key_is_released_waits_or_flows_but_never_overtakes() -> None:
    world = parked_world()
    world.bad = set()
    for value in range(4, 60):
        world.feed("k", value)
        if value % 10 == 0:
            world.ask("retry", 1)
    world.run(world.finished)
    assert [value for value, _ in world.out("k")] == list(range(60))


def test_a_record_that_fails_again_stays_with_everything_behind_it_at_one_call() -> None:
    world = parked_world()
    world.bad = {2}
    command = world.ask("retry", 1)
    world.run(world.finished)
    assert [value for value, _ in world.out("k")] == [0, 1]
    assert list(world.log().waiting) == [2, 3]
    assert (world.calls[2], world.calls[3]) == (1, 0)
    (outcome,) = world.outcomes()
    assert (outcome.command, outcome.released, outcome.by, outcome.finished) == (command, [1], "me", True)
    assert [(failed.offset, failed.fault.message) for failed in outcome.failed] == [(2, "cannot do 2")]
    world.feed("k", 4)
    world.run(world.through)
    assert list(world.log().waiting) == [2, 3, 5]
    world.bad = set()
    world.ask("retry", 2)
    world.run(world.finished)
    assert [value for value, _ in world.out("k")] == [0, 1, 2, 3, 4]


def test_a_discarded_record_is_gone_visibly_and_the_key_goes_on() -> None:
    world = parked_world()
    world.ask("discard", 1, reason="a test")
    world.run(world.finished)
    assert list(world.log().waiting) == [2, 3], "what waits behind it is not dropped with it"
    world.ask("retry", 2)
    world.feed("k", 4)
    world.run(world.finished)
    assert [value for value, _ in world.out("k")] == [0, 2, 3, 4]
    assert [outcome.discarded for outcome in world.outcomes()] == [[1], []]


def test_an_edited_record_is_handled_with_its_new_value_and_both_digests_are_kept() -> None:
    world = parked_world()
    world.ask("edit", 1, value=b"7")
    world.run(world.finished)
    assert "SEMEL_PARK_EDIT" in world.outcomes()[0].refused
    assert list(world.log().waiting) == [1, 2, 3], "edits are off unless they are switched on"
    world.ask("edit", 1, value=b"7")
    world.run(world.finished, Settings(instance="test", commit_interval_ms=20, park_edit="yes"))
    assert [value for value, _ in world.out("k")] == [0, 7, 2, 3]
    outcome = world.outcomes()[-1]
    assert (outcome.old, outcome.new, outcome.by) == (history.digest(b"1"), history.digest(b"7"), "me")


def test_a_command_of_another_build_waits_for_that_build() -> None:
    world = parked_world()
    world.bad = set()
    world.ask("retry", 1, build="1.10")
    world.run(world.through, Settings(instance="test", build="1.9"))
    assert len(world.log().commands) == 1
    world.run(world.finished, Settings(instance="test", build="1.10"))
    assert [value for value, _ in world.out("k")] == [0, 1, 2, 3]


def test_a_new_build_tries_once_where_it_is_asked_to() -> None:
    world = parked_world()
    builds = [Settings(instance="test", build=build, park_retry="build", commit_interval_ms=20) for build in "112"]
    for number, settings in enumerate(builds):
        world.feed("j", 20 + number)
        calls = 2 if settings.build == "2" else 1
        world.run(lambda calls=calls: world.through() and world.calls[1] == calls, settings)  # type: ignore[misc]
        assert world.calls[1] == calls
    world.bad = set()
    world.run(lambda: not world.log().waiting, Settings(instance="test", build="3", park_retry="build"))
    assert [value for value, _ in world.out("k")] == [0, 1, 2, 3]


FAILURES = [
    (call, error)
    for call in ("begin", "produce", "send_offsets", "end", "after_end", "list_high_watermark", "read")
    for error in (AbortTransaction("abort"), OutcomeUnknown("unknown"), Retriable("later"))
    if not (call in ("after_end", "list_high_watermark", "read") and isinstance(error, AbortTransaction))
]


@pytest.mark.parametrize(("call", "error"), FAILURES)
def test_a_release_that_fails_at_any_call_loses_and_doubles_nothing(call: str, error: SemelError) -> None:
    world = parked_world()
    world.bad = set()
    world.ask("retry", 1)
    world.feed("k", 4)
    engine_failed = [False]

    def armed() -> bool:
        if not engine_failed[0]:
            engine_failed[0] = True
            world.kafka.fail(call, error, 2)
        return world.finished()

    world.run(armed)
    world.feed("k", 5)
    world.run(world.through)
    assert world.out("k") == [[value, value + 1] for value in range(6)]


@pytest.mark.parametrize(
    "point", ["release.asked", "release.handled", "unit.after_produce", "unit.after_end_transaction"]
)
@pytest.mark.parametrize("action", ["raise", "cancel"])
def test_a_release_that_is_broken_off_leaves_all_or_nothing_of_it(point: str, action: str) -> None:
    world = parked_world()
    world.bad = set()
    world.ask("retry", 1)
    arm_failpoints(f"{point}:{action}:1")
    with suppress(SemelError, asyncio.CancelledError):
        world.run(world.finished)
    assert failpoint_hits()[point] == 1 or action == "raise"
    arm_failpoints("")
    world.feed("k", 4)
    world.run(world.finished)
    assert world.out("k") == [[value, value + 1] for value in range(5)]


def test_a_target_that_is_away_delays_a_release_and_not_the_others() -> None:
    world = parked_world()
    world.bad = set()
    world.ask("retry", 1)
    world.away = [ConnectionError("refused"), TimeoutError("slow"), Retriable("busy")]
    world.run(world.finished)
    assert [value for value, _ in world.out("k")] == [0, 1, 2, 3]
    assert not world.away


def test_a_large_release_goes_in_several_units_and_a_failed_lane_is_not_tried_twice() -> None:
    world = World()
    world.bad = set(range(100))
    for value in range(40):
        world.feed(f"k{value % 4}", value)
    world.run(world.through)
    world.bad = {3}
    world.calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "RELEASE_RECORDS_MAX", 6)
        world.ask("retry", *range(4))
        world.run(world.finished)
    assert world.calls == {value: 1 for value in range(40) if value % 4 != 3} | {3: 1}
    for key in range(3):
        assert [value for value, _ in world.out(f"k{key}")] == list(range(key, 40, 4))
    assert [waiting.offset for waiting in world.log().waiting.values()] == list(range(3, 40, 4))
    assert sum(outcome.finished for outcome in world.outcomes()) == 1


def test_a_released_record_whose_output_the_broker_refuses_stays_parked_and_the_others_go() -> None:
    world = World()
    world.bad = {1, 2, 3}
    for value in (1, 2, 3):
        world.feed(f"k{value}", value)
    world.run(world.through)
    world.bad = set()
    world.ask("retry", 0, 1, 2)
    refusal = AbortTransaction("too large for the topic")
    refusal.code = ErrorCode.MESSAGE_TOO_LARGE
    engine = Engine(world.component(), "unused", SETTINGS, Env(), Metrics(), kafka=world.kafka)
    produce = engine._producer.produce

    async def refuse(topic: str, partition: int, batches: Any) -> None:
        if topic == "out" and b"[2,1]" in batches.build():
            raise refusal
        await produce(topic, partition, batches)

    engine._producer.produce = refuse  # type: ignore[method-assign]

    async def until() -> None:
        running = asyncio.create_task(engine.run())
        async with asyncio.timeout(10):
            while not world.finished():
                await asyncio.sleep(0.001)
        await engine.drain()
        await running

    asyncio.run(until())
    assert sorted(value for record in "123" for value, _ in world.out(f"k{record}")) == [1, 3]
    assert list(world.log().waiting) == [1]


def test_a_full_park_stops_the_partition_and_a_release_lets_it_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "PARKED_KEYS_MAX", 2)
    world = World()
    world.bad = {1, 2, 3}
    for value in (1, 2, 3, 4):
        world.feed(f"k{value}", value)
    asked: list[str] = []

    def ask_when_stopped() -> bool:
        consumer = world.kafka.consumer_made
        if consumer is not None and consumer.paused and not asked and world.kafka.committed.get(IN0) == 2:
            world.bad = {2, 3}
            asked.append(world.ask("retry", 0))
        return bool(asked) and world.finished()

    world.run(ask_when_stopped)  # Its position stands before the record that could not be parked: nothing is dropped.
    assert sorted(world.log().waiting) == [1, 2]
    assert (world.out("k1"), world.out("k4")) == ([[1, 1]], [[4, 1]])


def test_what_cannot_be_read_in_time_is_released_later_and_live_records_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_module, "PARK_READ_SECONDS", 0.01)
    world = parked_world()
    world.bad = set()
    world.run(world.through)
    world.kafka.calls.clear()
    behind = [True]

    class Behind(FakeReader):
        """A reader that stands before an open transaction of somebody else."""

        async def poll(self, max_records: int, timeout: float) -> FakeBatch:
            if not behind[0] or world.numbers == 0:
                return await super().poll(max_records, timeout)
            await asyncio.sleep(0.001)
            return FakeBatch([], {})

    world.kafka.reader = lambda: Behind(world.kafka)  # type: ignore[method-assign]

    def done() -> bool:
        if world.numbers == 0 and "poll" in world.kafka.calls:
            world.ask("retry", 1)
            world.feed("j", 11)
        behind[0] = behind[0] and not (world.numbers and world.through())
        return not behind[0] and world.finished()

    world.run(done)
    assert [value for value, _ in world.out("j")] == [10, 11]
    assert [value for value, _ in world.out("k")] == [0, 1, 2, 3]


# --- The log of a park topic, and what is kept of an error ---


def test_records_of_before_and_bytes_of_nobody_are_read_without_harm() -> None:
    log = ParkLog("p")
    component = (parking.COMPONENT, b"p")
    for number, headers in enumerate(
        [
            (component, (parking.POSITION, b"in-0@5"), (parking.LANE, b"key"), (parking.ERROR, b"ValueError")),
            (component, (parking.POSITION, b"nonsense")),
            (component, (parking.KIND, b"command")),
            (component, (parking.KIND, b"what is that")),
            ((parking.COMPONENT, b"other"), (parking.POSITION, b"in-0@6"), (parking.LANE, b"key")),
        ]
    ):
        log.take(Record(PARK, 0, number, 0, b"k", b"{", headers))
    assert list(log.waiting) == [5]
    assert log.counts() == ({b"k": 1}, 1)
    assert log.next == 5


def test_failures_of_one_cause_are_one_group_and_other_builds_are_others() -> None:
    def fail(kind: type[Exception], text: str) -> Exception:
        try:
            raise kind(text)
        except kind as error:
            return error

    first = Fault.of(fail(ValueError, "a"), "1")
    assert first.group == Fault.of(fail(ValueError, "b"), "1").group
    assert first.group != Fault.of(fail(KeyError, "a"), "1").group
    assert first.group != Fault.of(fail(ValueError, "a"), "2").group
    assert first.frames == "test_release.py:fail"
    assert len(Fault.of(fail(ValueError, "x" * 9_000 + "\ud800"), "").message) == 2_000


@pytest.mark.parametrize(
    ("build", "least", "is_enough"),
    [("2", "", True), ("10", "9", True), ("1.9", "1.10", False), ("1.10", "1.10", True), ("", "1", False)],
)
def test_builds_are_compared_as_people_do(build: str, least: str, is_enough: bool) -> None:
    assert build_at_least(build, least) is is_enough
