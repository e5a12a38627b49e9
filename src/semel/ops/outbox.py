"""`semel outbox`: from the command line to the outboxes of an app's databases."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from typing import Any

from semel.app import App
from semel.client.admin import Admin
from semel.client.cluster import KafkaClient
from semel.client.consumer import Reader
from semel.databases.database import Database, without_password
from semel.databases.spec import DatabaseSpec
from semel.env import Env
from semel.errors import ConfigurationError
from semel.ops.databases import connected
from semel.ops.loading import load_app
from semel.outbox.verbs import REPUBLISH_MAX, Operator, republish, status
from semel.settings import Settings
from semel.types import Record, TopicPartition

__all__ = ["carry_out", "list_status", "operator", "outboxes", "run_republish"]


def outboxes(app: App) -> list[DatabaseSpec]:
    """The app's databases that have one."""
    return [spec for spec in app.databases.values() if spec.outbox]


def _chosen(app: App, name: str | None) -> DatabaseSpec:
    """The database of that name, or the only one. Raises `ConfigurationError`."""
    found = [spec for spec in outboxes(app) if name in (None, spec.name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(spec.name for spec in outboxes(app)) or "none: declare one with app.database(url, outbox=True)"
    raise ConfigurationError(f"Which outbox of app {app.name}? Give --database; it has {known}.")


def operator(reason: str, *, dry_run: bool) -> Operator:
    """Who asks, as the operating system knows them."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return Operator(name, reason, Env().wall_ms(), dry_run)


def list_status(app: str) -> list[dict[str, Any]]:
    """The lanes and holds of all outboxes. Raises `ConfigurationError` where one is not there."""
    found = []
    for spec in outboxes(load_app(app)):
        with connected(spec.url) as database:
            found += [{"database": spec.name, **line} for line in status(_there(spec, database))]
    return found


def _there(spec: DatabaseSpec, database: Database | None) -> Database:
    if database is None:
        raise ConfigurationError(
            f"database {spec.name} is not there ({without_password(spec.url)}): run semel migrate."
        )
    return database


def carry_out(app: str, name: str | None, verb: Callable[[Database], Any]) -> Any:
    """Do something to one outbox."""
    spec = _chosen(load_app(app), name)
    with connected(spec.url) as database:
        return verb(_there(spec, database))


async def run_republish(
    app: str, name: str | None, settings: Settings, at: TopicPartition, first: int, last: int, asked: Operator
) -> list[dict[str, Any]]:
    """Send the committed records of a partition from offset `first` to `last` again; what is sent, a row a record."""
    if not 0 <= first <= last:
        raise ConfigurationError(f"--from {first} --to {last}: give two offsets, the smaller one first.")
    if last - first >= REPUBLISH_MAX:
        raise ConfigurationError(f"{last - first + 1} offsets are more than {REPUBLISH_MAX}: publish them in parts.")
    records = await _records(settings, at, first, last)
    carry_out(app, name, lambda database: republish(database, records, asked))
    return [
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "key": None if record.key is None else record.key.decode(errors="backslashreplace"),
            "bytes": len(record.value or b""),
        }
        for record in records
    ]


async def _records(settings: Settings, at: TopicPartition, first: int, last: int) -> list[Record]:
    async with KafkaClient(settings.kafka, client_id="semel-outbox", settings=settings.kafka_client) as client:
        await client.topic(at.topic)
        admin = Admin(client)
        start = (await admin.list_offsets([at], "earliest"))[at]
        end = (await admin.list_offsets([at], "stable"))[at]
    if first < start or last >= end:
        raise ConfigurationError(f"{at} has committed records from offset {start} to {end - 1}, not {first} to {last}.")
    found: list[Record] = []
    reader = Reader(settings.kafka, settings=settings.kafka_client)
    try:
        await reader.start({at: first})
        position = first
        while position <= last:
            batch = await reader.poll(1_000, 0.5)
            found += [record for record in batch.records if record.offset <= last]
            position = max([position, *(record.offset + 1 for record in batch.records), *batch.end_offsets.values()])
    finally:
        await reader.close()
    return found
