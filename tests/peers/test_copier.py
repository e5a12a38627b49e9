"""Kafka's TransactionalMessageCopier: three, with random aborts, killed -9 and started again; and the broker, too.

What a reader of committed records sees of a copy must be its input: the same records in the same order, each once.
"""

from __future__ import annotations

import random
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from tests.conftest import unavailable
from tests.peers.outcomes import Verdict, settle
from tests.services.broker import BrokerProcess
from tests.services.kafka import kafka_jars, missing_tools

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

COPIERS = 3
RECORDS = 40_000
"""In each partition."""
KILLS = 9
SECONDS = 420


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    if missing_tools():
        unavailable("Java tools", f"{' and '.join(missing_tools())} not found")
    process = BrokerProcess(tmp_path / "broker")
    process.start()
    yield process
    process.stop()


def copier(bootstrap: str, partition: int, log: Path) -> subprocess.Popen[bytes]:
    command = ["java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*"]
    command += [
        "org.apache.kafka.tools.TransactionalMessageCopier", "--broker-list", bootstrap,
        "--transactional-id", f"copier-{partition}", "--input-topic", "source", "--input-partition", str(partition),
        "--output-topic", "copy", "--consumer-group", f"group-{partition}", "--transaction-size", "10",
        "--transaction-timeout", "10000", "--enable-random-aborts", "--use-group-metadata",
    ]  # fmt: skip
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def committed(bootstrap: str, partition: int) -> list[bytes]:
    reader = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": uuid.uuid4().hex,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    reader.assign([TopicPartition("copy", partition, 0)])
    found: list[bytes] = []
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            message = reader.poll(5)
            if message is not None and message.error() is None:
                found.append(message.value())
            elif message is not None:
                break  # The end of the partition.
    finally:
        reader.close()
    return found


def test_copies_record_by_record(broker: BrokerProcess, tmp_path: Path) -> None:
    for topic in ("source", "copy"):
        broker.create_topic(topic, COPIERS)
    inputs = {index: [b"%d-%d" % (index, number) for number in range(RECORDS)] for index in range(COPIERS)}
    producer = Producer({"bootstrap.servers": broker.bootstrap, "enable.idempotence": True})
    for index, values in inputs.items():
        for value in values:
            producer.produce("source", value, partition=index)
        assert producer.flush(60) == 0
    logs = {index: tmp_path / f"copier-{index}.log" for index in inputs}
    running = {index: copier(broker.bootstrap, index, logs[index]) for index in inputs}
    chance = random.Random(9)
    kills, next_kill, deadline = 0, time.monotonic() + 4, time.monotonic() + SECONDS
    try:
        while running and time.monotonic() < deadline:
            time.sleep(0.2)
            if kills < KILLS and time.monotonic() > next_kill:
                victim = chance.choice([*running, "broker"])
                if victim == "broker":
                    broker.kill()
                    broker.start()
                else:
                    running[victim].kill()
                kills += 1
                next_kill = time.monotonic() + chance.uniform(2, 5)
            for index, process in list(running.items()):
                code = process.poll()
                if code == 0:
                    del running[index]
                elif code is not None:
                    running[index] = copier(broker.bootstrap, index, logs[index])
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert kills == KILLS, f"the copies were done after {kills} kills"
    verdicts = {}
    for index, values in inputs.items():
        copied = committed(broker.bootstrap, index)
        first = next(
            (at for at, (ours, wanted) in enumerate(zip(copied, values, strict=False)) if ours != wanted), None
        )
        good = copied == values and index not in running
        detail = f"{len(copied)} of {RECORDS}, first difference at {first}; {logs[index].read_text()[-600:]}"
        verdicts[f"copier {index}, {KILLS} kills"] = Verdict("passed" if good else "failed", "" if good else detail)
    settle("copier", "Apache Kafka 4.3.1, `kafka-tools` from Maven Central", verdicts)
