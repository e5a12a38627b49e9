"""Kafka in memory, for tests of the engine alone: logs with markers, transactions, one group, faults at each call.

A committed transaction is appended at once and ends with a marker in every partition it touched, as in Kafka. The
real client against a real broker is what `test_engine_kafka.py` runs.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any, NamedTuple

from semel.errors import Fatal
from semel.processing.component import Delivery
from semel.processing.plain import PlainProducer
from semel.types import GroupMetadata, Record, TopicPartition
from semel.wire.records import BatchBuilder, decode_records, read_header


class FakeBatch(NamedTuple):
    records: list[Record]
    end_offsets: dict[TopicPartition, int]


class FakeKafka:
    """`fail(call, error)` makes the next such call raise: begin, produce, send_offsets, end, after_end, abort,
    committed_offsets, poll, init."""

    def __init__(self, **topics: int) -> None:
        self.logs: dict[TopicPartition, list[Record | None]] = {}
        self.starts: dict[TopicPartition, int] = defaultdict(int)
        self.counts: dict[str, int] = {}
        self.committed: dict[TopicPartition, int] = {}
        self.faults: dict[str, list[BaseException]] = defaultdict(list)
        self.calls: list[str] = []
        self.consumer_made: FakeConsumer | None = None
        self.refuse_bytes_max = 1 << 40
        self.admin = self
        self.identities: dict[str, str] = {}
        self.tombstones_ms = "86400000"
        for name, count in topics.items():
            self.create(name.replace("__", "."), count)

    # --- The test's side ---

    def create(self, topic: str, partitions: int) -> None:
        self.counts[topic] = partitions
        for number in range(partitions):
            self.logs[TopicPartition(topic, number)] = []

    def append(self, topic: str, key: bytes | None, value: bytes | None, partition: int = 0, headers: Any = ()) -> None:
        log = self.logs[TopicPartition(topic, partition)]
        log.append(Record(topic, partition, len(log), 1_000 + len(log), key, value, tuple(headers)))

    def fail(self, call: str, error: BaseException, times: int = 1) -> None:
        self.faults[call] += [error] * times

    def records(self, topic: str) -> list[Record]:
        return [
            record
            for number in range(self.counts[topic])
            for record in self.logs[TopicPartition(topic, number)]
            if record is not None
        ]

    def values(self, topic: str) -> list[bytes | None]:
        return [record.value for record in self.records(topic)]

    def lag(self, topic: str) -> int:
        """Records at or above the committed offsets."""
        return sum(
            record is not None and record.offset >= self.committed.get(at, 0)
            for at, log in self.logs.items()
            if at.topic == topic
            for record in log
        )

    def hit(self, call: str) -> None:
        self.calls.append(call)
        if self.faults[call]:
            raise self.faults[call].pop(0)

    # --- semel.processing.seams.Kafka and AdminSeam ---

    async def start(self) -> None:
        self.hit("start")

    async def close(self) -> None:
        self.calls.append("close")

    async def partitions(self, topic: str) -> int:
        if topic not in self.counts:
            raise Fatal(f"topic {topic!r}: UNKNOWN_TOPIC_OR_PARTITION")
        return self.counts[topic]

    async def topic_identity(self, topic: str) -> str:
        return self.identities.get(topic, f"fake/{topic}")

    async def topic_config(self, topic: str, name: str) -> str:
        return {"delete.retention.ms": self.tombstones_ms}[name]

    def producer(self, transactional_id: str) -> FakeProducer:
        return FakeProducer(self)

    def plain_producer(self, name: str, delivery: Delivery) -> PlainProducer:
        return PlainProducer(name, FakeWriter(self), self, delivery)

    async def commit_offsets(self, group: GroupMetadata, offsets: Any) -> None:
        assert group.generation_id >= 0
        self.hit("commit_offsets")
        await asyncio.sleep(0)
        self.committed.update(offsets)
        self.hit("after_commit_offsets")

    def consumer(self, group: str, topics: Any, instance_id: str, events: Any) -> FakeConsumer:
        self.consumer_made = FakeConsumer(self, list(topics), events)
        return self.consumer_made

    def reader(self) -> FakeReader:
        return FakeReader(self)

    async def committed_offsets(self, group: str, partitions: Any, require_stable: bool = True) -> dict[Any, int]:
        assert require_stable
        self.hit("committed_offsets")
        return {at: self.committed.get(at, -1) for at in partitions}

    async def list_offsets(self, partitions: Any, at: str) -> dict[TopicPartition, int]:
        self.hit(f"list_{at}")
        return {item: self.starts[item] if at == "earliest" else len(self.logs[item]) for item in partitions}


class FakeProducer:
    def __init__(self, kafka: FakeKafka) -> None:
        self.kafka = kafka
        self.is_open = False
        self.batches: list[tuple[TopicPartition, BatchBuilder]] = []
        self.offsets: dict[TopicPartition, int] = {}
        self.written: dict[TopicPartition, int] = {}

    async def init_transactions(self) -> None:
        self.kafka.hit("init")

    async def check_owner(self) -> None:
        self.kafka.hit("check_owner")

    def begin(self) -> None:
        assert not self.is_open, "a transaction is open already"
        self.is_open = True
        self.batches, self.offsets, self.written = [], {}, {}
        self.kafka.hit("begin")

    async def produce(self, topic: str, partition: int, batches: BatchBuilder) -> None:
        self.kafka.hit("produce")
        self.batches.append((TopicPartition(topic, partition), batches))

    async def send_offsets(self, offsets: Any, group: GroupMetadata) -> None:
        assert group.generation_id >= 0
        assert group.member_id
        self.kafka.hit("send_offsets")
        self.offsets = dict(offsets)

    async def end_transaction(self, commit: bool) -> None:
        assert commit
        self.kafka.hit("end")
        await asyncio.sleep(0)
        touched = set()
        for at, builder in self.batches:
            data = builder.build()
            for record in decode_records(data, 0, read_header(data), at.topic, at.partition):
                log = self.kafka.logs[at]
                log.append(record._replace(offset=len(log)))
                self.written[at] = len(log)
            touched.add(at)
        for at in touched:
            self.kafka.logs[at].append(None)
        for at, offset in self.offsets.items():
            assert offset >= self.kafka.committed.get(at, 0), "a position went backwards"
            self.kafka.committed[at] = offset
        self.is_open = False
        self.kafka.hit("after_end")

    async def abort(self) -> None:
        self.kafka.hit("abort")
        self.is_open = False

    async def close(self) -> None:
        self.kafka.calls.append("producer.close")


class FakeWriter:
    """The idempotent producer: what is sent is there at once, and stays."""

    def __init__(self, kafka: FakeKafka) -> None:
        self.kafka = kafka

    async def start(self) -> None:
        self.kafka.hit("init")

    async def send_batch(self, topic: str, partition: int, batch: BatchBuilder) -> int:
        self.kafka.hit("send_batch")
        await asyncio.sleep(0)
        data, log = batch.build(), self.kafka.logs[TopicPartition(topic, partition)]
        first = len(log)
        for record in decode_records(data, 0, read_header(data), topic, partition):
            log.append(record._replace(offset=len(log)))
        self.kafka.hit("after_send_batch")
        return first

    async def close(self) -> None:
        self.kafka.calls.append("writer.close")


class FakeConsumer:
    """`script` holds coroutines that run inside the next polls, as rebalance callbacks do."""

    def __init__(self, kafka: FakeKafka, topics: list[str], events: Any) -> None:
        self.kafka = kafka
        self.events = events
        self.own = [at for at in kafka.logs if at.topic in topics]
        self.positions: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()
        self.script: list[Any] = []
        self.dropped: set[TopicPartition] = set()
        self.per_poll = 1_000

    async def start(self) -> None:
        await self.assign(*self.own)

    async def assign(self, *partitions: TopicPartition) -> None:
        self.put(await self.events.on_assigned(list(partitions)))

    def put(self, offsets: Any) -> None:
        for at, offset in offsets.items():
            if not self.kafka.starts[at] <= offset <= len(self.kafka.logs[at]):
                raise Fatal(f"{at}: no offset {offset} in the log; the whole consumer is of no further use")
        self.positions.update(offsets)

    async def revoke(self, *partitions: TopicPartition) -> None:
        self.dropped |= set(partitions)
        await self.events.on_revoked(list(partitions))
        for at in partitions:
            self.positions.pop(at)

    async def lose(self, *partitions: TopicPartition) -> None:
        self.dropped |= set(partitions)
        await self.events.on_lost(list(partitions))
        for at in partitions:
            self.positions.pop(at)

    async def poll(self, max_records: int, timeout: float) -> FakeBatch:
        self.kafka.hit("poll")
        self.dropped = set()
        if self.script:
            await self.script.pop(0)()
        records: list[Record] = []
        ends: dict[TopicPartition, int] = {}
        for at, position in sorted(self.positions.items()):
            if at in self.paused:
                continue
            log = self.kafka.logs[at]
            while position < len(log) and len(records) < min(max_records, self.per_poll):
                record = log[position]
                position += 1
                if record is not None:
                    records.append(record)
            if position != self.positions[at] and position == len(log):
                ends[at] = position
            self.positions[at] = position
        # What was polled of a partition that went meanwhile is not delivered, though the position has passed it.
        records = [record for record in records if (record.topic, record.partition) not in self.dropped]
        ends = {at: end for at, end in ends.items() if at not in self.dropped}
        if not records:
            await asyncio.sleep(min(timeout, 0.002))
        return FakeBatch(records, ends)

    def group_metadata(self) -> GroupMetadata:
        return GroupMetadata("group", 1, "member", "instance")

    async def seek(self, offsets: Any) -> None:
        self.kafka.hit("seek")
        assert set(offsets) <= set(self.positions), "seek on a partition that is not assigned"
        self.put(offsets)

    async def pause(self, partitions: Any) -> None:
        self.paused |= set(partitions)

    async def resume(self, partitions: Any) -> None:
        self.paused -= set(partitions)

    async def close(self) -> None:
        if self.positions:
            await self.revoke(*list(self.positions))


class FakeReader:
    def __init__(self, kafka: FakeKafka) -> None:
        self.kafka = kafka
        self.positions: dict[TopicPartition, int] = {}

    async def start(self, offsets: Any) -> None:
        self.positions = dict(offsets)

    async def poll(self, max_records: int, timeout: float) -> FakeBatch:
        self.kafka.hit("read")
        records = []
        for at, position in self.positions.items():
            records += [record for record in self.kafka.logs[at][position:] if record is not None]
            self.positions[at] = len(self.kafka.logs[at])
        return FakeBatch(records, dict(self.positions))

    async def close(self) -> None:
        self.positions = {}
