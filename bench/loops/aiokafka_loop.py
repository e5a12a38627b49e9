"""aiokafka's transactional loop. Its offsets carry the group's name alone: a zombie is not fenced by the group."""

from __future__ import annotations

import asyncio
import signal
import time

import order as bench
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

Offsets = dict[TopicPartition, int]


async def send(writer: AIOKafkaProducer, batches: dict[TopicPartition, list]) -> Offsets:
    for messages in batches.values():
        for message in messages:
            value = bench.encode(bench.work(bench.decode(message.value)))
            await writer.send(bench.TARGET, value, message.key)
    return {at: messages[-1].offset + 1 for at, messages in batches.items()}


async def commit(reader: AIOKafkaConsumer, writer: AIOKafkaProducer, offsets: Offsets) -> None:
    if bench.EXACTLY_ONCE:
        await writer.send_offsets_to_transaction(offsets, bench.GROUP)
        await writer.commit_transaction()
    else:
        await writer.flush()
        await reader.commit(offsets)


async def main() -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    writer = AIOKafkaProducer(
        bootstrap_servers=bench.BOOTSTRAP,
        linger_ms=5,
        max_batch_size=131_072,
        enable_idempotence=True,
        transactional_id=f"{bench.GROUP}-0" if bench.EXACTLY_ONCE else None,
    )
    reader = AIOKafkaConsumer(
        bench.SOURCE,
        bootstrap_servers=bench.BOOTSTRAP,
        group_id=bench.GROUP,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await writer.start()
    await reader.start()
    offsets: Offsets = {}
    deadline = 0.0
    while not stopping.is_set():
        left = deadline - time.monotonic() if offsets else 0.05
        batches = await reader.getmany(timeout_ms=max(0, int(left * 1000)), max_records=1000)
        if batches:
            if not offsets:
                deadline = time.monotonic() + bench.INTERVAL_MS / 1000
                if bench.EXACTLY_ONCE:
                    await writer.begin_transaction()
            offsets |= await send(writer, batches)
        if offsets and time.monotonic() >= deadline:
            await commit(reader, writer, offsets)
            offsets = {}
    if offsets:
        await commit(reader, writer, offsets)
    await reader.stop()
    await writer.stop()


if __name__ == "__main__":
    asyncio.run(main())
