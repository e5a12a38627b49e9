"""Poison, rebalances and duplicates: what is done to an app through its own doors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random

import msgspec
import pytest

from semel import App, history
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.consumer import Consumer, Reader
from semel.errors import SemelError
from semel.prove.faults.contract import NotNow, Targets, inflict
from semel.prove.faults.duplicate import Duplicate
from semel.prove.faults.intake import Intake
from semel.prove.faults.poison import Poison
from semel.prove.faults.rebalance import Rebalance
from semel.types import TopicPartition
from tests.conftest import Address

SECONDS = 60.0


class Order(msgspec.Struct):
    id: int


def an_app() -> App:
    app = App("intake")
    orders = app.topic("orders", value=Order)
    raw = app.topic("raw", value=bytes)
    strict = app.topic("strict", value=Order)
    written = app.topic("written", value=Order)
    app.post("/orders", request=Order)(place)
    app.post("/orders/{number}/cancel", request=Order)(cancel)
    for topic, ordering in ((orders, "key"), (raw, "key"), (strict, "partition")):
        app.processor(topic, name=f"of-{topic.name}", ordering=ordering)(copy)  # type: ignore[arg-type]
    assert written.name == "written"
    return app


def place(request: Order) -> None: ...


def cancel(request: Order, number: str) -> None: ...


def copy(record: object) -> None: ...


def test_the_intake_is_what_garbage_can_be_told_from_input_in() -> None:
    intake = Intake.of(an_app(), "127.0.0.1:1", {}, list)
    assert list(intake.topics) == ["orders"]
    assert list(intake.paths) == ["/orders"]
    assert intake.groups["intake.of-strict"] == ["strict"]
    where = Targets(intake=intake)
    assert Poison.aims(where) == ["topic orders", "POST /orders"]
    assert "group intake.requests" in Rebalance.aims(where)


def intake_at(
    bootstrap: str = "", topics: tuple[str, ...] = (), port: int = 0, groups: dict[str, list[str]] | None = None
) -> Intake:
    return Intake(bootstrap, {}, lambda: [("127.0.0.1", port)], topics, ["/orders"], groups or {})


@pytest.mark.timeout(200)
def test_poison_goes_into_the_topic_and_into_the_history(embedded: Address) -> None:
    topic = f"poison-{uuid.uuid4().hex[:8]}"
    targets = Targets(intake=intake_at(embedded.bootstrap, (topic,)))

    async def run() -> int:
        async with KafkaClient(embedded.bootstrap) as client:
            await Admin(client).create_topics({topic: TopicSpec(1)})
            for seed in range(24):
                await inflict(Poison(targets), f"topic {topic}", Random(seed))
            ends = await Admin(client).list_offsets([TopicPartition(topic, 0)], "stable")
            return ends[TopicPartition(topic, 0)]

    with history.captured() as events:
        end = asyncio.run(run())
    sends = [event for event in events if isinstance(event, history.Send)]
    placed = {event.a: event.offset for event in sends if event.type == "ok"}
    assert sorted(placed.values()) == list(range(end))
    assert len({event.id for event in sends}) == len(["garbage", "half", "other", "deep", "large", "largest"])
    assert {event.a for event in sends if event.type == "fail"}.isdisjoint(placed)

    async def read() -> list[tuple[int, str]]:
        reader = Reader(embedded.bootstrap)
        await reader.start({TopicPartition(topic, 0): 0})
        found: list[tuple[int, str]] = []
        async with asyncio.timeout(SECONDS):
            while len(found) < end:
                for record in (await reader.poll(100, 1.0)).records:
                    found.append((record.offset, dict(record.headers)[history.PROOF].decode()))
                    with pytest.raises((msgspec.DecodeError, RecursionError, UnicodeDecodeError)):
                        msgspec.json.decode(record.value or b"", type=Order)
        await reader.close()
        return found

    assert asyncio.run(read()) == sorted((offset, attempt) for attempt, offset in placed.items())


@asynccontextmanager
async def answering(status: int) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(size)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def test_a_request_that_should_have_been_refused_is_told() -> None:
    async def post(status: int, seed: int) -> str:
        async with answering(status) as port:
            targets = Targets(intake=intake_at(port=port))
            return (await inflict(Poison(targets), "POST /orders", Random(seed))).done

    assert all(asyncio.run(post(422, seed)).endswith("refused with 422") for seed in range(6))
    with history.captured() as events, pytest.raises(SemelError, match="answered 201, and should have been refused"):
        asyncio.run(post(201, 1))
    assert [event.type for event in events if isinstance(event, history.Http)] == ["invoke", "ok"]
    with history.captured() as events, pytest.raises(NotNow, match="503"):
        asyncio.run(post(503, 1))
    assert [event.type for event in events if isinstance(event, history.Http)] == ["invoke", "info"]


class Member:
    """A worker's part in a group: it counts how often it was given partitions."""

    def __init__(self) -> None:
        self.mine: set[TopicPartition] = set()
        self.given = 0

    async def on_assigned(self, partitions: list[TopicPartition]) -> Mapping[TopicPartition, int]:
        self.mine |= set(partitions)
        self.given += 1
        return dict.fromkeys(partitions, 0)

    async def on_revoked(self, partitions: list[TopicPartition]) -> None:
        self.mine -= set(partitions)

    async def on_lost(self, partitions: list[TopicPartition]) -> None:
        self.mine -= set(partitions)


