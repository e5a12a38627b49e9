"""APIs about the cluster: which versions are spoken, which topics there are, who coordinates what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semel.broker.config import LEADER_EPOCH, NODE_ID
from semel.broker.exchange import Answer, Api, Fields, Parts, Request
from semel.broker.security.acls import CLUSTER_NAME, Operation, Resource
from semel.broker.security.guard import authorized_operations
from semel.broker.topics import Topic, TopicError
from semel.errors import ErrorCode
from semel.wire.messages import encode_response

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS", "partition_fields"]


def api_versions(node: Node, request: Request) -> Answer:
    """ApiVersions.

    Behaviour: never closes the connection. Finalized features come from the configuration: a client chooses
    transactions V2 by transaction.version >= 2, never by version ranges. group.version 1 says that there are
    consumer groups of the new protocol (KIP-848).
    Version notes: a version we do not know is answered with a v0 body and error 35 that lists only ApiVersions itself.
    Below v4 a feature's minimum of 0 is sent as 1 (KAFKA-17011).
    """
    # Here and not above, because the table imports this module.
    from semel.broker.apis import APIS as ALL

    if not 0 <= request.version <= 4:
        known: list[Fields] = [{"api_key": 18, "min_version": 0, "max_version": 4}]
        body: Fields = {"error_code": ErrorCode.UNSUPPORTED_VERSION, "api_keys": known}
        parts: Parts = [encode_response(18, 0, request.header.correlation_id, **body)]
        return parts
    keys = [
        {
            "api_key": api.key,
            "min_version": api.min_version if api.advertised_min is None else api.advertised_min,
            "max_version": api.max_version,
        }
        for api in sorted(ALL.values())
    ]
    lowest = 0 if request.version >= 4 else 1
    levels = {"group.version": (1, 1), "transaction.version": (2, node.config.transaction_version)}
    return {
        "error_code": 0,
        "api_keys": keys,
        "supported_features": [
            {"name": name, "min_version": lowest, "max_version": newest} for name, (newest, _) in levels.items()
        ],
        "finalized_features_epoch": 1,
        "finalized_features": [
            {"name": name, "max_version_level": level, "min_version_level": level}
            for name, (_, level) in levels.items()
        ],
    }


def partition_fields(index: int) -> Fields:
    """A partition in Metadata and DescribeTopicPartitions: one replica, here."""
    return {
        "error_code": 0,
        "partition_index": index,
        "leader_id": NODE_ID,
        "leader_epoch": LEADER_EPOCH,
        "replica_nodes": [NODE_ID],
        "isr_nodes": [NODE_ID],
        "offline_replicas": [],
    }


_BY_ID_VERSION = 12
"""From this version on Metadata takes a topic's id in place of its name."""
_NOT_ASKED = -2147483648
"""Authorized operations that the client did not ask for (KIP-430)."""


def _topic_fields(node: Node, request: Request, topic: Topic) -> Fields:
    operations = _NOT_ASKED
    if getattr(request.body, "include_topic_authorized_operations", False):
        operations = authorized_operations(node, request, Resource.TOPIC, topic.info.name)
    return {
        "topic_authorized_operations": operations,
        "error_code": 0,
        "name": topic.info.name,
        "topic_id": topic.info.topic_id,
        "is_internal": topic.info.internal,
        "partitions": [partition_fields(index) for index in range(len(topic.partitions))],
    }


def _cluster_operations(node: Node, request: Request) -> int:
    """What the client may do to the cluster; 0 if it may not even look at it."""
    if not getattr(request.body, "include_cluster_authorized_operations", False):
        return _NOT_ASKED
    if node.denies(request, Operation.DESCRIBE, Resource.CLUSTER, CLUSTER_NAME):
        return 0
    return authorized_operations(node, request, Resource.CLUSTER, CLUSTER_NAME)


def _is_hidden(node: Node, request: Request, name: str) -> bool:
    return node.denies(request, Operation.DESCRIBE, Resource.TOPIC, name)


def _may_create(node: Node, request: Request, name: str) -> bool:
    return not (
        node.denies(request, Operation.CREATE, Resource.CLUSTER, CLUSTER_NAME)
        and node.denies(request, Operation.CREATE, Resource.TOPIC, name)
    )


