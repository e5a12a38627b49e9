"""A polled batch in transactions: nothing is lost or in another order, each is within its bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from semel.sinks.cutting import cut
from semel.types import Record
from tests.sinks import ledger
from tests.sinks.ledger import partition, record


@st.composite
def batches(draw: st.DrawFn) -> list[Record]:
    records: list[Record] = []
    offsets = [0, 0, 0]
    for part, size in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=30)):
        records.append(Record("purchases", part, offsets[part], 0, b"k" * size or None, b"1"))
        offsets[part] += draw(st.integers(1, 3))
    return records


@given(batches(), st.integers(1, 150))
def test_every_record_is_in_one_transaction_in_its_order(records: list[Record], max_bytes: int) -> None:
    found = cut(records, {}, max_bytes)
    assert found.total == len(records)
    for part in range(3):
        expected = [each for each in records if each.partition == part]
        slices = [piece for each in found.transactions for piece in each if piece.partition[1] == part]
        assert [each for piece in slices for each in piece.records] == expected
        assert all(piece.end == piece.records[-1].offset + 1 for piece in slices)
    for slices in found.transactions:
        assert slices
        assert len({piece.partition for piece in slices}) == len(slices)
        sizes = [len(each.key or b"") + len(each.value or b"") for piece in slices for each in piece.records]
        assert sum(sizes) <= max_bytes or len(sizes) == 1


def test_what_cannot_be_decoded_is_left_to_the_sink_with_its_slice() -> None:
    good, bad = record(0, "ann", 5), record(0, "bob", 7, 1)._replace(value=b"{")
    found = cut([good, bad], {partition(0): 4}, 1_000).decoded(ledger.TOPIC.decode_all)
    [[one, other]] = found.transactions
    assert one.views == [ledger.TOPIC.decode(good)]
    assert other.views is None
    assert found.ends == {partition(0): 4}


def test_a_sink_takes_views_as_they_are_and_passes_over_what_it_has(any_url: str) -> None:
    sink = ledger.sink(any_url)
    sink.take_over([ledger.claim()])
    first, second = record(0, "ann", 5), record(1, "bob", 7)
    for records in ([first], [first, second], [record(2, "ann", -1), record(3, "bob", 1)]):
        for slices in cut(records, {}, 1_000).decoded(ledger.TOPIC.decode_all).transactions:
            sink.apply(slices)
    assert ledger.seen(any_url) == [(0, 0), (0, 1), (0, 3)]
    assert [row[1] for row in ledger.parked(any_url)] == [2]
    sink.close()
