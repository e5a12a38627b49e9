"""Consumer groups of the new protocol meet their members' heartbeats (KIP-848): ConsumerGroupHeartbeat v0-1, and time.

What one group is stands in `consumer_group.py`. A heartbeat changes the group in memory at once; its records are in
`take_records`, and the answer may be sent when they are in the log. Codes and texts are those of Apache Kafka 4.3.1.
Differences:
- A target assignment is made with the heartbeat that needs it (Kafka waits up to a second for more of them, KIP-1263),
  and a regular expression is resolved at once (Kafka does it aside).
- Members of a group use one protocol: there is no online migration from or to the classic one, unless the group is
  empty (Kafka's group.consumer.migration.policy `disabled`).
- Racks play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from hashlib import sha256
from typing import NamedTuple, Protocol

from semel.coordinator.assignors import ASSIGNORS, Part
from semel.coordinator.consumer_group import (
    LEFT_STATIC_EPOCH,
    UNREVOKED,
    ConsumerGroup,
    ConsumerMember,
    TopicShape,
    reconciled,
)
from semel.coordinator.consumer_group_log import ConsumerKey, ConsumerRecord, StoredConsumer
from semel.coordinator.fields import LogRecord
from semel.coordinator.rebalance import GroupConfig
from semel.coordinator.topic_pattern import InvalidPattern, TopicPattern
from semel.errors import ErrorCode, SemelError
from semel.types import GroupMetadata, TopicPartition

__all__ = [
    "ConsumerGroups",
    "GroupRefusal",
    "GroupTimes",
    "HeartbeatAnswer",
    "HeartbeatRequest",
    "NoTopics",
    "TopicCatalog",
]

JOIN_EPOCH, LEAVE_EPOCH = 0, -1


class TopicCatalog(Protocol):
    """The topics of the broker. `version` rises when one is made, deleted or extended."""

    @property
    def version(self) -> int: ...

    def shape(self, name: str, /) -> TopicShape | None: ...

    def names(self) -> Iterable[str]:
        """Names of all topics but the broker's own."""


class NoTopics:
    """A catalog without topics, where there are only classic groups."""

    version = 0

    def shape(self, _name: str) -> TopicShape | None:
        return None

    def names(self) -> Iterable[str]:
        return ()


class GroupTimes(NamedTuple):
    """Settings of one group."""

    session_timeout_ms: int = 45_000
    heartbeat_interval_ms: int = 5_000


class HeartbeatRequest(NamedTuple):
    """ConsumerGroupHeartbeat. None is what the request leaves as it was."""

    group_id: str
    member_id: str
    member_epoch: int
    instance_id: str | None
    rack_id: str | None
    rebalance_timeout_ms: int
    topics: tuple[str, ...] | None
    pattern: str | None
    assignor: str | None
    owned: frozenset[Part] | None
    client_id: str
    client_host: str
    api_version: int

    @property
    def is_full(self) -> bool:
        """Whether it says everything, as a member does that begins or lost an answer."""
        subscribes = self.topics is not None or self.pattern is not None
        said_all = self.rebalance_timeout_ms != -1 and subscribes and self.owned is not None
        return self.member_epoch == JOIN_EPOCH or said_all


class HeartbeatAnswer(NamedTuple):
    """`assignment` is given to whoever begins, and when it changed."""

    error: ErrorCode
    message: str | None = None
    member_id: str | None = None
    member_epoch: int = 0
    heartbeat_interval_ms: int = 0
    assignment: Collection[Part] | None = None


