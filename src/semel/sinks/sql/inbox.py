"""The inbox: ids of messages that were applied, in the transaction of their effects, and dropped by whole days.

A day is a property of the message, so its copies meet in one day's rows however late they come, and a day can be
dropped without a look at anything else. Below the floor nothing is known. The floor is a row that only rises, in the
database: clocks decide when it rises, and so how much is parked, but never that something is applied twice.

Floor and drop need no lock against the sinks: a transaction inserts its ids and only then reads the floor. A day that
is being dropped waits for transactions that wrote into it (PostgreSQL's ACCESS EXCLUSIVE, SQLite's one writer), and the
floor was raised and committed before; who inserted late sees the higher floor and rolls back.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

from semel.databases.database import Cause, Database
from semel.databases.dialects import dialect_of
from semel.errors import ConfigurationError
from semel.failpoints import failpoint
from semel.processing.topics import DataError
from semel.sinks.dedup import DAY_MS, FUTURE_DAYS, Inbox, MessageId, Unprovable, message_id
from semel.sinks.sql.dedup import ROWS_AT_ONCE, Conflict
from semel.types import Record

__all__ = ["InboxGuard"]

log = logging.getLogger("semel.sinks")

DELETES_AT_ONCE = 1_000
"""Rows of one DELETE where days are not partitions: its transaction stays short, and others get their turn."""
DELETES_IN_A_ROW = 20
"""Such transactions before one of the sink's: expiry may fall behind for a while, the sink does not."""

_COLUMNS = ("sink", "day", "msg_id", "part", "record_offset")
_PARTITION = re.compile(r"semel_inbox_(\d+)")
_PARTITIONS = """
SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'semel_inbox'::regclass
"""


class _Mark(NamedTuple):
    id: MessageId
    part: int
    offset: int


