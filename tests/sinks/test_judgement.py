"""Failures of a sink that say nothing about whose fault they are: no outage parks, and no bad record blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from semel.processing.blame import BREAKER_FAILURES
from semel.sinks.contract import Slice, Unavailable
from tests.sinks import ledger


class ForeignError(Exception):
    """Of a library that nobody here knows."""


class Target:
    """A sink whose handler fails where `fails` says so, and the records that it is given until it has taken them."""

    def __init__(self, url: str, keys: Sequence[str], fails: Callable[[int], bool], parts: int = 1) -> None:
        self.url = url
        self.calls: Counter[int] = Counter()
        self.fails = fails
        self.sink: Any = ledger.sink(url, self.handle)
        self.sink.take_over([ledger.claim(part) for part in range(parts)])
        self.slices: list[Slice] = [
            ledger.a_slice(*(ledger.record(offset, key, 1, part) for offset, key in enumerate(keys)), part=part)
            for part in range(parts)
        ]

    def handle(self, records: Sequence[Any], db: Any) -> None:
        for record in records:
            self.calls[record.offset] += 1
            if self.fails(record.offset):
                raise ForeignError("what?")
        ledger.count(records, db)

    def tries(self, limit: int = 5) -> int:
        """How often it must be applied until all of it is."""
        for number in range(1, limit + 1):
            try:
                self.sink.apply(self.slices)
                return number
            except Unavailable:
                continue
        return limit + 1

    def parked(self) -> list[int]:
        return [offset for _, offset, _, _ in ledger.parked(self.url)]

    def seen(self) -> list[int]:
        return [offset for _, offset in ledger.seen(self.url)]


KEYS = [f"k{number % 10}" for number in range(40)]


def test_one_bad_record_is_parked_once_others_succeed(any_url: str) -> None:
    target = Target(any_url, KEYS, lambda offset: offset == 13)
    assert target.tries() == 2, "the first failure may have been anything"
    assert target.parked() == [13, 23, 33], "and what comes behind it in its key"
    assert target.seen() == [offset for offset in range(40) if offset not in (13, 23, 33)]
    assert target.calls[13] <= 4


def test_many_bad_records_cost_few_calls(any_url: str) -> None:
    keys = [f"k{number}" for number in range(40)]
    target = Target(any_url, keys, lambda offset: offset % 3 == 1)
    assert target.tries() == 2
    assert target.parked() == [offset for offset in range(40) if offset % 3 == 1]
    assert sum(target.calls.values()) <= 4 * 40


def test_an_outage_parks_nothing_and_costs_one_call_at_a_time(any_url: str) -> None:
    target = Target(any_url, KEYS, lambda _: True)
    with pytest.raises(Unavailable, match="whether the record is at fault is not known yet"):
        target.sink.apply(target.slices)
    assert sum(target.calls.values()) == 1 + BREAKER_FAILURES
    for _ in range(10):
        with pytest.raises(Unavailable):
            target.sink.apply(target.slices)
    assert sum(target.calls.values()) == 1 + BREAKER_FAILURES + 10
    target.fails = lambda _: False
    assert target.tries() == 1
    assert target.parked() == []
    assert target.seen() == list(range(40))


def test_an_outage_in_the_middle_of_a_batch_keeps_what_is_before_it(any_url: str) -> None:
    target = Target(any_url, KEYS, lambda offset: offset >= 25)
    assert target.tries() == 6
    assert target.parked() == []
    assert target.seen() == list(range(25))
    assert target.sink.position(ledger.partition(0)) == 25
    target.fails = lambda _: False
    assert target.tries() == 1
    assert target.seen() == list(range(40))


def test_a_record_that_is_alone_waits(any_url: str) -> None:
    target = Target(any_url, ["k0"], lambda _: True)
    assert target.tries(8) == 9
    assert target.parked() == []
    target.fails = lambda _: False
    assert target.tries() == 1
    assert target.seen() == [0]


def test_other_partitions_are_evidence_and_do_not_wait(any_url: str) -> None:
    target = Target(any_url, ["k0"], lambda _: False, parts=2)
    handle = target.handle

    def handler(records: Sequence[Any], db: Any) -> None:
        if any(record.partition == 0 for record in records):
            raise ForeignError("what?")
        handle(records, db)

    target.sink.close()
    target.sink = ledger.sink(any_url, handler)
    target.sink.take_over([ledger.claim(0), ledger.claim(1)])
    with pytest.raises(Unavailable):
        target.sink.apply(target.slices)
    assert ledger.seen(any_url) == [(1, 0)]
    target.slices = [*target.slices[:1], ledger.a_slice(ledger.record(1, "k0", 1, 1), part=1)]
    target.sink.apply(target.slices)
    assert ledger.seen(any_url) == [(1, 0), (1, 1)]
    assert [at[:2] for at in ledger.parked(any_url)] == [(0, 0)]
