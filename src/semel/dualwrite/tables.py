"""The tables of the dual write in a user's database: making them, and refusing ones that cannot be worked with."""

from __future__ import annotations

from typing import NamedTuple

from semel.databases.database import Database, without_password
from semel.databases.dialects import dialect_of
from semel.databases.tables import Need, check_needs, refused
from semel.errors import ConfigurationError

__all__ = ["SCHEMA_VERSION", "TxnMeta", "check_tables", "claim_environment", "read_meta", "schema_sql"]

SCHEMA_VERSION = 2

_TABLES = """\
-- The dual write: a row for each slot, which is a transactional id of Kafka. `owner_epoch` is the fence, raised when a
-- slot changes hands; `prepared` names the Kafka transaction that was committed here last, with the business rows.
-- `looks` counts who looked whether a COMMIT happened. Nothing but Semel changes these rows, and none may be deleted:
-- Kafka may hold a transaction that only its row can decide.
CREATE TABLE IF NOT EXISTS semel_txn (
  slot {name} NOT NULL PRIMARY KEY,
  owner_epoch BIGINT NOT NULL,
  owner {text} NOT NULL,
  prepared {id} NOT NULL,
  resolved_epoch BIGINT NOT NULL DEFAULT -1,
  looks BIGINT NOT NULL DEFAULT 0
){options};

-- Each slot's sign of life, which changes while the owner lives. It has a row of its own: a change of the slot's row
-- would end a transaction under REPEATABLE READ that is open at that time, and has to change it in the end.
CREATE TABLE IF NOT EXISTS semel_txn_beat (
  slot {name} NOT NULL PRIMARY KEY,
  owner {text} NOT NULL,
  beat BIGINT NOT NULL
){options};

-- Whose slots these are, how many were ever made, and which way records go where there is an outbox, too.
CREATE TABLE IF NOT EXISTS semel_txn_meta (
  only_row SMALLINT NOT NULL PRIMARY KEY CHECK (only_row = 1),
  schema_version INTEGER NOT NULL,
  environment {name},
  app {name},
  slots BIGINT NOT NULL,
  plan {name}
){meta_options};

INSERT INTO semel_txn_meta (only_row, schema_version, slots)
SELECT 1, {version}, 0 WHERE NOT EXISTS (SELECT 1 FROM semel_txn_meta);
"""
_ROWS_CHANGE_IN_PLACE = {
    # Few rows, each changed by every transaction of its slot: they stay in their pages, and dead versions go soon.
    "PostgreSQL": " WITH (fillfactor=20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 999)"
}

_WHOLE = "the tables of the dual write"
_NEEDS = (
    Need("INSERT", "semel_txn", "INSERT INTO semel_txn SELECT * FROM semel_txn WHERE 1 = 0"),
    Need("UPDATE", "semel_txn", "UPDATE semel_txn SET looks = looks WHERE 1 = 0"),
    Need("INSERT", "semel_txn_beat", "INSERT INTO semel_txn_beat SELECT * FROM semel_txn_beat WHERE 1 = 0"),
    Need("UPDATE", "semel_txn_beat", "UPDATE semel_txn_beat SET beat = beat WHERE 1 = 0"),
    Need("UPDATE", "semel_txn_meta", "UPDATE semel_txn_meta SET slots = slots WHERE 1 = 0"),
)


class TxnMeta(NamedTuple):
    """The row of `semel_txn_meta`: `environment` is the Kafka cluster's id. Both are None until the first claim."""

    schema_version: int
    environment: str | None
    app: str | None
    slots: int


def schema_sql(title: str) -> str:
    """The migration for a database of this kind (`Database.title`); it may run again."""
    dialect = dialect_of(title)
    return _TABLES.format(
        version=SCHEMA_VERSION,
        name=dialect.name,
        text=dialect.text,
        id=dialect.id,
        options=_ROWS_CHANGE_IN_PLACE.get(title, dialect.table),
        meta_options=dialect.table,
    )


def read_meta(database: Database) -> TxnMeta:
    """Whose slots they are. Raises `ConfigurationError` where there are none, or those of another version of Semel."""
    where = without_password(database.url)
    with refused(database, "SELECT", "semel_txn", _WHOLE):
        rows = database.query("SELECT schema_version, environment, app, slots FROM semel_txn_meta")
        database.query("SELECT slot FROM semel_txn WHERE 1 = 0")
    if not rows:
        raise ConfigurationError(
            f"table semel_txn_meta in {where} is empty, so nobody knows whose transactions these are. Run the "
            "migration again: it writes the row."
        )
    meta = TxnMeta(*rows[0])
    if meta.schema_version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"the tables of the dual write in {where} have schema version {meta.schema_version}, and this version of "
            f"Semel works with {SCHEMA_VERSION}. "
            + (
                "Use the newer Semel that made them."
                if meta.schema_version > SCHEMA_VERSION
                else "Start and stop the app once with the version that made them, so that nothing is in doubt; then "
                "drop them, and run the migration."
            )
        )
    return meta


def check_tables(database: Database, app: str, environment: str | None = None) -> TxnMeta:
    """The slots of `app`, looked at and not changed.

    `environment` is the Kafka cluster id, or None where it is not known. Raises `ConfigurationError` when a table is
    missing, was made for another version of Semel, belongs to another app or Kafka cluster, or when a right is missing.
    """
    meta = read_meta(database)
    where = without_password(database.url)
    if meta.app not in (None, app):
        raise ConfigurationError(
            f"the dual write in {where} belongs to app {meta.app!r}, and this is app {app!r}. Give each app a database "
            "(or schema) of its own."
        )
    if environment is not None and meta.environment not in (None, environment):
        raise ConfigurationError(
            f"the dual write in {where} belongs to the Kafka cluster {meta.environment!r}, and this process is "
            f"connected to {environment!r}, which would decide about transactions of the other. If this database is a "
            "copy for another environment, empty semel_txn and set environment in semel_txn_meta to NULL; if the "
            "cluster was replaced on purpose, set it to the new one."
        )
    check_needs(database, _NEEDS, _WHOLE)
    return meta


def claim_environment(database: Database, app: str, environment: str) -> TxnMeta:
    """Write app and Kafka cluster where there are none yet; then as `check_tables`."""
    meta = check_tables(database, app, environment)
    if meta.app is not None and meta.environment is not None:
        return meta
    database.execute(
        "UPDATE semel_txn_meta SET app = ?, environment = ? "
        "WHERE (app IS NULL OR app = ?) AND (environment IS NULL OR environment = ?)",
        (app, environment, app, environment),
    )
    return check_tables(database, app, environment)
