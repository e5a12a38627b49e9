"""The relay's half of Kafka: topics and their limits, manifests, and transactions of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer, ConsumerEvents, Reader
from semel.client.producer import TransactionalProducer
from semel.env import Env
from semel.errors import Fatal
from semel.failpoints import failpoint
from semel.outbox.limits import MANIFEST_TOPIC, TRANSACTION_SECONDS
from semel.outbox.manifest import Manifest, manifest_key
from semel.outbox.rows import MSG_ID_HEADER, OutboxRow, decode_headers
from semel.processing.limits import BATCH_BYTES_MAX
from semel.settings import Settings
from semel.types import Header, Record, TopicPartition
from semel.wire.partitioner import partition_for
from semel.wire.pycodec import Output
from semel.wire.records import BATCH_OVERHEAD, BatchBuilder, encode_batches

__all__ = ["Link", "Positions", "TopicLimits", "manifest_topic", "record_headers"]

_POLL_RECORDS = 5_000
_POLL_SECONDS = 0.5
_TOPIC_SECONDS = 1.0
"""How long a topic that nobody knows is looked for: it may have been made a moment ago."""


def manifest_topic(app: str) -> str:
    """The topic of an app's manifests; partition = lane."""
    return f"{app}.semel.outbox"


def record_headers(row: OutboxRow) -> tuple[Header, ...]:
    """The headers of a row's record. Raises `ValueError` when those of the row cannot be read."""
    own = (MSG_ID_HEADER, row.msg_id.encode())
    return (own,) if row.headers == "[]" else (*decode_headers(row.headers), own)


class TopicLimits(NamedTuple):
    """What a topic takes."""

    partitions: int
    bytes_max: int


class Positions:
    """How far a lane wrote its topics, as it is kept in the database: where a comparison with them has to begin.

    A topic that was made anew has another id, and is read from its beginning.
    """

    def __init__(self, text: str | None) -> None:
        self._offsets: dict[str, int] = {} if text is None else msgspec.json.decode(text, type=dict[str, int])

    def __repr__(self) -> str:
        return f"<Positions of {len(self._offsets)} partitions>"

    def note(self, topic_id: object, partition: int, offset: int) -> None:
        """The lane's records of this partition end at `offset`."""
        self._offsets[f"{topic_id}/{partition}"] = offset

    def get(self, topic_id: object, partition: int) -> int | None:
        """What was noted last."""
        return self._offsets.get(f"{topic_id}/{partition}")

    def encode(self) -> str:
        """The text for the database."""
        return msgspec.json.encode(self._offsets).decode()


