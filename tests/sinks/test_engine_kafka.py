"""The whole sink against a real broker: workers are killed and stopped, the database restarts, the result is exact."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import Producer
from tests.conftest import Address, empty_database
from tests.services.opensearch import OpenSearchNode
from tests.services.postgres import PostgresServer
from tests.sinks import ledger

ROOT = Path(__file__).resolve().parents[2]
PARTITIONS = 4
KEYS = 40


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        # What it adds to the suite of the sink alone is the same on every store.
        pytest.param("mariadb", marks=[pytest.mark.mariadb, pytest.mark.soak]),
        pytest.param("valkey", marks=[pytest.mark.valkey, pytest.mark.soak]),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return empty_database(request, tmp_path)


class Workers:
    """Two slots, started again whenever their process ended: what a supervisor does."""

    def __init__(self, bootstrap: str, url: str, folder: Path) -> None:
        self._arguments = [bootstrap, url, str(folder)]
        self._log = (folder / "workers.log").open("ab")
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.log = folder / "workers.log"
        self.ended: list[int] = []

    def keep(self, failpoint: str = "") -> None:
        """Start what does not run."""
        for slot in range(2):
            process = self._processes.get(slot)
            if process is not None and process.poll() is None:
                continue
            if process is not None:
                self.ended.append(process.returncode)
            self._processes[slot] = subprocess.Popen(
                [sys.executable, "-m", "tests.sinks.engine_child", *self._arguments, str(slot)],
                cwd=ROOT,
                env=os.environ | {"SEMEL_FAILPOINT": failpoint if slot == 0 else ""},
                stdout=self._log,
                stderr=self._log,
            )

    def signal(self, slot: int, number: signal.Signals) -> None:
        self._processes[slot].send_signal(number)
        if number is signal.SIGKILL:
            self._processes[slot].wait()

    def stop(self) -> list[int]:
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        codes = []
        for process in self._processes.values():
            try:
                codes.append(process.wait(20))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        self._log.close()
        return codes


async def produce(bootstrap: str, total: int, pace: float) -> None:
    async with KafkaClient(bootstrap) as client:
        await Admin(client).create_topics({ledger.TOPIC.name: TopicSpec(PARTITIONS, {})})
        producer = Producer(client, linger_ms=2)
        await producer.start()
        for start in range(0, total, 100):
            await asyncio.gather(
                *(
                    producer.send(ledger.TOPIC.name, number % PARTITIONS, f"k{number % KEYS}".encode(), b"1")
                    for number in range(start, min(start + 100, total))
                )
            )
            await asyncio.sleep(pace)
        await producer.close()


def applied(url: str) -> int:
    try:
        return len(ledger.seen(url))
    except Exception:
        return -1  # The database is just being restarted.


@pytest.fixture
def broker(tmp_path: Path) -> object:
    from semel.broker.config import BrokerConfig
    from semel.broker.embedded import EmbeddedBroker

    with EmbeddedBroker(tmp_path / "broker", config=BrokerConfig()) as made:
        yield Address(made.address, "embedded", 2)


@pytest.mark.timeout(180)
def test_kills_and_pauses_leave_every_effect_there_once(
    broker: Address, url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    total, rng = 6_000, random.Random(7)
    workers = Workers(broker.bootstrap, url, tmp_path)
    points = ["sink.before_effects:kill:3", "sink.before_db_commit:kill:5", "sink.after_db_commit:kill:4"]
    workers.keep(points[0])

    async def strike() -> None:
        for number in range(7):
            await asyncio.sleep(0.8 + rng.random())
            if number in (2, 5):
                workers.signal(1, signal.SIGSTOP)
                await asyncio.sleep(2.5)  # Past the session time-out.
                workers.signal(1, signal.SIGCONT)
            elif number == 4 and url.startswith("postgresql"):
                server: PostgresServer | OpenSearchNode = request.getfixturevalue("postgres")
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            elif number == 4 and url.startswith("opensearch"):
                server = request.getfixturevalue("opensearch")
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            else:
                workers.signal(rng.randrange(2), signal.SIGKILL)
            workers.keep(points[number % 3])

    async def play() -> None:
        await asyncio.gather(produce(broker.bootstrap, total, 0.12), strike())

    try:
        asyncio.run(play())
        deadline = time.monotonic() + 60
        while applied(url) < total:
            assert time.monotonic() < deadline, workers.log.read_text()[-3000:]
            workers.keep()
            time.sleep(0.1)
    finally:
        codes = workers.stop()
    seen = Counter(ledger.seen(url))
    assert len(seen) == total, "records were lost"
    assert max(seen.values()) == 1, "records were applied twice"
    assert ledger.totals(url) == {f"k{n}": (total // KEYS, total // KEYS) for n in range(KEYS)}
    # One that was started a moment ago has no signal handler yet.
    assert set(codes) <= {0, -signal.SIGTERM}, workers.log.read_text()[-2000:]
    assert 0 in codes
    assert workers.ended.count(-signal.SIGKILL) >= 5
    for part in range(PARTITIONS):
        assert ledger.position(url, part)[0] == total // PARTITIONS


def test_a_topic_that_is_deleted_and_made_again_stops_the_sink(broker: Address, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sink.db"
    workers = Workers(broker.bootstrap, url, tmp_path)

    async def recreate() -> None:
        async with KafkaClient(broker.bootstrap) as client:
            before = (await client.topic(ledger.TOPIC.name)).topic_id
            await Admin(client).delete_topics([ledger.TOPIC.name])
            await Admin(client).create_topics({ledger.TOPIC.name: TopicSpec(PARTITIONS, {})})
            await client.refresh_metadata(ledger.TOPIC.name)
            after = (await client.topic(ledger.TOPIC.name)).topic_id
        assert isinstance(after, uuid.UUID)
        assert before != after

    try:
        asyncio.run(produce(broker.bootstrap, 400, 0))
        workers.keep()
        deadline = time.monotonic() + 30
        while applied(url) < 400:
            assert time.monotonic() < deadline, workers.log.read_text()[-3000:]
            time.sleep(0.05)
        asyncio.run(recreate())
        asyncio.run(produce(broker.bootstrap, 800, 0))
        while "TOPIC_RECREATED" not in workers.log.read_text():
            assert time.monotonic() < deadline + 30, workers.log.read_text()[-3000:]
            workers.keep()
            time.sleep(0.05)
    finally:
        workers.stop()
    assert "it was deleted and made again" in workers.log.read_text()
