"""What the cluster and the databases hold, as rows for the listings of the command line."""

from __future__ import annotations

from typing import Any

from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.env import Env
from semel.ingress.requests import requests_topic
from semel.ops.databases import parked_in_database
from semel.processing import parking
from semel.processing.component import park_topic
from semel.settings import Settings
from semel.types import Record, TopicPartition

__all__ = ["TOOL_SETTINGS", "list_parked", "list_topics", "list_transactions", "tool_client"]


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


async def list_parked(app: App, settings: Settings) -> list[dict[str, Any]]:
    """Parked records of every sink (from its database) and every processor (from its park topic)."""
    rows: list[dict[str, Any]] = []
    for url in sorted({sink.database.url for sink in app.sinks.values()}):
        rows += parked_in_database(url)
    if settings.kafka:
        inputs = {processor.topic.name for processor in app.processors.values()} | {requests_topic(app.name)}
        topics = {park_topic(app.name, topic) for topic in inputs}
        rows += await _parked_in_topics(settings, sorted(topics))
    return rows


async def _parked_in_topics(settings: Settings, topics: list[str]) -> list[dict[str, Any]]:
    async with tool_client(settings) as client:
        admin = Admin(client)
        there = [topic for topic in topics if topic in await admin.list_topics()]
        partitions = [
            TopicPartition(topic, number) for topic in there for number in range((await client.topic(topic)).partitions)
        ]
        ends = await admin.list_offsets(partitions, at="stable")
    reader = Reader(settings.kafka, settings=settings.kafka_client)
    await reader.start(dict.fromkeys(ends, 0))
    waiting = {at for at, end in ends.items() if end > 0}
    rows: list[dict[str, Any]] = []
    try:
        while waiting:
            batch = await reader.poll(1_000, 1.0)
            rows += [_parked_row(record) for record in batch.records]
            waiting -= {at for at, position in batch.end_offsets.items() if at in ends and position >= ends[at]}
    finally:
        await reader.close()
    return rows


def _parked_row(record: Record) -> dict[str, Any]:
    headers = {name: (value or b"").decode(errors="replace") for name, value in record.headers}
    position, _, offset = headers.get(parking.POSITION, "").rpartition("@")
    topic, _, partition = position.rpartition("-")
    return {
        "component": headers.get(parking.COMPONENT),
        "topic": topic,
        "partition": int(partition or -1),
        "offset": int(offset or -1),
        "key": None if record.key is None else record.key.decode(errors="replace"),
        "error": headers.get(parking.ERROR, "waits behind an earlier record of its key"),
        "message": headers.get(parking.MESSAGE, ""),
    }
