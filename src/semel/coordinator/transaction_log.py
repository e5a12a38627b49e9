"""Records of `__transaction_state`: Kafka's key version 0 and value version 1.

Kafka's own tools can read them. One tagged field is ours: 4, int16, `last_producer_epoch`, which Kafka 4.3.1 keeps in
memory only (KAFKA-20357); a reader that does not know it skips it.
"""

from __future__ import annotations

from itertools import groupby

from semel.coordinator.fields import FieldReader, FieldWriter
from semel.coordinator.transaction import TransactionMetadata, TransactionState
from semel.errors import CorruptBatch
from semel.types import TopicPartition

__all__ = ["decode_transaction", "decode_transactional_id", "encode_transaction"]

KEY_VERSION = 0
VALUE_VERSION = 1
TAG_PREVIOUS_PRODUCER_ID, TAG_NEXT_PRODUCER_ID, TAG_CLIENT_VERSION = 0, 1, 2
TAG_NEXT_PRODUCER_EPOCH, TAG_LAST_PRODUCER_EPOCH = 3, 4
STATUS = {
    TransactionState.EMPTY: 0,
    TransactionState.ONGOING: 1,
    TransactionState.PREPARE_COMMIT: 2,
    TransactionState.PREPARE_ABORT: 3,
    TransactionState.COMPLETE_COMMIT: 4,
    TransactionState.COMPLETE_ABORT: 5,
}
_STATE = {status: state for state, status in STATUS.items()}


def encode_transaction(metadata: TransactionMetadata) -> tuple[bytes, bytes | None]:
    """Key and value of one transition; the value of a Dead id is None, a tombstone."""
    key = FieldWriter().int16(KEY_VERSION).string(metadata.transactional_id).done()
    if metadata.state is TransactionState.DEAD:
        return key, None
    out = FieldWriter().int16(VALUE_VERSION)
    out.int64(metadata.producer_id).int16(metadata.producer_epoch).int32(metadata.timeout_ms)
    out.int8(STATUS[metadata.state])
    _write_partitions(out, metadata)
    out.int64(metadata.last_update_ms).int64(metadata.start_ms)
    tags: dict[int, bytes] = {}
    for tag, producer_id in (
        (TAG_PREVIOUS_PRODUCER_ID, metadata.previous_producer_id),
        (TAG_NEXT_PRODUCER_ID, metadata.next_producer_id),
    ):
        if producer_id != -1:
            tags[tag] = FieldWriter().int64(producer_id).done()
    for tag, number, default in (
        (TAG_CLIENT_VERSION, metadata.client_version, 0),
        (TAG_NEXT_PRODUCER_EPOCH, metadata.next_producer_epoch, -1),
        (TAG_LAST_PRODUCER_EPOCH, metadata.last_producer_epoch, -1),
    ):
        if number != default:
            tags[tag] = FieldWriter().int16(number).done()
    return key, out.tags(tags).done()


def decode_transactional_id(key: bytes) -> str:
    """The id in a key; raises `CorruptBatch` for a key of another kind."""
    reader = FieldReader(key)
    version = reader.int16()
    if version != KEY_VERSION:
        raise CorruptBatch(f"a transaction log key of version {version}; known is {KEY_VERSION}")
    return reader.string()


def decode_transaction(key: bytes, value: bytes | None) -> TransactionMetadata | None:
    """The value of one record, None for a tombstone. Raises `CorruptBatch`."""
    transactional_id = decode_transactional_id(key)
    if value is None:
        return None
    reader = FieldReader(value)
    version = reader.int16()
    if version != VALUE_VERSION:
        raise CorruptBatch(f"a transaction log value of version {version}; known is {VALUE_VERSION}")
    producer_id, producer_epoch, timeout_ms = reader.int64(), reader.int16(), reader.int32()
    status = reader.int8()
    if status not in _STATE:
        raise CorruptBatch(f"transactional id {transactional_id!r} has the unknown status {status}")
    partitions = _read_partitions(reader)
    last_update_ms, start_ms = reader.int64(), reader.int64()
    tags = reader.tags()

    def tagged(tag: int, default: int) -> int:
        data = tags.get(tag)
        return default if data is None else int.from_bytes(data, "big", signed=True)

    return TransactionMetadata(
        transactional_id=transactional_id,
        producer_id=producer_id,
        producer_epoch=producer_epoch,
        previous_producer_id=tagged(TAG_PREVIOUS_PRODUCER_ID, -1),
        next_producer_id=tagged(TAG_NEXT_PRODUCER_ID, -1),
        next_producer_epoch=tagged(TAG_NEXT_PRODUCER_EPOCH, -1),
        last_producer_epoch=tagged(TAG_LAST_PRODUCER_EPOCH, -1),
        timeout_ms=timeout_ms,
        state=_STATE[status],
        partitions=partitions,
        start_ms=start_ms,
        last_update_ms=last_update_ms,
        client_version=tagged(TAG_CLIENT_VERSION, 0),
    )


def _write_partitions(out: FieldWriter, metadata: TransactionMetadata) -> None:
    """Null in the states Empty, CompleteCommit and CompleteAbort, else topics with their partition numbers, sorted."""
    if not metadata.partitions and metadata.state not in (TransactionState.PREPARE_ABORT, TransactionState.ONGOING):
        out.uvarint(0)
        return
    topics = [(topic, list(group)) for topic, group in groupby(sorted(metadata.partitions), lambda item: item.topic)]
    out.uvarint(len(topics) + 1)
    for topic, group in topics:
        out.compact_string(topic).uvarint(len(group) + 1)
        for item in group:
            out.int32(item.partition)
        out.tags({})


def _read_partitions(reader: FieldReader) -> frozenset[TopicPartition]:
    found: set[TopicPartition] = set()
    for _ in range(reader.uvarint() - 1):
        topic = reader.compact_string()
        found.update(TopicPartition(topic, reader.int32()) for _ in range(reader.uvarint() - 1))
        reader.tags()
    return frozenset(found)
