"""Parked records as an operator sees them, wherever they wait, and the commands that their owners carry out.

A processor's wait in a park topic, a sink's in its database. Nothing here changes them: a command is left beside them,
and the one process that owns the partition does it in a transaction of its own and says what came of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from semel.app import App
from semel.client.admin import Admin
from semel.client.consumer import Reader
from semel.client.idempotent import Producer
from semel.databases.database import is_cache, is_search
from semel.env import Env
from semel.errors import ConfigurationError
from semel.ingress.requests import requests_topic
from semel.ops.databases import connected
from semel.ops.listings import tool_client
from semel.processing.component import park_topic
from semel.processing.faults import Fault
from semel.processing.parking import COMPONENT, as_it_came
from semel.processing.parklog import COMMAND_OFFSETS_MAX, Command, Outcome, ParkLog, Verb, Waiting, command_record
from semel.settings import Settings
from semel.sinks.sql.parking import ParkedRow, list_parked
from semel.sinks.sql.positions import PositionKey
from semel.sinks.sql.release import insert_command, read_outcome, read_record
from semel.types import Record, TopicPartition

if TYPE_CHECKING:
    from semel.sinks.noted.place import ParkedRecord, Place, Store

__all__ = ["Asked", "Item", "Request", "Shelf", "ask", "chosen", "groups", "open_shelves", "rows", "wait_for"]

BEHIND = "waits behind an earlier record of its key"
_LOOK_SECONDS = 0.3
"""How often a command's outcome is looked for."""


class Item(NamedTuple):
    """One parked record. `fault` is None for one that waits behind another of its key."""

    component: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    lane: bytes | int
    fault: Fault | None

    @property
    def id(self) -> str:
        """Names it on the command line."""
        return f"{self.component}:{self.topic}-{self.partition}@{self.offset}"


class Request(msgspec.Struct, frozen=True):
    """What an operator wants done with some items."""

    verb: Verb
    by: str
    reason: str = ""
    build: str = ""
    value: bytes | None = None


class Asked(NamedTuple):
    """A command that was left, and the shelf where its outcome will be."""

    shelf: Shelf
    component: str
    command: Command


class Shelf(Protocol):
    """A place where parked records wait."""

    async def items(self) -> list[Item]:
        """Everything that waits there, in order within each partition of each component."""

    async def record(self, item: Item) -> Record | None:
        """The record itself; None when it does not wait any more."""

    async def ask(self, item: Item, command: Command) -> None:
        """Leave a command for the owner of the item's partition."""

    async def outcomes(self, command: str) -> list[Outcome]:
        """What was done for a command so far."""


