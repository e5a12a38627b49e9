"""A transaction that somebody else began: our statements run in it, its COMMIT stays its owner's.

Drivers are known by the module of a connection's class: none of them is imported here. SQL has `?` placeholders on all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from semel.databases.statements import placeholders_for_psycopg
from semel.errors import ConfigurationError, Fatal

__all__ = ["Borrowed", "borrow", "is_busy"]

Rows = list[tuple[Any, ...]]
Run = Callable[[str, Sequence[Any]], Any]
"""Runs one statement and gives its rows; a connection for coroutines gives an awaitable of them."""


class Borrowed(NamedTuple):
    """An open transaction: which database it is on, how a statement runs in it, and in which colour."""

    title: str
    run: Run
    is_async: bool


def borrow(connection: Any) -> Borrowed:
    """How to run statements in a user's transaction.

    `connection` is what `app.transaction(db)` gives, or a connection of psycopg 3, sqlite3, PyMySQL, SQLAlchemy 2
    (Connection, Session and their async kinds) or Django. Raises `ConfigurationError` for anything else, and `Fatal`
    where no transaction is open, because each statement would be committed by itself.
    """
    for cls in type(connection).__mro__:
        room = cls.__module__.partition(".")[0]
        known = _KNOWN.get((room, cls.__name__))
        if known is not None:
            return known(connection)
    raise ConfigurationError(
        f"{type(connection).__module__}.{type(connection).__name__} is no connection that Semel knows. It knows what "
        "app.transaction(database) gives, and those of psycopg 3, sqlite3, PyMySQL, SQLAlchemy 2 and Django."
    )


def is_busy(error: BaseException) -> bool:
    """Whether a driver's error says that another transaction was in the way: nothing happened, try again."""
    error = getattr(error, "orig", None) or error.__cause__ or error if _is_wrapped(error) else error
    if getattr(error, "sqlstate", None) in ("55P03", "40001", "40P01"):
        return True
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (5, 6):  # SQLITE_BUSY, SQLITE_LOCKED
        return True
    is_mysql = type(error).__module__.partition(".")[0] in ("pymysql", "MySQLdb")
    return is_mysql and bool(error.args) and error.args[0] in (1020, 1205, 1213)