@pytest.mark.timeout(200)
def test_a_storm_of_rebalances_passes_and_the_member_has_everything_again(embedded: Address) -> None:
    topic = f"storm-{uuid.uuid4().hex[:8]}"
    targets = Targets(intake=intake_at(embedded.bootstrap, groups={topic: [topic]}))
    member = Member()

    async def poll(consumer: Consumer) -> None:
        while True:
            await consumer.poll(10, 0.1)

    async def run() -> None:
        async with KafkaClient(embedded.bootstrap) as client:
            await Admin(client).create_topics({topic: TopicSpec(4)})
        consumer = Consumer(
            embedded.bootstrap, group=topic, topics=[topic], instance_id="one", events=member, session_timeout_ms=6_000
        )
        await consumer.start()
        polling = asyncio.create_task(poll(consumer))
        try:
            async with asyncio.timeout(SECONDS):
                while len(member.mine) < 4:
                    await asyncio.sleep(0.02)
            before = member.given
            outcome = await inflict(Rebalance(targets), f"group {topic}", Random(1))
            assert "strangers joined and left" in outcome.done
            async with asyncio.timeout(SECONDS):
                while len(member.mine) < 4 or member.given == before:
                    assert not polling.done() or polling.result()
                    await asyncio.sleep(0.02)
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            await consumer.close()

    asyncio.run(run())


def test_workers_are_told_to_stop_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semel.prove.faults.rebalance._BEAT_SECONDS", 0.0)
    workers = {f"worker-{slot}": subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) for slot in range(2)}
    targets = Targets(names=list(workers), pid=lambda name: workers[name].pid if workers[name].poll() is None else None)
    assert Rebalance.aims(targets) == ["workers"]
    try:
        outcome = asyncio.run(inflict(Rebalance(targets), "workers", Random(1)))
        assert [worker.wait(20) for worker in workers.values()] == [-signal.SIGTERM] * 2
        assert "workers told to stop" in outcome.done
        with pytest.raises(NotNow):
            asyncio.run(inflict(Rebalance(targets), "workers", Random(1)))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()


def test_copies_are_asked_for_and_taken_back() -> None:
    asked: list[int] = []

    async def hold(seconds: float) -> None:
        assert 0 < seconds < 10
        assert asked[-1] > 1

    targets = Targets(copies=asked.append, pid=lambda _name: os.getpid())
    asyncio.run(inflict(Duplicate(targets), "requests", Random(1), sleep=hold))
    assert asked[-1] == 1