class TopicShelf:
    """The park topics of an app's processors; read on, never again from the beginning."""

    def __init__(self, settings: Settings, topics: Iterable[str]) -> None:
        self._settings = settings
        self._topics = list(topics)
        self._logs: dict[tuple[str, str, int], ParkLog] = {}
        self._keys: dict[tuple[str, str, int, int], bytes | None] = {}
        self._outcomes: dict[str, list[Outcome]] = {}
        self._positions: dict[TopicPartition, int] = {}

    async def __aenter__(self) -> TopicShelf:
        self._stack = AsyncExitStack()
        self._client = await self._stack.enter_async_context(tool_client(self._settings))
        self._admin = Admin(self._client)
        there = await self._admin.list_topics()
        partitions = [
            TopicPartition(topic, number)
            for topic in self._topics
            if topic in there
            for number in range(there[topic].partitions)
        ]
        self._positions = dict(await self._admin.list_offsets(partitions, at="earliest"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def items(self) -> list[Item]:
        await self._read_on()
        found = []
        for (component, topic, partition), log in sorted(self._logs.items()):
            for waiting in log.waiting.values():
                key = self._keys[component, topic, partition, waiting.offset]
                found.append(Item(component, topic, partition, waiting.offset, key, waiting.lane, waiting.fault))
        return found

    async def record(self, item: Item) -> Record | None:
        log = self._logs.get((item.component, item.topic, item.partition))
        waiting = None if log is None else log.waiting.get(item.offset)
        if waiting is None:
            return None
        park = TopicPartition(self._park_of(item.topic), item.partition)
        found: list[Record] = []
        await self._read({park: waiting.at}, {park: waiting.at + 1}, found.append)
        return as_it_came(found[0]) if found else None

    async def ask(self, item: Item, command: Command) -> None:
        value, headers = command_record(command, item.component)
        producer = Producer(self._client)
        await producer.start()
        try:
            await producer.send(self._park_of(item.topic), item.partition, None, value, headers)
        finally:
            await producer.close()

    async def outcomes(self, command: str) -> list[Outcome]:
        await self._read_on()
        return self._outcomes.get(command, [])

    def _park_of(self, topic: str) -> str:
        return next(name for name in self._topics if name.endswith(f".semel.park.{topic}"))

    async def _read_on(self) -> None:
        ends = await self._admin.list_offsets(list(self._positions), at="stable") if self._positions else {}
        starts = {at: position for at, position in self._positions.items() if position < ends[at]}
        if starts:
            await self._read(starts, ends, self._take)
            self._positions.update((at, ends[at]) for at in starts)

    def _take(self, record: Record) -> None:
        component = (dict(record.headers).get(COMPONENT) or b"").decode(errors="replace")
        topic = record.topic.partition(".semel.park.")[2]
        log = self._logs.setdefault((component, topic, record.partition), ParkLog(component))
        taken = log.take(record)
        if isinstance(taken, Waiting):
            self._keys[component, topic, record.partition, taken.offset] = record.key
        elif isinstance(taken, Outcome):
            self._outcomes.setdefault(taken.command, []).append(taken)

    async def _read(self, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], take: Any) -> None:
        reader = Reader(self._settings.kafka, settings=self._settings.kafka_client)
        await reader.start(starts)
        waiting = set(starts)
        try:
            while waiting:
                batch = await reader.poll(1_000, 0.5)
                for record in batch.records:
                    at = TopicPartition(record.topic, record.partition)
                    if record.offset < ends[at]:
                        take(record)
                    if record.offset + 1 >= ends[at]:
                        waiting.discard(at)
                waiting -= {at for at, position in batch.end_offsets.items() if position >= ends[at]}
        finally:
            await reader.close()


class DatabaseShelf:
    """The parked records of every sink in one database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rows: dict[Item, PositionKey] = {}

    async def items(self) -> list[Item]:
        def read() -> list[ParkedRow]:
            with connected(self._url) as database:
                return [] if database is None else list_parked(database)

        self._rows = {_item(row): row.key for row in await asyncio.to_thread(read)}
        return list(self._rows)

    async def record(self, item: Item) -> Record | None:
        def read() -> Record | None:
            with connected(self._url) as database:
                return None if database is None else read_record(database, self._rows[item], item.offset)

        return await asyncio.to_thread(read)

    async def ask(self, item: Item, command: Command) -> None:
        def write() -> None:
            with connected(self._url) as database:
                if database is not None:
                    database.begin()
                    insert_command(database, self._rows[item], command)
                    database.commit()

        await asyncio.to_thread(write)

    async def outcomes(self, command: str) -> list[Outcome]:
        def read() -> Outcome | None:
            with connected(self._url) as database:
                return None if database is None else read_outcome(database, command)

        found = await asyncio.to_thread(read)
        return [] if found is None else [found]


class StoreShelf:
    """The parked records of every sink in one Valkey or OpenSearch."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[Item, tuple[Place, ParkedRecord]] = {}

    async def items(self) -> list[Item]:
        self._found = await asyncio.to_thread(self._read)
        return list(self._found)

    def _read(self) -> dict[Item, tuple[Place, ParkedRecord]]:
        found = {}
        for place in self._store.places():
            for offset, item in self._store.parked(place).items():
                lane = offset if item.key is None else item.key
                named = Item(place.sink, place.topic, place.part, offset, item.key, lane, item.fault)
                found[named] = place, item
        return found

    async def record(self, item: Item) -> Record | None:
        place, _ = self._found[item]
        now = (await asyncio.to_thread(self._store.parked, place)).get(item.offset)
        return None if now is None else now.record(place, item.offset)

    async def ask(self, item: Item, command: Command) -> None:
        place, _ = self._found[item]
        await asyncio.to_thread(self._store.ask, place, command)

    async def outcomes(self, command: str) -> list[Outcome]:
        def read() -> list[Outcome]:
            found = (self._store.outcome(place, command) for place in self._store.places())
            return [outcome for outcome in found if outcome is not None]

        return await asyncio.to_thread(read)


def _shelf(url: str) -> Shelf:
    """What a store needs is there only where the store is used."""
    if is_cache(url):
        from semel.sinks.valkey.store import ValkeyStore

        return StoreShelf(ValkeyStore(url))
    if is_search(url):
        from semel.sinks.search.store import SearchStore

        return StoreShelf(SearchStore(url))
    return DatabaseShelf(url)


def _item(row: ParkedRow) -> Item:
    lane = row.offset if row.record_key is None else row.record_key
    return Item(row.key.sink, row.topic, row.key.part, row.offset, row.record_key, lane, row.fault)


@asynccontextmanager
async def open_shelves(app: App, settings: Settings) -> AsyncIterator[list[Shelf]]:
    """Every place where records of the app wait, as long as this is open."""
    async with AsyncExitStack() as stack:
        shelves: list[Shelf] = [_shelf(url) for url in sorted({sink.database.url for sink in app.sinks.values()})]
        if settings.kafka:
            inputs = {processor.topic.name for processor in app.processors.values()} | {requests_topic(app.name)}
            topics = [park_topic(app.name, topic) for topic in sorted(inputs)]
            shelves.append(await stack.enter_async_context(TopicShelf(settings, topics)))
        yield shelves


# --- Looking ---


def rows(items: Sequence[Item]) -> list[dict[str, Any]]:
    """One row a record, for `semel park list`."""
    return [
        {
            "id": item.id,
            "component": item.component,
            "topic": item.topic,
            "partition": item.partition,
            "offset": item.offset,
            "key": None if item.key is None else item.key.decode(errors="replace"),
            "error": BEHIND if item.fault is None else item.fault.error,
            "message": "" if item.fault is None else item.fault.message,
            "group": "" if item.fault is None else item.fault.group,
            "frames": "" if item.fault is None else item.fault.frames,
            "build": "" if item.fault is None else item.fault.build,
        }
        for item in items
    ]


def groups(items: Sequence[Item]) -> list[dict[str, Any]]:
    """One row a cause: exception, top frames and build, and how many keys and records it holds up."""
    heads = {_lane(item): item for item in items if item.fault is not None}
    found: dict[tuple[str, str], list[Item]] = {}
    for item in heads.values():
        assert item.fault is not None
        found.setdefault((item.component, item.fault.group), []).append(item)
    held = Counter(_lane(item) for item in items)
    return [
        {
            "group": group,
            "component": component,
            "error": members[0].fault.error if members[0].fault else "",
            "frames": members[0].fault.frames if members[0].fault else "",
            "build": members[0].fault.build if members[0].fault else "",
            "keys": len(members),
            "records": sum(held[_lane(item)] for item in members),
            "example": members[0].id,
            "message": members[0].fault.message if members[0].fault else "",
        }
        for (component, group), members in sorted(found.items())
    ]


def _lane(item: Item) -> tuple[str, str, int, bytes | int]:
    return item.component, item.topic, item.partition, item.lane


def chosen(
    items: Sequence[Item],
    *,
    ids: Sequence[str] = (),
    keys: Sequence[str] = (),
    group: Sequence[str] = (),
    component: str = "",
    everything: bool = False,
) -> list[Item]:
    """The items that a command names; several ways of naming add up, `component` narrows.

    Raises `ConfigurationError` when nothing is named, and for an id that does not wait.
    """
    if not (ids or keys or group or everything):
        raise ConfigurationError("Which records? Name ids, or give --key, --group or --all. See: semel park list APP.")
    known = {item.id for item in items}
    missing = [name for name in ids if name not in known]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)}: nothing of that id is parked (any more).")
    wanted_keys = {key.encode() for key in keys}
    lanes = {_lane(item) for item in items if item.fault is not None and item.fault.group in group}
    return [
        item
        for item in items
        if (not component or component in (item.component, item.component.partition(".")[2]))
        and (everything or item.id in ids or item.key in wanted_keys or _lane(item) in lanes)
    ]


