"""Records of consumer groups (KIP-848) in `__consumer_offsets`, in the layouts of Apache Kafka 4.3.

| key                                    | value                                                       |
|----------------------------------------|-------------------------------------------------------------|
| version 3: group                       | group epoch; in tag 0 a hash of the topics it is subscribed to |
| version 5: group, member               | the member: who it is and what it wants                     |
| version 6: group                       | epoch of the target assignment; in tag 0 when it was made   |
| version 7: group, member               | what the member shall have                                  |
| version 8: group, member               | what the member has, and its epochs                         |
| version 16: group, regular expression  | the topics that it stands for                               |

Kafka's version 4 (topics and their sizes, before 4.1) is not written; the hash has taken its place. A null value says
that the thing is gone. Topic ids are their sixteen bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

from semel.coordinator.assignors import Part
from semel.coordinator.fields import FieldReader, FieldWriter
from semel.errors import CorruptBatch

__all__ = [
    "ConsumerKey",
    "ConsumerRecord",
    "StoredConsumer",
    "StoredCurrent",
    "decode_consumer",
    "decode_current",
    "decode_epoch",
    "decode_key",
    "decode_pattern",
    "decode_target",
    "encode_consumer",
    "encode_current",
    "encode_epoch",
    "encode_key",
    "encode_pattern",
    "encode_target",
    "encode_target_epoch",
]


class ConsumerRecord(IntEnum):
    """What a record is about: the version of its key."""

    GROUP = 3
    MEMBER = 5
    TARGET_EPOCH = 6
    TARGET = 7
    CURRENT = 8
    PATTERN = 16


_OF_THE_GROUP = (ConsumerRecord.GROUP, ConsumerRecord.TARGET_EPOCH)


class ConsumerKey(NamedTuple):
    """`name` is the member's id or the regular expression; empty for what is the group's."""

    kind: ConsumerRecord
    group_id: str
    name: str = ""


class StoredConsumer(NamedTuple):
    """A member as it described itself."""

    instance_id: str | None
    rack_id: str | None
    client_id: str
    client_host: str
    topics: tuple[str, ...]
    pattern: str | None
    rebalance_timeout_ms: int
    assignor: str | None


class StoredCurrent(NamedTuple):
    """What a member has. Each partition with the epoch in which it got it (KIP-1251)."""

    epoch: int
    previous_epoch: int
    state: int
    assigned: Mapping[Part, int]
    revoking: Mapping[Part, int]


def encode_key(key: ConsumerKey) -> bytes:
    out = FieldWriter().int16(key.kind).string(key.group_id)
    return out.done() if key.kind in _OF_THE_GROUP else out.string(key.name).done()


def decode_key(kind: int, reader: FieldReader) -> ConsumerKey:
    """The key behind its version. Raises `CorruptBatch`."""
    record = ConsumerRecord(kind)
    group_id = reader.string()
    return ConsumerKey(record, group_id, "" if record in _OF_THE_GROUP else reader.string())


def encode_epoch(epoch: int, metadata_hash: int) -> bytes:
    tags = {0: FieldWriter().int64(metadata_hash).done()} if metadata_hash else {}
    return FieldWriter().int16(0).int32(epoch).tags(tags).done()


def encode_target_epoch(epoch: int, made_ms: int) -> bytes:
    return FieldWriter().int16(0).int32(epoch).tags({0: FieldWriter().int64(made_ms).done()}).done()


def decode_epoch(value: bytes) -> tuple[int, int]:
    """An epoch and the number in tag 0: the group's, or its target assignment's."""
    reader = _reader(value)
    epoch = reader.int32()
    tag = reader.tags().get(0)
    return epoch, FieldReader(tag).int64() if tag is not None else 0


def encode_consumer(member: StoredConsumer) -> bytes:
    out = FieldWriter().int16(0).compact_string(member.instance_id).compact_string(member.rack_id)
    out.compact_string(member.client_id).compact_string(member.client_host).count(len(member.topics))
    for topic in member.topics:
        out.compact_string(topic)
    out.compact_string(member.pattern).int32(member.rebalance_timeout_ms).compact_string(member.assignor)
    return out.tags({}).done()


def decode_consumer(value: bytes) -> StoredConsumer:
    """Raises `CorruptBatch`."""
    reader = _reader(value)
    return StoredConsumer(
        reader.compact_nullable_string(),
        reader.compact_nullable_string(),
        reader.compact_string(),
        reader.compact_string(),
        tuple(reader.compact_string() for _ in range(reader.count())),
        reader.compact_nullable_string(),
        reader.int32(),
        reader.compact_nullable_string(),
    )


def encode_target(parts: Iterable[Part]) -> bytes:
    return FieldWriter().int16(0).raw(_topics(dict.fromkeys(parts, 0), epochs=False)).tags({}).done()


def decode_target(value: bytes) -> frozenset[Part]:
    """Raises `CorruptBatch`."""
    return frozenset(_read_topics(_reader(value)))


def encode_current(current: StoredCurrent) -> bytes:
    out = FieldWriter().int16(0).int32(current.epoch).int32(current.previous_epoch).int8(current.state)
    out.raw(_topics(current.assigned, epochs=True)).raw(_topics(current.revoking, epochs=True))
    return out.tags({}).done()


def decode_current(value: bytes) -> StoredCurrent:
    """Raises `CorruptBatch`."""
    reader = _reader(value)
    epoch, previous_epoch, state = reader.int32(), reader.int32(), reader.int8()
    return StoredCurrent(epoch, previous_epoch, state, _read_topics(reader), _read_topics(reader))


def encode_pattern(topics: Iterable[str], resolved_ms: int) -> bytes:
    names = sorted(topics)
    out = FieldWriter().int16(0).count(len(names))
    for name in names:
        out.compact_string(name)
    return out.int64(0).int64(resolved_ms).tags({}).done()


def decode_pattern(value: bytes) -> frozenset[str]:
    """Raises `CorruptBatch`."""
    reader = _reader(value)
    return frozenset(reader.compact_string() for _ in range(reader.count()))


def _topics(parts: Mapping[Part, int], *, epochs: bool) -> bytes:
    by_topic: dict[bytes, list[int]] = {}
    for topic_id, index in sorted(parts):
        by_topic.setdefault(topic_id, []).append(index)
    out = FieldWriter().count(len(by_topic))
    for topic_id, indexes in by_topic.items():
        out.raw(topic_id).count(len(indexes))
        for index in indexes:
            out.int32(index)
        if epochs:
            tag = FieldWriter().count(len(indexes))
            for index in indexes:
                tag.int32(parts[topic_id, index])
            out.tags({0: tag.done()})
        else:
            out.tags({})
    return out.done()


def _read_topics(reader: FieldReader) -> dict[Part, int]:
    parts: dict[Part, int] = {}
    for _ in range(reader.count()):
        topic_id = reader.take(16)
        indexes = [reader.int32() for _ in range(reader.count())]
        tag = reader.tags().get(0)
        epochs = [0] * len(indexes)
        if tag is not None:
            inner = FieldReader(tag)
            epochs = [inner.int32() for _ in range(inner.count())]
        if len(epochs) != len(indexes):
            raise CorruptBatch(f"a consumer group record has {len(indexes)} partitions and {len(epochs)} epochs")
        parts.update(((topic_id, index), epoch) for index, epoch in zip(indexes, epochs, strict=True))
    return parts


def _reader(value: bytes) -> FieldReader:
    reader = FieldReader(value)
    version = reader.int16()
    if version != 0:
        raise CorruptBatch(f"a consumer group value of version {version}; the only one known is 0")
    return reader
