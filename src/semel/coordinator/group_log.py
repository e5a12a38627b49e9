"""Records of `__consumer_offsets`, in Kafka's own layouts, so that Kafka's tools can read them.

| key                                      | value                      | null value                     |
|------------------------------------------|----------------------------|--------------------------------|
| version 0 or 1: group, topic, partition  | offset commit, version 3   | offset gone (expired, deleted) |
| version 2: group                         | group metadata, version 3  | group gone                     |
| version 1000: producer id, group, topic, | offset commit, version 3   | the transaction ended          |
| partition                                |                            |                                |

Versions 3 to 16 are of consumer groups (KIP-848) and stand in `consumer_group_log.py`.

Version 1000 is ours. In Kafka the offsets of an open transaction are version 1 records in a transactional batch, and
the marker behind them makes them count; here a commit writes them again as plain records. So one log of plain records
rebuilds everything, in whatever way it is cut and checkpointed, and Kafka's tools skip what is not decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from semel.coordinator.consumer_group_log import ConsumerKey, ConsumerRecord
from semel.coordinator.consumer_group_log import decode_key as decode_consumer_key
from semel.coordinator.fields import FieldReader, FieldWriter, LogRecord
from semel.errors import CorruptBatch
from semel.types import TopicPartition

__all__ = [
    "CommittedOffset",
    "GroupKey",
    "LogRecord",
    "OffsetKey",
    "PendingKey",
    "StoredGroup",
    "StoredMember",
    "decode_group",
    "decode_key",
    "decode_offset",
    "encode_group",
    "encode_group_key",
    "encode_offset",
    "encode_offset_key",
    "encode_pending",
    "encode_pending_key",
]

OFFSET_KEY_VERSION, GROUP_KEY_VERSION, PENDING_KEY_VERSION = 1, 2, 1000
OFFSET_VALUE_VERSION, GROUP_VALUE_VERSION = 3, 3


class OffsetKey(NamedTuple):
    group_id: str
    partition: TopicPartition


class PendingKey(NamedTuple):
    producer_id: int
    group_id: str
    partition: TopicPartition


class GroupKey(NamedTuple):
    group_id: str


class CommittedOffset(NamedTuple):
    """`offset` is the next record to read; `leader_epoch` that of the last one read, -1 when unknown."""

    offset: int
    leader_epoch: int = -1
    metadata: str = ""
    commit_ms: int = -1


class StoredMember(NamedTuple):
    member_id: str
    group_instance_id: str | None
    client_id: str
    client_host: str
    rebalance_timeout_ms: int
    session_timeout_ms: int
    subscription: bytes
    assignment: bytes


class StoredGroup(NamedTuple):
    """A group as it stood when it last became Stable or Empty."""

    group_id: str
    protocol_type: str
    generation_id: int
    protocol: str | None
    leader: str | None
    state_ms: int
    members: tuple[StoredMember, ...]


def encode_offset_key(group_id: str, partition: TopicPartition) -> bytes:
    out = FieldWriter().int16(OFFSET_KEY_VERSION).string(group_id).string(partition.topic)
    return out.int32(partition.partition).done()


def encode_pending_key(producer_id: int, group_id: str, partition: TopicPartition) -> bytes:
    out = FieldWriter().int16(PENDING_KEY_VERSION).int64(producer_id)
    return out.string(group_id).string(partition.topic).int32(partition.partition).done()


def encode_pending(
    producer_id: int, group_id: str, partition: TopicPartition, value: CommittedOffset
) -> tuple[bytes, bytes]:
    return encode_pending_key(producer_id, group_id, partition), _offset_value(value)


def encode_offset(group_id: str, partition: TopicPartition, value: CommittedOffset) -> tuple[bytes, bytes]:
    return encode_offset_key(group_id, partition), _offset_value(value)


def _offset_value(value: CommittedOffset) -> bytes:
    out = FieldWriter().int16(OFFSET_VALUE_VERSION).int64(value.offset).int32(value.leader_epoch)
    return out.string(value.metadata).int64(value.commit_ms).done()


def encode_group_key(group_id: str) -> bytes:
    return FieldWriter().int16(GROUP_KEY_VERSION).string(group_id).done()


def encode_group(group: StoredGroup) -> tuple[bytes, bytes]:
    out = FieldWriter().int16(GROUP_VALUE_VERSION).string(group.protocol_type).int32(group.generation_id)
    out.string(group.protocol).string(group.leader).int64(group.state_ms).int32(len(group.members))
    for member in group.members:
        out.string(member.member_id).string(member.group_instance_id)
        out.string(member.client_id).string(member.client_host)
        out.int32(member.rebalance_timeout_ms).int32(member.session_timeout_ms)
        out.bytes_(member.subscription).bytes_(member.assignment)
    return encode_group_key(group.group_id), out.done()


def decode_key(key: bytes) -> OffsetKey | GroupKey | PendingKey | ConsumerKey:
    """Raises `CorruptBatch` for a key of another kind."""
    reader = FieldReader(key)
    version = reader.int16()
    if version in (0, OFFSET_KEY_VERSION):
        return OffsetKey(reader.string(), TopicPartition(reader.string(), reader.int32()))
    if version == GROUP_KEY_VERSION:
        return GroupKey(reader.string())
    if version == PENDING_KEY_VERSION:
        return PendingKey(reader.int64(), reader.string(), TopicPartition(reader.string(), reader.int32()))
    if version in set(ConsumerRecord):
        return decode_consumer_key(version, reader)
    raise CorruptBatch(f"an offsets log key of version {version} is unknown")


def decode_offset(value: bytes) -> CommittedOffset:
    """Versions 0 to 3. Raises `CorruptBatch`."""
    reader = FieldReader(value)
    version = _version(reader, "offset commit", OFFSET_VALUE_VERSION)
    offset = reader.int64()
    leader_epoch = reader.int32() if version >= 3 else -1
    return CommittedOffset(offset, leader_epoch, reader.string(), reader.int64())


def decode_group(group_id: str, value: bytes) -> StoredGroup:
    """Versions 0 to 3. Raises `CorruptBatch`."""
    reader = FieldReader(value)
    version = _version(reader, "group metadata", GROUP_VALUE_VERSION)
    protocol_type, generation_id = reader.string(), reader.int32()
    protocol, leader = reader.nullable_string(), reader.nullable_string()
    state_ms = reader.int64() if version >= 2 else -1
    members = tuple(_read_members(reader, version, reader.int32()))
    return StoredGroup(group_id, protocol_type, generation_id, protocol, leader, state_ms, members)


def _read_members(reader: FieldReader, version: int, count: int) -> Iterable[StoredMember]:
    for _ in range(count):
        member_id = reader.string()
        group_instance_id = reader.nullable_string() if version >= 3 else None
        client_id, client_host = reader.string(), reader.string()
        rebalance_timeout_ms = reader.int32() if version >= 1 else -1
        session_timeout_ms = reader.int32()
        if rebalance_timeout_ms < 0:
            rebalance_timeout_ms = session_timeout_ms
        yield StoredMember(
            member_id,
            group_instance_id,
            client_id,
            client_host,
            rebalance_timeout_ms,
            session_timeout_ms,
            reader.bytes_(),
            reader.bytes_(),
        )


def _version(reader: FieldReader, kind: str, newest: int) -> int:
    version = reader.int16()
    if not 0 <= version <= newest:
        raise CorruptBatch(f"a {kind} value of version {version}; the newest known is {newest}")
    return version
