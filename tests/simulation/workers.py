"""Semel's workers in the simulated world: the real engine in the real `Worker`, each life a process of its own.

The app counts: for every input it writes none to two outputs and a new state of the input's key, which depends on all
inputs of that key before it, in their order. So what the outputs and the state must be follows from the log of inputs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.env import Env
from semel.errors import Retriable
from semel.processing.component import Component, StoreReader, park_topic, state_topic
from semel.processing.effects import Change, Write
from semel.processing.engine import Engine
from semel.processing.heartbeat import Heartbeat
from semel.processing.metrics import Metrics
from semel.processing.tables import MemoryTable
from semel.processing.worker import Runnable, Worker
from semel.settings import Settings
from semel.types import Record, TopicPartition
from semel.wire.partitioner import partition_for
from semel.wire.records import BatchBuilder
from tests.simulation.actors import Actor, Transactional
from tests.simulation.history import Transaction
from tests.simulation.loop import Process
from tests.simulation.plan import CHAIN_HORIZON

if TYPE_CHECKING:
    from tests.simulation.chain import ChainWorld
    from tests.simulation.world import World

__all__ = ["APP", "CHANGELOG", "COUNTED", "FED", "PARKED", "PARTITIONS", "Counting", "Feeder", "Poison", "WorkerActor"]

APP = "app"
PARTITIONS = 2
FED, COUNTED = "fed", "counted"
STORE = "totals"
CHANGELOG, PARKED = state_topic(APP, STORE), park_topic(APP, FED)
KEYS = tuple(f"k{number}" for number in range(5))
FRESH = "0:0"


class Poison(ValueError):
    """What the handler says to an input that can never be worked on."""


def is_poison(source: str, share: int) -> bool:
    return bool(share) and crc32(source.encode()) % share == 0


def step(key: str, source: str, state: str) -> tuple[list[str], str]:
    """(outputs, new state) of one input; the state knows how many there were and in which order."""
    number, digest = state.split(":")
    after = f"{int(number) + 1}:{crc32(f'{digest}{source}'.encode())}"
    count = crc32(source.encode()) // 7 % 3
    return [f"{key}|{source}|{ordinal}|{after}" for ordinal in range(count)], after


class Counting:
    """The processor of the app."""

    def __init__(self, knobs: Mapping[str, Any], rng: random.Random) -> None:
        self._knobs = knobs
        self._rng = rng

    @property
    def component(self) -> Component:
        return Component(app=APP, name="count", inputs=(FED,), handle=self.handle, stores=(STORE,))

    async def handle(self, record: Record, stores: StoreReader) -> list[Write | Change]:
        if self._rng.random() < 0.1:
            await asyncio.sleep(0.01 * self._rng.random())
        if self._rng.random() < self._knobs["handler trouble"]:
            raise Retriable("a service that the handler asks is away")
        assert record.key is not None
        assert record.value is not None
        source = record.value.decode()
        if is_poison(source, self._knobs["poison"]):
            raise Poison(source)
        key = record.key.decode()
        known = stores.get(STORE, record.key)
        outputs, after = step(key, source, FRESH if known is None else known.decode().split("=")[1])
        written: list[Write | Change] = [Write(COUNTED, record.key, output.encode()) for output in outputs]
        return [*written, Change(STORE, record.key, f"{key}={after}".encode())]


class HostTable(MemoryTable):
    """A file of state: its process has it alone until it closes it or ends."""

    holder: Process | None = None

    def close(self) -> None:
        self.holder = None


class HostTables:
    """The state on a host's disk, as one of its processes opens it."""

    def __init__(self, files: dict[tuple[str, int], list[HostTable]], process: Process) -> None:
        self._files = files
        self._process = process

    def open(self, store: str, partition: int) -> HostTable:
        files = self._files.setdefault((store, partition), [])
        free = [item for item in files if item.holder is None or not item.holder.alive]
        chosen = max(free, key=lambda item: -1 if item.mark is None else item.mark.position, default=HostTable())
        self._files[store, partition] = [item for item in files if item not in free] + [chosen]
        chosen.holder = self._process
        return chosen


class WorkerActor(Actor):
    """One slot of the host. Its processes have the same identity, so a new one fences the one before."""

    has_twins = True
    is_background = True
    world: ChainWorld

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.slot = int(name.split("-")[1])
        self.running: dict[Process, Worker] = {}

    async def run(self, process: Process, life: int) -> None:
        if self.world.is_draining:
            self.done = True
            return
        env = self.world.env(process)
        worker = Worker(self._runnables(process, env), drain_seconds=20.0, heartbeat=Heartbeat(None))
        self.running[process] = worker
        try:
            await worker.run(handle_signals=False)
        finally:
            del self.running[process]
        self.done = True

    def drain(self) -> None:
        """As SIGTERM does."""
        for process, worker in self.running.items():
            self.world.loop.call_soon(worker.drain, context=process.context)

    def _settings(self) -> Settings:
        knobs = self.world.plan.knobs
        return Settings(
            kafka=self.world.bootstrap,
            data=Path("/nowhere"),
            instance="host",
            transaction_timeout_ms=knobs["transaction timeout ms"],
            commit_interval_ms=knobs["commit interval ms"],
            session_timeout_ms=knobs["session timeout ms"],
            partitions=PARTITIONS,
            kafka_client=self.world.client_settings(knobs["socket timeout ms"]),
        )

    def _runnables(self, process: Process, env: Env) -> dict[str, Runnable]:
        settings = self._settings()
        found: dict[str, Runnable] = {
            component.name: Engine(
                component,
                settings.kafka,
                settings,
                env,
                Metrics(),
                slot=self.slot,
                tables=HostTables(self.world.files, process),
            )
            for component in self.world.components(process)
        }
        return found | self.world.sinks(settings, env, self.slot)


class Feeder(Transactional):
    """Writes the inputs, in transactions of which some are aborted, for as long as things go wrong."""

    async def think(self) -> None:
        await asyncio.sleep(2 * CHAIN_HORIZON / self.world.plan.operations * self.rng.random())

    async def transact(self, client: KafkaClient, producer: TransactionalProducer, transaction: Transaction) -> None:
        producer.begin()
        for key in self.rng.sample(KEYS, self.rng.randint(1, 3)):
            partition = TopicPartition(FED, partition_for(key.encode(), PARTITIONS))
            batch = BatchBuilder()
            for _ in range(self.rng.randint(1, 3)):
                place = f"{transaction.owner}/{transaction.life}/{transaction.number}/{len(transaction.records)}"
                value = f"{place}/{key}"
                transaction.records.append((partition, value))
                batch.append(key.encode(), value.encode(), self.world.client_ms())
            await producer.produce(*partition, batch)
        await self.end(producer, transaction, self.rng.random() < 0.85)
        self.left -= 1
