"""Waiting until an app has worked off everything - by what its positions say, not by the clock."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from semel.app import REQUESTS, App
from semel.client.admin import Admin
from semel.client.consumer import Reader
from semel.databases import connect
from semel.databases.database import is_missing_table
from semel.databases.spec import DatabaseSpec
from semel.errors import OutcomeUnknown, Retriable
from semel.ingress.requests import requests_topic
from semel.types import TopicPartition

__all__ = ["Consumes", "Drain", "consumers_of"]

STALL_SECONDS = 60.0
"""Nothing moves for so long: several times what a takeover after a lost session takes."""
_LOOK_SECONDS = 0.25
_POLL_RECORDS = 100
_POLL_SECONDS = 0.5
_POLLS_MAX = 20


class Consumes(NamedTuple):
    """One component and a topic that it reads. `database` is where a sink keeps its positions, else empty."""

    component: str
    group: str
    topic: str
    database: str = ""


def consumers_of(app: App) -> list[Consumes]:
    """Everything in the app that has a position."""
    found = [Consumes(spec.name, f"{app.name}.{spec.name}", spec.topic.name) for spec in app.processors.values()]
    if app.endpoints:
        found.append(Consumes(REQUESTS, f"{app.name}.{REQUESTS}", requests_topic(app.name)))
    sinks = app.sinks.values()
    return found + [Consumes(sink.name, sink.identity(app.name), sink.topic.name, sink.database.url) for sink in sinks]


Lane = tuple[str, TopicPartition]
"""A component and a partition of its input."""


class Drain:
    """Looks again and again, until every input is worked off or nothing moves any more."""

    def __init__(
        self,
        app: App,
        admin: Admin,
        bootstrap: str,
        settings: Mapping[str, str],
        *,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._consumers = consumers_of(app)
        self._outboxes = [spec for spec in app.databases.values() if spec.outbox]
        self._admin = admin
        self._bootstrap = bootstrap
        self._settings = settings
        self._stall_seconds = stall_seconds
        self.behind = 0
        """Offsets still to be worked off, markers included, when it was last looked."""

    async def run(self) -> list[str]:
        """Return when everything is worked off: nothing. When nothing moved for a minute: where it stands still."""
        before: object = None
        since = time.monotonic()
        waiting = ["Kafka or a database does not answer"]
        while time.monotonic() - since < self._stall_seconds:
            try:
                ends, waiting = await self._look()
            except (Retriable, OutcomeUnknown, OSError) as error:
                waiting = [f"it cannot be looked: {error}"]
            else:
                if not waiting:
                    return []
                if ends != before:
                    before, since = ends, time.monotonic()
            await asyncio.sleep(_LOOK_SECONDS)
        return waiting

    async def _look(self) -> tuple[object, list[str]]:
        """What would change if anything moved, and what is not worked off."""
        partitions = await self._partitions()
        stable, ends = await self._bounds(partitions)
        positions = await self._positions(partitions)
        waiting = [
            f"{at}: a transaction is open from offset {stable[at]}, the log ends at {end}"
            for at, end in ends.items()
            if stable[at] < end
        ]
        spans = {(consumer, at): position for (consumer, at), position in positions.items() if position < stable[at]}
        self.behind = sum(stable[at] - position for (_, at), position in spans.items())
        if not waiting:
            waiting = await self._with_records(spans, stable)
            for spec in self._outboxes:  # After the positions: what was applied since has written its records there.
                left = await asyncio.to_thread(_unpublished, spec)
                if left:
                    waiting.append(f"{left} records in the outbox of database {spec.name} are not published")
            again = await self._bounds(partitions)
            if not waiting and again != (stable, ends):
                waiting = ["records were added meanwhile"]
        else:
            waiting += [f"{component} is at offset {at} of {where}" for (component, where), at in spans.items()]
        return (stable, ends, positions), waiting

    async def _partitions(self) -> list[TopicPartition]:
        there = await self._admin.list_topics()
        topics = {consumer.topic for consumer in self._consumers}
        missing = sorted(topics - there.keys())
        if missing:
            raise Retriable(f"topic {missing[0]} is not there yet")
        return [TopicPartition(name, number) for name in sorted(topics) for number in range(there[name].partitions)]

    async def _bounds(
        self, partitions: list[TopicPartition]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        stable = await self._admin.list_offsets(partitions, at="stable")
        return stable, await self._admin.list_offsets(partitions, at="high_watermark")

    async def _positions(self, partitions: list[TopicPartition]) -> dict[Lane, int]:
        starts = await self._admin.list_offsets(partitions, at="earliest")
        found: dict[Lane, int] = {}
        for consumer in self._consumers:
            own = [at for at in partitions if at.topic == consumer.topic]
            if consumer.database:
                known = await asyncio.to_thread(_sink_positions, consumer)
            else:
                known = await self._admin.committed_offsets(consumer.group, own, require_stable=False)
            found.update({(consumer.component, at): known.get(at, starts[at]) for at in own})
        return found

    async def _with_records(self, spans: Mapping[Lane, int], stable: Mapping[TopicPartition, int]) -> list[str]:
        """Which of these spans hold records, not only markers and what was aborted."""
        lowest: dict[TopicPartition, int] = {}
        lanes: dict[TopicPartition, list[str]] = defaultdict(list)
        for (component, at), position in spans.items():
            lowest[at] = min(position, lowest.get(at, position))
            lanes[at].append(component)
        if not lowest:
            return []
        reader = Reader(self._bootstrap, settings=self._settings)
        await reader.start(lowest)
        last: dict[TopicPartition, int] = {}
        left = set(lowest)
        try:
            for _ in range(_POLLS_MAX):
                batch = await reader.poll(_POLL_RECORDS, _POLL_SECONDS)
                for record in batch.records:
                    at = TopicPartition(record.topic, record.partition)
                    last[at] = max(record.offset, last.get(at, -1))
                left -= {at for at, end in batch.end_offsets.items() if end >= stable[at]}
                if not left or batch.records:
                    break
        finally:
            await reader.close()
        waiting = [
            f"{component} is at offset {position} of {at}, and record {last[at]} waits"
            for (component, at), position in spans.items()
            if last.get(at, -1) >= position
        ]
        return waiting or [f"{at} could not be read to its end" for at in sorted(left)]


def _unpublished(spec: DatabaseSpec) -> int:
    """How many records of an outbox are not in Kafka; none before its tables were made. Raises `Retriable`."""
    try:
        database = connect(spec.url)
    except Exception as error:
        raise Retriable(f"database {spec.name} does not answer: {error}") from error
    try:
        [(count,)] = database.query("SELECT COUNT(*) FROM semel_outbox WHERE held IS NULL")
    except Exception as error:
        if is_missing_table(error):
            return 0
        raise Retriable(f"the outbox of database {spec.name} cannot be read: {error}") from error
    finally:
        database.close()
    return int(count)


def _sink_positions(consumer: Consumes) -> dict[TopicPartition, int]:
    """Where a sink is in its partitions; nothing before its tables were made. Raises `Retriable`."""
    try:
        database = connect(consumer.database)
    except Exception as error:
        raise Retriable(f"the database of {consumer.component} does not answer: {error}") from error
    try:
        rows = database.query("SELECT topic, part, next_offset FROM semel_position WHERE sink = ?", (consumer.group,))
    except Exception as error:
        if is_missing_table(error):
            return {}
        raise Retriable(f"the database of {consumer.component} cannot be read: {error}") from error
    finally:
        database.close()
    return {TopicPartition(topic, part): offset for topic, part, offset in rows}
