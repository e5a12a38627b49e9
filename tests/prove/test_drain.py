"""When an app has worked off everything: by positions, whatever markers and aborted records lie behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from semel import App
from semel.client.admin import Admin, TopicSpec
from semel.client.cluster import KafkaClient
from semel.client.producer import TransactionalProducer
from semel.prove.drain import Drain
from semel.types import GroupMetadata, TopicPartition
from semel.wire.records import BatchBuilder
from tests.conftest import Address
from tests.moment import NOW_MS

NO_MEMBER = -1


def one_record() -> BatchBuilder:
    builder = BatchBuilder()
    builder.append(b"1", b"1", NOW_MS)
    return builder


def with_topic(
    embedded: Address,
    name: str,
    test: Callable[[Drain, TransactionalProducer, TopicPartition, str], Awaitable[None]],
) -> None:
    app = App(name)
    topic = app.topic(f"{name}-in", key=int, value=int, partitions=1)

    @app.processor(topic)
    def work(record: Any) -> Any: ...

    async def main() -> None:
        async with KafkaClient(embedded.bootstrap) as client:
            admin = Admin(client)
            await admin.create_topics({topic.name: TopicSpec(1)})
            producer = TransactionalProducer(client, f"{name}-txn")
            await producer.init_transactions()
            drain = Drain(app, admin, embedded.bootstrap, {}, stall_seconds=1.0)
            try:
                await test(drain, producer, TopicPartition(topic.name, 0), f"{name}.work")
            finally:
                await producer.close()

    asyncio.run(main())


def test_a_record_that_nobody_works_on_is_named(embedded: Address) -> None:
    async def run(drain: Drain, producer: TransactionalProducer, at: TopicPartition, group: str) -> None:
        assert await drain.run() == []  # There is nothing to do.
        producer.begin()
        await producer.produce(*at, one_record())
        await producer.end_transaction(commit=True)
        assert await drain.run() == [f"work is at offset 0 of {at}, and record 0 waits"]
        producer.begin()
        await producer.send_offsets({at: 1}, GroupMetadata(group, NO_MEMBER, "", None))
        await producer.end_transaction(commit=True)
        # The position is before the transaction's marker, and no record is left.
        assert await drain.run() == []
        assert drain.behind == 1

    with_topic(embedded, "drain-named", run)


def test_aborted_records_are_not_waited_for_and_open_transactions_are(embedded: Address) -> None:
    async def run(drain: Drain, producer: TransactionalProducer, at: TopicPartition, _group: str) -> None:
        producer.begin()
        await producer.produce(*at, one_record())
        await producer.flush()
        await producer.abort()
        assert await drain.run() == []
        assert drain.behind == 2  # The aborted record and its marker.
        producer.begin()
        await producer.produce(*at, one_record())
        await producer.flush()
        assert (await drain.run())[0] == f"{at}: a transaction is open from offset 2, the log ends at 3"
        await producer.abort()

    with_topic(embedded, "drain-aborted", run)
