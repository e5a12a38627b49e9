"""Operators' decisions on record: who, when, what, why, in the topic `<app>.semel.audit`, for ever.

A topic rather than a table: what is decided about Kafka's transactions may have no database, or one that is away, and
an app has one place for all decisions of operators. `asked` is written, and acknowledged by Kafka, before anything is
changed; `done` or `failed` behind it. So a decision whose command died half-way is there, too: asked, and without an
end. No verb changes or deletes these records. They are no part of a transaction: one that is stuck cannot hide them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.idempotent import Producer
from semel.wire.records import BatchBuilder

__all__ = ["AuditLog", "Decided", "audit_topic", "auditing"]


def audit_topic(app: str) -> str:
    """Where operators' decisions stand, for ever: one partition, JSON. Without an app that of the whole cluster."""
    return f"{app}.semel.audit" if app else "semel.audit"


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the audit topic: `asked` before the change, `done` or `failed` behind it. What it is about, and
    what came of it, each verb says in its own way."""

    id: str
    state: str
    by: str
    reason: str
    at_ms: int


class AuditLog:
    """Writes decisions; each is acknowledged when `write` returns."""

    def __init__(self, producer: Producer, topic: str) -> None:
        self._producer, self.topic = producer, topic

    async def write(self, key: str, decision: Decided, at_ms: int) -> None:
        """Append one decision as JSON."""
        batch = BatchBuilder()
        batch.append(key.encode(), msgspec.json.encode(decision), at_ms, ())
        await self._producer.send_batch(self.topic, 0, batch)


@asynccontextmanager
async def auditing(client: KafkaClient, app: str) -> AsyncIterator[AuditLog]:
    """The audit log of an app; its topic is made where it is not there."""
    await Admin(client).create_topics({audit_topic(app): TopicSpec(1, {"retention.ms": "-1"})})
    producer = Producer(client)
    await producer.start()
    try:
        yield AuditLog(producer, audit_topic(app))
    finally:
        await producer.close()
