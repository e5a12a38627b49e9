"""What the cluster and the databases hold, as rows for the listings of the command line."""

from __future__ import annotations

from typing import Any

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.env import Env
from semel.settings import Settings
from semel.types import TopicPartition

__all__ = ["TOOL_SETTINGS", "list_topics", "list_transactions", "tool_client"]


TOOL_SETTINGS = {"delivery.timeout.ms": 5_000}
"""A person waits at the terminal: a Kafka that is not there is said after seconds, not after half a minute."""


def tool_client(settings: Settings) -> KafkaClient:
    """A client for one command."""
    return KafkaClient(settings.kafka, settings={**settings.kafka_client, **TOOL_SETTINGS})


async def list_topics(settings: Settings) -> list[dict[str, Any]]:
    """One row a partition: log start, last stable offset, high watermark."""
    async with tool_client(settings) as client:
        admin = Admin(client)
        names = await admin.list_topics()
        partitions = [
            TopicPartition(name, number)
            for name in sorted(names)
            for number in range((await client.topic(name)).partitions)
        ]
        start = await admin.list_offsets(partitions, at="earliest")
        stable = await admin.list_offsets(partitions, at="stable")
        end = await admin.list_offsets(partitions, at="high_watermark")
    return [
        {"topic": at.topic, "partition": at.partition, "start": start[at], "stable": stable[at], "end": end[at]}
        for at in partitions
    ]


async def list_transactions(settings: Settings, states: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row a transactional id; the age is that of the open transaction, in seconds."""
    now_ms = Env().wall_ms()
    async with tool_client(settings) as client:
        admin = Admin(client)
        listed = await admin.list_transactions(states=list(states))
        details = await admin.describe_transactions([item.transactional_id for item in listed])
    return [
        {
            "transactional_id": item.transactional_id,
            "producer_id": item.producer_id,
            "producer_epoch": item.producer_epoch,
            "state": item.state,
            "age_seconds": round((now_ms - item.start_ms) / 1000, 1) if item.start_ms >= 0 else None,
            "partitions": len(item.partitions),
        }
        for item in details
    ]
