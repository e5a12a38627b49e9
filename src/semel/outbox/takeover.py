"""Taking lanes over, in the one order that neither loses nor repeats a row.

1. `owner_epoch` is raised in the database: who had the lane can note nothing more there.
2. InitProducerId under the lane's own transactional id: who had it can commit nothing more in Kafka, and what he had
   begun is decided.
3. Only then the manifest's high watermark is asked for, and the manifest is read up to it, committed records only.
4. What it lists is deleted, row by row. If the database went back in time, every row of the lane is compared with the
   tail of the topics first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from semel.client.producer import TransactionalProducer
from semel.errors import SemelError
from semel.failpoints import failpoint
from semel.outbox.lane import Lane, LaneRow, Takeover, take_over
from semel.outbox.link import Link, Positions
from semel.outbox.manifest import Manifest, RowId, manifest_key
from semel.outbox.rows import MSG_ID_HEADER
from semel.outbox.store import Settlement, Store
from semel.outbox.sweep import shards_of
from semel.types import Record, TopicPartition

__all__ = ["Owned", "take"]

log = logging.getLogger("semel.outbox")

_DELETE_ROWS = 5_000
"""Rows of one transaction, when a restored table is cleared of what was published."""

Call = Callable[..., Awaitable[Any]]
"""Runs a method of the store in its thread."""


@dataclass(slots=True)
class Owned:
    """A lane that is ours, with the producer that is its fence."""

    lane: Lane
    producer: TransactionalProducer
    positions: Positions
    noted: tuple[int, str] | None = None
    """Positions as they were when a batch was committed, and its number; they go into the database with it."""
    task: asyncio.Task[None] | None = None
    failures: int = field(default=0)
    """Transactions that failed since the last one that did not."""


async def take(
    link: Link, store: Store, call: Call, lanes: Sequence[int], app: str, owner: str
) -> tuple[dict[int, Owned], list[int]]:
    """Take lanes over: those that are ours now, and those that somebody else took meanwhile.

    Raises what Kafka and the database raise; nothing is ours then, and what was done stays right.
    """
    failpoint("outbox.before_take_over")
    rows: Mapping[int, LaneRow] = await call(store.acquire, lanes, owner)
    failpoint("outbox.after_owner")
    meta = store.meta
    short = meta.database_id.replace("-", "")[:12]
    producers = {lane: link.producer(f"{app}.outbox.{short}.{lane}") for lane in lanes}
    owned: dict[int, Owned] = {}
    try:
        ends = [producer.init_transactions() for producer in producers.values()]
        for outcome in await asyncio.gather(*ends, return_exceptions=True):
            if outcome is not None:
                raise outcome
        failpoint("outbox.after_init")
        found = await _last_manifests(link, rows, meta.database_id)
        failpoint("outbox.after_manifest")
        decisions = {
            lane: take_over(rows[lane], meta.incarnation, found[lane][0], is_lost=found[lane][1]) for lane in lanes
        }
        for lane, decision in decisions.items():
            own = Lane(lane, meta.database_id, meta.incarnation, rows[lane].owner_epoch, decision.batch)
            owned[lane] = Owned(own, producers[lane], Positions(rows[lane].positions))
        settlements = [
            Settlement(lane, rows[lane].owner_epoch, decision.batch, decision.delete, None)
            for lane, decision in decisions.items()
            if decision.delete and not decision.reconcile
        ]
        lost: list[int] = await call(store.settle, settlements) if settlements else []
        failpoint("outbox.after_clean_up")
        restored = {lane: item for lane, item in decisions.items() if item.reconcile and lane not in lost}
        if restored:
            lost += await _reconcile(link, store, call, restored, owned)
    except BaseException:
        await close(producers.values())
        raise
    await close(owned.pop(lane).producer for lane in lost)
    return owned, lost


async def close(producers: Any) -> None:
    """Close producers; what is open is aborted, or left to the successor's InitProducerId."""
    for producer in producers:
        try:
            await producer.close()
        except SemelError as error:
            log.debug("closing %r: %s", producer, error)


