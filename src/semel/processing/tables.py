"""Where the committed rows of keyed state lie: one table for each partition of a store.

A table is a copy of a compacted topic, never the truth: losing it costs a restore. So nothing in it needs to reach the
disk at once; it must only never hold what is not committed, and always say up to where it is complete. `MemoryTables`
lives as long as its process (or a simulated host), `disktables.DiskTables` as long as the machine runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple, Protocol

from semel.errors import Retriable

__all__ = [
    "Changed",
    "Changelog",
    "Entry",
    "Mark",
    "MemoryTable",
    "MemoryTables",
    "PassingTables",
    "Table",
    "TableTrouble",
    "Tables",
    "behind",
]


class Entry(NamedTuple):
    """A value, and the time of the record that wrote it, in milliseconds since 1970."""

    value: bytes
    written_ms: int


Changed = Mapping[bytes, Entry | None]
"""New entries by key, those written longest ago first; None takes the key out."""


class Mark(NamedTuple):
    """Up to where a table is complete, and as of when."""

    topic: str
    """The changelog's identity: one made anew under the same name has another."""
    position: int
    """Every committed change below this offset is in the table; some above it may be."""
    boot: str
    """Which start of the machine this was written in; empty where the system does not say."""
    seen: float
    """Seconds of that start: a tombstone that the table has not seen was in the changelog after this moment.

    That is the moment when somebody began to read the changelog from its beginning; later ones are those at which
    nothing was in it above what was read or written.
    """


class TableTrouble(Retriable):
    """A table cannot be read or written: what it holds is restored from the changelog.

    `is_damaged`: what is in it is not what was written, and trying again would not help.
    """

    def __init__(self, message: str, *, is_damaged: bool = False) -> None:
        super().__init__(message)
        self.is_damaged = is_damaged


class Table(Protocol):
    """The rows of one partition of a store. Methods raise `TableTrouble`."""

    @property
    def mark(self) -> Mark | None:
        """What was written last; None for a new table."""

    def get(self, key: bytes) -> Entry | None:
        """One entry."""

    def oldest(self, after: int, limit: int) -> list[tuple[int, bytes, Entry]]:
        """Up to `limit` (age, key, entry) with ages above `after`, the ones written longest ago first."""

    def span(self, low: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        """Up to `limit` entries from the key `low` on, in the order of keys."""

    def size(self) -> int:
        """Bytes of all keys and values; looks at every row."""

    def write(self, changed: Changed, mark: Mark) -> None:
        """Make these changes and this mark in one step; a written key is the youngest."""

    def clear(self) -> None:
        """Take out every row and the mark."""

    def close(self) -> None:
        """Let go of it; it can be opened again."""

    def discard(self) -> None:
        """Close it, and never find it again."""


class Tables(Protocol):
    """Opens tables."""

    def open(self, store: str, partition: int) -> Table:
        """The table of this partition as it was left, or an empty one. Raises `TableTrouble`."""


class Changelog(NamedTuple):
    """A partition of a store's changelog, as it is."""

    topic: str
    """Its identity."""
    start: int
    end: int
    tombstone_seconds: float
    """So long a tombstone stays there at least (`delete.retention.ms`)."""


def behind(mark: Mark, changelog: Changelog, boot: str, now: float) -> str:
    """Why a table cannot be brought up to date by reading on from its mark; or "".

    Age: a tombstone above the mark was written after `seen`, and Kafka keeps it for so long at least. Half of that is
    allowed, as the broker's clock may jump. Where nothing is above the mark but the marker of its own transaction,
    there is no tombstone to miss, however old it is.
    """
    topic, start, end, tombstone_seconds = changelog
    if mark.topic != topic:
        return f"it is a copy of {mark.topic}, and the changelog is {topic}: the topic was made anew"
    if not boot or mark.boot != boot:
        return "it is of before this machine's last start: what of it reached the disk nobody knows"
    if mark.position > end:
        return f"it is complete up to {mark.position}, and the changelog ends at {end}: records of it were lost"
    if mark.position < start:
        return f"it is complete up to {mark.position}, and the changelog begins at {start}: changes were deleted"
    age = now - mark.seen
    if end - mark.position > 1 and not 0 <= age < tombstone_seconds / 2:
        return (
            f"it was left {age:.0f} s ago, and the changelog keeps tombstones for {tombstone_seconds:.0f} s "
            "(delete.retention.ms): deleted keys could come back"
        )
    return ""


class MemoryTable:
    """Rows in memory, oldest first."""

    def __init__(self) -> None:
        self._rows: dict[bytes, tuple[int, Entry]] = {}
        self._age = 0
        self._sorted: list[bytes] | None = None
        self.mark: Mark | None = None

    def __repr__(self) -> str:
        return f"<MemoryTable {len(self._rows)} keys {self.mark}>"

    def get(self, key: bytes) -> Entry | None:
        """See `Table`."""
        found = self._rows.get(key)
        return None if found is None else found[1]

    def oldest(self, after: int, limit: int) -> list[tuple[int, bytes, Entry]]:
        """See `Table`."""
        return list(islice(((age, key, entry) for key, (age, entry) in self._rows.items() if age > after), limit))

    def span(self, low: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        """See `Table`."""
        if self._sorted is None:
            self._sorted = sorted(self._rows)
        first = bisect_left(self._sorted, low)
        return [(key, self._rows[key][1]) for key in self._sorted[first : first + limit]]

    def size(self) -> int:
        """See `Table`."""
        return sum(len(key) + len(entry.value) for key, (_, entry) in self._rows.items())

    def write(self, changed: Changed, mark: Mark) -> None:
        """See `Table`."""
        for key, entry in changed.items():
            self._rows.pop(key, None)
            if entry is not None:
                self._age += 1
                self._rows[key] = (self._age, entry)
        if changed:
            self._sorted = None
        self.mark = mark

    def clear(self) -> None:
        """See `Table`."""
        self._rows.clear()
        self._sorted = None
        self.mark = None

    def close(self) -> None:
        """See `Table`."""

    def discard(self) -> None:
        """See `Table`."""
        self.clear()


class PassingTables:
    """Tables that are gone when they are closed: for an engine without a folder."""

    def open(self, store: str, partition: int) -> MemoryTable:  # noqa: ARG002
        """See `Tables`."""
        return MemoryTable()


class MemoryTables:
    """Tables that whoever has this object finds again as they were left."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int], MemoryTable] = {}

    def __repr__(self) -> str:
        return f"<MemoryTables {len(self._tables)} tables>"

    def open(self, store: str, partition: int) -> MemoryTable:
        """See `Tables`."""
        return self._tables.setdefault((store, partition), MemoryTable())
