"""Keys in the user's own database: who claims one, what is stored under it, and for how long.

A claim is a row, inserted in the transaction of the endpoint's own rows: either all of it is committed or nothing of
it, so there is no key that is taken and has no outcome. Who comes second waits at the row for the first one's end: then
it finds the response, or, when the first one rolled back, takes the key itself.

Keys expire by days, which are dropped whole, so a key has to be unique across them without an index across them. A
claim on day D inserts rows for the days D - keep to D; two claims that are at most `keep` days apart share one of these
days, and meet there. So a key holds for `keep` days at least, and for less than `keep` + 1. Only day D's row has the
response. The day is the database's, which all instances share.

The statements are written as generators, `rows = yield (sql, parameters)`, so that connections of both colours and of
any driver can run them.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import msgspec

from semel.databases.database import Database, is_missing_table, without_password
from semel.databases.dialects import dialect_of
from semel.errors import ConfigurationError
from semel.ingress.rules import Answer

__all__ = ["KEEP_DAYS_MAX", "Claimed", "Known", "check_table", "claim", "schema_sql", "store", "tend"]

KEEP_DAYS_MAX = 30
"""A claim has a row for each of its days."""
DAYS_AHEAD = 7
"""Partitions are made for a week: an instance that cannot make new ones says so long before they are missing."""
DELETES_AT_ONCE = 1_000
"""Rows of one DELETE where days are not partitions: its transaction stays short, and requests get their turn."""

_TABLE = """\
-- Idempotency keys of endpoints that write to this database, each with the response of its request. A key has a row for
-- each day on which it may meet another claim; `status` is NULL in all of them but the last. `day` counts from 1970 in
-- UTC; `scope` and `fingerprint` are digests. Days that are over are dropped.
CREATE TABLE IF NOT EXISTS semel_idempotency (
  day INTEGER NOT NULL,
  scope {short_bytes} NOT NULL,
  fingerprint {short_bytes} NOT NULL,
  status INTEGER,
  headers {text},
  body {bytes},
  PRIMARY KEY (day, scope)
){table}{by_day};

-- For how many days the endpoints of each app keep keys: nothing is dropped before the longest of them. Where one gave
-- up the longest, delete its row.
CREATE TABLE IF NOT EXISTS semel_idempotency_keep (
  keep_days INTEGER NOT NULL,
  PRIMARY KEY (keep_days)
){table};
"""
_DAY = {
    "PostgreSQL": "floor(extract(epoch FROM statement_timestamp()) / 86400)::int",
    "SQLite": "CAST(strftime('%s', 'now') AS INTEGER) / 86400",
    "MariaDB": "UNIX_TIMESTAMP() DIV 86400",
}
_PARTITIONS = """
SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'semel_idempotency'::regclass
"""
_LATEST = {"MariaDB": " LOCK IN SHARE MODE"}
"""What makes a SELECT see what is committed now, also in a transaction that looks at an older state."""

_headers = msgspec.json.Decoder(tuple[tuple[str, str], ...]).decode

Rows = list[tuple[Any, ...]]
Statement = tuple[str, tuple[Any, ...]]


class Claimed(NamedTuple):
    """The key is ours: nobody else runs under it before our transaction ends. `day` has the response's row."""

    day: int


class Known(NamedTuple):
    """The key is another request's. `answer` is None when its transaction was committed without one."""

    fingerprint: bytes
    answer: Answer | None


def schema_sql(title: str) -> str:
    """The SQL that makes the table in the database of this title; it may run again."""
    dialect = dialect_of(title)
    return _TABLE.format(
        short_bytes=dialect.short_bytes,
        text=dialect.text,
        bytes=dialect.bytes,
        table=dialect.table,
        by_day=dialect.by_day,
    )