class GroupRefusal(SemelError):
    """A request about a consumer group is refused; nothing was changed."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code: ErrorCode = code


class ConsumerGroups:
    """All consumer groups of one broker. `times` gives the settings of a group."""

    def __init__(
        self,
        *,
        new_member_id: Callable[[str], str],
        catalog: TopicCatalog,
        times: Callable[[str], GroupTimes],
        config: GroupConfig,
    ) -> None:
        self._new_member_id = new_member_id
        self._catalog = catalog
        self._times = times
        self._config = config
        self.groups: dict[str, ConsumerGroup] = {}
        self._records: list[LogRecord] = []

    def __repr__(self) -> str:
        return f"<ConsumerGroups {len(self.groups)} groups>"

    @property
    def has_records(self) -> bool:
        """Whether something changed since the last `take_records`; else every deadline is where it was, or later."""
        return bool(self._records)

    def take_records(self) -> list[LogRecord]:
        """Records to make durable before anybody hears of what changed."""
        records, self._records = self._records, []
        return records

    # --- Heartbeats ---

    def heartbeat(self, request: HeartbeatRequest, now_ms: int) -> HeartbeatAnswer:
        """A member joins, stays, gives up partitions or leaves."""
        try:
            self._check(request)
            if request.member_epoch in (LEAVE_EPOCH, LEFT_STATIC_EPOCH):
                return self._leave(request, now_ms)
            return self._stay(request, now_ms)
        except GroupRefusal as refusal:
            return HeartbeatAnswer(refusal.code, str(refusal))

    def _check(self, request: HeartbeatRequest) -> None:
        joining = request.member_epoch == JOIN_EPOCH
        _demand(request.group_id, "GroupId can't be empty.")
        _demand(request.instance_id != "", "InstanceId can't be empty.")
        _demand(request.rack_id != "", "RackId can't be empty.")
        _demand(request.member_epoch >= LEFT_STATIC_EPOCH, "MemberEpoch is invalid.")
        if not joining or request.api_version >= 1:
            _demand(request.member_id, "MemberId can't be empty.")
        if request.member_epoch == LEFT_STATIC_EPOCH:
            _demand(request.instance_id is not None, "InstanceId can't be null.")
        if joining:
            _demand(request.rebalance_timeout_ms != -1, "RebalanceTimeoutMs must be provided in first request.")
            _demand(request.owned is not None and not request.owned, "TopicPartitions must be empty when (re-)joining.")
            _demand(
                request.topics is not None or request.pattern is not None,
                "Either SubscribedTopicNames or SubscribedTopicRegex must be non-null when (re-)joining.",
            )
        if request.assignor is not None and request.assignor not in ASSIGNORS:
            raise GroupRefusal(
                ErrorCode.UNSUPPORTED_ASSIGNOR,
                f"ServerAssignor {request.assignor} is not supported. Supported assignors: {', '.join(ASSIGNORS)}.",
            )
        size = sum(map(len, request.topics or ())) + len(request.pattern or "")
        _demand(
            size <= self._config.max_subscription_bytes,
            f"A subscription of {size} characters is above the limit of {self._config.max_subscription_bytes}.",
        )

    def _stay(self, request: HeartbeatRequest, now_ms: int) -> HeartbeatAnswer:
        matcher = self._matcher(request)
        group = self._group_of(request)
        member = self._member_of(group, request)
        times = self._times(group.group_id)
        member.expires_ms = now_ms + times.session_timeout_ms
        self._subscribe(group, member, request, matcher, now_ms)
        if group.epoch > group.target_epoch:
            wanted = sorted(group.subscribed_topics())
            shapes = {name: shape for name in wanted if (shape := self._catalog.shape(name)) is not None}
            group.assign(shapes, now_ms)
        before = member.current
        after = reconciled(
            before,
            group.target_epoch,
            group.target.get(member.member_id, frozenset()),
            group.is_free,
            request.owned,
        )
        if after is not before:
            group.move(member, after)
            waits = after.state is UNREVOKED
            member.revoke_by_ms = now_ms + member.about.rebalance_timeout_ms if waits else None
        self._collect(group)
        tell = request.is_full or after.assigned.keys() != before.assigned.keys()
        return HeartbeatAnswer(
            ErrorCode.NONE,
            member_id=member.member_id,
            member_epoch=after.epoch,
            heartbeat_interval_ms=times.heartbeat_interval_ms,
            assignment=after.assigned.keys() if tell else None,
        )

    def _matcher(self, request: HeartbeatRequest) -> TopicPattern | None:
        if not request.pattern:
            return None
        try:
            return TopicPattern(request.pattern)
        except InvalidPattern as error:
            raise GroupRefusal(
                ErrorCode.INVALID_REGULAR_EXPRESSION,
                f"SubscribedTopicRegex `{request.pattern}` is not a valid regular expression: {error}.",
            ) from error

    def _group_of(self, request: HeartbeatRequest) -> ConsumerGroup:
        group = self.groups.get(request.group_id)
        if group is not None:
            return group
        if request.member_epoch != JOIN_EPOCH:
            raise GroupRefusal(ErrorCode.GROUP_ID_NOT_FOUND, f"Consumer group {request.group_id} not found.")
        group = ConsumerGroup(request.group_id)
        group.write_epoch()
        self.groups[request.group_id] = group
        return group

    def _member_of(self, group: ConsumerGroup, request: HeartbeatRequest) -> ConsumerMember:
        """The member that asks; a new one, or the successor of a static one, when it joins."""
        joining = request.member_epoch == JOIN_EPOCH
        present = group.members.get(request.member_id)
        if request.instance_id is not None:
            static_id = group.static_members.get(request.instance_id)
            if joining and static_id is not None:
                return self._succeed(group, group.members[static_id], request)
            if not joining:
                _check_instance(group, request)
        if present is None and not joining:
            raise GroupRefusal(
                ErrorCode.UNKNOWN_MEMBER_ID, f"Member {request.member_id} is not a member of group {group.group_id}."
            )
        if present is not None:
            if not joining:
                _check_epoch(present, request)
            return present
        if len(group.members) >= self._config.max_members:
            raise GroupRefusal(
                ErrorCode.GROUP_MAX_SIZE_REACHED,
                f"The consumer group has reached its maximum capacity of {self._config.max_members} members.",
            )
        return ConsumerMember(request.member_id or self._new_member_id(request.client_id), _NOBODY)

    def _succeed(self, group: ConsumerGroup, old: ConsumerMember, request: HeartbeatRequest) -> ConsumerMember:
        if old.current.epoch != LEFT_STATIC_EPOCH:
            raise GroupRefusal(
                ErrorCode.UNRELEASED_INSTANCE_ID,
                f"Static member {request.member_id} with instance id {request.instance_id} cannot join the group "
                f"because the instance id is owned by {old.member_id} member.",
            )
        return group.replace_member(old, request.member_id or self._new_member_id(request.client_id))

    def _subscribe(
        self,
        group: ConsumerGroup,
        member: ConsumerMember,
        request: HeartbeatRequest,
        matcher: TopicPattern | None,
        now_ms: int,
    ) -> None:
        """Take note of what the member says about itself; raise the group's epoch when what it wants has changed."""
        old = member.about
        new = StoredConsumer(
            instance_id=request.instance_id if request.instance_id is not None else old.instance_id,
            rack_id=request.rack_id if request.rack_id is not None else old.rack_id,
            client_id=request.client_id,
            client_host=request.client_host,
            topics=old.topics if request.topics is None else tuple(sorted(set(request.topics))),
            pattern=old.pattern if request.pattern is None else request.pattern or None,
            rebalance_timeout_ms=(
                old.rebalance_timeout_ms if request.rebalance_timeout_ms == -1 else request.rebalance_timeout_ms
            ),
            assignor=request.assignor if request.assignor is not None else old.assignor,
        )
        wants_other = new.topics != old.topics or new.pattern != old.pattern
        if new != old or member.member_id not in group.members:
            member.about = new
            group.put_member(member)
        if matcher is not None and matcher.pattern not in group.patterns:
            self._resolve(group, matcher, now_ms)
        if wants_other:
            group.drop_unused_patterns()
        has_news = self._look_at_topics(group, now_ms) if wants_other or self._is_behind(group) else False
        if wants_other or has_news:
            group.raise_epoch()

    def _is_behind(self, group: ConsumerGroup) -> bool:
        return group.topics_version != self._catalog.version

    def _look_at_topics(self, group: ConsumerGroup, now_ms: int) -> bool:
        """Whether the topics that the group is subscribed to, or what they look like, have changed."""
        if self._is_behind(group):
            for pattern in list(group.patterns):
                self._resolve(group, TopicPattern(pattern), now_ms)
            group.topics_version = self._catalog.version
        names = sorted(group.subscribed_topics())
        seen = [(name, shape.partitions, shape.topic_id) for name in names if (shape := self._catalog.shape(name))]
        digest = sha256(repr(seen).encode()).digest() if seen else b""
        metadata_hash = int.from_bytes(digest[:8], "big") >> 1  # An int64 in the record.
        changed = metadata_hash != group.metadata_hash
        group.metadata_hash = metadata_hash
        return changed

    def _resolve(self, group: ConsumerGroup, matcher: TopicPattern, now_ms: int) -> None:
        topics = frozenset(name for name in self._catalog.names() if matcher.matches(name))
        if group.patterns.get(matcher.pattern) != topics:
            group.set_pattern(matcher.pattern, topics, now_ms)

    # --- Leaving ---

    def _leave(self, request: HeartbeatRequest, now_ms: int) -> HeartbeatAnswer:
        group = self.groups.get(request.group_id)
        if group is None:
            raise GroupRefusal(ErrorCode.GROUP_ID_NOT_FOUND, f"Group {request.group_id} not found.")
        if request.instance_id is not None:
            _check_instance(group, request)
        member = group.members.get(request.member_id)
        if member is None:
            raise GroupRefusal(
                ErrorCode.UNKNOWN_MEMBER_ID, f"Member {request.member_id} is not a member of group {group.group_id}."
            )
        if request.member_epoch == LEFT_STATIC_EPOCH:
            # It keeps its partitions until it comes back or its session ends.
            group.move(member, member.current._replace(epoch=LEFT_STATIC_EPOCH, revoking={}))
            member.revoke_by_ms = None
            self._collect(group)
        else:
            self._fence(group, member, now_ms)
        return HeartbeatAnswer(ErrorCode.NONE, member_id=member.member_id, member_epoch=request.member_epoch)

    def remove(self, group: ConsumerGroup, member_id: str, instance_id: str | None, now_ms: int) -> ErrorCode:
        """LeaveGroup, by which an administrator removes a member of any protocol."""
        if instance_id is not None:
            static_id = group.static_members.get(instance_id)
            if static_id is None:
                return ErrorCode.UNKNOWN_MEMBER_ID
            if member_id not in ("", static_id):
                return ErrorCode.FENCED_INSTANCE_ID
            member_id = static_id
        member = group.members.get(member_id)
        if member is None:
            return ErrorCode.UNKNOWN_MEMBER_ID
        self._fence(group, member, now_ms)
        return ErrorCode.NONE

    def _fence(self, group: ConsumerGroup, member: ConsumerMember, now_ms: int) -> None:
        """The member is out; whoever comes next is assigned its partitions."""
        group.remove_member(member)
        group.raise_epoch()
        if not group.members:
            group.state_ms = now_ms
        self._collect(group)

    def forget(self, group_id: str) -> None:
        """The group, which is empty, is deleted or becomes a classic one."""
        group = self.groups.pop(group_id)
        group.forget()
        self._collect(group)

    def _collect(self, group: ConsumerGroup) -> None:
        self._records += group.unwritten
        group.unwritten = []

    # --- Offsets ---

    def check_commit(
        self,
        group: ConsumerGroup,
        identity: GroupMetadata,
        partitions: Iterable[TopicPartition],
        *,
        transactional: bool,
        api_version: int,
    ) -> ErrorCode:
        """May this member commit these offsets now?

        A member that has not heard of its newest epoch yet may commit for what it had since before (KIP-1251), but not
        in a transaction.
        """
        epoch = identity.generation_id
        if epoch < 0 and (not group.members or (transactional and not identity.member_id)):
            return ErrorCode.NONE  # The admin client; or a producer that does not say for whom it commits.
        member = group.members.get(identity.member_id)
        if member is None:
            return ErrorCode.UNKNOWN_MEMBER_ID
        if not transactional and api_version < 9:
            return ErrorCode.UNSUPPORTED_VERSION
        if epoch == member.current.epoch:
            return ErrorCode.NONE
        if transactional:
            return ErrorCode.ILLEGAL_GENERATION
        if epoch > member.current.epoch:
            return ErrorCode.STALE_MEMBER_EPOCH
        for topic, index in partitions:
            shape = self._catalog.shape(topic)
            since = None if shape is None else member.current.assigned.get((shape.topic_id, index))
            if since is None or epoch < since:
                return ErrorCode.STALE_MEMBER_EPOCH
        return ErrorCode.NONE

    def check_fetch(self, group_id: str, member_id: str | None, member_epoch: int) -> ErrorCode:
        """May this member read the group's offsets? One that does not say who it is may."""
        group = self.groups.get(group_id)
        if group is None or (member_id is None and member_epoch < 0):
            return ErrorCode.NONE
        member = group.members.get(member_id or "")
        if member is None:
            return ErrorCode.UNKNOWN_MEMBER_ID
        return ErrorCode.NONE if member_epoch == member.current.epoch else ErrorCode.STALE_MEMBER_EPOCH

    # --- Time, and the start ---

    def tick(self, now_ms: int) -> None:
        """Fence members whose session is over, and those that did not give up their partitions in time."""
        for group in list(self.groups.values()):
            late = [
                member
                for member in group.members.values()
                if member.expires_ms <= now_ms or (member.revoke_by_ms is not None and member.revoke_by_ms <= now_ms)
            ]
            for member in late:
                self._fence(group, member, now_ms)

    def deadlines(self) -> Iterable[int]:
        """Times at which `tick` has something to do."""
        for group in self.groups.values():
            for member in group.members.values():
                yield member.expires_ms
                if member.revoke_by_ms is not None:
                    yield member.revoke_by_ms

    def replay(self, key: ConsumerKey, raw_key: bytes, value: bytes | None, now_ms: int) -> None:
        """Take one record at start-up, in log order: members have a session's time to come back."""
        group = self.groups.get(key.group_id)
        if key.kind is ConsumerRecord.GROUP and value is None:
            self.groups.pop(key.group_id, None)
        elif group is not None or value is not None:
            if group is None:
                group = self.groups[key.group_id] = ConsumerGroup(key.group_id, state_ms=now_ms)
            group.replay(key, raw_key, value, now_ms + self._times(key.group_id).session_timeout_ms)

    def resume(self, now_ms: int) -> None:
        """The log is read: clocks begin to run."""
        for group in self.groups.values():
            group.resume(now_ms)

    def snapshot(self) -> list[LogRecord]:
        """Records that rebuild all groups."""
        return [(key, value) for group in self.groups.values() for key, value in group.written.items()]


