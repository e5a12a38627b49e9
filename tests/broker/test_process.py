"""A broker as a process: killed under load, started twice, started where it cannot run."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from semel.broker import BrokerConfig, EmbeddedBroker
from semel.errors import ConfigurationError
from tests.services.kafka import free_port


class Process:
    """`python -m semel.broker.main` on one port and directory, over restarts."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.address = f"127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-m", "semel.broker.main", "--data", str(self.data), "--listen", self.address]

    def start(self, failpoint: str = "") -> float:
        """Start and wait until it serves; returns the seconds."""
        began = time.monotonic()
        environment = {"SEMEL_FAILPOINT": failpoint} if failpoint else None
        self.process = subprocess.Popen(
            self.command(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == self.address
        return time.monotonic() - began

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        code = self.process.wait(30)
        self.process.stdout.close()
        return code


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    running = Process(tmp_path / "data")
    yield running
    if running.process is not None and running.process.poll() is None:
        running.kill()


def read_all(address: str, topic: str, partitions: int, isolation: str = "read_committed") -> list[bytes]:
    consumer = Consumer(
        {
            "bootstrap.servers": address,
            "group.id": "reader",
            "isolation.level": isolation,
            "enable.partition.eof": True,
        }
    )
    consumer.assign([TopicPartition(topic, index, 0) for index in range(partitions)])
    values: list[bytes] = []
    ended = set()
    deadline = time.monotonic() + 30
    while len(ended) < partitions and time.monotonic() < deadline:
        message = consumer.poll(1)
        if message is None:
            continue
        error = message.error()
        if error is None:
            values.append(message.value())
        elif error.code() == KafkaError._PARTITION_EOF:
            ended.add(message.partition())
    consumer.close()
    assert len(ended) == partitions, "the topic could not be read to its end"
    return values


def test_acknowledged_records_survive_kills_under_load(process: Process) -> None:
    acknowledged: set[bytes] = set()
    sent = 0

    def delivered(error: KafkaError | None, message: Message) -> None:
        if error is None:
            acknowledged.add(message.value())

    process.start()
    producer = Producer(
        {
            "bootstrap.servers": process.address,
            "enable.idempotence": True,
            "linger.ms": 1,
            "reconnect.backoff.ms": 10,
            "reconnect.backoff.max.ms": 50,
            "log_level": 0,
        }
    )
    for _ in range(5):
        target = len(acknowledged) + 3_000
        deadline = time.monotonic() + 20
        while len(acknowledged) < target and time.monotonic() < deadline:
            try:
                producer.produce("orders", b"%d" % sent, on_delivery=delivered)
                sent += 1
            except BufferError:
                producer.poll(0.01)
            producer.poll(0)
        assert len(acknowledged) >= target, "the broker came back, but nothing was acknowledged"
        process.kill()
        process.start()
    assert producer.flush(30) == 0
    values = read_all(process.address, "orders", 4)
    assert len(values) == len(set(values)), "a record was written twice"
    assert acknowledged <= set(values), "an acknowledged record is gone"


@pytest.mark.parametrize(
    "point",
    [
        "broker.before_append",
        "broker.after_append",
        "broker.before_prepare",
        "broker.after_prepare",
        "broker.between_markers",
        "broker.after_markers",
    ],
)
def test_a_transaction_is_whole_after_a_kill_at_each_failpoint(process: Process, point: str) -> None:
    """confluent-kafka goes on by itself; whatever it says about the transaction is what readers see."""
    process.start(f"{point}:kill:3")
    producer = Producer(
        {
            "bootstrap.servers": process.address,
            "transactional.id": "w",
            "reconnect.backoff.ms": 10,
            "reconnect.backoff.max.ms": 50,
            "log_level": 0,
        }
    )
    producer.init_transactions(20)
    committed: set[bytes] = set()
    restarted = False
    for number in range(6):
        value = b"%d" % number
        producer.begin_transaction()
        for partition in range(4):
            producer.produce("orders", value, partition=partition)
        while True:
            try:
                producer.commit_transaction(0.5)
                committed.add(value)
                break
            except KafkaException as error:
                if not restarted:
                    assert process.wait() == -signal.SIGKILL
                    process.start()
                    restarted = True
                if error.args[0].txn_requires_abort():
                    producer.abort_transaction(20)
                    break
                if not error.args[0].retriable():
                    raise
    assert restarted, "the failpoint was never reached"
    values = read_all(process.address, "orders", 4)
    assert sorted(values) == sorted(list(committed) * 4)


def test_it_starts_fast_and_stops_by_sigterm(process: Process) -> None:
    seconds = process.start()
    assert seconds < 3, f"an empty broker took {seconds:.2f} s to start"
    assert process.process is not None
    process.process.terminate()
    assert process.wait() == 0
    process.start()


def test_it_takes_the_open_files_that_its_connections_need(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems give a process 1,024 unless it asks for more."""
    limited = ["sh", "-c", 'ulimit -Sn 400 && exec "$@"', "sh", *process.command()]
    monkeypatch.setattr(process, "command", lambda: limited)
    process.start()
    host, _, port = process.address.rpartition(":")
    connections = [socket.create_connection((host, int(port)), 10) for _ in range(500)]
    for connection in connections:
        connection.sendall(bytes.fromhex("0000000a 0012 0000 00000001 ffff"))
        assert connection.recv(4), "the broker refused a connection"
        connection.close()


def test_its_process_imports_what_a_broker_needs_and_no_more() -> None:
    """Each of these costs a tenth of a second at the start, and megabytes for as long as it runs."""
    heavy = ("uvicorn", "starlette", "fastapi", "confluent_kafka", "hypothesis", "sqlite3", "psycopg", "semel.client")
    code = f"import semel.ops.broker_process, sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_schemas_are_imported_when_they_are_asked_for() -> None:
    """kio has hundreds of modules, one for each version of a message; a client uses some twenty."""
    code = "import semel.ops.broker_process, sys; print(len([name for name in sys.modules if 'kio.schema' in name]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


def test_two_brokers_on_one_directory(process: Process) -> None:
    process.start()
    assert process.process is not None
    other = Process(process.data)
    done = subprocess.run(other.command(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert str(process.data) in done.stderr
    assert str(process.process.pid) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        broker = EmbeddedBroker(tmp_path / "a", port=port)
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}"):
            broker.start()
    broker.start()
    broker.stop()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        EmbeddedBroker(tmp_path / "file" / "data").start()


@pytest.mark.parametrize("wrong", [{"transaction_version": 3}, {"fsync": "never"}, {"advertised": "host"}])
def test_settings_that_cannot_work(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        BrokerConfig(**wrong)  # type: ignore[arg-type]
