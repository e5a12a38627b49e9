"""MariaDB through PyMySQL: InnoDB, strict, READ COMMITTED; the session's time-outs are ours, as on PostgreSQL.

The server's rows are the truth about a transaction, and its status flag in every answer is the truth about whether one
is open: after an error the flag is asked for again, because some errors (a deadlock) end the whole transaction.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from semel.databases.database import (
    IDLE_IN_TRANSACTION_SECONDS,
    STATEMENT_SECONDS,
    Cause,
    Database,
    Parameters,
    without_password,
)
from semel.databases.statements import (
    check_handler_statement_for_mariadb,
    placeholders_for_pymysql,
    split_statements_for_mariadb,
)
from semel.errors import ConfigurationError, OutcomeUnknown
from semel.processing.shortage import is_shortage

try:
    import pymysql
    from pymysql.constants import CLIENT, SERVER_STATUS
    from pymysql.converters import conversions, escape_datetime
except ImportError as error:
    if is_shortage(error):
        raise  # It is there, and cannot be loaded at this moment.
    raise ConfigurationError(
        f"MariaDB needs PyMySQL, which is not there ({error}). Install it with: pip install 'semel[mariadb]'"
    ) from error

__all__ = ["MariadbDatabase"]

log = logging.getLogger("semel.databases")

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = STATEMENT_SECONDS + 10
"""How long an answer may take: a server that works gives up before."""
MIGRATION_LOCK_SECONDS = 60
LEAST_VERSION = (10, 6)
"""The first one whose CREATE and ALTER are atomic each, so that a kill in a migration leaves whole tables only."""

# What a session gets, whatever the server's defaults are. READ COMMITTED takes no gap locks, which would let two sinks
# that only insert meet in deadlocks, and every statement of a handler sees what is committed, as on PostgreSQL.
# NO_BACKSLASH_ESCAPES makes string literals those of the standard. Times are in UTC.
_SESSION: dict[str, str | int] = {
    "sql_mode": "TRADITIONAL,NO_BACKSLASH_ESCAPES",
    "default_storage_engine": "InnoDB",
    "time_zone": "+00:00",
    "idle_transaction_timeout": IDLE_IN_TRANSACTION_SECONDS,
    # Longer than a stopped owner keeps its locks, shorter than the statement may take.
    "innodb_lock_wait_timeout": 2 * IDLE_IN_TRANSACTION_SECONDS,
    "max_statement_time": STATEMENT_SECONDS,
    # A client that is stopped in the middle of sending or receiving holds its locks too.
    "net_read_timeout": IDLE_IN_TRANSACTION_SECONDS,
    "net_write_timeout": IDLE_IN_TRANSACTION_SECONDS,
    "wait_timeout": 28_800,
}
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
_OPTIONS = ("unix_socket", "ssl_ca", "ssl_cert", "ssl_key")

# https://mariadb.com/kb/en/mariadb-error-code-reference/. What is missing here is the data's or the statement's fault.
_PARSE_ERROR = 1064
_CONFLICTS = frozenset(
    {
        1020,  # record changed since it was read
        1213,  # deadlock
        1412,  # table definition has changed
        1615,  # prepared statement must be prepared again
    }
)
_LOCK_WAIT_TIMEOUT = 1205
_ROLLED_BACK = frozenset({1213})
"""What COMMIT is answered with only when nothing was committed (Galera's certification)."""
_INFRASTRUCTURE = frozenset(
    # Out of files, disk, memory or connections; the storage engine failed; the host is not let in.
    {1021, 1030, 1037, 1038, 1040, 1041, 1042, 1043, 1114, 1129, 1130, 1135, 1203, 1206, 1226}
    | {1044, 1045, 1142, 1143, 1227, 1370}  # access denied to the database, table, column or routine
    | {1046, 1049, 1054, 1146}  # no database, table or column of that name (yet)
    | {1047, 1053, 1077, 1079, 1080}  # not ready (Galera) or shutting down
    | {1152, 1153, 1156, 1157, 1158, 1159, 1160, 1161, 1184, 1927}  # packets, network, killed connections
    | {1180, 1223, 1290, 1317, 1665, 1792, 1836, 1969}  # COMMIT failed, read-only, interrupted, time is up
)


_GONE = frozenset({2006, 2013})
"""The client's own codes: the connection broke, before or while it waited for an answer."""


class MariadbDatabase(Database):
    """A session. Options behind `?` in the URL: `unix_socket`, `ssl_ca`, `ssl_cert`, `ssl_key`.

    With `ssl_ca` the server's certificate and name are checked; without it a connection is encrypted where the server
    can do it, and nothing is checked.
    """

    title = "MariaDB"
    shows_commits_early = True  # InnoDB lets a transaction's locks go, then writes its log to the disk.
    lock_rows = " FOR UPDATE"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._where = _parsed(url)
        self._connection: Any = None
        self._packet_bytes = 0
        self._lost: pymysql.Error | None = None
        """What ended the transaction that its owner still believes in."""

    @property
    def connected(self) -> bool:
        return self._connection is not None and bool(self._connection.open)

    @property
    def in_transaction(self) -> bool:
        return self.connected and bool(self._connection.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS)

    @property
    def _open(self) -> Any:
        if not self.connected:
            raise pymysql.OperationalError(2006, "the connection is closed")
        return self._connection

    @property
    def driver_connection(self) -> Any:
        return self._open

    def connect(self) -> None:
        self.close()
        connection = pymysql.connect(
            **self._where,
            charset="utf8mb4",
            autocommit=True,
            client_flag=CLIENT.FOUND_ROWS,  # An UPDATE counts the rows that it found, as everywhere else.
            conv=conversions | {datetime: _escaped_datetime},
            read_timeout=ANSWER_SECONDS,
            write_timeout=ANSWER_SECONDS,
            program_name="semel",
            defer_connect=True,
        )
        try:
            connection.connect(self._socket())
            self._connection = connection
            self._check_server()
            names = ", ".join(f"SESSION {name} = %s" for name in _SESSION)
            self._cursor(f"SET {names}", tuple(_SESSION.values()))
            self._cursor("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED", ())
        except BaseException:
            self.close()
            raise

    def _socket(self) -> socket.socket:
        """A connected socket that notices a dead server within about 15 seconds."""
        path, address = self._where["unix_socket"], (self._where["host"], self._where["port"])
        try:
            if path is not None:
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                made.settimeout(CONNECT_SECONDS)
                made.connect(path)
                return made
            made = socket.create_connection(address, CONNECT_SECONDS)
        except OSError as error:
            raise pymysql.OperationalError(
                2003, f"nobody answers at {path or '{}:{}'.format(*address)}: {error}"
            ) from error
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return made

    def _check_server(self) -> None:
        [(version, packet, is_logged, log_format)] = self.query(
            "SELECT VERSION(), @@max_allowed_packet, @@log_bin, @@binlog_format"
        )
        found = re.match(r"(\d+)\.(\d+)", version)
        where = without_password(self.url)
        if "MariaDB" not in version or found is None or (int(found[1]), int(found[2])) < LEAST_VERSION:
            raise ConfigurationError(
                f"{where} is {version}. Semel needs MariaDB {'.'.join(map(str, LEAST_VERSION))} or later."
            )
        if is_logged and log_format == "STATEMENT":
            raise ConfigurationError(
                f"{where} has binlog_format=STATEMENT, which forbids READ COMMITTED. Set it to MIXED or ROW."
            )
        self._packet_bytes = int(packet)

    def check_durable(self) -> None:
        [(flush,)] = self.query("SELECT @@innodb_flush_log_at_trx_commit")
        if int(flush) != 1:
            raise ConfigurationError(
                f"{without_password(self.url)} has innodb_flush_log_at_trx_commit={flush}: a COMMIT that was answered "
                "can be lost with the server, and Kafka would have its records all the same. Set it to 1."
            )

    def close(self) -> None:
        self._lost = None
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(pymysql.Error):
                connection.close()

    def begin(self) -> None:
        with self._watched():
            self._open.begin()

    def commit(self) -> None:
        if not self.in_transaction:
            raise pymysql.OperationalError(1180, "the transaction was rolled back by an earlier error")
        try:
            self._connection.commit()
        except pymysql.Error as error:
            if self.connected and _code(error) in _ROLLED_BACK:
                self._ask_status()
                raise
            self.close()
            raise OutcomeUnknown(f"the connection to {without_password(self.url)} broke in COMMIT: {error}") from error

    def rollback(self) -> None:
        self._lost = None
        if not self.in_transaction:
            return
        try:
            self._connection.rollback()
        except pymysql.Error:
            self.close()

    def execute(self, sql: str, parameters: Parameters = ()) -> int:
        with self._watched():
            return self._cursor(placeholders_for_pymysql(sql), tuple(parameters))[0]

    def executemany(self, sql: str, rows: Iterable[Parameters]) -> int:
        """INSERTs whose VALUES are placeholders only go in statements of many rows, all else row by row."""
        given = [tuple(row) for row in rows]
        with self._watched(), self._open.cursor() as cursor:
            try:
                return max(0, int(cursor.executemany(placeholders_for_pymysql(sql), given) or 0))
            except pymysql.OperationalError as error:
                # The server closes the connection of whoever sends too much, and its reason may be lost with it.
                largest = max(sum(len(item) for item in row if isinstance(item, str | bytes)) for row in given)
                if _code(error) not in _GONE or not self._packet_bytes or 2 * largest < self._packet_bytes:
                    raise
                raise pymysql.OperationalError(
                    1153,
                    f"the connection broke under a row of {largest} bytes and more, and the server's "
                    f"max_allowed_packet is {self._packet_bytes}. Raise it on the server.",
                ) from error

    def query(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        with self._watched():
            return self._cursor(placeholders_for_pymysql(sql), tuple(parameters))[1]

    def _cursor(self, sql: str, parameters: tuple[Any, ...]) -> tuple[int, list[tuple[Any, ...]]]:
        with self._open.cursor() as cursor:
            text = cursor.mogrify(sql, parameters).encode()
            if self._packet_bytes and len(text) >= self._packet_bytes:
                # The server would only close the connection.
                raise pymysql.OperationalError(
                    1153,
                    f"a statement of {len(text)} bytes is larger than the server's max_allowed_packet "
                    f"({self._packet_bytes}). Raise it on the server.",
                )
            changed = cursor.execute(text)
            return max(0, int(changed or 0)), list(cursor.fetchall() if cursor.description else ())

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Around statements: after an error, find out whether the transaction is still there.

        Where it is not, nothing more runs before `rollback`: each statement would be committed by itself.
        """
        if self._lost is not None:
            raise pymysql.OperationalError(_code(self._lost), f"the transaction is over: {self._lost}") from self._lost
        was_open = self.in_transaction
        try:
            yield
        except pymysql.Error as error:
            if was_open and self.connected:
                self._ask_status()
                if not self.in_transaction:
                    self._lost = error
            raise

    def _ask_status(self) -> None:
        try:
            self._connection.query("DO 0")
        except pymysql.Error:
            self.close()

    def migrate(self, sql: str) -> None:
        """Statement by statement, each of which commits by itself; whatever cannot be parsed changes nothing at all.

        A migration that broke off in the middle is healed by running it again: every statement may run twice.
        """
        statements = split_statements_for_mariadb(sql)
        name = f"semel migrate {self._where['database']}"
        if self.query("SELECT GET_LOCK(?, ?)", (name[:64], MIGRATION_LOCK_SECONDS)) != [(1,)]:
            raise pymysql.OperationalError(
                _LOCK_WAIT_TIMEOUT, "another process has been migrating this database for long"
            )
        try:
            for statement in statements:
                self._check_syntax(statement)
            for statement in statements:
                self._open.query(statement)
            self._check_engines()
        finally:
            if self.connected:
                self.query("SELECT RELEASE_LOCK(?)", (name[:64],))

    def _check_syntax(self, statement: str) -> None:
        try:
            self._cursor("PREPARE semel_check FROM %s", (statement,))
        except pymysql.Error as error:
            if _code(error) == _PARSE_ERROR or not self.connected:
                raise
            return  # Tables that the script makes first, and statements that cannot be prepared.
        self._cursor("DEALLOCATE PREPARE semel_check", ())

    def _check_engines(self) -> None:
        """What is not InnoDB is not rolled back: for our own tables an error, for others something to know."""
        rows = self.query(
            "SELECT table_name, engine FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE' AND engine <> 'InnoDB' ORDER BY table_name"
        )
        ours = [f"{name} ({engine})" for name, engine in rows if name.startswith("semel_")]
        if ours:
            raise ConfigurationError(
                f"{without_password(self.url)}: {', '.join(ours)} must be InnoDB, or a rollback undoes nothing in it. "
                "ALTER TABLE ... ENGINE=InnoDB mends it."
            )
        if rows:
            log.warning(
                "%s: %s: not InnoDB. What a handler writes there is not undone when its transaction fails, so it "
                "may be there twice.",
                without_password(self.url),
                ", ".join(f"{name} ({engine})" for name, engine in rows[:5]),
            )

    def check_handler_statement(self, sql: str) -> None:
        check_handler_statement_for_mariadb(sql)

    def interrupt(self) -> None:
        connection = self._connection
        if connection is None:
            return
        other = MariadbDatabase(self.url)
        with contextlib.suppress(pymysql.Error, ConfigurationError):
            other.connect()
            other.execute(f"KILL QUERY {int(connection.thread_id())}")
        other.close()

    def driver_cause(self, error: Exception) -> Cause | None:
        if not isinstance(error, pymysql.Error):
            return None
        if not self.connected:
            return Cause.INFRASTRUCTURE
        code = _code(error)
        if code in _CONFLICTS:
            return Cause.CONFLICT
        if code == _LOCK_WAIT_TIMEOUT:
            return Cause.LOCKED
        if code in _INFRASTRUCTURE or 2000 <= code < 3000:  # 2000 and above are the client's own.
            return Cause.INFRASTRUCTURE
        return Cause.DATA


def _code(error: Exception) -> int:
    """The server's number; 0 for an error that the driver raised by itself."""
    code = error.args[0] if error.args else 0
    return code if isinstance(code, int) else 0


def _escaped_datetime(value: datetime, mapping: Any = None) -> str:
    """Columns have no time zone and sessions are in UTC, so that is what a time with a zone is turned into."""
    return str(escape_datetime(value if value.tzinfo is None else value.astimezone(UTC), mapping))


def _parsed(url: str) -> dict[str, Any]:
    """PyMySQL's arguments."""
    shown = without_password(url)
    parts = urlsplit(url)
    try:
        port = parts.port or 3306
    except ValueError as error:
        raise ConfigurationError(f"{shown!r} is not a MariaDB URL: {error}") from error
    database = unquote(parts.path.removeprefix("/"))
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ConfigurationError(f"{shown!r}: option {unknown[0]!r} is unknown. There are: {', '.join(_OPTIONS)}.")
    if not database or "/" in database or not (parts.hostname or options.get("unix_socket")):
        raise ConfigurationError(f"{shown!r} names no database. Use mariadb://USER:PASSWORD@HOST:PORT/NAME.")
    found: dict[str, Any] = {name: options.get(name) for name in _OPTIONS}
    found |= {"host": parts.hostname or "localhost", "port": port, "database": database}
    found |= {"user": unquote(parts.username or "") or None, "password": unquote(parts.password or "")}
    if found["ssl_ca"] is not None:
        found["ssl_verify_cert"] = found["ssl_verify_identity"] = True
    return found
