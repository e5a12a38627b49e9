"""Taking over partitions: where to go on, and what their state and their parked keys are.

The order matters (design, section 4). First our own stable committed offset: it waits until a predecessor's
transaction is decided. Only then the changelog's high watermark: everything that went with that offset lies below it.
Then the changelog up to there, committed records only, waiting for open transactions of others in between. Restoring
first would lose what a zombie's accepted transaction commits in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from semel.failpoints import failpoint
from semel.processing.component import Component
from semel.processing.parklog import ParkLog
from semel.processing.seams import Kafka
from semel.processing.watermarks import Watermarks
from semel.types import Record, TopicPartition

__all__ = ["Taken", "take_over"]

_POLL_RECORDS = 5_000
_POLL_SECONDS = 0.5


@dataclass(slots=True)
class Taken:
    """What was found for some partitions of the input."""

    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    """The next offset to work on."""
    starts: dict[TopicPartition, int] = field(default_factory=dict)
    """Where the consumer is put: there, or at the log's end where the log does not have that offset. A consumer that
    is put nowhere fails as a whole, and with it the partitions that could go on."""
    stopped: dict[TopicPartition, str] = field(default_factory=dict)
    """Partitions that cannot go on, and why."""
    tables: dict[tuple[str, int], dict[bytes, bytes]] = field(default_factory=dict)
    """Values by key, by store and partition."""
    parked: dict[TopicPartition, ParkLog] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)
    """The identity of each topic: another one of the same name has another."""


async def take_over(
    kafka: Kafka,
    component: Component,
    partitions: Sequence[TopicPartition],
    watermarks: Watermarks,
    *,
    restore: bool,
) -> Taken:
    """Find out where to go on in `partitions`, and with `restore` also read their state and parked keys.

    Raises `Retriable` or `OutcomeUnknown` when Kafka does not answer, or answers an offset below one that is known to
    be committed: nothing was done, call again.
    """
    taken = Taken()
    if not partitions:
        return taken
    for topic in {partition.topic for partition in partitions}:
        taken.topics[topic] = await kafka.topic_identity(topic)
    committed = await kafka.admin.committed_offsets(component.group, partitions, require_stable=True)
    for topic, identity in taken.topics.items():
        said = {at: committed.get(at, -1) for at in partitions if at.topic == topic}
        watermarks.check(component.group, identity, said)
    failpoint("restore.after_offsets")
    starts = await kafka.admin.list_offsets(partitions, at="earliest")
    ends = await kafka.admin.list_offsets(partitions, at="high_watermark")
    for partition in partitions:
        offset = committed.get(partition, -1)
        taken.offsets[partition] = starts[partition] if offset < 0 else offset
        if 0 <= offset < starts[partition]:
            taken.stopped[partition] = (
                f"DATA_GAP: {component.group} would go on at {offset}, but the log of {partition} begins at "
                f"{starts[partition]}: {starts[partition] - offset} offsets were deleted unread"
            )
        elif offset > ends[partition]:
            taken.stopped[partition] = (
                f"OFFSET_AHEAD: {component.group} has read {partition} up to {offset}, but its log ends at "
                f"{ends[partition]}: the topic was made anew, or the broker lost records"
            )
        taken.starts[partition] = ends[partition] if partition in taken.stopped else taken.offsets[partition]
    if restore:
        await _restore(kafka, component, partitions, taken)
    return taken


async def _restore(kafka: Kafka, component: Component, partitions: Sequence[TopicPartition], taken: Taken) -> None:
    sources: dict[TopicPartition, Any] = {}
    for store, topic in component.changelogs.items():
        for partition in partitions:
            table: dict[bytes, bytes] = {}
            taken.tables[store, partition.partition] = table
            sources[TopicPartition(topic, partition.partition)] = table
    for partition in partitions:
        parked = ParkLog(component.name)
        taken.parked[partition] = parked
        if partition.topic in component.parks:
            sources[TopicPartition(component.parks[partition.topic], partition.partition)] = parked

    def take(record: Record) -> None:
        target = sources[TopicPartition(record.topic, record.partition)]
        if isinstance(target, ParkLog):
            target.take(record)
        elif record.key is not None:
            target.pop(record.key, None)
            if record.value is not None:
                target[record.key] = record.value

    if not sources:
        return
    ends = await kafka.admin.list_offsets(list(sources), at="high_watermark")
    failpoint("restore.after_ends")
    starts = await kafka.admin.list_offsets(list(sources), at="earliest")
    missing = {partition: starts[partition] for partition in sources if starts[partition] < ends[partition]}
    if missing:
        await _read(kafka, missing, ends, take)
    for partition, target in sources.items():
        if isinstance(target, ParkLog):
            target.next = ends[partition]
    failpoint("restore.after_state")


async def _read(
    kafka: Kafka, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], take: Any
) -> None:
    """Read from `starts` until every partition's position has reached its end; markers at the end count."""
    open_partitions = set(starts)
    reader = kafka.reader()
    try:
        await reader.start(starts)
        while open_partitions:
            batch = await reader.poll(_POLL_RECORDS, _POLL_SECONDS)
            failpoint("restore.between_polls")
            for record in batch.records:
                at = TopicPartition(record.topic, record.partition)
                if record.offset < ends[at]:
                    take(record)
                if record.offset + 1 >= ends[at]:
                    open_partitions.discard(at)
            for at, position in batch.end_offsets.items():
                if position >= ends[at]:
                    open_partitions.discard(at)
    finally:
        await reader.close()
