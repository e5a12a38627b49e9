"""The version guard: of each key the highest version that was applied, compared and raised with the effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any, ClassVar, NamedTuple

from semel.databases.database import Database
from semel.processing.topics import DataError
from semel.sinks.dedup import Version, version_of
from semel.sinks.sql.dedup import ROWS_AT_ONCE, Conflict
from semel.types import Record

__all__ = ["VersionGuard"]

KEY_BYTES_MAX = 255
"""A longer key stands in the table as its digest: no database indexes keys of any length."""


class _Mark(NamedTuple):
    key: bytes
    version: int


class VersionGuard:
    """`semel.sinks.sql.dedup.Guard` for `Version`.

    The owner of a partition is alone with its keys, because its position row is locked. Only when a topic gets more
    partitions may a key be written from two of them at once: then the row's lock orders them, and for a row that is not
    there yet one of them meets a `Conflict` and tries again.
    """

    tables: ClassVar[tuple[str, ...]] = ("semel_version",)

    def __init__(self, version: Version, sink: str) -> None:
        self._version = version
        self._sink = sink

    def open(self, database: Database) -> None:
        """Nothing to make."""

    def forget(self) -> None:
        """Nothing is remembered."""

    def prepare(self, database: Database) -> None:
        """Nothing to prepare."""

    def mark(self, record: Record, view: Any) -> _Mark:
        """Key and version. Raises `DataError`."""
        if record.key is None:
            raise DataError("the record has no key, so its version says nothing: versions are compared by key")
        key = record.key
        if len(key) > KEY_BYTES_MAX:
            key = b"sha256:" + sha256(key).digest()
        return _Mark(key, version_of(self._version, view))

    def admit(self, database: Database, marks: Sequence[_Mark]) -> list[bool]:
        """Which of the records are newer than everything before them, in the order in which they are given."""
        before = self._read(database, sorted({mark.key for mark in marks}))
        now = dict(before)
        news = []
        for key, version in marks:
            is_new = key not in now or version > now[key]
            if is_new:
                now[key] = version
            news.append(is_new)
        raised = sorted((key, version) for key, version in now.items() if before.get(key) != version)
        self._write(database, [item for item in raised if item[0] not in before],
                    [item for item in raised if item[0] in before])  # fmt: skip
        return news

    def _read(self, database: Database, keys: Sequence[bytes]) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for start in range(0, len(keys), ROWS_AT_ONCE):
            some = keys[start : start + ROWS_AT_ONCE]
            rows = database.query(
                f"SELECT record_key, version FROM semel_version WHERE sink = ? AND record_key IN "  # noqa: S608
                f"({', '.join('?' * len(some))}) ORDER BY record_key{database.lock_rows}",
                (self._sink, *some),
            )
            found.update((bytes(key), version) for key, version in rows)
        return found

    def _write(self, database: Database, new: Sequence[tuple[bytes, int]], higher: Iterable[tuple[bytes, int]]) -> None:
        for start in range(0, len(new), ROWS_AT_ONCE):
            some = new[start : start + ROWS_AT_ONCE]
            sql = database.insert_if_absent("semel_version", ("sink", "record_key", "version"), len(some))
            if database.execute(sql, [value for item in some for value in (self._sink, *item)]) != len(some):
                raise Conflict(f"{self._sink}: another partition wrote the first version of a key of ours")
        rows = [(version, self._sink, key, version) for key, version in higher]
        if rows:
            sql = "UPDATE semel_version SET version = ? WHERE sink = ? AND record_key = ? AND version < ?"
            if database.executemany(sql, rows) != len(rows):
                raise Conflict(f"{self._sink}: another partition raised the version of a key of ours")