def _asked_topic(node: Node, request: Request, item: Any, auto_create: bool) -> Fields:
    topic_id = getattr(item, "topic_id", None)
    failed: Fields = {"name": item.name, "topic_id": topic_id, "is_internal": False, "partitions": []}
    if item.name is None and request.version < _BY_ID_VERSION:
        return failed | {"name": "", "error_code": ErrorCode.INVALID_REQUEST}
    if item.name is None:
        found = node.topics.by_id(topic_id)
        if found is None or _is_hidden(node, request, found.info.name):
            return failed | {"error_code": ErrorCode.UNKNOWN_TOPIC_ID}
        return _topic_fields(node, request, found)
    if _is_hidden(node, request, item.name):
        return failed | {"topic_id": None, "error_code": ErrorCode.TOPIC_AUTHORIZATION_FAILED}
    topic = node.topics.get(item.name)
    if topic is not None:
        return _topic_fields(node, request, topic)
    try:
        if not (auto_create and node.config.auto_create_topics):
            node.topics.check_new(item.name, node.config.num_partitions, {})
            return failed | {"error_code": ErrorCode.UNKNOWN_TOPIC_OR_PARTITION}
        if not _may_create(node, request, item.name):
            return failed | {"topic_id": None, "error_code": ErrorCode.TOPIC_AUTHORIZATION_FAILED}
        return _topic_fields(node, request, node.topics.create(item.name, node.config.num_partitions, {}))
    except TopicError as error:
        return failed | {"error_code": error.code}


def metadata(node: Node, request: Request) -> Answer:
    """Metadata.

    Behaviour: an unknown topic is created where both the client and the configuration allow it, and is usable at once.
    A topic that the client may not describe is left out; asked for by name it is 29, by id 100.
    Version notes: topics null means all, an empty list none (v0: empty means all); v4 AllowAutoTopicCreation;
    v8-10 authorized operations; v10 topic ids in the answer; v12 topics asked for by id (unknown: 100).
    """
    body = request.body
    everything = body.topics is None or (request.version == 0 and not body.topics)
    if everything:
        topics = [
            _topic_fields(node, request, topic)
            for topic in node.topics
            if not _is_hidden(node, request, topic.info.name)
        ]
    else:
        auto_create = getattr(body, "allow_auto_topic_creation", True)
        topics = [_asked_topic(node, request, item, auto_create) for item in body.topics]
    host, port = request.peer.host, request.peer.port
    return {
        "brokers": [{"node_id": NODE_ID, "host": host, "port": port, "rack": None}],
        "cluster_id": node.metadata.cluster_id,
        "controller_id": NODE_ID,
        "topics": topics,
        "cluster_authorized_operations": _cluster_operations(node, request),
        "error_code": 0,
    }


def describe_cluster(node: Node, request: Request) -> Answer:
    """DescribeCluster.

    Behaviour: the one node, which is its own controller.
    Version notes: v1 EndpointType: 2 (controllers) is refused as on a broker listener; v2 IsFenced.
    """
    host, port = request.peer.host, request.peer.port
    kind = getattr(request.body, "endpoint_type", 1)
    answer: Fields = {"endpoint_type": kind, "cluster_id": node.metadata.cluster_id, "controller_id": NODE_ID}
    if kind != 1:
        return answer | {
            "error_code": ErrorCode.MISMATCHED_ENDPOINT_TYPE if kind == 2 else ErrorCode.UNSUPPORTED_ENDPOINT_TYPE,
            "error_message": "This is a broker's listener: ask for endpoint type 1.",
            "endpoint_type": 1,
            "controller_id": -1,
            "brokers": [],
        }
    return answer | {
        "error_code": 0,
        "error_message": None,
        "cluster_authorized_operations": _cluster_operations(node, request),
        "brokers": [{"broker_id": NODE_ID, "host": host, "port": port, "rack": None, "is_fenced": False}],
    }


_COORDINATED = {
    0: (Resource.GROUP, ErrorCode.GROUP_AUTHORIZATION_FAILED),
    1: (Resource.TRANSACTIONAL_ID, ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED),
}


def find_coordinator(node: Node, request: Request) -> Answer:
    """FindCoordinator.

    Behaviour: this node coordinates every group (type 0) and transactional id (type 1); other types: 42.
    Version notes: v1 KeyType; v4 several keys in a request and the coordinators as a list.
    """
    body = request.body
    host, port = request.peer.host, request.peer.port
    guarded = _COORDINATED.get(getattr(body, "key_type", 0))

    def coordinator(key: str) -> Fields:
        if guarded is None:
            return {"error_code": ErrorCode.INVALID_REQUEST, "error_message": "This coordinator type is not supported."}
        resource, code = guarded
        if node.denies(request, Operation.DESCRIBE, resource, key):
            return {"error_code": code, "error_message": None}
        return {"error_code": ErrorCode.NONE, "error_message": None, "node_id": NODE_ID, "host": host, "port": port}

    nowhere: Fields = {"node_id": -1, "host": "", "port": -1}
    if request.version >= 4:
        return {"coordinators": [nowhere | {"key": key} | coordinator(key) for key in body.coordinator_keys]}
    return nowhere | coordinator(body.key)


APIS = (
    Api(3, 0, 13, metadata),
    Api(10, 0, 6, find_coordinator),
    Api(18, 0, 4, api_versions),
    Api(60, 0, 2, describe_cluster),
)
