"""The two brokers of the differential test: alike in everything that can be set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import semel.broker.broker
from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from tests.differential.connection import Connection
from tests.services.kafka import KafkaNode

__all__ = ["KAFKA_SETTINGS", "embedded", "kafka"]

_NEVER = str(86_400_000)
KAFKA_SETTINGS = {
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "100",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    # Programs write old timestamps: what Kafka throws away by age must stay for as long as a program runs.
    "log.retention.check.interval.ms": _NEVER,
    "log.initial.task.delay.ms": _NEVER,
    "producer.id.expiration.check.interval.ms": _NEVER,
    "log.cleaner.backoff.ms": _NEVER,
    # A machine that is busy must not make Kafka elect its only broker again: leader epochs would rise.
    "broker.session.timeout.ms": "60000",
}


def _warm(bootstrap: str) -> str:
    """Both coordinators are up, and producer id 0 is gone: in an answer, 0 means none."""
    connection = Connection(bootstrap, "warm")
    for key_type in (0, 1):
        connection.ask(10, 4, key_type=key_type, coordinator_keys=["warm"])
    while connection.ask(
        22, 4, transactional_id=None, transaction_timeout=1, producer_id=-1, producer_epoch=-1
    ).error_code:
        pass
    connection.close()
    return bootstrap


@contextmanager
def embedded(folder: Path, **settings: Any) -> Iterator[str]:
    """Ours, and its address."""
    semel.broker.broker.EXPIRE_SECONDS = 86_400.0  # As for Apache Kafka above: old records stay while a program runs.
    with EmbeddedBroker(folder, config=BrokerConfig(transaction_sweep_seconds=0.1, **settings)) as broker:
        yield _warm(broker.address)


@contextmanager
def kafka() -> Iterator[str]:
    """Apache Kafka 4.3.1, and its address."""
    node = KafkaNode(2, KAFKA_SETTINGS)
    try:
        yield _warm(node.start().bootstrap)
    finally:
        node.stop()
