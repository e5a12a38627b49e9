"""kill -9 of the embedded broker under load: what was acknowledged is there, what was not sent is not."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from tests.services.broker import BrokerProcess


class Load:
    """Idempotent producers that never stop; remembers what was sent and what was acknowledged."""

    def __init__(self, bootstrap: str, topic: str, name: str) -> None:
        self.sent: set[bytes] = set()
        self.acknowledged: set[bytes] = set()
        self._stop = threading.Event()
        self._topic, self._name = topic, name
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "linger.ms": 2,
                "reconnect.backoff.ms": 20,
                "reconnect.backoff.max.ms": 100,
                "retry.backoff.ms": 20,
                "log_level": 0,
            }
        )
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            for _ in range(50):
                value = f"{self._name}-{number}".encode()
                self.sent.add(value)
                try:
                    self._producer.produce(self._topic, value, key=value, on_delivery=self._delivered)
                except BufferError:  # The broker is away and librdkafka's queue is full: the same record again.
                    break
                number += 1
            self._producer.poll(0.005)
        self._producer.flush(60)

    def _delivered(self, error: object, message: Message) -> None:
        if error is None:
            value = message.value()
            assert isinstance(value, bytes)
            self.acknowledged.add(value)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def read_all(bootstrap: str, topic: str, partitions: int) -> Counter[bytes]:
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "scan", "enable.auto.commit": False, "enable.partition.eof": True}
    )
    consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    values: Counter[bytes] = Counter()
    ended: set[int | None] = set()
    deadline = time.monotonic() + 120
    while len(ended) < partitions and time.monotonic() < deadline:
        for message in consumer.consume(10_000, 0.5):
            if message.error():
                ended.add(message.partition())
            else:
                value = message.value()
                assert isinstance(value, bytes)
                values[value] += 1
    consumer.close()
    assert len(ended) == partitions
    return values


def kill_under_load(folder: Path, kills: int, fsync: str = "os") -> tuple[int, float]:
    """Returns (records acknowledged, slowest restart in seconds)."""
    broker = BrokerProcess(folder / "data", fsync=fsync)
    broker.start()
    broker.create_topic("load", 4)
    loads = [Load(broker.bootstrap, "load", f"p{number}") for number in range(2)]
    rng = random.Random(kills)
    slowest = 0.0
    for load in loads:
        load.start()
    try:
        for _ in range(kills):
            time.sleep(rng.uniform(0.05, 0.4))
            broker.kill()
            slowest = max(slowest, broker.start())
    finally:
        for load in loads:
            load.stop()
    found = read_all(broker.bootstrap, "load", 4)
    broker.stop()
    sent = set().union(*(load.sent for load in loads))
    acknowledged = set().union(*(load.acknowledged for load in loads))
    assert acknowledged, "the load never got through: the test shows nothing"
    assert not acknowledged - found.keys(), "acknowledged records are gone"
    assert not found.keys() - sent, "records are served that nobody sent"
    assert max(found.values()) == 1, "an idempotent producer's record is there twice"
    return len(acknowledged), slowest


@pytest.mark.parametrize("fsync", ["os", "always"])
def test_a_few_kills(tmp_path: Path, fsync: str) -> None:
    records, slowest = kill_under_load(tmp_path, 8 if fsync == "os" else 4, fsync)
    print(f"{fsync}: a few kills, {records} records acknowledged, slowest restart {slowest:.2f} s")


@pytest.mark.soak
@pytest.mark.parametrize("fsync", ["os", "always"])
def test_a_hundred_kills(tmp_path: Path, fsync: str) -> None:
    records, slowest = kill_under_load(tmp_path, 100, fsync)
    print(f"{fsync}: 100 kills, {records} records acknowledged, slowest restart {slowest:.2f} s")


@pytest.mark.soak
def test_restart_with_a_gigabyte_of_log(tmp_path: Path) -> None:
    broker = BrokerProcess(tmp_path / "data")
    broker.start()
    broker.create_topic("big", 4)
    producer = Producer(
        {"bootstrap.servers": broker.bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 200_000}
    )
    value = random.Random(1).randbytes(1024)
    for _ in range(1_000_000):
        while True:
            try:
                producer.produce("big", value)
                break
            except BufferError:
                producer.poll(0.05)
    producer.flush(120)
    size = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert size > 1_000_000_000
    broker.kill()
    seconds = broker.start()
    print(f"{size / 1e9:.2f} GB of log, ready {seconds:.2f} s after kill -9")
    producer.produce("big", b"after")
    assert producer.flush(10) == 0
    broker.stop()
    assert seconds < 1.0
