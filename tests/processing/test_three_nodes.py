"""Three nodes of Apache Kafka, one after the other killed with -9: transactions, groups and state go on over it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from semel.client.cluster import KafkaClient
from semel.processing.component import state_topic
from semel.processing.supervisor import Supervisor
from tests.conftest import unavailable
from tests.processing.running import check_counts, counting_app, drained, feed, prepare, read_all
from tests.processing.test_engine_kafka import items_of, new_name, worker_environment, worker_specs
from tests.services.kafka import KafkaCluster, missing_tools

ROUND_RECORDS = 600


@pytest.fixture
def three_nodes() -> Iterator[KafkaCluster]:
    if missing_tools():
        unavailable("Apache Kafka", f"{' and '.join(missing_tools())} not found")
    cluster = KafkaCluster()
    try:
        yield cluster.start()
    finally:
        cluster.stop()


async def leader_of(bootstrap: str, topic: str) -> int:
    """The node that leads partition 0, asked anew."""
    async with KafkaClient(bootstrap) as client:
        return await client.leader(topic, 0)


@pytest.mark.soak
@pytest.mark.timeout(1_800)
def test_a_leader_that_is_killed_loses_and_doubles_nothing(three_nodes: KafkaCluster, tmp_path: Path) -> None:
    """The leaders of the input, of the transactions' log, of the positions and of the state die in turn, at work."""
    name, bootstrap = new_name(), three_nodes.bootstrap
    app = counting_app(name)
    victims = [f"{name}.in", "__transaction_state", "__consumer_offsets", state_topic(name, "counts")]
    killed: list[int] = []

    async def main() -> None:
        await prepare(bootstrap, app)
        supervisor = Supervisor(worker_specs(name, lambda _: worker_environment(bootstrap), tmp_path))
        running = asyncio.create_task(supervisor.run())
        items: list[tuple[str, int]] = []

        async def send(count: int) -> None:
            more = [(key, len(items) + number) for number, (key, _) in enumerate(items_of(count, seed=len(items)))]
            await feed(bootstrap, f"{name}.in", more)
            items.extend(more)

        await send(ROUND_RECORDS)
        await drained(bootstrap, f"{name}.count", f"{name}.in", timeout=300)
        for victim in victims:
            node = await leader_of(bootstrap, victim)
            killed.append(node)
            for part in range(6):
                await send(ROUND_RECORDS // 6)
                if part == 1:
                    await asyncio.to_thread(three_nodes.nodes[node].kill)
            # With two nodes everything goes on, and is worked off before the third one is back.
            await drained(bootstrap, f"{name}.count", f"{name}.in", timeout=300)
            await asyncio.to_thread(three_nodes.nodes[node].start)
        await drained(bootstrap, f"{name}.count", f"{name}.in", timeout=300)
        await supervisor.drain()
        await running
        check_counts(await read_all(bootstrap, f"{name}.out", 3), items)

    asyncio.run(main())
    assert len(killed) == len(victims)
