"""A compacted topic as clients see it: the last committed value of each key, in every language, while it is cleaned."""

from __future__ import annotations

import asyncio
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import kafka
import pytest
from aiokafka import AIOKafkaConsumer
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from semel.broker.broker import Broker
from semel.broker.cleaner import SLICE_SECONDS
from semel.broker.config import BrokerConfig
from semel.broker.embedded import EmbeddedBroker
from semel.broker.node import Node
from semel.wire.records import BatchBuilder
from tests.broker.core import Core
from tests.conftest import unavailable
from tests.services.kafka import kafka_jars, missing_tools

KEYS = [b"key-%d" % number for number in range(8)]
SETTINGS = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0"}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(
        tmp_path / "data", config=BrokerConfig(cleaner_backoff_seconds=0.02, segment_bytes=2000)
    ) as running:
        yield running


def create(address: str, **settings: str) -> str:
    topic = f"compacted-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": address})
    new = NewTopic(topic, 1, 1, config=SETTINGS | {name.replace("_", "."): value for name, value in settings.items()})
    admin.create_topics([new])[topic].result(20)
    return topic


def fill(address: str, topic: str, codecs: Sequence[str], rounds: int = 12) -> dict[bytes, bytes | None]:
    """Transactions that commit and abort, each over all keys, with every codec; returns what a reader is to find."""
    truth: dict[bytes, bytes | None] = {}
    for codec in codecs:
        producer = Producer(
            {"bootstrap.servers": address, "transactional.id": f"{topic}-{codec}", "compression.type": codec}
        )
        producer.init_transactions(20)
        for turn in range(rounds):
            producer.begin_transaction()
            for number, key in enumerate(KEYS):
                value = None if number == 3 else b"%s %d %s" % (codec.encode(), turn, b"x" * 20)
                producer.produce(topic, value, key=key)
                if turn % 3 != 1:
                    truth[key] = value
            if turn % 3 == 1:
                producer.flush(20)
                producer.abort_transaction(20)
            else:
                producer.commit_transaction(20)
    plain = Producer({"bootstrap.servers": address, "enable.idempotence": True})
    for number in range(60):
        plain.produce(topic, b"last %d" % number + b"y" * 100, key=b"last")
        plain.flush(20)
    return truth | {b"last": b"last 59" + b"y" * 100}


def size(broker: EmbeddedBroker, topic: str) -> int:
    def measured(node: Node) -> int:
        found = node.topics.partition(topic, 0)
        assert found is not None
        return found.log.size_bytes

    return broker.call(measured)


def wait_until_compacted(broker: EmbeddedBroker, topic: str) -> None:
    def is_clean(node: Node) -> bool:
        found = node.topics.partition(topic, 0)
        assert found is not None
        return found.log.compactor.clean_to == found.log.segments[-1].base_offset > 0

    deadline = time.monotonic() + 30
    while not broker.call(is_clean):
        assert time.monotonic() < deadline, "the topic is not compacted"
        time.sleep(0.02)


