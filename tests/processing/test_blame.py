"""Whose fault a failure is: outages are waited for at little cost, poison is parked at little cost, nothing is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from semel.app import App
from semel.env import Env
from semel.errors import Fenced, OutcomeUnknown, Reject, Retriable
from semel.processing import blame as blame_module
from semel.processing.blame import Breaker, Kind, classify
from semel.processing.engine import Engine
from semel.processing.metrics import Metrics
from semel.settings import Settings
from tests.processing.fake_kafka import FakeKafka
from tests.processing.test_engine import run_until

PARK = "a.semel.park.in"


@pytest.fixture(autouse=True)
def _quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame_module, "WAIT_SECONDS", (0.001, 0.01))


class ForeignError(Exception):
    """What a library raises that nobody knows."""


class Target:
    """What the handler needs: `fails(value)` gives what it raises for a record, if anything."""

    def __init__(self, **options: Any) -> None:
        self.kafka = FakeKafka(**{"in": 2, "out": 1, "a__semel__park__in": 2})
        self.options = options
        self.calls: Counter[int] = Counter()
        self.order: list[int] = []
        self.fails: Callable[[int], Exception | None] = lambda _: None

    def feed(self, *values: int, key: str = "", partition: int = 0) -> None:
        for value in values:
            self.kafka.append("in", (key or f"k{value}").encode(), b"%d" % value, partition)

    def run(self, done: Callable[[], bool], timeout: float = 20.0) -> None:
        app = App("a")
        source = app.topic("in", key=str, value=int)
        target = app.topic("out", key=str, value=int)

        def one(record: Any) -> Any:
            self.calls[record.value] += 1
            self.order.append(record.value)
            error = self.fails(record.value)
            if error is not None:
                raise error
            return target.record(record.key, record.value)

        if self.options.get("batch"):
            app.processor(source, name="p", batch=True)(lambda records: [one(record) for record in records])
        else:
            app.processor(source, name="p")(lambda record: one(record))
        settings = Settings(instance="test", commit_interval_ms=20)
        engine = Engine(app.components()[0], "unused", settings, Env(), Metrics(), kafka=self.kafka)
        asyncio.run(run_until(engine, done, timeout))

    def through(self) -> bool:
        return self.kafka.lag("in") == 0

    def out(self) -> list[int]:
        return [int(value or b"") for value in self.kafka.values("out")]

    def parked(self) -> list[int]:
        return [int(value or b"") for value in self.kafka.values(PARK)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Fenced("x"), Kind.FENCED),
        (Retriable("x"), Kind.WORLD),
        (OutcomeUnknown("x"), Kind.WORLD),
        (ConnectionRefusedError(), Kind.WORLD),
        (TimeoutError(), Kind.WORLD),
        (Reject("x"), Kind.DATA),
        (ValueError("x"), Kind.DATA),
        (KeyError("x"), Kind.DATA),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), Kind.DATA),
        (OSError("x"), Kind.UNKNOWN),
        (ForeignError("x"), Kind.UNKNOWN),
    ],
)
def test_a_class_says_whose_fault_it_is_or_nothing(error: Exception, kind: Kind) -> None:
    assert classify(error) is kind


@pytest.mark.parametrize("batch", [False, True])
def test_an_outage_for_one_partition_holds_up_that_one_only_and_keeps_its_order(batch: bool) -> None:
    target = Target(batch=batch)
    target.feed(*range(10))
    target.feed(*range(100, 140), partition=1)
    is_away = [True]
    target.fails = lambda value: ConnectionError("away") if value == 3 and is_away[0] else None

    def done() -> bool:
        if sorted(target.out())[-40:] == list(range(100, 140)) and target.calls[3] > 2:
            is_away[0] = False
        return target.through()

    target.run(done)
    assert [value for value in target.out() if value < 100] == list(range(10))
    assert Counter(target.out()) == Counter([*range(10), *range(100, 140)])
    assert target.parked() == []
    if not batch:
        assert max(target.calls[value] for value in target.calls if value != 3) == 1, "what is done is not repeated"


def test_an_outage_for_everybody_costs_one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame_module, "WAIT_SECONDS", (0.01, 0.05))
    target = Target()
    for partition in (0, 1):
        target.feed(*range(100 * partition, 100 * partition + 50), partition=partition)
    failures = [0]

    def fails(value: int) -> Exception | None:
        failures[0] += 1
        return ConnectionError("away") if failures[0] <= 12 else None

    target.fails = fails
    target.run(target.through)
    assert sum(target.calls.values()) == 100 + 12, "each failure is one call, and nothing that was done is repeated"
    for partition in (0, 1):
        assert [value for value in target.out() if value // 100 == partition] == list(
            range(100 * partition, 100 * partition + 50)
        )
    assert target.parked() == []


def test_a_record_that_fails_alone_for_an_unknown_reason_is_parked_once_others_succeed() -> None:
    target = Target()
    target.feed(7)
    target.fails = lambda value: ForeignError("what?") if value == 7 else None
    target.run(lambda: target.calls[7] >= 4)
    assert target.parked() == [], "alone, it says nothing about whose fault it is"
    assert target.kafka.lag("in") == 1
    target.feed(8, 9)
    target.run(target.through)
    assert (target.parked(), target.out()) == ([7], [8, 9])


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("error", [ForeignError("what?"), ValueError("bad"), Reject("no")])
def test_a_burst_of_poison_costs_few_calls_a_record(error: Exception, batch: bool) -> None:
    target = Target(batch=batch)
    target.feed(*range(200))
    target.fails = lambda value: type(error)(*error.args) if 50 <= value < 150 else None
    target.run(target.through)
    assert target.parked() == list(range(50, 150))
    assert target.out() == [*range(50), *range(150, 200)]
    poison = sum(target.calls[value] for value in range(50, 150))
    limit = 1 if not batch and not isinstance(error, ForeignError) else 10
    assert poison <= limit * 100
    assert sum(target.calls.values()) <= (limit + 2) * 200


def test_a_target_that_is_away_in_an_unknown_way_parks_nothing() -> None:
    target = Target()
    target.feed(*range(60))
    is_away = [True]
    target.fails = lambda value: ForeignError("connection reset") if value >= 20 and is_away[0] else None

    def done() -> bool:
        is_away[0] = is_away[0] and sum(target.calls.values()) < 90
        return target.through()

    target.run(done)
    assert target.parked() == []
    assert target.out() == list(range(60))


def test_a_handler_may_name_the_moment_and_too_many_failures_are_tried_one_at_a_time() -> None:
    now = [100.0]
    breaker = Breaker(Env(monotonic=lambda: now[0]))
    assert breaker.failed(b"a", 7.5) == 107.5
    for key in (b"a", b"b", b"b"):
        breaker.failed(key, 0.0)
        assert breaker.may_try()
    until = breaker.failed(b"c", 0.0)
    assert breaker.is_open
    assert not breaker.may_try()
    now[0] = until
    assert breaker.may_try()
    breaker.succeeded()
    assert not breaker.is_open
