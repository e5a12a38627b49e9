"""Other people's admin clients change settings and groups: one suite on Apache Kafka and on the embedded broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource as PythonResource
from kafka.admin import ConfigResourceType
from kafka.structs import TopicPartition as PythonPartition

from tests.conftest import Address

WAIT = 20


@pytest.fixture
def admin(any_broker: Address) -> AdminClient:
    return AdminClient({"bootstrap.servers": any_broker.bootstrap})


@pytest.fixture
def topic(admin: AdminClient) -> str:
    name = f"admin-{uuid.uuid4().hex[:8]}"
    admin.create_topics([NewTopic(name, 2, 1)])[name].result(WAIT)
    return name


def changed(admin: AdminClient, kind: ResourceType, name: str, **values: str | None) -> None:
    """Set, or with None take back, through IncrementalAlterConfigs."""
    entries = [
        ConfigEntry(
            key.replace("_", "."),
            value,
            incremental_operation=AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET,
        )
        for key, value in values.items()
    ]
    resource = ConfigResource(kind, name, incremental_configs=entries)
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(WAIT)


def settings(admin: AdminClient, kind: ResourceType, name: str, **wanted: str) -> dict[str, ConfigEntry]:
    """All settings, once the wanted ones are there: Apache Kafka lets a change hold a moment after its answer."""
    resource = ConfigResource(kind, name)
    deadline = time.monotonic() + WAIT
    while True:
        found: dict[str, ConfigEntry] = admin.describe_configs([resource])[resource].result(WAIT)
        values = {key: found[key.replace("_", ".")].value for key in wanted}
        if values == wanted:
            return found
        assert time.monotonic() < deadline, values
        time.sleep(0.05)


def test_confluent_kafka_changes_a_topic(admin: AdminClient, topic: str, any_broker: Address) -> None:
    changed(admin, ResourceType.TOPIC, topic, max_message_bytes="1000", retention_ms="99000")
    found = settings(admin, ResourceType.TOPIC, topic, max_message_bytes="1000", retention_ms="99000")
    assert found["retention.ms"].source == 1
    producer = Producer({"bootstrap.servers": any_broker.bootstrap})
    errors = []
    producer.produce(topic, b"a" * 5000, on_delivery=lambda error, _: errors.append(error))
    producer.flush(WAIT)
    assert [error and error.name() for error in errors] == ["MSG_SIZE_TOO_LARGE"]
    changed(admin, ResourceType.TOPIC, topic, max_message_bytes=None)
    settings(admin, ResourceType.TOPIC, topic, max_message_bytes="1048588")
    producer.produce(topic, b"a" * 5000, on_delivery=lambda error, _: errors.append(error))
    producer.flush(WAIT)
    assert errors[1] is None


def test_confluent_kafka_is_told_what_is_wrong(admin: AdminClient, topic: str) -> None:
    with pytest.raises(Exception, match="INVALID_CONFIG"):
        changed(admin, ResourceType.TOPIC, topic, retention_ms="soon")
    with pytest.raises(Exception, match="UNKNOWN_TOPIC_OR_PART"):
        changed(admin, ResourceType.TOPIC, f"{topic}-not", retention_ms="1")
    with pytest.raises(Exception, match="INVALID_REQUEST"):
        changed(admin, ResourceType.BROKER, "1", num_partitions="9")


def test_confluent_kafka_changes_the_broker(admin: AdminClient) -> None:
    changed(admin, ResourceType.BROKER, "1", log_cleaner_min_compaction_lag_ms="7")
    try:
        found = settings(admin, ResourceType.BROKER, "1", log_cleaner_min_compaction_lag_ms="7")
        assert found["num.partitions"].is_read_only
    finally:
        changed(admin, ResourceType.BROKER, "1", log_cleaner_min_compaction_lag_ms=None)


def test_confluent_kafka_extends_a_topic(admin: AdminClient, topic: str) -> None:
    admin.create_partitions([NewPartitions(topic, 5)], validate_only=True)[topic].result(WAIT)
    assert len(admin.list_topics(topic, WAIT).topics[topic].partitions) == 2
    admin.create_partitions([NewPartitions(topic, 5)])[topic].result(WAIT)
    with pytest.raises(Exception, match="INVALID_PARTITIONS"):
        admin.create_partitions([NewPartitions(topic, 3)])[topic].result(WAIT)


@pytest.fixture
def python_admin(any_broker: Address) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=any_broker.bootstrap)
    yield client
    client.close()


def test_kafka_python_changes_a_topic(python_admin: KafkaAdminClient, admin: AdminClient, topic: str) -> None:
    python_admin.alter_configs([PythonResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "77000"})])
    settings(admin, ResourceType.TOPIC, topic, retention_ms="77000")
    described = python_admin.describe_configs([PythonResource(ConfigResourceType.TOPIC, topic)])
    assert "77000" in str(described)


def test_offsets_of_a_group_are_deleted(
    python_admin: KafkaAdminClient, admin: AdminClient, topic: str, any_broker: Address
) -> None:
    group = f"group-{topic}"
    consumer = Consumer({"bootstrap.servers": any_broker.bootstrap, "group.id": group})
    both = [TopicPartition(topic, index, 5 + index) for index in range(2)]
    consumer.commit(offsets=both, asynchronous=False)
    consumer.close()
    python_admin.delete_group_offsets(group, [PythonPartition(topic, 0)])
    future = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group]
    assert {(item.partition, item.offset) for item in future.result(WAIT).topic_partitions} == {(1, 6)}
    admin.delete_consumer_groups([group])[group].result(WAIT)
    assert group not in {item.group_id for item in admin.list_consumer_groups().result(WAIT).valid}


def test_sizes_of_partitions(python_admin: KafkaAdminClient, topic: str, any_broker: Address) -> None:
    producer = Producer({"bootstrap.servers": any_broker.bootstrap})
    producer.produce(topic, b"a" * 100, partition=1)
    assert producer.flush(WAIT) == 0
    assert topic in str(python_admin.describe_log_dirs())
