"""One connection to a database, used by one thread at a time, with transactions begun and ended by hand."""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any, ClassVar

from semel.databases.dialects import dialect_of
from semel.databases.statements import check_handler_statement
from semel.errors import ConfigurationError, Retriable

__all__ = [
    "Cause",
    "Database",
    "Parameters",
    "check_url",
    "connect",
    "is_cache",
    "is_documents",
    "is_missing_privilege",
    "is_missing_table",
    "is_search",
    "open_database",
    "without_password",
]

Parameters = Sequence[Any]

LOCK_WAIT_SECONDS = 5.0
"""How long a statement waits for SQLite's write lock before the batch is given back and tried again."""
IDLE_IN_TRANSACTION_SECONDS = 10
"""How long a server lets a stopped process hold its locks, and so delay the one that takes over."""
STATEMENT_SECONDS = 30


class Cause(Enum):
    """Whose fault an error is, which decides what happens to the batch."""

    DATA = auto()
    """Trying again would fail again: the record at fault is parked."""
    CONFLICT = auto()
    """Two transactions met (deadlock, serialization): try again at once."""
    LOCKED = auto()
    """Somebody holds the lock for long: try again later."""
    INFRASTRUCTURE = auto()
    """The database or the way to it: wait, probe, try again. Nothing is parked."""


class Database(ABC):
    """A connection. `connect` may be called again after `close`; errors are the driver's own."""

    title: ClassVar[str]
    lock_rows: ClassVar[str]
    """What makes a SELECT wait for a transaction that changes the rows it reads."""

    shows_commits_early = False
    """Others see a commit before it is on the disk, from where a crash would take it back. A later write of whoever saw
    it, once committed, has taken it there: the log is written in order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.binary = False
        """Ask for results in the driver's binary form, where it has one: less work for rows of bytes."""

    def __repr__(self) -> str:
        state = "in transaction" if self.in_transaction else "connected" if self.connected else "closed"
        return f"<{type(self).__name__} {without_password(self.url)} [{state}]>"

    @property
    @abstractmethod
    def connected(self) -> bool: ...

    @property
    @abstractmethod
    def in_transaction(self) -> bool: ...

    @property
    @abstractmethod
    def driver_connection(self) -> Any:
        """The driver's own connection. Raises the driver's error when it is closed."""

    @abstractmethod
    def connect(self) -> None:
        """Open the connection. Raises `ConfigurationError` where trying again cannot help."""

    @abstractmethod
    def close(self) -> None:
        """Close without raising; the database rolls back what was open."""

    @abstractmethod
    def begin(self) -> None:
        """Begin a transaction that will write."""

    @abstractmethod
    def commit(self) -> None:
        """Commit. Raises `OutcomeUnknown`, with the connection closed, when the answer did not come;
        any other error means that nothing was committed."""

    @abstractmethod
    def rollback(self) -> None:
        """Roll back what is open, without raising; the connection is closed where that does not work."""

    @abstractmethod
    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Run one statement; how many rows it changed."""

    @abstractmethod
    def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        """Run one statement for each row of parameters; how many rows they changed together."""

    @abstractmethod
    def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Run one statement and fetch all of its rows."""

    @abstractmethod
    def migrate(self, sql: str) -> None:
        """Run a script, one process at a time; in one transaction, where the database can do that with DDL."""

    def check_handler_statement(self, sql: str) -> None:
        """Raise `StatementRefused` for a statement that would end or leave the transaction of a handler."""
        check_handler_statement(sql)

    @abstractmethod
    def driver_cause(self, error: Exception) -> Cause | None:
        """Whose fault a driver's error is; None for an exception that is not the driver's."""

    def insert_if_absent(self, table: str, columns: Sequence[str], rows: int = 1, *, returning: str = "") -> str:
        """The INSERT of so many rows that passes over those whose key is there, and says nothing about them.

        A transaction that is just writing such a key is waited for. With `returning` it tells of the rows that are new.
        """
        row = f"({', '.join('?' * len(columns))})"
        said = f" RETURNING {returning}" if returning else ""
        into = f"INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * rows)}"
        return dialect_of(self.title).insert_new.format(into) + said

    def check_constraints_now(self) -> None:  # noqa: B027 - SQLite cannot
        """From here to the end of the transaction no constraint waits for COMMIT, where the database can do that."""

    def interrupt(self) -> None:  # noqa: B027 - a driver that cannot lets the statement run to its own limit
        """End, from another thread, the statement that is running; nothing happens when none is. Does not raise."""

    def origin(self) -> str | None:
        """Which server this is and which history of it: another one after a restore. None where nobody can say."""
        return None

    def check_durable(self) -> None:  # noqa: B027 - some set it for their own session
        """Raise `ConfigurationError` where a COMMIT that was answered can be lost with the server's process.

        What is told to others after a COMMIT - records in Kafka - would be there without the rows.
        """

    def new_id(self) -> str:
        """An id for a row of ours."""
        return str(uuid.uuid4())

    def listen(self, channel: str) -> bool:  # noqa: ARG002 - some can
        """Have `wait` return when somebody calls for this channel; False where the database cannot do that."""
        return False

    def wait(self, seconds: float) -> bool:  # noqa: ARG002
        """Wait for a call on the channel, at most so long; whether there was one."""
        return False

    def write_lock_holder(self) -> int | None:
        """The process of this machine that holds a lock on the whole database; None where there is no such lock."""
        return None

    def cause(self, error: Exception) -> Cause:
        """Whose fault any exception is that came out of a transaction."""
        found = self.driver_cause(error)
        if found is not None:
            return found
        if isinstance(error, Retriable | ConnectionError | TimeoutError):
            return Cause.INFRASTRUCTURE
        return Cause.DATA


