"""aiokafka: consume, write to a database, commit the offsets.

As its documentation has it ("Consumer client", manual commit): offsets are committed after the work, so that nothing
is lost. That is at-least-once, and the documentation says so.
"""

from __future__ import annotations

import asyncio
import signal

from aiokafka import AIOKafkaConsumer

from semel.prove.compare.loops import rows, work


async def main() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    database = rows.connect()
    consumer = AIOKafkaConsumer(
        work.ORDERS,
        bootstrap_servers=work.BOOTSTRAP,
        group_id=work.GROUP,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        session_timeout_ms=work.SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=work.SESSION_TIMEOUT_MS // 3,
    )
    await consumer.start()
    try:
        while not stopping.is_set():
            batch = await consumer.getmany(timeout_ms=int(work.COMMIT_SECONDS * 1000), max_records=40)
            if batch:
                rows.write(database, [message.value for messages in batch.values() for message in messages])
                await consumer.commit({at: messages[-1].offset + 1 for at, messages in batch.items()})
    finally:
        await consumer.stop()


if __name__ == "__main__":
    asyncio.run(main())
