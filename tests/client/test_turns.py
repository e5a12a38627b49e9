"""Two transactional ids in turn, on every broker: order, positions, and that a successor takes both over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from semel.client.cluster import KafkaClient
from semel.client.turns import ProducersInTurn
from semel.errors import Fatal, Fenced
from semel.types import GroupMetadata, TopicPartition
from tests.client.test_brokers import Cluster, records, run

TRANSACTIONS = 40


async def transaction(producer: ProducersInTurn, at: TopicPartition, number: int, group: GroupMetadata) -> None:
    producer.begin()
    await producer.produce(*at, records(str(number)))
    await producer.send_offsets({at: number + 1}, group)
    await producer.end_transaction(True)


def test_back_to_back_transactions_keep_their_order_and_no_position_goes_back(any_broker: Any) -> None:
    """The next transaction begins while the markers of the last one may be on their way."""

    async def test(cluster: Cluster) -> None:
        at, group = cluster.partitions[0], GroupMetadata(f"{cluster.topic}-group")
        producer = ProducersInTurn(cluster.client, f"{cluster.topic}.writer")
        await producer.init_transactions()
        for number in range(TRANSACTIONS):
            await transaction(producer, at, number, group)
            if number % 8 == 0:  # What is committed is there for whoever takes over, whatever is still on its way.
                assert await cluster.admin.committed_offsets(group.group_id, [at]) == {at: number + 1}
        assert await cluster.admin.committed_offsets(group.group_id, [at]) == {at: TRANSACTIONS}
        assert [record.value for record in await cluster.read([at])] == [b"%d" % n for n in range(TRANSACTIONS)]
        names = [f"{cluster.topic}.writer", f"{cluster.topic}.writer.b"]
        assert {found.transactional_id for found in await cluster.admin.describe_transactions(names)} == {*names}
        await producer.close()

    run(any_broker, test)


@pytest.mark.parametrize("begun", [1, 2])
def test_a_successor_ends_what_its_predecessor_left_open_under_either_id(any_broker: Any, begun: int) -> None:
    async def test(cluster: Cluster) -> None:
        at, group = cluster.partitions[0], GroupMetadata(f"{cluster.topic}-group")
        async with KafkaClient(cluster.bootstrap) as other:
            # So long a time-out that nobody but the successor ends it.
            predecessor, successor = (
                ProducersInTurn(client, f"{cluster.topic}.writer", transaction_timeout_ms=60_000)
                for client in (other, cluster.client)
            )
            await predecessor.init_transactions()
            for number in range(begun - 1):
                await transaction(predecessor, at, number, group)
            predecessor.begin()
            await predecessor.produce(*at, records("of a zombie"))
            await predecessor.send_offsets({at: 99}, group)
            await predecessor._current.flush()
            await successor.init_transactions()
            await transaction(successor, at, begun - 1, group)
            with pytest.raises(Fenced):
                await predecessor.end_transaction(True)
            with pytest.raises(Fenced):
                predecessor.begin()
            await transaction(successor, at, begun, group)
            assert await cluster.admin.committed_offsets(group.group_id, [at]) == {at: begun + 1}
            assert [record.value for record in await cluster.read([at])] == [b"%d" % n for n in range(begun + 1)]
            with pytest.raises(Fenced):
                await predecessor.check_owner()
            await successor.check_owner()
            await predecessor.close()
            await successor.close()

    run(any_broker, test)


def test_nothing_begins_before_the_end_of_what_came_before_it_was_answered(embedded: Any) -> None:
    async def test(cluster: Cluster) -> None:
        producer = ProducersInTurn(cluster.client, f"{cluster.topic}.writer")
        await producer.init_transactions()
        for _ in range(2):
            producer.begin()
            await producer.produce(*cluster.partitions[0], records("1"))
            ending = asyncio.create_task(producer.end_transaction(True))
            await asyncio.sleep(0)
            with pytest.raises(Fatal, match="wrong call order"):
                producer.begin()
            await ending
            producer.begin()
            with pytest.raises(Fatal, match="wrong call order"):
                producer.begin()
            await producer.abort()
        await producer.close()

    run(embedded, test)
