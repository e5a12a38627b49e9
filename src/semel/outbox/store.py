"""The relay's half of the database: lanes, rows, holds. Blocking; one thread at a time. Errors are the driver's own."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from semel.databases.database import Cause, Database, is_missing_privilege, is_missing_table
from semel.failpoints import failpoint
from semel.outbox.lane import LaneRow
from semel.outbox.limits import (
    COUNT_ROWS,
    READ_BYTES,
    SMALL_BYTES,
    TIDY_BYTES,
    TIDY_KEPT_BYTES,
    TIDY_LANE_BYTES,
    TIDY_ROWS,
    TIDY_WAIT_MS,
)
from semel.outbox.manifest import RowId
from semel.outbox.rows import OutboxRow, lane_of
from semel.outbox.statements import Statement, delete_rows, delete_rows_at, hold_rows, read_rows, rows_in
from semel.outbox.tables import OutboxMeta, claim_environment, read_meta, schema_sql

log = logging.getLogger("semel.outbox")

__all__ = ["Depth", "Reading", "Settlement", "Store"]

_PLANNER = (
    "SELECT set_config('plan_cache_mode', 'force_custom_plan', false), set_config(name, 'off', false) FROM "
    "unnest(ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_hashjoin', 'enable_mergejoin', 'enable_sort']) AS name"
)
"""The table is empty or full from one moment to the next, and its statistics are always of another moment: by them
PostgreSQL sorts a whole backlog to give its first rows. The index is in the right order. And a list of thousands of
numbers is looked into by hash only where the planner knows it, not in a plan that was made once for all lists."""
IDS_PAGE = 10_000
"""Ids of one SELECT while a restored table is compared."""


class Reading(NamedTuple):
    """What one SELECT gave."""

    rows: list[OutboxRow]
    ruled: list[OutboxRow]
    """Rows that somebody holds back, and that are not marked yet."""
    last: int
    """The shard of the last of all these; 0 when there are none."""
    is_full: bool
    """Whether there may be more."""


class Settlement(NamedTuple):
    """A lane's published batches that are to be deleted, up to batch `number`."""

    lane: int
    owner_epoch: int
    number: int
    rows: list[RowId]
    positions: str | None
    """Where the topics were written to; None leaves what is there."""
    addresses: Sequence[str] = ()
    """Where the database had each of the rows when they were read, if it told."""


class Depth(NamedTuple):
    """What is in the outbox."""

    rows: int
    held: int
    oldest_ms: int | None
    """When the oldest row that is not held was written, in milliseconds since 1970."""


