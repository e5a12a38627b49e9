"""What a sink's transaction asks before a record is given to the handler: was this applied already?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from semel.databases.database import Database
from semel.errors import SemelError
from semel.sinks.dedup import Dedup, Inbox
from semel.types import Record

__all__ = ["ROWS_AT_ONCE", "Conflict", "Guard", "guard_of"]

ROWS_AT_ONCE = 500
"""Rows of one INSERT: with five columns far below SQLite's 32,766 parameters and PostgreSQL's 65,535."""


class Conflict(SemelError):
    """Another transaction was in the way, or changed what we went by; nothing is committed. Try again at once."""


class Guard(Protocol):
    """Knows what a sink has applied. What it learns in a transaction is committed, or rolled back, with the effects."""

    tables: ClassVar[tuple[str, ...]]

    def open(self, database: Database) -> None:
        """The tables are there: make them fit for this sink. Raises `ConfigurationError` when that cannot be."""

    def forget(self) -> None:
        """The connection was lost: what is remembered of the database may not hold any more."""

    def prepare(self, database: Database) -> None:
        """Called before each transaction: do what cannot be done inside."""

    def mark(self, record: Record, view: Any) -> Any:
        """What a record is known by. Raises `DataError` for one that cannot be told from others: it is parked."""

    def admit(self, database: Database, marks: Sequence[Any]) -> list[bool]:
        """Inside the transaction: whether each is new, and remember it. Raises `Conflict`."""


def guard_of(dedup: Dedup | None, sink: str, wall_ms: Callable[[], int]) -> Guard | None:
    """The guard of a declaration; none where the position row is enough."""
    if dedup is None:
        return None
    if isinstance(dedup, Inbox):
        from semel.sinks.sql.inbox import InboxGuard

        return InboxGuard(dedup, sink, wall_ms)
    from semel.sinks.sql.versions import VersionGuard

    return VersionGuard(dedup, sink)