def _is_wrapped(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("sqlalchemy", "django")


_TITLES = {
    **dict.fromkeys(["psycopg", "psycopg_c", "postgresql"], "PostgreSQL"),
    **dict.fromkeys(["sqlite3", "sqlite"], "SQLite"),
    **dict.fromkeys(["pymysql", "mysql", "mariadb"], "MariaDB"),
}


def _title(name: str) -> str:
    title = _TITLES.get(name)
    if title is None:
        raise ConfigurationError(f"a database of {name} is none that Semel knows: PostgreSQL, SQLite, MariaDB.")
    return title


def _needs_a_transaction(what: str, instead: str) -> Fatal:
    return Fatal(f"no transaction is open on this {what}, so nothing was written. {instead}")


# --- Semel's own ---


def _transaction(connection: Any) -> Borrowed:
    driver = connection.connection  # Raises when the block has ended.
    title = _title(type(driver).__module__.partition(".")[0])
    return Borrowed(title, connection.query, inspect.iscoroutinefunction(connection.query))


def _database(connection: Any) -> Borrowed:
    if not connection.in_transaction:
        raise _needs_a_transaction(f"{connection.title} connection", "Call begin() first.")
    return Borrowed(connection.title, connection.query, is_async=False)


# --- Drivers ---


def _check_psycopg(connection: Any) -> None:
    if connection.autocommit and not connection.info.transaction_status:  # IDLE is 0
        raise _needs_a_transaction("psycopg connection in autocommit", "Write 'with connection.transaction():'.")


def _psycopg(connection: Any) -> Borrowed:
    _check_psycopg(connection)

    def run(sql: str, parameters: Sequence[Any]) -> Rows:
        cursor = connection.cursor(row_factory=_tuples)
        cursor.execute(placeholders_for_psycopg(sql), parameters)
        return [] if cursor.description is None else list(cursor.fetchall())

    return Borrowed("PostgreSQL", run, is_async=False)


def _psycopg_async(connection: Any) -> Borrowed:
    _check_psycopg(connection)

    async def run(sql: str, parameters: Sequence[Any]) -> Rows:
        cursor = connection.cursor(row_factory=_tuples)
        await cursor.execute(placeholders_for_psycopg(sql), parameters)
        return [] if cursor.description is None else list(await cursor.fetchall())

    return Borrowed("PostgreSQL", run, is_async=True)


def _tuples(_: Any) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """psycopg's row factory: the connection may have another one, for dicts or classes."""
    return tuple


def _sqlite(connection: Any) -> Borrowed:
    by_hand = connection.isolation_level is None or getattr(connection, "autocommit", -1) is True
    if by_hand and not connection.in_transaction:
        raise _needs_a_transaction("sqlite3 connection in autocommit", "Execute BEGIN IMMEDIATE first.")

    def run(sql: str, parameters: Sequence[Any]) -> Rows:
        return [tuple(row) for row in connection.execute(sql, parameters).fetchall()]

    return Borrowed("SQLite", run, is_async=False)


def _by_cursor(connection: Any) -> Run:
    def run(sql: str, parameters: Sequence[Any]) -> Rows:
        with connection.cursor() as cursor:
            cursor.execute(placeholders_for_psycopg(sql), parameters)
            return [] if cursor.description is None else [tuple(row) for row in cursor.fetchall()]

    return run


def _pymysql(connection: Any) -> Borrowed:
    if connection.get_autocommit() and not connection.server_status & 1:  # SERVER_STATUS_IN_TRANS
        raise _needs_a_transaction("PyMySQL connection in autocommit", "Call connection.begin() first.")
    return Borrowed("MariaDB", _by_cursor(connection), is_async=False)


def _django(connection: Any) -> Borrowed:
    if not connection.in_atomic_block:
        raise _needs_a_transaction("Django connection", "Write 'with transaction.atomic():'.")
    return Borrowed(_title(connection.vendor), _by_cursor(connection), is_async=False)


# --- SQLAlchemy ---

_PLACEHOLDER = re.compile(r"\?")


def _sqlalchemy(connection: Any) -> Borrowed:
    bind = connection.get_bind() if hasattr(connection, "get_bind") else connection
    title = _title(bind.dialect.name)

    def prepared(sql: str, parameters: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        text = import_module("sqlalchemy").text
        names = iter(f":p{number}" for number in range(len(parameters)))
        named = {f"p{number}": value for number, value in enumerate(parameters)}
        return text(_PLACEHOLDER.sub(lambda _: next(names), sql)), named

    def rows_of(result: Any) -> Rows:
        return [tuple(row) for row in result.fetchall()] if result.returns_rows else []

    if inspect.iscoroutinefunction(connection.execute):

        async def run_async(sql: str, parameters: Sequence[Any]) -> Rows:
            return rows_of(await connection.execute(*prepared(sql, parameters)))

        return Borrowed(title, run_async, is_async=True)

    def run(sql: str, parameters: Sequence[Any]) -> Rows:
        return rows_of(connection.execute(*prepared(sql, parameters)))

    return Borrowed(title, run, is_async=False)


_KNOWN: dict[tuple[str, str], Callable[[Any], Borrowed]] = {
    ("semel", "Transaction"): _transaction,
    ("semel", "AsyncTransaction"): _transaction,
    ("semel", "Database"): _database,
    ("psycopg", "Connection"): _psycopg,
    ("psycopg", "AsyncConnection"): _psycopg_async,
    ("sqlite3", "Connection"): _sqlite,
    ("pymysql", "Connection"): _pymysql,
    ("sqlalchemy", "Connection"): _sqlalchemy,
    ("sqlalchemy", "AsyncConnection"): _sqlalchemy,
    ("sqlalchemy", "Session"): _sqlalchemy,
    ("sqlalchemy", "AsyncSession"): _sqlalchemy,
    ("sqlalchemy", "scoped_session"): _sqlalchemy,
    ("sqlalchemy", "async_scoped_session"): _sqlalchemy,
    ("django", "BaseDatabaseWrapper"): _django,
    ("django", "ConnectionProxy"): _django,
}
"""By the room and the name of the class, or of one that it is made of."""
