"""What Semel's own SQL has to say differently from one database to the next."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Dialect", "dialect_of"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Types of columns, and the ends of statements."""

    bytes: str
    text: str
    """Of any length; on MariaDB it cannot be in a key."""
    name: str
    """A name, compared byte by byte, which can be in a key."""
    id: str
    """A short one, as a UUID."""
    short_bytes: str
    """Bytes that can be in a key, at most 255."""
    serial: str
    """A column that numbers rows."""
    table: str
    """Behind the closing parenthesis of CREATE TABLE."""
    by_day: str
    """After that, for a table with a partition for each `day`; nothing where days are deleted row by row."""
    insert_new: str
    """Around `INTO ...`: an INSERT that passes over rows whose key is there, and says nothing about them."""
    on_conflict: str
    """Before the assignments of an upsert; `{key}` is the list of the key's columns."""


_STANDARD = "ON CONFLICT ({key}) DO UPDATE SET"
_DO_NOTHING = "INSERT {} ON CONFLICT DO NOTHING"
_DIALECTS = {
    "SQLite": Dialect(
        "BLOB", "TEXT", "TEXT", "TEXT", "BLOB", "INTEGER PRIMARY KEY AUTOINCREMENT", "", "", _DO_NOTHING, _STANDARD
    ),
    "PostgreSQL": Dialect(
        "BYTEA",
        "TEXT",
        "TEXT",
        "TEXT",
        "BYTEA",
        "BIGINT GENERATED ALWAYS AS IDENTITY",
        "",
        " PARTITION BY RANGE (day)",
        _DO_NOTHING,
        _STANDARD,
    ),
    "MariaDB": Dialect(
        "LONGBLOB",
        "LONGTEXT",
        "VARCHAR(255)",  # 4 bytes a character; a key may have 3,072 bytes.
        "VARCHAR(64)",
        "VARBINARY(255)",
        "BIGINT NOT NULL AUTO_INCREMENT UNIQUE",
        " ENGINE=InnoDB ROW_FORMAT=DYNAMIC CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin",
        "",
        "INSERT IGNORE {}",  # It ignores values that do not fit, too: they are checked before.
        "ON DUPLICATE KEY UPDATE",
    ),
}


def dialect_of(title: str) -> Dialect:
    """The dialect of a database's `title`."""
    return _DIALECTS[title]
