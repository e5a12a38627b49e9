"""`enqueue_in(connection, record)`: a record inside of a transaction that is the user's own, whatever began it.

A driver's connection has no moment "before COMMIT" to wait for, so the row is written here and now: after the row that
the record's key stands for was changed, its lock keeps the order. A SQLAlchemy session has that moment: its records
are written as its last statements (`semel.outbox.sessions`).

Drivers are known by the module of a connection's class: none of them is imported here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from semel.databases.statements import placeholders_for_psycopg
from semel.errors import ConfigurationError, Fatal
from semel.outbox.records import NewRow, inserts, row_of
from semel.processing.effects import Produce

__all__ = ["enqueue_in", "write_through_sqlalchemy"]

_MYSQL_IN_TRANSACTION = 1
"""SERVER_STATUS_IN_TRANS of the MySQL protocol."""


def enqueue_in(connection: Any, record: Produce, *, id: uuid.UUID | str | None = None) -> Any:  # noqa: A002
    """Send a record that `topic.record(key, value)` made, if and only if the connection's transaction commits; its id.

    `connection` is one of psycopg 3 (sync or async), sqlite3, PyMySQL, SQLAlchemy 2 (Connection, Session and their
    async kinds) or Django (`django.db.connection` inside of `transaction.atomic()`), or the `db` of a sink's handler.
    For an AsyncConnection it has to be awaited.

    Raises `DataError` for what cannot be written or is too large for Kafka, `ConfigurationError` for what is no record
    and for a connection that is not known, `Fatal` outside of a transaction: nothing was changed. What the database
    refuses is the driver's own error.
    """
    write = _writer_for(connection)
    row = row_of(record, id)
    waiting = write(connection, row)
    return uuid.UUID(row.msg_id) if waiting is None else _then(waiting, row)


async def _then(waiting: Coroutine[Any, Any, None], row: NewRow) -> uuid.UUID:
    await waiting
    return uuid.UUID(row.msg_id)


_Write = Callable[[Any, NewRow], Coroutine[Any, Any, None] | None]


def _writer_for(connection: Any) -> _Write:
    for cls in type(connection).__mro__:
        room = cls.__module__.partition(".")[0]
        known = _WRITERS.get((room, cls.__name__))
        if known is not None:
            return known
    raise ConfigurationError(
        f"enqueue_in: {type(connection).__module__}.{type(connection).__name__} is no connection that Semel knows. "
        "It knows those of psycopg 3, sqlite3, PyMySQL, SQLAlchemy 2 and Django; for others there is "
        "app.transaction(database)."
    )


def _no_transaction(what: str, instead: str) -> Fatal:
    return Fatal(
        f"enqueue_in: {what}, so the record would be there whatever becomes of your rows. Nothing was written. "
        f"{instead}"
    )


def _statement(row: NewRow) -> tuple[str, list[Any]]:
    [statement] = inserts([row])
    return statement


# --- Drivers ---


def _check_psycopg(connection: Any) -> None:
    if connection.autocommit and not connection.info.transaction_status:  # IDLE is 0
        raise _no_transaction(
            "this psycopg connection is in autocommit and no transaction is open",
            "Write 'with connection.transaction():' around your statements and this.",
        )


def _psycopg(connection: Any, row: NewRow) -> None:
    _check_psycopg(connection)
    sql, parameters = _statement(row)
    connection.execute(placeholders_for_psycopg(sql), parameters)


def _psycopg_async(connection: Any, row: NewRow) -> Coroutine[Any, Any, None]:
    _check_psycopg(connection)
    sql, parameters = _statement(row)

    async def write() -> None:
        await connection.execute(placeholders_for_psycopg(sql), parameters)

    return write()


def _check_sqlite(connection: Any) -> None:
    by_hand = connection.isolation_level is None or getattr(connection, "autocommit", -1) is True
    if by_hand and not connection.in_transaction:
        raise _no_transaction(
            "this sqlite3 connection is in autocommit and no transaction is open",
            "Execute BEGIN IMMEDIATE before your statements, and COMMIT after this.",
        )


def _sqlite(connection: Any, row: NewRow) -> None:
    _check_sqlite(connection)
    connection.execute(*_statement(row))


def _check_pymysql(connection: Any) -> None:
    if connection.get_autocommit() and not connection.server_status & _MYSQL_IN_TRANSACTION:
        raise _no_transaction(
            "this PyMySQL connection is in autocommit and no transaction is open",
            "Call connection.begin() before your statements, and connection.commit() after this.",
        )


def _pymysql(connection: Any, row: NewRow) -> None:
    _check_pymysql(connection)
    sql, parameters = _statement(row)
    with connection.cursor() as cursor:
        cursor.execute(placeholders_for_psycopg(sql), parameters)


def _django(connection: Any, row: NewRow) -> None:
    if not connection.in_atomic_block:
        raise _no_transaction(
            "this Django connection is not inside of transaction.atomic()",
            "Write 'with transaction.atomic():' around your changes and this, or set ATOMIC_REQUESTS.",
        )
    sql, parameters = _statement(row)
    with connection.cursor() as cursor:
        cursor.execute(placeholders_for_psycopg(sql), parameters)


def _sink_handler(db: Any, row: NewRow) -> None:
    db.execute(*_statement(row))  # In the transaction of the effects and the position.


# --- SQLAlchemy ---

_DRIVER_CHECKS: dict[str, Callable[[Any], None]] = {
    "psycopg": _check_psycopg,
    "sqlite3": _check_sqlite,
    "pymysql": _check_pymysql,
}


def write_through_sqlalchemy(connection: Any, rows: list[NewRow]) -> None:
    """Write rows through a `sqlalchemy.Connection`. Raises `Fatal` when it is in autocommit."""
    import sqlalchemy

    if not connection.in_transaction():
        raise _no_transaction(
            "this SQLAlchemy connection has no transaction",
            "Write 'with engine.begin() as connection:', or change your rows first, which begins one.",
        )
    driver = connection.connection.driver_connection
    check = _DRIVER_CHECKS.get(type(driver).__module__.partition(".")[0])
    if check is not None:
        check(driver)
    table = sqlalchemy.table("semel_outbox", *(sqlalchemy.column(name) for name in NewRow._fields))
    connection.execute(table.insert(), [row._asdict() for row in rows])


def _sqlalchemy(connection: Any, row: NewRow) -> None:
    write_through_sqlalchemy(connection, [row])


def _sqlalchemy_async(connection: Any, row: NewRow) -> Coroutine[Any, Any, None]:
    async def write() -> None:
        await connection.run_sync(write_through_sqlalchemy, [row])

    return write()


def _session(session: Any, row: NewRow) -> None:
    from semel.outbox.sessions import add

    add(session, row)


_WRITERS: dict[tuple[str, str], _Write] = {
    ("psycopg", "Connection"): _psycopg,
    ("psycopg", "AsyncConnection"): _psycopg_async,
    ("sqlite3", "Connection"): _sqlite,
    ("pymysql", "Connection"): _pymysql,
    ("sqlalchemy", "Connection"): _sqlalchemy,
    ("sqlalchemy", "AsyncConnection"): _sqlalchemy_async,
    ("sqlalchemy", "Session"): _session,
    ("sqlalchemy", "AsyncSession"): _session,
    ("sqlalchemy", "scoped_session"): _session,
    ("sqlalchemy", "async_scoped_session"): _session,
    ("django", "BaseDatabaseWrapper"): _django,
    ("django", "ConnectionProxy"): _django,
    ("semel", "Effects"): _sink_handler,
}
"""By the room and the name of the class, or of one that it is made of."""
