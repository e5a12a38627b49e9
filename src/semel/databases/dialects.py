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
    serial: str
    """A column that numbers rows."""
    table: str
    """Behind the closing parenthesis of CREATE TABLE."""
    on_conflict: str
    """Before the assignments of an upsert; `{key}` is the list of the key's columns."""


_STANDARD = "ON CONFLICT ({key}) DO UPDATE SET"
_DIALECTS = {
    "SQLite": Dialect("BLOB", "TEXT", "TEXT", "TEXT", "INTEGER PRIMARY KEY AUTOINCREMENT", "", _STANDARD),
    "PostgreSQL": Dialect("BYTEA", "TEXT", "TEXT", "TEXT", "BIGINT GENERATED ALWAYS AS IDENTITY", "", _STANDARD),
    "MariaDB": Dialect(
        "LONGBLOB",
        "LONGTEXT",
        "VARCHAR(255)",  # 4 bytes a character; a key may have 3,072 bytes.
        "VARCHAR(64)",
        "BIGINT NOT NULL AUTO_INCREMENT UNIQUE",
        " ENGINE=InnoDB ROW_FORMAT=DYNAMIC CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin",
        "ON DUPLICATE KEY UPDATE",
    ),
}


def dialect_of(title: str) -> Dialect:
    """The dialect of a database's `title`."""
    return _DIALECTS[title]
