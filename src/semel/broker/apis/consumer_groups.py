"""APIs of consumer groups of the new protocol (KIP-848): the heartbeat that does everything, and looking at groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from uuid import UUID

from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.security.acls import Resource
from semel.broker.security.guard import authorized_operations
from semel.coordinator.assignors import Part
from semel.coordinator.consumer_group import ConsumerGroup, ConsumerMember
from semel.coordinator.heartbeat import HeartbeatRequest
from semel.errors import ErrorCode
from semel.wire.messages import to_ms

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

_NOT_ASKED = -2147483648
_CONSUMER_MEMBER = 1
"""MemberType of a member that speaks the new protocol; there are no others in these groups."""


def _by_topic(parts: Collection[Part]) -> dict[UUID, list[int]]:
    found: dict[UUID, list[int]] = {}
    for topic_id, index in sorted(parts):
        found.setdefault(UUID(bytes=topic_id), []).append(index)
    return found


def _owned(topics: Any) -> frozenset[Part] | None:
    if topics is None:
        return None
    return frozenset(
        (item.topic_id.bytes, index) for item in topics if item.topic_id is not None for index in item.partitions
    )


def consumer_group_heartbeat(node: Node, request: Request) -> Answer:
    """ConsumerGroupHeartbeat (KIP-848).

    Behaviour: epoch 0 joins, -1 leaves, -2 is a static member that will be back. What is not given stays as it was.
    The answer has the assignment for a member that begins, and when it changed; its epoch rises only after it confirmed
    what it had to give up. Durable when answered: 15 when it cannot be written.
    Version notes: v1 SubscribedTopicRegex, and the member chooses its own id.
    """
    body = request.body
    answer = node.groups.heartbeat_consumer(
        HeartbeatRequest(
            group_id=body.group_id,
            member_id=body.member_id,
            member_epoch=body.member_epoch,
            instance_id=body.instance_id,
            rack_id=body.rack_id,
            rebalance_timeout_ms=to_ms(body.rebalance_timeout),
            topics=body.subscribed_topic_names,
            pattern=getattr(body, "subscribed_topic_regex", None),
            assignor=body.server_assignor,
            owned=_owned(body.topic_partitions),
            client_id=request.header.client_id or "",
            client_host=f"/{request.peer.client_host}",
            api_version=request.version,
        ),
        node.groups.now_ms(),
    )
    assignment: Fields | None = None
    if answer.assignment is not None:
        topics = _by_topic(answer.assignment).items()
        assignment = {"topic_partitions": [{"topic_id": topic, "partitions": indexes} for topic, indexes in topics]}
    return {
        "error_code": answer.error,
        "error_message": answer.message,
        "member_id": answer.member_id,
        "member_epoch": answer.member_epoch,
        "heartbeat_interval": answer.heartbeat_interval_ms,
        "assignment": assignment,
    }


def _assignment(node: Node, parts: Collection[Part]) -> Fields:
    topics = []
    for topic_id, indexes in _by_topic(parts).items():
        topic = node.topics.by_id(topic_id)
        if topic is not None:  # One that was deleted is nobody's any more, and has no name.
            topics.append({"topic_id": topic_id, "topic_name": topic.info.name, "partitions": indexes})
    return {"topic_partitions": topics}


def _described_member(node: Node, group: ConsumerGroup, member: ConsumerMember) -> Fields:
    about = member.about
    return {
        "member_id": member.member_id,
        "instance_id": about.instance_id,
        "rack_id": about.rack_id,
        "member_epoch": member.current.epoch,
        "client_id": about.client_id,
        "client_host": about.client_host,
        "subscribed_topic_names": about.topics,
        "subscribed_topic_regex": about.pattern or "",
        "assignment": _assignment(node, member.current.held),
        "target_assignment": _assignment(node, group.target.get(member.member_id, frozenset())),
        "member_type": _CONSUMER_MEMBER,
    }


def _described(node: Node, request: Request, group_id: str) -> Fields:
    answer: Fields = {
        "group_id": group_id,
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "group_state": "",
        "group_epoch": 0,
        "assignment_epoch": 0,
        "assignor_name": "",
        "members": [],
        "authorized_operations": _NOT_ASKED,
    }
    group = node.groups.coordinator.consumers.groups.get(group_id)
    if group is None:
        classic = node.groups.coordinator.describe(group_id).error is ErrorCode.NONE
        text = f"Group {group_id} is not a consumer group." if classic else f"Group {group_id} not found."
        return answer | {"error_code": ErrorCode.GROUP_ID_NOT_FOUND, "error_message": text}
    if request.body.include_authorized_operations:
        answer["authorized_operations"] = authorized_operations(node, request, Resource.GROUP, group_id)
    return answer | {
        "group_state": group.state,
        "group_epoch": group.epoch,
        "assignment_epoch": group.target_epoch,
        "assignor_name": group.assignor,
        "members": [_described_member(node, group, member) for member in group.members.values()],
    }


def consumer_group_describe(node: Node, request: Request) -> Answer:
    """ConsumerGroupDescribe (KIP-848).

    Behaviour: epochs, members, what each has and shall have. A classic group, like an unknown one, is 69.
    Version notes: v1 MemberType.
    """
    return {"groups": [_described(node, request, group_id) for group_id in request.body.group_ids]}


APIS = (
    Api(68, 0, 1, consumer_group_heartbeat),
    Api(69, 0, 1, consumer_group_describe),
)
