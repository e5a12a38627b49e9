"""One consumer group of the classic protocol: its members, its vote, its state. `group.py` lets it meet requests.

A rebalance in Kafka's words: every member joins (PreparingRebalance), all get the new generation and one of them,
the leader, also the list of members (CompletingRebalance), the leader syncs with the assignment, and everybody's sync
is answered with its share (Stable). A member that does not join or sync in time is dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from semel.coordinator.group_log import StoredGroup, StoredMember, encode_group
from semel.coordinator.transitions import Transitions

__all__ = ["TRANSITIONS", "Group", "GroupState", "Member", "Protocol"]

Protocol = tuple[str, bytes]
"""Name of an assignor and the member's subscription for it, in the member's order of preference."""


class GroupState(StrEnum):
    """Kafka's states, by the names that its tools print."""

    EMPTY = "Empty"
    PREPARING_REBALANCE = "PreparingRebalance"
    COMPLETING_REBALANCE = "CompletingRebalance"
    STABLE = "Stable"
    DEAD = "Dead"


EMPTY, PREPARING = GroupState.EMPTY, GroupState.PREPARING_REBALANCE
COMPLETING, STABLE = GroupState.COMPLETING_REBALANCE, GroupState.STABLE
DEAD = GroupState.DEAD

TRANSITIONS: Transitions[GroupState] = {
    EMPTY: frozenset({PREPARING, DEAD}),
    # All have joined, or the deadline is over; Empty when nobody is left.
    PREPARING: frozenset({COMPLETING, EMPTY}),
    # The leader has synced; or someone came, left or was dropped meanwhile.
    COMPLETING: frozenset({STABLE, PREPARING}),
    STABLE: frozenset({PREPARING}),
    DEAD: frozenset(),
}


@dataclass(slots=True)
class Member:
    """One member. A token stands for a request that waits for its answer."""

    member_id: str
    group_instance_id: str | None
    client_id: str
    client_host: str
    session_timeout_ms: int
    rebalance_timeout_ms: int
    protocols: tuple[Protocol, ...]
    assignment: bytes = b""
    join_token: int | None = None
    sync_token: int | None = None
    expires_ms: int = 0
    """End of the session, unless a heartbeat comes; a member that waits for us does not expire."""

    @property
    def is_waiting(self) -> bool:
        return self.join_token is not None or self.sync_token is not None

    def renew(self, now_ms: int) -> None:
        self.expires_ms = now_ms + self.session_timeout_ms

    def subscription(self, protocol: str | None) -> bytes:
        """What the member said about itself under this protocol."""
        return next((data for name, data in self.protocols if name == protocol), b"")


