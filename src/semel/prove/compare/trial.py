"""One trial: one loop, one kind of fault, one seed; at the end every record is read and counted.

Orders are written straight to the broker while two processes of the loop work on them and the fault strikes. Then the
faults end, the loops finish, they are started once more as a deployment does, finish again, and are stopped. What a
read_committed reader finds in `items` must be each order's items, each once.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.errors import Retriable, SemelError
from semel.prove.check.findings import Findings
from semel.prove.check.totals import Effect, check_effects
from semel.prove.compare.loops import work as settings
from semel.prove.compare.middle import Middle
from semel.prove.compare.peers import Peer
from semel.prove.compare.processes import Broker, Loops
from semel.prove.compare.strikes import Field, Strikes
from semel.types import Record, TopicPartition

__all__ = ["Trial", "run_trial"]

RATE = 100
"""Orders a second: each of them takes 2 ms of work, so the loops are not behind and not idle."""
ITEMS_DATABASE = "items.db"
MAX_ORDERS = 20_000
"""A trial ends its input here, whatever its faults are waiting for."""
_QUIET_SECONDS = 40.0
"""After so long without progress a loop has stopped: a session, a transaction time-out and a slow start together."""
_DRAIN_SECONDS = 150.0


@dataclass(slots=True)
class Trial:
    """The outcome of one loop under one fault."""

    peer: str
    versions: str
    promise: str
    fault: str
    seed: int
    kafka: str
    inputs: int = 0
    effects: int = 0
    struck: int = 0
    notes: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    unfinished: int = 0
    """Orders that the group had not passed when nothing moved any more."""
    ended: int = 0
    """How often a loop ended by itself and was started again."""
    last_words: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`clean`, `not struck`, `stuck`, or what was found."""
        found = self.counts()
        words = [f"{count} {name}" for name, count in found.items() if count]
        if words:
            return ", ".join(words)
        if self.unfinished:
            return "stuck"
        return "clean" if self.struck else "not struck"

    def counts(self) -> dict[str, int]:
        """Whole inputs without effect, effects too many, inputs that lack some of their effects."""
        found = self.findings
        return {"lost": found.of("E1"), "doubled": found.of("E2", "E3"), "torn": found.of("E4")}

    @property
    def example(self) -> str:
        """The gravest anomaly, or nothing."""
        found = sorted(self.findings.anomalies, key=lambda anomaly: "E1 E4 E2 E3".find(anomaly.kind))
        return str(found[0]) if found else ""

    def as_json(self) -> dict[str, Any]:
        return {
            "peer": self.peer,
            "versions": self.versions,
            "promise": self.promise,
            "fault": self.fault,
            "seed": self.seed,
            "kafka": self.kafka,
            "verdict": self.verdict,
            "inputs": self.inputs,
            "effects": self.effects,
            "struck": self.struck,
            **self.counts(),
            "unfinished": self.unfinished,
            "restarts": self.ended,
            "example": self.example,
            "seconds": round(self.seconds, 1),
        }


async def run_trial(
    peer: Peer,
    fault: Strikes,
    seed: int,
    *,
    kafka: str | None,
    say: Callable[[str], None],
    keep: Path | None = None,
    processes: int = 2,
) -> Trial:
    """Run one trial with so many processes of the loop.

    Raises `SemelError` when the broker does not start or the input cannot be written.
    """
    began = time.monotonic()
    trial = Trial(peer.name, peer.versions(), peer.promise, fault.name, seed, kafka or "embedded")
    async with AsyncExitStack() as stack:
        folder = _folder(f"{peer.name}-{fault.name}-{seed}-", keep, stack)
        broker = None if kafka else Broker(folder)
        if broker is not None:
            stack.callback(broker.stop)
            await broker.start()
        bootstrap = kafka or broker.bootstrap if broker is not None else str(kafka)
        middle = Middle(bootstrap)
        await middle.start()
        stack.push_async_callback(middle.close)
        names = _Names(f"compare{int(time.time() * 1000) % 10**9}" if kafka else "compare", peer)
        work = _Work(bootstrap, names, folder / ITEMS_DATABASE if peer.writes_rows else None)
        await work.create()
        loops = _loops(processes, fault, names, middle.address, folder)
        loops.start()
        stack.push_async_callback(loops.stop)
        ground = Field(loops, middle, broker, Random(f"{seed}:{peer.name}:{fault.name}"), trial.notes.append)
        trial.struck = await _under_fire(fault, ground, work, say)
        say("the faults are over; the loop finishes")
        await work.finished()
        await loops.stop()
        loops.start()
        trial.unfinished = await work.finished()
        await loops.stop()
        trial.ended, trial.last_words = loops.ended, loops.last_words()
        trial.inputs, trial.effects, trial.findings = await work.judge(passed_only=trial.unfinished > 0)
    trial.seconds = time.monotonic() - began
    return trial


