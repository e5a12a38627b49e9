"""The demo's verdict: the topics and the database against the input.

Three witnesses: a reader that watched `inventory` while everything was being killed, a full read_committed scan of
both topics after draining, and the tables. What the first saw must be exactly the beginning of what the second finds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.databases import connect
from semel.databases.database import is_missing_table
from semel.errors import Retriable, SemelError
from semel.prove.check.findings import Findings
from semel.prove.check.totals import Effect, check_effects, check_totals
from semel.prove.purchases import Expected, Purchase
from semel.settings import Settings
from semel.types import Record, TopicPartition

__all__ = ["Found", "Ledger", "Verdict", "Witness", "judge"]

_TOPICS = ("orders", "inventory")
_STALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """What the database holds, counted from its tables."""

    customers_rows: Mapping[Hashable, tuple[int, ...]]
    stock_rows: Mapping[Hashable, tuple[int, ...]]

    @property
    def orders(self) -> int:
        return sum(row[0] for row in self.customers_rows.values())

    @property
    def cds(self) -> int:
        return sum(row[1] for row in self.customers_rows.values())

    @property
    def cents(self) -> int:
        return sum(row[2] for row in self.customers_rows.values())

    @property
    def customers(self) -> int:
        return len(self.customers_rows)

    @property
    def items_taken(self) -> int:
        return sum(row[0] for row in self.stock_rows.values())


@dataclass(frozen=True, slots=True)
class Verdict:
    """Input and outcome side by side, and what is wrong, if anything."""

    expected: Expected
    found: Found
    findings: Findings
    checked: int
    """Effects in topics that were compared one by one."""

    @property
    def exact(self) -> bool:
        found, expected = self.found, self.expected
        same = (found.orders, found.cds, found.cents) == (expected.orders, expected.cds, expected.cents)
        return self.findings.clean and same and found.items_taken == expected.cds


Log = dict[TopicPartition, list[Record]]


class Witness:
    """A read_committed reader of `inventory` that is there from the beginning, through every fault."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._seen: Log = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Witness:
        partitions = await _partitions(self._bootstrap, "inventory")
        reader = _reader(self._bootstrap)
        await reader.start(dict.fromkeys(partitions, 0))
        self._seen = {partition: [] for partition in partitions}
        self._task = asyncio.create_task(self._watch(reader))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _watch(self, reader: Reader) -> None:
        try:
            while True:
                batch = await reader.poll(2_000, 0.2)
                for record in batch.records:
                    self._seen[TopicPartition(record.topic, record.partition)].append(record)
        finally:
            await reader.close()

    async def close(self) -> Log:
        """Stop watching; what was seen."""
        if self._task is not None:
            self._task.cancel()
            done = await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            if isinstance(done[0], SemelError):
                raise done[0]
        return self._seen


class Ledger:
    """The outcome: both topics and the tables."""

    def __init__(self, bootstrap: str, database_url: str) -> None:
        self._bootstrap = bootstrap
        self._url = database_url

    async def drained(self, expected: Expected, timeout: float) -> None:
        """Return when the tables hold as much as expected, or when nothing has changed for half a minute.

        Neither decides the verdict: it is counted from what stands there after every process has stopped.
        """
        deadline = time.monotonic() + timeout
        last, since = (0, 0), time.monotonic()
        while time.monotonic() < deadline:
            found = await asyncio.to_thread(self.read_database)
            now = (found.orders, found.items_taken)
            if now == (expected.orders, expected.cds):
                return
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > _STALL_SECONDS:
                return
            await asyncio.sleep(0.1)

    def read_database(self) -> Found:
        """Both tables, whole."""
        database = connect(self._url)
        try:
            customers = database.query("SELECT customer_id, orders, cds, cents FROM customer_totals")
            stock = database.query("SELECT sku, taken FROM stock")
        finally:
            database.close()
        return Found({row[0]: tuple(row[1:]) for row in customers}, {row[0]: (row[1],) for row in stock})

    def has_rows(self) -> bool:
        """Whether the shop's tables are there and not empty."""
        database = connect(self._url)
        try:
            return bool(database.query("SELECT 1 FROM customer_totals LIMIT 1"))
        except Exception as error:
            if is_missing_table(error):
                return False
            raise
        finally:
            database.close()

    async def has_records(self) -> bool:
        """Whether the shop's topics are there and not empty."""
        async with _client(self._bootstrap) as client:
            admin = Admin(client)
            there = await admin.list_topics()
            wanted = [name for name in there if name in _TOPICS or name.startswith("shop.semel.")]
            partitions = [TopicPartition(name, number) for name in wanted for number in range(there[name].partitions)]
            ends = await admin.list_offsets(partitions, at="high_watermark")
        return any(ends.values())

    async def read_topics(self) -> Log:
        """Every committed record of both topics, in partition order."""
        log: Log = {}
        for topic in _TOPICS:
            partitions = await _partitions(self._bootstrap, topic)
            async with _client(self._bootstrap) as client:
                ends = await _settled_ends(Admin(client), partitions)
            log |= await _scan(self._bootstrap, ends)
        return log