class Link:
    """One cluster."""

    def __init__(self, app: str, bootstrap: str, settings: Settings, env: Env, member: str) -> None:
        self._bootstrap = bootstrap
        self._settings = settings
        self._member = member
        self._env = env
        self._client = KafkaClient(bootstrap, client_id=member, env=env, settings=settings.kafka_client)
        self._admin = Admin(self._client)
        self._limits: dict[str, TopicLimits] = {}
        self.manifests = manifest_topic(app)

    def __repr__(self) -> str:
        return f"<Link {self._member} {self._client!r}>"

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

    async def prepare(self, lanes: int) -> None:
        """Make the manifest topic. Raises `ConfigurationError` when it is there with another number of partitions."""
        await self._admin.create_topics({self.manifests: TopicSpec(lanes, MANIFEST_TOPIC)})

    def consumer(self, group: str, events: ConsumerEvents) -> Consumer:
        """A member of the group that shares the lanes out."""
        return Consumer(
            self._bootstrap,
            group=group,
            topics=[self.manifests],
            instance_id=self._member,
            events=events,
            session_timeout_ms=self._settings.session_timeout_ms,
            settings=self._settings.kafka_client,
        )

    def producer(self, transactional_id: str) -> TransactionalProducer:
        """A producer that holds no transaction open for long."""
        milliseconds = int(TRANSACTION_SECONDS * 1000)
        return TransactionalProducer(
            self._client,
            transactional_id,
            transaction_timeout_ms=min(milliseconds, self._settings.transaction_timeout_ms),
            delivery_timeout_ms=milliseconds,
        )

    # --- Topics ---

    async def limits(self, topic: str) -> TopicLimits | None:
        """What a topic takes; None when there is none of that name, or none that we may know of.

        Raises `Retriable` when nobody answers.
        """
        found = self._limits.get(topic)
        if found is None:
            try:
                partitions = (await self._client.topic(topic, timeout=_TOPIC_SECONDS)).partitions
            except Fatal:
                return None
            text = await self._admin.topic_config(topic, "max.message.bytes")
            found = self._limits[topic] = TopicLimits(partitions, int(text or 1_048_588))
        return found

    def forget(self, topic: str) -> None:
        """Ask anew about a topic."""
        self._limits.pop(topic, None)
        self._client.invalidate(topic=topic)

    async def ends(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """The high watermarks: behind all that was acknowledged until now."""
        return await self._admin.list_offsets(partitions, "high_watermark")

    async def starts(
        self, partitions: Sequence[TopicPartition], positions: Mapping[TopicPartition, Sequence[Positions]]
    ) -> tuple[dict[TopicPartition, int], set[TopicPartition]]:
        """Where to begin to read: at the lowest position of the partition's lanes, or where its log begins.

        Also the partitions whose log ends below such a position: they lost records.
        """
        earliest = await self._admin.list_offsets(partitions, "earliest")
        ends = await self.ends(partitions)
        starts, lost = dict(earliest), set()
        for at in partitions:
            topic_id = (await self._client.topic(at.topic)).topic_id
            noted = [item.get(topic_id, at.partition) for item in positions[at]]
            known = [offset for offset in noted if offset is not None]
            if any(offset > ends[at] for offset in known):
                lost.add(at)
            elif known and len(known) == len(noted):
                starts[at] = max(earliest[at], min(known))
        return starts, lost

    async def read(
        self,
        starts: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        take: Callable[[Record], None],
    ) -> None:
        """Every committed record from `starts` up to `ends`, waiting for transactions that are open in between.

        Reading on to the last stable offset would not do: another lane's open transaction may hold it below what is
        looked for.
        """
        missing = {at for at, start in starts.items() if start < ends[at]}
        if not missing:
            return
        reader = Reader(self._bootstrap, settings=self._settings.kafka_client)
        try:
            await reader.start({at: starts[at] for at in missing})
            while missing:
                batch = await reader.poll(_POLL_RECORDS, _POLL_SECONDS)
                failpoint("outbox.between_polls")
                reached = dict(batch.end_offsets)
                for record in batch.records:
                    at = TopicPartition(record.topic, record.partition)
                    reached[at] = max(reached.get(at, 0), record.offset + 1)
                    if record.offset < ends[at]:
                        take(record)
                missing -= {at for at, offset in reached.items() if offset >= ends[at]}
        finally:
            await reader.close()

    # --- Transactions ---

    async def write(
        self, producer: TransactionalProducer, rows: Sequence[OutboxRow], manifest: Manifest, positions: Positions
    ) -> None:
        """One transaction: the rows' records and the manifest. Raises what the producer raises.

        `positions` is what it was before, unless this returns.
        """
        now = self._env.wall_ms()
        by_topic: dict[str, list[Output]] = defaultdict(list)
        for row in rows:
            key, own_partition = row.key, None
            if key is None:
                own_partition = partition_for(row.msg_id.encode(), self._limits[row.topic].partitions)
            by_topic[row.topic].append((own_partition, key, row.value, now, record_headers(row)))
        own = BatchBuilder()
        own.append(manifest_key(manifest.database_id, manifest.lane), manifest.encode(), now)
        failpoint("outbox.before_begin")
        producer.begin()
        for topic, outputs in by_topic.items():
            limits = self._limits[topic]
            limit = min(BATCH_BYTES_MAX, limits.bytes_max)
            for partition, builder in encode_batches(outputs, limits.partitions, limit):
                await producer.produce(topic, partition, builder)
        failpoint("outbox.before_manifest")
        await producer.produce(self.manifests, manifest.lane, own)
        failpoint("outbox.before_commit")
        await producer.end_transaction(commit=True)
        failpoint("outbox.after_commit")
        for at, offset in producer.written.items():
            known = self._client.known_topic(at.topic)
            if known is not None:
                positions.note(known.topic_id, at.partition, offset)

    def fits(self, row: OutboxRow, limits: TopicLimits) -> str:
        """Why a row's record can never be written; empty when it can."""
        try:
            headers = record_headers(row)
        except ValueError as error:
            return str(error)
        size = (
            len(row.key or b"") + len(row.value or b"") + sum(len(name) + len(value or b"") for name, value in headers)
        )
        if size + BATCH_OVERHEAD > limits.bytes_max:
            return f"the record has {size} bytes, and topic {row.topic} takes batches of {limits.bytes_max}"
        return ""
