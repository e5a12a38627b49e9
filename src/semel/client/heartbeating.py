"""One member of a consumer group of the new protocol (KIP-848) [sans-IO]: the broker shares the partitions out.

A heartbeat says who we are and what we own, its answer what we are to own. What is to be given back is ours until a
heartbeat says that it is not, and what is to be taken over comes only when its former owner has said so; so nobody
stops who has nothing to give back. The owner of the partitions is told by a `View`, as in `client/membership.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from semel.client.membership import GroupRequest, GroupTimes, Member, TopicFacts, refusal
from semel.errors import ErrorCode, Retriable, kafka_error
from semel.types import GroupMetadata, TopicPartition
from semel.wire.messages import to_ms

__all__ = ["HeartbeatMember"]

CONSUMER_GROUP_HEARTBEAT = 68
_JOINING, _LEAVING, _RETURNING = 0, -1, -2
"""Member epochs with a meaning of their own; the last is a static member's that comes back."""
_FORGOTTEN = (ErrorCode.UNKNOWN_MEMBER_ID, ErrorCode.FENCED_MEMBER_EPOCH)


class HeartbeatMember(Member):
    """A member of a group of the new protocol. `member_id` is a new one for each process."""

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        instance_id: str | None,
        times: GroupTimes,
        member_id: str,
        assignor: str | None = None,
    ) -> None:
        super().__init__(group, topics, instance_id, times)
        self.member_id = member_id
        self.epoch = _JOINING
        self._assignor = assignor
        self._is_over = False
        self._beat_at = 0.0
        self._interval = times.heartbeat
        self._told: frozenset[TopicPartition] | None = None
        """What the broker knows that we own; None when it must be told everything."""
        self._target: list[tuple[UUID | None, int]] | None = None
        """An assignment of which we do not know all topics yet."""
        self._look_at = 0.0
        self._names: dict[UUID, str] = {}

    def __repr__(self) -> str:
        return f"<HeartbeatMember of {self.group!r} as {self.member_id!r} in {self.epoch}>"

    def next_request(self, now: float) -> GroupRequest | None:
        """The next heartbeat; None when it is time to wait: until `wake_at`, or for the owner."""
        if self.epoch > _JOINING and self._is_away(now):
            self._over()
        if self.epoch == _JOINING and (not self.is_settled or self._is_away(now)):
            return None
        if now < self._beat_at and not self._has_news:
            return None
        fields: dict[str, Any] = {
            "group_id": self.group,
            "member_id": self.member_id,
            "member_epoch": self.epoch,
            "topic_partitions": None,
        }
        if self._told is None:
            fields |= {
                "instance_id": self.instance_id,
                "rebalance_timeout": round(self.times.poll * 1000),
                "subscribed_topic_names": self.topics,
                "server_assignor": self._assignor,
                "topic_partitions": [] if self.epoch == _JOINING else self._owned_by_id(),
            }
        elif self._has_news:
            fields["topic_partitions"] = self._owned_by_id()
        return GroupRequest(CONSUMER_GROUP_HEARTBEAT, fields, max(1.0, self.times.session / 2))

    @property
    def _has_news(self) -> bool:
        return self.is_settled and self._told is not None and self._told != self._owned

    def wake_at(self) -> float | None:
        """When `next_request` may have something although nothing else happened."""
        if self.epoch == _JOINING and not self.is_settled:
            return None
        return self._beat_at if self._target is None else min(self._beat_at, self._look_at)

    def topics_to_look_up(self, now: float) -> list[str]:
        """Topics whose ids have to be looked up."""
        return self.topics if self._target is not None and now >= self._look_at else []

    def looked_up(self, topics: Mapping[str, TopicFacts], now: float) -> None:
        """The ids of the topics that were asked for. What is unknown then was deleted meanwhile, or is not told yet."""
        self._names |= {facts.topic_id: topic for topic, facts in topics.items() if facts.topic_id is not None}
        self._take_target()
        self._look_at = now + self._interval

    def leave(self) -> GroupRequest | None:
        """A static member keeps its partitions for its next life, as long as a session lasts."""
        if self.epoch <= _JOINING:
            return None
        fields = {
            "group_id": self.group,
            "member_id": self.member_id,
            "instance_id": self.instance_id,
            "member_epoch": _LEAVING if self.instance_id is None else _RETURNING,
            "topic_partitions": None,
        }
        return GroupRequest(CONSUMER_GROUP_HEARTBEAT, fields, 1.0)

    def answered(self, request: GroupRequest, answer: Any, now: float) -> None:
        """Take an answer. Raises `Fenced`, `Retriable` (look for the coordinator again) or `Fatal`."""
        code = answer.error_code
        if code in _FORGOTTEN:
            self._over()
            return
        if code == ErrorCode.UNRELEASED_INSTANCE_ID:
            raise kafka_error(
                code,
                f"instance id {self.instance_id!r} of group {self.group!r} still belongs to its former process",
                "The group lets it go when that one's session is over.",
                Retriable,
            )
        if code != ErrorCode.NONE:
            self._told = None
            raise refusal(code, "ConsumerGroupHeartbeat", self.group, self.instance_id)
        self.member_id = answer.member_id or self.member_id
        self.epoch = answer.member_epoch
        self._interval = to_ms(answer.heartbeat_interval) / 1000
        self._beat_at = now + self._interval
        said = request.fields["topic_partitions"]
        if said is not None:
            self._told = frozenset(
                TopicPartition(self._names[item["topic_id"]], number) for item in said for number in item["partitions"]
            )
        self._show(self.view.wanted, self._metadata)
        if answer.assignment is not None:
            self._target = [
                (item.topic_id, number) for item in answer.assignment.topic_partitions for number in item.partitions
            ]
            self._take_target()

    def unanswered(self) -> None:
        """A heartbeat may have come, or not: the next one says everything again."""
        self._told = None

    def _take_target(self) -> None:
        if self._target is None or any(topic not in self._names for topic, _ in self._target):
            return
        wanted = [TopicPartition(self._names[topic], number) for topic, number in self._target if topic is not None]
        self._target = None
        self._show(wanted, self._metadata)

    def _owned_by_id(self) -> list[dict[str, Any]]:
        """What is ours, as a heartbeat says it. What is being given back is in it; what is being taken over is not."""
        ids = {name: topic_id for topic_id, name in self._names.items()}
        by_topic: dict[UUID, list[int]] = {}
        for at in sorted(self._owned):
            by_topic.setdefault(ids[at.topic], []).append(at.partition)
        return [{"topic_id": topic_id, "partitions": numbers} for topic_id, numbers in by_topic.items()]

    @property
    def _metadata(self) -> GroupMetadata:
        return GroupMetadata(self.group, self.epoch, self.member_id, self.instance_id)

    def _over(self) -> None:
        """The group knows us no more: what we owned may be another member's already."""
        self.epoch = _JOINING
        self._told = self._target = None
        self._beat_at = 0.0
        self._end_life()
