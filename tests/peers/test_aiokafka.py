"""What aiokafka's documentation shows its users how to do, done on the embedded broker.

Its examples are not in its package; these are programs of ours that do what each page of "Examples" is about.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import uuid
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from semel.broker.config import BrokerConfig
from semel.broker.security.settings import Listener, Security, TlsFiles
from semel.processing.ports import free_ports
from tests.peers.outcomes import Verdict, settle
from tests.peers.serve import ConfiguredBroker
from tests.services.certificates import Authority

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Place:
    """Where the broker is, in plain and by TLS, and who signed its certificate."""

    plain: str
    tls: str
    authority: Path

    def producer(self, **more: object) -> AIOKafkaProducer:
        return AIOKafkaProducer(bootstrap_servers=self.plain, **more)

    def consumer(self, *topics: str, **more: object) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(*topics, bootstrap_servers=self.plain, auto_offset_reset="earliest", **more)


def _topic() -> str:
    return f"aio-{uuid.uuid4().hex[:8]}"


async def _read(consumer: AIOKafkaConsumer, count: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < count:
        records = await consumer.getmany(timeout_ms=15_000)
        assert records, f"{len(found)} of {count} came"
        found += [record.value for batch in records.values() for record in batch]
    return found


async def batch_produce(place: Place) -> None:
    topic = _topic()
    async with place.producer() as producer:
        batch = producer.create_batch()
        count = 0
        while batch.append(key=None, value=b"%d" % count, timestamp=None) is not None:
            count += 1
        batch.close()
        partition = min(await producer.partitions_for(topic))
        sent = await (await producer.send_batch(batch, topic, partition=partition))
    assert sent.offset == 0
    async with place.consumer(topic) as consumer:
        assert await _read(consumer, count) == [b"%d" % number for number in range(count)]


async def concurrent_consumption(place: Place) -> None:
    topic = _topic()
    async with place.producer() as producer:
        await asyncio.gather(*(producer.send_and_wait(topic, b"%d" % number) for number in range(200)))
    async with place.consumer(topic) as consumer:
        partitions = consumer.assignment()
        assert len(partitions) == 4
        found: list[bytes] = []

        async def drain(partition: TopicPartition) -> None:
            while await consumer.position(partition) < ends[partition]:
                records = await consumer.getmany(partition, timeout_ms=1_000)
                found.extend(record.value for record in records.get(partition, []))

        ends = await consumer.end_offsets(partitions)
        await asyncio.wait_for(asyncio.gather(*map(drain, partitions)), 30)
    assert sorted(map(int, found)) == list(range(200))


async def custom_partitioner(place: Place) -> None:
    topic = _topic()

    def choose(key: bytes, everything: list[int], available: list[int]) -> int:
        return everything[zlib.crc32(key) % len(everything)]

    async with place.producer(partitioner=choose) as producer:
        for number in range(40):
            key = b"key-%d" % number
            placed = await producer.send_and_wait(topic, b"", key=key)
            assert placed.partition == zlib.crc32(key) % 4


async def group_consumer(place: Place) -> None:
    topic, group = _topic(), _topic()
    async with place.producer() as producer:
        await producer.partitions_for(topic)
        options = {"group_id": group, "metadata_max_age_ms": 1_000, "heartbeat_interval_ms": 100}
        async with place.consumer(topic, **options) as first, place.consumer(topic, **options) as second:
            for _ in range(200):
                if len(first.assignment()) == len(second.assignment()) == 2:
                    break
                await asyncio.sleep(0.1)
            assert not first.assignment() & second.assignment()
            await asyncio.gather(*(producer.send_and_wait(topic, b"x", partition=index % 4) for index in range(80)))
            found = await asyncio.gather(_read(first, 40), _read(second, 40))
    assert Counter(map(len, found)) == {40: 2}


async def local_state_and_storing_offsets_outside_of_kafka(place: Place) -> None:
    topic, group = _topic(), _topic()
    stored: dict[TopicPartition, int] = {}

    class Listener(ConsumerRebalanceListener):
        def __init__(self, consumer: AIOKafkaConsumer) -> None:
            self.consumer = consumer

        async def on_partitions_revoked(self, revoked: object) -> None: ...

        async def on_partitions_assigned(self, assigned: list[TopicPartition]) -> None:
            for partition in assigned:
                self.consumer.seek(partition, stored.get(partition, 0))

    counts: Counter[bytes] = Counter()
    for round_ in range(2):
        async with place.producer() as producer:
            for _ in range(30):
                await producer.send_and_wait(topic, b"v", key=b"k%d" % round_)
        consumer = place.consumer(group_id=group, enable_auto_commit=False)
        async with consumer:
            consumer.subscribe([topic], listener=Listener(consumer))
            read = 0
            while read < 30:
                for partition, records in (await consumer.getmany(timeout_ms=15_000)).items():
                    counts.update(record.key for record in records)
                    stored[partition] = records[-1].offset + 1
                    read += len(records)
    assert counts == {b"k0": 30, b"k1": 30}


async def manual_commit(place: Place) -> None:
    topic, group = _topic(), _topic()
    async with place.producer() as producer:
        for number in range(20):
            await producer.send_and_wait(topic, b"%d" % number, partition=0)
    partition = TopicPartition(topic, 0)
    async with place.consumer(topic, group_id=group, enable_auto_commit=False) as consumer:
        assert len(await _read(consumer, 20)) == 20
        await consumer.commit({partition: 15})
        assert await consumer.committed(partition) == 15
    async with place.consumer(topic, group_id=group, enable_auto_commit=False) as consumer:
        assert await _read(consumer, 5) == [b"15", b"16", b"17", b"18", b"19"]


async def serialize_and_compress(place: Place) -> None:
    topic = _topic()
    sent = [{"number": number, "text": "x" * 50} for number in range(100)]
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        async with place.producer(
            compression_type=codec, value_serializer=lambda value: json.dumps(value).encode()
        ) as it:
            for value in sent:
                await it.send(topic, value, partition=0)
    async with place.consumer(topic, value_deserializer=json.loads) as consumer:
        assert await _read(consumer, 400) == sent * 4


async def ssl_consume_and_produce(place: Place) -> None:
    topic = _topic()
    context = ssl.create_default_context(cafile=str(place.authority))
    secure = {"bootstrap_servers": place.tls, "security_protocol": "SSL", "ssl_context": context}
    async with AIOKafkaProducer(**secure) as producer:
        await producer.send_and_wait(topic, b"secret")
    async with AIOKafkaConsumer(topic, auto_offset_reset="earliest", **secure) as consumer:
        assert await _read(consumer, 1) == [b"secret"]


async def idempotent_produce(place: Place) -> None:
    topic = _topic()
    async with place.producer(enable_idempotence=True) as producer:
        sent = [await producer.send(topic, b"%d" % number, partition=0) for number in range(500)]
        assert [record.offset for record in await asyncio.gather(*sent)] == list(range(500))


async def transactional_consume_process_produce(place: Place) -> None:
    source, target, group = _topic(), _topic(), _topic()
    async with place.producer() as producer:
        for number in range(60):
            await producer.send_and_wait(source, b"%d" % number, partition=0)
    reader = place.consumer(source, group_id=group, enable_auto_commit=False, isolation_level="read_committed")
    partition = TopicPartition(source, 0)
    async with reader, place.producer(transactional_id=group) as producer:
        done = failures = 0
        while done < 60:
            records = (await reader.getmany(timeout_ms=15_000, max_records=20))[partition]
            try:
                async with producer.transaction():
                    for record in records:
                        await producer.send(target, record.value, partition=0)
                    if not failures:
                        failures = 1
                        raise RuntimeError("on purpose")
                    await producer.send_offsets_to_transaction({partition: records[-1].offset + 1}, group)
            except RuntimeError:
                reader.seek(partition, records[0].offset)
                continue
            done += len(records)
    async with place.consumer(target, isolation_level="read_committed") as check:
        assert await _read(check, 60) == [b"%d" % number for number in range(60)]


EXAMPLES: tuple[Callable[[Place], Awaitable[None]], ...] = (
    batch_produce,
    concurrent_consumption,
    custom_partitioner,
    group_consumer,
    local_state_and_storing_offsets_outside_of_kafka,
    manual_commit,
    serialize_and_compress,
    ssl_consume_and_produce,
    idempotent_produce,
    transactional_consume_process_produce,
)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    authority = Authority(tmp_path)
    plain, tls = (
        Listener(kind, "127.0.0.1", port) for kind, port in zip(("PLAINTEXT", "SSL"), free_ports(2), strict=True)
    )
    security = Security(tls=TlsFiles(authority.sign("broker", "/CN=localhost")))
    broker = ConfiguredBroker(tmp_path / "data", BrokerConfig(listeners=(plain, tls), security=security))
    broker.port = plain.port
    broker.start()
    yield Place(f"127.0.0.1:{plain.port}", f"127.0.0.1:{tls.port}", authority.certificate)
    broker.stop()


def test_aiokafka(place: Place) -> None:
    verdicts = {}
    for example in EXAMPLES:
        try:
            asyncio.run(asyncio.wait_for(example(place), 60))
            verdicts[example.__name__] = Verdict("passed")
        except (AssertionError, KafkaError, TimeoutError, LookupError) as problem:
            verdicts[example.__name__] = Verdict("failed", f"{type(problem).__name__}: {problem}"[:600])
    settle("aiokafka", "aiokafka 0.14.0; programs of ours after the pages of its documentation", verdicts)
