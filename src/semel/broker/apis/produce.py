"""Produce: append record batches, inside or outside a transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from semel.broker.apis.hotpath import ProducedPartition, ProducePartition, produce_response, read_produce_request
from semel.broker.exchange import Answer, Api, Later, Request
from semel.broker.security.acls import Operation, Resource
from semel.broker.topics import Partition, Topic
from semel.errors import ErrorCode, ProtocolError
from semel.failpoints import failpoint
from semel.log.log import LogError
from semel.log.validation import check_only_batch, read_first_batch
from semel.types import TopicPartition
from semel.wire.records import BATCH_OVERHEAD, BatchHeader

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_Produced = list[tuple[str | UUID | None, list[ProducedPartition]]]

_IMPLICIT_ADD_VERSION = 12
"""From this version on Produce adds its partitions to the transaction itself (KIP-890)."""
_ZSTD, _ZSTD_VERSION = 4, 7
"""The codec, and the first version that carries it (KIP-110)."""
_WITHOUT_LOG_START = (ErrorCode.MESSAGE_TOO_LARGE, ErrorCode.CORRUPT_MESSAGE, ErrorCode.KAFKA_STORAGE_ERROR)
"""Refusals that do not tell where the log starts, as in Apache Kafka; all others of the log do."""
_MAGIC, _ATTRIBUTES, _TRANSACTIONAL = 16, 22, 0x10
"""Places in a batch's header: the format, and the low byte of the attributes, with a bit of it."""
_Batches = tuple[str | UUID | None, Topic | None, list[tuple[ProducePartition, BatchHeader | ProducedPartition]]]


class _Producer:
    """One Produce request on its way through the checks, in Kafka's order: who may write; is there such a partition,
    and one batch for it; is the transaction its producer's; the acks; and only then what is in the batch."""

    def __init__(self, node: Node, request: Request) -> None:
        body = read_produce_request(request.frame, request.header.body, request.version)
        self.node = node
        self.request = request
        self.transactional_id = body.transactional_id
        self.acks = body.acks
        self.asked = body.topics
        self.refused = ErrorCode.NONE
        """Why nothing in a transaction can be appended."""
        self.unsynced: list[tuple[Partition, int, ProducedPartition]] = []
        """Batches that the disk has not yet: partition, last offset, and the answer if all goes well."""

    def run(self) -> _Produced:
        """Append every partition's batch; each succeeds or fails by itself."""
        transactional = any(_is_transactional(item) for _, partitions in self.asked for item in partitions)
        if transactional and not self._may_use_id():
            return self._refuse_all(ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)
        batches = [self._batches(asked, partitions) for asked, partitions in self.asked]
        if transactional:
            identities = {
                (found.producer_id, found.producer_epoch)
                for _, _, items in batches
                for _, found in items
                if isinstance(found, BatchHeader) and found.is_transactional
            }
            if len(identities) > 1:
                return self._refuse_all(ErrorCode.INVALID_PRODUCER_ID_MAPPING)
            if identities and self.request.version >= _IMPLICIT_ADD_VERSION:
                self._join_transaction(*identities.pop(), batches)
        return [
            (asked, [self._partition(topic, item, found) for item, found in items]) for asked, topic, items in batches
        ]

    def _may_use_id(self) -> bool:
        name = self.transactional_id
        return name is not None and not self.node.denies(self.request, Operation.WRITE, Resource.TRANSACTIONAL_ID, name)

    def _refuse_all(self, code: ErrorCode) -> _Produced:
        return [(asked, [ProducedPartition(item.partition, code) for item in items]) for asked, items in self.asked]

    def _batches(self, asked: str | UUID | None, partitions: list[ProducePartition]) -> _Batches:
        """The topic, and for each partition the header of its batch or the refusal."""
        topics = self.node.topics
        topic = topics.get(asked) if isinstance(asked, str) else topics.by_id(asked)
        name = asked if isinstance(asked, str) else None if topic is None else topic.info.name
        if name is not None and self.node.denies(self.request, Operation.WRITE, Resource.TOPIC, name):
            code = ErrorCode.TOPIC_AUTHORIZATION_FAILED
            return asked, topic, [(item, ProducedPartition(item.partition, code)) for item in partitions]
        return asked, topic, [(item, self._only_batch(topic, item)) for item in partitions]

    def _only_batch(self, topic: Topic | None, item: ProducePartition) -> BatchHeader | ProducedPartition:
        index = item.partition
        partition = None if topic is None else topic.partition(index)
        if topic is None or partition is None:
            by_id = self.request.version >= 13 and topic is None
            return ProducedPartition(
                index, ErrorCode.UNKNOWN_TOPIC_ID if by_id else ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
            )
        if topic.info.internal:
            message = f"{topic.info.name} is the broker's own topic."
            return ProducedPartition(index, ErrorCode.INVALID_TOPIC_EXCEPTION, message=message)
        if item.records is None:
            return ProducedPartition(index, ErrorCode.INVALID_RECORD, message="There is no record batch.")
        try:
            header = read_first_batch(item.records)
            if header.codec == _ZSTD and self.request.version < _ZSTD_VERSION:
                message = f"Produce requests carry zstd from version {_ZSTD_VERSION} on."
                return ProducedPartition(index, ErrorCode.UNSUPPORTED_COMPRESSION_TYPE, message=message)
            check_only_batch(item.records, header)
        except LogError as error:
            return ProducedPartition(index, error.code, message=str(error))
        if header.is_transactional and partition.log.is_fenced(header.producer_id, header.producer_epoch):
            # Before the coordinator is asked: "not your transaction" is fatal, being fenced is not (KAFKA-19690).
            return ProducedPartition(index, ErrorCode.INVALID_PRODUCER_EPOCH)
        return header

    def _join_transaction(self, producer_id: int, producer_epoch: int, batches: list[_Batches]) -> None:
        """Add the partitions of the request's transactional batches to the transaction."""
        partitions = [
            TopicPartition(topic.info.name, item.partition)
            for _, topic, items in batches
            for item, found in items
            if topic is not None and isinstance(found, BatchHeader) and found.is_transactional
        ]
        assert self.transactional_id is not None
        self.refused = self.node.transactions.add_partitions(
            self.transactional_id,
            producer_id,
            producer_epoch,
            partitions,
            self.request.now_ms,
            api_version=self.request.version,
            implicit=True,
        )

    def _partition(
        self, topic: Topic | None, item: ProducePartition, found: BatchHeader | ProducedPartition
    ) -> ProducedPartition:
        if isinstance(found, ProducedPartition):
            return found
        assert topic is not None
        assert item.records is not None
        partition = topic.partition(item.partition)
        assert partition is not None
        code = self._check_transaction(topic, item, found)
        if code is ErrorCode.NONE and self.acks not in (-1, 0, 1):
            code = ErrorCode.INVALID_REQUIRED_ACKS
        if code is not ErrorCode.NONE:
            return ProducedPartition(item.partition, code)
        return self._append(partition, item.partition, item.records)

    def _check_transaction(self, topic: Topic, item: ProducePartition, header: BatchHeader) -> ErrorCode:
        if not header.is_transactional:
            return ErrorCode.NONE
        if self.refused is not ErrorCode.NONE:
            return self.refused
        assert self.transactional_id is not None
        return self.node.transactions.coordinator.check_produce(
            self.transactional_id,
            header.producer_id,
            header.producer_epoch,
            TopicPartition(topic.info.name, item.partition),
            self.request.version,
        )

    def _append(self, partition: Partition, index: int, records: memoryview) -> ProducedPartition:
        version = 2 if self.request.version >= _IMPLICIT_ADD_VERSION else 1
        failpoint("broker.before_append")
        try:
            result = partition.log.append(records, self.request.now_ms, transaction_version=version, sync=False)
        except LogError as error:
            start = -1 if error.code in _WITHOUT_LOG_START else partition.log.log_start_offset
            return ProducedPartition(
                index, error.code, log_start_offset=start, message=str(error), faulty_records=error.records
            )
        failpoint("broker.after_append")
        if partition.log.take_sync_due():
            self.node.commits.wait([partition], lambda: None)
        produced = ProducedPartition(
            index, ErrorCode.NONE, result.base_offset, result.log_append_time_ms, result.log_start_offset
        )
        if result.last_offset >= partition.log.high_watermark:  # Also of a duplicate whose first copy still waits.
            self.unsynced.append((partition, result.last_offset, produced))
        elif partition.waiters:
            partition.advanced()
        return produced

    def after_sync(self, topics: _Produced) -> _Produced:
        """The answer when the disk has said what became of the batches that waited for it."""
        lost = {
            id(produced)
            for partition, last_offset, produced in self.unsynced
            if last_offset >= partition.log.high_watermark
        }
        return [(asked, [_lost(item) if id(item) in lost else item for item in items]) for asked, items in topics]


