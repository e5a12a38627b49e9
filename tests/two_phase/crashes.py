"""Drives the dual write through crashes, and compares what Kafka and the database hold in the end."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.types import TopicPartition
from tests.reading import each, ends_without_open
from tests.services.kafka import free_port
from tests.two_phase.writer import FENCED, TOPIC, Database, Plan, asdict

POINTS = ("after_init", "before_append", "after_append")
POINTS += ("before_prepare", "after_prepare", "between_markers", "after_markers")
"""Where the broker may kill itself (semel.failpoints.FAILPOINTS)."""
Report = dict[str, Any]
PARTITIONS = [TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)]


class Processes:
    """The process that forks, and what it forked by pid."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.two_phase.writer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.running: set[int] = set()
        self._ended: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in list(self.running):
            self.kill(pid)
        self._process.communicate()

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, plan: Plan) -> int:
        pid = int(self._ask(do="start", plan=asdict(plan)))
        self._ended.pop(pid, None)
        self.running.add(pid)
        return pid

    def start_broker(self, data: Path, listen: str, failpoints: str) -> int:
        pid = int(self._ask(do="broker", data=str(data), listen=listen, failpoints=failpoints))
        self._ended.pop(pid, None)
        self.running.add(pid)
        return pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""
        if pid in self.running:
            self._ask(do="signal", pid=pid, signal=int(number))

    def poll(self, pid: int) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._wait(pid, block=False)

    def wait(self, pid: int) -> int:
        code = self._wait(pid, block=True)
        assert code is not None
        return code

    def until_stopped(self, pid: int) -> None:
        """Until the writer has stopped itself."""
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"writer {pid} never stopped"
            time.sleep(0.002)

    def kill(self, pid: int) -> int:
        self.signal(pid, signal.SIGKILL)
        return self.wait(pid)

    def _wait(self, pid: int, *, block: bool) -> int | None:
        if pid in self._ended:
            return self._ended[pid]
        code = self._ask(do="wait", pid=pid, block=block)
        if code is not None:
            self.running.discard(pid)
            self._ended[pid] = int(code)
        return code


class Broker:
    """The embedded broker in a process of its own, always on the same port."""

    def __init__(self, processes: Processes, data: Path) -> None:
        self._processes = processes
        self._data = data
        self.bootstrap = f"127.0.0.1:{free_port()}"
        self.pid = 0

    def start(self, failpoints: str = "") -> None:
        """Start it and wait until it answers, or has met a failpoint while it recovered."""
        self.pid = self._processes.start_broker(self._data, self.bootstrap, failpoints)
        deadline = time.monotonic() + 120
        while not self.has_ended():
            assert time.monotonic() < deadline, "the broker does not answer"
            try:
                with socket.create_connection(("127.0.0.1", int(self.bootstrap.split(":")[1])), 1) as connection:
                    # ApiVersions v0: the smallest question there is.
                    connection.sendall(bytes.fromhex("0000000a 0012 0000 00000001 ffff"))
                    if connection.recv(4):
                        return
            except OSError:
                time.sleep(0.002)

    def has_ended(self) -> bool:
        return self._processes.poll(self.pid) is not None

    def kill(self) -> None:
        self._processes.kill(self.pid)


@dataclass
class Outcome:
    """What both sides hold once the last writer has recovered."""

    ledger: set[str]
    visible: list[Counter[str]]
    """Committed tokens of each partition, with how often each is there."""

    @property
    def torn(self) -> set[str]:
        """Tokens that one side has and the other has not, or that are there more than once."""
        wanted = Counter(self.ledger)
        return {
            token
            for counts in self.visible
            for token in counts.keys() | wanted.keys()
            if counts[token] != wanted[token]
        }


