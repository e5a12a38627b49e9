"""SQLite: one file, one writer at a time; WAL with synchronous=FULL, so that a commit survives power loss."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from semel.databases.database import LOCK_WAIT_SECONDS, Cause, Database, Parameters
from semel.databases.processes import lock_holder
from semel.databases.statements import split_statements
from semel.errors import ConfigurationError, OutcomeUnknown

__all__ = ["SqliteDatabase"]

# https://sqlite.org/rescode.html, primary codes; what is missing here is the data's or the statement's fault.
_INFRASTRUCTURE = frozenset(
    {
        sqlite3.SQLITE_INTERNAL,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOTADB,
    }
)
_MISSING_SCHEMA = re.compile(r"no such (table|column)|has no column named|Cannot operate on a closed database")
_WAL_WRITE_LOCK = 120
"""The byte of the -shm file that whoever writes has locked (https://sqlite.org/walformat.html, section 2.3)."""


class SqliteDatabase(Database):
    """A file. The folder has to exist; the file is made."""

    title = "SQLite"
    lock_rows = ""  # BEGIN IMMEDIATE has waited already.

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.path = _path(url)
        self._connection: sqlite3.Connection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def in_transaction(self) -> bool:
        return self._connection is not None and self._connection.in_transaction

    @property
    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.")
        return self._connection

    @property
    def driver_connection(self) -> sqlite3.Connection:
        return self._open

    def connect(self) -> None:
        self.close()
        if not self.path.parent.is_dir():
            raise ConfigurationError(
                f"the folder {self.path.parent} of database {self.url} does not exist. Make it, or change the URL."
            )
        if not os.access(self.path.parent, os.W_OK):
            raise ConfigurationError(
                f"this user cannot write to {self.path.parent}, where {self.url} keeps its file and its journal. "
                "Change the folder's owner or mode, or change the URL."
            )
        connection = sqlite3.connect(
            self.path,
            timeout=LOCK_WAIT_SECONDS,
            isolation_level=None,
            cached_statements=256,
            check_same_thread=False,  # One thread at a time: a pool hands it on.
        )
        try:
            self._use_wal(connection)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        """Changing to WAL wants the file alone and does not wait for it: several processes start at the same moment."""
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
                    return
                connection.execute("PRAGMA journal_mode=WAL").fetchone()
            except sqlite3.OperationalError as error:
                if self.driver_cause(error) is not Cause.LOCKED or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def begin(self) -> None:
        self._open.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        if not self.in_transaction:
            # Disk full, I/O errors and ON CONFLICT ROLLBACK end a transaction behind the handler's back.
            raise sqlite3.OperationalError("the transaction was rolled back by an earlier error")
        try:
            self._open.execute("COMMIT")
        except sqlite3.Error as error:
            if self.cause(error) is not Cause.INFRASTRUCTURE:
                raise
            # After a failed write or fsync the commit frame may or may not be in the file.
            self.close()
            raise OutcomeUnknown(f"COMMIT on {self.url} failed: {error}") from error

    def rollback(self) -> None:
        if not self.in_transaction:
            return
        try:
            self._open.execute("ROLLBACK")
        except sqlite3.Error:
            self.close()

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        return max(0, self._open.execute(sql, parameters).rowcount)

    def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        return max(0, self._open.executemany(sql, rows).rowcount)

    def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        return self._open.execute(sql, parameters).fetchall()

    def migrate(self, sql: str) -> None:
        self.begin()
        try:
            for statement in _whole_statements(sql):
                self.execute(statement)
            self.commit()
        finally:
            self.rollback()

    def driver_cause(self, error: Exception) -> Cause | None:
        if not isinstance(error, sqlite3.Error):
            return None
        if _MISSING_SCHEMA.search(str(error)):
            return Cause.INFRASTRUCTURE
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            return Cause.DATA if isinstance(error, sqlite3.ProgrammingError) else Cause.INFRASTRUCTURE
        primary = code & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Cause.LOCKED
        if primary == sqlite3.SQLITE_SCHEMA:
            return Cause.CONFLICT
        return Cause.INFRASTRUCTURE if primary in _INFRASTRUCTURE else Cause.DATA

    def interrupt(self) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.interrupt()

    def write_lock_holder(self) -> int | None:
        return lock_holder(self.path.with_name(self.path.name + "-shm"), _WAL_WRITE_LOCK)


def _whole_statements(sql: str) -> list[str]:
    """Statements of a script; those that hold semicolons themselves (CREATE TRIGGER) stay in one piece."""
    statements, current = [], ""
    for piece in split_statements(sql):
        current = f"{current}{piece};"
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return [*statements, current] if current else statements


def _path(url: str) -> Path:
    """`sqlite:///shop.db` is relative to the working directory, `sqlite:////var/shop.db` is absolute."""
    rest = url.removeprefix("sqlite://")
    path = unquote(rest[1:])
    if not rest.startswith("/") or not path or path.startswith(":memory:"):
        raise ConfigurationError(
            f"{url!r} names no file. Use sqlite:///PATH (relative) or sqlite:////PATH (absolute); a database in memory "
            "would forget its position with every restart."
        )
    if "?" in path:
        raise ConfigurationError(f"{url!r}: options after '?' are not supported; Semel sets what it needs itself.")
    return Path(path).absolute()