def claim(
    title: str, scope: bytes, fingerprint: bytes, keep_days: int, wait_ms: int
) -> Generator[Statement, Rows, Claimed | Known]:
    """Take the key, or learn whose it is.

    While another transaction has it and is open, PostgreSQL waits for at most `wait_ms`, and then raises
    lock_not_available; MariaDB waits as long as its innodb_lock_wait_timeout says, SQLite has one writer anyway.
    """
    is_limited = title == "PostgreSQL"
    if is_limited:
        limit = ", current_setting('lock_timeout'), set_config('lock_timeout', ?, true)"
        [(day, before, _)] = yield f"SELECT {_DAY[title]}{limit}", (f"{max(1, wait_ms)}ms",)
    else:
        [(day,)] = yield f"SELECT {_DAY[title]}", ()
    days = range(day - keep_days, day + 1)
    values = ", ".join(["(?, ?, ?)"] * len(days))
    into = f"INTO semel_idempotency (day, scope, fingerprint) VALUES {values}"
    rows = yield (
        dialect_of(title).insert_new.format(into) + " RETURNING day",
        tuple(value for each in days for value in (each, scope, fingerprint)),
    )
    if is_limited:
        yield "SELECT set_config('lock_timeout', ?, true)", (before,)
    if len(rows) == len(days):
        return Claimed(day)
    # The days of one claim, or of two where the clock of the database was set back: the later one answers.
    ours = [each for (each,) in rows] or [-1]
    marks = ", ".join("?" * len(ours))
    found = yield (
        "SELECT fingerprint, status, headers, body FROM semel_idempotency "  # noqa: S608 - our own text
        f"WHERE scope = ? AND day BETWEEN ? AND ? AND NOT (day IN ({marks})) ORDER BY day DESC{_LATEST.get(title, '')}",
        (scope, day - keep_days, day + keep_days, *ours),
    )
    for known, status, headers, body in found:
        if status is not None:
            return Known(bytes(known), Answer(status, _headers(headers), bytes(body)))
    return Known(bytes(found[0][0]) if found else fingerprint, None)


def store(day: int, scope: bytes, answer: Answer) -> Generator[Statement, Rows, None]:
    """Put the response where the claim is; it counts with the COMMIT."""
    headers = msgspec.json.encode(answer.headers).decode()
    yield (
        "UPDATE semel_idempotency SET status = ?, headers = ?, body = ? WHERE day = ? AND scope = ?",
        (answer.status, headers, answer.body, day, scope),
    )


# --- Days come and go ---


def check_table(database: Database) -> None:
    """Raise `ConfigurationError` when the table is missing; it says how to make it."""
    try:
        database.query("SELECT 1 FROM semel_idempotency LIMIT 0")
    except Exception as error:
        if not is_missing_table(error):
            raise
        where = without_password(database.url)
        raise ConfigurationError(
            f"table semel_idempotency is not in {where}. Make it with: semel migrate {where} --idempotency (with --sql "
            "it only prints what it would do)."
        ) from error


def tend(database: Database, keep_days: int) -> int:
    """Make the days to come and drop those that no claim can meet any more; how many rows or days went."""
    sql = dialect_of(database.title).insert_new
    database.execute(sql.format("INTO semel_idempotency_keep (keep_days) VALUES (?)"), (keep_days,))
    [(longest,)] = database.query("SELECT MAX(keep_days) FROM semel_idempotency_keep")
    [(today,)] = database.query(f"SELECT {_DAY[database.title]}")
    floor = today - longest - 1  # A claim that is open since before midnight is of yesterday.
    if not dialect_of(database.title).by_day:
        return _delete(database, floor)
    names = {name for (name,) in database.query(_PARTITIONS)}
    wanted = [day for day in range(floor, today + DAYS_AHEAD + 1) if _name(day) not in names]
    over = sorted(name for name in names if (day := name.rpartition("_")[2]).isdigit() and int(day) < floor)
    sql = "".join(
        f"CREATE TABLE IF NOT EXISTS {_name(day)} PARTITION OF semel_idempotency "
        f"FOR VALUES FROM ({day}) TO ({day + 1});\n"
        for day in wanted
    ) + "".join(f"DROP TABLE IF EXISTS {name};\n" for name in over)
    if sql:
        database.migrate(sql)
    return len(over)


def _name(day: int) -> str:
    return f"semel_idempotency_{day}"


def _delete(database: Database, floor: int) -> int:
    deleted = 0
    while True:
        database.begin()
        try:
            rows = database.query(
                "SELECT day, scope FROM semel_idempotency WHERE day < ? ORDER BY day LIMIT ?", (floor, DELETES_AT_ONCE)
            )
            if rows:
                database.executemany("DELETE FROM semel_idempotency WHERE day = ? AND scope = ?", rows)
            database.commit()
        finally:
            database.rollback()
        deleted += len(rows)
        if len(rows) < DELETES_AT_ONCE:
            return deleted
