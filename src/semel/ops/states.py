"""What a state holds of one key, read from its changelog: that is what is committed, whichever worker has it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from semel.app import App
from semel.client.admin import Admin
from semel.client.consumer import Reader
from semel.errors import ConfigurationError
from semel.ops.listings import tool_client
from semel.processing.component import state_topic
from semel.processing.topics import DataError, State
from semel.settings import Settings
from semel.types import Record, TopicPartition

__all__ = ["read_state"]

_POLL_RECORDS = 5_000


async def read_state(app: App, settings: Settings, store: str, key: str) -> list[dict[str, Any]]:
    """One row for each partition of the state that has the key: partition, offset, when it was written, value.

    Each partition of the input keeps its own state, so a key is in more than one of them only if records of several
    partitions put it. Raises `ConfigurationError` for a state that the app does not have, or that was never made.
    """
    state = app.states.get(store)
    if state is None:
        known = f"it has {', '.join(sorted(app.states))}" if app.states else "it has none"
        raise ConfigurationError(f"app {app.name} has no state {store!r}: {known}.")
    wanted = _key(state, key)
    found: dict[int, Record] = {}
    for record in await _read(settings, state_topic(app.name, store), wanted):
        found[record.partition] = record
    return [_row(record) for _, record in sorted(found.items()) if record.value is not None]


def _key(state: State[Any, Any], text: str) -> bytes:
    try:
        if state.key_type is int:
            return state.key_serde.encode(int(text))
        return state.key_serde.encode(text if state.key_type is str else text.encode())
    except (ValueError, DataError) as error:
        raise ConfigurationError(f"{text!r} is no key of state {state.name}, whose keys are int: {error}.") from error


async def _read(settings: Settings, topic: str, key: bytes) -> list[Record]:
    """Every committed change of the key, partition by partition in order."""
    async with tool_client(settings) as client:
        admin = Admin(client)
        if topic not in await admin.list_topics():
            raise ConfigurationError(f"there is no topic {topic} yet: no worker of the app has run on this Kafka.")
        partitions = [TopicPartition(topic, number) for number in range((await client.topic(topic)).partitions)]
        ends = await admin.list_offsets(partitions, at="stable")
        starts = await admin.list_offsets(partitions, at="earliest")
    waiting = {at for at in partitions if starts[at] < ends[at]}
    if not waiting:
        return []
    reader = Reader(settings.kafka, settings=settings.kafka_client)
    found: list[Record] = []
    try:
        await reader.start({at: starts[at] for at in waiting})
        while waiting:
            batch = await reader.poll(_POLL_RECORDS, 1.0)
            found += [record for record in batch.records if record.key == key]
            waiting -= {at for at, position in batch.end_offsets.items() if position >= ends[at]}
    finally:
        await reader.close()
    return found


def _row(record: Record) -> dict[str, Any]:
    written = datetime.fromtimestamp(record.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    value = (record.value or b"").decode(errors="replace")
    return {"partition": record.partition, "offset": record.offset, "written": written, "value": value}
