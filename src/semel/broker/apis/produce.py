"""Produce: append record batches, inside or outside a transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from semel.broker.apis.hotpath import ProducedPartition, ProducePartition, produce_response, read_produce_request
from semel.broker.exchange import Answer, Api, Later, Request
from semel.broker.security.acls import Operation, Resource
from semel.broker.topics import Partition, Topic
from semel.env import failpoint
from semel.errors import CorruptBatch, ErrorCode, ProtocolError
from semel.log.log import LogError
from semel.types import TopicPartition
from semel.wire.records import BatchHeader, read_header

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_Produced = list[tuple[str | UUID | None, list[ProducedPartition]]]

_IMPLICIT_ADD_VERSION = 12
"""From this version on Produce adds its partitions to the transaction itself (KIP-890)."""


class _Producer:
    """One Produce request on its way through the checks."""

    def __init__(self, node: Node, request: Request) -> None:
        body = read_produce_request(request.frame, request.header.body, request.version)
        self.node = node
        self.request = request
        self.transactional_id = body.transactional_id
        self.acks = body.acks
        self.asked = body.topics
        self.refused = ErrorCode.NONE
        """Why nothing in a transaction can be appended."""
        self.identity = (-1, -1)
        self.unsynced: list[tuple[Partition, int, ProducedPartition]] = []
        """Batches that the disk has not yet: partition, last offset, and the answer if all goes well."""
        self.forbidden: set[str | UUID | None] = set()
        """Topics, as they were asked for, that the client may not write to."""

    def run(self) -> _Produced:
        """Append every partition's batch; each succeeds or fails by itself."""
        topics = [(asked, self._topic(asked), partitions) for asked, partitions in self.asked]
        if self.transactional_id is not None:
            self._join_transaction(topics)
        return [
            (asked, [self._partition(asked, topic, item) for item in partitions]) for asked, topic, partitions in topics
        ]

    def _topic(self, asked: str | UUID | None) -> Topic | None:
        topic = self.node.topics.get(asked) if isinstance(asked, str) else self.node.topics.by_id(asked)
        name = asked if isinstance(asked, str) else None if topic is None else topic.info.name
        if name is not None and self.node.denies(self.request, Operation.WRITE, Resource.TOPIC, name):
            self.forbidden.add(asked)
            return None
        return topic

    def _join_transaction(self, topics: list[tuple[str | UUID | None, Topic | None, list[ProducePartition]]]) -> None:
        """Find the identity of the request's transactional batches; from v12 on add their partitions."""
        identities = set()
        partitions = []
        for _, topic, items in topics:
            for item in items:
                header = _header(item)
                if header is None or not header.is_transactional:
                    continue
                identities.add((header.producer_id, header.producer_epoch))
                if topic is not None and not topic.info.internal and topic.partition(item.partition) is not None:
                    partitions.append(TopicPartition(topic.info.name, item.partition))
        if not identities:
            return
        if len(identities) > 1:
            self.refused = ErrorCode.INVALID_PRODUCER_ID_MAPPING
            return
        self.identity = identities.pop()
        assert self.transactional_id is not None
        if self.node.denies(self.request, Operation.WRITE, Resource.TRANSACTIONAL_ID, self.transactional_id):
            self.refused = ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
            return
        if self.request.version >= _IMPLICIT_ADD_VERSION and partitions:
            self.refused = self.node.transactions.add_partitions(
                self.transactional_id,
                *self.identity,
                partitions,
                self.request.now_ms,
                api_version=self.request.version,
                implicit=True,
            )

    def _partition(self, asked: str | UUID | None, topic: Topic | None, item: ProducePartition) -> ProducedPartition:
        if self.acks not in (-1, 0, 1):
            return ProducedPartition(item.partition, ErrorCode.INVALID_REQUIRED_ACKS)
        if asked in self.forbidden:
            return ProducedPartition(item.partition, ErrorCode.TOPIC_AUTHORIZATION_FAILED)
        partition = None if topic is None else topic.partition(item.partition)
        if partition is None or topic is None:
            by_id = self.request.version >= 13 and topic is None
            code = ErrorCode.UNKNOWN_TOPIC_ID if by_id else ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
            return ProducedPartition(item.partition, code)
        if topic.info.internal:
            return ProducedPartition(
                item.partition,
                ErrorCode.INVALID_TOPIC_EXCEPTION,
                message=f"{topic.info.name} is the broker's own topic.",
            )
        if item.records is None:
            return ProducedPartition(item.partition, ErrorCode.INVALID_RECORD, message="There is no record batch.")
        code = self._check_transaction(topic, item)
        if code is not ErrorCode.NONE:
            return ProducedPartition(item.partition, code)
        return self._append(partition, item.partition, item.records)

    def _check_transaction(self, topic: Topic, item: ProducePartition) -> ErrorCode:
        header = _header(item)
        if header is None or not header.is_transactional:
            return ErrorCode.NONE  # What is wrong with a batch that has no header is the log's to say.
        if self.transactional_id is None:
            return ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
        if self.refused is not ErrorCode.NONE:
            return self.refused
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
            return ProducedPartition(index, error.code, message=str(error), faulty_records=error.records)
        failpoint("broker.after_append")
        if partition.waiters:
            partition.advanced()
        produced = ProducedPartition(
            index, ErrorCode.NONE, result.base_offset, result.log_append_time_ms, result.log_start_offset
        )
        if result.last_offset >= partition.log.high_watermark:  # Also of a duplicate whose first copy still waits.
            self.unsynced.append((partition, result.last_offset, produced))
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


def _header(item: ProducePartition) -> BatchHeader | None:
    if item.records is None:
        return None
    try:
        return read_header(item.records)
    except CorruptBatch:
        return None


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
