"""Consumer groups meet their members' requests: JoinGroup v0-9, SyncGroup, Heartbeat, LeaveGroup, and time.

The classic protocol of Apache Kafka 4.3.1 with static members (KIP-345), given member ids (KIP-394) and the leader that
comes back without assigning again (KIP-814). How a shell drives it is told in `group.py`; what one group is, in
`membership.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from semel.coordinator.group_log import LogRecord, encode_group
from semel.coordinator.membership import COMPLETING, EMPTY, PREPARING, STABLE, Group, Member, Protocol
from semel.errors import ErrorCode
from semel.types import GroupMetadata

__all__ = [
    "GroupConfig",
    "JoinAnswer",
    "JoinRequest",
    "JoinedMember",
    "LeavingMember",
    "Rebalancer",
    "SyncAnswer",
]


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """Settings and limits; the comments say where a number comes from."""

    min_session_timeout_ms: int = 1_000  # Kafka's 6000 would make every fault test wait for it.
    max_session_timeout_ms: int = 1_800_000  # group.max.session.timeout.ms
    initial_rebalance_delay_ms: int = 0  # group.initial.rebalance.delay.ms; Kafka's default is 3000.
    max_offset_metadata_bytes: int = 4_096  # offset.metadata.max.bytes
    offsets_retention_ms: int = 604_800_000  # offsets.retention.minutes, 7 days; -1 keeps them for ever.
    max_groups: int = 20_000  # About 1 kB each; tools make a group a run, which the retention sweep removes.
    max_members: int = 1_000  # A rebalance sends all subscriptions to the leader in one frame.
    max_subscription_bytes: int = 262_144  # All members' ones and their assignments become one record.


class JoinRequest(NamedTuple):
    """JoinGroup. `rebalance_timeout_ms` is -1 in v0."""

    group_id: str
    member_id: str
    group_instance_id: str | None
    client_id: str
    client_host: str
    protocol_type: str
    protocols: tuple[Protocol, ...]
    session_timeout_ms: int
    rebalance_timeout_ms: int
    api_version: int


class JoinedMember(NamedTuple):
    member_id: str
    group_instance_id: str | None
    subscription: bytes


class JoinAnswer(NamedTuple):
    """`members` is for the leader only. `protocol_name` None is an empty string below v7."""

    error: ErrorCode
    member_id: str = ""
    generation_id: int = -1
    protocol_type: str | None = None
    protocol_name: str | None = None
    leader: str = ""
    members: tuple[JoinedMember, ...] = ()
    skip_assignment: bool = False


class SyncAnswer(NamedTuple):
    error: ErrorCode
    protocol_type: str | None = None
    protocol_name: str | None = None
    assignment: bytes = b""


class LeavingMember(NamedTuple):
    """`member_id` may be empty when the instance id is given (v3+)."""

    member_id: str
    group_instance_id: str | None = None


class Rebalancer:
    """The members' side of the group coordinator."""

    def __init__(self, *, new_member_id: Callable[[str], str], config: GroupConfig | None = None) -> None:
        self._new_member_id = new_member_id
        self._config = config or GroupConfig()
        self._groups: dict[str, Group] = {}
        self._tokens = count(1)
        self._answers: list[tuple[int, JoinAnswer | SyncAnswer]] = []
        self._records: list[LogRecord] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._groups)} groups>"

    # -- What the shell collects --------------------------------------------------------------------------------

    def take_records(self) -> list[LogRecord]:
        """Records to make durable before the answers of the next `drain` are sent."""
        records, self._records = self._records, []
        return records

    def drain(self) -> list[tuple[int, JoinAnswer | SyncAnswer]]:
        """Answers that are due, in order, each with the token of its request."""
        answers, self._answers = self._answers, []
        return answers

    def _answer(self, token: int | None, answer: JoinAnswer | SyncAnswer) -> None:
        if token is not None:
            self._answers.append((token, answer))

    def _persist(self, group: Group, now_ms: int) -> None:
        group.state_ms = now_ms
        group.durable = encode_group(group.stored())
        self._records.append(group.durable)

    # -- JoinGroup ----------------------------------------------------------------------------------------------

    def join(self, request: JoinRequest, now_ms: int) -> int:
        """A member wants to be in the next generation. Returns the token of the answer."""
        token = next(self._tokens)
        error = self._check_join(request)
        if error:
            self._answer(token, JoinAnswer(error, request.member_id))
            return token
        group = self._groups.get(request.group_id)
        if group is None:
            if len(self._groups) >= self._config.max_groups:
                self._answer(token, JoinAnswer(ErrorCode.POLICY_VIOLATION))
                return token
            group = self._groups[request.group_id] = Group(request.group_id, state_ms=now_ms)
        if not group.supports(request.protocol_type, request.protocols):
            self._answer(token, JoinAnswer(ErrorCode.INCONSISTENT_GROUP_PROTOCOL, request.member_id))
        elif request.member_id:
            self._join_known(group, request, token, now_ms)
        elif request.group_instance_id is not None:
            self._join_static(group, request, token, now_ms)
        else:
            self._join_new(group, request, token, now_ms)
        return token

    def _check_join(self, request: JoinRequest) -> ErrorCode:
        config = self._config
        if not request.group_id:
            return ErrorCode.INVALID_GROUP_ID
        if not config.min_session_timeout_ms <= request.session_timeout_ms <= config.max_session_timeout_ms:
            return ErrorCode.INVALID_SESSION_TIMEOUT
        if request.member_id and request.group_id not in self._groups:
            return ErrorCode.UNKNOWN_MEMBER_ID
        if not request.protocol_type or not request.protocols:
            return ErrorCode.INCONSISTENT_GROUP_PROTOCOL
        if sum(len(data) for _, data in request.protocols) > config.max_subscription_bytes:
            return ErrorCode.INVALID_REQUEST
        return ErrorCode.NONE

    def _join_new(self, group: Group, request: JoinRequest, token: int, now_ms: int) -> None:
        """A dynamic member without an id: from v4 on it gets one and has to come back with it (KIP-394)."""
        if len(group.members) + len(group.pending) >= self._config.max_members:
            self._answer(token, JoinAnswer(ErrorCode.GROUP_MAX_SIZE_REACHED))
            return
        member_id = self._new_member_id(request.client_id)
        if request.api_version >= 4:
            group.pending[member_id] = now_ms + request.session_timeout_ms
            self._answer(token, JoinAnswer(ErrorCode.MEMBER_ID_REQUIRED, member_id))
            return
        self._add_member(group, request, member_id, token, now_ms)

    def _join_static(self, group: Group, request: JoinRequest, token: int, now_ms: int) -> None:
        """A static member that starts: its instance id is new, or its predecessor's place is taken over."""
        assert request.group_instance_id is not None
        old_id = group.static_members.get(request.group_instance_id)
        if old_id is None:
            if len(group.members) + len(group.pending) >= self._config.max_members:
                self._answer(token, JoinAnswer(ErrorCode.GROUP_MAX_SIZE_REACHED))
                return
            member_id = self._new_member_id(request.group_instance_id)
            self._add_member(group, request, member_id, token, now_ms)
            return
        old, old_leader = group.members[old_id], group.leader
        self._answer(old.join_token, JoinAnswer(ErrorCode.FENCED_INSTANCE_ID, old_id))
        self._answer(old.sync_token, SyncAnswer(ErrorCode.FENCED_INSTANCE_ID))
        new = _member(request, self._new_member_id(request.group_instance_id))
        new.renew(now_ms)
        group.replace_static(old, new)
        if group.state is STABLE and group.vote() == group.protocol:
            # Nothing changes for the others: the assignment stays, only the member id is another one (KIP-345).
            self._persist(group, now_ms)
            self._answer(token, _static_rejoined(group, new, old_leader, request.api_version))
            return
        new.join_token = token
        self._rebalance_or_wait(group, now_ms)

    def _join_known(self, group: Group, request: JoinRequest, token: int, now_ms: int) -> None:
        member_id = request.member_id
        if group.pending.pop(member_id, None) is not None:
            self._add_member(group, request, member_id, token, now_ms)
            return
        error = check_member(group, member_id, request.group_instance_id)
        if error:
            self._answer(token, JoinAnswer(error, member_id))
            return
        member = group.members[member_id]
        unchanged = member.protocols == request.protocols
        if unchanged and (group.state is COMPLETING or (group.state is STABLE and group.leader != member_id)):
            # The answer was lost, or a follower asks again: it is in the current generation already.
            member.renew(now_ms)
            self._answer(token, _joined(group, member))
            return
        self._answer(member.join_token, JoinAnswer(ErrorCode.REBALANCE_IN_PROGRESS, member_id))
        member.join_token = token
        member.protocols = request.protocols
        member.session_timeout_ms = request.session_timeout_ms
        member.rebalance_timeout_ms = _rebalance_timeout_ms(request)
        member.client_id, member.client_host = request.client_id, request.client_host
        self._rebalance_or_wait(group, now_ms)

    def _add_member(self, group: Group, request: JoinRequest, member_id: str, token: int, now_ms: int) -> None:
        member = _member(request, member_id)
        member.join_token = token
        if not group.members:
            group.protocol_type = request.protocol_type
        group.add(member)
        if group.state is PREPARING and group.hold_until_ms > now_ms:
            group.hold_until_ms = min(now_ms + self._config.initial_rebalance_delay_ms, group.deadline_ms)
        self._rebalance_or_wait(group, now_ms)

    # -- The rebalance ------------------------------------------------------------------------------------------

    def _rebalance_or_wait(self, group: Group, now_ms: int) -> None:
        """Someone came, went or changed: begin a rebalance, or see whether the one under way can go on."""
        if group.state is PREPARING:
            self._try_complete_join(group, now_ms)
            return
        group.begins = group.state is EMPTY
        delay_ms = self._config.initial_rebalance_delay_ms if group.begins else 0
        for member in group.members.values():
            self._answer(member.sync_token, SyncAnswer(ErrorCode.REBALANCE_IN_PROGRESS))
            if member.sync_token is not None:
                member.sync_token = None
                member.renew(now_ms)
            if group.state is COMPLETING:
                member.assignment = b""  # It was for a generation that nobody will see.
        group.move(PREPARING)
        group.unsynced.clear()
        group.hold_until_ms = now_ms + delay_ms
        group.deadline_ms = now_ms + max(group.rebalance_timeout_ms, delay_ms)
        self._try_complete_join(group, now_ms)

    def _try_complete_join(self, group: Group, now_ms: int) -> None:
        if group.all_joined and now_ms >= group.hold_until_ms:
            self._complete_join(group, now_ms)

    def _complete_join(self, group: Group, now_ms: int) -> None:
        """Everybody has joined or the deadline is over: a new generation of those who have."""
        for member in [item for item in group.members.values() if item.join_token is None]:
            if member.group_instance_id is None:
                group.remove(member)
        joined = [member for member in group.members.values() if member.join_token is not None]
        if group.members and not joined:
            # Only static members are left and none came back yet; their sessions decide (KIP-345).
            group.deadline_ms = min(member.expires_ms for member in group.members.values())
            return
        if group.leader is None or group.members[group.leader].join_token is None:
            group.elect_leader()
        group.generation_id += 1
        if not group.members:
            group.protocol = None
            group.deadline_ms = -1
            group.move(EMPTY)
            self._persist(group, now_ms)
            return
        group.protocol = group.vote()
        group.move(COMPLETING)
        group.unsynced = set(group.members)
        group.deadline_ms = now_ms + group.rebalance_timeout_ms
        for member in joined:
            self._answer(member.join_token, _joined(group, member))
            member.join_token = None
            member.renew(now_ms)

    def _drop(self, group: Group, member: Member, now_ms: int) -> None:
        """The member was lost."""
        self._remove(group, member)
        self._rebalance_or_wait(group, now_ms)

    def _remove(self, group: Group, member: Member) -> None:
        self._answer(member.join_token, JoinAnswer(ErrorCode.UNKNOWN_MEMBER_ID))
        self._answer(member.sync_token, SyncAnswer(ErrorCode.UNKNOWN_MEMBER_ID))
        group.remove(member)

    # -- SyncGroup, Heartbeat, LeaveGroup -----------------------------------------------------------------------

    def sync(
        self,
        identity: GroupMetadata,
        assignments: Mapping[str, bytes],
        now_ms: int,
        *,
        protocol_type: str | None = None,
        protocol_name: str | None = None,
    ) -> int:
        """A member wants its assignment; the leader brings everybody's. Returns the token of the answer."""
        token = next(self._tokens)
        group = self._groups.get(identity.group_id)
        error = _check_generation(group, identity)
        if group is None or error:
            self._answer(token, SyncAnswer(error))
            return token
        if protocol_type not in (None, group.protocol_type) or protocol_name not in (None, group.protocol):
            self._answer(token, SyncAnswer(ErrorCode.INCONSISTENT_GROUP_PROTOCOL))
            return token
        member = group.members[identity.member_id]
        member.renew(now_ms)
        if group.state is PREPARING:
            self._answer(token, SyncAnswer(ErrorCode.REBALANCE_IN_PROGRESS))
        elif group.state is STABLE:
            group.unsynced.discard(member.member_id)
            self._answer(token, _synced(group, member))
        else:
            self._answer(member.sync_token, SyncAnswer(ErrorCode.REBALANCE_IN_PROGRESS))
            member.sync_token = token
            group.unsynced.discard(member.member_id)
            if group.leader == member.member_id:
                self._assign(group, assignments, now_ms)
        return token

    def _assign(self, group: Group, assignments: Mapping[str, bytes], now_ms: int) -> None:
        group.move(STABLE)
        for member in group.members.values():
            member.assignment = assignments.get(member.member_id, b"")
        self._persist(group, now_ms)
        for member in group.members.values():
            if member.sync_token is not None:
                self._answer(member.sync_token, _synced(group, member))
                member.sync_token = None
                member.renew(now_ms)

    def heartbeat(self, identity: GroupMetadata, now_ms: int) -> ErrorCode:
        """REBALANCE_IN_PROGRESS asks the member to join again; its session goes on."""
        group = self._groups.get(identity.group_id)
        error = _check_generation(group, identity)
        if group is None or error:
            return error
        group.members[identity.member_id].renew(now_ms)
        return ErrorCode.REBALANCE_IN_PROGRESS if group.state is PREPARING else ErrorCode.NONE

    def leave(self, group_id: str, members: Sequence[LeavingMember], now_ms: int) -> list[ErrorCode]:
        """LeaveGroup: one error a member, in order. Below v3 there is one member and its error is the answer's."""
        group = self._groups.get(group_id)
        if group is None:
            return [ErrorCode.UNKNOWN_MEMBER_ID for _ in members]
        before = len(group.members)
        errors = [self._leave_one(group, leaving) for leaving in members]
        # Once all are gone: no generation is made for somebody who leaves with the same request.
        if len(group.members) < before:
            self._rebalance_or_wait(group, now_ms)
        elif group.state is PREPARING:
            self._try_complete_join(group, now_ms)
        return errors

    def _leave_one(self, group: Group, leaving: LeavingMember) -> ErrorCode:
        member_id = leaving.member_id
        if group.pending.pop(member_id, None) is not None:
            return ErrorCode.NONE
        if not member_id and leaving.group_instance_id is not None:
            member_id = group.static_members.get(leaving.group_instance_id, "")
        error = check_member(group, member_id, leaving.group_instance_id)
        if not error:
            self._remove(group, group.members[member_id])
        return error

    def abandon(self, token: int, now_ms: int) -> None:
        """The connection of a waiting request is gone: its member has a session's time to come back."""
        for group in self._groups.values():
            for member in group.members.values():
                if token not in (member.join_token, member.sync_token):
                    continue
                if member.join_token == token:
                    member.join_token = None
                else:
                    member.sync_token = None
                member.renew(now_ms)
                return

    # -- Time ---------------------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        """Let everything happen whose time has come: lapsed ids, ended sessions, the ends of joining and syncing."""
        for group in list(self._groups.values()):
            for member_id in [member_id for member_id, lapse_ms in group.pending.items() if lapse_ms <= now_ms]:
                del group.pending[member_id]
            expired = [item for item in group.members.values() if not item.is_waiting and item.expires_ms <= now_ms]
            if group.unsynced and group.state is not PREPARING and group.deadline_ms <= now_ms:
                expired += [group.members[member_id] for member_id in group.unsynced]
            for member in {item.member_id: item for item in expired}.values():
                self._drop(group, member, now_ms)
            if group.state is PREPARING:
                if group.deadline_ms <= now_ms:
                    self._complete_join(group, now_ms)
                else:
                    self._try_complete_join(group, now_ms)

    def next_deadline(self) -> int | None:
        """When `tick` has something to do, at the latest; None while there are no members."""
        times: list[int] = []
        for group in self._groups.values():
            times += group.pending.values()
            times += [member.expires_ms for member in group.members.values() if not member.is_waiting]
            if group.state is PREPARING:
                times.append(group.hold_until_ms if group.all_joined else group.deadline_ms)
            elif group.unsynced:
                times.append(group.deadline_ms)
        return min(times, default=None)