class InboxGuard:
    """`semel.sinks.sql.dedup.Guard` for `Inbox`. `wall_ms` says which day it is; see above for what hangs on it."""

    tables: ClassVar[tuple[str, ...]] = ("semel_inbox", "semel_inbox_floor")

    def __init__(self, inbox: Inbox, sink: str, wall_ms: Callable[[], int]) -> None:
        self._inbox = inbox
        self._sink = sink
        self._wall_ms = wall_ms
        self._floor_ms = 0
        """As we last read it: it may be higher by now."""
        self._days: set[int] = set()
        """Days that have their partition."""
        self._wanted: set[int] = set()
        self._expired = 0
        """The day on which everything was dropped that is past its window."""

    def open(self, database: Database) -> None:
        """The sink's floor. Raises `ConfigurationError` where the sink has a past that nobody noted down."""
        database.begin()
        try:
            floor_ms = max(0, (self._today() - self._inbox.window_days) * DAY_MS)
            since = self._inbox.since
            if since is not None:
                floor_ms = max(floor_ms, int(since.timestamp() * 1000))
            sql = database.insert_if_absent("semel_inbox_floor", ("sink", "floor_ms", "window_days"))
            if database.execute(sql, (self._sink, floor_ms, self._inbox.window_days)) and since is None:
                self._refuse_a_past(database)
            database.execute(
                "UPDATE semel_inbox_floor SET window_days = ? WHERE sink = ? AND window_days <> ?",
                (self._inbox.window_days, self._sink, self._inbox.window_days),
            )
            self._read_floor(database)
            database.commit()
        finally:
            database.rollback()
        self.forget()

    def _refuse_a_past(self, database: Database) -> None:
        sql = "SELECT SUM(applied) FROM semel_position WHERE sink = ?"
        [(applied,)] = database.query(sql, (self._sink,))
        if applied:
            raise ConfigurationError(
                f"{self._sink} has applied {applied} records without an inbox, and nobody knows their ids: copies of "
                "them would be applied again. Say from when on ids are known, Inbox(since=datetime(...)): messages "
                "from before are parked. Or give the sink a new name, which starts anew."
            )

    def forget(self) -> None:
        """Look again which days there are; what was restored may lack some."""
        self._days.clear()

    def _today(self) -> int:
        return self._wall_ms() // DAY_MS

    def mark(self, record: Record, view: Any) -> _Mark:
        """The id of a record's message. Raises `DataError`, and `Unprovable` for one from before the floor."""
        found = message_id(self._inbox, view)
        if found.at_ms < self._floor_ms:
            raise Unprovable(
                f"message {found.text} is from {_text(found.at_ms)}, and ids are known from {_text(self._floor_ms)} "
                "on: nobody can say whether it was applied. If it was not, semel park retry --assume-not-processed "
                "applies it; if it was, semel park discard."
            )
        if found.day > self._today() + FUTURE_DAYS:
            raise DataError(
                f"message {found.text} is from {_text(found.at_ms)}, which is to come: a clock is wrong, the "
                "producer's or this machine's."
            )
        self._wanted.add(found.day)
        return _Mark(found, record.partition, record.offset)

    def admit(self, database: Database, marks: Sequence[_Mark]) -> list[bool]:
        """Insert the ids; those that were there already are copies. Then see that the floor has not passed them."""
        self._wanted.update(mark.id.day for mark in marks)
        if _has_partitions(database) and not self._wanted <= self._days:
            raise Conflict(f"{self._sink}: a day of ids has no partition yet")
        new: set[tuple[int, str]] = set()
        rows = sorted({(mark.id.day, mark.id.text): mark for mark in reversed(marks)}.items())
        for start in range(0, len(rows), ROWS_AT_ONCE):
            new |= self._insert(database, [mark for _, mark in rows[start : start + ROWS_AT_ONCE]])
        failpoint("sink.inbox_written")
        self._read_floor(database)
        if any(mark.id.at_ms < self._floor_ms for mark in marks):
            raise Conflict(f"{self._sink}: the window of its inbox moved on meanwhile")
        news = []
        for mark in marks:
            key = mark.id.day, mark.id.text
            news.append(key in new)
            new.discard(key)  # A copy in the same batch is one too.
        return news

    def _insert(self, database: Database, marks: Sequence[_Mark]) -> set[tuple[int, str]]:
        sql = database.insert_if_absent("semel_inbox", _COLUMNS, len(marks), returning="day, msg_id")
        values = [value for mark in marks for value in (self._sink, mark.id.day, mark.id.text, mark.part, mark.offset)]
        try:
            return {(day, text) for day, text in database.query(sql, values)}
        except Exception as error:
            if database.driver_cause(error) is not Cause.DATA:
                raise
            # These values fit the table, so it is a day that was dropped, or a database that was restored.
            self.forget()
            raise Conflict(f"{self._sink}: its ids could not be written: {error}") from error

    def _read_floor(self, database: Database) -> None:
        rows = database.query("SELECT floor_ms FROM semel_inbox_floor WHERE sink = ?", (self._sink,))
        if not rows:
            raise Conflict(f"the row of {self._sink} in semel_inbox_floor is gone; start the worker again to make it")
        self._floor_ms = rows[0][0]

    # --- Days come and go ---

    def prepare(self, database: Database) -> None:
        """Make the partitions of days that ids were seen of, and once a day drop what is past its window."""
        if _has_partitions(database):
            days = sorted(self._wanted - self._days)
            if days:
                database.migrate("".join(map(_partition_sql, days)))
                self._days.update(days)
        self._wanted.clear()
        today = self._today()
        if today > self._expired and self._expire(database, today):
            self._expired = today

    def _expire(self, database: Database, today: int) -> bool:
        """Raise the floor of every sink of this database to the beginning of its window, COMMIT, then drop what is
        below; whether all of it is dropped. A sink that nobody runs any more does not hold its days back for ever."""
        database.begin()
        try:
            windows = database.query("SELECT sink, window_days FROM semel_inbox_floor ORDER BY sink")
            floors = [((today - window_days) * DAY_MS, sink) for sink, window_days in windows]
            sql = "UPDATE semel_inbox_floor SET floor_ms = ? WHERE sink = ? AND floor_ms < ?"
            database.executemany(sql, [(floor_ms, sink, floor_ms) for floor_ms, sink in floors])
            database.commit()
        finally:
            database.rollback()
        failpoint("sink.inbox_floor_raised")
        if _has_partitions(database):
            self._drop(database, min(floor_ms for floor_ms, _ in floors) // DAY_MS)
            return True
        left = DELETES_IN_A_ROW
        for floor_ms, sink in floors:
            while count := _delete(database, sink, floor_ms // DAY_MS):
                left -= 1
                if count == DELETES_AT_ONCE and left <= 0:
                    return False
        return True

    def _drop(self, database: Database, day: int) -> None:
        names = [name for (name,) in database.query(_PARTITIONS)]
        gone = {name: int(found[1]) for name in names if (found := _PARTITION.fullmatch(name)) and int(found[1]) < day}
        if gone:
            database.migrate("".join(f"DROP TABLE IF EXISTS {name};\n" for name in sorted(gone)))
            self._days.difference_update(gone.values())
            log.info("%s: dropped %d days of ids that are past every window", self._sink, len(gone))


def _has_partitions(database: Database) -> bool:
    return bool(dialect_of(database.title).by_day)


def _partition_sql(day: int) -> str:
    """The name tells the day, as a number, because that is what the table has."""
    bounds = f"FROM ({day}) TO ({day + 1})"
    return f"CREATE TABLE IF NOT EXISTS semel_inbox_{day} PARTITION OF semel_inbox FOR VALUES {bounds};\n"


def _delete(database: Database, sink: str, day: int) -> int:
    """Delete some rows of days below this one, oldest first, in one transaction; how many it were."""
    database.begin()
    try:
        rows = database.query(
            "SELECT sink, day, msg_id FROM semel_inbox WHERE sink = ? AND day < ? ORDER BY day, msg_id LIMIT ?",
            (sink, day, DELETES_AT_ONCE),
        )
        if rows:
            database.executemany("DELETE FROM semel_inbox WHERE sink = ? AND day = ? AND msg_id = ?", rows)
        database.commit()
    finally:
        database.rollback()
    return len(rows)


def _text(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return f"{ms} ms since 1970"
