"""The gateway's way to the log over Kafka: our idempotent producer, and a reader of the reply partition."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from semel import history
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.client.producer import Producer
from semel.env import Env
from semel.errors import ConfigurationError, ErrorCode, Fatal, OutcomeUnknown, SemelError
from semel.failpoints import failpoint
from semel.history import PROOF, Outcome, Send
from semel.ingress.requests import STORE, requests_topic, responses_topic
from semel.processing.component import state_topic
from semel.processing.seams import ReaderSeam
from semel.types import Record, TopicPartition
from semel.wire.partitioner import partition_for

__all__ = ["KafkaLink", "ensure_topics", "topic_specs"]

log = logging.getLogger("semel.ingress")

RESPONSES_RETENTION_MS = 10 * 60_000
"""Nobody reads a reply later than an HTTP request waits; Kafka deletes by segment, so it is kept short, not minimal."""
DELIVERY_TIMEOUT_MS = 5_000
"""An append is given up after this: as long as a request waits for its answer by default."""
SOCKET_TIMEOUT_MS = 4_000
"""A broker that is silent this long is connected to again, so an append's fate is known soon after its time is over."""
REPLIES_MAX = 2_000
POLL_SECONDS = 0.5


SEGMENT_BYTES = 64 * 1024 * 1024
"""Kafka deletes whole segments only, and not the one that is written to."""
REQUEST_BYTES_MAX = 1_048_588
"""Kafka's default, said here because a cluster may have another: the largest body and its record fit in twice."""
_ABOUT_THE_RECORD = frozenset(
    {
        ErrorCode.MESSAGE_TOO_LARGE,
        ErrorCode.RECORD_LIST_TOO_LARGE,
        ErrorCode.INVALID_RECORD,
        ErrorCode.INVALID_TIMESTAMP,
    }
)
"""Errors that say nothing about the next record."""


class FoundRoute(NamedTuple):
    """See `gateway.Route`."""

    partitions: int
    reply_partition: int


def topic_specs(app: str, partitions: int) -> dict[str, TopicSpec]:
    """The topics of an app's ingress. Requests are stamped by the broker, because expiry goes by its time.

    They never expire by themselves: what was answered is deleted (`ingress/purge.py`), what was not must stay.
    """
    return {
        requests_topic(app): TopicSpec(
            partitions,
            {
                "message.timestamp.type": "LogAppendTime",
                "retention.ms": "-1",
                "retention.bytes": "-1",
                "segment.bytes": str(SEGMENT_BYTES),
                "max.message.bytes": str(REQUEST_BYTES_MAX),
            },
        ),
        responses_topic(app): TopicSpec(
            partitions, {"retention.ms": str(RESPONSES_RETENTION_MS), "segment.bytes": str(SEGMENT_BYTES)}
        ),
    }


async def ensure_topics(admin: Admin, app: str, partitions: int) -> None:
    """Make the ingress' topics where they are missing. Raises `ConfigurationError` when a partition count was changed.

    A retry that met another partition would find no stored response and run twice, so the count is for ever; the
    changelog of the responses, made with as many, remembers it too.
    """
    topic = requests_topic(app)
    existing = await admin.list_topics()
    for name in (topic, state_topic(app, STORE)):
        found = existing[name].partitions if name in existing else partitions
        if found != partitions:
            raise ConfigurationError(
                f"PARTITIONS_CHANGED: {name} has {found} partitions and the app asks for {partitions}. A retry would "
                f"meet an owner without its stored response and run twice. Give the app request_partitions={found}; to "
                "have more, drain it, wait a day for the retries, and rename it or delete its semel topics."
            )
    await admin.create_topics(topic_specs(app, partitions))