def _folder(prefix: str, keep: Path | None, stack: AsyncExitStack) -> Path:
    """A new folder, in `keep` or removed at the end: what an earlier trial left must not be judged again."""
    if keep is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="semel-compare-")))
    keep.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=keep))


@dataclass(frozen=True, slots=True)
class _Names:
    run: str
    peer: Peer

    @property
    def orders(self) -> str:
        return f"{self.run}-orders"

    @property
    def items(self) -> str:
        return f"{self.run}-items"

    @property
    def group(self) -> str:
        return self.run + self.peer.group_suffix


def _loops(processes: int, fault: Strikes, names: _Names, address: str, folder: Path) -> Loops:
    argv = [names.peer.argv(slot) for slot in range(processes)]
    environments = [
        {
            "BOOTSTRAP": address,
            "ORDERS": names.orders,
            "ITEMS": names.items,
            "GROUP": names.run,
            "INSTANCE": str(slot),
            "FLAKY": str(folder) if fault.flaky else "",
            "DATABASE": str(folder / ITEMS_DATABASE),
            "SEMEL_KAFKA": address,
            "SEMEL_DATA": str(folder / "semel"),
            "SEMEL_INSTANCE": "compare",
            "SEMEL_SESSION_TIMEOUT_MS": "6000",
        }
        for slot in range(processes)
    ]
    return Loops(argv, environments, folder)


async def _under_fire(fault: Strikes, ground: Field, work: _Work, say: Callable[[str], None]) -> int:
    """Write orders for as long as the fault strikes; how often it struck."""
    await work.write(RATE)  # Something to do while the loops start.
    await work.moving()
    feeding = asyncio.create_task(work.feed())
    struck = 0
    try:
        for number in range(fault.times):
            if feeding.done():
                feeding.result()
                break
            struck += await fault.strike(ground, number)
            if number == 1 and not struck:
                break  # Who was not struck twice never sends what this fault is about.
            say(f"{fault.name}: {struck} of {number + 1} struck, {work.written} orders")
        await asyncio.sleep(1.0)
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
    await work.flush()
    return struck


