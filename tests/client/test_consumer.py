"""Consumers without a broker: what their states and errors must never turn into."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import confluent_kafka
import pytest

from semel.client import librdkafka
from semel.client.consumer import Consumer, Reader
from semel.errors import ConfigurationError, Fatal, Retriable
from semel.types import TopicPartition

NOBODY = "127.0.0.1:1"
AT = TopicPartition("t", 0)


class _Events:
    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        raise AssertionError("nothing was assigned")

    on_lost = on_revoked


@pytest.mark.parametrize("kind", [Consumer, librdkafka.Consumer])
def test_a_consumer_that_is_no_member_gives_no_group_metadata(kind: Any) -> None:
    """With generation -1 and no member id a broker takes anybody's offsets while the group is empty."""

    async def main() -> None:
        consumer = kind(NOBODY, group="g", topics=["t"], instance_id="one", events=_Events(), session_timeout_ms=6_000)
        await consumer.start()
        for _ in range(2):
            with pytest.raises(Retriable, match="not a member"):
                consumer.group_metadata()
            await consumer.poll(10, 0)
        await consumer.close()

    asyncio.run(main())


class _Failing:
    """A librdkafka whose rebalance callback fails after a record was taken from it."""

    def poll(self, _timeout: float) -> Any:
        return object()

    def consume(self, _count: int, _timeout: float) -> Any:
        raise confluent_kafka.KafkaException(confluent_kafka.KafkaError(confluent_kafka.KafkaError._INVALID_ARG))


def test_records_that_went_with_an_error_are_not_left_out() -> None:
    async def main() -> None:
        reader = librdkafka.Reader(NOBODY)
        await reader.start({AT: 5})
        real, reader._kafka = reader._kafka, _Failing()
        with pytest.raises(Fatal, match="cannot go on"):
            await reader.poll(10, 0)
        reader._kafka = real
        with pytest.raises(Fatal, match="cannot go on"):  # The record is gone, so nothing after it may be given.
            await reader.poll(10, 0)
        await reader.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"group.protocol": "share"}, "group.protocol=share"),
        ({"fetch.wait.max.ms": "soon"}, "fetch.wait.max.ms"),
        ({"isolation.level": "read_uncommitted"}, "isolation.level"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        Reader(NOBODY, settings=settings)


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
