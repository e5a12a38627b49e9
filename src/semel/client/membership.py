"""One member of a consumer group, classic protocol [sans-IO]: what it asks the coordinator, what the answers mean.

    UNJOINED --join--> JOINED --sync--> STABLE --"rebalance"--> REVOKING --given back--> UNJOINED

From every state with a session its end leads to UNJOINED, in a new *life*; another process with our instance id
leads to FENCED, for ever.

The owner of the partitions is told by a `View`: what he is to own, in which life. He makes that true (gives back what
is not in it, takes over what is new, in that order; everything is lost when the life is another one) and acknowledges
it by its serial. What is decided next waits for that, so nobody else gets what he still works on; only the heartbeats
go on. He always goes by the newest view, so none needs to be kept for him.

Rebalances are eager: everybody gives everything back first. A cooperative one has two rounds, and between them a
static member that is restarted gets what its predecessor was to keep (KIP-345); what the predecessor was to give up
is then revoked by nobody and has no owner until somebody joins or leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple
from uuid import UUID

from semel.coordinator.assignors import Subscriber, range_assignment
from semel.coordinator.fields import FieldReader, FieldWriter
from semel.errors import ErrorCode, Fatal, Fenced, Retriable, SemelError, kafka_error
from semel.types import GroupMetadata, TopicPartition

__all__ = ["GroupRequest", "GroupTimes", "Member", "Membership", "State", "TopicFacts", "View"]

JOIN_GROUP, HEARTBEAT, LEAVE_GROUP, SYNC_GROUP = 11, 12, 13, 14
_PROTOCOL_TYPE, _PROTOCOL = "consumer", "range"
_FORGOTTEN = (ErrorCode.UNKNOWN_MEMBER_ID, ErrorCode.ILLEGAL_GENERATION)
_PASSING = (ErrorCode.UNKNOWN_SERVER_ERROR, ErrorCode.REBALANCE_IN_PROGRESS)
"""A coordinator that has trouble with its disk or its replicas says the former."""
_TOPICS_SECONDS = 30.0
"""How often the leader looks whether a topic has got more partitions."""
_MISSING_TOPIC_SECONDS = 1.0
"""The same while a topic that somebody wants is not there at all."""


class State(Enum):
    """Where a member stands; see above."""

    UNJOINED = auto()
    JOINED = auto()
    STABLE = auto()
    REVOKING = auto()
    FENCED = auto()


class View(NamedTuple):
    """What the owner of the partitions is to know. `metadata` is None while we are no member."""

    serial: int = 0
    life: int = 0
    wanted: frozenset[TopicPartition] = frozenset()
    metadata: GroupMetadata | None = None


class GroupRequest(NamedTuple):
    """What to ask the coordinator, and how many seconds the answer may take."""

    api_key: int
    fields: dict[str, Any]
    patience: float


class TopicFacts(NamedTuple):
    """One topic; without partitions where there is none."""

    topic_id: UUID | None
    partitions: int


class GroupTimes(NamedTuple):
    """Seconds: how long the group keeps us without a heartbeat, how often we send one, how long a poll may be away."""

    session: float
    heartbeat: float
    poll: float


class Member(ABC):
    """What both protocols share: the view, and whether the owner has made it true."""

    def __init__(self, group: str, topics: Sequence[str], instance_id: str | None, times: GroupTimes) -> None:
        self.group = group
        self.topics = sorted(topics)
        self.instance_id = instance_id
        self.times = times
        self.view = View()
        self._acknowledged = 0
        self._owned: frozenset[TopicPartition] = frozenset()
        """What the owner had when he last made a view true."""
        self._polled_at = 0.0

    @property
    def is_settled(self) -> bool:
        """Whether the owner has made the view true."""
        return self._acknowledged == self.view.serial

    def acknowledged(self, serial: int) -> None:
        """The owner has made the view of this serial true."""
        self._acknowledged = serial
        if serial == self.view.serial:
            self._owned = self.view.wanted

    @abstractmethod
    def next_request(self, now: float) -> GroupRequest | None:
        """What to ask now; None when it is time to wait: until `wake_at`, or for the owner."""

    @abstractmethod
    def answered(self, request: GroupRequest, answer: Any, now: float) -> None:
        """Take an answer. Raises `Fenced`, `Retriable` (look for the coordinator again) or `Fatal`."""

    @abstractmethod
    def unanswered(self) -> None:
        """Nobody knows whether the last request was heard of."""

    @abstractmethod
    def wake_at(self) -> float | None:
        """When `next_request` may have something although nothing else happened."""

    @abstractmethod
    def topics_to_look_up(self, now: float) -> list[str]:
        """Topics about which something has to be known now."""

    @abstractmethod
    def looked_up(self, topics: Mapping[str, TopicFacts], now: float) -> None:
        """What the cluster says of the topics that were asked for."""

    @abstractmethod
    def leave(self) -> GroupRequest | None:
        """What to say at the end; None for nothing."""

    def polled(self, now: float) -> None:
        """The owner asks for records: he is alive. Infinity while he is waiting for them, or told of a change."""
        self._polled_at = now

    def _show(self, wanted: Iterable[TopicPartition], metadata: GroupMetadata | None) -> None:
        """What is to be owned in this life."""
        view = self.view
        chosen = frozenset(wanted)
        serial = view.serial if chosen == view.wanted else view.serial + 1
        self.view = View(serial, view.life, chosen, metadata)

    def _end_life(self) -> None:
        """What was owned may be another member's already."""
        self.view = View(self.view.serial + 1, self.view.life + 1)

    def _is_away(self, now: float) -> bool:
        """Whether the owner asked for nothing for so long that others shall have the work."""
        return now - self._polled_at >= self.times.poll