def read_with_librdkafka(address: str, topic: str) -> list[tuple[bytes | None, bytes | None]]:
    consumer = Consumer(
        {
            "bootstrap.servers": address,
            "group.id": "none",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[tuple[bytes | None, bytes | None]] = []
    while True:
        message = consumer.poll(10)
        assert message is not None, "the consumer does not come to the end"
        if message.error() is not None:
            assert message.error().name() == "_PARTITION_EOF"
            consumer.close()
            return found
        found.append((message.key(), message.value()))


def test_every_client_reads_what_compaction_left(broker: EmbeddedBroker) -> None:
    address = broker.address
    topic = create(address, delete_retention_ms="0")
    truth = fill(address, topic, ["none", "gzip"])  # kafka-python has packages for no others here.
    wait_until_compacted(broker, topic)
    deadline = time.monotonic() + 30
    while KEYS[3] in dict(with_librdkafka := read_with_librdkafka(address, topic)):
        assert time.monotonic() < deadline, "the tombstone stays"  # It goes with the next pass, not with the first.
    assert dict(with_librdkafka) | {KEYS[3]: None} == truth
    assert len(with_librdkafka) < 60, "the old values are still there"

    reader = kafka.KafkaConsumer(bootstrap_servers=address, isolation_level="read_committed", consumer_timeout_ms=2000)
    part = kafka.TopicPartition(topic, 0)
    reader.assign([part])
    reader.seek_to_beginning(part)
    assert [(record.key, record.value) for record in reader] == with_librdkafka
    assert reader.position(part) == reader.end_offsets([part])[part]
    reader.close()

    async def read_with_aiokafka() -> list[tuple[bytes | None, bytes | None]]:
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=address, isolation_level="read_committed", auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            found = []
            while len(found) < len(with_librdkafka):
                batches = await consumer.getmany(timeout_ms=5000)
                assert batches, "aiokafka does not get on"
                found += [(record.key, record.value) for records in batches.values() for record in records]
            return found
        finally:
            await consumer.stop()

    assert asyncio.run(read_with_aiokafka()) == with_librdkafka


def java(*arguments: str) -> str:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    command = ["java", "-cp", f"{kafka_jars()}/*", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout


@pytest.mark.kafka
def test_the_java_consumer_and_kafkas_own_dump_read_it(broker: EmbeddedBroker, tmp_path: Path) -> None:
    address = broker.address
    topic = create(address, delete_retention_ms="3600000")
    truth = fill(address, topic, ["none", "gzip", "snappy", "lz4", "zstd"], rounds=6)
    wait_until_compacted(broker, topic)
    with_librdkafka = read_with_librdkafka(address, topic)
    text = java(
        "org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", address, "--topic", topic,
        "--from-beginning", "--max-messages", str(len(with_librdkafka)), "--timeout-ms", "30000",
        "--isolation-level", "read_committed",
        "--formatter-property", "print.key=true", "--formatter-property", "key.separator=:",
    )  # fmt: skip
    lines = [f"{key.decode()}:{'null' if value is None else value.decode()}" for key, value in with_librdkafka if key]
    assert text.splitlines() == lines
    assert dict(with_librdkafka) == truth
    assert len(lines) < 60, "the old values are still there"
    files = ",".join(str(path) for path in sorted((tmp_path / "data").glob("topics/*/0/*.log")) if path.stat().st_size)
    dump = java("org.apache.kafka.tools.DumpLogSegments", "--deep-iteration", "--files", files)
    assert "isvalid: true" in dump
    assert "isvalid: false" not in dump
    assert "deleteHorizonMs: OptionalLong[" in dump


def test_requests_are_answered_while_a_topic_is_compacted(tmp_path: Path) -> None:
    """The event loop waits for a slice of compaction, never for a pass."""

    async def run() -> tuple[float, int]:
        broker = Broker(tmp_path, config=BrokerConfig(cleaner_backoff_seconds=0.01, segment_bytes=200_000))
        await broker.start()
        node = broker.node
        topic = node.topics.create("t", 1, SETTINGS)
        source = topic.partitions[0].log
        core_batch = _big_batch()
        for _ in range(60):
            source.append(bytearray(core_batch), node.env.wall_ms())
        worst = 0.0
        turns = 0
        deadline = time.monotonic() + 30
        while source.compactor.clean_to < source.segments[-1].base_offset:
            before = time.thread_time()
            await asyncio.sleep(0)
            worst = max(worst, time.thread_time() - before)
            turns += 1
            assert time.monotonic() < deadline
        await broker.stop()
        return worst, turns

    worst, turns = asyncio.run(run())
    assert turns > 10
    # In time of the processor, which other processes do not change: a slice, and the batch that ends it.
    assert worst < 20 * SLICE_SECONDS


def _big_batch() -> bytes:
    builder = BatchBuilder()
    for number in range(500):
        builder.append(b"key-%d" % number, b"v" * 100, 1_750_000_000_000)
    return builder.build()


def test_settings_hold_for_a_topic_that_is_being_written(broker: EmbeddedBroker) -> None:
    address = broker.address
    topic = create(address, cleanup_policy="delete")
    producer = Producer({"bootstrap.servers": address})
    for number in range(200):
        producer.produce(topic, b"%d" % number, key=b"k")
        producer.flush(20)
    before = size(broker, topic)
    admin = AdminClient({"bootstrap.servers": address})
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, set_config=SETTINGS)
    for done in admin.alter_configs([resource]).values():
        done.result(20)
    wait_until_compacted(broker, topic)
    assert size(broker, topic) < before / 2
    assert read_with_librdkafka(address, topic)[-1] == (b"k", b"199")


def test_the_coordinators_topics_are_left_to_the_coordinators(tmp_path: Path) -> None:
    core = Core(tmp_path)
    for topic in core.node.topics:
        assert topic.info.internal
        for partition in topic.partitions:
            partition.log.tend(core.node.env.wall_ms() + 10**10)  # Segments are closed, and could be compacted.
    before = {topic.info.name: topic.partitions[0].log.compactor.clean_to for topic in core.node.topics}
    while core.node.cleaner.work():
        pass
    assert {topic.info.name: topic.partitions[0].log.compactor.clean_to for topic in core.node.topics} == before
