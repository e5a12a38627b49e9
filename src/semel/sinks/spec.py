"""What an app declares about its sinks. Values only: nothing here connects to anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from semel.databases.spec import CacheSpec, DatabaseSpec, SearchSpec
from semel.errors import ConfigurationError
from semel.processing.component import DELIVERIES, Delivery
from semel.processing.topics import Topic
from semel.sinks.dedup import Dedup, Inbox, Version

__all__ = ["SEARCH_PARKED_MAX", "SinkHandler", "SinkSpec", "handler_argument", "sink_spec"]

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


def handler_argument(database: DatabaseSpec) -> str:
    """What a handler gets beside the records, by the name that the documents give it."""
    if isinstance(database, CacheSpec):
        return "cache"
    return "index" if isinstance(database, SearchSpec) else "db"


def sink_spec(
    name: str, topic: Topic[Any, Any], database: DatabaseSpec, handler: SinkHandler, delivery: Delivery,
    dedup: Dedup | None,
) -> SinkSpec:  # fmt: skip
    """A sink as an app declares it. Raises `ConfigurationError` for what its store cannot do."""
    if dedup is not None and not isinstance(dedup, Version | Inbox):
        raise ConfigurationError(f"sink {name}: dedup={dedup!r} is neither Version(...) nor Inbox(...).")
    if isinstance(database, CacheSpec):
        if delivery != "exactly-once":
            raise ConfigurationError(
                f"sink {name}: delivery={delivery!r} saves nothing on a cache, where effects and position are one "
                "script in any case. Leave it out."
            )
        if dedup is not None:
            raise ConfigurationError(
                f"sink {name}: dedup= needs the tables of a database. A cache has its position only."
            )
    if isinstance(database, SearchSpec):
        if delivery != "exactly-once" or dedup is not None:
            raise ConfigurationError(
                f"sink {name}: delivery= and dedup= are not for a search index, where the version of each document "
                "decides. Leave them out, and give put and delete a version=."
            )
        return SinkSpec(name, topic, database, handler, max_parked_records=SEARCH_PARKED_MAX)
    return SinkSpec(name, topic, database, handler, delivery=delivery, dedup=dedup)
