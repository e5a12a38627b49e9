"""APIs of consumer groups: membership, committed offsets, offsets in transactions, and looking at groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semel.broker.apis.transactions import OFFSETS_PARTITION
from semel.broker.exchange import Answer, Api, Fields, Later, Request
from semel.broker.security.acls import Operation, Resource
from semel.broker.security.guard import authorized_operations
from semel.coordinator.group import (
    FetchedOffset,
    GroupDescription,
    JoinAnswer,
    JoinRequest,
    LeavingMember,
    OffsetCommit,
    OffsetWrite,
    SyncAnswer,
)
from semel.errors import ErrorCode
from semel.log.log import LogError
from semel.types import GroupMetadata, TopicPartition
from semel.wire.messages import to_ms

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]


# --- Membership ---


def join_group(node: Node, request: Request) -> Answer | Later:
    """JoinGroup.

    Behaviour: the answer comes when every member has joined, or at the rebalance deadline.
    Version notes: v1 RebalanceTimeoutMs (before: the session timeout); v4 a new member gets its id with error 79 and
    comes back with it; v5 static members; v7 ProtocolType and a null ProtocolName; v9 SkipAssignment.
    """
    body = request.body
    session_ms = to_ms(body.session_timeout)
    join = JoinRequest(
        group_id=body.group_id,
        member_id=body.member_id,
        group_instance_id=getattr(body, "group_instance_id", None),
        client_id=request.header.client_id or "",
        client_host=f"/{request.peer.client_host}",
        protocol_type=body.protocol_type,
        protocols=tuple((item.name, item.metadata) for item in body.protocols),
        session_timeout_ms=session_ms,
        rebalance_timeout_ms=to_ms(body.rebalance_timeout) if request.version >= 1 else session_ms,
        api_version=request.version,
    )

    def render(answer: JoinAnswer | SyncAnswer) -> Fields:
        assert isinstance(answer, JoinAnswer)
        name = answer.protocol_name
        return {
            "error_code": answer.error,
            "generation_id": answer.generation_id,
            "protocol_type": answer.protocol_type,
            "protocol_name": name if name is not None or request.version >= 7 else "",
            "leader": answer.leader,
            "skip_assignment": answer.skip_assignment,
            "member_id": answer.member_id,
            "members": [
                {
                    "member_id": item.member_id,
                    "group_instance_id": item.group_instance_id,
                    "metadata": item.subscription,
                }
                for item in answer.members
            ],
        }

    return node.groups.join(request, join, render)


def sync_group(node: Node, request: Request) -> Answer | Later:
    """SyncGroup.

    Behaviour: the leader's request brings everybody's assignment; the others wait for it.
    Version notes: v3 static members; v5 protocol type and name must be there, and are compared.
    """
    body = request.body
    if request.version >= 5 and not (body.protocol_type and body.protocol_name):
        return {"error_code": ErrorCode.INCONSISTENT_GROUP_PROTOCOL, "assignment": b""}

    def render(answer: JoinAnswer | SyncAnswer) -> Fields:
        assert isinstance(answer, SyncAnswer)
        return {
            "error_code": answer.error,
            "protocol_type": answer.protocol_type,
            "protocol_name": answer.protocol_name,
            "assignment": answer.assignment,
        }

    return node.groups.sync(
        request,
        _identity(body),
        {item.member_id: item.assignment for item in body.assignments},
        getattr(body, "protocol_type", None),
        getattr(body, "protocol_name", None),
        render,
    )


def _identity(body: Any) -> GroupMetadata:
    """Who asks. OffsetCommit has another name for the generation; TxnOffsetCommit below v3 says nothing."""
    generation: int = body.generation_id if hasattr(body, "generation_id") else _committing_generation(body)
    return GroupMetadata(
        body.group_id, generation, getattr(body, "member_id", ""), getattr(body, "group_instance_id", None)
    )


def _committing_generation(body: Any) -> int:
    return getattr(body, "generation_id_or_member_epoch", -1)


def heartbeat(node: Node, request: Request) -> Answer:
    """Heartbeat.

    Behaviour: 27 asks the member to join again.
    Version notes: v3 static members.
    """
    return {"error_code": node.groups.coordinator.heartbeat(_identity(request.body), node.groups.now_ms())}


def leave_group(node: Node, request: Request) -> Answer:
    """LeaveGroup.

    Behaviour: each member leaves or fails by itself.
    Version notes: v3 several members, by instance id too; before, the one member's error is the answer's.
    """
    body = request.body
    if request.version < 3:
        leaving = [LeavingMember(body.member_id)]
    else:
        leaving = [LeavingMember(item.member_id, item.group_instance_id) for item in body.members]
    errors = node.groups.coordinator.leave(body.group_id, leaving, node.groups.now_ms())
    node.groups.settle(node.groups.now_ms())
    if request.version < 3:
        return {"error_code": errors[0]}
    return {
        "error_code": ErrorCode.NONE,
        "members": [
            {"member_id": item.member_id, "group_instance_id": item.group_instance_id, "error_code": code}
            for item, code in zip(leaving, errors, strict=True)
        ],
    }


# --- Offsets ---


def _asked_topic(node: Node, asked: Any) -> tuple[Fields, str | None]:
    """How a request names a topic, for the answer to name it in the same way; and its name, None for an unknown id."""
    if hasattr(asked, "name"):
        return {"name": asked.name}, asked.name
    topic = node.topics.by_id(asked.topic_id)
    return {"topic_id": asked.topic_id}, None if topic is None else topic.info.name


class _Commit:
    """The partitions of a commit request: those that exist, and the errors of the others."""

    def __init__(self, node: Node, body: Any) -> None:
        self.topics: list[tuple[Fields, list[tuple[int, TopicPartition | None]]]] = []
        self.offsets: dict[TopicPartition, OffsetCommit] = {}
        self.errors: dict[TopicPartition, ErrorCode] = {}
        for topic in body.topics:
            key, name = _asked_topic(node, topic)
            items: list[tuple[int, TopicPartition | None]] = []
            for item in topic.partitions:
                partition = None if name is None else TopicPartition(name, item.partition_index)
                items.append((item.partition_index, partition))
                if partition is not None:
                    self._take(node, partition, item)
            self.topics.append((key, items))

    def _take(self, node: Node, partition: TopicPartition, item: Any) -> None:
        if node.topics.partition(*partition) is None:
            self.errors[partition] = ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
            return
        self.offsets[partition] = OffsetCommit(
            item.committed_offset, getattr(item, "committed_leader_epoch", -1), item.committed_metadata or ""
        )

    def written(self, node: Node, write: OffsetWrite) -> Answer:
        """The answer when the coordinator's decision is durable, or cannot become so."""
        try:
            node.groups.write(write, node.groups.now_ms())
        except LogError as error:
            return self.refuse(error.code)
        self.errors |= write.errors
        return self.answer()

    def refuse(self, code: ErrorCode) -> Answer:
        """The answer when no partition is committed."""
        self.errors = dict.fromkeys(self.offsets, code) | self.errors
        return self.answer()

    def answer(self) -> Answer:
        return {
            "topics": [
                key
                | {
                    "partitions": [
                        {
                            "partition_index": index,
                            "error_code": ErrorCode.UNKNOWN_TOPIC_ID if partition is None else self.errors[partition],
                        }
                        for index, partition in items
                    ]
                }
                for key, items in self.topics
            ]
        }


