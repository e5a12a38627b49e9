"""APIs about where partitions are: on the one disk of the one node, and that does not change."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from semel.broker.config import NODE_ID
from semel.broker.exchange import Answer, Api, Fields, Request
from semel.errors import ErrorCode

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]


def _log_dir(node: Node, wanted: dict[str, set[int]] | None) -> Fields:
    topics: list[Fields] = []
    for topic in node.topics:
        indexes = range(len(topic.partitions)) if wanted is None else sorted(wanted.get(topic.info.name, ()))
        partitions = [
            {
                "partition_index": index,
                "partition_size": topic.partitions[index].log.size_bytes,
                "offset_lag": 0,
                "is_future_key": False,
            }
            for index in indexes
            if 0 <= index < len(topic.partitions)
        ]
        if partitions:
            topics.append({"name": topic.info.name, "partitions": partitions})
    disk = shutil.disk_usage(node.topics.directory)
    return {
        "error_code": ErrorCode.NONE,
        "log_dir": str(node.topics.directory),
        "topics": topics,
        "total_bytes": disk.total,
        "usable_bytes": disk.free,
        "is_cordoned": False,
    }


def describe_log_dirs(node: Node, request: Request) -> Answer:
    """DescribeLogDirs (KIP-113, KIP-827).

    Behaviour: the one directory, with the size of each partition; null topics mean all, unknown ones are left out.
    Version notes: v4 size and free space of the disk; v5 IsCordoned.
    """
    asked = request.body.topics
    wanted: dict[str, set[int]] | None = None if asked is None else {}
    for item in asked or ():
        assert wanted is not None
        wanted.setdefault(item.topic, set()).update(item.partitions)
    return {"error_code": ErrorCode.NONE, "results": [_log_dir(node, wanted)]}


def elect_leaders(node: Node, request: Request) -> Answer:
    """ElectLeaders (KIP-183, KIP-460).

    Behaviour: this node leads every partition, so no election is needed (84). Null partitions mean all, of which none
    is worth a line.
    """
    asked = request.body.topic_partitions

    def result(topic: str, index: int) -> Fields:
        if node.topics.partition(topic, index) is None:
            text = f"No such partition as {topic}-{index}"
            return {
                "partition_id": index,
                "error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION,
                "error_message": text,
            }
        text = "Leader election not needed for topic partition."
        return {"partition_id": index, "error_code": ErrorCode.ELECTION_NOT_NEEDED, "error_message": text}

    return {
        "error_code": ErrorCode.NONE,
        "replica_election_results": [
            {"topic": item.topic, "partition_result": [result(item.topic, index) for index in item.partitions]}
            for item in asked or ()
        ],
    }


def _reassigned(node: Node, topic: str, item: Any) -> Fields:
    answer: Fields = {"partition_index": item.partition_index, "error_code": ErrorCode.NONE, "error_message": None}
    if node.topics.partition(topic, item.partition_index) is None:
        text = f"Unable to find partition {topic}:{item.partition_index}."
        return answer | {"error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION, "error_message": text}
    if item.replicas is None:
        return answer | {"error_code": ErrorCode.NO_REASSIGNMENT_IN_PROGRESS}
    if tuple(item.replicas) != (NODE_ID,):
        text = f"The only broker is {NODE_ID}: a partition cannot be anywhere else."
        return answer | {"error_code": ErrorCode.INVALID_REPLICA_ASSIGNMENT, "error_message": text}
    return answer


def alter_partition_reassignments(node: Node, request: Request) -> Answer:
    """AlterPartitionReassignments (KIP-455).

    Behaviour: every partition is here and stays: to be here succeeds at once, anywhere else is refused (39), and there
    is nothing to cancel (85).
    """
    return {
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "responses": [
            {"name": topic.name, "partitions": [_reassigned(node, topic.name, item) for item in topic.partitions]}
            for topic in request.body.topics
        ],
    }


def list_partition_reassignments(_node: Node, _request: Request) -> Answer:
    """ListPartitionReassignments (KIP-455).

    Behaviour: nothing ever moves.
    """
    return {"error_code": ErrorCode.NONE, "error_message": None, "topics": []}


APIS = (
    Api(35, 1, 5, describe_log_dirs),
    Api(43, 0, 2, elect_leaders),
    Api(45, 0, 1, alter_partition_reassignments),
    Api(46, 0, 0, list_partition_reassignments),
)
