"""One partition of one sink in a store that is no database: how it is named, what is parked of it, what changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from semel.processing.faults import Fault
from semel.processing.parklog import Command, Outcome
from semel.types import Header, Record

__all__ = ["Change", "ParkedRecord", "Place", "Store"]


class Place(NamedTuple):
    """One partition of one sink. Everything about it is in keys that end in its name."""

    sink: str
    cluster_id: str
    topic: str
    part: int

    @property
    def name(self) -> str:
        """As it stands in the index and in keys."""
        return f"{self.sink}:{self.cluster_id}:{self.topic}:{self.part}"

    def key(self, what: str) -> bytes:
        """The key of what is kept of it."""
        return f"semel:{what}:{self.name}".encode()

    @classmethod
    def parse(cls, name: str) -> Place:
        """The place of a name."""
        # Names of topics, clusters and parts hold no colon; the sink's may.
        sink, cluster_id, topic, part = name.rsplit(":", 3)
        return cls(sink, cluster_id, topic, int(part))


class ParkedRecord(msgspec.Struct, frozen=True):
    """A parked record as it is kept. `fault` is None for one that waits behind another of its key."""

    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]
    fault: Fault | None
    parked_at: int

    @classmethod
    def of(cls, record: Record, fault: Fault | None, now_ms: int) -> ParkedRecord:
        """A record that is being parked."""
        return cls(record.timestamp_ms, record.key, record.value, tuple(record.headers), fault, now_ms)

    def record(self, place: Place, offset: int) -> Record:
        """The record as it came."""
        return Record(place.topic, place.part, offset, self.timestamp, self.key, self.value, self.headers)


class Change(NamedTuple):
    """What one step does to a partition. `effects` are as the store's handler notes them."""

    epoch: int
    start: int
    end: int
    records: int = 0
    effects: Sequence[Any] = ()
    parked: Sequence[tuple[int, ParkedRecord]] = ()
    released: Sequence[tuple[int, bytes | None]] = ()
    failed: Sequence[tuple[int, ParkedRecord]] = ()
    command: tuple[str, Command | None, Outcome] | None = None
    """A command's id, what is left of it to do, and what came of it so far."""


class Store(Protocol):
    """What operators ask of such a store."""

    def places(self) -> list[Place]:
        """Every partition of every sink that was ever at work here."""

    def parked(self, place: Place) -> dict[int, ParkedRecord]:
        """Everything that is parked, in order."""

    def ask(self, place: Place, command: Command) -> None:
        """Leave a command beside the parked records."""

    def outcome(self, place: Place, command: str) -> Outcome | None:
        """What was done for a command so far; None for nothing."""