def offset_commit(node: Node, request: Request) -> Answer:
    """OffsetCommit.

    Behaviour: durable when answered. Unknown partitions fail by themselves with 3.
    Version notes: v6 leader epoch; v7 static members; v9 unknown group with a generation: 69 instead of 22, and members
    of consumer groups (before: 35; another epoch: 113); v10 topics by id (unknown: 100).
    """
    commit = _Commit(node, request.body)
    if not commit.offsets:
        return commit.answer()  # Else a group would come into being for nothing.
    return commit.written(
        node,
        node.groups.coordinator.commit_offsets(
            _identity(request.body), commit.offsets, node.groups.now_ms(), request.version
        ),
    )


def txn_offset_commit(node: Node, request: Request) -> Answer:
    """TxnOffsetCommit (KIP-98, KIP-447).

    Behaviour: staged until the transaction ends. Who may commit is checked here, in the same step as the write.
    Version notes: v3 member, generation and instance are compared; v4 may answer 120; v5 adds the offsets partition to
    the transaction itself, also when every partition that exists then fails.
    """
    body = request.body
    commit = _Commit(node, body)
    if not commit.offsets:
        return commit.answer()  # Nothing that could be in a transaction: it is not even begun.
    produce_version = {4: 11, 5: 12}.get(request.version, 10)
    identity = (body.transactional_id, body.producer_id, body.producer_epoch)
    code = ErrorCode.NONE
    if request.version >= 5:
        code = node.transactions.add_partitions(
            *identity, [OFFSETS_PARTITION], request.now_ms, api_version=request.version, implicit=True
        )
    if code is ErrorCode.NONE:
        code = node.transactions.coordinator.check_produce(*identity, OFFSETS_PARTITION, produce_version)
    if code is ErrorCode.NOT_ENOUGH_REPLICAS:
        code = ErrorCode.CONCURRENT_TRANSACTIONS  # The word of this API for "the last transaction is still ending".
    if code is not ErrorCode.NONE:
        return commit.refuse(code)
    return commit.written(
        node,
        node.groups.coordinator.commit_transactional_offsets(
            _identity(body), body.producer_id, commit.offsets, node.groups.now_ms()
        ),
    )


