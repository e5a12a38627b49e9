"""The group coordinator: classic groups (`rebalance.py`), consumer groups (`heartbeat.py`), offsets (`offsets.py`).

How a shell drives it. Every call takes the time and returns at once. `join` and `sync` return a *token*: their answer
comes from `drain`, at once or when the other members have done their part. After every call, and after every `tick`:

    1. append the records of `take_records()` to `__consumer_offsets`;
    2. when they are durable, send each answer of `drain()` to the request of its token.

In memory a group changes immediately; nobody hears of an assignment before it is in the log. If that append fails the
broker must stop, as for any write whose outcome is unknown. Offsets change in two steps: `commit_offsets`,
`commit_transactional_offsets` and `end_transaction` give records; append them, then call `apply` with them, in the
order of the log.

Deadlines - sessions, joining, syncing, given member ids - are looked at by `tick` only; call it at `next_deadline`.

The answers follow Apache Kafka 4.3.1. Differences:
- Sessions may be as short as 1000 ms (Kafka: 6000): one embedded process has no network to forgive.
- An empty group begins its first rebalance at once (Kafka waits 3000 ms for more members); it is a setting.
- A waiting request whose connection is gone can be reported by `abandon`, so that a killed member does not hold up
  the others until the rebalance deadline.
- Numbers are bounded, see `GroupConfig`.
- A group's members use one protocol. An empty group takes the protocol of whoever joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from semel.coordinator.consumer_group_log import ConsumerKey
from semel.coordinator.fields import FieldReader, LogRecord
from semel.coordinator.group_log import (
    CommittedOffset,
    GroupKey,
    OffsetKey,
    PendingKey,
    decode_group,
    decode_key,
    encode_group_key,
    encode_offset,
    encode_offset_key,
    encode_pending,
)
from semel.coordinator.heartbeat import (
    ConsumerGroups,
    GroupTimes,
    HeartbeatAnswer,
    HeartbeatRequest,
    NoTopics,
    TopicCatalog,
)
from semel.coordinator.membership import COMPLETING, DEAD, EMPTY, STABLE, Group, Member
from semel.coordinator.offsets import OffsetStore
from semel.coordinator.rebalance import (
    GroupConfig,
    JoinAnswer,
    JoinedMember,
    JoinRequest,
    LeavingMember,
    Rebalancer,
    SyncAnswer,
    check_member,
)
from semel.errors import CorruptBatch, ErrorCode
from semel.types import GroupMetadata, TopicPartition

__all__ = [
    "FetchedOffset",
    "GroupConfig",
    "GroupCoordinator",
    "GroupDescription",
    "GroupListing",
    "JoinAnswer",
    "JoinRequest",
    "JoinedMember",
    "LeavingMember",
    "OffsetCommit",
    "OffsetWrite",
    "SyncAnswer",
]


class OffsetCommit(NamedTuple):
    """What a client commits for one partition."""

    offset: int
    leader_epoch: int = -1
    metadata: str = ""


class OffsetWrite(NamedTuple):
    """A checked commit: one code a partition, and the records to append and then to `apply`; with an error none."""

    error: ErrorCode
    errors: dict[TopicPartition, ErrorCode]
    records: list[LogRecord]


class FetchedOffset(NamedTuple):
    error: ErrorCode
    offset: int = -1
    leader_epoch: int = -1
    metadata: str = ""


class GroupListing(NamedTuple):
    group_id: str
    protocol_type: str
    state: str
    group_type: str = "classic"


class GroupDescription(NamedTuple):
    """DescribeGroups. An unknown group is GROUP_ID_NOT_FOUND and Dead; below v6 the answer has no error."""

    error: ErrorCode
    group_id: str
    state: str
    protocol_type: str = ""
    protocol: str = ""
    generation_id: int = -1
    members: tuple[Member, ...] = ()
    message: str = ""


class GroupCoordinator(Rebalancer):
    """All groups of one broker. `new_member_id` makes a unique id that begins with the given client or instance id."""

    def __init__(
        self,
        *,
        new_member_id: Callable[[str], str],
        config: GroupConfig | None = None,
        catalog: TopicCatalog | None = None,
        times: Callable[[str], GroupTimes] = lambda _: GroupTimes(),
    ) -> None:
        super().__init__(new_member_id=new_member_id, config=config)
        self._offsets = OffsetStore()
        self.consumers = ConsumerGroups(
            new_member_id=new_member_id, catalog=catalog or NoTopics(), times=times, config=self._config
        )

    def __repr__(self) -> str:
        return f"<GroupCoordinator {len(self._groups)} groups, {self.consumers!r}, {self._offsets!r}>"

    def take_records(self) -> list[LogRecord]:
        """Records to make durable before the answers of the next `drain` are sent."""
        return super().take_records() + self.consumers.take_records()

    # -- Members of both protocols --------------------------------------------------------------------------------

    def heartbeat_consumer(self, request: HeartbeatRequest, now_ms: int) -> HeartbeatAnswer:
        """ConsumerGroupHeartbeat. An empty classic group becomes a consumer group; its offsets stay."""
        classic = self._groups.get(request.group_id)
        if classic is not None and (classic.members or classic.pending or request.member_epoch != 0):
            text = f"Group {request.group_id} is not a consumer group."
            return HeartbeatAnswer(ErrorCode.GROUP_ID_NOT_FOUND, text)
        if self._is_full(request.group_id):
            text = f"There are {self._config.max_groups} groups already: delete some."
            return HeartbeatAnswer(ErrorCode.POLICY_VIOLATION, text)
        answer = self.consumers.heartbeat(request, now_ms)
        if classic is not None and request.group_id in self.consumers.groups:
            self._forget(classic)
        return answer

    def _is_full(self, group_id: str) -> bool:
        """Whether this would be a group too many."""
        known = group_id in self._groups or group_id in self.consumers.groups
        return not known and len(self._groups) + len(self.consumers.groups) >= self._config.max_groups

    def join(self, request: JoinRequest, now_ms: int) -> int:
        """JoinGroup. An empty consumer group becomes a classic one; its offsets stay."""
        consumers = self.consumers.groups.get(request.group_id)
        if (consumers is not None and consumers.members) or self._is_full(request.group_id):
            token = next(self._tokens)
            full = consumers is None
            error = ErrorCode.POLICY_VIOLATION if full else ErrorCode.INCONSISTENT_GROUP_PROTOCOL
            self._answer(token, JoinAnswer(error, request.member_id))
            return token
        token = super().join(request, now_ms)
        if consumers is not None and request.group_id in self._groups:
            self.consumers.forget(request.group_id)
        return token

    def leave(self, group_id: str, members: Sequence[LeavingMember], now_ms: int) -> list[ErrorCode]:
        """LeaveGroup, which also removes members of consumer groups."""
        consumers = self.consumers.groups.get(group_id)
        if consumers is None:
            return super().leave(group_id, members, now_ms)
        return [self.consumers.remove(consumers, *leaving, now_ms) for leaving in members]

    def tick(self, now_ms: int) -> None:
        """Let everything happen whose time has come."""
        super().tick(now_ms)
        self.consumers.tick(now_ms)

    def next_deadline(self) -> int | None:
        """When `tick` has something to do, at the latest; None while there are no members."""
        classic = super().next_deadline()
        times = [*self.consumers.deadlines()] + ([] if classic is None else [classic])
        return min(times, default=None)

    # -- Offsets ------------------------------------------------------------------------------------------------

    def commit_offsets(
        self,
        identity: GroupMetadata,
        offsets: Mapping[TopicPartition, OffsetCommit],
        now_ms: int,
        api_version: int,
    ) -> OffsetWrite:
        """OffsetCommit for existing partitions."""
        error = self._check_commit(identity, offsets, transactional=False, api_version=api_version)
        return self._write(identity, offsets, now_ms, error, encode_offset)

    def commit_transactional_offsets(
        self,
        identity: GroupMetadata,
        producer_id: int,
        offsets: Mapping[TopicPartition, OffsetCommit],
        now_ms: int,
    ) -> OffsetWrite:
        """TxnOffsetCommit for existing partitions, after the transaction coordinator let the producer in (KIP-447).

        The caller keeps check and append together: what was checked here must still hold when the records stand in
        the log. Applied, they are pending; `end_transaction` lets them count or drops them.
        """
        error = self._check_commit(identity, offsets, transactional=True, api_version=-1)
        return self._write(identity, offsets, now_ms, error, partial(encode_pending, producer_id))

    def _check_commit(
        self,
        identity: GroupMetadata,
        partitions: Iterable[TopicPartition],
        *,
        transactional: bool,
        api_version: int,
    ) -> ErrorCode:
        """May this member commit now? Members are compared first, then the generation, as in Kafka."""
        if not identity.group_id:
            return ErrorCode.INVALID_GROUP_ID
        consumers = self.consumers.groups.get(identity.group_id)
        if consumers is not None:
            return self.consumers.check_commit(
                consumers, identity, partitions, transactional=transactional, api_version=api_version
            )
        group = self._groups.get(identity.group_id)
        if group is None:
            if identity.generation_id < 0:
                return ErrorCode.POLICY_VIOLATION if self._is_full(identity.group_id) else ErrorCode.NONE
            return ErrorCode.GROUP_ID_NOT_FOUND if api_version >= 9 else ErrorCode.ILLEGAL_GENERATION
        if identity.generation_id < 0 and group.state is EMPTY:
            # The admin client, or a consumer that assigns its partitions itself.
            return ErrorCode.NONE
        if identity.generation_id >= 0 or identity.member_id or identity.group_instance_id is not None:
            error = check_member(group, identity.member_id, identity.group_instance_id)
            if error:
                return error
            if identity.generation_id != group.generation_id:
                return ErrorCode.ILLEGAL_GENERATION
        elif not transactional:
            return ErrorCode.UNKNOWN_MEMBER_ID
        if not transactional and group.state is COMPLETING:
            return ErrorCode.REBALANCE_IN_PROGRESS
        return ErrorCode.NONE

    def _write(
        self,
        identity: GroupMetadata,
        offsets: Mapping[TopicPartition, OffsetCommit],
        now_ms: int,
        error: ErrorCode,
        encode: Callable[[str, TopicPartition, CommittedOffset], LogRecord],
    ) -> OffsetWrite:
        if error:
            return OffsetWrite(error, dict.fromkeys(offsets, error), [])
        errors: dict[TopicPartition, ErrorCode] = {}
        records: list[LogRecord] = []
        for partition, commit in offsets.items():
            if len(commit.metadata.encode()) > self._config.max_offset_metadata_bytes:
                errors[partition] = ErrorCode.OFFSET_METADATA_TOO_LARGE
                continue
            errors[partition] = ErrorCode.NONE
            value = CommittedOffset(*commit, commit_ms=now_ms)
            records.append(encode(identity.group_id, partition, value))
        if records and identity.group_id not in self.consumers.groups:
            self._groups.setdefault(identity.group_id, Group(identity.group_id, state_ms=now_ms))
        group = self._groups.get(identity.group_id)
        if group is not None and identity.member_id in group.members:
            group.members[identity.member_id].renew(now_ms)
        return OffsetWrite(ErrorCode.NONE, errors, records)

    def end_transaction(self, producer_id: int, commit: bool) -> list[LogRecord]:
        """The transaction of this producer is decided: records, for one batch, that make its offsets count or go.

        Empty when nothing is pending, so that it may be asked again after a crash or a failed append.
        """
        return self._offsets.end_transaction(producer_id, commit)

    def apply(self, records: Iterable[LogRecord]) -> None:
        """These offset records stand in the log now. Apply every batch in the order of the log."""
        for key, value in records:
            parsed = decode_key(key)
            assert isinstance(parsed, OffsetKey | PendingKey), "a group changes before its record is written"
            self._offsets.apply(parsed, value)

    def pending_producers(self) -> set[int]:
        """Producers with pending offsets; after a restart those without a transaction are to be aborted."""
        return self._offsets.pending_producers()

    def fetch_offsets(
        self, group_id: str, partitions: Iterable[TopicPartition] | None, *, require_stable: bool
    ) -> dict[TopicPartition, FetchedOffset]:
        """OffsetFetch; None asks for all. With `require_stable` a partition in an open transaction has to wait."""
        wanted = self._offsets.partitions(group_id) if partitions is None else partitions
        found: dict[TopicPartition, FetchedOffset] = {}
        for partition in wanted:
            value = self._offsets.get(group_id, partition)
            if require_stable and self._offsets.is_pending(group_id, partition):
                found[partition] = FetchedOffset(ErrorCode.UNSTABLE_OFFSET_COMMIT)
            elif value is not None:
                found[partition] = FetchedOffset(ErrorCode.NONE, value.offset, value.leader_epoch, value.metadata)
            elif partitions is not None:
                found[partition] = FetchedOffset(ErrorCode.NONE)
        return found

    # -- Deleting -----------------------------------------------------------------------------------------------

    def delete_group(self, group_id: str) -> ErrorCode:
        """DeleteGroups; pending offsets go too. The tombstones are among `take_records`."""
        if not group_id:
            return ErrorCode.INVALID_GROUP_ID
        group, consumers = self._groups.get(group_id), self.consumers.groups.get(group_id)
        if group is None and consumers is None:
            return ErrorCode.GROUP_ID_NOT_FOUND
        if (group is not None and group.state is not EMPTY) or (consumers is not None and consumers.members):
            return ErrorCode.NON_EMPTY_GROUP
        for partition in self._offsets.partitions(group_id):
            self._remove_offset(group_id, partition)
        if group is not None:
            self._forget(group)
        if consumers is not None:
            self.consumers.forget(group_id)
        return ErrorCode.NONE

    def delete_offsets(
        self, group_id: str, partitions: Iterable[TopicPartition]
    ) -> tuple[ErrorCode, dict[TopicPartition, ErrorCode]]:
        """OffsetDelete: the answer's error, and one a partition."""
        if not group_id:
            return ErrorCode.INVALID_GROUP_ID, {}
        group, consumers = self._groups.get(group_id), self.consumers.groups.get(group_id)
        if consumers is not None:
            subscribed = consumers.subscribed_topics()
        elif group is None:
            return ErrorCode.GROUP_ID_NOT_FOUND, {}
        elif group.members and group.protocol_type != "consumer":
            return ErrorCode.NON_EMPTY_GROUP, {}
        else:
            subscribed = _subscribed_topics(group)
        errors: dict[TopicPartition, ErrorCode] = {}
        for partition in partitions:
            if partition.topic in subscribed:
                errors[partition] = ErrorCode.GROUP_SUBSCRIBED_TO_TOPIC
                continue
            errors[partition] = ErrorCode.NONE
            if partition in self._offsets.partitions(group_id):
                self._remove_offset(group_id, partition)
        return ErrorCode.NONE, errors

    def topics_with_offsets(self) -> set[str]:
        """Every topic for which some group has a committed or pending offset."""
        groups = self._offsets.group_ids()
        return {partition.topic for group_id in groups for partition in self._offsets.partitions(group_id)}

    def drop_topic(self, topic: str) -> None:
        """The topic is deleted: so are its offsets, or a topic of the same name would begin with them."""
        for group_id in sorted(self._offsets.group_ids()):
            for partition in self._offsets.partitions(group_id):
                if partition.topic == topic:
                    self._remove_offset(group_id, partition)

    def expire_offsets(self, now_ms: int) -> None:
        """Remove offsets of groups that are empty for the retention time, and empty groups without offsets."""
        retention_ms = self._config.offsets_retention_ms
        if retention_ms < 0:
            return
        for group in [group for group in self._groups.values() if group.state is EMPTY and not group.pending]:
            # A group without members since ever (a simple consumer's) counts from each commit.
            since_ms = -1 if group.protocol_type is None else group.state_ms
            self._expire(group.group_id, since_ms, now_ms)
            if group.state_ms + retention_ms <= now_ms and not self._offsets.partitions(group.group_id):
                self._forget(group)
        for consumers in [consumers for consumers in self.consumers.groups.values() if not consumers.members]:
            self._expire(consumers.group_id, consumers.state_ms, now_ms)
            if consumers.state_ms + retention_ms <= now_ms and not self._offsets.partitions(consumers.group_id):
                self.consumers.forget(consumers.group_id)

    def _expire(self, group_id: str, empty_since_ms: int, now_ms: int) -> None:
        for partition, value in list(self._offsets.committed(group_id)):
            since_ms = max(empty_since_ms, value.commit_ms)
            over = since_ms + self._config.offsets_retention_ms <= now_ms
            if over and not self._offsets.is_pending(group_id, partition):
                self._remove_offset(group_id, partition)

    def _remove_offset(self, group_id: str, partition: TopicPartition) -> None:
        tombstone = encode_offset_key(group_id, partition), None
        self._records.append(tombstone)
        self.apply([tombstone])

    def _forget(self, group: Group) -> None:
        group.move(DEAD)
        del self._groups[group.group_id]
        self._records.append((encode_group_key(group.group_id), None))

    # -- Looking in, and the start ------------------------------------------------------------------------------

    def list_groups(self, states: Iterable[str] = (), types: Iterable[str] = ()) -> list[GroupListing]:
        """ListGroups; an empty filter matches everything, case does not matter (KIP-518, KIP-848)."""
        wanted = {state.lower() for state in states}
        kinds = {kind.lower() for kind in types}
        found = [GroupListing(item.group_id, item.protocol_type or "", item.state) for item in self._groups.values()]
        found += [
            GroupListing(item.group_id, "consumer", item.state, "consumer") for item in self.consumers.groups.values()
        ]
        return [
            item
            for item in found
            if (not wanted or item.state.lower() in wanted) and (not kinds or item.group_type in kinds)
        ]

    def describe(self, group_id: str) -> GroupDescription:
        group = self._groups.get(group_id)
        if group is None:
            other = group_id in self.consumers.groups
            text = f"Group {group_id} is not a classic group." if other else f"Group {group_id} not found."
            return GroupDescription(ErrorCode.GROUP_ID_NOT_FOUND, group_id, DEAD, message=text)
        return GroupDescription(
            ErrorCode.NONE,
            group_id,
            group.state,
            group.protocol_type or "",
            (group.protocol or "") if group.state is STABLE else "",
            group.generation_id,
            tuple(group.members.values()),
        )

    def replay(self, key: bytes, value: bytes | None, now_ms: int) -> None:
        """Take one record of `__consumer_offsets` at start-up, in log order. Raises `CorruptBatch`."""
        parsed = decode_key(key)
        if isinstance(parsed, GroupKey):
            if value is None:
                self._groups.pop(parsed.group_id, None)
            else:
                self._groups[parsed.group_id] = Group.from_stored(decode_group(parsed.group_id, value), now_ms)
            return
        if isinstance(parsed, ConsumerKey):
            self.consumers.replay(parsed, key, value, now_ms)
            return
        self._offsets.apply(parsed, value)

    def resume(self, now_ms: int) -> None:
        """The log is read: every group with offsets is there, and clocks begin to run."""
        for group_id in sorted(self._offsets.group_ids()):
            if group_id not in self._groups and group_id not in self.consumers.groups:
                self._groups[group_id] = Group(group_id, state_ms=now_ms)
        self.consumers.resume(now_ms)

    def snapshot(self) -> list[LogRecord]:
        """Records that rebuild what the log says now; a rebalance under way is in neither. For checkpoints."""
        groups: list[LogRecord] = [group.durable for group in self._groups.values() if group.durable is not None]
        return groups + self.consumers.snapshot() + self._offsets.snapshot()


def _subscribed_topics(group: Group) -> set[str]:
    """Topics in the members' subscriptions: int16 version, then an array of names (ConsumerProtocolSubscription)."""
    topics: set[str] = set()
    for member in group.members.values():
        reader = FieldReader(member.subscription(group.protocol))
        try:
            reader.int16()
            topics.update(reader.string() for _ in range(reader.int32()))
        except CorruptBatch:
            continue
    return topics