def _member(request: JoinRequest, member_id: str) -> Member:
    return Member(
        member_id=member_id,
        group_instance_id=request.group_instance_id,
        client_id=request.client_id,
        client_host=request.client_host,
        session_timeout_ms=request.session_timeout_ms,
        rebalance_timeout_ms=_rebalance_timeout_ms(request),
        protocols=request.protocols,
    )


def _rebalance_timeout_ms(request: JoinRequest) -> int:
    """JoinGroup v0 has none; then the session timeout is the time to join, as before KIP-62."""
    return request.rebalance_timeout_ms if request.rebalance_timeout_ms > 0 else request.session_timeout_ms


def check_member(group: Group, member_id: str, group_instance_id: str | None) -> ErrorCode:
    """Is this member in the group, and is it the latest with its instance id (KIP-345)?"""
    if group_instance_id is not None:
        current = group.static_members.get(group_instance_id)
        if current is None:
            return ErrorCode.UNKNOWN_MEMBER_ID
        if current != member_id:
            return ErrorCode.FENCED_INSTANCE_ID
    return ErrorCode.NONE if member_id in group.members else ErrorCode.UNKNOWN_MEMBER_ID


def _check_generation(group: Group | None, identity: GroupMetadata) -> ErrorCode:
    if not identity.group_id:
        return ErrorCode.INVALID_GROUP_ID
    if group is None:
        return ErrorCode.UNKNOWN_MEMBER_ID
    error = check_member(group, identity.member_id, identity.group_instance_id)
    if not error and identity.generation_id != group.generation_id:
        return ErrorCode.ILLEGAL_GENERATION
    return error


def _joined(group: Group, member: Member) -> JoinAnswer:
    is_leader = group.leader == member.member_id
    return JoinAnswer(
        ErrorCode.NONE,
        member_id=member.member_id,
        generation_id=group.generation_id,
        protocol_type=group.protocol_type,
        protocol_name=group.protocol,
        leader=group.leader or "",
        members=_subscriptions(group) if is_leader else (),
    )


def _static_rejoined(group: Group, member: Member, old_leader: str | None, api_version: int) -> JoinAnswer:
    """A leader that comes back must not assign again: told so from v9 on (KIP-814), before by naming its old id."""
    answer = _joined(group, member)
    if api_version >= 9:
        return answer._replace(skip_assignment=group.leader == member.member_id)
    return answer._replace(leader=old_leader or "", members=())


def _subscriptions(group: Group) -> tuple[JoinedMember, ...]:
    return tuple(
        JoinedMember(member.member_id, member.group_instance_id, member.subscription(group.protocol))
        for member in group.members.values()
    )


def _synced(group: Group, member: Member) -> SyncAnswer:
    return SyncAnswer(ErrorCode.NONE, group.protocol_type, group.protocol, member.assignment)
