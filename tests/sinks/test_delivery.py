"""Delivery modes of a sink: what a kill -9 or a lost answer may cost in each of them, and what it must not."""

from __future__ import annotations

import logging
import signal
from collections import Counter

import pytest

from semel import history
from semel.errors import ConfigurationError, OutcomeUnknown
from semel.history import Batch
from semel.processing.component import DELIVERIES, Delivery
from semel.sinks.contract import PartitionsLost, Unavailable
from semel.sinks.sql import SqlSink
from tests.sinks import child, ledger
from tests.sinks.test_crashes import TOTAL, check_exact, expected, start

WEAK: list[Delivery] = ["at-least-once", "at-most-once"]
# The first batch has a poison record, so its effects are tried twice; each batch takes two transactions.
BETWEEN_AND_BEHIND = ["sink.before_begin:kill:3", "sink.after_db_commit:kill:2"]
BETWEEN = ["sink.after_db_commit:kill:1", "sink.before_db_commit:kill:4"]


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_when_nothing_fails_every_record_has_its_effects_once(
    url: str, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIVERY", delivery)
    child.work(url, TOTAL)
    check_exact(url)


@pytest.mark.parametrize("trap", BETWEEN_AND_BEHIND)
def test_at_least_once_loses_nothing_when_it_is_killed(url: str, trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(url, trap, DELIVERY="at-least-once").wait(30) == -signal.SIGKILL
    monkeypatch.setenv("DELIVERY", "at-least-once")
    child.work(url, TOTAL)
    applied, parked = expected()
    found = Counter(ledger.seen(url))
    assert set(found) == set(applied)
    assert [at[:2] for at in ledger.parked(url)] == parked, "a record is parked once in every mode"
    times = 2 if trap == BETWEEN_AND_BEHIND[0] else 1
    assert max(found.values()) == times, "who dies between the two steps writes the effects again"


@pytest.mark.parametrize("trap", BETWEEN)
def test_at_most_once_doubles_nothing_when_it_is_killed(url: str, trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(url, trap, DELIVERY="at-most-once").wait(30) == -signal.SIGKILL
    monkeypatch.setenv("DELIVERY", "at-most-once")
    child.work(url, TOTAL)
    applied, parked = expected()
    found = Counter(ledger.seen(url))
    assert set(found.values()) == {1}
    assert set(found) < set(applied), "who dies between the two steps gives the effects up"
    assert {at[:2] for at in ledger.parked(url)} <= set(parked)


class Handler:
    """Counts, and fails as often as it is told."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self, records: object, db: object) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        ledger.count(records, db)  # type: ignore[arg-type]


def owner(url: str, handler: object, delivery: Delivery) -> SqlSink:
    sink = ledger.sink(url, handler, delivery=delivery)  # type: ignore[arg-type]
    sink.take_over([ledger.claim()])
    return sink


@pytest.mark.parametrize("delivery", WEAK)
def test_a_target_that_is_away_costs_nothing_in_any_mode(url: str, delivery: Delivery) -> None:
    handler = Handler(ConnectionError("away"), ConnectionError("away"))
    sink = owner(url, handler, delivery)
    batch = [ledger.a_slice(ledger.record(0, "ann", 1), ledger.record(1, "bob", 1))]
    for _ in range(2):
        with pytest.raises(Unavailable):
            sink.apply(batch)
    assert sink.apply(batch).records == 2
    assert ledger.seen(url) == [(0, 0), (0, 1)]
    assert ledger.position(url)[0] == 2
    sink.close()


def lose_answer(sink: SqlSink, nth: int) -> None:
    """The nth COMMIT from now on is carried out, and nobody hears of it."""
    database, count = sink._database, [0]
    commit = database.commit

    def unheard() -> None:
        commit()
        count[0] += 1
        if count[0] == nth:
            raise OutcomeUnknown("no answer to COMMIT")

    database.commit = unheard  # type: ignore[method-assign]


@pytest.mark.parametrize(("delivery", "nth", "times"), [("at-least-once", 1, 2), ("at-least-once", 2, 1),
                                                        ("at-most-once", 1, 1), ("at-most-once", 2, 1)])  # fmt: skip
def test_a_commit_without_an_answer_costs_what_the_mode_says(
    url: str, delivery: Delivery, nth: int, times: int
) -> None:
    sink = owner(url, Handler(), delivery)
    lose_answer(sink, nth)
    batch = [ledger.a_slice(ledger.record(0, "ann", 1), ledger.record(1, "ann", -1), ledger.record(2, "bob", 1))][:1]
    with pytest.raises(Unavailable):
        sink.apply([ledger.a_slice(ledger.record(0, "ann", 1))])
    sink.apply([ledger.a_slice(ledger.record(0, "ann", 1))])
    sink.apply(batch)
    assert Counter(ledger.seen(url)) == {(0, 0): times, (0, 2): 1}
    assert [at[:2] for at in ledger.parked(url)] == [(0, 1)]
    sink.close()


def test_at_most_once_says_what_it_gives_up_with_a_partition(url: str, caplog: pytest.LogCaptureFixture) -> None:
    sink = owner(url, Handler(ConnectionError("away")), "at-most-once")
    with pytest.raises(Unavailable):
        sink.apply([ledger.a_slice(ledger.record(0, "ann", 1), ledger.record(1, "bob", 1))])
    heir = owner(url, ledger.count, "at-most-once")
    with caplog.at_level(logging.ERROR), pytest.raises(PartitionsLost):
        sink.apply([])
    assert "the effects of 2 records from offset 0 are lost" in caplog.text
    assert heir.apply([ledger.a_slice(ledger.record(0, "ann", 1), ledger.record(2, "cid", 1))]).records == 1
    assert ledger.seen(url) == [(0, 2)]
    heir.close()
    sink.close()


@pytest.mark.parametrize("delivery", WEAK)
def test_the_history_tells_effects_and_position_as_one_batch(url: str, delivery: Delivery) -> None:
    with history.captured() as events:
        sink = owner(url, ledger.count, delivery)
        sink.apply([ledger.a_slice(ledger.record(0, "ann", 1), ledger.record(1, "bob", -1), end=4)])
        sink.close()
    batches = [event for event in events if isinstance(event, Batch)]
    assert [event.type for event in batches if event.a == batches[-1].a] == ["invoke", "ok"]
    [part] = next(event.parts for event in batches if event.parts and event.a == batches[-1].a)
    assert (part.from_offset, part.to_offset, part.handed, part.parked) == (0, 4, [0], [1])


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'sometimes' is none of exactly-once"):
        ledger.spec("sqlite:///x.db", delivery="sometimes")