class KafkaLink:
    """See `gateway.Link`."""

    def __init__(
        self, app: str, bootstrap: str, partitions: int, env: Env, client_settings: Mapping[str, object] | None = None
    ) -> None:
        if not bootstrap:
            raise ConfigurationError("the ingress needs a Kafka address: set SEMEL_KAFKA=host:port.")
        self._app = app
        self._bootstrap = bootstrap
        self._partitions = partitions
        self._env = env
        self._client_settings = dict(client_settings or {})
        self._requests = requests_topic(app)
        self._client: KafkaClient | None = None
        self._producer: Producer | None = None
        self._reader: ReaderSeam | None = None
        self._failure: Fatal | None = None

    def __repr__(self) -> str:
        return f"<KafkaLink {self._requests} at {self._bootstrap} [{'open' if self._reader else 'closed'}]>"

    async def open(self, instance: bytes) -> FoundRoute:
        """Make and check the topics, get a producer id, and read to the end of the reply partition."""
        own = {"delivery.timeout.ms": DELIVERY_TIMEOUT_MS, "socket.timeout.ms": SOCKET_TIMEOUT_MS}
        settings = self._client_settings | own
        client = self._client = KafkaClient(
            self._bootstrap, client_id=f"{self._app}.ingress", env=self._env, settings=settings
        )
        await client.start()
        admin = Admin(client)
        await ensure_topics(admin, self._app, self._partitions)
        failpoint("ingress.topics_made")
        await client.topic(self._requests)
        responses = await client.topic(responses_topic(self._app))
        self._producer = Producer(client)
        await self._producer.start()
        at = TopicPartition(responses.name, partition_for(instance, responses.partitions))
        end = (await admin.list_offsets([at], at="stable"))[at]
        reader = self._make_reader()
        await reader.start({at: end})
        self._reader = reader
        failpoint("ingress.before_open")
        while at not in (await reader.poll(REPLIES_MAX, POLL_SECONDS)).end_offsets:
            continue  # What is read before the end was reached is for instances of the past.
        return FoundRoute(self._partitions, at.partition)

    def _make_reader(self) -> ReaderSeam:
        """Reads the replies."""
        return Reader(self._bootstrap, settings=self._client_settings)

    async def append(self, partition: int, key: bytes, value: bytes) -> None:
        """Append to the requests topic."""
        assert self._producer is not None
        attempt = history.attempt()
        try:
            if attempt:
                await self._append_told(attempt, partition, key, value)
            else:
                await self._producer.send(self._requests, partition, key, value)
        except Fatal as error:
            if error.code not in _ABOUT_THE_RECORD:
                self._failure = error
            raise

    async def _append_told(self, attempt: str, partition: int, key: bytes, value: bytes) -> None:
        """Append, with a history: it knows of the attempt before, and of the outcome after."""
        assert self._producer is not None
        history.note(Send(type="invoke", a=attempt, id=attempt, topic=self._requests))
        headers = ((PROOF, attempt.encode()),)
        try:
            written = await self._producer.send(self._requests, partition, key, value, headers)
        except SemelError as error:
            history.note(Send(type="info" if isinstance(error, OutcomeUnknown) else "fail", a=attempt))
            raise
        # Without an offset nobody knows where it stands, so nobody could look whether it does.
        outcome: Outcome = "ok" if written.offset >= 0 else "info"
        done = Send(type=outcome, a=attempt, topic=self._requests, partition=partition, offset=written.offset)
        history.note(done)

    async def replies(self) -> Sequence[Record]:
        """The next records of the reply partition. Raises what the producer can never recover from, too."""
        assert self._reader is not None
        if self._failure is not None:
            raise self._failure
        return (await self._reader.poll(REPLIES_MAX, POLL_SECONDS)).records

    async def probe(self) -> None:
        """Ask the cluster where the requests topic is."""
        assert self._client is not None
        await self._client.refresh_metadata(self._requests)

    async def close(self) -> None:
        """Give everything back."""
        reader, producer, client = self._reader, self._producer, self._client
        self._reader = self._producer = self._client = self._failure = None
        for part in (reader, producer, client):
            if part is not None:
                with suppress(SemelError):
                    await part.close()
