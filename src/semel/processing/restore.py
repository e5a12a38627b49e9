"""Taking over partitions: where to go on, and what their state and their parked keys are.

The order matters (design, section 4). First our own stable committed offset: it waits until a predecessor's
transaction is decided. Only then the changelog's high watermark: everything that went with that offset lies below it.
Then the changelog up to there, committed records only, waiting for open transactions of others in between. Restoring
first would lose what a zombie's accepted transaction commits in between.

Of the changelog only what lies above a store's own mark is read, where its table is still good (`tables.behind`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from semel.errors import Retriable
from semel.failpoints import failpoint
from semel.processing.component import Component
from semel.processing.measures import Measures
from semel.processing.parklog import ParkLog
from semel.processing.progress import Progress
from semel.processing.seams import BatchSeam, Kafka
from semel.processing.stores import Store, Stores
from semel.processing.tables import Changelog, Entry
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
    parked: dict[TopicPartition, ParkLog] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)
    """The identity of each topic: another one of the same name has another."""


async def take_over(
    kafka: Kafka,
    component: Component,
    partitions: Sequence[TopicPartition],
    watermarks: Watermarks,
    stores: Stores,
    measures: Measures,
    *,
    restore: bool,
) -> Taken:
    """Find out where to go on in `partitions`; with `restore` also bring `stores` up to date and read parked keys.

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
    recreated = {topic: watermarks.recreated(component.group, identity) for topic, identity in taken.topics.items()}
    grown = await _grown(kafka, component, partitions)
    for partition in partitions:
        offset = committed.get(partition, -1)
        taken.offsets[partition] = starts[partition] if offset < 0 else offset
        if recreated[partition.topic]:
            taken.stopped[partition] = recreated[partition.topic]
        elif partition in grown:
            taken.stopped[partition] = grown[partition]
        elif 0 <= offset < starts[partition]:
            taken.stopped[partition] = (
                f"DATA_GAP: {component.group} would go on at {offset}, but the log of {partition} begins at "
                f"{starts[partition]}: {starts[partition] - offset} offsets were deleted unread. "
                "To go on without them, stop the workers and run semel accept-gap"
            )
        elif offset > ends[partition]:
            taken.stopped[partition] = (
                f"OFFSET_AHEAD: {component.group} has read {partition} up to {offset}, but its log ends at "
                f"{ends[partition]}: the topic was made anew, or the broker lost records"
            )
        taken.starts[partition] = ends[partition] if partition in taken.stopped else taken.offsets[partition]
    if restore:
        taken.parked.update((at, ParkLog(component.name)) for at in grown)
        await _restore(kafka, component, [at for at in partitions if at not in grown], taken, stores, measures)
    return taken


async def _grown(kafka: Kafka, component: Component, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, str]:
    """Partitions that were added to the input and not to a topic beside it; why each cannot be worked on."""
    found: dict[TopicPartition, str] = {}
    counts = {topic: await _count(kafka, topic) for topic in _beside(component, {at.topic for at in partitions})}
    for partition in partitions:
        park = component.parks.get(partition.topic)
        for topic in _beside(component, {partition.topic}):
            if partition.partition >= counts[topic]:
                advice = (
                    "Its state is kept by the partitions that there were, and keys have moved: make a new topic, and a "
                    "processor with a new name and state."
                    if topic != park
                    else f"Give {topic} as many partitions, and restart."
                )
                found[partition] = f"PARTITIONS_GREW: {partition.topic} has a partition that {topic} lacks. {advice}"
                break
    return found


def _beside(component: Component, topics: Iterable[str]) -> list[str]:
    """The topics that a component keeps beside these inputs."""
    parks = [park for topic in sorted(topics) if (park := component.parks.get(topic)) is not None]
    return [*component.changelogs.values(), *parks]


async def _count(kafka: Kafka, topic: str) -> int:
    """How many partitions a topic has now. Raises `Retriable` at once when there is none."""
    try:
        await kafka.topic_identity(topic)  # Asks anew: it may have grown as well.
    except Retriable as error:
        raise Retriable(
            f"{error} It is made when a worker starts; what was in it is gone if it was deleted."
        ) from error
    return await kafka.partitions(topic)


