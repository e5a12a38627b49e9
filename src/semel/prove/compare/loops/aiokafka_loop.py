"""aiokafka: consume, process, produce in one Kafka transaction.

The example of its documentation (examples, "Transactional Consume-Process-Produce") with what it leaves out: after an
abort the consumer goes back to the committed offsets (the example would go on behind the aborted records and lose
them), and so it does when a batch was read across a rebalance; and every record's delivery is awaited before the commit
(aiokafka commits a transaction of which a batch was refused). An error that is not the work's ends the process,
which is then started again with the same transactional id.
"""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener

from semel.prove.compare.loops import work


class Rebalances(ConsumerRebalanceListener):
    """Counts them, and lets an open transaction end before partitions are given up."""

    def __init__(self) -> None:
        self.count = 0
        self.transaction = asyncio.Lock()

    async def on_partitions_revoked(self, _revoked: Any) -> None:
        async with self.transaction:
            self.count += 1

    async def on_partitions_assigned(self, _assigned: Any) -> None:
        pass


async def run(stopping: asyncio.Event) -> None:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=work.BOOTSTRAP,
        group_id=work.GROUP,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        session_timeout_ms=work.SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=work.SESSION_TIMEOUT_MS // 3,
    )
    producer = AIOKafkaProducer(
        bootstrap_servers=work.BOOTSTRAP,
        transactional_id=f"{work.GROUP}-{work.INSTANCE}",
        transaction_timeout_ms=work.TRANSACTION_TIMEOUT_MS,
    )
    rebalances = Rebalances()
    consumer.subscribe([work.ORDERS], listener=rebalances)
    await producer.start()
    await consumer.start()
    try:
        while not stopping.is_set():
            seen = rebalances.count
            batch = await consumer.getmany(timeout_ms=int(work.COMMIT_SECONDS * 1000), max_records=40)
            async with rebalances.transaction:
                if rebalances.count != seen:
                    await back(consumer)
                elif batch:
                    try:
                        await transaction(producer, batch)
                    except work.StockUnreachableError:
                        await back(consumer)
    finally:
        await consumer.stop()
        await producer.stop()


async def transaction(producer: AIOKafkaProducer, batch: dict[Any, list[Any]]) -> None:
    async with producer.transaction():
        sent = []
        for messages in batch.values():
            for message in messages:
                await asyncio.sleep(work.STEP_SECONDS)
                for key, value in work.items_of(json.loads(message.value)):
                    sent.append(await producer.send(work.ITEMS, json.dumps(value).encode(), key.encode()))
        await asyncio.gather(*sent)
        offsets = {partition: messages[-1].offset + 1 for partition, messages in batch.items()}
        await producer.send_offsets_to_transaction(offsets, work.GROUP)


async def back(consumer: AIOKafkaConsumer) -> None:
    """Read again from where the group stands. `seek_to_committed` leaves partitions alone that have no offset yet."""
    for partition in consumer.assignment():
        offset = await consumer.committed(partition)
        if offset is None:
            await consumer.seek_to_beginning(partition)
        else:
            consumer.seek(partition, offset)


async def main() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await run(stopping)


if __name__ == "__main__":
    asyncio.run(main())
