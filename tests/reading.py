"""What is committed in topics, read to the ends that they have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from semel.client.admin import Admin
from semel.client.consumer import Reader
from semel.types import Record, TopicPartition


async def each(bootstrap: str, ends: Mapping[TopicPartition, int]) -> AsyncIterator[Record]:
    """Every committed record before these ends, each partition in order."""
    waiting = {at for at, end in ends.items() if end > 0}
    reader = Reader(bootstrap)
    await reader.start(dict.fromkeys(waiting, 0))
    try:
        while waiting:
            batch = await reader.poll(5_000, 0.5)
            for record in batch.records:
                yield record
            waiting -= {at for at, position in batch.end_offsets.items() if position >= ends[at]}
    finally:
        await reader.close()


async def ends_without_open(admin: Admin, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """Where the partitions end; no transaction may be open in them any more."""
    ends = await admin.list_offsets(partitions, at="high_watermark")
    assert await admin.list_offsets(partitions, at="stable") == ends, "a transaction is left open"
    return ends