# --- Asking ---


async def ask(shelves: Sequence[Shelf], items: Sequence[Item], request: Request, env: Env) -> list[Asked]:
    """Leave one command for each component and partition of the items, or several where they are many."""
    asked: list[Asked] = []
    for shelf in shelves:
        places: dict[tuple[str, str, int], list[Item]] = {}
        own = set(await shelf.items())
        for item in items:
            if item in own:
                places.setdefault((item.component, item.topic, item.partition), []).append(item)
        for (component, _, _), members in places.items():
            for first in range(0, len(members), COMMAND_OFFSETS_MAX):
                command = Command(
                    id=str(env.new_id()),
                    verb=request.verb,
                    offsets=[item.offset for item in members[first : first + COMMAND_OFFSETS_MAX]],
                    by=request.by,
                    reason=request.reason,
                    at_ms=env.wall_ms(),
                    build=request.build,
                    value=request.value,
                )
                await shelf.ask(members[0], command)
                asked.append(Asked(shelf, component, command))
    return asked


async def wait_for(asked: Sequence[Asked], seconds: float, env: Env) -> list[dict[str, Any]]:
    """One row a command: what came of it, as far as that is known after so long."""
    deadline = env.monotonic() + seconds
    while True:
        found = [(item, await item.shelf.outcomes(item.command.id)) for item in asked]
        if all(outcomes and outcomes[-1].finished for _, outcomes in found) or env.monotonic() >= deadline:
            return [_result(item, outcomes) for item, outcomes in found]
        await asyncio.sleep(_LOOK_SECONDS)


def _result(asked: Asked, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    is_done = bool(outcomes) and outcomes[-1].finished
    failed = [failed for outcome in outcomes for failed in outcome.failed]
    refused = next((outcome.refused for outcome in outcomes if outcome.refused), "")
    return {
        "command": asked.command.id,
        "component": asked.component,
        "state": "refused" if refused else "done" if is_done else "waits for its owner",
        "released": sum(len(outcome.released) for outcome in outcomes),
        "discarded": sum(len(outcome.discarded) for outcome in outcomes),
        "failed": len(failed),
        "message": refused or (f"{failed[0].fault.error}: {failed[0].fault.message}" if failed else ""),
    }
