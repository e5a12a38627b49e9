"""Read, process, write: the loops of `bench/loops`, each in processes of its own, over topics filled before."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from confluent_kafka import Producer
from tests.processing.running import cluster

from bench.servers import cpu_seconds, create_topic, drop_topic, memory_mb
from semel.types import TopicPartition as Partition

__all__ = ["LOOPS", "Filled", "Measured", "filled", "measure"]

LOOPS = ("semel", "semel_python", "semel_alo", "confluent", "aiokafka", "quixstreams", "streams")
"""Ours: as installed, with the codec in Python, and at least once; then everybody else."""

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("loops")
KEYS = 10_000
COMMIT_INTERVAL_MS = 100
_QUIXSTREAMS = ("quixstreams==3.28.1", "confluent-kafka==2.12.2", "msgspec")
_SECONDS = 180.0
"""How long a loop may take before it counts as stuck."""


class Filled(NamedTuple):
    """A topic with records to copy."""

    bootstrap: str
    topic: str
    partitions: int
    records: int


class Measured(NamedTuple):
    """From the first commit that was seen to the last, so that starting and joining do not count."""

    rate: float
    cpu_us: float
    """CPU microseconds a record, of all processes of the loop."""
    memory_mb: float
    """The largest process at its peak."""
    commits: float
    """Transactions a second; ours alone says."""


def filled(bootstrap: str, size: int, records: int, partitions: int = 4) -> Filled:
    """A topic of its own with `records` orders of `size` bytes."""
    topic = create_topic(bootstrap, f"orders-{uuid.uuid4().hex[:8]}", partitions)
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 500_000})
    pad = b"x" * (size - len(b'{"id":1000000,"amount":999,"pad":""}'))
    for number in range(records):
        value = b'{"id":%d,"amount":%d,"pad":"%s"}' % (1_000_000 + number, 100 + number % 900, pad)
        while True:
            try:
                producer.produce(topic, value, b"k%d" % (number % KEYS))
                break
            except BufferError:
                producer.poll(0.05)
    assert producer.flush(120) == 0
    return Filled(bootstrap, topic, partitions, records)


def measure(loop: str, source: Filled, share: int = 1, workers: int = 1) -> Measured:
    """Let a loop copy the whole topic, or its first `1/share`, and take the time."""
    name = uuid.uuid4().hex[:8]
    ours = loop.startswith("semel")
    group = f"b{name}.copy" if ours else f"b{name}"
    target = create_topic(source.bootstrap, f"seen-{name}", source.partitions)
    environment = os.environ | {
        "BOOTSTRAP": source.bootstrap,
        "SOURCE": source.topic,
        "TARGET": target,
        "GROUP": group,
        "INTERVAL_MS": str(COMMIT_INTERVAL_MS),
        "DELIVERY": "at-least-once" if loop == "semel_alo" else "exactly-once",
    }
    if loop == "semel_python":
        environment["SEMEL_CODEC"] = "python"
    if ours:
        subprocess.run([*_ours("prepare"), str(source.partitions)], env=environment, check=True)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        processes = [
            subprocess.Popen(_argv(loop, slot, source), env=environment, stdout=output, stderr=log)
            for slot in range(workers)
        ]
        try:
            found = asyncio.run(_watch(source, group, processes, source.records // share))
        except AssertionError:
            log.seek(0)
            print(*deque(log, 20), file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
        output.seek(0)
        commits = sum(int(line) for line in output if ours and line.strip().isdigit())
    drop_topic(source.bootstrap, target)
    return found._replace(commits=commits * found.rate / source.records)


def _argv(loop: str, slot: int, source: Filled) -> list[str]:
    if loop.startswith("semel"):
        return [*_ours(str(slot)), str(source.partitions)]
    if loop == "streams":
        return ["java", "-Xmx512m", "-cp", f"{_streams_jars()}/*", str(FOLDER / "StreamsLoop.java")]
    python = _quixstreams_python() if loop == "quixstreams" else sys.executable
    return [python, str(FOLDER / f"{loop}_loop.py")]


def _ours(what: str) -> list[str]:
    return [sys.executable, str(FOLDER / "semel_loop.py"), what]


async def _watch(source: Filled, group: str, processes: Sequence[subprocess.Popen[bytes]], records: int) -> Measured:
    wanted = [Partition(source.topic, number) for number in range(source.partitions)]
    began = time.monotonic()
    first: tuple[float, int, float] | None = None
    async with cluster(source.bootstrap) as (_, admin):
        while True:
            done = sum(max(0, offset) for offset in (await admin.committed_offsets(group, wanted)).values())
            now, cpu = time.monotonic(), sum(cpu_seconds(process.pid) for process in processes)
            if done >= records and first is not None and done > first[1]:
                memory = max(memory_mb(process.pid, "VmHWM") for process in processes)
                count = done - first[1]
                return Measured(count / (now - first[0]), (cpu - first[2]) / count * 1e6, memory, 0.0)
            if done > 0 and first is None:
                first = (now, done, cpu)
            assert now - began < _SECONDS, f"{done} of {records} records in {now - began:.0f} s"
            assert all(process.poll() is None for process in processes), "a loop ended"
            await asyncio.sleep(0.02)


# --- What the others need ---


def _quixstreams_python() -> str:
    """It wants an older confluent-kafka than ours: an environment of its own, made once."""
    if find_spec("quixstreams") is not None:
        return sys.executable
    folder = ROOT / ".cache" / "quixstreams"
    python = str(folder / "bin" / "python")
    if not (folder / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *_QUIXSTREAMS], check=True)
        (folder / ".complete").touch()
    return python


def _streams_jars() -> Path:
    jars = ROOT / ".cache" / "kafka-streams-4.3.1"
    if not (jars / ".complete").exists():
        copy = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        subprocess.run(["mvn", "-q", "-B", "-f", str(FOLDER / "pom.xml"), *copy], check=True)
        (jars / ".complete").touch()
    return jars