def _fetched(index: int, found: FetchedOffset) -> Fields:
    return {
        "partition_index": index,
        "committed_offset": found.offset,
        "committed_leader_epoch": found.leader_epoch,
        "metadata": found.metadata,
        "error_code": found.error,
    }


def _fetch_group(node: Node, request: Request, item: Any) -> Fields:
    group_id, topics = item.group_id, item.topics
    if node.denies(request, Operation.DESCRIBE, Resource.GROUP, group_id):
        code = ErrorCode.GROUP_AUTHORIZATION_FAILED
        refused = FetchedOffset(code)  # Version 1 has no other place for it.
        named = [] if request.version >= 2 else topics
        answers = [
            {"name": item.name, "partitions": [_fetched(index, refused) for index in item.partition_indexes]}
            for item in named
        ]
        return {"topics": answers, "error_code": code}
    if hasattr(item, "member_epoch"):
        code = node.groups.coordinator.consumers.check_fetch(group_id, item.member_id, item.member_epoch)
        if code is not ErrorCode.NONE:
            return {"topics": [], "error_code": code}
    require_stable = getattr(request.body, "require_stable", False)
    fetch = node.groups.coordinator.fetch_offsets
    answers = []
    if topics is None:
        found = fetch(group_id, None, require_stable=require_stable)
        last = None
        for partition, value in found.items():
            if node.denies(request, Operation.DESCRIBE, Resource.TOPIC, partition.topic):
                continue
            topic = node.topics.get(partition.topic)
            if partition.topic != last:
                last = partition.topic
                by_id = {"topic_id": None if topic is None else topic.info.topic_id}
                answers.append((by_id if request.version >= 10 else {"name": last}) | {"partitions": []})
            answers[-1]["partitions"].append(_fetched(partition.partition, value))
        return {"topics": answers, "error_code": ErrorCode.NONE}
    for asked in topics:
        key, name = _asked_topic(node, asked)
        values: dict[TopicPartition, FetchedOffset] = {}
        unknown = FetchedOffset(ErrorCode.UNKNOWN_TOPIC_ID)
        if name is not None and node.denies(request, Operation.DESCRIBE, Resource.TOPIC, name):
            name, unknown = None, FetchedOffset(ErrorCode.TOPIC_AUTHORIZATION_FAILED)
        if name is not None:
            wanted = [TopicPartition(name, index) for index in asked.partition_indexes]
            values = fetch(group_id, wanted, require_stable=require_stable)
        answers.append(
            key
            | {
                "partitions": [
                    _fetched(index, unknown if name is None else values[TopicPartition(name, index)])
                    for index in asked.partition_indexes
                ]
            }
        )
    return {"topics": answers, "error_code": ErrorCode.NONE}


def offset_fetch(node: Node, request: Request) -> Answer:
    """OffsetFetch.

    Behaviour: a partition without an offset, and an unknown group, give -1 without an error.
    Version notes: v2 null topics means all; v5 leader epoch; v7 RequireStable (offset in an open transaction: 88); v8
    several groups; v9 the member epoch is compared (25, 113); v10 topics by id (unknown: 100).
    """
    body = request.body
    if request.version < 8:
        return _fetch_group(node, request, body)
    return {"groups": [{"group_id": item.group_id} | _fetch_group(node, request, item) for item in body.groups]}


