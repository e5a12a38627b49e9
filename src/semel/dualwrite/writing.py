"""The records of one transaction on their way into Kafka: checked, cut into batches, prepared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.client.two_phase import PreparedState
from semel.errors import AbortTransaction, Fatal, OutcomeUnknown, Retriable
from semel.failpoints import failpoint
from semel.processing.limits import BATCH_BYTES_MAX
from semel.types import Header
from semel.wire.partitioner import partition_for
from semel.wire.pycodec import Output
from semel.wire.records import BATCH_OVERHEAD, encode_batches

__all__ = ["Outgoing", "Writing"]

_TOPIC_SECONDS = 1.0
"""How long a topic that nobody knows is looked for: it may have been made a moment ago."""
_MESSAGE_BYTES = 1_048_588
"""Kafka's default of max.message.bytes, for a topic whose settings we may not see."""


class Outgoing(NamedTuple):
    """A record that a transaction sends. `msg_id` chooses the partition of a record without a key."""

    topic: str
    msg_id: str
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]
    timestamp_ms: int

    @property
    def size(self) -> int:
        """Its bytes, as good as."""
        headers = sum(len(name) + len(value or b"") for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + headers


class _Topic(NamedTuple):
    partitions: int
    bytes_max: int


class Writing:
    """Writes under any producer of one client. `codecs` says how the batches of a topic are compressed."""

    def __init__(self, client: KafkaClient, codecs: Mapping[str, int]) -> None:
        self._client = client
        self._codecs = codecs
        self._bytes_max: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Writing to {', '.join(self._bytes_max) or 'no topic yet'}>"

    async def prepare(self, producer: TransactionalProducer, records: Sequence[Outgoing]) -> PreparedState:
        """A transaction of these records, prepared: Kafka has all of them, and promised to keep it open.

        Raises `Retriable` while Kafka does not answer, `Fatal` for records that it refuses, `Fenced`. Whatever it
        raises, nothing is committed; what it began is open and has to be ended.
        """
        topics = {name: await self._topic(name) for name in dict.fromkeys(record.topic for record in records)}
        by_topic: dict[str, list[Output]] = defaultdict(list)
        for record in records:
            topic = topics[record.topic]
            if record.size + BATCH_OVERHEAD > topic.bytes_max:
                raise Fatal(
                    f"a record for topic {record.topic} (id {record.msg_id}) has {record.size} bytes, and the topic "
                    f"takes batches of {topic.bytes_max} (max.message.bytes). Nothing was committed."
                )
            partition = None if record.key is not None else partition_for(record.msg_id.encode(), topic.partitions)
            by_topic[record.topic].append((partition, record.key, record.value, record.timestamp_ms, record.headers))
        producer.begin()
        try:
            for name, outputs in by_topic.items():
                topic = topics[name]
                limit = min(BATCH_BYTES_MAX, topic.bytes_max)
                for partition, batch in encode_batches(outputs, topic.partitions, limit, self._codecs.get(name, 0)):
                    await producer.produce(name, partition, batch)
            failpoint("dual.before_prepare")
            prepared = await producer.prepare()
        except AbortTransaction as error:
            for name in by_topic:
                self._bytes_max.pop(name, None)  # Its limit may be another one by now.
            if error.code is None:
                raise Retriable(f"Kafka did not take the records in time, nothing was committed: {error}") from error
            raise Fatal(f"Kafka refuses the records, nothing was committed: {error}") from error
        failpoint("dual.after_prepare")
        return prepared

    async def _topic(self, name: str) -> _Topic:
        try:
            partitions = (await self._client.topic(name, timeout=_TOPIC_SECONDS)).partitions
            if name not in self._bytes_max:
                text = await Admin(self._client).topic_config(name, "max.message.bytes")
                self._bytes_max[name] = int(text or _MESSAGE_BYTES)
        except OutcomeUnknown as error:
            raise Retriable(f"Kafka does not answer, nothing was committed: {error}") from error
        return _Topic(partitions, self._bytes_max[name])
