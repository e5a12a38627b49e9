"""The tables of the outbox in a user's database: making them, and refusing ones that cannot be worked with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal, NamedTuple

from semel.databases.database import Database, without_password
from semel.databases.dialects import dialect_of
from semel.databases.tables import Need, check_needs, refused
from semel.errors import ConfigurationError
from semel.outbox.rows import LANES

__all__ = ["SCHEMA_VERSION", "OutboxMeta", "check_outbox", "claim_environment", "read_meta", "schema_sql"]

SCHEMA_VERSION = 1

_TABLES = """\
-- Records that a transaction sent and that are not in Kafka yet. Rows are inserted by writers and deleted by the relay,
-- never changed, except `held`: why a row is not published now. `headers` is JSON with base64 values.
CREATE TABLE IF NOT EXISTS semel_outbox (
  shard SMALLINT NOT NULL,
  seq {serial},
  msg_id {id} NOT NULL,
  topic {name} NOT NULL,
  record_key {bytes},
  record_value {bytes},
  headers {text} NOT NULL,
  created_at BIGINT NOT NULL,
  held {text}{primary}
){table}{rows_kept};
{index}
-- Which relay publishes a lane (shard * lanes / 64). `owner_epoch` is raised by each new one; `batch` is the last batch
-- whose rows were deleted, and `positions` says how far the topics were written to then (JSON). `seen` counts reads, on
-- databases that show commits before they are on the disk.
CREATE TABLE IF NOT EXISTS semel_outbox_lane (
  lane SMALLINT NOT NULL PRIMARY KEY,
  owner {text},
  owner_epoch BIGINT NOT NULL,
  batch BIGINT NOT NULL,
  positions {text},
  seen BIGINT NOT NULL DEFAULT 0
){table}{lanes_kept};

-- Whose outbox this is. `incarnation` changes when the database is declared restored, `origin` is the server it was
-- last seen on, `database_id` never changes.
CREATE TABLE IF NOT EXISTS semel_outbox_meta (
  only_row SMALLINT NOT NULL PRIMARY KEY CHECK (only_row = 1),
  schema_version INTEGER NOT NULL,
  database_id {id} NOT NULL,
  incarnation {id} NOT NULL,
  environment {name},
  app {name},
  lanes INTEGER NOT NULL,
  origin {name}
){table};

-- The number of the last transaction of each connection that sends records: whose COMMIT was not answered reads here
-- whether it happened. A connection that is closed takes its row with it.
CREATE TABLE IF NOT EXISTS semel_commit (
  session_id {id} NOT NULL PRIMARY KEY,
  number BIGINT NOT NULL,
  used_at BIGINT NOT NULL
){table};

-- What is held back, by an operator or because a record of the key cannot be published: rows that match are not sent.
CREATE TABLE IF NOT EXISTS semel_outbox_hold (
  hold_id {id} NOT NULL PRIMARY KEY,
  topic {name},
  record_key {bytes},
  reason {text} NOT NULL,
  requested_by {text} NOT NULL,
  requested_at BIGINT NOT NULL
){table};

-- What operators did to this outbox, and why.
CREATE TABLE IF NOT EXISTS semel_outbox_audit (
  audit_id {id} NOT NULL PRIMARY KEY,
  verb {name} NOT NULL,
  details {text} NOT NULL,
  requested_by {text} NOT NULL,
  reason {text} NOT NULL,
  requested_at BIGINT NOT NULL
){table};

INSERT INTO semel_outbox_lane (lane, owner_epoch, batch)
SELECT l.lane, 0, 0 FROM ({lanes}) AS l WHERE NOT EXISTS (SELECT 1 FROM semel_outbox_lane);

