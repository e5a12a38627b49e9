"""The two brokers under measurement, each a process of its own, with its CPU time and memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from confluent_kafka.admin import AdminClient, NewTopic
from tests.services.kafka import KafkaNode, free_port

__all__ = ["Kafka", "Semel", "Server", "memory_mb"]

_TICK = os.sysconf("SC_CLK_TCK")
_API_VERSIONS = bytes.fromhex("0000000a 0012 0000 00000001 ffff")
"""ApiVersions v0 with its length: the smallest question there is."""
KAFKA_SETTINGS = {
    # Apache Kafka's defaults, where the node for tests has others.
    "num.network.threads": "3",
    "num.io.threads": "8",
    "log.cleaner.dedupe.buffer.size": "134217728",
    "broker.session.timeout.ms": "9000",
    "broker.heartbeat.interval.ms": "2000",
}


class Server(Protocol):
    """A running broker."""

    name: str

    @property
    def bootstrap(self) -> str: ...
    @property
    def pid(self) -> int: ...
    def stop(self) -> None: ...


class Semel:
    """`semel broker`; `start_seconds` is from the start of the process to the first answer."""

    name = "semel"

    def __init__(self, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="semel-bench-")
        self.bootstrap = f"127.0.0.1:{free_port()}"
        argv = [sys.executable, "-m", "semel", "broker", "--data", f"{self._folder.name}/data", "--listen"]
        # An installed Semel has its bytecode, a checkout writes it at the first start, unless it is told not to.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with Path(self._folder.name, "log").open("wb") as log:
            began = time.monotonic()
            self._process = subprocess.Popen([*argv, self.bootstrap, *options], stdout=log, stderr=log, env=environment)
        self.start_seconds = _first_answer(self.bootstrap, began)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._folder.cleanup()


class Kafka:
    """Apache Kafka 4.3.1 with its defaults, 1 GB of heap and the JVM's full compiler."""

    name = "kafka"

    def __init__(self) -> None:
        self._node = KafkaNode(extra=KAFKA_SETTINGS, java=("-Xmx1g",))
        began = time.monotonic()
        self._node.start()
        self.start_seconds = _first_answer(self.bootstrap, began)

    @property
    def bootstrap(self) -> str:
        return self._node.bootstrap

    @property
    def pid(self) -> int:
        return self._node.pid

    def stop(self) -> None:
        self._node.stop()


def _first_answer(bootstrap: str, began: float) -> float:
    host, _, port = bootstrap.rpartition(":")
    while time.monotonic() - began < 60:
        try:
            with socket.create_connection((host, int(port)), 1) as connection:
                connection.sendall(_API_VERSIONS)
                if connection.recv(4):
                    return time.monotonic() - began
        except OSError:
            time.sleep(0.002)
    raise RuntimeError(f"no answer from {bootstrap}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Resident memory now, or at its peak with `VmHWM`, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/{pid}/status has no {field}")


def create_topic(bootstrap: str, name: str, partitions: int = 4, **configs: str) -> str:
    """Make a topic; underscores in the names of settings stand for dots."""
    config = {key.replace("_", "."): value for key, value in configs.items()}
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    admin.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result(30)
    # Kafka answers before the partitions have their leaders, and shows them shortly before they can be written.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        topic = admin.list_topics(name, timeout=10).topics[name]
        if len(topic.partitions) == partitions and all(found.leader >= 0 for found in topic.partitions.values()):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    return name


def drop_topic(bootstrap: str, name: str) -> None:
    """Delete a topic, so that its bytes do not stay in the page cache."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    admin.delete_topics([name])[name].result(30)
