"""What an app declares about its sinks. Values only: nothing here connects to anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from semel.databases.spec import DatabaseSpec
from semel.errors import ConfigurationError
from semel.processing.component import DELIVERIES, Delivery
from semel.processing.topics import Topic
from semel.sinks.dedup import Dedup

__all__ = ["SEARCH_PARKED_MAX", "SinkHandler", "SinkSpec"]

SEARCH_PARKED_MAX = 10_000
"""Parked records of a search sink's partition: their offsets stand in its position, which each batch writes."""

SinkHandler = Callable[[Sequence[Any], Any], None]
"""`handler(records, db)`: `records` are decoded, `db` offers execute, executemany and query inside the transaction."""


@dataclass(frozen=True, slots=True)
class SinkSpec:
    """A sink of the app: records of `topic` become effects of `handler` in `database`."""

    name: str
    topic: Topic[Any, Any]
    database: DatabaseSpec
    handler: SinkHandler
    max_records: int = 1_000
    """Most records in one database transaction."""
    max_bytes: int = 4 * 1024 * 1024
    """Most bytes of keys and values in one database transaction; one larger record goes alone."""
    linger_ms: int = 20
    """A transaction starts at the earliest this long after the one before it, so that small ones become one."""
    max_parked_keys: int = 1_000
    """A partition stops when more of its keys than this are parked."""
    max_parked_records: int = 100_000
    """A partition stops when more of its records than this are parked."""
    dedup: Dedup | None = None
    """How messages are known that stand in the topic more than once; None where the position is enough."""

    delivery: Delivery = "exactly-once"
    """What a crash may cost: nothing, effects that are written again, or effects that are not written."""

    def __post_init__(self) -> None:
        if self.delivery not in DELIVERIES:
            raise ConfigurationError(
                f"sink {self.name}: delivery {self.delivery!r} is none of {', '.join(DELIVERIES)}."
            )
        if self.dedup is not None and self.delivery != "exactly-once":
            raise ConfigurationError(
                f"sink {self.name}: dedup= applies each message once, which delivery={self.delivery!r} does not."
            )

    def identity(self, app: str) -> str:
        """Names the sink in the database and is its consumer group. A new name starts anew, from the log's start."""
        return f"{app}.{self.name}"
