"""A broker that dies by kill -9 in the middle of everything: what the producers were told is what stands in the log."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import Producer, TransactionalProducer
from semel.errors import AbortTransaction, OutcomeUnknown, Retriable
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS
from tests.reading import each, ends_without_open
from tests.services.kafka import free_port

KILLS = 6
SETTINGS = {"socket.timeout.ms": 2_000, "delivery.timeout.ms": 20_000}
INPUT = TopicPartition("input", 0)


class BrokerProcess:
    """The embedded broker as its own process, on a fixed port, so that a restart is found again."""

    def __init__(self, data: Path, version: int) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [sys.executable, "-m", "semel", "broker", "--data", str(data), "--listen", self.address]
        self._command += ["--transaction-version", str(version)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


class Ledger:
    """What the writers were told."""

    def __init__(self) -> None:
        self.transactions: list[tuple[str, set[str], int]] = []
        self.sent: dict[str, str] = {}


async def transactions(client: KafkaClient, ledger: Ledger, stop: asyncio.Event) -> None:
    producer = TransactionalProducer(client, "kills")
    await producer.init_transactions()
    number = 0
    while not stop.is_set():
        number += 1
        values = {f"t{number}.{part}" for part in range(4)}
        outcome = "aborted"
        try:
            producer.begin()
            for part, value in enumerate(sorted(values)):
                builder = BatchBuilder()
                builder.append(None, value.encode(), NOW_MS)
                await producer.produce("out", part % 2, builder)
            await producer.send_offsets({INPUT: number}, GroupMetadata("kills"))
            await producer.end_transaction(number % 5 != 0)
            outcome = "committed" if number % 5 else "aborted"
        except AbortTransaction:
            await producer.abort()
        except OutcomeUnknown:
            outcome = "unknown"
            await producer.init_transactions()
        ledger.transactions.append((outcome, values, number))
    await producer.close()


async def single_records(client: KafkaClient, ledger: Ledger, stop: asyncio.Event) -> None:
    producer = Producer(client)
    await producer.start()
    number = 0
    while not stop.is_set():
        number += 1
        value = f"s{number}"
        try:
            await producer.send("single", number % 2, None, value.encode())
            ledger.sent[value] = "written"
        except Retriable:
            ledger.sent[value] = "not written"
        except OutcomeUnknown:
            ledger.sent[value] = "unknown"
    await producer.close()


async def killer(broker: BrokerProcess, ledger: Ledger, rng: random.Random, stop: asyncio.Event) -> None:
    """Kill it in the middle of something: every life of the broker sees both writers get on."""
    try:
        async with asyncio.timeout(90):
            for life in range(KILLS + 1):
                ended, sent = len(ledger.transactions), len(ledger.sent)
                while len(ledger.transactions) < ended + 2 or len(ledger.sent) < sent + 2:
                    await asyncio.sleep(0.02)
                if life < KILLS:
                    await asyncio.sleep(rng.random() * 0.6)
                    await asyncio.to_thread(broker.kill)
                    broker.start()
    finally:
        stop.set()


async def read_all(bootstrap: str, admin: Admin, topic: str) -> list[str]:
    partitions = [TopicPartition(topic, number) for number in range(2)]
    ends = await ends_without_open(admin, partitions)
    return [(record.value or b"").decode() async for record in each(bootstrap, ends)]


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_what_was_told_is_what_is_there(tmp_path: Path, version: int) -> None:
    broker = BrokerProcess(tmp_path / "data", version)
    ledger = Ledger()

    async def main() -> tuple[list[str], list[str], int]:
        async with KafkaClient(broker.address, settings=SETTINGS) as client:
            admin = Admin(client)
            await admin.create_topics({name: TopicSpec(2) for name in ("out", "single", "input")})
            stop = asyncio.Event()
            await asyncio.gather(
                transactions(client, ledger, stop),
                single_records(client, ledger, stop),
                killer(broker, ledger, random.Random(version), stop),
            )
            offset = (await admin.committed_offsets("kills", [INPUT])).get(INPUT, 0)
            out = await read_all(broker.address, admin, "out")
            return out, await read_all(broker.address, admin, "single"), offset

    broker.start()
    try:
        out, single, offset = asyncio.run(main())
    finally:
        broker.kill()
    seen = Counter(out)
    assert not [value for value, count in seen.items() if count > 1]
    happened = 0
    for outcome, values, number in ledger.transactions:
        there = {value for value in values if seen[value]}
        assert there in (set(), values), f"torn: {there} of {values}"
        assert outcome == "unknown" or bool(there) == (outcome == "committed"), f"{values}: {outcome}, seen {there}"
        happened = number if there else happened
    assert offset == happened
    counts = Counter(single)
    for value, outcome in ledger.sent.items():
        assert counts[value] == {"written": 1, "not written": 0}.get(outcome, min(counts[value], 1)), (value, outcome)
    assert len(ledger.transactions) > KILLS
    assert len(ledger.sent) > KILLS
