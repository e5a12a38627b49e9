"""A shell around consumer groups for tests: a catalog of topics, a clock, and a log that can be replayed."""

from __future__ import annotations

from itertools import count

from semel.coordinator.assignors import Part
from semel.coordinator.consumer_group import ConsumerGroup, TopicShape
from semel.coordinator.fields import LogRecord
from semel.coordinator.group import GroupCoordinator, OffsetCommit
from semel.coordinator.heartbeat import GroupTimes, HeartbeatAnswer, HeartbeatRequest
from semel.errors import ErrorCode
from semel.types import GroupMetadata, TopicPartition

SESSION_MS, REVOKE_MS = 45_000, 60_000


class Catalog:
    """Topics that a test makes as it goes."""

    def __init__(self, **topics: int) -> None:
        self.version = 0
        self._ids = count(1)
        self.shapes: dict[str, TopicShape] = {}
        for name, partitions in topics.items():
            self.put(name, partitions)

    def put(self, name: str, partitions: int) -> None:
        """Make a topic, or give it more partitions."""
        known = self.shapes.get(name)
        topic_id = known.topic_id if known is not None else next(self._ids).to_bytes(16, "big")
        self.shapes[name] = TopicShape(topic_id, partitions)
        self.version += 1

    def drop(self, name: str) -> None:
        del self.shapes[name]
        self.version += 1

    def shape(self, name: str, /) -> TopicShape | None:
        return self.shapes.get(name)

    def names(self) -> list[str]:
        return list(self.shapes)

    def parts(self, name: str, *indexes: int) -> frozenset[Part]:
        shape = self.shapes[name]
        return frozenset((shape.topic_id, index) for index in (indexes or range(shape.partitions)))


class Consumers:
    """One coordinator; group `g` unless said otherwise."""

    def __init__(self, **topics: int) -> None:
        self.catalog = Catalog(**topics)
        self.now = 1_000
        self.log: list[LogRecord] = []
        self._ids = count(1)
        self.coordinator = self._coordinator()

    def _coordinator(self) -> GroupCoordinator:
        return GroupCoordinator(
            new_member_id=lambda prefix: f"{prefix}-{next(self._ids)}",
            catalog=self.catalog,
            times=lambda _: GroupTimes(SESSION_MS, 5_000),
        )

    def restart(self) -> None:
        """Forget everything that is not in the log."""
        self.coordinator = self._coordinator()
        for key, value in self.log:
            self.coordinator.replay(key, value, self.now)
        self.coordinator.resume(self.now)

    def checkpoint(self) -> None:
        """The log is only what rebuilds the present state."""
        self.log = list(self.coordinator.snapshot())

    def settle(self) -> None:
        self.log += self.coordinator.take_records()

    def sleep(self, ms: int) -> None:
        end = self.now + ms
        while (deadline := self.coordinator.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.coordinator.tick(self.now)
            self.settle()
        self.now = end

    @property
    def group(self) -> ConsumerGroup:
        return self.coordinator.consumers.groups["g"]

    def heartbeat(
        self,
        member: str,
        epoch: int,
        *,
        group: str = "g",
        instance: str | None = None,
        rebalance: int = -1,
        topics: tuple[str, ...] | None = None,
        pattern: str | None = None,
        assignor: str | None = None,
        owned: frozenset[Part] | None = None,
        version: int = 1,
    ) -> HeartbeatAnswer:
        request = HeartbeatRequest(
            *(group, member, epoch, instance, None, rebalance, topics, pattern, assignor, owned, "c", "/h", version)
        )
        answer = self.coordinator.heartbeat_consumer(request, self.now)
        self.settle()
        return answer

    def join(self, member: str, *topics: str, **options: object) -> HeartbeatAnswer:
        wanted = {"topics": topics or ("t",), "rebalance": REVOKE_MS, "owned": frozenset[Part]()} | options
        return self.heartbeat(member, 0, **wanted)  # type: ignore[arg-type]

    def converge(self) -> None:
        """Every member does what it is told until there is nothing more to do."""
        for _ in range(2 * len(self.group.members) + 2):
            for member in list(self.group.members.values()):
                current, instance = member.current, member.about.instance_id
                owned = frozenset(current.assigned)
                answer = self.heartbeat(member.member_id, current.epoch, instance=instance, owned=owned)
                assert answer.error is ErrorCode.NONE, answer
        assert self.group.state == "Stable"

    def commit(self, member: str, epoch: int, partition: int = 0, *, version: int = 9, topic: str = "t") -> ErrorCode:
        where = TopicPartition(topic, partition)
        write = self.coordinator.commit_offsets(
            GroupMetadata("g", epoch, member), {where: OffsetCommit(5)}, self.now, version
        )
        self.log += write.records
        self.coordinator.apply(write.records)
        return write.errors[where]
