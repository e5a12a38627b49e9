from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.coordinator.transaction import TransactionMetadata, TransactionState
from semel.coordinator.transaction_log import decode_transaction, encode_transaction
from semel.errors import CorruptBatch
from semel.types import TopicPartition

KEY = bytes.fromhex("0000 0001 78")

# Written by Apache Kafka 4.3.1 for a transaction that is open on rs-t-0 (kafka_facts 2.3).
FROM_KAFKA = bytes.fromhex(
    "0001 00000000000007d0 0000 000927c0 01 02 06 7273322d74 02 00000000 00"
    "000001a1fd3f1aa0 000001a1fd3f1aa0 02 00 08 00000000000007d0 02 02 0002"
)


def test_a_value_of_apache_kafka_is_read_and_written_byte_for_byte():
    metadata = decode_transaction(KEY, FROM_KAFKA)
    assert metadata == TransactionMetadata(
        transactional_id="x",
        producer_id=2000,
        producer_epoch=0,
        previous_producer_id=2000,
        timeout_ms=600_000,
        state=TransactionState.ONGOING,
        partitions=frozenset({TopicPartition("rs2-t", 0)}),
        start_ms=0x1A1FD3F1AA0,
        last_update_ms=0x1A1FD3F1AA0,
        client_version=2,
    )
    assert encode_transaction(metadata) == (KEY, FROM_KAFKA)


_EPOCH = st.integers(-1, 32_767)
_TIME = st.integers(-1, 2**62)
_IDS = st.integers(-1, 2**62)


@given(
    st.builds(
        TransactionMetadata,
        transactional_id=st.text(min_size=1, max_size=20),
        producer_id=_IDS,
        producer_epoch=_EPOCH,
        previous_producer_id=_IDS,
        next_producer_id=_IDS,
        next_producer_epoch=_EPOCH,
        last_producer_epoch=_EPOCH,
        timeout_ms=st.integers(1, 2**31 - 1),
        state=st.sampled_from([state for state in TransactionState if state is not TransactionState.DEAD]),
        partitions=st.frozensets(st.builds(TopicPartition, st.text(min_size=1, max_size=9), st.integers(0, 9))),
        start_ms=_TIME,
        last_update_ms=_TIME,
        client_version=st.integers(0, 2),
    )
)
def test_what_is_written_is_read_again(metadata: TransactionMetadata):
    assert decode_transaction(*encode_transaction(metadata)) == metadata


def test_a_forgotten_id_is_a_tombstone():
    dead = TransactionMetadata("x", 1, 0, state=TransactionState.DEAD)
    assert encode_transaction(dead) == (KEY, None)
    assert decode_transaction(KEY, None) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"\x00\x07\x00\x01x", FROM_KAFKA),
        (KEY, b"\x00\x02" + FROM_KAFKA[2:]),
        (KEY, FROM_KAFKA[:-1]),
        (KEY, FROM_KAFKA[:16] + b"\x09" + FROM_KAFKA[17:]),
        (b"", FROM_KAFKA),
    ],
    ids=["key version", "value version", "cut off", "status", "empty key"],
)
def test_nonsense_is_a_corrupt_record(key: bytes, value: bytes):
    with pytest.raises(CorruptBatch):
        decode_transaction(key, value)
