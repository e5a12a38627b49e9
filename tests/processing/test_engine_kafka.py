"""The engine on Apache Kafka: nothing lost, doubled, torn or out of order, whatever ends the worker."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from pathlib import Path
from uuid import uuid4

import pytest

from semel.errors import Fenced
from semel.processing import parking
from semel.processing.supervisor import ChildSpec, Supervisor
from tests.processing.running import (
    PARTITIONS,
    check_counts,
    counting_app,
    drained,
    engine_for,
    feed,
    prepare,
    read_all,
    while_running,
)
from tests.services.kafka import KafkaNode

pytestmark = pytest.mark.kafka


def items_of(count: int, seed: int, keys: int = 20) -> list[tuple[str, int]]:
    rng = random.Random(seed)
    return [(f"k{rng.randrange(keys)}", number) for number in range(count)]


@pytest.fixture(params=["kafka", "kafka_v1"])
def bootstrap(request: pytest.FixtureRequest) -> str:
    node: KafkaNode = request.getfixturevalue(request.param)
    return node.bootstrap


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


def test_a_rebalance_in_the_middle_of_work_loses_and_doubles_nothing(kafka: KafkaNode) -> None:
    bootstrap = kafka.bootstrap

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


def test_a_parked_key_is_parked_for_the_next_owner_too(kafka: KafkaNode) -> None:
    bootstrap = kafka.bootstrap

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


def test_a_twin_fences_its_elder_which_says_so(kafka: KafkaNode) -> None:
    bootstrap = kafka.bootstrap

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


POINTS = ["unit.before_produce", "unit.after_produce", "unit.before_end_transaction", "unit.after_end_transaction"]


@pytest.mark.parametrize("bootstrap", ["kafka", "kafka_v1"], indirect=True)
def test_workers_killed_at_every_failpoint_lose_and_double_nothing(bootstrap: str, tmp_path: Path) -> None:
    name = new_name()
    traps = {slot: [f"{point}:kill:{2 + slot}" for point in POINTS] for slot in range(2)}
    exits: list[int] = []

    def environment(slot: int) -> dict[str, str]:
        trap = traps[slot].pop(0) if traps[slot] else ""
        return {**os.environ, "SEMEL_KAFKA": bootstrap, "SEMEL_INSTANCE": "test", "SEMEL_FAILPOINT": trap,
                "SEMEL_SESSION_TIMEOUT_MS": "3000", "SEMEL_COMMIT_INTERVAL_MS": "20"}  # fmt: skip

    async def main() -> None:
        app = counting_app(name)
        await prepare(bootstrap, app)
        items = items_of(3_000, seed=5)
        specs = [
            ChildSpec(
                f"worker-{slot}",
                [sys.executable, "-m", "tests.processing.running", name, str(slot)],
                lambda slot=slot: environment(slot),
                slot,
                tmp_path / f"worker-{slot}.log",
            )
            for slot in range(2)
        ]
        supervisor = Supervisor(specs, silence_seconds=6, on_exit=lambda _, code: exits.append(code))
        running = asyncio.create_task(supervisor.run())
        sent = 0
        while any(traps.values()) or sent < len(items):
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
    assert exits.count(-9) >= 6
    assert exits[-2:] == [0, 0], "a drained worker ends with 0"


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
