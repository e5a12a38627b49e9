"""A Kafka that is away: few lines in the log, and afterwards everything goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from semel.client.consumer import Consumer, Reader
from semel.client.outage import Outage
from semel.types import TopicPartition
from tests.services.broker import BrokerProcess

SESSION_SECONDS = 1.5


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_an_outage_is_told_once_then_every_ten_seconds_then_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    outage = Outage("of group 'g'", clock)
    for _ in range(25 * 80):
        outage.lost("1/1 brokers are down")
        outage.trouble("_TRANSPORT", "Connection refused")
        clock.now += 1 / 80
    assert outage.is_away
    warnings = lines(caplog, logging.WARNING)
    assert len(warnings) == 3
    assert "lost the connection to Kafka" in warnings[0]
    assert "without Kafka for 10 s" in warnings[1]
    assert lines(caplog, logging.INFO) == []
    outage.back()
    outage.back()
    assert not outage.is_away
    assert lines(caplog, logging.INFO) == ["the consumer of group 'g' has its connection to Kafka again, after 25.0 s"]
    outage.lost("again")
    assert len(lines(caplog, logging.WARNING)) == 4


def test_trouble_with_one_of_several_brokers_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    outage = Outage("of group 'g'", clock)
    for _ in range(300):
        outage.trouble("_TRANSPORT", "broker 2: Connection refused")
        outage.trouble("_TIMED_OUT", "broker 3 does not answer")
        clock.now += 0.1
    assert len(lines(caplog, logging.INFO)) == 2 * 3
    assert lines(caplog, logging.WARNING) == []


class Member:
    def __init__(self) -> None:
        self.told: list[str] = []

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        self.told.append(f"assigned {len(partitions)}")
        return dict.fromkeys(partitions, 0)

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        self.told.append("revoked")

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        self.told.append(f"lost {len(partitions)}")


def test_a_member_that_did_not_poll_while_kafka_was_away_is_not_fenced_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As librdkafka's is (its issue 3437): it would end the worker, for good when it comes twice within a minute."""
    caplog.set_level(logging.INFO)
    broker = BrokerProcess(tmp_path / "broker")
    broker.start()
    broker.create_topic("t", 2)
    member = Member()

    async def test() -> None:
        member_of_it = Consumer(
            broker.bootstrap,
            group="g",
            topics=["t"],
            instance_id="one",
            events=member,
            session_timeout_ms=int(SESSION_SECONDS * 1000),
        )
        reader = Reader(broker.bootstrap)
        await member_of_it.start()
        await reader.start({TopicPartition("t", 0): 0})
        try:
            await until(member_of_it, lambda: member.told == ["assigned 2"])
            await reader.poll(1, 0.1)
            broker.kill()
            idle = asyncio.create_task(asyncio.sleep(SESSION_SECONDS + 1))
            while not idle.done():  # As the ingress does; the worker waits for the end of its transaction meanwhile.
                await reader.poll(1, 0.1)
            broker.start()
            await asyncio.sleep(1.0)  # It heartbeats in its own thread now, before anybody polls.
            await until(member_of_it, lambda: member.told == ["assigned 2", "lost 2", "assigned 2"])
            await until(reader, lambda: any("again, after" in line for line in lines(caplog, logging.INFO)))
        finally:
            await member_of_it.close()
            await reader.close()

    try:
        asyncio.run(test())
    finally:
        broker.stop()
    told = [line for line in lines(caplog, logging.WARNING) if "the consumer of t lost" in line]
    assert len(told) == 1, "an outage of some seconds is one line"
    assert len(lines(caplog, logging.ERROR)) == 0


async def until(source: Consumer | Reader, condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await source.poll(10, 0.1)
