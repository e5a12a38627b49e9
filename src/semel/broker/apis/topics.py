"""APIs that create, extend, describe and delete topics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from semel.broker.apis.cluster import partition_fields
from semel.broker.config import NODE_ID
from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.security.acls import Operation, Resource
from semel.broker.security.guard import authorized_operations
from semel.broker.topics import Topic, TopicError
from semel.errors import ErrorCode
from semel.log.log import LogError

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_UNKNOWN_OPERATIONS = -2147483648


def _requested_partitions(node: Node, item: Any) -> int:
    """How many partitions a CreateTopics entry asks for. Raises `TopicError`."""
    if item.assignments:
        if item.num_partitions != -1 or item.replication_factor != -1:
            raise TopicError(
                ErrorCode.INVALID_REQUEST,
                "Give either numPartitions and replicationFactor, or replicasAssignments, not both.",
            )
        if any(tuple(replica.broker_ids) != (NODE_ID,) for replica in item.assignments):
            raise TopicError(
                ErrorCode.INVALID_REPLICA_ASSIGNMENT,
                f"The only broker is {NODE_ID}: assign each partition to it alone.",
            )
        if sorted(replica.partition_index for replica in item.assignments) != list(range(len(item.assignments))):
            raise TopicError(ErrorCode.INVALID_REPLICA_ASSIGNMENT, "Partition indexes must be 0, 1, 2 and so on.")
        return len(item.assignments)
    if item.num_partitions < 1 and item.num_partitions != -1:
        raise TopicError(
            ErrorCode.INVALID_PARTITIONS, "Number of partitions must be larger than 0, or -1 for the default."
        )
    if item.replication_factor not in (-1, 1):
        raise TopicError(
            ErrorCode.INVALID_REPLICATION_FACTOR,
            f"Replication factor {item.replication_factor} is not possible: this broker is one node. Use 1 or -1.",
        )
    return node.config.num_partitions if item.num_partitions == -1 else int(item.num_partitions)


def _create(node: Node, item: Any, *, validate_only: bool) -> Fields:
    answer: Fields = {"name": item.name, "topic_id": None, "num_partitions": -1, "replication_factor": -1}
    configs: dict[str, str | None] = {entry.name: entry.value for entry in item.configs}
    try:
        node.topics.check_settings(item.name, configs)
        partitions = _requested_partitions(node, item)
        if validate_only:
            node.topics.check_new(item.name, partitions, configs)
            overrides = {name: value for name, value in configs.items() if value is not None}
        else:
            info = node.topics.create(item.name, partitions, configs).info
            answer["topic_id"] = info.topic_id
            overrides = dict(info.configs)
    except TopicError as error:
        return answer | {"error_code": error.code, "error_message": str(error), "configs": []}
    return answer | {
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "num_partitions": partitions,
        "replication_factor": 1,
        "configs": [
            {
                "name": entry.key.name,
                "value": entry.value,
                "read_only": entry.read_only,
                "config_source": entry.source,
                "is_sensitive": entry.key.is_sensitive,
            }
            for entry in node.settings.topic(overrides)
        ],
    }


def create_topics(node: Node, request: Request) -> Answer:
    """CreateTopics.

    Behaviour: each topic succeeds or fails by itself and is usable when the answer is sent. The only replication
    factor is 1. A name that stands twice in a request is refused (42). validateOnly creates nothing.
    Version notes: v4 -1 for default partitions and replication; v5 configs in the answer; v7 topic ids.
    """
    body = request.body
    names = [item.name for item in body.topics]
    answers = []
    for item in body.topics:
        if names.count(item.name) == 1:
            answers.append(_create(node, item, validate_only=body.validate_only))
        elif not any(answer["name"] == item.name for answer in answers):
            answers.append(
                {
                    "name": item.name,
                    "topic_id": None,
                    "error_code": ErrorCode.INVALID_REQUEST,
                    "error_message": "The topic stands more than once in the request.",
                    "configs": [],
                }
            )
    return {"topics": answers}


def _delete(node: Node, name: str | None, topic: Topic | None, topic_id: Any) -> Fields:
    answer: Fields = {"name": name, "topic_id": topic_id, "error_message": None}
    if topic is None:
        by_id = name is None
        code = ErrorCode.UNKNOWN_TOPIC_ID if by_id else ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
        return answer | {"error_code": code, "error_message": "There is no such topic."}
    answer |= {"name": topic.info.name, "topic_id": topic.info.topic_id}
    if topic.info.internal:
        return answer | {
            "error_code": ErrorCode.INVALID_TOPIC_EXCEPTION,
            "error_message": f"{topic.info.name} is the broker's own topic.",
        }
    try:
        node.topics.delete(topic)
    except LogError as error:
        return answer | {"error_code": error.code, "error_message": f"The topic was not deleted: {error}"}
    return answer | {"error_code": ErrorCode.NONE}


def delete_topics(node: Node, request: Request) -> Answer:
    """DeleteTopics.

    Behaviour: the records are gone when the answer is sent, and so are committed offsets of the topic.
    Version notes: v6 topics by name or id, in another array.
    """
    body = request.body
    if request.version >= 6:
        return {
            "responses": [
                _delete(
                    node,
                    item.name,
                    node.topics.get(item.name) if item.name is not None else node.topics.by_id(item.topic_id),
                    item.topic_id,
                )
                for item in body.topics
            ]
        }
    return {"responses": [_delete(node, name, node.topics.get(name), None) for name in body.topic_names]}


def _check_assignments(topic: Topic, item: Any) -> None:
    """Raise `TopicError` unless each added partition is assigned to this node alone."""
    added = item.count - len(topic.partitions)
    if len(item.assignments) != added:
        raise TopicError(
            ErrorCode.INVALID_REPLICA_ASSIGNMENT,
            f"Attempted to add {added} additional partition(s), but only {len(item.assignments)} assignment(s) "
            "were specified.",
        )
    if any(tuple(assignment.broker_ids) != (NODE_ID,) for assignment in item.assignments):
        raise TopicError(
            ErrorCode.INVALID_REPLICA_ASSIGNMENT, f"The only broker is {NODE_ID}: assign each partition to it alone."
        )


def _extend(node: Node, item: Any, *, validate_only: bool) -> None:
    topic = node.topics.get(item.name)
    if topic is None:
        raise TopicError(ErrorCode.UNKNOWN_TOPIC_OR_PARTITION, f"There is no topic {item.name!r}.")
    if topic.info.internal:
        raise TopicError(ErrorCode.INVALID_PARTITIONS, f"{item.name} is the broker's own topic.")
    node.topics.check_more_partitions(topic, item.count)
    if item.assignments is not None:
        _check_assignments(topic, item)
    if not validate_only:
        node.topics.add_partitions(topic, item.count)


def create_partitions(node: Node, request: Request) -> Answer:
    """CreatePartitions.

    Behaviour: a topic only grows; given assignments must name this node alone. A topic that stands twice in a request
    is refused (42). validateOnly changes nothing. The broker's own topics stay as they are (37).
    """
    body = request.body
    names = [item.name for item in body.topics]
    results: dict[str, Fields] = {}
    for item in body.topics:
        results[item.name] = {"name": item.name, "error_code": ErrorCode.NONE, "error_message": None}
        try:
            if names.count(item.name) > 1:
                raise TopicError(ErrorCode.INVALID_REQUEST, "Duplicate topic name.")
            _extend(node, item, validate_only=body.validate_only)
        except TopicError as error:
            results[item.name] |= {"error_code": error.code, "error_message": str(error)}
    return {"results": list(results.values())}


def describe_topic_partitions(node: Node, request: Request) -> Answer:
    """DescribeTopicPartitions (KIP-966).

    Behaviour: topics in order of their names, at most ResponsePartitionLimit partitions, then a cursor to go on with.
    A cursor at a topic that is not asked for is refused (42).
    """
    body = request.body
    room = max(1, min(body.response_partition_limit, 2000))
    after = ("", 0) if body.cursor is None else (body.cursor.topic_name, body.cursor.partition_index)
    names = sorted({item.name for item in body.topics} or set(_visible(node, request)))
    unknown: Fields = {
        "topic_id": None,
        "is_internal": False,
        "partitions": [],
        "topic_authorized_operations": _UNKNOWN_OPERATIONS,
    }
    if body.cursor is not None and body.topics and (after[0] not in names or after[1] < 0):
        code = ErrorCode.INVALID_REQUEST
        return {"topics": [unknown | {"name": name, "error_code": code} for name in names], "next_cursor": None}
    topics: list[Fields] = []
    cursor: Fields | None = None
    for name in names:
        if name < after[0]:
            continue
        topic = node.topics.get(name)
        operations = authorized_operations(node, request, Resource.TOPIC, name)
        if topic is None:
            found = {"name": name, "error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION}
            topics.append(unknown | found | {"topic_authorized_operations": operations})
            continue
        first = after[1] if name == after[0] else 0
        shown = range(first, min(len(topic.partitions), first + room))
        topics.append(
            {
                "name": name,
                "error_code": 0,
                "topic_id": topic.info.topic_id,
                "is_internal": topic.info.internal,
                "partitions": [_described(index) for index in shown],
                "topic_authorized_operations": operations,
            }
        )
        room -= len(shown)
        if shown.stop < len(topic.partitions):
            cursor = {"topic_name": name, "partition_index": shown.stop}
            break
        if room == 0 and name != names[-1]:
            cursor = {"topic_name": names[names.index(name) + 1], "partition_index": 0}
            break
    return {"topics": topics, "next_cursor": cursor}


def _visible(node: Node, request: Request) -> Iterator[str]:
    for topic in node.topics:
        if not node.denies(request, Operation.DESCRIBE, Resource.TOPIC, topic.info.name):
            yield topic.info.name


def _described(index: int) -> Fields:
    return partition_fields(index) | {"eligible_leader_replicas": [], "last_known_elr": []}


APIS = (
    Api(19, 2, 7, create_topics),
    Api(20, 1, 6, delete_topics),
    Api(37, 0, 3, create_partitions),
    Api(75, 0, 0, describe_topic_partitions),
)