def _client(bootstrap: str) -> KafkaClient:
    return KafkaClient(bootstrap, settings=Settings.from_environment().kafka_client)


def _reader(bootstrap: str) -> Reader:
    return Reader(bootstrap, settings=Settings.from_environment().kafka_client)


async def _partitions(bootstrap: str, topic: str) -> list[TopicPartition]:
    async with _client(bootstrap) as client:
        info = await client.topic(topic)
        return [TopicPartition(topic, number) for number in range(info.partitions)]


async def _settled_ends(admin: Admin, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """Where the partitions end once no transaction is open: Apache Kafka writes markers after it answered EndTxn."""
    deadline = time.monotonic() + _STALL_SECONDS
    while True:
        stable = await admin.list_offsets(partitions, at="stable")
        if stable == await admin.list_offsets(partitions, at="high_watermark"):
            return stable
        if time.monotonic() > deadline:
            raise Retriable(f"a transaction is still open in {partitions[0].topic} after {_STALL_SECONDS:.0f} s")
        await asyncio.sleep(0.05)


async def _scan(bootstrap: str, ends: Mapping[TopicPartition, int]) -> Log:
    reader = _reader(bootstrap)
    await reader.start(dict.fromkeys(ends, 0))
    log: Log = {partition: [] for partition in ends}
    open_partitions = {partition for partition, end in ends.items() if end > 0}
    try:
        while open_partitions:
            batch = await reader.poll(5_000, 1.0)
            for record in batch.records:
                log[TopicPartition(record.topic, record.partition)].append(record)
            for partition, position in batch.end_offsets.items():
                if position >= ends[partition]:
                    open_partitions.discard(partition)
    finally:
        await reader.close()
    return log


def judge(
    expected: Expected,
    purchases: Sequence[Purchase],
    sku: Callable[[int, int], str],
    topics: Log,
    seen: Log,
    found: Found,
) -> Verdict:
    """Compare everything with everything and say what is lost, doubled, torn or out of order."""
    findings = Findings()
    orders = [record for partition, log in topics.items() if partition.topic == "orders" for record in log]
    items = [record for partition, log in topics.items() if partition.topic == "inventory" for record in log]
    where: dict[int, tuple[int, int]] = {}
    order_effects: list[Effect] = []
    for record in orders:
        line = int(_json(record)["id"])
        where[line] = (record.partition, record.offset)
        order_effects.append(Effect(line, 0, (record.partition, record.offset)))
    findings.merge(check_effects({purchase.line: (0,) for purchase in purchases}, order_effects))
    item_effects: list[Effect] = []
    for record in items:
        value = _json(record)
        line, position = int(value["order_id"]), int(value["position"])
        name = str(value["sku"])
        if name != sku(line, position):
            findings.add("E8", f"input {line}", f"item {position} is {name}, expected {sku(line, position)}")
        item_effects.append(Effect(line, position, (record.partition, record.offset), name, where.get(line)))
    findings.merge(check_effects({purchase.line: range(purchase.cds) for purchase in purchases}, item_effects))
    customers: dict[Hashable, tuple[int, ...]] = dict(expected.customers.items())
    findings.merge(check_totals("customer", customers, found.customers_rows))
    titles: dict[Hashable, tuple[int, ...]] = {name: (count,) for name, count in expected.stock.items()}
    findings.merge(check_totals("title", titles, found.stock_rows))
    findings.merge(_check_witness(seen, topics))
    return Verdict(expected, found, findings, len(orders) + len(items))


def _check_witness(seen: Log, topics: Log) -> Findings:
    """What the witness saw and the scan lacks was never committed; a hole in what it saw tore a transaction."""
    findings = Findings()
    for partition, records in seen.items():
        final = topics.get(partition, [])
        for index, record in enumerate(records):
            if index >= len(final) or final[index].offset != record.offset or final[index].value != record.value:
                findings.add("L11", f"{partition}@{record.offset}", "the concurrent reader saw it out of place")
                break
    return findings


def _json(record: Record) -> Any:
    return msgspec.json.decode(record.value or b"null")
