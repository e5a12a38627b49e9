"""Records of consumer groups: what is written is read again, and what is cut short is refused."""

from __future__ import annotations

import pytest

from semel.coordinator import consumer_group_log as log
from semel.coordinator import group_log
from semel.coordinator.consumer_group_log import ConsumerKey, ConsumerRecord, StoredConsumer, StoredCurrent
from semel.errors import CorruptBatch

A, B = b"a" * 16, b"b" * 16


@pytest.mark.parametrize("kind", list(ConsumerRecord))
def test_keys(kind: ConsumerRecord) -> None:
    of_the_group = kind in (ConsumerRecord.GROUP, ConsumerRecord.TARGET_EPOCH)
    key = ConsumerKey(kind, "g", "" if of_the_group else "member")
    data = log.encode_key(key)
    assert group_log.decode_key(data) == key
    for size in range(len(data)):
        with pytest.raises(CorruptBatch):
            group_log.decode_key(data[:size])


def test_values() -> None:
    member = StoredConsumer("i", None, "c", "/h", ("t", "u"), "x.*", 60_000, "range")
    assert log.decode_consumer(log.encode_consumer(member)) == member
    nobody = StoredConsumer(None, None, "", "", (), None, -1, None)
    assert log.decode_consumer(log.encode_consumer(nobody)) == nobody
    assert log.decode_epoch(log.encode_epoch(7, 0)) == (7, 0)
    assert log.decode_epoch(log.encode_epoch(7, 1 << 62)) == (7, 1 << 62)
    assert log.decode_epoch(log.encode_target_epoch(7, 99)) == (7, 99)
    parts = frozenset({(A, 0), (A, 5), (B, 1)})
    assert log.decode_target(log.encode_target(parts)) == parts
    current = StoredCurrent(3, 2, 1, {(A, 0): 3, (A, 5): 2}, {(B, 1): 1})
    assert log.decode_current(log.encode_current(current)) == current
    assert log.decode_pattern(log.encode_pattern({"t", "u"}, 5)) == {"t", "u"}


def test_what_is_cut_short_or_unknown_is_refused() -> None:
    data = log.encode_current(StoredCurrent(3, 2, 1, {(A, 0): 3}, {}))
    for size in range(len(data)):
        with pytest.raises(CorruptBatch):
            log.decode_current(data[:size] if size < len(data) - 2 else data[: size // 2])
    with pytest.raises(CorruptBatch):
        log.decode_epoch(b"\0\1" + bytes(6))
