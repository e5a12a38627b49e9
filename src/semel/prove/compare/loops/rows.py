"""The database of the loops that write rows: an append-only table, so that what was done twice is there twice.

SQLite keeps every process' transaction apart from the others'; that is all the loops need of a database.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable

from semel.prove.compare.loops import work

DATABASE = os.environ.get("DATABASE", "items.db")
SCHEMA = 'CREATE TABLE IF NOT EXISTS items ("order" BIGINT NOT NULL, position BIGINT NOT NULL)'
INSERT = 'INSERT INTO items ("order", position) VALUES (?, ?)'


def connect() -> sqlite3.Connection:
    """A connection in autocommit: transactions begin and end where the loop says so."""
    connection = sqlite3.connect(DATABASE, timeout=30, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(SCHEMA)
    return connection


def rows_of(order: dict[str, int]) -> list[tuple[int, int]]:
    """What an order becomes, after the time that the work takes."""
    time.sleep(work.STEP_SECONDS)
    return [(value["order"], value["position"]) for _, value in work.items_of(order)]


def write(connection: sqlite3.Connection, orders: Iterable[bytes | None]) -> None:
    """The rows of these orders, in one database transaction."""
    rows = [row for order in orders for row in rows_of(json.loads(order or b"{}"))]
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(INSERT, rows)
    connection.execute("COMMIT")