class Store:
    """One connection of the relay."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.statements = 0
        """How many were run, for the benches: a transaction's BEGIN and COMMIT count."""
        self._may_not_tidy = False
        self.meta: OutboxMeta

    def __repr__(self) -> str:
        return f"<Store {self.database!r}>"

    def open(self, app: str, environment: str, *, create_tables: bool = False) -> OutboxMeta:
        """Connect, and see that this outbox is ours. Raises `ConfigurationError` when it is not.

        A server that is another one than last time, or has another history, is a restored database: the outbox gets
        a new incarnation, and each lane is compared with its topics by whoever takes it over.
        """
        self.database.connect()
        self.database.binary = True
        if self.database.title == "PostgreSQL":
            self.database.query(_PLANNER)
        if create_tables:
            self._create()
        claim_environment(self.database, app, environment)
        origin = self.database.origin()
        if origin is not None:
            self.database.begin()
            try:
                self._run("UPDATE semel_outbox_meta SET origin = ? WHERE origin IS NULL", (origin,))
                self._run(
                    "UPDATE semel_outbox_meta SET incarnation = ?, origin = ? WHERE origin <> ?",
                    (self.database.new_id(), origin, origin),
                )
                self.database.commit()
            finally:
                self.database.rollback()
        self.meta = read_meta(self.database)
        return self.meta

    def _create(self) -> None:
        try:
            self.database.query("SELECT 1 FROM semel_outbox_meta LIMIT 0")
        except Exception as error:
            if not is_missing_table(error):
                raise
            self.database.migrate(schema_sql(self.database.title))

    def close(self) -> None:
        """Close the connection."""
        self.database.close()

    # --- Lanes ---

    def acquire(self, lanes: Sequence[int], owner: str) -> dict[int, LaneRow]:
        """Raise the lanes' owner epochs; how they stand now. Who owned them until now can delete and note nothing."""
        where, numbers = rows_in(self.database.title, "lane", lanes)
        self.database.begin()
        try:
            self._run(
                f"UPDATE semel_outbox_lane SET owner = ?, owner_epoch = owner_epoch + 1 WHERE {where}",  # noqa: S608
                (owner, *numbers),
            )
            self.meta = read_meta(self.database)
            rows = self.database.query(
                f"SELECT lane, owner_epoch, batch, positions FROM semel_outbox_lane WHERE {where}",  # noqa: S608
                numbers,
            )
            failpoint("outbox.before_owner_commit")
            self.database.commit()
        finally:
            self.database.rollback()
        self.statements += 4
        return {row[0]: LaneRow(*row) for row in rows}

    def settle(self, settlements: Sequence[Settlement]) -> list[int]:
        """Delete what was published, in one transaction; lanes of which somebody else is the owner now.

        Rows of such a lane are deleted too: they are in a committed manifest of ours.
        """
        rows = [row for settlement in settlements for row in settlement.rows]
        addresses = [address for settlement in settlements for address in settlement.addresses]
        self.database.begin()
        try:
            lost = [item.lane for item in settlements if not self._note(item)]
            failpoint("outbox.before_delete")
            self._delete(rows, addresses)
            failpoint("outbox.before_delete_commit")
            self.database.commit()
        finally:
            self.database.rollback()
        self.statements += 2
        return lost

    def _note(self, item: Settlement) -> bool:
        where = "WHERE lane = ? AND owner_epoch = ?"
        if item.positions is None:
            sql = f"UPDATE semel_outbox_lane SET batch = ? {where}"  # noqa: S608
            return self._run(sql, (item.number, item.lane, item.owner_epoch)) == 1
        sql = f"UPDATE semel_outbox_lane SET batch = ?, positions = ? {where}"  # noqa: S608
        return self._run(sql, (item.number, item.positions, item.lane, item.owner_epoch)) == 1

    def _delete(self, rows: Sequence[RowId], addresses: Sequence[str]) -> None:
        at = delete_rows_at(addresses, rows) if len(addresses) == len(rows) else None
        if rows and (at is None or self._run(*at) != len(rows)):
            # Nobody knows where they are, or some of them were moved, or are gone already.
            self._run_all(delete_rows(self.database.title, rows))

    # --- Rows ---

    def read(self, shards: Sequence[int], without: Collection[int], limit: int) -> Reading:
        """The next rows of these shards, in order: at most `limit`, and `READ_BYTES` but for the last.

        Small rows are read quickly, up to the first that is not.
        """
        rows = self._rows(shards, without, limit, is_small=True)
        is_full = len(rows) == limit
        large = next((index for index, row in enumerate(rows) if row.size > SMALL_BYTES), None)
        if large:
            rows, is_full = rows[:large], True
        elif large is not None:
            rows = self._rows(shards, without, limit, is_small=False)
            is_full = len(rows) == limit or sum([row.size for row in rows]) >= READ_BYTES
        if not rows:
            return Reading([], [], 0, is_full=False)
        if self.database.shows_commits_early:
            # Kafka is told of these rows soon, and a crash of the database must not take them back after that.
            lane = lane_of(rows[0].shard, self.meta.lanes)
            self._run("UPDATE semel_outbox_lane SET seen = seen + 1 WHERE lane = ?", (lane,))
        last = rows[-1].shard
        ruled = [row for row in rows if row.is_ruled]
        if ruled:
            rows = [row for row in rows if not row.is_ruled]
        return Reading(rows, ruled, last, is_full)

    def _rows(self, shards: Sequence[int], without: Collection[int], limit: int, *, is_small: bool) -> list[OutboxRow]:
        self.statements += 1
        statement = read_rows(self.database.title, shards, without, limit, is_small=is_small)
        return list(map(OutboxRow._make, self.database.query(*statement)))

    def ids(self, shards: Sequence[int]) -> list[RowId]:
        """Every row of these shards, held ones too."""
        found: list[RowId] = []
        where, numbers = rows_in(self.database.title, "shard", shards)
        after = 0
        while True:
            page = self.database.query(
                f"SELECT shard, seq, msg_id FROM semel_outbox WHERE {where} AND seq > ? ORDER BY seq LIMIT ?",  # noqa: S608
                (*numbers, after, IDS_PAGE),
            )
            found += [RowId(*row) for row in page]
            if len(page) < IDS_PAGE:
                return found
            after = page[-1][1]

    def topics(self, shards: Sequence[int]) -> list[str]:
        """The topics of the rows of these shards."""
        where, numbers = rows_in(self.database.title, "shard", shards)
        sql = f"SELECT DISTINCT topic FROM semel_outbox WHERE {where} ORDER BY topic"  # noqa: S608
        return [row[0] for row in self.database.query(sql, numbers)]

    # --- What is held ---

    def hold(self, row: OutboxRow, reason: str, now_ms: int, *, whole_topic: bool = False) -> None:
        """Hold a row that cannot be published, and with it the later ones of its key (of its topic, if that is at
        fault). A row without a key is held alone: no order was promised for it."""
        self.database.begin()
        try:
            if whole_topic or row.key is not None:
                self._run(
                    "INSERT INTO semel_outbox_hold (hold_id, topic, record_key, reason, requested_by, requested_at) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (self.database.new_id(), row.topic, None if whole_topic else row.key, reason, "relay", now_ms),
                )
            self._run_all(hold_rows(self.database.title, [RowId(row.shard, row.seq, row.msg_id)], reason))
            failpoint("outbox.before_hold_commit")
            self.database.commit()
        finally:
            self.database.rollback()

    def mark(self, rows: Sequence[OutboxRow]) -> None:
        """Mark rows that wait behind a hold, as far as the hold is still there."""
        self.database.begin()
        try:
            rules = self.database.query(
                f"SELECT topic, record_key, reason FROM semel_outbox_hold{self.database.lock_rows}"  # noqa: S608
            )
            by_reason: dict[str, list[RowId]] = {}
            for row in rows:
                for topic, key, reason in rules:
                    if topic in (None, row.topic) and (key is None or (row.key is not None and bytes(key) == row.key)):
                        by_reason.setdefault(reason, []).append(RowId(row.shard, row.seq, row.msg_id))
                        break
            for reason, ids in by_reason.items():
                self._run_all(hold_rows(self.database.title, ids, reason))
            self.database.commit()
        finally:
            self.database.rollback()

    # --- Looking after it ---

    def depth(self) -> Depth:
        """How many rows there are, counted up to `COUNT_ROWS`, and how old the oldest of them is."""
        [(rows, held, oldest)] = self.database.query(
            "SELECT COUNT(*), COUNT(held), MIN(CASE WHEN held IS NULL THEN created_at END) "
            "FROM (SELECT held, created_at FROM semel_outbox LIMIT ?) r",
            (COUNT_ROWS,),
        )
        return Depth(rows, held, oldest)

    def tidy(self) -> None:
        """PostgreSQL: make large tables small again in which nearly every row is dead.

        Vacuum cannot while any old transaction is open somewhere, and every SELECT has to step over the dead rows. The
        rows that are left are put into a truncated table, under a lock: then nobody has a row in it that is not
        committed. Writers wait meanwhile, so it is not waited for long, and few rows are moved.
        """
        if self.database.title != "PostgreSQL" or self._may_not_tidy:
            return
        row = "COALESCE(LENGTH(record_value), 0) + COALESCE(LENGTH(record_key), 0) + LENGTH(headers)"
        for table, bytes_max, kept in (("semel_outbox", TIDY_BYTES, row), ("semel_outbox_lane", TIDY_LANE_BYTES, "0")):
            [(size,)] = self.database.query("SELECT pg_relation_size(?::regclass)", (table,))
            if size > bytes_max:
                self._tidy(table, size, kept)

    def _tidy(self, table: str, size: int, of_row: str) -> None:
        self.database.begin()
        try:
            self.database.query("SELECT set_config('lock_timeout', ?, true)", (f"{TIDY_WAIT_MS}ms",))
            self.database.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            [(count, kept)] = self.database.query(
                f"SELECT COUNT(*), COALESCE(SUM({of_row}), 0) FROM (SELECT * FROM {table} LIMIT ?) r",  # noqa: S608
                (TIDY_ROWS + 1,),
            )
            if count > TIDY_ROWS or kept > TIDY_KEPT_BYTES:
                return
            self.database.execute(f"CREATE TEMPORARY TABLE semel_kept ON COMMIT DROP AS SELECT * FROM {table}")  # noqa: S608
            self.database.execute(f"TRUNCATE {table}")
            failpoint("outbox.after_truncate")
            self.database.execute(f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM semel_kept")  # noqa: S608
            self.database.commit()
            log.info("%s had %d bytes and %d rows, and was made small", table, size, count)
        except Exception as error:
            if is_missing_privilege(error):
                self._may_not_tidy = True
                log.warning("%s grows while old transactions are open: %s", table, " ".join(str(error).split()))
            elif self.database.driver_cause(error) is not Cause.LOCKED:
                raise
        finally:
            self.database.rollback()

    # --- Statements ---

    def _run(self, sql: str, parameters: Sequence[object]) -> int:
        self.statements += 1
        return self.database.execute(sql, parameters)

    def _run_all(self, statements: Iterable[Statement]) -> None:
        for sql, parameters in statements:
            self._run(sql, parameters)
