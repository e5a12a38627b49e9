"""One member of a consumer group [sans-IO]: what it asks the coordinator next, and what the answers mean.

The classic protocol as `semel.client.consumer` uses it: eager, range, static where there is an instance id (KIP-345).
A shell sends the requests, keeps the time, and tells the owner of the partitions what changed:

    UNJOINED --join--> JOINED --sync--> STABLE --"rebalance" or "lost"--> UNJOINED; FENCED is the end.

Before it joins again, the shell has the owner give its partitions back (`Change.REVOKED`) or lets him know that they
are someone else's already (`Change.LOST`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

from semel.coordinator.assignors import Subscriber, range_assignment
from semel.coordinator.fields import FieldReader, FieldWriter
from semel.errors import ErrorCode, Fatal, Fenced, Retriable, kafka_error
from semel.types import GroupMetadata, TopicPartition

__all__ = ["HEARTBEAT", "JOIN_GROUP", "LEAVE_GROUP", "SYNC_GROUP", "Change", "Membership", "State"]

JOIN_GROUP, HEARTBEAT, LEAVE_GROUP, SYNC_GROUP = 11, 12, 13, 14
_PROTOCOL_TYPE, _PROTOCOL = "consumer", "range"
_FORGOTTEN = (ErrorCode.UNKNOWN_MEMBER_ID, ErrorCode.ILLEGAL_GENERATION)


class State(Enum):
    UNJOINED = auto()
    JOINED = auto()
    STABLE = auto()
    FENCED = auto()


class Change(Enum):
    """What the owner of the partitions has to be told before the member goes on."""

    NOTHING = auto()
    REVOKED = auto()
    """The group is rebalancing and still knows us: finish, then give everything back."""
    LOST = auto()
    """The group knows us no more."""


class _Joined(NamedTuple):
    member_id: str
    instance_id: str | None
    topics: frozenset[bytes]


class Membership:
    """The member's side of one group. Times are milliseconds."""

    def __init__(
        self, group: str, topics: Sequence[str], instance_id: str | None, session_timeout_ms: int, rebalance_ms: int
    ) -> None:
        self.group = group
        self.topics = list(topics)
        self.instance_id = instance_id
        self.session_timeout_ms = session_timeout_ms
        self.rebalance_timeout_ms = rebalance_ms
        self.state = State.UNJOINED
        self.member_id = ""
        self.generation = -1
        self._is_leader = False
        self._members: list[_Joined] = []

    def __repr__(self) -> str:
        return f"<Membership of {self.group!r} as {self.member_id!r} in {self.generation} [{self.state.name}]>"

    @property
    def metadata(self) -> GroupMetadata:
        """Who we are, for TxnOffsetCommit. Raises `Retriable` while we are no member."""
        if self.state not in (State.JOINED, State.STABLE):
            raise Retriable(f"no member of group {self.group!r} now")
        return GroupMetadata(self.group, self.generation, self.member_id, self.instance_id)

    # --- JoinGroup and SyncGroup ---

    def join_request(self) -> dict[str, Any]:
        subscription = FieldWriter().int16(0).int32(len(self.topics))
        for topic in self.topics:
            subscription.string(topic)
        return {
            "group_id": self.group,
            "session_timeout": self.session_timeout_ms,
            "rebalance_timeout": self.rebalance_timeout_ms,
            "member_id": self.member_id,
            "group_instance_id": self.instance_id,
            "protocol_type": _PROTOCOL_TYPE,
            "protocols": [{"name": _PROTOCOL, "metadata": subscription.int32(-1).done()}],
            "reason": None,
        }

    def joined(self, answer: Any) -> bool:
        """Whether we are in the next generation; else the join is to be sent again. Raises what `_refuse` raises."""
        code = answer.error_code
        if code == ErrorCode.MEMBER_ID_REQUIRED:
            self.member_id = answer.member_id
            return False
        if code in _FORGOTTEN:
            self.member_id = ""
            return False
        if code != ErrorCode.NONE:
            self._refuse(code, "JoinGroup")
        self.member_id, self.generation = answer.member_id, answer.generation_id
        self._is_leader = answer.leader == self.member_id and not answer.skip_assignment
        self._members = [
            _Joined(item.member_id, item.group_instance_id, _subscribed(item.metadata)) for item in answer.members
        ]
        self.state = State.JOINED
        return True

    @property
    def wanted_topics(self) -> set[str]:
        """Topics whose number of partitions the leader has to know before it syncs; none for the others."""
        return {topic.decode() for member in self._members for topic in member.topics} if self._is_leader else set()

    def sync_request(self, partitions: Mapping[str, int]) -> dict[str, Any]:
        shares = []
        if self._is_leader:
            members = {item.member_id: Subscriber(item.topics, frozenset(), item.instance_id) for item in self._members}
            counts = {topic.encode(): count for topic, count in sorted(partitions.items())}
            target = range_assignment(members, counts)
            shares = [{"member_id": name, "assignment": _assignment(parts)} for name, parts in sorted(target.items())]
        return {
            "group_id": self.group,
            "generation_id": self.generation,
            "member_id": self.member_id,
            "group_instance_id": self.instance_id,
            "protocol_type": _PROTOCOL_TYPE,
            "protocol_name": _PROTOCOL,
            "assignments": shares,
        }

    def synced(self, answer: Any) -> list[TopicPartition] | None:
        """What is ours from now on; None when we have to join again."""
        code = answer.error_code
        if code == ErrorCode.REBALANCE_IN_PROGRESS:
            self.state = State.UNJOINED
            return None
        if code in _FORGOTTEN:
            self.over()
            return None
        if code != ErrorCode.NONE:
            self._refuse(code, "SyncGroup")
        self.state = State.STABLE
        return _partitions(answer.assignment)

    # --- Staying ---

    def heartbeat_request(self) -> dict[str, Any]:
        return {
            "group_id": self.group,
            "generation_id": self.generation,
            "member_id": self.member_id,
            "group_instance_id": self.instance_id,
        }

    def heartbeat_answered(self, code: int) -> Change:
        """What the owner of our partitions is to be told. Raises what `_refuse` raises."""
        if code == ErrorCode.REBALANCE_IN_PROGRESS:
            return Change.REVOKED
        if code in _FORGOTTEN:
            self.over()
            return Change.LOST
        if code != ErrorCode.NONE:
            self._refuse(code, "Heartbeat")
        return Change.NOTHING

    def given_back(self) -> None:
        """The owner has finished with what was revoked: join again."""
        self.state = State.UNJOINED

    def over(self) -> None:
        """The session is over: we come back as a stranger, or, with an instance id, in our own place."""
        self.state = State.UNJOINED
        self.member_id, self.generation = "", -1

    def leave_request(self) -> dict[str, Any] | None:
        """None for a static member, whose place is kept for its next life."""
        if self.instance_id is not None or not self.member_id:
            return None
        member = {"member_id": self.member_id, "group_instance_id": None, "reason": None}
        return {"group_id": self.group, "members": [member]}

    def _refuse(self, code: int, what: str) -> None:
        """Raises `Fenced`, `Retriable` (look for the coordinator again) or `Fatal`."""
        if code == ErrorCode.FENCED_INSTANCE_ID:
            self.state = State.FENCED
            error = Fenced(f"another process joined group {self.group!r} with instance id {self.instance_id!r}")
            error.code = ErrorCode.FENCED_INSTANCE_ID
            raise error
        found = kafka_error(code, f"{what} of group {self.group!r}")
        raise found if isinstance(found, Retriable) else Fatal(str(found))


# --- ConsumerProtocolSubscription and ConsumerProtocolAssignment, version 0 ---


def _subscribed(metadata: bytes) -> frozenset[bytes]:
    reader = FieldReader(metadata)
    reader.int16()
    return frozenset(reader.string().encode() for _ in range(reader.int32()))


def _assignment(parts: frozenset[tuple[bytes, int]]) -> bytes:
    by_topic: dict[bytes, list[int]] = {}
    for topic, number in sorted(parts):
        by_topic.setdefault(topic, []).append(number)
    writer = FieldWriter().int16(0).int32(len(by_topic))
    for topic, numbers in by_topic.items():
        writer.string(topic.decode()).int32(len(numbers))
        for number in numbers:
            writer.int32(number)
    return writer.int32(-1).done()


def _partitions(assignment: bytes) -> list[TopicPartition]:
    if not assignment:
        return []
    reader = FieldReader(assignment)
    reader.int16()
    found = []
    for _ in range(reader.int32()):
        topic = reader.string()
        found += [TopicPartition(topic, reader.int32()) for _ in range(reader.int32())]
    return found
