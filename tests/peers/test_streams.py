"""A Kafka Streams application with exactly_once_v2 and a state store: two instances, kill -9 of them and of the broker.

It sums numbers by key and writes every new sum. What a reader of committed records sees must be, for each key, the
running sums of the input in its order, each once: a record counted twice or lost would be off for ever after.
"""

from __future__ import annotations

import random
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer

from tests.conftest import unavailable
from tests.peers.acquire import Unavailable, javac, maven
from tests.peers.outcomes import Verdict, settle
from tests.services.broker import BrokerProcess

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

HERE = Path(__file__).parent / "java"
KEYS, PARTITIONS = 20, 4
RECORDS = 6_000
KILLS = 6
SOURCE = "kafka-streams 4.3.1 from Maven Central, an application of ours"


class Instance:
    """One process of the application, with a state folder of its own that survives kill -9."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


@pytest.fixture
def classes() -> tuple[Path, Path]:
    """Streams' jars and the compiled application."""
    try:
        jars = maven("streams-4.3.1", HERE / "pom.xml")
        return jars, javac([HERE / "Counts.java"], jars)
    except Unavailable as why:
        unavailable("Kafka Streams", str(why))
        raise


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    process = BrokerProcess(tmp_path / "broker")
    process.start()
    yield process
    process.stop()


def instances(classes: tuple[Path, Path], bootstrap: str, folder: Path, topics: tuple[str, str]) -> list[Instance]:
    jars, compiled = classes
    java = ["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{compiled}:{jars}/*"]
    java.append("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
    return [
        Instance(
            [*java, "Counts", bootstrap, "counts", str(folder / f"state-{number}"), *topics],
            folder / f"instance-{number}.log",
        )
        for number in (0, 1)
    ]


def committed_sums(bootstrap: str, topic: str, want: int, seconds: float) -> dict[str, list[int]]:
    """Every committed sum by key, in order; ends when `want` were read or the time is up, and reads on a little."""
    reader = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"check-{uuid.uuid4().hex}",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
        }
    )
    reader.subscribe([topic])
    sums: dict[str, list[int]] = defaultdict(list)
    read, deadline = 0, time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            for message in reader.consume(1_000, 1):
                if message.error() is None:
                    sums[message.key().decode()].append(int(message.value()))
                    read += 1
            if read >= want:
                deadline = min(deadline, time.monotonic() + 3)
    finally:
        reader.close()
    return sums


def test_streams_exactly_once(classes: tuple[Path, Path], broker: BrokerProcess, tmp_path: Path) -> None:
    topics = ("numbers", "sums")
    for topic in topics:
        broker.create_topic(topic, PARTITIONS)
    running = instances(classes, broker.bootstrap, tmp_path, topics)
    for instance in running:
        instance.start()
    producer = Producer({"bootstrap.servers": broker.bootstrap, "enable.idempotence": True})
    chance = random.Random(4)
    expected: dict[str, list[int]] = {f"k{key}": [] for key in range(KEYS)}
    for number in range(RECORDS):
        key = f"k{chance.randrange(KEYS)}"
        value = chance.randrange(1, 1_000)
        producer.produce("numbers", str(value), key=key)
        expected[key].append((expected[key][-1] if expected[key] else 0) + value)
        if number % (RECORDS // KILLS) == RECORDS // KILLS - 1:
            assert producer.flush(60) == 0
            time.sleep(3)  # Let some of it be processed, some not.
            victim = chance.choice(["first", "second", "broker"])
            if victim == "broker":
                broker.kill()
                broker.start()
            else:
                instance = running[victim == "second"]
                instance.kill()
                instance.start()
    assert producer.flush(60) == 0
    deadline = time.monotonic() + 240
    sums: dict[str, list[int]] = {}
    while time.monotonic() < deadline and sums != expected:
        for instance in running:
            if not instance.alive:
                instance.start()
        sums = dict(committed_sums(broker.bootstrap, "sums", RECORDS, 30))
    for instance in running:
        instance.kill()
    wrong = {key: (len(sums.get(key, [])), len(values)) for key, values in expected.items() if sums.get(key) != values}
    logs = "".join((tmp_path / f"instance-{number}.log").read_text()[-1_500:] for number in (0, 1)) if wrong else ""
    name = f"{RECORDS} records, 2 instances, {KILLS} kills of instances and of the broker: each sum once and in order"
    settle("streams", SOURCE, {name: Verdict("failed", f"{wrong} {logs}") if wrong else Verdict("passed")})