@dataclass(slots=True)
class Group:
    """A group. Members keep the order in which they came."""

    group_id: str
    state: GroupState = EMPTY
    state_ms: int = -1
    """When the group last became Stable or Empty, milliseconds since 1970."""
    generation_id: int = 0
    protocol_type: str | None = None
    protocol: str | None = None
    leader: str | None = None
    members: dict[str, Member] = field(default_factory=dict)
    static_members: dict[str, str] = field(default_factory=dict)
    """Member id by group instance id (KIP-345)."""
    pending: dict[str, int] = field(default_factory=dict)
    """Member ids that were given (KIP-394) and not used yet, with the time at which they lapse."""
    unsynced: set[str] = field(default_factory=set)
    deadline_ms: int = -1
    """PreparingRebalance: when joining ends; with `unsynced` members: when they are dropped."""
    durable: tuple[bytes, bytes] | None = None
    """The group's last record in the log; a rebalance under way is not in it."""
    begins: bool = False
    """The rebalance under way is the first of an empty group."""
    hold_until_ms: int = -1
    """The first rebalance of an empty group waits until then for more members."""

    def move(self, state: GroupState) -> None:
        assert state in TRANSITIONS[self.state], f"group {self.group_id}: {self.state} cannot become {state}"
        self.state = state

    def add(self, member: Member) -> None:
        self.members[member.member_id] = member
        if member.group_instance_id is not None:
            self.static_members[member.group_instance_id] = member.member_id
        if self.leader is None:
            self.leader = member.member_id

    def remove(self, member: Member) -> None:
        del self.members[member.member_id]
        self.unsynced.discard(member.member_id)
        if member.group_instance_id is not None and (
            self.static_members.get(member.group_instance_id) == member.member_id
        ):
            del self.static_members[member.group_instance_id]
        if self.leader == member.member_id:
            self.elect_leader()

    def elect_leader(self) -> None:
        """The longest member among those that have joined; among all when none has."""
        joined = [member_id for member_id, member in self.members.items() if member.join_token is not None]
        self.leader = next(iter(joined or self.members), None)

    def replace_static(self, old: Member, new: Member) -> None:
        """`new` takes the place, the lead and the assignment of `old`, which has the same instance id."""
        new.assignment = old.assignment
        was_leader = self.leader == old.member_id
        self.members = {
            (new.member_id if member_id == old.member_id else member_id): (new if member is old else member)
            for member_id, member in self.members.items()
        }
        self.unsynced.discard(old.member_id)
        assert new.group_instance_id is not None
        self.static_members[new.group_instance_id] = new.member_id
        if was_leader:
            self.leader = new.member_id

    @property
    def all_joined(self) -> bool:
        """Nobody has to be waited for. The first rebalance of an empty group waits for no id that was only given."""
        return (self.begins or not self.pending) and all(
            member.join_token is not None for member in self.members.values()
        )

    @property
    def rebalance_timeout_ms(self) -> int:
        """The longest time that a member asked to have for joining again."""
        return max((member.rebalance_timeout_ms for member in self.members.values()), default=0)

    def common_protocols(self) -> set[str]:
        """Names that every member knows."""
        sets = [{name for name, _ in member.protocols} for member in self.members.values()]
        return set.intersection(*sets) if sets else set()

    def supports(self, protocol_type: str, protocols: tuple[Protocol, ...]) -> bool:
        """Could a member with these protocols be in this group?"""
        if not self.members:
            return True
        return protocol_type == self.protocol_type and not self.common_protocols().isdisjoint(
            name for name, _ in protocols
        )

    def vote(self) -> str:
        """Each member votes for its first choice that all know; ties go to the earliest vote."""
        common = self.common_protocols()
        assert common, f"group {self.group_id}: members without a common protocol"
        votes = Counter(
            next(name for name, _ in member.protocols if name in common) for member in self.members.values()
        )
        return votes.most_common(1)[0][0]

    def stored(self) -> StoredGroup:
        return StoredGroup(
            group_id=self.group_id,
            protocol_type=self.protocol_type or "",
            generation_id=self.generation_id,
            protocol=self.protocol,
            leader=self.leader,
            state_ms=self.state_ms,
            members=tuple(
                StoredMember(
                    member.member_id,
                    member.group_instance_id,
                    member.client_id,
                    member.client_host,
                    member.rebalance_timeout_ms,
                    member.session_timeout_ms,
                    member.subscription(self.protocol),
                    member.assignment,
                )
                for member in self.members.values()
            ),
        )

    @classmethod
    def from_stored(cls, stored: StoredGroup, now_ms: int) -> Group:
        """A group after a restart: its sessions begin anew at `now_ms`."""
        group = cls(
            group_id=stored.group_id,
            state=STABLE if stored.members else EMPTY,
            state_ms=stored.state_ms,
            generation_id=stored.generation_id,
            protocol_type=stored.protocol_type or None,
            protocol=stored.protocol,
            durable=encode_group(stored),
        )
        for item in stored.members:
            member = Member(
                item.member_id,
                item.group_instance_id,
                item.client_id,
                item.client_host,
                item.session_timeout_ms,
                item.rebalance_timeout_ms,
                ((stored.protocol or "", item.subscription),),
                item.assignment,
            )
            member.renew(now_ms)
            group.add(member)
        group.leader = stored.leader if stored.leader in group.members else next(iter(group.members), None)
        return group
