"""How the engines of a test read: straight from the logs of the broker in this process, as its only worker.

Everything that is written goes through our clients and the broker's protocol, transactions included. What is read does
not: there is no group whose members could change, so every partition is ours and no session can end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from semel.broker.node import Node
from semel.broker.topics import Partition
from semel.client.consumer import Batch, ConsumerEvents
from semel.env import Env, comes
from semel.errors import Fatal
from semel.processing.seams import ConsumerSeam, ReaderSeam, RealKafka
from semel.processing.watermarks import Watermarks
from semel.settings import Settings
from semel.sinks.source import RealSource, SourceConsumer
from semel.testing.reading import read_log
from semel.types import GroupMetadata, TopicPartition

__all__ = ["Committed", "LocalConsumer", "LocalKafka", "LocalReader", "LocalSource"]

POLL_TAKES_SECONDS = 0.0005
"""So that time passes for whoever polls without waiting, too."""

GetNode = Callable[[], Node]
Joined = Callable[["LocalConsumer"], None]


class _Wake:
    """Waits for partitions to move (`semel.broker.topics.Waiter`)."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def wake(self) -> None:
        self.event.set()


class LocalReader:
    """Reads given partitions, committed records only."""

    def __init__(self, node: GetNode) -> None:
        self._node = node
        self._wake = _Wake()
        self._positions: dict[TopicPartition, int] = {}
        self._told: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._positions)} partitions>"

    async def start(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._put(offsets)

    async def seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._put(offsets)

    async def pause(self, partitions: Iterable[TopicPartition]) -> None:
        self._paused.update(partitions)

    async def resume(self, partitions: Iterable[TopicPartition]) -> None:
        self._paused.difference_update(partitions)
        self._wake.wake()

    async def poll(self, max_records: int, timeout: float) -> Batch:
        """Records that are there, or the first that come within `timeout` seconds."""
        if self._closed:
            raise Fatal("this consumer is closed")
        batch = self._take(max_records)
        if batch.records or batch.end_offsets:
            return batch
        if timeout <= 0:
            await asyncio.sleep(POLL_TAKES_SECONDS)
            return batch
        self._wake.event.clear()
        waiting = [self._partition(at) for at in self._positions]
        for partition in waiting:
            partition.waiters[self._wake] = None
        try:
            await comes(self._wake.event, timeout)
        finally:
            for partition in waiting:
                partition.waiters.pop(self._wake, None)
        return self._take(max_records)

    async def close(self) -> None:
        self._closed = True
        self._positions.clear()
        self._wake.wake()

    def _put(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._positions.update(offsets)
        for at in offsets:
            self._told.pop(at, None)
        self._wake.wake()

    def _partition(self, at: TopicPartition) -> Partition:
        topic = self._node().topics.get(at.topic)
        found = None if topic is None else topic.partition(at.partition)
        if found is None:
            raise Fatal(f"{at} is not there any more")
        return found

    def _take(self, max_records: int) -> Batch:
        batch = Batch([], {})
        for at, position in self._positions.items():
            if at in self._paused or len(batch.records) >= max_records:
                continue
            log = self._partition(at).log
            records, end = read_log(log, start=position, max_records=max_records - len(batch.records))
            self._positions[at] = end
            self._taken(at, records[-1].offset + 1 if records else None)
            batch.records.extend(records)
            if end >= log.last_stable_offset and self._told.get(at) != end:
                self._told[at] = end
                batch.end_offsets[at] = end
        return batch

    def _taken(self, at: TopicPartition, end: int | None) -> None:
        """Records up to `end` are handed out."""


class LocalConsumer(LocalReader):
    """The only member of a group."""

    def __init__(self, node: GetNode, group: str, topics: Sequence[str], events: ConsumerEvents) -> None:
        super().__init__(node)
        self.group = group
        self._topics = tuple(topics)
        self._events = events
        self._is_assigned = False
        self._handed: dict[TopicPartition, int] = {}

    async def start(self, offsets: Mapping[TopicPartition, int] | None = None) -> None:
        """Join; the partitions come with the first poll."""

    async def poll(self, max_records: int, timeout: float) -> Batch:
        if not self._is_assigned:
            self._is_assigned = True
            mine = [TopicPartition(name, number) for name in self._topics for number in range(len(self._found(name)))]
            self._put(await self._events.on_assigned(mine))
        return await super().poll(max_records, timeout)

    async def close(self) -> None:
        if not self._closed and self._positions:
            await self._events.on_revoked(list(self._positions))
        await super().close()

    def group_metadata(self) -> GroupMetadata:
        """No generation: the broker takes offsets of a group without members from whoever owns the transaction."""
        return GroupMetadata(self.group)

    def behind(
        self, committed: Callable[[TopicPartition], int | None], stopped: Collection[TopicPartition]
    ) -> dict[TopicPartition, int]:
        """Partitions with work left, and how many offsets that is at most.

        What has stopped counts as done; what is only paused, while a target is away, does not.
        """
        if not self._is_assigned:
            return {TopicPartition(name, -1): 0 for name in self._topics}
        found = {}
        for at, position in self._positions.items():
            if at in stopped:
                continue
            left = self._partition(at).log.high_watermark - position
            handed, done = self._handed.get(at), committed(at)
            if handed is not None and (done is None or done < handed):
                left += handed - (done or 0)
            if left > 0:
                found[at] = left
        return found

    def _put(self, offsets: Mapping[TopicPartition, int]) -> None:
        for at in offsets:
            self._handed.pop(at, None)
        super()._put(offsets)

    def _taken(self, at: TopicPartition, end: int | None) -> None:
        if end is not None:
            self._handed[at] = end

    def _found(self, name: str) -> list[Partition]:
        topic = self._node().topics.get(name)
        if topic is None:
            raise Fatal(f"topic {name} is not there")
        return topic.partitions


class LocalKafka(RealKafka):
    """What an engine asks of Kafka: the real clients, except for reading."""

    def __init__(self, node: GetNode, joined: Joined, settings: Settings, env: Env, client_id: str) -> None:
        super().__init__(settings.kafka, settings, env, client_id)
        self._node = node
        self._joined = joined

    def consumer(self, group: str, topics: Sequence[str], instance_id: str, events: ConsumerEvents) -> ConsumerSeam:  # noqa: ARG002
        consumer = LocalConsumer(self._node, group, topics, events)
        self._joined(consumer)
        return consumer

    def reader(self) -> ReaderSeam:
        return LocalReader(self._node)


class LocalSource(RealSource):
    """The same for a sink."""

    def __init__(
        self, node: GetNode, joined: Joined, settings: Settings, env: Env, *, group: str, topic: str, member: str
    ) -> None:
        super().__init__(settings.kafka, settings, env, group=group, topic=topic, member=member)
        self._node = node
        self._joined = joined

    def consumer(self, events: ConsumerEvents) -> SourceConsumer:
        consumer = LocalConsumer(self._node, self._group, [self._topic], events)
        self._joined(consumer)
        return consumer


class Committed(Watermarks):
    """What the engines have committed, as they note it."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: dict[tuple[str, str, int], int] = {}

    def note(self, group: str, topic: str, partition: int, offset: int) -> None:
        super().note(group, topic, partition, offset)
        name = topic.split("/")[1]  # The identity is cluster, name and id: see `Kafka.topic_identity`.
        self._latest[group, name, partition] = offset

    def of(self, group: str, at: TopicPartition) -> int | None:
        """The group's committed offset, if it was this process that committed."""
        return self._latest.get((group, at.topic, at.partition))
