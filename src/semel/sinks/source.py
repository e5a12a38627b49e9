"""What the sink engine asks of Kafka, in few methods; `RealSource` asks the real one, tests give their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer, ConsumerEvents
from semel.env import Env
from semel.settings import Settings
from semel.sinks.contract import Claim
from semel.types import GroupMetadata, Record, TopicPartition

__all__ = ["Bounds", "RealSource", "Source", "SourceBatch", "SourceConsumer"]


class Bounds(NamedTuple):
    """The first offset that a partition still has, and the one behind its last durable record."""

    start: int
    end: int


class SourceBatch(Protocol):
    """What a poll gives: records, and the positions at the ends of partitions that were reached."""

    @property
    def records(self) -> Sequence[Record]: ...
    @property
    def end_offsets(self) -> Mapping[TopicPartition, int]: ...


class SourceConsumer(Protocol):
    """A member of the sink's group; see `semel.client.consumer.Consumer`."""

    async def start(self) -> None: ...
    async def poll(self, max_records: int, timeout: float) -> SourceBatch: ...
    def group_metadata(self) -> GroupMetadata: ...
    async def seek(self, offsets: Mapping[TopicPartition, int]) -> None: ...
    async def pause(self, partitions: Sequence[TopicPartition]) -> None: ...
    async def resume(self, partitions: Sequence[TopicPartition]) -> None: ...
    async def close(self) -> None: ...


class Source(Protocol):
    """A cluster with the sink's topic."""

    @property
    def cluster_id(self) -> str: ...
    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def claims(self, partitions: Sequence[TopicPartition]) -> list[Claim]: ...
    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Bounds]: ...
    async def retention_ms(self) -> int | None: ...
    def consumer(self, events: ConsumerEvents) -> SourceConsumer: ...


class RealSource:
    """Kafka over the network. `member` is the identity in the group: stable, so that a restart is no rebalance."""

    def __init__(self, bootstrap: str, settings: Settings, env: Env, *, group: str, topic: str, member: str) -> None:
        self._bootstrap = bootstrap
        self._settings = settings
        self._group, self._topic, self._member = group, topic, member
        self._client = KafkaClient(bootstrap, client_id=member, env=env, settings=settings.kafka_client)
        self._admin = Admin(self._client)

    def __repr__(self) -> str:
        return f"<RealSource {self._member} {self._client!r}>"

    @property
    def cluster_id(self) -> str:
        """The cluster's own id; known after `start`."""
        return self._client.cluster_id

    async def start(self) -> None:
        """Connect. Raises `Retriable` when nobody answers for long."""
        await self._client.start()

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    async def claims(self, partitions: Sequence[TopicPartition]) -> list[Claim]:
        """What the cluster says about partitions, asked anew: a topic may have been deleted and made again."""
        await self._client.refresh_metadata(self._topic)
        topic = await self._client.topic(self._topic)
        starts = await self._admin.list_offsets(partitions, "earliest")
        return [Claim(partition, topic.topic_id, starts[partition], topic.partitions) for partition in partitions]

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Bounds]:
        """Where the logs begin and end now."""
        starts = await self._admin.list_offsets(partitions, "earliest")
        ends = await self._admin.list_offsets(partitions, "high_watermark")
        return {partition: Bounds(starts[partition], ends[partition]) for partition in partitions}

    async def retention_ms(self) -> int | None:
        """For how long the topic keeps records; -1 for ever, None when we may not see its settings."""
        policy = await self._admin.topic_config(self._topic, "cleanup.policy")
        if policy is not None and "delete" not in policy:
            return -1
        kept = await self._admin.topic_config(self._topic, "retention.ms")
        return None if kept is None else int(kept)

    def consumer(self, events: ConsumerEvents) -> SourceConsumer:
        """A member of the group; it joins when it is started."""
        return Consumer(
            self._bootstrap,
            group=self._group,
            topics=[self._topic],
            instance_id=self._member,
            events=events,
            session_timeout_ms=self._settings.session_timeout_ms,
            settings=self._settings.kafka_client,
        )
