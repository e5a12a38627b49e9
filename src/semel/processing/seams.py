"""What the engine asks of Kafka: the client's classes, seen through the few methods that it calls.

`connect` makes the real ones; a simulation gives its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer, ConsumerEvents, Reader
from semel.client.producer import Producer
from semel.client.turns import ProducersInTurn
from semel.env import Env
from semel.errors import Fatal, Retriable
from semel.processing.component import Delivery
from semel.processing.plain import PlainProducer
from semel.settings import Settings
from semel.types import GroupMetadata, Record, TopicPartition
from semel.wire.records import BatchBuilder

__all__ = ["AdminSeam", "BatchSeam", "ConsumerSeam", "Kafka", "ProducerSeam", "ReaderSeam", "RealKafka"]

Offsets = Mapping[TopicPartition, int]


class BatchSeam(Protocol):
    """What a poll gives: records, and the positions at the ends of partitions that were reached."""

    @property
    def records(self) -> Sequence[Record]: ...
    @property
    def end_offsets(self) -> Offsets: ...


class ReaderSeam(Protocol):
    """Reads given partitions, committed records only, in no group."""

    async def start(self, offsets: Offsets) -> None: ...
    async def poll(self, max_records: int, timeout: float) -> BatchSeam: ...
    async def close(self) -> None: ...


class ConsumerSeam(Protocol):
    """Reads the partitions that the group gives us; see `ConsumerEvents` for what happens when that changes."""

    async def start(self) -> None: ...
    async def poll(self, max_records: int, timeout: float) -> BatchSeam: ...
    def group_metadata(self) -> GroupMetadata: ...
    async def seek(self, offsets: Offsets) -> None: ...
    async def pause(self, partitions: Sequence[TopicPartition]) -> None: ...
    async def resume(self, partitions: Sequence[TopicPartition]) -> None: ...
    async def close(self) -> None: ...


class ProducerSeam(Protocol):
    """The transactional producer."""

    @property
    def written(self) -> Offsets: ...
    async def init_transactions(self) -> None: ...
    async def check_owner(self) -> None: ...
    def begin(self) -> None: ...
    async def produce(self, topic: str, partition: int, batches: BatchBuilder) -> None: ...
    async def send_offsets(self, offsets: Offsets, group: GroupMetadata) -> None: ...
    async def end_transaction(self, commit: bool) -> None: ...
    async def abort(self) -> None: ...
    async def close(self) -> None: ...


class AdminSeam(Protocol):
    """Questions about positions."""

    async def committed_offsets(
        self, group: str, partitions: Sequence[TopicPartition], require_stable: bool = True
    ) -> Offsets: ...
    async def list_offsets(
        self, partitions: Sequence[TopicPartition], at: Literal["earliest", "latest", "stable", "high_watermark"]
    ) -> Offsets: ...
    async def topic_config(self, topic: str, name: str) -> str | None: ...


class Kafka(Protocol):
    """One connection to a cluster and what is made from it."""

    @property
    def admin(self) -> AdminSeam: ...
    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def partitions(self, topic: str) -> int: ...
    async def topic_identity(self, topic: str) -> str: ...
    def producer(self, transactional_id: str) -> ProducerSeam: ...
    def plain_producer(self, name: str, delivery: Delivery) -> ProducerSeam: ...
    def consumer(self, group: str, topics: Sequence[str], instance_id: str, events: ConsumerEvents) -> ConsumerSeam: ...
    def reader(self) -> ReaderSeam: ...


class RealKafka:
    """Kafka over the network."""

    def __init__(self, bootstrap: str, settings: Settings, env: Env, client_id: str) -> None:
        self._bootstrap = bootstrap
        self._settings = settings
        self.client = KafkaClient(bootstrap, client_id=client_id, env=env, settings=settings.kafka_client)
        self.admin: Any = Admin(self.client)

    def __repr__(self) -> str:
        return f"<RealKafka {self.client!r}>"

    async def start(self) -> None:
        """Connect. Raises `Retriable` when nobody answers for long."""
        await self.client.start()

    async def close(self) -> None:
        """Close every connection."""
        await self.client.close()

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has. Raises `Fatal` when there is no such topic."""
        return (await self.client.topic(topic)).partitions

    async def topic_identity(self, topic: str) -> str:
        """Cluster, name and id of a topic, as they are now. Raises `Retriable`, also when there is none yet."""
        await self.client.refresh_metadata(topic)
        try:
            found = await self.client.topic(topic, timeout=0)  # The answer that just came is the newest.
        except Fatal as error:
            raise Retriable(str(error)) from error
        return f"{self.client.cluster_id}/{found.name}/{found.topic_id}"

    def producer(self, transactional_id: str) -> ProducerSeam:
        """The producer of one identity, which has two transactional ids; nothing is sent yet."""
        return ProducersInTurn(
            self.client, transactional_id, transaction_timeout_ms=self._settings.transaction_timeout_ms
        )

    def plain_producer(self, name: str, delivery: Delivery) -> ProducerSeam:
        """A producer without transactions, which writes outputs and position in two steps."""
        return PlainProducer(name, Producer(self.client), self.admin, delivery)

    def consumer(self, group: str, topics: Sequence[str], instance_id: str, events: ConsumerEvents) -> ConsumerSeam:
        """A member of a group; it joins when it is started."""
        return Consumer(
            self._bootstrap,
            group=group,
            topics=list(topics),
            instance_id=instance_id,
            events=events,
            session_timeout_ms=self._settings.session_timeout_ms,
            settings=self._settings.kafka_client,
        )

    def reader(self) -> ReaderSeam:
        """A reader of partitions, in no group."""
        return Reader(self._bootstrap, settings=self._settings.kafka_client)
