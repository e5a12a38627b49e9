"""The embedded broker as a process of its own that can be killed and restarted on the same port and data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from confluent_kafka.admin import AdminClient

from tests.services.kafka import free_port

__all__ = ["BrokerProcess"]


class BrokerProcess:
    """`semel broker` under the test's own hand."""

    def __init__(self, data: Path, *, transaction_version: int = 2, fsync: str = "os") -> None:
        self.port = free_port()
        self._argv = [sys.executable, "-m", "semel", "broker", "--data", str(data), "--listen", self.bootstrap]
        self._argv += ["--transaction-version", str(transaction_version), "--fsync", fsync]
        self._log = data.parent / f"{data.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, environment: Mapping[str, str] | None = None) -> float:
        """Start and return the seconds until a client was answered."""
        began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )
        import socket

        while time.monotonic() - began < 30:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                    # ApiVersions v0: the smallest question there is.
                    connection.sendall(bytes.fromhex("0000000a 0012 0000 00000001 ffff"))
                    if connection.recv(4):
                        return time.monotonic() - began
            except OSError:
                time.sleep(0.005)
        raise AssertionError(f"the broker did not answer: {self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone, if it is not already."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def create_topic(self, name: str, partitions: int = 4) -> None:
        from confluent_kafka.admin import NewTopic

        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result(20)
