"""One consumer group of the new protocol (KIP-848): its members, its epochs, and the way of a member to its target.

The group epoch rises with every change of members, subscriptions or topics. A target assignment is made for a group
epoch. Each member goes there by itself: first it gives up what it shall not have any more, and only when it has
confirmed that does its epoch rise to the target's; then it gets what it shall have in addition, as soon as its former
owner has let go. So no partition has two owners, and nobody waits for a member that has nothing to do with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from semel.coordinator import consumer_group_log as log
from semel.coordinator.assignors import ASSIGNORS, DEFAULT_ASSIGNOR, Part, Subscriber, Target
from semel.coordinator.consumer_group_log import ConsumerKey, ConsumerRecord, StoredConsumer, StoredCurrent
from semel.coordinator.fields import LogRecord
from semel.coordinator.transitions import Transitions

__all__ = [
    "LEFT_STATIC_EPOCH",
    "TRANSITIONS",
    "ConsumerGroup",
    "ConsumerMember",
    "Current",
    "MemberState",
    "TopicShape",
    "reconciled",
]

LEFT_STATIC_EPOCH = -2
"""Epoch of a static member that went away and is expected back."""


class MemberState(StrEnum):
    """How far a member is on its way to the target (org.apache.kafka.coordinator.group.modern.MemberState)."""

    STABLE = "Stable"
    UNREVOKED_PARTITIONS = "UnrevokedPartitions"
    UNRELEASED_PARTITIONS = "UnreleasedPartitions"


STABLE, UNREVOKED = MemberState.STABLE, MemberState.UNREVOKED_PARTITIONS
UNRELEASED = MemberState.UNRELEASED_PARTITIONS

TRANSITIONS: Transitions[MemberState] = {
    # A new target: nothing to wait for, something to give up, or something that another one has to give up first.
    STABLE: frozenset({STABLE, UNREVOKED, UNRELEASED}),
    # It has confirmed; by then the target may be a newer one.
    UNREVOKED: frozenset({STABLE, UNREVOKED, UNRELEASED}),
    UNRELEASED: frozenset({STABLE, UNREVOKED, UNRELEASED}),
}
_STATE_NUMBERS = {STABLE: 0, UNREVOKED: 1, UNRELEASED: 2}
_STATES = {number: state for state, number in _STATE_NUMBERS.items()}


class Current(NamedTuple):
    """What a member has. Each partition with the epoch in which the member got it (KIP-1251)."""

    epoch: int = 0
    previous_epoch: int = 0
    state: MemberState = STABLE
    assigned: Mapping[Part, int] = {}
    revoking: Mapping[Part, int] = {}
    """Still the member's until it confirms that it has let go."""

    @property
    def held(self) -> set[Part]:
        """What nobody else may have."""
        return {*self.assigned, *self.revoking}


def reconciled(
    current: Current,
    target_epoch: int,
    target: Collection[Part],
    is_free: Callable[[Part], bool],
    owned: Collection[Part] | None,
) -> Current:
    """The member's next step to its target. `owned` is what it says it has; None when it said nothing.

    Gives back `current` itself when there is nothing to do but to wait.
    """
    if current.state is STABLE and current.epoch == target_epoch:
        return current
    if current.state is UNREVOKED and _holds(owned, current.revoking):
        return current
    kept = {part: epoch for part, epoch in current.assigned.items() if part in target}
    revoking = {part: epoch for part, epoch in current.assigned.items() if part not in target}
    if revoking and _holds(owned, revoking):
        return _moved(current, Current(current.epoch, current.previous_epoch, UNREVOKED, kept, revoking))
    wanted = [part for part in target if part not in kept]
    # What the member itself gives up in this very step is not free for others yet, but it is not wanted either.
    added = {part: target_epoch for part in wanted if is_free(part)}
    state = STABLE if len(added) == len(wanted) else UNRELEASED
    if state is current.state and not added and not revoking and current.epoch == target_epoch and not current.revoking:
        return current
    previous = current.previous_epoch if current.epoch == target_epoch else current.epoch
    return _moved(current, Current(target_epoch, previous, state, {**kept, **added}, {}))


def _holds(owned: Collection[Part] | None, parts: Iterable[Part]) -> bool:
    """Whether the member still has one of these; one that says nothing has."""
    return owned is None or any(part in owned for part in parts)


def _moved(before: Current, after: Current) -> Current:
    assert after.state in TRANSITIONS[before.state], f"{before.state} cannot become {after.state}"
    return after


