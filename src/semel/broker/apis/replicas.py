"""APIs about where partitions are: on the one disk of the one node, and that does not change.

Changing needs ALTER on the cluster, looking DESCRIBE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semel.broker.config import LEADER_EPOCH, NODE_ID
from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.security.acls import CLUSTER_NAME, Operation, Resource
from semel.disk import disk
from semel.errors import ErrorCode

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_METADATA_TOPIC = "__cluster_metadata"
_DENIED = ErrorCode.CLUSTER_AUTHORIZATION_FAILED
_DENIED_TEXT = "Cluster authorization failed."


def _denies(node: Node, request: Request, operation: Operation) -> bool:
    return node.denies(request, operation, Resource.CLUSTER, CLUSTER_NAME)


def alter_replica_log_dirs(node: Node, request: Request) -> Answer:
    """AlterReplicaLogDirs.

    Behaviour: there is one log directory. Moving a partition to where it is succeeds; any other directory is 57.
    """
    denied = _denies(node, request, Operation.ALTER)
    results = []
    for directory in request.body.dirs:
        here = directory.path == str(node.topics.directory)
        for item in directory.topics:
            partitions = []
            for index in item.partitions:
                code = ErrorCode.NONE if here else ErrorCode.LOG_DIR_NOT_FOUND
                if here and node.topics.partition(item.name, index) is None:
                    code = ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
                partitions.append({"partition_index": index, "error_code": _DENIED if denied else code})
            results.append({"topic_name": item.name, "partitions": partitions})
    return {"results": results}


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
    total, free = disk.usage(node.topics.directory)
    return {
        "error_code": ErrorCode.NONE,
        "log_dir": str(node.topics.directory),
        "topics": topics,
        "total_bytes": total,
        "usable_bytes": free,
        "is_cordoned": False,
    }


def describe_log_dirs(node: Node, request: Request) -> Answer:
    """DescribeLogDirs (KIP-113, KIP-827).

    Behaviour: the one directory, with the size of each partition; null topics mean all, unknown ones are left out.
    Version notes: v4 size and free space of the disk; v5 IsCordoned.
    """
    if _denies(node, request, Operation.DESCRIBE):
        return {"error_code": _DENIED, "results": []}
    asked = request.body.topics
    wanted: dict[str, set[int]] | None = None if asked is None else {}
    for item in asked or ():
        assert wanted is not None
        wanted.setdefault(item.topic, set()).update(item.partitions)
    return {"error_code": ErrorCode.NONE, "results": [_log_dir(node, wanted)]}


def elect_leaders(node: Node, request: Request) -> Answer:
    """ElectLeaders (KIP-183, KIP-460).

    Behaviour: this node leads every partition, so no election is needed (84). Null partitions mean all: every
    topic stands there, and none of its partitions is worth a line.
    """
    if _denies(node, request, Operation.ALTER):
        return {"error_code": _DENIED, "replica_election_results": []}
    asked = request.body.topic_partitions
    if asked is None:
        return {
            "error_code": ErrorCode.NONE,
            "replica_election_results": [{"topic": topic.info.name, "partition_result": []} for topic in node.topics],
        }

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
            for item in asked
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
    if _denies(node, request, Operation.ALTER):
        return {"error_code": _DENIED, "error_message": _DENIED_TEXT, "responses": []}
    return {
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "responses": [
            {"name": topic.name, "partitions": [_reassigned(node, topic.name, item) for item in topic.partitions]}
            for topic in request.body.topics
        ],
    }


def list_partition_reassignments(node: Node, request: Request) -> Answer:
    """ListPartitionReassignments (KIP-455).

    Behaviour: nothing ever moves.
    """
    if _denies(node, request, Operation.DESCRIBE):
        return {"error_code": _DENIED, "error_message": _DENIED_TEXT, "topics": []}
    return {"error_code": ErrorCode.NONE, "error_message": None, "topics": []}


def describe_quorum(node: Node, request: Request) -> Answer:
    """DescribeQuorum.

    Behaviour: the only voter is this node, and it leads. The broker's metadata is a file, not a replicated log, so its
    offsets are 0. Another partition than `__cluster_metadata`-0 is 3.
    Version notes: v1 timestamps of the replicas; v2 directory ids, messages and the voters' listeners.
    """
    if _denies(node, request, Operation.DESCRIBE):
        return {"error_code": _DENIED, "error_message": _DENIED_TEXT, "topics": [], "nodes": []}
    topics = []
    for topic in request.body.topics:
        partitions: list[Fields] = []
        for item in topic.partitions:
            known = (topic.topic_name, item.partition_index) == (_METADATA_TOPIC, 0)
            voter = {
                "replica_id": NODE_ID,
                "replica_directory_id": None,
                "log_end_offset": 0,
                "last_fetch_timestamp": -1,
                "last_caught_up_timestamp": -1,
            }
            partitions.append(
                {
                    "partition_index": item.partition_index,
                    "error_code": ErrorCode.NONE if known else ErrorCode.UNKNOWN_TOPIC_OR_PARTITION,
                    "error_message": None,
                    "leader_id": NODE_ID if known else 0,
                    "leader_epoch": LEADER_EPOCH,
                    "high_watermark": 0,
                    "current_voters": [voter] if known else [],
                    "observers": [],
                }
            )
        topics.append({"topic_name": topic.topic_name, "partitions": partitions})
    return {
        "error_code": 0,
        "error_message": None,
        "topics": topics,
        "nodes": [
            {
                "node_id": NODE_ID,
                "listeners": [{"name": "CONTROLLER", "host": request.peer.host, "port": request.peer.port}],
            }
        ],
    }


APIS = (
    Api(34, 1, 2, alter_replica_log_dirs),
    Api(35, 1, 5, describe_log_dirs),
    Api(43, 0, 2, elect_leaders),
    Api(45, 0, 1, alter_partition_reassignments),
    Api(46, 0, 0, list_partition_reassignments),
    Api(55, 0, 2, describe_quorum),
)
