"""A broker in which an allocation fails ends at once; its successor has what was acknowledged, and nothing hangs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from semel.broker.broker import EXIT_NO_MEMORY
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.errors import AbortTransaction, OutcomeUnknown
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS
from tests.prove.test_faults_transactions import read_all
from tests.services.broker import BrokerProcess

SETTINGS = {"socket.timeout.ms": 2_000, "delivery.timeout.ms": 30_000}
AT = TopicPartition("memory", 0)
STARVED = """
import sys
from semel.broker.main import main
from semel.log.log import PartitionLog

left, applied = int(sys.argv.pop()), PartitionLog._applied

def without_memory(self, *arguments, **more):
    # The batch is in the file, and the log's state counts it; its index does not.
    global left
    left -= 1
    if left < 0:
        raise MemoryError
    applied(self, *arguments, **more)

PartitionLog._applied = without_memory
sys.exit(main())
"""


@pytest.mark.parametrize("nth", [14, 23, 34])
def test_a_broker_without_memory_ends_and_nothing_hangs_behind_it(tmp_path: Path, nth: int) -> None:
    broker = BrokerProcess(tmp_path / "data")
    command = [sys.executable, "-c", STARVED, "--data", str(tmp_path / "data"), "--listen", broker.bootstrap, str(nth)]
    with (tmp_path / "starved.log").open("wb") as log:
        starved = subprocess.Popen(command, stdout=log, stderr=log)
    committed: list[str] = []
    unknown: list[str] = []

    async def commit(producer: TransactionalProducer, number: int) -> None:
        builder = BatchBuilder()
        builder.append(None, str(number).encode(), NOW_MS)
        try:
            producer.begin()
            await producer.produce(*AT, builder)
            await producer.send_offsets({AT: number}, GroupMetadata("memory"))
            await producer.end_transaction(True)
            committed.append(str(number))
        except AbortTransaction:
            await producer.abort()
        except OutcomeUnknown:
            unknown.append(str(number))
            await producer.init_transactions()

    async def run() -> dict[TopicPartition, int]:
        async with KafkaClient(broker.bootstrap, settings=SETTINGS) as client:
            admin = Admin(client)
            await admin.create_topics({AT.topic: TopicSpec(1)})
            producer = TransactionalProducer(client, "memory")
            await producer.init_transactions()
            working = asyncio.create_task(commit_many(producer))
            assert await asyncio.to_thread(starved.wait, 30) == EXIT_NO_MEMORY
            broker.start()
            await asyncio.wait_for(working, 90)
            await producer.close()
            ends = await admin.list_offsets([AT], "high_watermark")
            assert await admin.list_offsets([AT], "stable") == ends
            return ends

    async def commit_many(producer: TransactionalProducer) -> None:
        for number in range(20):
            await commit(producer, number)

    try:
        ends = asyncio.run(run())
        found = asyncio.run(read_all(broker.bootstrap, ends))[AT]
        assert [value for value in found if value not in unknown] == committed
        assert len(set(found)) == len(found)
        assert b"out of memory: the broker ends" in (tmp_path / "starved.log").read_bytes()
    finally:
        starved.kill()
        starved.wait()
        broker.stop()