def refusal(code: int, what: str, group: str, instance_id: str | None) -> SemelError:
    """The error of an answer that is none of the protocol's own: `Fenced`, `Retriable`, else `Fatal`."""
    if code == ErrorCode.FENCED_INSTANCE_ID:
        error = Fenced(
            f"the consumer of group {group!r} was fenced: another process joined with instance id {instance_id!r}. "
            "Stop this process; give every instance its own SEMEL_INSTANCE."
        )
        error.code = ErrorCode.FENCED_INSTANCE_ID
        return error
    found = kafka_error(code, f"{what} of group {group!r}", cls=Retriable if code in _PASSING else None)
    if isinstance(found, Retriable | Fatal):
        return found
    return kafka_error(code, f"{what} of group {group!r}", cls=Fatal)


class _Other(NamedTuple):
    member_id: str
    instance_id: str | None
    topics: frozenset[bytes]


class Membership(Member):
    """A member of a classic group. Times are seconds of a clock that only runs forward."""

    def __init__(self, group: str, topics: Sequence[str], instance_id: str | None, times: GroupTimes) -> None:
        super().__init__(group, topics, instance_id, times)
        self.state = State.UNJOINED
        self.member_id = ""
        self.generation = -1
        self._heard_at = self._asked_at = 0.0
        self._beat_at = 0.0
        self._leads: list[_Other] | None = None
        """The members, where we are to share the partitions out."""
        self._skips_assignment = False
        self._counts: dict[str, int] | None = None
        """The partitions of every topic that the group wants, as the last assignment knew them."""
        self._look_at = 0.0

    def __repr__(self) -> str:
        return f"<Membership of {self.group!r} as {self.member_id!r} in {self.generation} [{self.state.name}]>"

    # --- What to ask ---

    def next_request(self, now: float) -> GroupRequest | None:
        """What to ask now; None when it is time to wait: until `wake_at`, or for the owner."""
        has_session = self.state in (State.JOINED, State.STABLE, State.REVOKING)
        if has_session and (now - self._heard_at >= self.times.session or self._is_away(now)):
            self._over()
        if self.state is State.REVOKING and self.is_settled:
            self.state = State.UNJOINED
        if self.state is State.UNJOINED:
            return self._join() if self.is_settled and not self._is_away(now) else None
        if self.state is State.JOINED:
            self._asked_at = now
            return self._sync() if self._leads is None or self._counts is not None else None
        if self.state is State.FENCED or now < self._beat_at:
            return None
        self._asked_at = now
        return GroupRequest(HEARTBEAT, self._who(), max(1.0, self.times.session / 2))

    def wake_at(self) -> float | None:
        """When `next_request` may have something although nothing else happened."""
        if self.state not in (State.STABLE, State.REVOKING):
            return None
        look_at = [self._look_at] if self._leads is not None and self.state is State.STABLE else []
        return min(self._beat_at, self._heard_at + self.times.session, self._polled_at + self.times.poll, *look_at)

    def topics_to_look_up(self, now: float) -> list[str]:
        """Topics whose number of partitions is needed now; the leader alone asks."""
        if self._leads is None or self.state not in (State.JOINED, State.STABLE):
            return []
        if self._counts is not None and now < self._look_at:
            return []
        return sorted({topic.decode() for member in self._leads for topic in member.topics})

    def looked_up(self, topics: Mapping[str, TopicFacts], now: float) -> None:
        """So many partitions have the topics that were asked for."""
        before, self._counts = self._counts, {topic: facts.partitions for topic, facts in topics.items()}
        self._look_at = now + (_TOPICS_SECONDS if all(self._counts.values()) else _MISSING_TOPIC_SECONDS)
        if self.state is State.STABLE and before is not None and before != self._counts:
            self._give_back()  # A leader that joins again makes everybody do so.

    def unanswered(self) -> None:
        """Everything may be asked again: a coordinator knows us by our member id or our instance id."""

    def leave(self) -> GroupRequest | None:
        """None for a static member, whose place is kept for its next life."""
        if self.instance_id is not None or not self.member_id:
            return None
        fields = {
            "group_id": self.group,
            "member_id": self.member_id,
            "members": [{"member_id": self.member_id, "group_instance_id": None, "reason": None}],
        }
        return GroupRequest(LEAVE_GROUP, fields, 1.0)

    def _join(self) -> GroupRequest:
        subscription = FieldWriter().int16(0).int32(len(self.topics))
        for topic in self.topics:
            subscription.string(topic)
        fields = {
            "group_id": self.group,
            "session_timeout": round(self.times.session * 1000),
            "rebalance_timeout": round(self.times.poll * 1000),
            "member_id": self.member_id,
            "group_instance_id": self.instance_id,
            "protocol_type": _PROTOCOL_TYPE,
            "protocols": [{"name": _PROTOCOL, "metadata": subscription.int32(-1).done()}],
            "reason": None,
        }
        return GroupRequest(JOIN_GROUP, fields, self._patience)

    def _sync(self) -> GroupRequest:
        shares = []
        if self._leads is not None and not self._skips_assignment:
            members = {item.member_id: Subscriber(item.topics, frozenset(), item.instance_id) for item in self._leads}
            counts = {topic.encode(): count for topic, count in sorted((self._counts or {}).items())}
            target = range_assignment(members, counts)
            shares = [{"member_id": name, "assignment": _assignment(parts)} for name, parts in sorted(target.items())]
        fields = self._who() | {"protocol_type": _PROTOCOL_TYPE, "protocol_name": _PROTOCOL, "assignments": shares}
        return GroupRequest(SYNC_GROUP, fields, self._patience)

    @property
    def _patience(self) -> float:
        """A join and a sync are answered when the others have come. To ask again, on another connection, harms nobody,
        and finds a broker that is silent."""
        return max(2 * self.times.session, 10.0)

    def _who(self) -> dict[str, Any]:
        return {
            "group_id": self.group,
            "generation_id": self.generation,
            "member_id": self.member_id,
            "group_instance_id": self.instance_id,
        }

    # --- What came of it ---

    def answered(self, request: GroupRequest, answer: Any, now: float) -> None:
        """Take an answer. Raises `Fenced`, `Retriable` (look for the coordinator again) or `Fatal`."""
        code = answer.error_code
        if code == ErrorCode.FENCED_INSTANCE_ID:
            self.state = State.FENCED
        if request.api_key == JOIN_GROUP:
            self._joined(answer, code, now)
        elif request.api_key == SYNC_GROUP:
            self._synced(answer, code, now)
        elif request.api_key == HEARTBEAT:
            self._beaten(code, now)

    def _joined(self, answer: Any, code: int, now: float) -> None:
        if code == ErrorCode.MEMBER_ID_REQUIRED:
            self.member_id = answer.member_id
        elif code in _FORGOTTEN:
            self.member_id = ""
        elif code != ErrorCode.NONE:
            raise refusal(code, "JoinGroup", self.group, self.instance_id)
        else:
            self.member_id, self.generation = answer.member_id, answer.generation_id
            self._skips_assignment = getattr(answer, "skip_assignment", False)  # KIP-814, since version 9.
            self._leads, self._counts = None, None
            if answer.leader == self.member_id:
                self._leads = [
                    _Other(item.member_id, getattr(item, "group_instance_id", None), _subscribed(item.metadata))
                    for item in answer.members
                ]
            self._heard_at = now
            self.state = State.JOINED
            self._show((), self._metadata)

    def _synced(self, answer: Any, code: int, now: float) -> None:
        if code == ErrorCode.REBALANCE_IN_PROGRESS:
            self.state = State.UNJOINED
        elif code in _FORGOTTEN:
            self._over(is_known=code != ErrorCode.UNKNOWN_MEMBER_ID)
        elif code != ErrorCode.NONE:
            raise refusal(code, "SyncGroup", self.group, self.instance_id)
        elif now - self._asked_at >= self.times.session:
            # Others may have come that late, or we were stopped and the share is another one's: it is said again.
            self._heard_at = now
        else:
            self._heard_at, self._beat_at = now, now + self.times.heartbeat
            self.state = State.STABLE
            self._show(_partitions(answer.assignment), self._metadata)

    def _beaten(self, code: int, now: float) -> None:
        # Who was stopped finds an answer of long ago, when the group still knew him: it counts from its question on.
        if code in _FORGOTTEN or now - self._asked_at >= self.times.session:
            self._over(is_known=code != ErrorCode.UNKNOWN_MEMBER_ID)
            return
        if code not in (ErrorCode.NONE, ErrorCode.REBALANCE_IN_PROGRESS):
            raise refusal(code, "Heartbeat", self.group, self.instance_id)
        self._heard_at, self._beat_at = self._asked_at, now + self.times.heartbeat
        if code == ErrorCode.REBALANCE_IN_PROGRESS and self.state is State.STABLE:
            self._give_back()

    @property
    def _metadata(self) -> GroupMetadata:
        return GroupMetadata(self.group, self.generation, self.member_id, self.instance_id)

    def _give_back(self) -> None:
        self.state = State.REVOKING
        self._show((), self._metadata)

    def _over(self, *, is_known: bool = True) -> None:
        """The session is over. Where the group may still know us we come back under our member id.

        Without one, a broker gives us the place of our instance id whoever has it: who was stopped for long would
        fence the process that was started in his stead, and not the other way round.
        """
        self.state = State.UNJOINED
        self.generation = -1
        if not is_known:
            self.member_id = ""
        self._end_life()


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