class _Work:
    """The input and the output of one trial, on the broker itself: nothing of this passes through the middle."""

    def __init__(self, bootstrap: str, names: _Names, database: Path | None) -> None:
        self._bootstrap, self._names, self._database = bootstrap, names, database
        self._counts = {names.orders: settings.ORDER_PARTITIONS, names.items: settings.ITEM_PARTITIONS}
        import confluent_kafka  # An extra, which `compare` has asked for.

        self._producer = confluent_kafka.Producer(
            {"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5, "log_level": 0}
        )
        self._refused: list[str] = []
        self.written = 0

    async def create(self) -> None:
        topics = {topic: TopicSpec(count) for topic, count in self._counts.items()}
        async with KafkaClient(self._bootstrap) as client:
            await Admin(client).create_topics(topics)

    # --- Writing ---

    async def write(self, count: int) -> None:
        for number in range(self.written, self.written + count):
            value = json.dumps({"id": number, "items": 1 + number % 4}).encode()
            self._producer.produce(self._names.orders, value, str(number % 50).encode(), on_delivery=self._delivered)
        self.written += count
        self._producer.poll(0)

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._refused.append(str(error))

    async def feed(self) -> None:
        """`RATE` orders a second, until it is cancelled."""
        while self.written < MAX_ORDERS:
            await self.write(RATE // 20)
            await asyncio.sleep(0.05)

    async def flush(self) -> None:
        left = await asyncio.to_thread(self._producer.flush, 30)
        if left or self._refused:
            raise SemelError(f"{left + len(self._refused)} orders could not be written: {self._refused[:1]}")

    # --- Watching ---

    async def _state(self, admin: Admin) -> tuple[int, int, int]:
        """The orders that the group has not passed, the open part of the output, and its end."""
        orders, items = self._partitions(self._names.orders), self._partitions(self._names.items)
        committed = await self._passed(admin)
        ends = await admin.list_offsets(orders, at="high_watermark")
        stable = await admin.list_offsets(items, at="stable")
        high = await admin.list_offsets(items, at="high_watermark")
        if self._database is not None:
            high[items[0]] = len(self._rows())
            stable[items[0]] = high[items[0]]
        behind = sum(end - max(0, committed.get(partition, 0)) for partition, end in ends.items())
        return behind, sum(high.values()) - sum(stable.values()), sum(high.values())

    def _partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(self._counts[topic])]

    async def moving(self) -> None:
        """Return when the loop has written something, or after a minute: then it never will."""
        async with KafkaClient(self._bootstrap) as client:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and (await self._state(Admin(client)))[2] == 0:
                await asyncio.sleep(0.1)

    async def finished(self) -> int:
        """Return when the group has passed every order and no transaction is open, or when nothing moves any more.

        The number of orders that were not passed.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        async with KafkaClient(self._bootstrap) as client:
            last, since = (-1, -1, -1), time.monotonic()
            while True:
                try:
                    now = await self._state(Admin(client))
                except Retriable:  # An offset of an open transaction is not stable yet.
                    now = last
                if now[0] == 0 and now[1] == 0:
                    return 0
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > _QUIET_SECONDS or time.monotonic() > deadline:
                    return max(now[0], 1)
                await asyncio.sleep(0.1)

    # --- Judging ---

    async def judge(self, *, passed_only: bool) -> tuple[int, int, Findings]:
        """Compare. With `passed_only` an order that the group has not passed is expected to have no effects yet."""
        log = await self._scan([*self._partitions(self._names.orders), *self._partitions(self._names.items)])
        orders = self._partitions(self._names.orders)
        async with KafkaClient(self._bootstrap) as client:
            committed = await self._passed(Admin(client))
        expected: dict[Hashable, range] = {}
        for partition in orders:
            for record in log[partition]:
                if not passed_only or record.offset < committed.get(partition, 0):
                    value = json.loads(record.value or b"{}")
                    expected[value["id"]] = range(value["items"])
        found = [Effect(order, position, (0, number)) for number, (order, position) in enumerate(self._rows())]
        for partition in self._partitions(self._names.items):
            for record in log[partition]:
                value = json.loads(record.value or b"{}")
                found.append(Effect(value["order"], value["position"], (record.partition, record.offset)))
        effects = [effect for effect in found if effect.input_id in expected or not passed_only]
        return len(expected), len(effects), check_effects(expected, effects)

    async def _passed(self, admin: Admin) -> Mapping[TopicPartition, int]:
        """The position in each partition of the orders: the group's, or that of our sink, which is with its rows."""
        if self._database is not None and self._names.peer.name == "semel-rows":
            found = self._query("SELECT topic, part, next_offset FROM semel_position")
            return {TopicPartition(topic, part): offset for topic, part, offset in found}
        return await admin.committed_offsets(self._names.group, self._partitions(self._names.orders))

    def _rows(self) -> list[tuple[int, int]]:
        """Every row that the loops committed, in the order in which they did."""
        return self._query('SELECT "order", position FROM items ORDER BY rowid')

    def _query(self, sql: str) -> list[Any]:
        if self._database is None or not self._database.exists():
            return []
        with closing(sqlite3.connect(self._database, timeout=30)) as connection:
            try:
                return connection.execute(sql).fetchall()
            except sqlite3.OperationalError:  # The first loop has not made the table yet.
                return []

    async def _scan(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, list[Record]]:
        """Every committed record, in the order of its partition."""
        async with KafkaClient(self._bootstrap) as client:
            ends = await Admin(client).list_offsets(partitions, at="stable")
        reader = Reader(self._bootstrap)
        await reader.start(dict.fromkeys(partitions, 0))
        log: dict[TopicPartition, list[Record]] = {partition: [] for partition in partitions}
        unread = {partition for partition, end in ends.items() if end > 0}
        try:
            while unread:
                batch = await reader.poll(5_000, 1.0)
                for record in batch.records:
                    log[TopicPartition(record.topic, record.partition)].append(record)
                unread -= {
                    partition for partition, position in batch.end_offsets.items() if position >= ends[partition]
                }
        finally:
            await reader.close()
        return log