INSERT INTO semel_outbox_meta (only_row, schema_version, database_id, incarnation, lanes)
SELECT 1, {version}, {uuid}, {uuid}, {lane_count} WHERE NOT EXISTS (SELECT 1 FROM semel_outbox_meta);
"""

_OWN = {
    "SQLite": {
        "primary": "",
        "index": "CREATE INDEX IF NOT EXISTS semel_outbox_shard ON semel_outbox (shard, seq);\n",
        "uuid": "lower(hex(randomblob(16)))",
        "rows_kept": "",
        "lanes_kept": "",
    },
    "PostgreSQL": {
        "primary": ",\n  PRIMARY KEY (shard, seq)",
        "index": "",
        "uuid": "gen_random_uuid()::text",
        # Every row is deleted soon: what counts is how many are dead, not their share of a table that is mostly empty.
        "rows_kept": (
            " WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, "
            "autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, "
            "autovacuum_analyze_threshold = 50000, toast.autovacuum_vacuum_scale_factor = 0, "
            "toast.autovacuum_vacuum_threshold = 5000)"
        ),
        # The lanes' rows change with every batch and stay in their pages.
        "lanes_kept": " WITH (fillfactor=20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 999)",
    },
    "MariaDB": {
        "primary": ",\n  PRIMARY KEY (shard, seq)",
        "index": "",
        "uuid": "UUID()",
        "rows_kept": "",
        "lanes_kept": "",
    },
}
"""What these tables have of their own beside the dialect's types. A number (`serial`) must not come again: the
manifests of published rows name it."""

Role = Literal["writer", "relay"]

_WHOLE = "the outbox"
_NEEDS: dict[Role, tuple[Need, ...]] = {
    "writer": (
        Need(
            "INSERT",
            "semel_outbox",
            "INSERT INTO semel_outbox (shard, msg_id, topic, headers, created_at) "
            "SELECT 0, database_id, database_id, '[]', 0 FROM semel_outbox_meta WHERE 1 = 0",
        ),
        Need("SELECT", "semel_commit", "SELECT 1 FROM semel_commit WHERE 1 = 0"),
        Need(
            "INSERT",
            "semel_commit",
            "INSERT INTO semel_commit (session_id, number, used_at) "
            "SELECT database_id, 0, 0 FROM semel_outbox_meta WHERE 1 = 0",
        ),
        Need("UPDATE", "semel_commit", "UPDATE semel_commit SET number = number WHERE 1 = 0"),
        Need("DELETE", "semel_commit", "DELETE FROM semel_commit WHERE 1 = 0"),
    ),
    "relay": (
        Need("SELECT", "semel_outbox", "SELECT 1 FROM semel_outbox WHERE 1 = 0"),
        Need("DELETE", "semel_outbox", "DELETE FROM semel_outbox WHERE 1 = 0"),
        Need("UPDATE", "semel_outbox", "UPDATE semel_outbox SET held = held WHERE 1 = 0"),
        Need("SELECT", "semel_outbox_lane", "SELECT 1 FROM semel_outbox_lane WHERE 1 = 0"),
        Need("UPDATE", "semel_outbox_lane", "UPDATE semel_outbox_lane SET batch = batch WHERE 1 = 0"),
        Need("UPDATE", "semel_outbox_meta", "UPDATE semel_outbox_meta SET app = app WHERE 1 = 0"),
        Need("SELECT", "semel_outbox_hold", "SELECT 1 FROM semel_outbox_hold WHERE 1 = 0"),
        Need(
            "INSERT",
            "semel_outbox_hold",
            "INSERT INTO semel_outbox_hold (hold_id, reason, requested_by, requested_at) "
            "SELECT database_id, database_id, database_id, 0 FROM semel_outbox_meta WHERE 1 = 0",
        ),
        Need("UPDATE", "semel_outbox_hold", "UPDATE semel_outbox_hold SET reason = reason WHERE 1 = 0"),
    ),
}
"""What each side does to which table."""


class OutboxMeta(NamedTuple):
    """Whose outbox a database holds."""

    schema_version: int
    database_id: str
    incarnation: str
    environment: str | None
    """The Kafka cluster id; None until a relay has been at work."""
    app: str | None
    lanes: int
    origin: str | None


def schema_sql(title: str, *, lanes: int = LANES) -> str:
    """The SQL that makes the outbox in the database of this title; it may run again."""
    numbers = " UNION ALL ".join(f"SELECT {lane}{' AS lane' if lane == 0 else ''}" for lane in range(lanes))
    return _TABLES.format(
        version=SCHEMA_VERSION, lanes=numbers, lane_count=lanes, **asdict(dialect_of(title)), **_OWN[title]
    )


def read_meta(database: Database) -> OutboxMeta:
    """Whose outbox it is. Raises `ConfigurationError` where there is none, or one of another version of Semel."""
    where = without_password(database.url)
    with refused(database, "SELECT", "semel_outbox_meta", _WHOLE):
        rows = database.query(
            "SELECT schema_version, database_id, incarnation, environment, app, lanes, origin FROM semel_outbox_meta"
        )
    if not rows:
        raise ConfigurationError(
            f"table semel_outbox_meta in {where} is empty, so nobody knows whose outbox this is. Run the migration "
            "again: it writes the row."
        )
    meta = OutboxMeta(*rows[0])
    if meta.schema_version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"the outbox in {where} has schema version {meta.schema_version}, and this version of Semel works with "
            f"{SCHEMA_VERSION}. "
            + (
                "Use the newer Semel that made it."
                if meta.schema_version > SCHEMA_VERSION
                else "Let the relay empty it with the version that made it, drop its tables, and run the migration."
            )
        )
    return meta


def check_outbox(database: Database, role: Role, app: str, environment: str | None = None) -> OutboxMeta:
    """The outbox of `app`, looked at and not changed.

    `environment` is the Kafka cluster id, or None where it is not known. Raises `ConfigurationError` when a table is
    missing, was made for another version of Semel, belongs to another app or Kafka cluster, or when a right is missing.
    """
    meta = read_meta(database)
    database.check_durable()
    where = without_password(database.url)
    if meta.app not in (None, app):
        raise ConfigurationError(
            f"the outbox in {where} belongs to app {meta.app!r}, and this is app {app!r}: its relay would publish the "
            "other's rows. Give each app a database (or schema) of its own."
        )
    if environment is not None and meta.environment not in (None, environment):
        raise ConfigurationError(
            f"the outbox in {where} belongs to the Kafka cluster {meta.environment!r}, and this process is connected "
            f"to {environment!r}. If this database is a copy for another environment, empty semel_outbox and set "
            "environment in semel_outbox_meta to NULL; if the cluster was replaced on purpose, set it to the new one."
        )
    check_needs(database, _NEEDS[role], _WHOLE)
    return meta


def claim_environment(database: Database, app: str, environment: str) -> OutboxMeta:
    """Write app and Kafka cluster into an outbox that has none yet; then as `check_outbox` of a relay."""
    check_outbox(database, "relay", app, environment)
    database.execute(
        "UPDATE semel_outbox_meta SET app = ?, environment = ? "
        "WHERE (app IS NULL OR app = ?) AND (environment IS NULL OR environment = ?)",
        (app, environment, app, environment),
    )
    return check_outbox(database, "relay", app, environment)
