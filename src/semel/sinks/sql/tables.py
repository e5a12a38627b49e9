"""Semel's tables in a user's database: what they are, making them, and looking whether they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from semel.databases.database import Cause, Database, is_missing_table, open_database, title_of, without_password
from semel.databases.dialects import dialect_of
from semel.errors import ConfigurationError

__all__ = ["check_tables", "migrate", "schema_sql"]

_TABLES = """\
-- Where each sink is in each partition. `next_offset` changes in the transaction of the effects, and only while
-- `owner_epoch` is the writer's own: a new owner raises it before it reads anything.
CREATE TABLE IF NOT EXISTS semel_position (
  sink {name} NOT NULL,
  cluster_id {id} NOT NULL,
  topic_id {id} NOT NULL,
  topic {name} NOT NULL,
  part INTEGER NOT NULL,
  next_offset BIGINT NOT NULL,
  owner_epoch BIGINT NOT NULL,
  owner {text} NOT NULL,
  applied BIGINT NOT NULL,
  PRIMARY KEY (sink, cluster_id, topic_id, part)
){table};

-- Records that could not be applied (`error_class` says why), and the later ones of their keys, which wait behind
-- them (`error_class` is NULL). Times are milliseconds since 1970 in UTC; `headers` is JSON with base64 values.
CREATE TABLE IF NOT EXISTS semel_parked (
  sink {name} NOT NULL,
  cluster_id {id} NOT NULL,
  topic_id {id} NOT NULL,
  topic {name} NOT NULL,
  part INTEGER NOT NULL,
  record_offset BIGINT NOT NULL,
  record_timestamp BIGINT NOT NULL,
  record_key {bytes},
  record_value {bytes},
  headers {text} NOT NULL,
  error_class {text},
  error_message {text},
  error_frames {text},
  error_group {text},
  error_build {text},
  parked_at BIGINT NOT NULL,
  PRIMARY KEY (sink, cluster_id, topic_id, part, record_offset)
){table};

-- What operators asked for about parked records, and what came of it (`outcome`, JSON). Only the owner of the
-- partition carries a command out; rows stay, as the audit of it.
CREATE TABLE IF NOT EXISTS semel_park_command (
  id {id} NOT NULL,
  sink {name} NOT NULL,
  cluster_id {id} NOT NULL,
  topic_id {id} NOT NULL,
  part INTEGER NOT NULL,
  verb {name} NOT NULL,
  record_offsets {text} NOT NULL,
  record_value {bytes},
  requested_by {text} NOT NULL,
  reason {text} NOT NULL,
  requested_at BIGINT NOT NULL,
  least_build {text} NOT NULL,
  outcome {text},
  finished_at BIGINT,
  PRIMARY KEY (id, sink, cluster_id, topic_id, part)
){table};

-- The ids of messages that sinks with dedup=Inbox(...) applied, and where each was read. `day` counts from 1970 in UTC
-- and is a part of the message: copies of it meet there. What a sink's floor has passed is dropped, days at a time.
CREATE TABLE IF NOT EXISTS semel_inbox (
  sink {name} NOT NULL,
  day INTEGER NOT NULL,
  msg_id {name} NOT NULL,
  part INTEGER NOT NULL,
  record_offset BIGINT NOT NULL,
  PRIMARY KEY (sink, day, msg_id)
){table}{by_day};

-- Ids of messages from before `floor_ms` (milliseconds since 1970 in UTC) are not kept. It only rises.
CREATE TABLE IF NOT EXISTS semel_inbox_floor (
  sink {name} NOT NULL,
  floor_ms BIGINT NOT NULL,
  window_days INTEGER NOT NULL,
  PRIMARY KEY (sink)
){table};

-- The highest version that was applied of each key, for sinks with dedup=Version(...). A key that is too long for an
-- index stands there as a digest.
CREATE TABLE IF NOT EXISTS semel_version (
  sink {name} NOT NULL,
  record_key {short_bytes} NOT NULL,
  version BIGINT NOT NULL,
  PRIMARY KEY (sink, record_key)
){table};
"""
_AUDIT = """\

-- What each call of a sink's handler was given, while a history is written (docs/proof.md). No unique constraint: it
-- would hide what this table is to show.
CREATE TABLE IF NOT EXISTS semel_audit (
  seq {serial},
  sink {name} NOT NULL,
  topic {name} NOT NULL,
  part INTEGER NOT NULL,
  owner_epoch BIGINT NOT NULL,
  attempt {name} NOT NULL,
  offsets {text} NOT NULL
){table};
"""
_NAMES = ("semel_position", "semel_parked", "semel_park_command")


def schema_sql(title: str, *, audit: bool = False) -> str:
    """The SQL that makes Semel's tables in the database of this title; it may run again."""
    return (_TABLES + _AUDIT if audit else _TABLES).format_map(asdict(dialect_of(title)))


def migrate(url: str, *, schema: str | None = None, print_only: bool = False, audit: bool = False) -> str:
    """Make Semel's tables, and then the app's own `schema`, in one transaction where the database can. Returns the SQL.

    With `audit` it makes the audit ledger too; with `print_only` nothing is connected to. Raises `ConfigurationError`
    for a URL that cannot work and for SQL that the database refuses; the driver's own error when the database cannot
    be reached.
    """
    tables = schema_sql(title_of(url), audit=audit)
    sql = "\n".join(part.strip() + "\n" for part in (tables, schema) if part and part.strip())
    if print_only:
        return sql
    database = open_database(url)
    try:
        database.connect()
        migrate_connected(database, sql)
    finally:
        database.close()
    return sql


def migrate_connected(database: Database, sql: str) -> None:
    """Run `sql` as a migration; what the database refuses is a `ConfigurationError`."""
    try:
        database.migrate(sql)
    except Exception as error:
        if database.driver_cause(error) is not Cause.DATA:
            raise
        raise ConfigurationError(f"{without_password(database.url)} refused the schema: {error}") from error


def check_tables(database: Database, *, audit: bool = False, more: Sequence[str] = ()) -> None:
    """Raise `ConfigurationError` when Semel's tables, and `more` of them, are missing; it says how to make them."""
    for name in (*_NAMES, *more, *(("semel_audit",) if audit else ())):
        try:
            database.query(f"SELECT 1 FROM {name} LIMIT 0")  # noqa: S608 - our own names
        except Exception as error:
            if not is_missing_table(error):
                raise
            raise ConfigurationError(
                f"table {name} is not in {without_password(database.url)}. Make it with: "
                f"semel migrate {without_password(database.url)} (with --sql it only prints what it would do)."
            ) from error
