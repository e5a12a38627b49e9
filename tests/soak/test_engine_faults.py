"""Three workers that count, killed and stopped all the time: every input is counted once, in its key's order, and the
state is the fold of the inputs. Inputs come as fast as the strikes, so that there is always work in hand."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from semel.client.admin import Admin
from semel.client.producer import TransactionalProducer
from semel.processing.component import state_topic
from semel.processing.supervisor import Supervisor
from semel.types import TopicPartition
from semel.wire.partitioner import partition_for
from semel.wire.records import BatchBuilder
from tests.processing.running import PARTITIONS, cluster, counting_app, drained, each_of, prepare
from tests.processing.test_engine_kafka import worker_environment, worker_specs
from tests.services.broker import BrokerProcess
from tests.services.kafka import KafkaNode

RECORDS = int(os.environ.get("SEMEL_SOAK_RECORDS", "2000000"))
KILLS = int(os.environ.get("SEMEL_SOAK_KILLS", "500"))
PAUSES = int(os.environ.get("SEMEL_SOAK_PAUSES", "200"))
WORKERS = 3
KEYS = 5_000
OUT_PARTITIONS = 3
PAUSE_SECONDS = 4.5
"""Longer than the workers' session of 3 s."""
PATIENCE_SECONDS = 300.0


def key_of(number: int) -> int:
    return number * 2_654_435_761 % 4_294_967_291 % KEYS


class Feeder:
    """Writes the inputs in order, each key into one partition; each share is one transaction."""

    def __init__(self, producer: TransactionalProducer, topic: str) -> None:
        self._producer, self._topic = producer, topic
        self.sent = 0

    async def feed(self, until: int) -> None:
        while self.sent < until:
            end = min(until, self.sent + 5_000)
            builders = [BatchBuilder() for _ in range(PARTITIONS)]
            now_ms = int(time.time() * 1000)
            for number in range(self.sent, end):
                key = b"k%d" % key_of(number)
                builders[partition_for(key, PARTITIONS)].append(key, b"%d" % number, now_ms, ())
            self._producer.begin()
            for at, builder in enumerate(builders):
                await self._producer.produce(self._topic, at, builder)
            await self._producer.end_transaction(True)
            self.sent = end


class Striker:
    """One worker at a time is killed, or stopped for longer than its session while others are killed."""

    def __init__(self, supervisor: Supervisor, folder: Path, seed: int) -> None:
        self._supervisor = supervisor
        self._folder = folder
        self._rng = random.Random(seed)
        self._asleep: dict[int, asyncio.Task[None]] = {}
        self._taken = Counter[int]()
        self.done = Counter[str]()

    async def strike(self) -> None:
        left = {"kill": KILLS - self.done["kill"], "pause": PAUSES - self.done["pause"]}
        kind = self._rng.choices(list(left), list(left.values()))[0]
        awake = [slot for slot in range(WORKERS) if slot not in self._asleep]
        if len(awake) == 1:  # Somebody has to go on with the work.
            await asyncio.wait(self._asleep.values(), return_when=asyncio.FIRST_COMPLETED)
            return
        slot = self._rng.choice(awake)
        pid = self._supervisor.pid(f"worker-{slot}")
        if pid is None or not self._is_at_work(slot):
            await asyncio.sleep(0.05)
            return
        self.done[kind] += 1
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGSTOP)
            self._asleep[slot] = asyncio.create_task(self._wake(slot, pid))

    def _is_at_work(self, slot: int) -> bool:
        """It has taken partitions over since it was struck last: else a strike would hit nothing but a start."""
        taken = (self._folder / f"worker-{slot}.log").read_bytes().count(b" took over ")
        before, self._taken[slot] = self._taken[slot], taken
        return taken > before

    async def _wake(self, slot: int, pid: int) -> None:
        await asyncio.sleep(PAUSE_SECONDS)
        os.kill(pid, signal.SIGCONT)
        del self._asleep[slot]

    async def rest(self) -> None:
        await asyncio.gather(*self._asleep.values())


@pytest.fixture(params=["embedded", "kafka"])
def bootstrap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "kafka":
        node: KafkaNode = request.getfixturevalue("kafka")
        yield node.bootstrap
        return
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    yield broker.bootstrap
    broker.kill()


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_inputs_are_counted_once_while_workers_are_killed_and_stopped(bootstrap: str, tmp_path: Path) -> None:
    name = f"f{uuid4().hex[:8]}"
    exits: Counter[int] = Counter()
    striker: Striker | None = None

    async def main() -> None:
        nonlocal striker
        await prepare(bootstrap, counting_app(name))
        specs = worker_specs(name, lambda _: worker_environment(bootstrap), tmp_path, WORKERS)
        supervisor = Supervisor(
            specs,
            silence_seconds=60,  # A stopped worker is to wake up as a zombie, and not to be killed for its silence.
            restart_seconds=(0.1, 0.5),
            on_exit=lambda _, code: exits.update([code]),
        )
        striker = Striker(supervisor, tmp_path, seed=7)
        running = asyncio.create_task(supervisor.run())
        async with cluster(bootstrap) as (client, admin):
            producer = TransactionalProducer(client, f"{name}.feeder")
            await producer.init_transactions()
            feeder = Feeder(producer, f"{name}.in")
            began, total = time.monotonic(), KILLS + PAUSES
            while (struck := striker.done["kill"] + striker.done["pause"]) < total:
                await feeder.feed(RECORDS * (struck + 1) // total)
                await striker.strike()
                await progress(admin, name, feeder.sent)
            await striker.rest()
            await feeder.feed(RECORDS)
            await drained(bootstrap, f"{name}.count", f"{name}.in", PATIENCE_SECONDS)
            print(f"{RECORDS} records, {dict(striker.done)}, {time.monotonic() - began:.0f} s, exits {dict(exits)}")
            await producer.close()
        await supervisor.drain()
        await running
        await check(bootstrap, name)

    asyncio.run(main())
    assert striker is not None
    assert (striker.done["kill"], striker.done["pause"]) == (KILLS, PAUSES)
    assert exits[-signal.SIGKILL] >= KILLS


async def progress(admin: Admin, name: str, sent: int) -> None:
    """Wait until what was sent is not far ahead of what is done: else the strikes would be over before the work is."""
    wanted = [TopicPartition(f"{name}.in", number) for number in range(PARTITIONS)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while sent > 50_000:
            done = await admin.committed_offsets(f"{name}.count", wanted)
            if sum(done.values()) >= sent - 50_000:
                return
            await asyncio.sleep(0.05)


async def check(bootstrap: str, name: str) -> None:
    wanted: dict[bytes, array[int]] = {}
    for number in range(RECORDS):
        wanted.setdefault(b"k%d" % key_of(number), array("q")).append(number)
    counted: Counter[bytes] = Counter()
    async for record in each_of(bootstrap, f"{name}.out", OUT_PARTITIONS):
        key, value = record.key or b"", record.value
        position = counted[key]
        assert position < len(wanted[key]), f"{key!r} is counted {position + 1} times: {value!r}"
        assert value == b"[%d,%d]" % (wanted[key][position], position + 1), f"{key!r} at {position}"
        counted[key] += 1
    assert counted == {key: len(numbers) for key, numbers in wanted.items()}
    state = {record.key: record.value async for record in each_of(bootstrap, state_topic(name, "counts"), PARTITIONS)}
    assert state == {key: b"%d" % len(numbers) for key, numbers in wanted.items()}
