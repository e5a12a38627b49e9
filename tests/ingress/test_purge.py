"""Answered requests are deleted, unread ones never; on every broker."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

import pytest

from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.client.producer import Producer, TransactionalProducer
from semel.errors import Fatal, Retriable
from semel.ingress.link import ensure_topics
from semel.ingress.purge import purge, purge_for_ever
from semel.types import GroupMetadata, TopicPartition

PARTITIONS = 2


def test_what_the_owners_committed_is_deleted_and_nothing_else(any_broker: Any) -> None:
    app = f"purge-{uuid.uuid4().hex[:8]}"
    first, second = (TopicPartition(f"{app}.semel.requests", number) for number in range(PARTITIONS))

    async def test() -> None:
        async with KafkaClient(any_broker.bootstrap) as client:
            admin = Admin(client)
            await ensure_topics(admin, app, PARTITIONS)
            assert await purge(admin, app, PARTITIONS) == {}, "an app that never ran has nothing to delete"
            producer = Producer(client)
            await producer.start()
            for number in range(10):
                await producer.send(first.topic, 0, b"key", b"%d" % number)
                await producer.send(second.topic, 1, b"key", b"%d" % number)
            owner = TransactionalProducer(client, f"{app}.requests.one.0")
            await owner.init_transactions()
            owner.begin()
            await owner.send_offsets({first: 7}, GroupMetadata(f"{app}.requests"))
            await owner.end_transaction(True)
            # Apache Kafka answers before its markers are written: this waits for them.
            assert await admin.committed_offsets(f"{app}.requests", [first, second]) == {first: 7}
            assert await purge(admin, app, PARTITIONS) == {first: 7}
            starts = await admin.list_offsets([first, second], "earliest")
            assert starts == {first: 7, second: 0}
            owner.begin()
            await owner.send_offsets({first: 9, second: 4}, GroupMetadata(f"{app}.requests"))
            # A transaction that may still be aborted moves nothing: its requests would be run again.
            assert await purge(admin, app, PARTITIONS) == {first: 7}
            await owner.end_transaction(False)
            assert await purge(admin, app, PARTITIONS) == {first: 7}
            reader = Reader(any_broker.bootstrap)
            await reader.start({first: 7})
            seen: list[bytes | None] = []
            while len(seen) < 3:
                seen += [record.value for record in (await reader.poll(10, 0.5)).records]
            assert seen == [b"7", b"8", b"9"], "what was not committed is still there"
            await reader.close()
            await producer.close()
            await owner.close()
            with pytest.raises(Fatal):
                await admin.delete_records({first: 1_000})

    asyncio.run(test())


def test_a_purge_that_fails_is_told_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pauses: list[float] = []

    class Away:
        async def committed_offsets(self, *_: object, **__: object) -> None:
            raise Retriable("no broker answers")

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    admin: Any = Away()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(purge_for_ever(admin, "shop", PARTITIONS, sleep))
    assert pauses == [60.0, 60.0, 60.0]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "no broker answers" in caplog.text
