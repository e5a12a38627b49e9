"""Values that a test makes and gets: an input record for a handler, and the answer of an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from semel.processing.serdes.prepare import registered
from semel.processing.topics import InputRecord, Topic
from semel.testing.registry import MemoryRegistry
from semel.types import Header, Record

__all__ = ["Answer", "Parked", "record"]

K = TypeVar("K")
V = TypeVar("V")


def record(
    topic: Topic[K, V],
    key: K | None,
    value: V | None,
    *,
    headers: Sequence[Header] = (),
    partition: int = 0,
    offset: int = 0,
    timestamp_ms: int = 0,
) -> InputRecord[K, V]:
    """A record as a handler of this topic gets it: written and read back, as on its way through Kafka.

    Raises `DataError` when key or value are not of the topic's types.
    """
    for bound in registered([topic]):
        if not bound.is_attached:
            bound.attach(MemoryRegistry())
    data, added = topic.write(value, headers)
    return topic.decode(Record(topic.name, partition, offset, timestamp_ms, topic.encode_key(key), data, tuple(added)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What an HTTP client of the app got."""

    status: int
    headers: Mapping[str, str]
    """By name in lower case."""
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return msgspec.json.decode(self.body)

    @property
    def is_replayed(self) -> bool:
        """Whether it is the stored answer to an earlier request with the same Idempotency-Key."""
        return self.headers.get("idempotency-replayed") == "true"


@dataclass(frozen=True, slots=True)
class Parked:
    """A record that waits for a person, because it or an earlier one of its key could not be processed."""

    component: str
    """The processor or sink."""
    topic: str
    partition: int
    offset: int
    key: bytes | None
    error: str
    """The error's class; empty when it waits behind an earlier record of its key."""
    message: str


class _Any:
    """Whatever it is."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()
SHOWN_RECORDS_MAX = 20


def show_records(topic: str, records: Sequence[InputRecord[Any, Any]]) -> str:
    """A topic's records for an error message: the last ones of many."""
    shown = records[-SHOWN_RECORDS_MAX:]
    lines = [f"  {topic}-{item.partition}@{item.offset}  {item.key!r}: {item.value!r:.500}" for item in shown]
    left_out = f"  ({len(records) - len(shown)} earlier ones are not shown)\n" if len(shown) < len(records) else ""
    return left_out + ("\n".join(lines) or "  (the topic is empty)")
