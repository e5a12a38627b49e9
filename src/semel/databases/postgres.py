"""PostgreSQL through psycopg 3. The session's time-outs are ours, so that a stopped or cut-off owner lets go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from semel.databases.database import (
    IDLE_IN_TRANSACTION_SECONDS,
    STATEMENT_SECONDS,
    Cause,
    Database,
    Parameters,
    without_password,
)
from semel.databases.statements import placeholders_for_psycopg
from semel.errors import ConfigurationError, OutcomeUnknown
from semel.processing.shortage import is_shortage

try:
    import psycopg
    from psycopg import conninfo
    from psycopg.pq import TransactionStatus
except ImportError as error:
    if is_shortage(error):
        raise  # It is there, and cannot be loaded at this moment.
    raise ConfigurationError(
        f"PostgreSQL needs psycopg, which is not there ({error}). Install it with: pip install 'semel[postgres]'"
    ) from error

__all__ = ["PostgresDatabase"]

# What a URL does not say itself. Together the client notices a dead server within about 15 seconds.
_CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "semel",
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# And the server notices a dead client, or one that is stopped inside a transaction.
_SESSION = {
    "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS}s",
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "standard_conforming_strings": "on",
}

_CANCEL_SECONDS = 5.0  # For the connection that asks the server to end a statement.
_MIGRATION_LOCK = 7_306_640_281_441_557_868  # Any number that nobody else uses; this one spells "semel" and a checksum.

# https://www.postgresql.org/docs/18/errcodes-appendix.html. Classes: connection, resources, operator intervention,
# system, authorization, catalog and schema names, configuration file, internal.
_INFRASTRUCTURE_CLASSES = frozenset({"08", "53", "57", "58", "28", "3D", "3F", "F0", "XX"})
_INFRASTRUCTURE = frozenset(
    {
        "25006",  # read-only transaction: a standby, or a server that is being switched over
        "25P03",  # idle_in_transaction_session_timeout
        "25P04",  # transaction_timeout
        "42501",  # insufficient privilege
        "42P01",  # undefined table: the schema is not there (yet)
        "42703",  # undefined column
    }
)
_CONFLICTS = frozenset({"40001", "40P01"})
_LOCK_NOT_AVAILABLE = "55P03"


class PostgresDatabase(Database):
    """A session."""

    title = "PostgreSQL"
    lock_rows = " FOR UPDATE"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.Error as error:
            raise ConfigurationError(f"{without_password(url)!r} is not a PostgreSQL URL: {error}") from error
        self._conninfo = conninfo.make_conninfo(**(_CONNECTION | given))
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    @property
    def in_transaction(self) -> bool:
        if self._connection is None or self._connection.closed:
            return False
        return self._connection.info.transaction_status is not TransactionStatus.IDLE

    @property
    def _open(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None:
            raise psycopg.OperationalError("the connection is closed")
        return self._connection

    @property
    def driver_connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        return self._open

    def connect(self) -> None:
        self.close()
        connection = psycopg.connect(self._conninfo, autocommit=True)
        try:
            settings = ", ".join("set_config(%s, %s, false)" for _ in _SESSION)
            connection.execute(f"SELECT {settings}", [text for pair in _SESSION.items() for text in pair])
            # A role or a database may say otherwise; then a COMMIT that was answered is lost with the server's process.
            connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false) "
                "WHERE current_setting('synchronous_commit') = 'off'"
            )
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    def begin(self) -> None:
        self._open.execute("BEGIN")

    def commit(self) -> None:
        connection = self._open
        if connection.info.transaction_status is TransactionStatus.INERROR:
            raise psycopg.errors.InFailedSqlTransaction("an earlier statement failed, and its error was not raised")
        try:
            outcome = connection.execute("COMMIT").statusmessage
        except psycopg.Error as error:
            if not connection.closed:
                raise
            self.close()
            raise OutcomeUnknown(f"the connection to {without_password(self.url)} broke in COMMIT: {error}") from error
        if outcome != "COMMIT":
            raise psycopg.errors.InFailedSqlTransaction(f"COMMIT was answered {outcome}: nothing was committed")

    def rollback(self) -> None:
        if not self.in_transaction:
            return
        try:
            self._open.execute("ROLLBACK")
        except psycopg.Error:
            self.close()

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        return max(0, self._open.execute(placeholders_for_psycopg(sql), parameters).rowcount)

    def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        with self._open.cursor() as cursor:
            cursor.executemany(placeholders_for_psycopg(sql), rows)
            count = max(0, cursor.rowcount)
        if self.in_transaction:
            # psycopg ends its pipeline with a Flush behind the Sync. The server takes that for a new command and stops
            # idle_in_transaction_session_timeout, so that a process stopped here would keep its locks for ever.
            self._open.execute("")
        return count

    def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        cursor = self._open.execute(placeholders_for_psycopg(sql), parameters, binary=self.binary)
        return [] if cursor.description is None else cursor.fetchall()

    def migrate(self, sql: str) -> None:
        self.begin()
        try:
            # CREATE TABLE IF NOT EXISTS is not safe against itself: two at the same moment can fail on the catalog.
            self.query("SELECT pg_advisory_xact_lock(?)", (_MIGRATION_LOCK,))
            self._open.execute(sql.encode())  # Without parameters psycopg sends a script as it is.
            self.commit()
        finally:
            self.rollback()

    def origin(self) -> str | None:
        # The time line is that of what is written now; pg_control_checkpoint() tells of a promotion only later.
        [(system, line)] = self.query(
            "SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) FROM pg_control_system()"
        )
        return f"{system}/{line}"

    def listen(self, channel: str) -> bool:
        self._open.execute(f'LISTEN "{channel}"')
        return True

    def wait(self, seconds: float) -> bool:
        return any(True for _ in self._open.notifies(timeout=seconds, stop_after=1))

    def driver_cause(self, error: Exception) -> Cause | None:
        if not isinstance(error, psycopg.Error):
            return None
        if not self.connected:
            return Cause.INFRASTRUCTURE
        state = error.sqlstate
        if state is None:
            broken = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
            return Cause.INFRASTRUCTURE if broken else Cause.DATA
        if state in _CONFLICTS:
            return Cause.CONFLICT
        if state == _LOCK_NOT_AVAILABLE:
            return Cause.LOCKED
        if state in _INFRASTRUCTURE or state[:2] in _INFRASTRUCTURE_CLASSES:
            return Cause.INFRASTRUCTURE
        return Cause.DATA

    def check_constraints_now(self) -> None:
        self._open.execute("SET CONSTRAINTS ALL IMMEDIATE")

    def interrupt(self) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.cancel_safe(timeout=_CANCEL_SECONDS)
