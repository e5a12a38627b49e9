"""Keyed state in memory: what is committed, by store and partition.

It is written only after Kafka answered "committed", and read back from the changelog whenever a partition is taken
over. What a unit of work changes lives in the unit until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["Changes", "Stores"]

Changes = dict[tuple[str, int], dict[bytes, bytes | None]]
"""By store and partition: new values by key; None takes the key out."""

_NOTHING: Mapping[bytes, bytes] = {}


class Stores:
    """The committed values of an engine's stores."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int], dict[bytes, bytes]] = {}

    def __repr__(self) -> str:
        keys = sum(len(table) for table in self._tables.values())
        return f"<Stores {len(self._tables)} tables, {keys} keys>"

    def table(self, store: str, partition: int) -> Mapping[bytes, bytes]:
        """Committed values by key, those written longest ago first; empty when the partition is not ours."""
        return self._tables.get((store, partition), _NOTHING)

    def replace(self, store: str, partition: int, table: dict[bytes, bytes]) -> None:
        """Put restored values in place of whatever was there."""
        self._tables[store, partition] = table

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget partitions that are no longer ours."""
        gone = set(partitions)
        for key in [key for key in self._tables if key[1] in gone]:
            del self._tables[key]

    def apply(self, changes: Changes) -> None:
        """Make the changes of a committed unit of work."""
        for at, changed in changes.items():
            merge(self._tables.setdefault(at, {}), changed)


def merge(table: dict[bytes, bytes], changed: Mapping[bytes, bytes | None]) -> None:
    """Write `changed` over `table`; a written key moves to the end, so that order is age."""
    for key, value in changed.items():
        table.pop(key, None)
        if value is not None:
            table[key] = value
