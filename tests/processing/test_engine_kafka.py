"""The engine on every broker: nothing lost, doubled, torn or out of order, whatever ends the worker."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from semel.client.producer import TransactionalProducer
from semel.env import Env
from semel.errors import Fenced, Retriable
from semel.processing import parking
from semel.processing.restore import _count
from semel.processing.seams import RealKafka
from semel.processing.supervisor import ChildSpec, Supervisor
from semel.settings import Settings
from semel.types import GroupMetadata, TopicPartition
from semel.wire.partitioner import partition_for
from semel.wire.records import BatchBuilder
from tests.conftest import Address
from tests.processing.running import (
    PARTITIONS,
    check_counts,
    cluster,
    counting_app,
    drained,
    engine_for,
    feed,
    prepare,
    read_all,
    while_running,
)
from tests.services.kafka import KafkaNode


def items_of(count: int, seed: int, keys: int = 20) -> list[tuple[str, int]]:
    rng = random.Random(seed)
    return [(f"k{rng.randrange(keys)}", number) for number in range(count)]


@pytest.fixture
def bootstrap(any_broker: Address) -> str:
    return any_broker.bootstrap


@pytest.fixture
def newest(newest_broker: Address) -> str:
    return newest_broker.bootstrap


def new_name() -> str:
    return f"t{uuid4().hex[:8]}"


def test_records_are_counted_once_over_a_restart_and_a_second_worker(bootstrap: str) -> None:
    async def main() -> None:
        name = new_name()
        app = counting_app(name)
        await prepare(bootstrap, app)
        items = items_of(1_000, seed=1)

        async def first() -> None:
            await feed(bootstrap, f"{name}.in", items[:300])
            await drained(bootstrap, f"{name}.count", f"{name}.in")

        await while_running([engine_for(bootstrap, app)], first)

        async def second() -> None:
            feeding = asyncio.create_task(feed(bootstrap, f"{name}.in", items[300:]))
            await feeding
            await drained(bootstrap, f"{name}.count", f"{name}.in")

        await while_running([engine_for(bootstrap, app, 0), engine_for(bootstrap, app, 1)], second)
        check_counts(await read_all(bootstrap, f"{name}.out", 3), items)

    asyncio.run(main())


def test_a_rebalance_in_the_middle_of_work_loses_and_doubles_nothing(newest: str) -> None:
    bootstrap = newest

    async def main() -> None:
        name = new_name()
        app = counting_app(name)
        await prepare(bootstrap, app)
        items = items_of(4_000, seed=2)

        async def body() -> None:
            for start in range(0, len(items), 100):
                await feed(bootstrap, f"{name}.in", items[start : start + 100])
                if start in (1_000, 2_000):
                    joining = engine_for(bootstrap, app, slot=start)
                    running = asyncio.create_task(joining.run())
                    visitors.append((joining, running))
            for joining, running in visitors:
                await joining.drain()
                await running
            await drained(bootstrap, f"{name}.count", f"{name}.in")

        visitors: list[tuple[object, asyncio.Task[None]]] = []
        await while_running([engine_for(bootstrap, app)], body)
        check_counts(await read_all(bootstrap, f"{name}.out", 3), items)

    asyncio.run(main())


def test_a_parked_key_is_parked_for_the_next_owner_too(newest: str) -> None:
    bootstrap = newest

    async def main() -> None:
        name = new_name()
        app = counting_app(name)
        await prepare(bootstrap, app)
        good = [("fine", number) for number in range(10)]

        async def first() -> None:
            await feed(bootstrap, f"{name}.in", [("bad", -1), *good[:5]])
            await drained(bootstrap, f"{name}.count", f"{name}.in")

        async def second() -> None:
            await feed(bootstrap, f"{name}.in", [("bad", 2), *good[5:]])
            await drained(bootstrap, f"{name}.count", f"{name}.in")

        await while_running([engine_for(bootstrap, app)], first)
        await while_running([engine_for(bootstrap, app)], second)
        check_counts(await read_all(bootstrap, f"{name}.out", 3), good)
        parked = await read_all(bootstrap, f"{name}.semel.park.{name}.in", PARTITIONS)
        assert [record.value for record in parked] == [b"-1", b"2"]
        assert dict(parked[0].headers)[parking.ERROR] == b"ValueError"

    asyncio.run(main())


def test_a_twin_fences_its_elder_which_says_so(newest: str) -> None:
    bootstrap = newest

    async def main() -> None:
        name = new_name()
        app = counting_app(name)
        await prepare(bootstrap, app)
        elder = engine_for(bootstrap, app)

        async def body() -> None:
            await feed(bootstrap, f"{name}.in", items_of(100, seed=3))
            await drained(bootstrap, f"{name}.count", f"{name}.in")
            twin = engine_for(bootstrap, app)
            running = asyncio.create_task(twin.run())
            try:
                await feed(bootstrap, f"{name}.in", items_of(100, seed=4))
                await asyncio.sleep(30)
            finally:
                await twin.drain()
                await running

        with pytest.raises(Fenced, match=f"{name}\\.count\\.test\\.0"):
            await while_running([elder], body)

    asyncio.run(main())


def test_a_new_owner_waits_for_a_zombies_open_transaction_and_goes_on_with_what_it_committed(newest: str) -> None:
    async def main() -> None:
        name = new_name()
        app = counting_app(name)
        await prepare(newest, app)
        await feed(newest, f"{name}.in", [("k", 0), ("k", 1)])
        at = partition_for(b"k", PARTITIONS)
        async with cluster(newest) as (client, _):
            # What a predecessor under another id (another slot's worker) had in hand when it stopped for a while.
            zombie = TransactionalProducer(client, f"{name}.count.other.0")
            await zombie.init_transactions()
            zombie.begin()
            state, output = BatchBuilder(), BatchBuilder()
            state.append(b"k", b"1", 1)
            output.append(b"k", b"[0,1]", 1)
            await zombie.produce(f"{name}.semel.state.counts", at, state)
            await zombie.produce(f"{name}.out", partition_for(b"k", 3), output)
            await zombie.send_offsets({TopicPartition(f"{name}.in", at): 1}, GroupMetadata(f"{name}.count"))

            async def body() -> None:
                await asyncio.sleep(1.0)
                assert engine._inputs == {}, "a partition was taken over before its offset was stable"
                await zombie.end_transaction(True)
                await drained(newest, f"{name}.count", f"{name}.in")

            engine = engine_for(newest, app)
            await while_running([engine], body)
            await zombie.close()
        check_counts(await read_all(newest, f"{name}.out", 3), [("k", 0), ("k", 1)])

    asyncio.run(main())


POINTS = ["unit.before_produce", "unit.after_produce", "unit.before_end_transaction", "unit.after_end_transaction"]


def worker_specs(
    name: str, environment: Callable[[int], dict[str, str]], folder: Path, workers: int = 2
) -> list[ChildSpec]:
    return [
        ChildSpec(
            f"worker-{slot}",
            [sys.executable, "-m", "tests.processing.running", name, str(slot)],
            lambda slot=slot: environment(slot),
            slot,
            folder / f"worker-{slot}.log",
        )
        for slot in range(workers)
    ]


def worker_environment(bootstrap: str, failpoint: str = "") -> dict[str, str]:
    return {
        **os.environ,
        "SEMEL_KAFKA": bootstrap,
        "SEMEL_INSTANCE": "test",
        "SEMEL_FAILPOINT": failpoint,
        "SEMEL_SESSION_TIMEOUT_MS": "3000",
        "SEMEL_COMMIT_INTERVAL_MS": "20",
    }


def test_workers_killed_at_every_failpoint_lose_and_double_nothing(bootstrap: str, tmp_path: Path) -> None:
    name = new_name()
    traps = {slot: [f"{point}:kill:{2 + slot}" for point in POINTS] for slot in range(2)}
    exits: list[tuple[str, int]] = []

    def environment(slot: int) -> dict[str, str]:
        return worker_environment(bootstrap, traps[slot].pop(0) if traps[slot] else "")

    def has_survived(worker: str) -> bool:
        """Its last trap has sprung, and the process after it is at work: SIGTERM finds it ready to drain."""
        log = tmp_path / f"{worker}.log"
        return exits.count((worker, -9)) == len(POINTS) and log.read_text().count(" took over ") > len(POINTS)

    async def main() -> None:
        app = counting_app(name)
        await prepare(bootstrap, app)
        items = items_of(3_000, seed=5)
        specs = worker_specs(name, environment, tmp_path)
        supervisor = Supervisor(specs, silence_seconds=6, on_exit=lambda *exit_: exits.append(exit_))
        running = asyncio.create_task(supervisor.run())
        sent = 0
        while not (has_survived("worker-0") and has_survived("worker-1")) or sent < len(items):
            if sent < len(items):
                await feed(bootstrap, f"{name}.in", items[sent : sent + 50])
                sent += 50
            else:  # Too fast for the traps: more input springs them.
                more = items_of(50, seed=len(items))
                await feed(bootstrap, f"{name}.in", more)
                items.extend(more)
                sent += 50
            await asyncio.sleep(0.1)
        await drained(bootstrap, f"{name}.count", f"{name}.in")
        await supervisor.drain()
        await running
        check_counts(await read_all(bootstrap, f"{name}.out", 3), items)

    asyncio.run(main())
    assert [code for _, code in exits].count(-9) == 2 * len(POINTS)
    assert sorted(exits[-2:]) == [("worker-0", 0), ("worker-1", 0)], "a drained worker ends with 0"


def test_a_worker_that_wakes_up_after_its_session_writes_nothing_of_its_old_life(newest: str, tmp_path: Path) -> None:
    name = new_name()
    log = tmp_path / "worker-0.log"

    async def main() -> None:
        await prepare(newest, counting_app(name))
        items = items_of(4_000, seed=8)
        specs = worker_specs(name, lambda _: worker_environment(newest), tmp_path)
        supervisor = Supervisor(specs, silence_seconds=60)
        running = asyncio.create_task(supervisor.run())
        for start in range(0, len(items), 100):
            await feed(newest, f"{name}.in", items[start : start + 100])
            pid = supervisor.pid("worker-0")
            assert pid is not None
            if start == 1_000:
                async with asyncio.timeout(30):
                    while "took over" not in log.read_text():
                        await asyncio.sleep(0.05)
            elif start == 1_200:
                os.kill(pid, signal.SIGSTOP)
            elif start == 3_000:
                # The other worker has taken over and has gone on; then the old owner wakes up in the middle of it.
                await drained(newest, f"{name}.count", f"{name}.in")
                os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.03)
        await drained(newest, f"{name}.count", f"{name}.in")
        await supervisor.drain()
        await running
        check_counts(await read_all(newest, f"{name}.out", 3), items)

    asyncio.run(main())
    assert " lost " in log.read_text(), "the pause was too short to lose a partition"


@pytest.mark.kafka
def test_a_broker_that_is_killed_and_restarted_is_waited_for(kafka: KafkaNode) -> None:
    node = KafkaNode()

    async def main() -> None:
        name = new_name()
        app = counting_app(name)
        await prepare(node.bootstrap, app)
        items = items_of(2_000, seed=6)

        async def body() -> None:
            await feed(node.bootstrap, f"{name}.in", items)
            bouncing = threading.Thread(target=lambda: (node.kill(), node.start()))
            bouncing.start()
            await asyncio.to_thread(bouncing.join)
            more = items_of(200, seed=7)
            items.extend(more)
            await feed(node.bootstrap, f"{name}.in", more)
            await drained(node.bootstrap, f"{name}.count", f"{name}.in")

        await while_running([engine_for(node.bootstrap, app)], body)
        check_counts(await read_all(node.bootstrap, f"{name}.out", 3), items)

    try:
        node.start()
        asyncio.run(main())
    finally:
        node.stop()


def test_a_topic_that_is_not_there_is_told_at_once(embedded: Address) -> None:
    """Who takes partitions over looks for the topics beside them: a missing one is no reason to wait."""
    app = counting_app(new_name())
    [component] = app.components()
    asked: list[str] = []

    async def look() -> None:
        kafka = RealKafka(embedded.bootstrap, Settings(), Env(), client_id="test")
        await kafka.start()
        refresh = kafka.client.refresh_metadata

        async def counted(*topics: str) -> None:
            asked.extend(topics)
            await refresh(*topics)

        kafka.client.refresh_metadata = counted  # type: ignore[method-assign]
        try:
            with pytest.raises(Retriable, match=r"\.semel\.park\..*was deleted"):
                await _count(kafka, component.parks[component.inputs[0]])
        finally:
            await kafka.close()

    asyncio.run(look())
    assert len(asked) <= 2, "it is not asked for again and again"
