"""A cluster in memory for the engine's loop: a log for each partition, one consumer, rebalances on demand."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from semel.client.consumer import ConsumerEvents
from semel.errors import SemelError
from semel.sinks.contract import Claim
from semel.sinks.source import Bounds
from semel.types import GroupMetadata, Record, TopicPartition
from tests.sinks import ledger


class FakeBatch(NamedTuple):
    records: list[Record]
    end_offsets: dict[TopicPartition, int]


class FakeSource:
    """`append` writes; `give` and `take` rebalance at the next poll. An offset without a record is a marker."""

    def __init__(self, partitions: int = 2) -> None:
        self.cluster_id = ledger.CLUSTER_ID
        self.topic_id = ledger.TOPIC_ID
        self.logs: dict[TopicPartition, dict[int, Record]] = {ledger.partition(n): {} for n in range(partitions)}
        self.ends: dict[TopicPartition, int] = dict.fromkeys(self.logs, 0)
        self.starts: dict[TopicPartition, int] = dict.fromkeys(self.logs, 0)
        self.to_give: list[TopicPartition] = list(self.logs)
        self.to_take: list[TopicPartition] = []
        self.consumers: list[FakeConsumer] = []
        self.poll_errors: list[SemelError] = []
        self.kept_ms: int | None = 7 * 86_400_000

    @property
    def latest(self) -> FakeConsumer:
        return self.consumers[-1]

    def append(self, part: int, key: str, value: int) -> int:
        at = ledger.partition(part)
        offset = self.ends[at]
        self.logs[at][offset] = ledger.record(offset, key, value, part)
        self.ends[at] = offset + 1
        return offset

    def marker(self, part: int) -> None:
        self.ends[ledger.partition(part)] += 1

    def recreate_topic(self) -> None:
        self.topic_id = uuid.uuid4()

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def retention_ms(self) -> int | None:
        return self.kept_ms

    async def claims(self, partitions: Sequence[TopicPartition]) -> list[Claim]:
        return [Claim(at, self.topic_id, self.starts[at]) for at in partitions]

    async def bounds(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Bounds]:
        return {at: Bounds(self.starts[at], self.ends[at]) for at in partitions}

    def consumer(self, events: ConsumerEvents) -> FakeConsumer:
        self.consumers.append(FakeConsumer(self, events))
        return self.latest


class FakeConsumer:
    def __init__(self, source: FakeSource, events: ConsumerEvents) -> None:
        self.source = source
        self.events = events
        self.positions: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()
        self.told: dict[TopicPartition, int] = {}
        self.polls = 0
        self.closed = False

    async def start(self) -> None:
        return None

    def group_metadata(self) -> GroupMetadata:
        return GroupMetadata("shop.totals", 1, "member")

    async def poll(self, max_records: int, timeout: float) -> FakeBatch:
        self.polls += 1
        if self.source.poll_errors:
            self.source.to_give += self.positions
            raise self.source.poll_errors.pop()
        await self._rebalance()
        batch = self._read(max_records)
        if not batch.records and not batch.end_offsets:
            await asyncio.sleep(min(timeout, 0.01))
        return batch

    async def _rebalance(self) -> None:
        taken, self.source.to_take = [at for at in self.source.to_take if at in self.positions], []
        if taken:
            await self.events.on_revoked(taken)
            for at in taken:
                del self.positions[at]
                self.paused.discard(at)
        given, self.source.to_give = self.source.to_give, []
        if given:
            offsets = await self.events.on_assigned(given)
            self.positions.update({at: offsets[at] for at in given})

    def _read(self, max_records: int) -> FakeBatch:
        records: list[Record] = []
        ends: dict[TopicPartition, int] = {}
        for at, position in self.positions.items():
            if at in self.paused:
                continue
            while position < self.source.ends[at] and len(records) < max_records:
                record = self.source.logs[at].get(position)
                if record is not None:
                    records.append(record)
                position += 1
            self.positions[at] = position
            if position == self.source.ends[at] and self.told.get(at) != position:
                ends[at] = self.told[at] = position
        return FakeBatch(records, ends)

    async def seek(self, offsets: dict[TopicPartition, int]) -> None:
        for at, offset in offsets.items():
            assert at in self.positions, f"seek to {at}, which is not assigned"
            self.positions[at] = offset
            self.told.pop(at, None)

    async def pause(self, partitions: Sequence[TopicPartition]) -> None:
        assert set(partitions) <= self.positions.keys(), "paused what is not assigned"
        self.paused |= set(partitions)

    async def resume(self, partitions: Sequence[TopicPartition]) -> None:
        self.paused -= set(partitions)

    async def close(self) -> None:
        self.closed = True
        if self.positions:
            await self.events.on_revoked(list(self.positions))
