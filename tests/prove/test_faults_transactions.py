"""Our producer behind the Kafka proxy, on every broker: whatever becomes of its requests, no transaction is torn.

Each lane is one producer with its own proxy and one kind of fault, which strikes one API after the other. What the
producer was told is then compared with what a read_committed reader finds.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.errors import AbortTransaction, OutcomeUnknown
from semel.prove.faults.kafka_proxy import KafkaProxy
from semel.prove.faults.rules import Action, Cut, Drop, Duplicate, Hold, Reorder, Rule
from semel.types import GroupMetadata, TopicPartition
from semel.wire.messages import api_name
from semel.wire.records import BatchBuilder
from tests.conftest import Address
from tests.moment import NOW_MS
from tests.reading import each

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

SETTINGS = {"socket.timeout.ms": 1_500, "delivery.timeout.ms": 60_000}
PRODUCE, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT = 0, 24, 25, 26, 28
APIS = {1: [PRODUCE, ADD_PARTITIONS, ADD_OFFSETS, TXN_OFFSET_COMMIT, END_TXN], 2: [PRODUCE, TXN_OFFSET_COMMIT, END_TXN]}
ACTIONS: dict[str, Action] = {
    "request dropped": Drop("request"),
    "response dropped": Drop("response"),
    "request cut": Cut("request", at=9),
    "response cut": Cut("response", at=7),
    "reset before": Cut("request", reset=True),
    "reset after": Cut("response", reset=True),
    "overtaken": Reorder(seconds=0.2),
    "late copy": Duplicate(seconds=None),
    "held until the client gave up": Hold("request"),
}
LATE = ("late copy", "held until the client gave up")
PARTITIONS, VALUES = 2, 3
"""Two records of a transaction go to one partition: a second Produce is in flight behind the first."""


@dataclass
class Told:
    """One transaction: what its writer was told of it."""

    number: int
    outcome: str = "unknown"

    def values(self) -> set[str]:
        return {f"{self.number}.{part}" for part in range(VALUES)}


class Lane:
    """One producer. Every transaction writes to two partitions and moves one offset; every third is aborted."""

    def __init__(self, broker: Address, topic: str, number: int, name: str) -> None:
        self.name = name
        self.action = ACTIONS[name]
        self.partitions = [TopicPartition(topic, PARTITIONS * number + part) for part in range(PARTITIONS)]
        self.input = TopicPartition(f"input-{topic}", number)
        self.group = f"{topic}-{number}"
        self.told: list[Told] = []
        self.late = 0
        self._broker = broker

    async def run(self) -> None:
        proxy = await KafkaProxy(self._broker.bootstrap).start()
        client = KafkaClient(proxy.bootstrap, client_id=self.group, settings=SETTINGS)
        try:
            await client.start()
            producer = TransactionalProducer(client, self.group)
            await producer.init_transactions()
            await self._transaction(producer)
            for api_key in APIS[self._broker.transaction_version]:
                if api_key == END_TXN and self.name == "late copy" and self._broker.transaction_version == 1:
                    # An EndTxn that was answered, and whose copy comes all the same: transactions V1 cannot tell it
                    # from the next transaction's own, and a producer that had its answer has no reason to ask for a
                    # new epoch. TCP makes no such copies, and ours sends none: it repeats only what has no answer.
                    continue
                # The first and the second of its kind: of two Produce requests in flight, each is struck once.
                for nth in (1, 2) if api_key == PRODUCE else (1,):
                    rule = proxy.add(Rule(self.action, api_key, on=nth))
                    await self._transaction(producer)
                    assert rule.struck.is_set(), f"{self.name}: no {api_name(api_key)} was struck"
                    if self.name in LATE:
                        await self._transaction(producer, late=rule)
                    proxy.remove(rule)
            await self._transaction(producer)
            await producer.close()
            ports = {port for _, port in client._nodes.values()}
            assert ports == {proxy.port_for(*address) for address in proxy._upstream}, "the client went round the proxy"
        finally:
            await client.close()
            await proxy.close()

    async def _transaction(self, producer: TransactionalProducer, late: Rule | None = None) -> None:
        """One transaction; what `late` held arrives between its records."""
        told = Told(len(self.told) + 1)
        self.told.append(told)
        try:
            producer.begin()
            for part, value in enumerate(sorted(told.values())):
                builder = BatchBuilder()
                builder.append(None, value.encode(), NOW_MS)
                await producer.produce(*self.partitions[part % PARTITIONS], builder)
                if late is not None and part == 0:
                    await producer.flush()
                    late.release()
                    await asyncio.wait_for(late.answered.wait(), 30)
                    self.late += late.answer is not None
            await producer.send_offsets({self.input: told.number}, GroupMetadata(self.group))
            commit = told.number % 3 != 0
            if not commit:
                await producer.flush()  # An abort drops what was not sent yet.
            await producer.end_transaction(commit)
            told.outcome = "committed" if commit else "aborted"
        except AbortTransaction:
            await producer.abort()
            told.outcome = "aborted"
        except OutcomeUnknown:
            await producer.init_transactions()

    def problems(self, found: dict[TopicPartition, list[str]], offset: int) -> list[str]:
        """What was lost, doubled or torn."""
        problems = []
        for told in self.told:
            values = sorted(told.values())
            counts = {found[self.partitions[part % PARTITIONS]].count(value) for part, value in enumerate(values)}
            allowed = {"committed": [{1}], "aborted": [{0}], "unknown": [{0}, {1}]}[told.outcome]
            if counts not in allowed:
                problems.append(f"transaction {told.number} was {told.outcome}, its records are there {counts} times")
        for at in self.partitions:
            order = [tuple(map(int, value.split("."))) for value in found[at]]
            if order != sorted(order):
                problems.append(f"the order in {at} is {order}")
        last = max(told.number for told in self.told if told.outcome == "committed")
        if not last <= offset <= max(last, *(told.number for told in self.told if told.outcome != "aborted")):
            problems.append(f"the committed offset is {offset}, the last transaction {last}")
        return [f"{self.name}: {problem}" for problem in problems]


async def read_all(bootstrap: str, ends: dict[TopicPartition, int]) -> dict[TopicPartition, list[str]]:
    found: dict[TopicPartition, list[str]] = {at: [] for at in ends}
    async with asyncio.timeout(60):
        async for record in each(bootstrap, ends):
            value = (record.value or b"").decode(errors="replace")
            found[TopicPartition(record.topic, record.partition)].append(value)
    return found


def test_no_transaction_is_torn_whatever_becomes_of_its_requests(any_broker: Address) -> None:
    async def run() -> list[str]:
        topic = f"faults-{uuid.uuid4().hex[:8]}"
        lanes = [Lane(any_broker, topic, number, name) for number, name in enumerate(ACTIONS)]
        async with KafkaClient(any_broker.bootstrap) as client:
            admin = Admin(client)
            specs = {topic: TopicSpec(PARTITIONS * len(lanes)), f"input-{topic}": TopicSpec(len(lanes))}
            await admin.create_topics(specs)
            partitions = [at for lane in lanes for at in lane.partitions]
            await admin.list_offsets(partitions, "latest")  # Repeated until each has its leader.
            async with asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(lane.run())
            deadline = time.monotonic() + 60
            while True:  # A transaction that nobody ends any more is ended by its time-out.
                ends = await admin.list_offsets(partitions, "high_watermark")
                if await admin.list_offsets(partitions, "stable") == ends:
                    break
                assert time.monotonic() < deadline, "a transaction hangs"
                await asyncio.sleep(0.2)
            found = await read_all(any_broker.bootstrap, ends)
            offsets = {lane: await admin.committed_offsets(lane.group, [lane.input]) for lane in lanes}
        assert all(lane.late for lane in lanes if lane.name in LATE)
        return [problem for lane in lanes for problem in lane.problems(found, offsets[lane].get(lane.input, 0))]

    assert asyncio.run(run()) == []
