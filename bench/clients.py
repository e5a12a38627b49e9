"""Workloads through whole clients: librdkafka (confluent-kafka) and our own producer."""

from __future__ import annotations

import os
import time
import uuid

from confluent_kafka import Consumer, Producer, TopicPartition
from tests.processing.running import cluster

from semel.client.producer import TransactionalProducer
from semel.client.turns import ProducersInTurn
from semel.types import GroupMetadata
from semel.types import TopicPartition as Partition
from semel.wire.records import BatchBuilder

__all__ = ["own_transactions", "rdkafka_consume", "rdkafka_produce", "rdkafka_transactions"]

KEYS = 10_000
PARTITIONS = 4


def rdkafka_produce(bootstrap: str, topic: str, records: int, size: int = 1024) -> float:
    """Idempotent, acks=all, linger 5 ms; records per second."""
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "linger.ms": 5,
            "queue.buffering.max.messages": 200_000,
        }
    )
    value = os.urandom(size // 2) * 2
    batch = [{"value": value, "key": b"k%d" % number} for number in range(KEYS)]
    began = time.monotonic()
    for _ in range(records // KEYS):
        todo = batch
        while todo:
            while len(producer) + len(todo) > 200_000:
                producer.poll(0.005)
            sent = producer.produce_batch(topic, todo)
            todo = todo[sent:]
    left = producer.flush(120)
    assert left == 0, f"{left} records were not acknowledged"
    return records / (time.monotonic() - began)


def rdkafka_consume(bootstrap: str, topic: str, records: int) -> float:
    """read_committed, from the first record on; records per second after the first came."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "bench",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 5,
        }
    )
    consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    first = got = len(consumer.consume(1, 30))
    began = time.monotonic()
    while got < records:
        got += len(consumer.consume(10_000, 0.2))
        assert time.monotonic() - began < 120, f"only {got} of {records} records came"
    rate = (got - first) / (time.monotonic() - began)
    consumer.close()
    return rate


def rdkafka_transactions(
    bootstrap: str, topic: str, seconds: float, *, offsets: bool = False, backoff_ms: int | None = None
) -> float:
    """One record a transaction, one after the other; transactions per second."""
    settings: dict[str, object] = {
        "bootstrap.servers": bootstrap,
        "transactional.id": uuid.uuid4().hex,
        "linger.ms": 0,
    }
    if backoff_ms is not None:
        settings["retry.backoff.ms"] = backoff_ms
    producer = Producer(settings)
    producer.init_transactions(30)
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": uuid.uuid4().hex, "enable.auto.commit": False})
    if offsets:
        consumer.subscribe([topic])
        while not consumer.assignment():
            consumer.poll(0.2)
    group = consumer.consumer_group_metadata() if offsets else None
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        producer.begin_transaction()
        producer.produce(topic, b"value", b"key")
        if group is not None:
            producer.send_offsets_to_transaction([TopicPartition(topic, 0, count)], group, 30)
        producer.commit_transaction(30)
        count += 1
    rate = count / (time.monotonic() - began)
    consumer.close()
    return rate


async def own_transactions(
    bootstrap: str, topic: str, seconds: float, *, offsets: bool = False, in_turn: bool = False
) -> float:
    """One record a transaction, one after the other, under one transactional id or two; transactions per second."""
    async with cluster(bootstrap) as (client, _):
        kind: type[ProducersInTurn | TransactionalProducer] = ProducersInTurn if in_turn else TransactionalProducer
        producer = kind(client, uuid.uuid4().hex)
        await producer.init_transactions()
        group = GroupMetadata(uuid.uuid4().hex)
        count, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            batch = BatchBuilder()
            batch.append(b"key", b"v" * 200, time.time_ns() // 1_000_000)
            producer.begin()
            await producer.produce(topic, 0, batch)
            if offsets:
                await producer.send_offsets({Partition(topic, 0): count}, group)
            await producer.end_transaction(True)
            count += 1
        return count / (time.monotonic() - began)
