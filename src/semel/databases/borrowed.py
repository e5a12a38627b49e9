"""A transaction that somebody else began: our statements run in it, its COMMIT stays its owner's.

Drivers are known by the module of a connection's class: none of them is imported here. SQL has `?` placeholders on all.
Outside of a transaction nothing runs: each statement would be committed by itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from semel.databases.statements import placeholders_for_psycopg
from semel.errors import ConfigurationError, Fatal

__all__ = ["Borrowed", "borrow", "is_busy", "kind_of"]

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

    `connection` is what `app.transaction(db)` gives, the `db` of a sink's handler, or a connection of psycopg 3,
    sqlite3, PyMySQL, SQLAlchemy 2 (Connection, Session and their async kinds) or Django. A SQLAlchemy session begins
    its transaction here, if it has none. Raises `ConfigurationError` for anything else, and `Fatal` where no
    transaction is open and none begins with the first statement; SQLAlchemy's async kinds raise it when a statement is
    run.
    """
    return _KNOWN[kind_of(connection)](connection)


def kind_of(connection: Any) -> tuple[str, str]:
    """The room and the name of the class by which a connection is known. Raises `ConfigurationError` for others."""
    for cls in type(connection).__mro__:
        kind = cls.__module__.partition(".")[0], cls.__name__
        if kind in _KNOWN:
            return kind
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


def _no_transaction(what: str, instead: str) -> Fatal:
    return Fatal(
        f"{what}, so what is written here would be there whatever becomes of your rows. Nothing was written. {instead}"
    )


# --- Semel's own ---


def _transaction(connection: Any) -> Borrowed:
    driver = connection.connection  # Raises when the block has ended.
    title = _title(type(driver).__module__.partition(".")[0])
    return Borrowed(title, connection.query, inspect.iscoroutinefunction(connection.query))


def _database(connection: Any) -> Borrowed:
    if not connection.in_transaction:
        raise _no_transaction(f"this {connection.title} connection has no transaction", "Call begin() first.")
    return Borrowed(connection.title, connection.query, is_async=False)


def _effects(db: Any) -> Borrowed:
    return Borrowed(db.title, db.query, is_async=False)  # In the transaction of the effects and the position.


# --- Drivers ---


def _check_psycopg(connection: Any) -> None:
    if connection.autocommit and not connection.info.transaction_status:  # IDLE is 0
        raise _no_transaction(
            "this psycopg connection is in autocommit and no transaction is open",
            "Write 'with connection.transaction():' around your statements and this.",
        )


def _check_sqlite(connection: Any) -> None:
    by_hand = connection.isolation_level is None or getattr(connection, "autocommit", -1) is True
    if by_hand and not connection.in_transaction:
        raise _no_transaction(
            "this sqlite3 connection is in autocommit and no transaction is open",
            "Execute BEGIN IMMEDIATE before your statements, and COMMIT after this.",
        )


def _check_pymysql(connection: Any) -> None:
    if connection.get_autocommit() and not connection.server_status & 1:  # SERVER_STATUS_IN_TRANS
        raise _no_transaction(
            "this PyMySQL connection is in autocommit and no transaction is open",
            "Call connection.begin() before your statements, and connection.commit() after this.",
        )


_CHECKS: dict[str, Callable[[Any], None]] = {
    "psycopg": _check_psycopg,
    "sqlite3": _check_sqlite,
    "aiosqlite": _check_sqlite,
    "pymysql": _check_pymysql,
}


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
    _check_sqlite(connection)

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
    _check_pymysql(connection)
    return Borrowed("MariaDB", _by_cursor(connection), is_async=False)


def _django(connection: Any) -> Borrowed:
    if not connection.in_atomic_block:
        raise _no_transaction(
            "this Django connection is not inside of transaction.atomic()",
            "Write 'with transaction.atomic():' around your changes and this, or set ATOMIC_REQUESTS.",
        )
    return Borrowed(_title(connection.vendor), _by_cursor(connection), is_async=False)


# --- SQLAlchemy ---

_PLACEHOLDER = re.compile(r"\?")


def _sqlalchemy(connection: Any) -> Borrowed:
    """`connection` is a Connection or a Session, which begins its transaction here if it has none."""
    core = connection.connection() if hasattr(connection, "get_bind") else connection
    _check_sqlalchemy(core)
    text = import_module("sqlalchemy").text

    def run(sql: str, parameters: Sequence[Any]) -> Rows:
        names = iter(f":p{number}" for number in range(len(parameters)))
        named = {f"p{number}": value for number, value in enumerate(parameters)}
        result = core.execute(text(_PLACEHOLDER.sub(lambda _: next(names), sql)), named)
        return [tuple(row) for row in result.fetchall()] if result.returns_rows else []

    return Borrowed(_title(core.dialect.name), run, is_async=False)


def _sqlalchemy_async(connection: Any) -> Borrowed:
    bind = connection.get_bind() if hasattr(connection, "get_bind") else connection

    async def run(sql: str, parameters: Sequence[Any]) -> Rows:
        rows: Rows = await connection.run_sync(lambda inner: _sqlalchemy(inner).run(sql, parameters))
        return rows

    return Borrowed(_title(bind.dialect.name), run, is_async=True)


def _check_sqlalchemy(connection: Any) -> None:
    if not connection.in_transaction():
        raise _no_transaction(
            "this SQLAlchemy connection has no transaction",
            "Write 'with engine.begin() as connection:', or change your rows first, which begins one.",
        )
    pooled = connection.connection
    driver = pooled.driver_connection
    check = _CHECKS.get(type(driver).__module__.partition(".")[0])
    if check is not None:
        check(driver)
        return
    try:
        alone = connection.dialect.detect_autocommit_setting(pooled.dbapi_connection)
    except (AttributeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"SQLAlchemy cannot tell whether driver {connection.dialect.driver} commits each statement by itself, so "
            "nothing was written. Use SQLAlchemy 2.0.43 or newer, with a driver of which it can."
        ) from error
    if alone:
        raise _no_transaction(
            "this SQLAlchemy connection is in autocommit and no transaction is open",
            "Use an engine without isolation_level='AUTOCOMMIT'.",
        )


_KNOWN: dict[tuple[str, str], Callable[[Any], Borrowed]] = {
    ("semel", "Transaction"): _transaction,
    ("semel", "AsyncTransaction"): _transaction,
    ("semel", "Database"): _database,
    ("semel", "Effects"): _effects,
    ("psycopg", "Connection"): _psycopg,
    ("psycopg", "AsyncConnection"): _psycopg_async,
    ("sqlite3", "Connection"): _sqlite,
    ("pymysql", "Connection"): _pymysql,
    ("sqlalchemy", "Connection"): _sqlalchemy,
    ("sqlalchemy", "AsyncConnection"): _sqlalchemy_async,
    ("sqlalchemy", "Session"): _sqlalchemy,
    ("sqlalchemy", "AsyncSession"): _sqlalchemy_async,
    ("sqlalchemy", "scoped_session"): _sqlalchemy,
    ("sqlalchemy", "async_scoped_session"): _sqlalchemy_async,
    ("django", "BaseDatabaseWrapper"): _django,
    ("django", "ConnectionProxy"): _django,
}
"""By the room and the name of the class, or of one that it is made of."""
