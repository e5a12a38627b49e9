"""`group.protocol=consumer` (KIP-848) through librdkafka: one suite on Apache Kafka and on the embedded broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import (
    Consumer,
    ConsumerGroupState,
    ConsumerGroupType,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
)

from tests.services.broker import BrokerProcess

WAIT = 60


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.peers)])
def bootstrap(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param).bootstrap)


@pytest.fixture
def topic(bootstrap: str) -> str:
    return made(bootstrap)


def made(bootstrap: str, partitions: int = 4) -> str:
    name = f"new-{uuid.uuid4().hex[:8]}"
    make(bootstrap, name, partitions)
    return name


def make(bootstrap: str, name: str, partitions: int) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(WAIT)


def quick(bootstrap: str, group: str) -> str:
    """Let members report ten times a second. Apache Kafka refuses less than 5 s: there the tests take longer."""
    changes = [
        ConfigEntry("consumer.heartbeat.interval.ms", "100", incremental_operation=AlterConfigOpType.SET),
    ]
    resource = ConfigResource(ConfigResource.Type.GROUP, group, incremental_configs=changes)
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.incremental_alter_configs([resource]).values():
        try:
            future.result(WAIT)
        except KafkaException as error:
            assert error.args[0].name() == "INVALID_CONFIG"  # noqa: PT017 - a client's answer, not ours
    return group


class Member:
    """A consumer of group `group`, and what it saw."""

    def __init__(self, bootstrap: str, group: str, subscription: str, instance: str | None = None) -> None:
        settings = {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "group.protocol": "consumer",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 50,
        }
        if instance is not None:
            settings["group.instance.id"] = instance
        self.consumer = Consumer(settings)
        self.values: list[str] = []
        self.consumer.subscribe([subscription])

    def poll(self) -> None:
        """Read what is there and commit it."""
        messages = [message for message in self.consumer.consume(100, 0.1) if message.error() is None]
        if messages:
            self.values += [message.value().decode() for message in messages]
            self.consumer.commit(asynchronous=False)

    @property
    def assigned(self) -> set[int]:
        return {item.partition for item in self.consumer.assignment()}

    def close(self) -> None:
        self.consumer.close()


@pytest.fixture
def members() -> Iterator[list[Member]]:
    started: list[Member] = []
    yield started
    for member in started:
        member.close()


def until(condition: Callable[[], bool], members: list[Member]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, [(member.assigned, len(member.values)) for member in members]
        for member in members:
            member.poll()


def produce(bootstrap: str, topic: str, first: int, last: int) -> None:
    producer = Producer({"bootstrap.servers": bootstrap})
    for number in range(first, last):
        producer.produce(topic, b"%d" % number, partition=number % 4)
    assert producer.flush(WAIT) == 0


def shared(members: list[Member], partitions: int = 4) -> bool:
    """Whether everything is assigned, evenly, to one member each."""
    sizes = [len(member.assigned) for member in members]
    everything = sorted(index for member in members for index in member.assigned)
    return everything == list(range(partitions)) and max(sizes) - min(sizes) <= 1


def test_members_come_and_go_and_each_record_is_read_once(bootstrap: str, topic: str, members: list[Member]) -> None:
    group = quick(bootstrap, f"group-{topic}")
    members += [Member(bootstrap, group, topic)]
    produce(bootstrap, topic, 0, 100)
    until(lambda: len(members[0].values) == 100, members)
    members += [Member(bootstrap, group, topic)]
    until(lambda: shared(members), members)
    admin = AdminClient({"bootstrap.servers": bootstrap})
    described = admin.describe_consumer_groups([group])[group].result(WAIT)
    assert (described.type, described.state) == (ConsumerGroupType.CONSUMER, ConsumerGroupState.STABLE)
    assert {len(item.assignment.topic_partitions) for item in described.members} == {2}
    listed = admin.list_consumer_groups(types={ConsumerGroupType.CONSUMER}).result(WAIT).valid
    assert group in {item.group_id for item in listed}
    produce(bootstrap, topic, 100, 200)
    until(lambda: sum(len(member.values) for member in members) == 200, members)
    gone = members.pop(0)
    gone.close()
    until(lambda: shared(members), members)
    produce(bootstrap, topic, 200, 300)
    read = list(gone.values)
    until(lambda: len(read) + len(members[0].values) == 300, members)
    assert sorted(map(int, read + members[0].values)) == list(range(300)), "none was lost and none was read twice"


def test_new_partitions_are_assigned(bootstrap: str, topic: str, members: list[Member]) -> None:
    members += [Member(bootstrap, quick(bootstrap, f"group-{topic}"), topic)]
    until(lambda: shared(members), members)
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_partitions([NewPartitions(topic, 6)])[topic].result(WAIT)
    until(lambda: shared(members, 6), members)


def test_a_pattern_finds_topics_that_come_later(bootstrap: str, topic: str, members: list[Member]) -> None:
    members += [Member(bootstrap, quick(bootstrap, f"group-{topic}"), f"^{topic}.*")]
    until(lambda: shared(members), members)
    later = f"{topic}-later"
    make(bootstrap, later, 1)
    until(lambda: {item.topic for item in members[0].consumer.assignment()} == {topic, later}, members)


def test_a_static_member_comes_back_to_its_partitions(bootstrap: str, topic: str, members: list[Member]) -> None:
    group = quick(bootstrap, f"group-{topic}")
    members += [Member(bootstrap, group, topic, "a"), Member(bootstrap, group, topic, "b")]
    until(lambda: shared(members), members)
    had, other = members[0].assigned, members[1].assigned
    members.pop(0).close()
    members.insert(0, Member(bootstrap, group, topic, "a"))
    until(lambda: bool(members[0].assigned), members)
    assert (members[0].assigned, members[1].assigned) == (had, other)


def test_offsets_of_a_member_in_a_transaction(bootstrap: str, topic: str, members: list[Member]) -> None:
    group, target = quick(bootstrap, f"group-{topic}"), made(bootstrap)
    reader = Member(bootstrap, group, topic)
    members += [reader]
    produce(bootstrap, topic, 0, 40)
    producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": group})
    producer.init_transactions(WAIT)
    copied = 0
    while copied < 40:
        messages = [item for item in reader.consumer.consume(15, 1) if item.error() is None]
        producer.begin_transaction()
        for message in messages:
            producer.produce(target, message.value(), partition=0)
        positions = reader.consumer.position(reader.consumer.assignment())
        producer.send_offsets_to_transaction(positions, reader.consumer.consumer_group_metadata(), WAIT)
        producer.commit_transaction(WAIT)
        copied += len(messages)
    committed = reader.consumer.committed([TopicPartition(topic, index) for index in range(4)], WAIT)
    assert [item.offset for item in committed] == [10, 10, 10, 10]


def test_a_broker_that_is_killed_in_the_middle_of_a_rebalance(tmp_path: Path, members: list[Member]) -> None:
    broker = BrokerProcess(tmp_path / "data")
    broker.start()
    try:
        topic = made(broker.bootstrap)
        produce(broker.bootstrap, topic, 0, 100)
        group = quick(broker.bootstrap, f"group-{topic}")
        members += [Member(broker.bootstrap, group, topic)]
        until(lambda: len(members[0].values) == 100, members)
        members += [Member(broker.bootstrap, group, topic), Member(broker.bootstrap, group, topic)]
        until(lambda: len(members[0].assigned) < 4, members)
        broker.kill()
        broker.start()
        until(lambda: shared(members), members)
        produce(broker.bootstrap, topic, 100, 200)
        until(lambda: sum(len(member.values) for member in members) >= 200, members)
        read = sorted(int(value) for member in members for value in member.values)
        assert set(read) == set(range(200))
        for member in members:
            member.close()
        members.clear()
    finally:
        broker.stop()