# --- Looking at groups ---


def list_groups(node: Node, request: Request) -> Answer:
    """ListGroups.

    Version notes: v4 filter by state; v5 filter by type (classic, consumer).
    """
    body = request.body
    found = node.groups.coordinator.list_groups(getattr(body, "states_filter", ()), getattr(body, "types_filter", ()))
    return {
        "error_code": ErrorCode.NONE,
        "groups": [
            {
                "group_id": item.group_id,
                "protocol_type": item.protocol_type,
                "group_state": item.state,
                "group_type": item.group_type,
            }
            for item in found
        ],
    }


def _described(found: GroupDescription, version: int) -> Fields:
    unknown = found.error is ErrorCode.GROUP_ID_NOT_FOUND
    return {
        "error_code": ErrorCode.NONE if unknown and version < 6 else found.error,
        "error_message": found.message or None,
        "group_id": found.group_id,
        "group_state": found.state,
        "protocol_type": found.protocol_type,
        "protocol_data": found.protocol,
        "members": [
            {
                "member_id": member.member_id,
                "group_instance_id": member.group_instance_id,
                "client_id": member.client_id,
                "client_host": member.client_host,
                "member_metadata": member.subscription(found.protocol),
                "member_assignment": member.assignment,
            }
            for member in found.members
        ],
    }


def describe_groups(node: Node, request: Request) -> Answer:
    """DescribeGroups.

    Behaviour: subscriptions are shown while the group is stable.
    Version notes: v6 an unknown group is 69; before, it is Dead without an error.
    """
    coordinator = node.groups.coordinator
    groups = [_described(coordinator.describe(group_id), request.version) for group_id in request.body.groups]
    if getattr(request.body, "include_authorized_operations", False):
        for group in groups:
            group["authorized_operations"] = authorized_operations(node, request, Resource.GROUP, group["group_id"])
    return {"groups": groups}


def delete_groups(node: Node, request: Request) -> Answer:
    """DeleteGroups.

    Behaviour: only empty groups; their offsets go too, pending ones included.
    """
    results = [
        {"group_id": group_id, "error_code": node.groups.coordinator.delete_group(group_id)}
        for group_id in request.body.groups_names
    ]
    node.groups.settle(node.groups.now_ms())
    return {"results": results}


def offset_delete(node: Node, request: Request) -> Answer:
    """OffsetDelete (KIP-496).

    Behaviour: removes committed offsets; those of topics to which the group is subscribed stay (86), unknown partitions
    fail by themselves (3). A group of another kind than consumers must be empty (68).
    """
    body = request.body
    asked = [TopicPartition(topic.name, item.partition_index) for topic in body.topics for item in topic.partitions]
    known = [partition for partition in asked if node.topics.partition(*partition) is not None]
    error, errors = node.groups.coordinator.delete_offsets(body.group_id, known)
    node.groups.settle(node.groups.now_ms())
    if error is not ErrorCode.NONE:
        return {"error_code": error, "topics": []}
    return {
        "error_code": ErrorCode.NONE,
        "topics": [
            {
                "name": topic.name,
                "partitions": [
                    {
                        "partition_index": item.partition_index,
                        "error_code": errors.get(
                            TopicPartition(topic.name, item.partition_index), ErrorCode.UNKNOWN_TOPIC_OR_PARTITION
                        ),
                    }
                    for item in topic.partitions
                ],
            }
            for topic in body.topics
        ],
    }


APIS = (
    Api(8, 2, 10, offset_commit),
    Api(9, 1, 10, offset_fetch),
    Api(11, 0, 9, join_group),
    Api(12, 0, 4, heartbeat),
    Api(13, 0, 5, leave_group),
    Api(14, 0, 5, sync_group),
    Api(15, 0, 6, describe_groups),
    Api(16, 0, 5, list_groups),
    Api(28, 0, 5, txn_offset_commit),
    Api(42, 0, 2, delete_groups),
    Api(47, 0, 0, offset_delete),
)
