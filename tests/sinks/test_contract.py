"""What every sink promises, whatever its store: fence, compare-and-set, parking (`semel.sinks.contract`)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from semel.databases.database import is_cache
from semel.sinks.contract import Applied, PartitionsLost, PartitionsStopped, Stop, StopReason, Unavailable
from tests.sinks import ledger
from tests.sinks.ledger import a_slice, claim, partition, record


def test_effects_and_position_are_there_together(any_url: str) -> None:
    sink = ledger.sink(any_url)
    assert sink.take_over([claim()]) == {partition(0): 0}
    assert sink.apply([a_slice(record(0, "ann", 5), record(1, "bob", 7), end=4)]) == Applied(2, 0, 1)
    assert ledger.totals(any_url) == {"ann": (1, 5), "bob": (1, 7)}
    assert ledger.position(any_url) == (4, 1)  # Past the marker behind the records.
    assert sink.position(partition(0)) == 4
    sink.close()


def test_the_same_batch_again_changes_nothing(any_url: str) -> None:
    sink = ledger.sink(any_url)
    sink.take_over([claim()])
    batch = [a_slice(record(0, "ann", 5), record(1, "bob", 7))]
    sink.apply(batch)
    assert sink.apply(batch) == Applied()
    assert sink.apply([a_slice(record(1, "bob", 7), record(2, "ann", 1))]) == Applied(1, 0, 1)
    assert ledger.totals(any_url) == {"ann": (2, 6), "bob": (1, 7)}
    sink.close()


def test_a_new_row_starts_at_the_log_start(any_url: str) -> None:
    sink = ledger.sink(any_url)
    ledger.accept_start(any_url)
    assert sink.take_over([claim(0, log_start=40), claim(1, log_start=7)]) == {partition(0): 40, partition(1): 7}
    assert ledger.position(any_url, 1) == (7, 1)
    sink.close()


def test_positions_move_without_effects(any_url: str) -> None:
    sink = ledger.sink(any_url)
    sink.take_over([claim()])
    assert sink.apply([a_slice(end=3)]) == Applied(0, 0, 1)
    assert ledger.position(any_url) == (3, 1)
    sink.close()


def test_a_zombie_is_fenced_before_it_does_work(any_url: str) -> None:
    calls: list[int] = []

    def handler(records: Sequence[Any], db: Any) -> None:
        calls.append(len(records))
        ledger.count(records, db)

    zombie, owner = ledger.sink(any_url, handler), ledger.sink(any_url)
    zombie.take_over([claim(0), claim(1)])
    zombie.apply([a_slice(record(0, "ann", 5))])
    assert owner.take_over([claim(0)]) == {partition(0): 1}
    batch = [a_slice(record(1, "ann", 5)), a_slice(record(0, "bob", 2, 1), part=1)]
    with pytest.raises(PartitionsLost, match=r"taken over by semel .*owner epoch 2, ours was 1") as lost:
        zombie.apply(batch)
    assert set(lost.value.reasons) == {partition(0)}
    if not ledger.is_noting(any_url):  # There a handler only notes what it wants, and what writes it has the fence.
        assert calls == [1], "the handler ran although the fence had to stop it first"
    assert zombie.position(partition(0)) is None
    # What is still the zombie's goes on with the very same batch.
    assert zombie.apply(batch) == Applied(1, 0, 1)
    owner.apply([a_slice(record(1, "ann", 5))])
    assert ledger.seen(any_url) == [(0, 0), (0, 1), (1, 0)]
    zombie.close()
    owner.close()


def test_a_recreated_topic_stops_and_changes_nothing(any_url: str) -> None:
    sink = ledger.sink(any_url)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, "ann", 5))])
    other = uuid.uuid4()
    stop = sink.take_over([claim(topic_id=other)])[partition(0)]
    assert isinstance(stop, Stop)
    assert stop.reason is StopReason.TOPIC_RECREATED
    assert "offset 1" in stop.detail
    assert str(other) in stop.detail
    assert sink.apply([a_slice(record(1, "ann", 5))]) == Applied()
    assert ledger.position(any_url) == (1, 1)
    sink.close()


def test_another_cluster_is_another_position(any_url: str) -> None:
    here, there = ledger.sink(any_url), ledger.sink(any_url, cluster_id="other-cluster")
    here.take_over([claim()])
    here.apply([a_slice(record(0, "ann", 5))])
    assert there.take_over([claim()]) == {partition(0): 0}
    here.apply([a_slice(record(1, "ann", 5))])
    assert ledger.totals(any_url) == {"ann": (2, 10)}
    here.close()
    there.close()


def test_a_burst_of_poison_costs_two_calls_a_record_at_most(any_url: str) -> None:
    calls = 0

    def handler(records: Sequence[Any], db: Any) -> None:
        nonlocal calls
        calls += 1
        raise ValueError("always")

    sink = ledger.sink(any_url, handler)
    sink.take_over([claim()])
    for start in range(0, 300, 100):
        sink.apply([a_slice(*(record(offset, f"k{offset}", 1) for offset in range(start, start + 100)))])
    assert calls == 300 + 3
    assert len(ledger.parked(any_url)) == 300
    calls = 0
    sink.apply([a_slice(*(record(300 + number, f"k{number}", 1) for number in range(100)))])
    assert calls == 0
    sink.close()


def test_records_without_key_do_not_block_each_other(any_url: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        for item in records:
            if item.value < 0:
                raise ValueError("negative")
            ledger.note(db, [item])

    sink = ledger.sink(any_url, handler)
    sink.take_over([claim()])
    sink.apply([a_slice(record(0, None, 1), record(1, None, -1), record(2, None, 2))])
    assert ledger.seen(any_url) == [(0, 0), (0, 2)]
    assert ledger.parked(any_url) == [(0, 1, None, "ValueError")]
    sink.close()


def test_full_parking_stops_the_partition_and_the_others_go_on(any_url: str) -> None:
    sink = ledger.sink(any_url, max_parked_keys=2)
    sink.take_over([claim(0), claim(1)])
    batch = [
        a_slice(*(record(offset, f"k{offset}", -1) for offset in range(3))),
        a_slice(record(0, "ann", 4, 1), part=1),
    ]
    with pytest.raises(PartitionsStopped, match="semel park list") as stopped:
        sink.apply(batch)
    assert stopped.value.stops[partition(0)].reason is StopReason.PARKING_FULL
    # A database did nothing of the batch; a cache went record by record, as far as there was room.
    done = 2 if is_cache(any_url) else 0
    assert len(ledger.parked(any_url)) == done
    assert ledger.position(any_url, 0) == (done, 1)
    sink.release(stopped.value.stops)
    assert sink.apply(batch).records == 1 + done
    assert ledger.totals(any_url) == {"ann": (1, 4)}
    sink.close()


def test_a_handler_without_memory_is_tried_again_for_a_while(any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        if any(record.value == 7 for record in records):
            raise MemoryError
        ledger.count(records, db)

    sink = ledger.sink(any_url, handler)
    sink.take_over([claim()])
    batch = [a_slice(record(0, "ann", 1), record(1, "bob", 7))]
    for _ in range(2):
        with pytest.raises(Unavailable, match="MemoryError"):
            sink.apply(batch)
    assert ledger.parked(any_url) == []
    monkeypatch.setattr("semel.processing.shortage.PATIENCE_SECONDS", 0.0)
    sink.apply(batch)
    assert [row[1] for row in ledger.parked(any_url)] == [1]
    assert ledger.seen(any_url) == [(0, 0)]
    sink.close()


def test_a_foreign_service_that_is_down_waits_and_parks_nothing(any_url: str) -> None:
    def handler(records: Sequence[Any], db: Any) -> None:
        raise ConnectionRefusedError("the price service")

    sink = ledger.sink(any_url, handler)
    sink.take_over([claim()])
    with pytest.raises(Unavailable, match="the price service"):
        sink.apply([a_slice(record(0, "ann", 1))])
    assert ledger.parked(any_url) == []
    sink.close()
