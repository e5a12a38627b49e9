"""Consumers without a broker: what their states and errors must never turn into."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from semel.client.consumer import Consumer, Reader
from semel.errors import Fatal, Retriable
from semel.types import TopicPartition

NOBODY = "127.0.0.1:1"
AT = TopicPartition("t", 0)


class _Events:
    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        raise AssertionError("nothing was assigned")

    on_lost = on_revoked


def test_a_consumer_that_is_no_member_gives_no_group_metadata() -> None:
    """With generation -1 and no member id a broker takes anybody's offsets while the group is empty."""

    async def main() -> None:
        consumer = Consumer(
            NOBODY, group="g", topics=["t"], instance_id="one", events=_Events(), session_timeout_ms=6_000
        )
        await consumer.start()
        for _ in range(2):
            with pytest.raises(Retriable, match="not a member"):
                consumer.group_metadata()
            await consumer.poll(10, 0)
        await consumer.close()

    asyncio.run(main())


def test_a_poll_without_a_broker_takes_its_time_and_gives_nothing() -> None:
    async def main() -> None:
        reader = Reader(NOBODY)
        with pytest.raises(Fatal, match="not started"):
            await reader.poll(1, 0)
        await reader.start({AT: 5})
        assert await reader.poll(10, 0.1) == ([], {})
        assert reader.positions == {AT: 5}
        with pytest.raises(Retriable, match="t-1"):
            await reader.seek({TopicPartition("t", 1): 0})
        await reader.close()
        with pytest.raises(Fatal, match="closed"):
            await reader.poll(1, 0)

    asyncio.run(main())
