"""Start to ready with a thousand partitions, after a clean stop and after kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semel.broker.embedded import EmbeddedBroker
from semel.broker.node import Node
from semel.wire.records import BatchBuilder
from tests.moment import NOW_MS

PARTITIONS = 1000
BATCHES = 10
CPU_SECONDS = 2.0
"""Twice what the start takes of one processor; the wall clock depends on who else is at work."""


def fill(data: Path) -> None:
    """A hundred megabytes of idempotent batches of 10 KB."""
    builder = BatchBuilder()
    for number in range(10):
        builder.append(b"key %d" % number, bytes(1000), NOW_MS)

    def write(node: Node) -> None:
        for partition in node.topics.create("t", PARTITIONS, {}).partitions:
            for number in range(BATCHES):
                batch = builder.build(producer_id=5, producer_epoch=0, base_sequence=number * 10)
                partition.log.append(bytearray(batch), node.env.wall_ms())

    with EmbeddedBroker(data) as broker:
        broker.call(write)


@pytest.mark.soak
def test_a_thousand_partitions_are_served_soon(tmp_path: Path) -> None:
    fill(tmp_path)
    for ending in ("a clean stop", "kill -9"):
        if ending == "kill -9":
            for snapshot in tmp_path.glob("topics/*/*/*.snapshot"):
                snapshot.unlink()  # As if none had been written yet: every byte is read.
        began = time.perf_counter()
        command = [sys.executable, "-m", "semel.broker.main", "--data", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("127.0.0.1:")
            seconds = time.perf_counter() - began
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            opened = len(os.listdir(f"/proc/{process.pid}/fd"))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        print(f"\n{PARTITIONS} partitions after {ending}: {seconds:.2f} s, {cpu:.2f} s of CPU, {opened} open files")
        assert cpu < CPU_SECONDS
        assert opened < 300