def without_password(url: str) -> str:
    """The URL as it may be logged."""
    url = re.sub(r"(://[^:/?#@]*):[^@/]*@", r"\1:***@", url)
    return re.sub(r"([?&\s]password=)[^&\s]*", r"\1***", url)


def is_cache(url: str) -> bool:
    """Whether a URL names a Valkey or Redis."""
    return url.startswith(("valkey:", "valkeys:", "redis:", "rediss:"))


def is_search(url: str) -> bool:
    """Whether a URL names an OpenSearch."""
    return url.startswith(("opensearch:", "opensearchs:"))


def is_documents(url: str) -> bool:
    """Whether a URL names a document store that speaks MongoDB's protocol."""
    return url.startswith(("mongodb:", "mongodb+srv:"))


def title_of(url: str) -> str:
    """What kind of database a URL names; its driver need not be there. Raises `ConfigurationError`."""
    if url.startswith("sqlite:"):
        return "SQLite"
    if url.startswith(("postgresql:", "postgres:")):
        return "PostgreSQL"
    if url.startswith("mariadb:"):
        return "MariaDB"
    if is_cache(url):
        raise ConfigurationError(f"{without_password(url)!r} is no SQL database. Declare it with app.cache(...).")
    if is_search(url):
        raise ConfigurationError(f"{without_password(url)!r} is no SQL database. Declare it with app.search(...).")
    if is_documents(url):
        raise ConfigurationError(f"{without_password(url)!r} is no SQL database. Declare it with app.documents(...).")
    if url.startswith("mysql:"):
        raise ConfigurationError(
            f"{without_password(url)!r}: Semel works on MariaDB (mariadb://USER@HOST/NAME), not on MySQL, which has no "
            "INSERT ... RETURNING and no time-out for transactions that stand still."
        )
    raise ConfigurationError(
        f"{without_password(url)!r} is no database that Semel knows. "
        "Use sqlite:///PATH, postgresql://USER@HOST/NAME or mariadb://USER@HOST/NAME."
    )


_OTHERS = {
    "cache": (is_cache, "valkey://HOST:PORT/0"),
    "documents": (is_documents, "mongodb://HOST:PORT/NAME"),
    "search": (is_search, "opensearch://HOST:PORT"),
}


def check_url(kind: str, url: Any, what: str) -> None:
    """Raise `ConfigurationError` for a URL that is not of the kind that `kind` says."""
    if kind in _OTHERS:
        is_it, example = _OTHERS[kind]
        if not is_it(str(url)):
            raise ConfigurationError(
                f"{what}: {without_password(str(url))!r} is no {kind} that Semel knows. Use {example}."
            )
        return
    try:
        title_of(str(url))
    except ConfigurationError as error:
        raise ConfigurationError(f"{what}: {error}") from None


def open_database(url: str) -> Database:
    """The database of a URL, not yet connected. Raises `ConfigurationError` for one that Semel does not know."""
    title = title_of(url)
    if title == "SQLite":
        from semel.databases.sqlite import SqliteDatabase

        return SqliteDatabase(url)
    if title == "MariaDB":
        from semel.databases.mariadb import MariadbDatabase

        return MariadbDatabase(url)
    from semel.databases.postgres import PostgresDatabase

    return PostgresDatabase(url)


def connect(url: str) -> Database:
    """A connection for a tool that only looks. Raises the driver's error when the database cannot be reached."""
    database = open_database(url)
    database.connect()
    return database


def is_missing_table(error: Exception) -> bool:
    """Whether a driver's error says that a table does not exist."""
    if getattr(error, "sqlstate", None) == "42P01" or str(error).startswith("no such table"):
        return True
    return _mariadb_code(error) == 1146


_MARIADB_DENIED = frozenset({1044, 1142, 1143, 1227})
"""Access denied to a database, a table, a column, a privileged operation."""


def is_missing_privilege(error: Exception) -> bool:
    """Whether a driver's error says that the user may not do that to a table."""
    if getattr(error, "sqlstate", None) == "42501" or _mariadb_code(error) in _MARIADB_DENIED:
        return True
    return str(error).startswith(("attempt to write a readonly database", "not authorized"))


def _mariadb_code(error: Exception) -> int:
    """PyMySQL's number of an error; 0 for one of another driver."""
    code = error.args[0] if error.args and type(error).__module__.startswith("pymysql.") else 0
    return code if isinstance(code, int) else 0
