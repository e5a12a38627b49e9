"""State of a million keys: a restore from nothing, then restarts with the tables on disk; and more keys than memory."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.client.producer import Producer, TransactionalProducer
from semel.processing.component import state_topic
from semel.types import TopicPartition
from semel.wire.partitioner import partition_for
from semel.wire.records import BatchBuilder
from tests.soak.state_app import PARTITIONS

KEYS = int(os.environ.get("SEMEL_SOAK_KEYS", "1000000"))
CHANGELOG = state_topic("much", "known")
RESTART_SECONDS = 3.0
MEMORY_MB = 200
"""Bound of a worker, however many keys there are."""


def key_of(number: int) -> bytes:
    return b"customer-%09d" % (number * 2_654_435_761 % 1_000_000_007)


async def fill(bootstrap: str) -> None:
    """The changelog as a processor would have written it: 100 bytes a key."""
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({CHANGELOG: TopicSpec(PARTITIONS, {"cleanup.policy": "compact"})})
        producer = TransactionalProducer(client, "much.filler")
        await producer.init_transactions()
        producer.begin()
        builders = [BatchBuilder() for _ in range(PARTITIONS)]
        now_ms = int(time.time() * 1000)
        for number in range(KEYS):
            key = key_of(number)
            at = partition_for(key, PARTITIONS)
            builders[at].append(key, b"value-%06d" % (number % 1_000_000) + b"." * 88, now_ms, ())
            if builders[at].size > 400_000:
                await producer.produce(CHANGELOG, at, builders[at])
                builders[at] = BatchBuilder()
            if number % 20_000 == 19_999:
                await producer.end_transaction(True)
                producer.begin()
        for at, builder in enumerate(builders):
            await producer.produce(CHANGELOG, at, builder)
        await producer.end_transaction(True)
        await producer.close()


async def ask(bootstrap: str, number: int, text: str) -> None:
    async with KafkaClient(bootstrap) as client:
        producer = Producer(client)
        await producer.start()
        key = key_of(number)
        await producer.send("asked", partition_for(key, PARTITIONS), key, text.encode())
        await producer.close()


@asynccontextmanager
async def answers(bootstrap: str) -> AsyncIterator[Reader]:
    reader = Reader(bootstrap)
    await reader.start({TopicPartition("told", 0): 0})
    yield reader
    await reader.close()


class WorkerProcess:
    def __init__(self, bootstrap: str, folder: Path) -> None:
        self.log = folder / "worker.log"
        environ = {**os.environ, "SEMEL_KAFKA": bootstrap, "SEMEL_DATA": str(folder / "data"), "SEMEL_INSTANCE": "soak"}
        command = [sys.executable, "-m", "semel", "child", "worker", "tests.soak.state_app:app", "--slot", "0"]
        self.began = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024

    async def until(self, reader: Reader, text: str) -> tuple[float, float, str]:
        """Seconds and seconds of CPU from the start to an answer that begins so."""
        async with asyncio.timeout(900):
            while True:
                assert self.process.poll() is None, self.log.read_text()[-3_000:]
                for record in (await reader.poll(100, 0.05)).records:
                    said = (record.value or b"").decode()
                    if said.startswith(text):
                        return time.perf_counter() - self.began, self.cpu(), said


async def measure(bootstrap: str, folder: Path) -> dict[str, tuple[float, float]]:
    await fill(bootstrap)
    found: dict[str, tuple[float, float]] = {}
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({"asked": TopicSpec(PARTITIONS), "told": TopicSpec(1)})
    async with answers(bootstrap) as reader:
        for what, ending, number in (
            ("from nothing", signal.SIGTERM, 3),
            ("after a clean stop", signal.SIGKILL, KEYS // 2),
            ("after kill -9", signal.SIGTERM, KEYS - 5),
        ):
            await ask(bootstrap, number, what)
            worker = WorkerProcess(bootstrap, folder)
            try:
                seconds, cpu, said = await worker.until(reader, what)
                assert said == f"{what}: value-{number % 1_000_000:06d}", said
                found[what] = seconds, cpu
                print(
                    f"\n{KEYS:,} keys {what}: {seconds:.2f} s to the first answer, {cpu:.2f} s of CPU, "
                    f"{worker.peak_mb()} MB at most"
                )
                assert worker.peak_mb() < MEMORY_MB
                lines = [line for line in worker.log.read_text().splitlines() if "restore" in line]
                print("\n".join(lines))
                if what == "from nothing":
                    assert any("to go" in line for line in lines) or seconds < 5
                else:
                    assert not any("from nothing" in line for line in lines)
            finally:
                worker.process.send_signal(ending)
                worker.process.wait(60)
    return found


@pytest.mark.soak
def test_a_million_keys_are_there_soon_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "broker") as broker:
        found = asyncio.run(measure(broker.address, tmp_path))
    for what in ("after a clean stop", "after kill -9"):
        assert found[what][1] < RESTART_SECONDS, "seconds of CPU: the clock on the wall depends on who else is at work"