@dataclass
class Stage:
    """One broker process, one database, and writers."""

    folder: Path
    url: str
    writers: Processes
    broker: Broker
    crashes: Counter[str] = field(default_factory=Counter)

    @property
    def report_file(self) -> Path:
        return self.folder / "reports"

    @classmethod
    def begin(cls, folder: Path, url: str, writers: Processes) -> Stage:
        broker = Broker(writers, folder / "data")
        broker.start()
        stage = cls(folder, url, writers, broker)
        database = Database(url)
        database.create()
        database.close()

        async def topics() -> None:
            async with KafkaClient(broker.bootstrap) as client:
                await Admin(client).create_topics({TOPIC: TopicSpec(2)})

        asyncio.run(topics())
        return stage

    def start(self, **changes: Any) -> int:
        return self.writers.start(Plan(self.broker.bootstrap, self.url, str(self.report_file), **changes))

    def reports(self) -> list[Report]:
        text = self.report_file.read_text() if self.report_file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def _newest_reports(self) -> str:
        if not self.report_file.exists():
            return ""
        with self.report_file.open("rb") as file:
            file.seek(max(0, self.report_file.stat().st_size - 2_000))
            return file.read().decode(errors="replace")

    def restart_broker(self, failpoint: str = "") -> None:
        """kill -9, if it is not dead already, and start again; it may meet the failpoint while it recovers."""
        self.broker.kill()
        self.broker.start(failpoint)
        if self.broker.has_ended():
            assert failpoint, "the broker does not start"
            self.crashes["broker while it recovered"] += 1
            self.broker.start()

    def until_recovered(self, pid: int) -> None:
        """Until this writer has begun to write, or is dead, or cannot."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and self.writers.poll(pid) is None and not self.broker.has_ended():
            if f'"pid": {pid},' in self._newest_reports():
                return
            time.sleep(0.002)

    def crash(self, point: str, **changes: Any) -> None:
        """A writer that dies there."""
        code = self.writers.wait(self.start(crash_at=point, **changes))
        assert code == -signal.SIGKILL, self.reports()[-1]

    def recover(self) -> Report:
        """A last process that only recovers; what it found."""
        code = self.writers.wait(self.start(transactions=0))
        last = self.reports()[-1]
        assert code == 0, last
        return last

    def ledger(self) -> set[str]:
        """The tokens that the database has."""
        database = Database(self.url)
        _, ledger = database.state()
        database.close()
        return set(ledger)

    def outcome(self) -> Outcome:
        return Outcome(self.ledger(), asyncio.run(_visible(self.broker.bootstrap)))


async def _visible(bootstrap: str) -> list[Counter[str]]:
    async with KafkaClient(bootstrap) as client:
        ends = await ends_without_open(Admin(client), PARTITIONS)
    found: list[Counter[str]] = [Counter(), Counter()]
    async for record in each(bootstrap, ends):
        found[record.partition][(record.value or b"").decode()] += 1
    return found


# --- Random crashes ---


def random_crashes(folder: Path, url: str, crashes: int, seed: int) -> tuple[Outcome, Counter[str], list[Report]]:
    """So many crashes of writers and broker, at random moments and at the broker's failpoints; then one recovery."""
    rng = random.Random(seed)
    with Processes(folder / "writers.log") as writers:
        stage = Stage.begin(folder, url, writers)
        pid = stage.start()
        while stage.crashes.total() < crashes:
            pid = _one(stage, rng, pid)
        writers.kill(pid)
        stage.restart_broker()
        stage.recover()
        return stage.outcome(), stage.crashes, stage.reports()


def _one(stage: Stage, rng: random.Random, pid: int) -> int:
    """Let the writer work for a moment, then one fault; the writer that is at work afterwards."""
    if rng.random() < 0.7:
        stage.until_recovered(pid)
        time.sleep(rng.uniform(0.0, 0.05))
    else:
        time.sleep(rng.uniform(0.0, 0.2))
    if stage.broker.has_ended():
        stage.crashes["broker at a failpoint"] += 1
        stage.broker.start()
    if stage.writers.poll(pid) is not None:
        return stage.start()
    fault = rng.choices(("writer", "broker", "both", "zombie"), (60, 20, 10, 10))[0]
    if fault in ("broker", "both"):
        stage.crashes["broker"] += 1
        armed = f"broker.{rng.choice(POINTS)}:kill:{rng.randint(1, 12)}" if rng.random() < 0.5 else ""
        if fault == "both":
            stage.crashes["writer"] += 1
            stage.writers.kill(pid)
            stage.restart_broker(armed)
            return stage.start()
        stage.restart_broker(armed)
        return pid
    if fault == "writer":
        stage.crashes["writer"] += 1
        stage.writers.kill(pid)
        return stage.start()
    return _overlap(stage, rng, pid)


def _overlap(stage: Stage, rng: random.Random, zombie: int) -> int:
    """The writer stops for a while, another takes over, and both are awake again."""
    stage.crashes["writer stopped, and awake again beside its successor"] += 1
    stage.writers.signal(zombie, signal.SIGSTOP)
    heir = stage.start()
    if rng.random() < 0.5:
        stage.until_recovered(heir)
    else:
        time.sleep(rng.uniform(0.0, 0.2))
    stage.writers.signal(zombie, signal.SIGCONT)
    time.sleep(rng.uniform(0.0, 0.1))
    if stage.writers.poll(zombie) is None:
        stage.writers.kill(zombie)
    return heir


__all__ = ["FENCED", "Outcome", "Processes", "Report", "Stage", "random_crashes"]
