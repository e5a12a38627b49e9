"""Other people's clients: each produces, consumes in a group, and copies in transactions with one abort."""

from __future__ import annotations

import asyncio
import uuid

import kafka
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as AioPartition
from aiokafka.structs import OffsetAndMetadata as AioOffset
from confluent_kafka import Consumer, Producer
from kafka.structs import OffsetAndMetadata, TopicPartition

from tests.conftest import Address

COUNT = 60
ABORTED_ROUND = 1
"""In this round of the copy the transaction is aborted and its input read again."""


@pytest.fixture(params=["embedded", "embedded_v1"])
def address(request: pytest.FixtureRequest) -> str:
    found: Address = request.getfixturevalue(request.param)
    return found.bootstrap


def _names() -> tuple[str, str, str]:
    mark = uuid.uuid4().hex[:8]
    return f"in-{mark}", f"out-{mark}", f"group-{mark}"


def _values() -> list[bytes]:
    return [b"%d" % number for number in range(COUNT)]


def test_confluent_kafka(address: str) -> None:
    source, target, group = _names()
    producer = Producer({"bootstrap.servers": address, "enable.idempotence": True})
    for value in _values():
        producer.produce(source, value, key=value)
    assert producer.flush(20) == 0

    def consumer(group_id: str) -> Consumer:
        return Consumer(
            {
                "bootstrap.servers": address,
                "group.id": group_id,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.queue.backoff.ms": 5,
            }
        )

    reader = consumer(group)
    reader.subscribe([source])
    copier = Producer({"bootstrap.servers": address, "transactional.id": group})
    copier.init_transactions(20)
    copied = rounds = 0
    while copied < COUNT:
        messages = [message for message in reader.consume(20, 5) if message.error() is None]
        assert messages, "no more input came"
        copier.begin_transaction()
        for message in messages:
            copier.produce(target, message.value(), key=message.key())
        rounds += 1
        if rounds - 1 == ABORTED_ROUND:
            copier.flush(20)
            copier.abort_transaction(20)
            for position in reader.committed(reader.assignment(), 20):
                position.offset = max(position.offset, 0)
                reader.seek(position)
            continue
        copier.send_offsets_to_transaction(reader.position(reader.assignment()), reader.consumer_group_metadata(), 20)
        copier.commit_transaction(20)
        copied += len(messages)
    reader.close()
    check = consumer(f"{group}-check")
    check.subscribe([target])
    seen = [message.value() for message in check.consume(COUNT, 20)]
    seen += [message.value() for message in check.consume(1, 0.3)]
    check.close()
    assert sorted(seen) == sorted(_values())


def test_aiokafka(address: str) -> None:
    source, target, group = _names()

    async def run() -> list[bytes]:
        async with AIOKafkaProducer(bootstrap_servers=address, enable_idempotence=True) as producer:
            for value in _values():
                await producer.send_and_wait(source, value)
        reader = AIOKafkaConsumer(
            source,
            bootstrap_servers=address,
            group_id=group,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
        )
        async with reader, AIOKafkaProducer(bootstrap_servers=address, transactional_id=group) as copier:
            copied = rounds = 0
            while copied < COUNT:
                found = await reader.getmany(timeout_ms=10_000, max_records=20)
                assert found, "no more input came"
                rounds += 1
                await copier.begin_transaction()
                for records in found.values():
                    for record in records:
                        await copier.send(target, record.value)
                if rounds - 1 == ABORTED_ROUND:
                    await copier.abort_transaction()
                    await reader.seek_to_committed()
                    for partition in reader.assignment():
                        if await reader.committed(partition) is None:
                            await reader.seek_to_beginning(partition)
                    continue
                offsets = {
                    AioPartition(partition.topic, partition.partition): AioOffset(records[-1].offset + 1, "")
                    for partition, records in found.items()
                }
                await copier.send_offsets_to_transaction(offsets, group)
                await copier.commit_transaction()
                copied += sum(map(len, found.values()))
        check = AIOKafkaConsumer(
            target,
            bootstrap_servers=address,
            group_id=f"{group}-check",
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        seen: list[bytes] = []
        async with check:
            while len(seen) < COUNT:
                found = await check.getmany(timeout_ms=10_000)
                assert found, "the copy is not all there"
                seen += [record.value for records in found.values() for record in records]
            extra = await check.getmany(timeout_ms=300)
            seen += [record.value for records in extra.values() for record in records]
        return seen

    assert sorted(asyncio.run(run())) == sorted(_values())


def test_kafka_python(address: str) -> None:
    source, target, group = _names()
    producer = kafka.KafkaProducer(bootstrap_servers=address)
    for value in _values():
        producer.send(source, value)
    producer.flush(20)
    producer.close()

    def consumer(topic: str, group_id: str) -> kafka.KafkaConsumer:
        return kafka.KafkaConsumer(
            topic,
            bootstrap_servers=address,
            group_id=group_id,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            max_poll_records=20,
        )

    reader = consumer(source, group)
    copier = kafka.KafkaProducer(bootstrap_servers=address, transactional_id=group)
    copier.init_transactions()
    copied = rounds = 0
    while copied < COUNT:
        found = reader.poll(timeout_ms=10_000)
        assert found, "no more input came"
        rounds += 1
        copier.begin_transaction()
        for records in found.values():
            for record in records:
                copier.send(target, record.value)
        if rounds - 1 == ABORTED_ROUND:
            copier.abort_transaction()
            for partition in reader.assignment():
                committed = reader.committed(partition)
                reader.seek(partition, committed or 0)
            continue
        offsets = {
            TopicPartition(partition.topic, partition.partition): OffsetAndMetadata(records[-1].offset + 1, "", -1)
            for partition, records in found.items()
        }
        copier.send_offsets_to_transaction(offsets, reader.group_metadata())
        copier.commit_transaction()
        copied += sum(map(len, found.values()))
    copier.close()
    reader.close()
    check = consumer(target, f"{group}-check")
    seen: list[bytes] = []
    while len(seen) < COUNT:
        found = check.poll(timeout_ms=10_000)
        assert found, "the copy is not all there"
        seen += [record.value for records in found.values() for record in records]
    extra = check.poll(timeout_ms=300)
    seen += [record.value for records in extra.values() for record in records]
    check.close()
    assert sorted(seen) == sorted(_values())