def _lost(item: ProducedPartition) -> ProducedPartition:
    return ProducedPartition(
        item.partition, ErrorCode.KAFKA_STORAGE_ERROR, message="The batch could not be brought to the disk."
    )


def _is_transactional(item: ProducePartition) -> bool:
    """Whether there is a batch that says so, whatever else may be wrong with it."""
    records = item.records
    if records is None or len(records) < BATCH_OVERHEAD or not records[_ATTRIBUTES] & _TRANSACTIONAL:
        return False
    return records[_MAGIC] == 2 and 12 + int.from_bytes(records[8:12], "big", signed=True) <= len(records)


def produce(node: Node, request: Request) -> Answer | Later:
    """Produce.

    Behaviour: one batch a partition; codes and their order as in kafka_facts 2.1, 2.2 and 2.6. A stale epoch is 47 and
    never 90. The coordinator is asked immediately before each append, so nothing is written under an identity whose
    EndTxn was decided. With fsync=always the answer waits for the disk, together with others (`GroupCommit`). With
    acks=0 there is no response, and the connection closes when there was an error.
    Version notes: v5 log start offset; v8 error message; v9 flexible; v11 may answer 120; v12 adds partitions to the
    transaction itself; v13 topics by id (unknown: 100 instead of 3). v0-2 are advertised and cannot be read:
    librdkafka before 2.11 turns compression off where v0 is missing (KAFKA-18659).
    """
    producer = _Producer(node, request)
    topics = producer.run()
    waiting = [partition for partition, _, _ in producer.unsynced]
    if producer.acks == 0:
        if waiting:
            node.commits.wait(waiting, lambda: None)
        failed = next((item for _, items in topics for item in items if item.error), None)
        if failed is not None:
            raise ProtocolError(f"a Produce request with acks=0 failed: {ErrorCode(failed.error).name}")
        return None
    if not waiting:
        return [produce_response(request.version, request.header.correlation_id, topics)]
    later = Later(node.outbox, request)
    version, correlation_id = request.version, request.header.correlation_id
    node.commits.wait(
        waiting, lambda: later.answer([produce_response(version, correlation_id, producer.after_sync(topics))])
    )
    return later


APIS = (Api(0, 3, 13, produce, advertised_min=0),)
