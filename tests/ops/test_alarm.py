"""A transaction that is open for too long is told, with what to do; readers that stand still are noticed."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from functools import partial
from pathlib import Path

import pytest

from semel import App
from semel.broker.embedded import EmbeddedBroker
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.env import Env, wall_ms
from semel.ops import alarm as alarm_module
from semel.ops.alarm import (
    ALARM_SECONDS,
    LOOK_SECONDS,
    REPEAT_SECONDS,
    YOUNG_MS,
    StandStill,
    TransactionAlarm,
    watching,
)
from semel.ops.top import parse, rows
from semel.processing.metrics import Metrics
from semel.settings import Settings
from semel.types import TopicPartition
from tests.broker.core import leave_open
from tests.client.test_brokers import records

P0, P1 = TopicPartition("t", 0), TopicPartition("t", 1)


def test_a_last_stable_offset_stands_still_from_the_first_look_at_it() -> None:
    still = StandStill()
    assert still.look({P1: 1}, 100.0) == {P1: 0.0}
    assert still.look({P0: 3, P1: 1}, 110.0) == {P0: 0.0, P1: 10.0}
    assert still.look({P0: 3, P1: 6}, 125.0) == {P0: 15.0, P1: 0.0}, "it moved, and stops anew"
    assert still.look({}, 130.0) == {}
    assert still.look({P0: 9}, 140.0) == {P0: 0.0}


class Clock:
    """Both clocks are ahead by what a test says."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.env = Env(
            monotonic=lambda: time.monotonic() + self.ahead, wall_ms=lambda: wall_ms() + int(self.ahead * 1000)
        )


@pytest.fixture
def also_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker's clock is not the test's."""
    monkeypatch.setattr(alarm_module, "YOUNG_MS", -1)


@pytest.mark.usefixtures("also_young")
def test_old_transactions_are_told_with_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    topic, name = f"alarm-{uuid.uuid4().hex[:8]}", f"shop.dual.database.{uuid.uuid4().hex[:8]}"

    async def main(address: str, broker: EmbeddedBroker) -> None:
        clock, metrics = Clock(), Metrics()

        def gauges() -> dict[str, float]:
            return {sample.name: sample.value for sample in parse(metrics.render())}

        async with KafkaClient(address) as client, KafkaClient(address, env=clock.env) as watcher:
            await Admin(client).create_topics({topic: TopicSpec(2)})
            alarm = TransactionAlarm(watcher, metrics, lambda found: found == topic, lambda _: True)
            await alarm.look()
            assert set(gauges().values()) == {0.0}
            producer = TransactionalProducer(client, name, two_phase_commit=True)
            await producer.init_transactions()
            producer.begin()
            await producer.produce(topic, 0, records("a"))
            prepared = await producer.prepare()
            for longer, listed in ((YOUNG_MS, []), (-1, [name])):
                found = await Admin(client).list_transactions(states=["Ongoing"], longer_than_ms=longer)
                assert [item.transactional_id for item in found] == listed, "what is young is not even asked about"
            await alarm.look()
            assert not caplog.records, "one that is young is no news"
            clock.ahead = ALARM_SECONDS + 1
            await alarm.look()
            [line] = caplog.messages
            for said in (str(prepared), name, "never times out", f"{topic}-0", f"semel doctor txn explain {name}"):
                assert said in line
            assert min(gauges().values()) > ALARM_SECONDS
            [row] = rows([], list(parse(metrics.render())), 1.0)
            assert (row["component"], row["open_s"] > ALARM_SECONDS) == ("kafka", True)
            await alarm.look()
            assert len(caplog.messages) == 1, "said once"
            clock.ahead += REPEAT_SECONDS
            await alarm.look()
            assert len(caplog.messages) == 2, "and again while it lasts"
            await producer.complete(prepared)
            await alarm.look()
            assert set(gauges().values()) == {0.0}

            broker.call(lambda node: leave_open(node, topic, 1, (77, 3)))
            caplog.clear()
            await alarm.look()
            clock.ahead += ALARM_SECONDS
            await alarm.look()
            [line] = caplog.messages
            assert f"{topic}-1 stand still" in line
            assert "semel doctor txn list" in line

    with EmbeddedBroker(tmp_path) as broker, caplog.at_level(logging.WARNING, "semel.alarm"):
        asyncio.run(main(broker.address, broker))


def test_what_kafka_decided_and_did_not_mark_is_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """KAFKA-20734, of the app's own transactions; in what stands still from one look to the next."""

    async def main(address: str, broker: EmbeddedBroker) -> None:
        clock, topics = Clock(), ["shop-a", "shop-b"]
        async with KafkaClient(address) as client, KafkaClient(address, env=clock.env) as watcher:
            await Admin(client).create_topics(dict.fromkeys([*topics, "done"], TopicSpec(1)))
            for app, topic in zip(("shop", "another"), topics, strict=True):
                producer = TransactionalProducer(client, f"{app}.count.host.0")
                await producer.init_transactions()
                identity = producer.identity
                producer.begin()
                await producer.produce("done", 0, records("a"))
                await producer.end_transaction(True)
                broker.call(partial(leave_open, topic=topic, partition=0, producer=identity))
            places = [TopicPartition(topic, 0) for topic in topics]
            alarm = TransactionAlarm(
                watcher, Metrics(), lambda name: name in topics, lambda name: name.startswith("shop.")
            )
            for stable in ([0, 0], [2, 0]):
                await alarm.look()
                clock.ahead += LOOK_SECONDS
                assert await Admin(client).list_offsets(places, at="stable") == dict(zip(places, stable, strict=True))
        [line] = [text for text in caplog.messages if "KAFKA-20734" in text]
        assert "shop.count.host.0 was committed" in line

    with EmbeddedBroker(tmp_path) as broker, caplog.at_level(logging.WARNING, "semel"):
        asyncio.run(main(broker.address, broker))


@pytest.mark.usefixtures("also_young")
def test_a_worker_looks_at_once_and_for_as_long_as_it_runs(tmp_path: Path) -> None:
    async def main(address: str) -> None:
        app, metrics = App("shop"), Metrics()
        app.topic("orders", key=str, value=str)
        async with KafkaClient(address) as client:
            await Admin(client).create_topics({"orders": TopicSpec(1)})
            producer = TransactionalProducer(client, "w", two_phase_commit=True)
            await producer.init_transactions()
            producer.begin()
            await producer.produce("orders", 0, records("a"))
            await producer.prepare()
            name = "semel_cluster_prepared_transaction_age_seconds"
            async with watching(app, Settings(kafka=address, data=tmp_path), Env(), metrics), asyncio.timeout(30):
                while not any(sample.name == name and sample.value > 0 for sample in parse(metrics.render())):
                    await asyncio.sleep(0.01)

    with EmbeddedBroker(tmp_path / "broker") as broker:
        asyncio.run(main(broker.address))
