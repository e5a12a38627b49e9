"""Where a partition begins and ends: ListOffsets, OffsetForLeaderEpoch, DeleteRecords, DescribeProducers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semel.broker.apis.fetch import leader_epoch_error
from semel.broker.config import LEADER_EPOCH
from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.topics import Partition
from semel.errors import ErrorCode
from semel.log.log import LogError

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_LATEST, _EARLIEST, _MAX_TIMESTAMP, _EARLIEST_LOCAL, _LATEST_TIERED, _EARLIEST_PENDING = -1, -2, -3, -4, -5, -6
_SINCE_VERSION = {
    _LATEST: 1,
    _EARLIEST: 1,
    _MAX_TIMESTAMP: 7,
    _EARLIEST_LOCAL: 8,
    _LATEST_TIERED: 9,
    _EARLIEST_PENDING: 11,
}
"""First request version that defines a special timestamp (KIP-734, KIP-405, KIP-1005, KIP-1023)."""


def _listed(index: int, code: ErrorCode, offset: int = -1, timestamp: int = -1, epoch: int = -1) -> Fields:
    return {
        "partition_index": index,
        "error_code": code,
        "timestamp": timestamp,
        "offset": offset,
        "leader_epoch": epoch,
    }


def _list_offset(partition: Partition | None, item: Any, version: int, committed_only: bool) -> Fields:
    index, wanted = item.partition_index, item.timestamp
    if wanted < 0 and version < _SINCE_VERSION.get(wanted, version + 1):
        return _listed(index, ErrorCode.UNSUPPORTED_VERSION)
    if partition is None:
        return _listed(index, ErrorCode.UNKNOWN_TOPIC_OR_PARTITION)
    code = leader_epoch_error(getattr(item, "current_leader_epoch", -1))
    if code is not ErrorCode.NONE:
        return _listed(index, code)
    source = partition.log
    if wanted == _LATEST:
        end = source.last_stable_offset if committed_only else source.high_watermark
        return _listed(index, ErrorCode.NONE, end, epoch=LEADER_EPOCH)
    if wanted in (_EARLIEST, _EARLIEST_LOCAL):
        return _listed(index, ErrorCode.NONE, source.log_start_offset, epoch=LEADER_EPOCH)
    if wanted in (_LATEST_TIERED, _EARLIEST_PENDING):
        return _listed(index, ErrorCode.NONE)  # There is no second tier of storage.
    found = source.max_timestamp_offset() if wanted == _MAX_TIMESTAMP else source.offset_for_timestamp(wanted)
    end = source.last_stable_offset if committed_only else source.high_watermark
    if found is None or found[0] >= end:
        return _listed(index, ErrorCode.NONE)
    offset, timestamp, epoch = found
    return _listed(index, ErrorCode.NONE, offset, timestamp, epoch)


def list_offsets(node: Node, request: Request) -> Answer:
    """ListOffsets.

    Behaviour: -1 is the high watermark, for read_committed the last stable offset; -2 and -4 the log's start; -3 the
    record with the largest timestamp; -5 and -6 nothing; a time the first record not older, with its own timestamp and
    leader epoch. Nothing found: offset -1 without an error.
    Version notes: v2 isolation level; v4 leader epochs; a special timestamp that the version does not define: 35.
    """
    body = request.body
    committed_only = getattr(body, "isolation_level", 0) == 1
    return {
        "topics": [
            {
                "name": topic.name,
                "partitions": [
                    _list_offset(
                        node.topics.partition(topic.name, item.partition_index), item, request.version, committed_only
                    )
                    for item in topic.partitions
                ],
            }
            for topic in body.topics
        ]
    }


def _epoch_end(partition: Partition | None, item: Any) -> Fields:
    answer: Fields = {"partition": item.partition, "leader_epoch": -1, "end_offset": -1}
    if partition is None:
        return answer | {"error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION}
    code = leader_epoch_error(getattr(item, "current_leader_epoch", -1))
    if code is not ErrorCode.NONE or item.leader_epoch > LEADER_EPOCH or item.leader_epoch < 0:
        return answer | {"error_code": code}
    return answer | {
        "error_code": ErrorCode.NONE,
        "leader_epoch": LEADER_EPOCH,
        "end_offset": partition.log.log_end_offset,
    }


def offset_for_leader_epoch(node: Node, request: Request) -> Answer:
    """OffsetForLeaderEpoch.

    Behaviour: the only leader epoch ends at the log's end; a later one is unknown: (-1, -1) without an error.
    Version notes: v3 ReplicaId, which is ignored: there are no followers.
    """
    return {
        "topics": [
            {
                "topic": topic.topic,
                "partitions": [
                    _epoch_end(node.topics.partition(topic.topic, item.partition), item) for item in topic.partitions
                ],
            }
            for topic in request.body.topics
        ]
    }


def _delete_records(node: Node, name: str, item: Any) -> Fields:
    answer: Fields = {"partition_index": item.partition_index, "low_watermark": -1}
    partition = node.topics.partition(name, item.partition_index)
    if partition is None:
        return answer | {"error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION}
    if name.startswith("__"):
        return answer | {"error_code": ErrorCode.INVALID_TOPIC_EXCEPTION}
    if partition.log.config.is_compacted and not partition.log.config.is_deleting:
        return answer | {"error_code": ErrorCode.POLICY_VIOLATION}
    try:
        start = partition.log.delete_before(item.offset)
    except LogError as error:
        return answer | {"error_code": error.code}
    partition.advanced()
    return answer | {"error_code": ErrorCode.NONE, "low_watermark": start}


def delete_records(node: Node, request: Request) -> Answer:
    """DeleteRecords.

    Behaviour: moves the log's start; -1 means the high watermark. An open transaction does not stop it: the last
    stable offset then is the log's start. A topic that is only compacted keeps its records (44).
    """
    return {
        "topics": [
            {"name": topic.name, "partitions": [_delete_records(node, topic.name, item) for item in topic.partitions]}
            for topic in request.body.topics
        ]
    }


def _producers(node: Node, name: str, index: int) -> Fields:
    partition = node.topics.partition(name, index)
    if partition is None:
        return {
            "partition_index": index,
            "error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION,
            "error_message": "There is no such topic or partition.",
            "active_producers": [],
        }
    return {
        "partition_index": index,
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "active_producers": [
            {
                "producer_id": entry.producer_id,
                "producer_epoch": entry.epoch,
                "last_sequence": entry.last_sequence,
                "last_timestamp": entry.last_timestamp_ms,
                "coordinator_epoch": entry.coordinator_epoch,
                "current_txn_start_offset": entry.first_offset,
            }
            for entry in partition.log.producers()
        ],
    }


def describe_producers(node: Node, request: Request) -> Answer:
    """DescribeProducers (KIP-664).

    Behaviour: each producer id that the partition remembers; the last sequence is -1 after a marker, the
    coordinator epoch -1 until the first marker, the transaction's start -1 when none is open.
    """
    return {
        "topics": [
            {
                "name": topic.name,
                "partitions": [_producers(node, topic.name, index) for index in topic.partition_indexes],
            }
            for topic in request.body.topics
        ]
    }


APIS = (
    Api(2, 1, 11, list_offsets),
    Api(21, 0, 2, delete_records),
    Api(23, 2, 4, offset_for_leader_epoch),
    Api(61, 0, 0, describe_producers),
)