async def _last_manifests(
    link: Link, rows: Mapping[int, LaneRow], database_id: str
) -> dict[int, tuple[Manifest | None, bool]]:
    """The last manifest of each lane, and whether one is missing that has to be there."""
    at = {lane: TopicPartition(link.manifests, lane) for lane in rows}
    positions = {at[lane]: [Positions(row.positions)] for lane, row in rows.items()}
    ends = await link.ends(list(at.values()))
    starts, lost = await link.starts(list(at.values()), positions)
    earliest, _ = await link.starts(list(at.values()), {item: [] for item in at.values()})
    failpoint("outbox.after_ends")
    found: dict[int, Manifest] = {}
    keys = {manifest_key(database_id, lane): lane for lane in rows}

    def keep(record: Record) -> None:
        lane = keys.get(record.key or b"")
        if lane is not None and record.value is not None:
            found[lane] = Manifest.decode(record.value)

    await link.read(starts, ends, keep)
    # A lane that has published has a manifest in the topic, unless it lies below a position that was noted.
    missing = {
        lane: at[lane] in lost or (row.batch > 0 and lane not in found and starts[at[lane]] == earliest[at[lane]])
        for lane, row in rows.items()
    }
    return {lane: (found.get(lane), missing[lane]) for lane in rows}


async def _reconcile(
    link: Link, store: Store, call: Call, restored: Mapping[int, Takeover], owned: Mapping[int, Owned]
) -> list[int]:
    """Clear the lanes of rows that are in their topics already, then say in Kafka that this is done.

    Nobody publishes these lanes meanwhile: their fences are ours. Returns lanes that somebody else took.
    """
    for lane, decision in restored.items():
        log.warning("lane %d is compared with its topics before anything is sent: %s.", lane, decision.reconcile)
    shards = shards_of(restored, store.meta.lanes)
    resurrected: dict[str, RowId] = {row.msg_id: row for row in await call(store.ids, shards)}
    published: list[RowId] = [row for decision in restored.values() for row in decision.delete]
    topics = await call(store.topics, shards)
    if resurrected:
        published += await _in_topics(link, topics, resurrected, [owned[lane].positions for lane in restored])
    failpoint("outbox.after_compare")
    for start in range(0, len(published), _DELETE_ROWS):
        part = published[start : start + _DELETE_ROWS]
        await call(store.settle, [Settlement(-1, -1, 0, part, None)])
    gone = sum(row.msg_id in resurrected for row in set(published))
    log.warning(
        "lanes %s: %d rows had been published before the database was restored and are deleted; %d are to be sent.",
        ", ".join(map(str, sorted(restored))),
        gone,
        len(resurrected) - gone,
    )
    lost: list[int] = []
    for lane in restored:
        own = owned[lane]
        await link.write(own.producer, (), own.lane.begin_empty(), own.positions)
        own.lane.committed()
        failpoint("outbox.after_reconcile")
        number = own.lane.batch
        lost += await call(store.settle, [Settlement(lane, own.lane.owner_epoch, number, [], own.positions.encode())])
        own.lane.settled(number)
    return lost


async def _in_topics(
    link: Link, topics: Sequence[str], wanted: Mapping[str, RowId], positions: Sequence[Positions]
) -> list[RowId]:
    """Rows whose ids are in the topics, above what their lanes had written when the database was as it is now."""
    partitions = []
    for topic in topics:
        limits = await link.limits(topic)
        if limits is not None:
            partitions += [TopicPartition(topic, number) for number in range(limits.partitions)]
    if not partitions:
        return []
    ends = await link.ends(partitions)
    starts, _ = await link.starts(partitions, dict.fromkeys(partitions, positions))
    found: list[RowId] = []

    def look(record: Record) -> None:
        for name, value in record.headers:
            if name == MSG_ID_HEADER and value is not None and (row := wanted.get(value.decode(errors="replace"))):
                found.append(row)

    await link.read(starts, ends, look)
    return found