@dataclass(slots=True)
class ConsumerMember:
    """One member: who it is, what it has, and until when we wait for it."""

    member_id: str
    about: StoredConsumer
    current: Current = field(default_factory=Current)
    expires_ms: int = 0
    """End of the session, unless a heartbeat comes."""
    revoke_by_ms: int | None = None
    """End of the time to give up partitions."""

    def is_reconciled_to(self, epoch: int) -> bool:
        return self.current.state is STABLE and self.current.epoch == epoch


class TopicShape(NamedTuple):
    """A topic as groups see it."""

    topic_id: bytes
    partitions: int


@dataclass(slots=True)
class ConsumerGroup:
    """A group. Its records are written as they change; `written` is what the log says."""

    group_id: str
    epoch: int = 1
    metadata_hash: int = 0
    target_epoch: int = 0
    members: dict[str, ConsumerMember] = field(default_factory=dict)
    static_members: dict[str, str] = field(default_factory=dict)
    """Member id by group instance id."""
    target: Target = field(default_factory=dict)
    patterns: dict[str, frozenset[str]] = field(default_factory=dict)
    """Topics that each regular expression of a member stands for."""
    topics_version: int = -1
    """Of the topics when they were last looked at."""
    state_ms: int = 0
    """When it became empty, or was read back."""
    owners: dict[Part, str] = field(default_factory=dict)
    written: dict[bytes, bytes] = field(default_factory=dict)
    unwritten: list[LogRecord] = field(default_factory=list)

    @property
    def state(self) -> str:
        """By the name that Kafka's tools print."""
        if not self.members:
            return "Empty"
        if self.epoch > self.target_epoch:
            return "Assigning"
        reconciled_all = all(member.is_reconciled_to(self.target_epoch) for member in self.members.values())
        return "Stable" if reconciled_all else "Reconciling"

    @property
    def assignor(self) -> str:
        """The one that most members prefer, else the default one."""
        votes = Counter(member.about.assignor for member in self.members.values() if member.about.assignor)
        order = list(ASSIGNORS)
        best = sorted(votes.items(), key=lambda item: (-item[1], order.index(item[0])))
        return best[0][0] if best else DEFAULT_ASSIGNOR

    def subscription(self, member: ConsumerMember) -> frozenset[str]:
        """Names of the topics that a member wants, whether they are there or not."""
        found = frozenset(member.about.topics)
        return found if member.about.pattern is None else found | self.patterns.get(member.about.pattern, frozenset())

    def subscribed_topics(self) -> set[str]:
        return {name for member in self.members.values() for name in self.subscription(member)}

    def is_free(self, part: Part) -> bool:
        return part not in self.owners

    # --- Changes, each with its records ---

    def put_member(self, member: ConsumerMember) -> None:
        """Add a member, or take note of what it now says about itself."""
        self.members[member.member_id] = member
        for instance_id in [key for key, member_id in self.static_members.items() if member_id == member.member_id]:
            del self.static_members[instance_id]
        if member.about.instance_id is not None:
            self.static_members[member.about.instance_id] = member.member_id
        self._write(ConsumerRecord.MEMBER, member.member_id, log.encode_consumer(member.about))

    def move(self, member: ConsumerMember, current: Current) -> None:
        """Give the member another assignment, state or epoch."""
        self._own(member, current)
        stored = StoredCurrent(
            current.epoch, current.previous_epoch, _STATE_NUMBERS[current.state], current.assigned, current.revoking
        )
        self._write(ConsumerRecord.CURRENT, member.member_id, log.encode_current(stored))

    def _own(self, member: ConsumerMember, current: Current) -> None:
        before, after = member.current.held, current.held
        for part in before - after:
            del self.owners[part]
        for part in after - before:
            other = self.owners.setdefault(part, member.member_id)
            assert other == member.member_id, f"group {self.group_id}: {part} is {other}'s, not {member.member_id}'s"
        member.current = current

    def remove_member(self, member: ConsumerMember) -> None:
        """The member is gone, and with it what it had and should have."""
        self._own(member, Current())
        del self.members[member.member_id]
        if member.about.instance_id is not None:
            del self.static_members[member.about.instance_id]
        self.target.pop(member.member_id, None)
        for kind in (ConsumerRecord.CURRENT, ConsumerRecord.TARGET, ConsumerRecord.MEMBER):
            self._write(kind, member.member_id, None)
        self.drop_unused_patterns()

    def replace_member(self, old: ConsumerMember, new_id: str) -> ConsumerMember:
        """A static member came back under another id: it takes the place of the old one at epoch 0."""
        target = self.target.get(old.member_id)
        current = old.current._replace(epoch=0, previous_epoch=0)
        self.remove_member(old)
        new = ConsumerMember(new_id, old.about)
        self.put_member(new)
        self.move(new, current)
        if target is not None:
            self.set_target(new_id, target)
        return new

    def raise_epoch(self) -> None:
        self.epoch += 1
        self.write_epoch()

    def write_epoch(self) -> None:
        self._write(ConsumerRecord.GROUP, "", log.encode_epoch(self.epoch, self.metadata_hash))

    def assign(self, topics: Mapping[str, TopicShape], now_ms: int) -> None:
        """Make the target assignment of the present group epoch."""
        subscribers = {
            member_id: Subscriber(
                frozenset(topics[name].topic_id for name in self.subscription(member) if name in topics),
                self.target.get(member_id, frozenset()),
                member.about.instance_id,
            )
            for member_id, member in self.members.items()
        }
        sizes = {shape.topic_id: shape.partitions for shape in topics.values()}
        for member_id, parts in ASSIGNORS[self.assignor](subscribers, sizes).items():
            self.set_target(member_id, parts)
        self.target_epoch = self.epoch
        self._write(ConsumerRecord.TARGET_EPOCH, "", log.encode_target_epoch(self.target_epoch, now_ms))

    def set_target(self, member_id: str, parts: frozenset[Part]) -> None:
        if self.target.get(member_id) == parts:
            return  # Most targets stay as they are, and a big group has many.
        self.target[member_id] = parts
        self._write(ConsumerRecord.TARGET, member_id, log.encode_target(parts))

    def set_pattern(self, pattern: str, topics: frozenset[str], now_ms: int) -> None:
        """Take note of what a regular expression stands for."""
        self.patterns[pattern] = topics
        self._write(ConsumerRecord.PATTERN, pattern, log.encode_pattern(topics, now_ms))

    def drop_unused_patterns(self) -> None:
        used = {member.about.pattern for member in self.members.values()}
        for pattern in [pattern for pattern in self.patterns if pattern not in used]:
            del self.patterns[pattern]
            self._write(ConsumerRecord.PATTERN, pattern, None)

    def forget(self) -> None:
        """Remove every record of a group without members."""
        assert not self.members, f"group {self.group_id} has members"
        self.unwritten += [(key, None) for key in self.written]
        self.written = {}

    def _write(self, kind: ConsumerRecord, name: str, value: bytes | None) -> None:
        key = log.encode_key(ConsumerKey(kind, self.group_id, name))
        if self.written.get(key) == value:
            return
        self.unwritten.append((key, value))
        if value is None:
            del self.written[key]
        else:
            self.written[key] = value

    # --- The start ---

    def replay(self, key: ConsumerKey, raw_key: bytes, value: bytes | None, expires_ms: int) -> None:
        """Take one record of the log, in order. Raises `CorruptBatch`."""
        if value is None:
            self.written.pop(raw_key, None)
        else:
            self.written[raw_key] = value
        kind, name = key.kind, key.name
        if kind is ConsumerRecord.GROUP and value is not None:
            self.epoch, self.metadata_hash = log.decode_epoch(value)
        elif kind is ConsumerRecord.TARGET_EPOCH and value is not None:
            self.target_epoch, _ = log.decode_epoch(value)
        elif kind is ConsumerRecord.PATTERN:
            self.patterns.pop(name, None)
            if value is not None:
                self.patterns[name] = log.decode_pattern(value)
        elif kind is ConsumerRecord.TARGET:
            self.target.pop(name, None)
            if value is not None:
                self.target[name] = log.decode_target(value)
        elif kind is ConsumerRecord.MEMBER:
            self._replay_member(name, value, expires_ms)
        elif kind is ConsumerRecord.CURRENT and name in self.members:
            self.members[name].current = Current() if value is None else _current(log.decode_current(value))

    def _replay_member(self, name: str, value: bytes | None, expires_ms: int) -> None:
        present = self.members.pop(name, None)
        if present is not None and present.about.instance_id is not None:
            self.static_members.pop(present.about.instance_id, None)
        if value is None:
            return
        about = log.decode_consumer(value)
        current = Current() if present is None else present.current
        self.members[name] = ConsumerMember(name, about, current, expires_ms)
        if about.instance_id is not None:
            self.static_members[about.instance_id] = name

    def resume(self, now_ms: int) -> None:
        """The log is read: who owns what, and whoever has to give up partitions has its time for that again."""
        self.owners = {}
        for member in self.members.values():
            current, member.current = member.current, Current()
            self._own(member, current)
            if current.state is UNREVOKED:
                member.revoke_by_ms = now_ms + member.about.rebalance_timeout_ms


def _current(stored: StoredCurrent) -> Current:
    state = _STATES.get(stored.state, STABLE)
    return Current(stored.epoch, stored.previous_epoch, state, stored.assigned, stored.revoking)