async def _restore(
    kafka: Kafka,
    component: Component,
    partitions: Sequence[TopicPartition],
    taken: Taken,
    stores: Stores,
    measures: Measures,
) -> None:
    """Bring the partitions' stores up to date from their changelogs, and read their park topics."""
    kept: dict[TopicPartition, Store] = {}
    for name, topic in component.changelogs.items():
        for partition in partitions:
            kept[TopicPartition(topic, partition.partition)] = stores.open(name, partition.partition)
    parked: dict[TopicPartition, ParkLog] = {}
    for partition in partitions:
        taken.parked[partition] = ParkLog(component.name)
        if partition.topic in component.parks:
            parked[TopicPartition(component.parks[partition.topic], partition.partition)] = taken.parked[partition]
    sources = [*kept, *parked]
    if not sources:
        return
    boot, now = stores.now()
    ends = await kafka.admin.list_offsets(sources, at="high_watermark")
    failpoint("restore.after_ends")
    starts = dict(await kafka.admin.list_offsets(sources, at="earliest"))
    changelogs = await _changelogs(kafka, list(kept), starts, ends)
    for at, store in kept.items():
        starts[at] = store.begin(changelogs[at], boot, now)
    missing = {at: starts[at] for at in sources if starts[at] < ends[at]}
    if missing:
        progress = Progress(component.name, missing, ends, measures, clock=lambda: stores.now()[1])
        with progress:
            await _read(kafka, missing, ends, lambda batch: _take(batch, kept, parked, ends), progress)
    for at, store in kept.items():
        store.reached(ends[at], now)
    for at, park_log in parked.items():
        park_log.next = ends[at]
    failpoint("restore.after_state")


async def _changelogs(
    kafka: Kafka,
    partitions: Sequence[TopicPartition],
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
) -> dict[TopicPartition, Changelog]:
    topics = {}
    for topic in {at.topic for at in partitions}:
        kept_ms = await kafka.admin.topic_config(topic, "delete.retention.ms")
        topics[topic] = await kafka.topic_identity(topic), int(kept_ms or 0) / 1000
    return {at: Changelog(topics[at.topic][0], starts[at], ends[at], topics[at.topic][1]) for at in partitions}


def _take(
    batch: BatchSeam,
    kept: Mapping[TopicPartition, Store],
    parked: Mapping[TopicPartition, ParkLog],
    ends: Mapping[TopicPartition, int],
) -> dict[TopicPartition, int]:
    """Take in what was read, as far as it is of before the ends; returns the positions behind it."""
    positions: dict[TopicPartition, int] = {}
    by_partition: dict[tuple[str, int], list[Record]] = {}
    for record in batch.records:
        by_partition.setdefault(record[:2], []).append(record)
    for (topic, partition), records in by_partition.items():
        at = TopicPartition(topic, partition)
        positions[at] = records[-1].offset + 1
        store, end = kept.get(at), ends[at]
        for record in records:
            if record.offset >= end:
                break
            if store is None:
                parked[at].take(record)
            elif record.key is not None:
                value = record.value
                store.restored(record.key, None if value is None else Entry(value, record.timestamp_ms))
        if store is not None:
            store.reached(min(positions[at], end))
    return positions


async def _read(
    kafka: Kafka,
    starts: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    take: Callable[[BatchSeam], Mapping[TopicPartition, int]],
    progress: Progress,
) -> None:
    """Read from `starts` until every partition's position has reached its end; markers at the end count."""
    open_partitions = set(starts)
    reader = kafka.reader()
    try:
        await reader.start(starts)
        while open_partitions:
            batch = await reader.poll(_POLL_RECORDS, _POLL_SECONDS)
            failpoint("restore.between_polls")
            positions = {**take(batch), **batch.end_offsets}
            progress.reached(positions, len(batch.records))
            open_partitions -= {at for at, position in positions.items() if position >= ends[at]}
    finally:
        await reader.close()
