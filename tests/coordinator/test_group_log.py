from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semel.coordinator.group_log import (
    CommittedOffset,
    GroupKey,
    OffsetKey,
    PendingKey,
    StoredGroup,
    StoredMember,
    decode_group,
    decode_key,
    decode_offset,
    encode_group,
    encode_group_key,
    encode_offset,
    encode_pending,
)
from semel.errors import CorruptBatch
from semel.types import TopicPartition

_TEXT = st.text(max_size=8)
_PARTITIONS = st.builds(TopicPartition, _TEXT, st.integers(0, 2**31 - 1))
_OFFSETS = st.builds(CommittedOffset, st.integers(-1, 2**62), st.integers(-1, 2**31 - 1), _TEXT, st.integers(-1, 2**62))
_INT32 = st.integers(0, 2**31 - 1)
_MEMBERS = st.builds(
    StoredMember, _TEXT, st.none() | _TEXT, _TEXT, _TEXT, _INT32, _INT32, st.binary(max_size=9), st.binary(max_size=9)
)


def test_an_offset_is_laid_out_as_by_apache_kafka():
    """Key version 1, value version 3, field by field as in OffsetCommitKey.json and OffsetCommitValue.json."""
    key, value = encode_offset("g", TopicPartition("t", 2), CommittedOffset(5, 1, "m", 9))
    assert key == bytes.fromhex("0001 0001 67 0001 74 00000002")
    assert value == (
        bytes.fromhex("0003") + (5).to_bytes(8) + (1).to_bytes(4) + bytes.fromhex("0001") + b"m" + (9).to_bytes(8)
    )


def test_a_group_is_laid_out_as_by_apache_kafka():
    """Key version 2, value version 3, as in GroupMetadataKey.json and GroupMetadataValue.json."""
    member = StoredMember("m", None, "c", "h", 6, 7, b"s", b"a")
    key, value = encode_group(StoredGroup("g", "consumer", 3, "range", "m", 9, (member,)))
    assert key == bytes.fromhex("0002 0001 67")
    head = b"\x00\x03\x00\x08consumer\x00\x00\x00\x03\x00\x05range\x00\x01m" + (9).to_bytes(8)
    members = b"\x00\x00\x00\x01\x00\x01m\xff\xff\x00\x01c\x00\x01h"
    assert value == head + members + b"\x00\x00\x00\x06\x00\x00\x00\x07\x00\x00\x00\x01s\x00\x00\x00\x01a"


def test_older_values_of_apache_kafka_are_read():
    offset, timestamp = (5).to_bytes(8), (9).to_bytes(8)
    assert decode_offset(b"\x00\x00" + offset + b"\x00\x01m" + timestamp) == CommittedOffset(5, -1, "m", 9)
    assert decode_offset(b"\x00\x01" + offset + b"\x00\x01m" + timestamp + timestamp) == CommittedOffset(5, -1, "m", 9)
    v0 = b"\x00\x00\x00\x08consumer\x00\x00\x00\x03\xff\xff\xff\xff\x00\x00\x00\x01"
    v0 += b"\x00\x01m\x00\x01c\x00\x01h\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x00"
    stored = decode_group("g", v0)
    assert stored.members == (StoredMember("m", None, "c", "h", 6, 6, b"", b""),)
    assert (stored.generation_id, stored.protocol, stored.leader, stored.state_ms) == (3, None, None, -1)


@given(_TEXT, _PARTITIONS, _OFFSETS, st.integers(0, 2**62))
def test_offsets_come_back(group_id: str, partition: TopicPartition, value: CommittedOffset, producer_id: int):
    key, data = encode_offset(group_id, partition, value)
    assert (decode_key(key), decode_offset(data)) == (OffsetKey(group_id, partition), value)
    key, data = encode_pending(producer_id, group_id, partition, value)
    assert (decode_key(key), decode_offset(data)) == (PendingKey(producer_id, group_id, partition), value)


@given(
    st.builds(
        StoredGroup,
        _TEXT,
        _TEXT,
        _INT32,
        st.none() | _TEXT,
        st.none() | _TEXT,
        st.integers(-1, 2**62),
        st.lists(_MEMBERS, max_size=3).map(tuple),
    )
)
def test_groups_come_back(group: StoredGroup):
    key, value = encode_group(group)
    assert decode_key(key) == GroupKey(group.group_id)
    assert key == encode_group_key(group.group_id)
    assert decode_group(group.group_id, value) == group


@pytest.mark.parametrize("data", [b"", b"\x00\x07\x00\x01g", b"\x00\x02\x00\x05g"])
def test_a_strange_key_is_a_corrupt_record(data: bytes):
    with pytest.raises(CorruptBatch):
        decode_key(data)


def test_a_strange_value_is_a_corrupt_record():
    with pytest.raises(CorruptBatch):
        decode_offset(b"\x00\x04" + bytes(30))
    with pytest.raises(CorruptBatch):
        decode_group("g", b"\x00\x04" + bytes(30))