_NOBODY = StoredConsumer(None, None, "", "", (), None, -1, None)
"""What is known about a member before it says anything."""


def _demand(condition: object, otherwise: str) -> None:
    if not condition:
        raise GroupRefusal(ErrorCode.INVALID_REQUEST, otherwise)


def _check_instance(group: ConsumerGroup, request: HeartbeatRequest) -> None:
    """Is this the member with this instance id?"""
    assert request.instance_id is not None
    static_id = group.static_members.get(request.instance_id)
    if static_id is None:
        raise GroupRefusal(ErrorCode.UNKNOWN_MEMBER_ID, f"Instance id {request.instance_id} is unknown.")
    if static_id != request.member_id:
        raise GroupRefusal(
            ErrorCode.FENCED_INSTANCE_ID,
            f"Static member {request.member_id} with instance id {request.instance_id} was fenced by member "
            f"{static_id}.",
        )


def _check_epoch(member: ConsumerMember, request: HeartbeatRequest) -> None:
    """A member may be one epoch behind when the answer that told it was lost; then it has nothing that is not its."""
    current, epoch = member.current, request.member_epoch
    if epoch == current.epoch:
        return
    relation = "greater" if epoch > current.epoch else "smaller"
    owned = request.owned
    lost_an_answer = epoch == current.previous_epoch and owned is not None and owned <= current.assigned.keys()
    if epoch > current.epoch or not lost_an_answer:
        raise GroupRefusal(
            ErrorCode.FENCED_MEMBER_EPOCH,
            f"The consumer group member has a {relation} member epoch ({epoch}) than the one known by the group "
            f"coordinator ({current.epoch}). The member must abandon all its partitions and rejoin.",
        )
