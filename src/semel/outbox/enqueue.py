"""`enqueue_in(connection, record)`: a record inside of a transaction that is the user's own, whatever began it.

A driver's connection has no moment "before COMMIT" to wait for, so the row is written here and now: after the row that
the record's key stands for was changed, its lock keeps the order. A SQLAlchemy session has that moment: its records
are written as its last statements (`semel.outbox.sessions`).
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable
from typing import Any

from semel.databases.borrowed import borrow, kind_of
from semel.errors import ConfigurationError
from semel.outbox.records import inserts, row_of
from semel.processing.effects import Produce

__all__ = ["enqueue_in"]

_SESSIONS = ("Session", "AsyncSession", "scoped_session", "async_scoped_session")


def enqueue_in(connection: Any, record: Produce, *, id: uuid.UUID | str | None = None) -> Any:  # noqa: A002
    """Send a record that `topic.record(key, value)` made, if and only if the connection's transaction commits; its id.

    `connection` is one of psycopg 3 (sync or async), sqlite3, PyMySQL, SQLAlchemy 2 (Connection, Session and their
    async kinds) or Django (`django.db.connection` inside of `transaction.atomic()`), or the `db` of a sink's handler.
    For an AsyncConnection it has to be awaited.

    Raises `DataError` for what cannot be written or is too large for Kafka, `ConfigurationError` for what is no record
    and for a connection that is not known, `Fatal` outside of a transaction: nothing was changed. What the database
    refuses is the driver's own error.
    """
    room, name = kind_of(connection)
    row = row_of(record, id)
    given = uuid.UUID(row.msg_id)
    if room == "sqlalchemy" and name in _SESSIONS:
        from semel.outbox.sessions import add

        add(connection, row)
        return given
    if room == "semel" and name.endswith("Transaction"):
        raise ConfigurationError("enqueue_in is for transactions that you began: here it is tx.send(record).")
    borrowed = borrow(connection)
    [statement] = inserts([row])
    done = borrowed.run(*statement)
    return _then(done, given) if borrowed.is_async else given


async def _then(waiting: Awaitable[Any], given: uuid.UUID) -> uuid.UUID:
    await waiting
    return given
