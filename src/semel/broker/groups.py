"""The shell around the group coordinator: its records made durable before anybody hears of them, its clock, its waits.

Offsets of a transaction are staged in `__consumer_offsets`; when the transaction is decided, one more batch there lets
them count or drops them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from semel.broker.config import OFFSETS_RETENTION_MS, BrokerConfig
from semel.broker.dynamic_config import DynamicConfig
from semel.broker.exchange import Fields, Later, Outbox, Request
from semel.broker.internal import Change, InternalLog
from semel.broker.topics import Topics
from semel.coordinator.consumer_group import TopicShape
from semel.coordinator.group import GroupConfig, GroupCoordinator, JoinAnswer, JoinRequest, OffsetWrite, SyncAnswer
from semel.coordinator.heartbeat import GroupTimes, HeartbeatAnswer, HeartbeatRequest
from semel.env import Env
from semel.errors import ErrorCode
from semel.failpoints import failpoint
from semel.log.log import LogError
from semel.types import GroupMetadata

if TYPE_CHECKING:
    from semel.broker.node import Timer

__all__ = ["OFFSETS_TOPIC", "Groups"]

log = logging.getLogger("semel.broker")

OFFSETS_TOPIC = "__consumer_offsets"
_Render = Callable[[JoinAnswer | SyncAnswer], Fields]


class _Catalog:
    """The topics as groups see them."""

    def __init__(self, topics: Topics) -> None:
        self._topics = topics

    @property
    def version(self) -> int:
        return self._topics.version

    def shape(self, name: str, /) -> TopicShape | None:
        topic = self._topics.get(name)
        return None if topic is None else TopicShape(topic.info.topic_id.bytes, len(topic.partitions))

    def names(self) -> Iterable[str]:
        return (topic.info.name for topic in self._topics)


class Groups:
    """Requests about groups; a join or sync that has to wait becomes a `Later`."""

    def __init__(
        self,
        topics: Topics,
        config: BrokerConfig,
        settings: DynamicConfig,
        env: Env,
        call_later: Callable[[float, Callable[[], None]], Timer],
        outbox: Outbox,
    ) -> None:
        self._topics = topics
        self._env = env
        self._began_ms, self._began = env.wall_ms(), env.monotonic()
        self._call_later = call_later
        self._outbox = outbox
        self._timer: Timer | None = None
        self._waiting: dict[int, tuple[Later, _Render]] = {}
        self._unwritten: list[Change] = []
        self._log = InternalLog(topics, OFFSETS_TOPIC, lambda: self.coordinator.snapshot())
        self.coordinator = GroupCoordinator(
            new_member_id=lambda prefix: f"{prefix}-{env.new_id()}",
            config=GroupConfig(
                initial_rebalance_delay_ms=config.group_initial_rebalance_delay_ms,
                offsets_retention_ms=OFFSETS_RETENTION_MS,
            ),
            catalog=_Catalog(topics),
            times=lambda group_id: GroupTimes(
                settings.group_value(group_id, "consumer.session.timeout.ms"),
                settings.group_value(group_id, "consumer.heartbeat.interval.ms"),
            ),
        )
        topics.after_delete = lambda info: self._topic_deleted(info.name)

    def __repr__(self) -> str:
        return f"<Groups {self.coordinator!r}, {len(self._waiting)} requests waiting>"

    def now_ms(self) -> int:
        """The coordinator's time: the wall clock's at the start, and from then on what no change of that one moves.

        By the wall clock a step back would keep every rebalance waiting for as long, and a step on end every session.
        """
        return self._began_ms + round(1000 * (self._env.monotonic() - self._began))

    def open(self) -> None:
        """Read the log back; members that were there before have their session to come back."""
        now_ms = self.now_ms()
        for key, value in self._log.open():
            self.coordinator.replay(key, value, now_ms)
        for name in sorted(self.coordinator.topics_with_offsets()):
            if self._topics.get(name) is None:
                self.coordinator.drop_topic(name)  # A crash came between the topic's deletion and this.
        self.coordinator.resume(now_ms)
        self.settle(now_ms)

    def close(self) -> None:
        """Stop the clock. Waiting requests go with their connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- Membership ---

    def join(self, request: Request, join: JoinRequest, render: _Render) -> Later:
        """JoinGroup; the answer comes when everybody has joined."""
        return self._wait(request, self.coordinator.join(join, self.now_ms()), render)

    def sync(
        self,
        request: Request,
        identity: GroupMetadata,
        assignments: Mapping[str, bytes],
        protocol_type: str | None,
        protocol_name: str | None,
        render: _Render,
    ) -> Later:
        """SyncGroup; the answer comes when the leader has synced."""
        token = self.coordinator.sync(
            identity, assignments, self.now_ms(), protocol_type=protocol_type, protocol_name=protocol_name
        )
        return self._wait(request, token, render)

    def heartbeat_consumer(self, request: HeartbeatRequest, now_ms: int) -> HeartbeatAnswer:
        """ConsumerGroupHeartbeat; nobody hears of an epoch or an assignment that is not in the log."""
        answer = self.coordinator.heartbeat_consumer(request, now_ms)
        if self.coordinator.consumers.has_records or self._unwritten:
            self.settle(now_ms)
        if self._unwritten:
            text = f"{OFFSETS_TOPIC} cannot be written at the moment: ask again."
            return HeartbeatAnswer(ErrorCode.COORDINATOR_NOT_AVAILABLE, text)
        return answer

    def settle(self, now_ms: int) -> None:
        """After a call that changed a group: write, then answer those who may hear of it."""
        failpoint("broker.before_group")
        try:
            self._append([], now_ms)
        except LogError as error:
            # Nobody hears of a generation that is not in the log; the next sweep tries again.
            log.error("%s cannot be written, groups wait: %s", OFFSETS_TOPIC, error)
            return
        failpoint("broker.after_group")
        for token, answer in self.coordinator.drain():
            waiting = self._waiting.pop(token, None)
            if waiting is not None:
                later, render = waiting
                later.answer(render(answer))
        self._set_timer(now_ms)

    def _append(self, records: Sequence[Change], now_ms: int) -> None:
        """Write records behind those that could not be written before: the log has the order in which things happened.

        Raises `LogError` when nothing was written.
        """
        self._unwritten += self.coordinator.take_records()
        changes = [*self._unwritten, *records]
        if changes:
            self._log.append(changes, now_ms)
            self._unwritten = []

    def _wait(self, request: Request, token: int, render: _Render) -> Later:
        later = Later(self._outbox, request)
        later.abandon = lambda: self._abandon(token)
        self._waiting[token] = (later, render)
        self.settle(self.now_ms())
        return later

    def _abandon(self, token: int) -> None:
        if self._waiting.pop(token, None) is not None:
            now_ms = self.now_ms()
            self.coordinator.abandon(token, now_ms)
            self._set_timer(now_ms)

    # --- Offsets ---

    def write(self, write: OffsetWrite, now_ms: int) -> None:
        """Make a checked commit durable and let it count. Raises `LogError` when nothing was written."""
        if write.records:
            failpoint("broker.before_offsets")
            self._append(write.records, now_ms)
            self.coordinator.apply(write.records)
            failpoint("broker.after_offsets")

    def end_transaction(self, producer_id: int, commit: bool, now_ms: int) -> None:
        """Let the staged offsets of a decided transaction count, or drop them; a second call does nothing."""
        records = self.coordinator.end_transaction(producer_id, commit)
        if records:
            failpoint("broker.before_offsets_end")
            self._append(records, now_ms)
            self.coordinator.apply(records)

    def _topic_deleted(self, name: str) -> None:
        self.coordinator.drop_topic(name)
        self.settle(self.now_ms())

    # --- Time ---

    def sweep(self) -> None:
        """Expire offsets nobody uses, and go on with what could not be written."""
        now_ms = self.now_ms()
        self.coordinator.expire_offsets(now_ms)
        self.settle(now_ms)
        self._log.checkpoint_if_due(now_ms)

    def _set_timer(self, now_ms: int) -> None:
        deadline = self.coordinator.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._call_later(max(deadline - now_ms, 0) / 1000, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now_ms = self.now_ms()
        self.coordinator.tick(now_ms)
        self.settle(now_ms)
