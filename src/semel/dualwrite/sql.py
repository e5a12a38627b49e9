"""Slots in PostgreSQL, SQLite and MariaDB."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from semel.databases.database import Cause, Database, without_password
from semel.databases.processes import end_stopped
from semel.dualwrite.agreement import confirm
from semel.dualwrite.plan import Plan
from semel.dualwrite.store import LEAVE_RELEASED, OUT_OF_USE, Claim, Decision, SlotRow, slot_prefix
from semel.dualwrite.tables import claim_environment, read_meta, schema_sql
from semel.errors import ConfigurationError, Fatal, OutcomeUnknown, Retriable
from semel.failpoints import failpoint

__all__ = ["MARK", "SLOTS_MAX", "SqlStore", "read_decision"]

log = logging.getLogger("semel.dualwrite")

T = TypeVar("T")

SLOTS_MAX = 1_000
"""Slots of one database: as many transactions can be in doubt at once. PostgreSQL allows 100 connections by default."""
_TRIES = 5
"""How often a conflict with somebody else's transaction is tried again before it is told."""

MARK = "UPDATE semel_txn SET prepared = ? WHERE slot = ? AND owner_epoch = ? AND owner = ?"
"""The decision, and its guard: the last statement of the business transaction. It has to change one row."""


def read_decision(database: Database, slot: str) -> Decision | None:
    """The row under its lock, in a transaction of its own; None when it is gone. Raises the driver's errors.

    It writes and commits, because what is seen under a lock need not be durable: InnoDB releases locks before it has
    flushed a commit, and in SQLite a COMMIT that failed may leave frames which count after the next recovery. Our own
    commit is flushed behind the former one, and its frames are written over the latter's.
    """
    database.begin()
    try:
        database.execute("UPDATE semel_txn SET looks = looks + 1 WHERE slot = ?", (slot,))
        rows = database.query("SELECT owner, owner_epoch, prepared FROM semel_txn WHERE slot = ?", (slot,))
        database.commit()
    finally:
        database.rollback()
    return Decision(*rows[0]) if rows else None


class SqlStore:
    """One connection beside those of the sessions. See `semel.dualwrite.store.Store`."""

    def __init__(self, database: Database, app: str, name: str) -> None:
        self._database = database
        self._prefix = slot_prefix(app, name)

    def __repr__(self) -> str:
        return f"<SqlStore {self._prefix}* {self._database!r}>"

    def open(self, app: str, environment: str, *, create_tables: bool) -> None:
        def work() -> None:
            if create_tables:
                try:
                    read_meta(self._database)
                except ConfigurationError:
                    self._database.migrate(schema_sql(self._database.title))
            self._database.check_durable()
            claim_environment(self._database, app, environment)

        self._insist(work)

    def confirm(self, plan: Plan) -> None:
        """Raise `PlanChanged` when the records of this database go another way by now."""
        self._insist(lambda: confirm(self._database, plan))

    def slots(self) -> list[SlotRow]:
        def work() -> list[SlotRow]:
            beats = dict(self._database.query("SELECT slot, beat FROM semel_txn_beat"))
            rows = self._database.query("SELECT slot, owner, owner_epoch FROM semel_txn ORDER BY slot")
            return [
                SlotRow(slot, owner, epoch, beats.get(slot, 0))
                for slot, owner, epoch in rows
                if slot.startswith(self._prefix)
            ]

        return self._insist(work)

    def add(self, owner: str) -> SlotRow:
        def work() -> SlotRow:
            database = self._database
            [(number,)] = database.query(f"SELECT slots FROM semel_txn_meta{database.lock_rows}")  # noqa: S608
            if number >= SLOTS_MAX:
                raise ConfigurationError(
                    f"the dual write in {without_password(database.url)} has {number} slots, and more than {SLOTS_MAX} "
                    "are not made: as many transactions were open at once, or left in doubt. Lower connections=, and "
                    "let the processes that own them end."
                )
            row = SlotRow(f"{self._prefix}{number}", owner, 0, 0)
            database.execute("UPDATE semel_txn_meta SET slots = slots + 1")
            database.execute(
                "INSERT INTO semel_txn (slot, owner_epoch, owner, prepared) VALUES (?, 0, ?, '')", (row.slot, owner)
            )
            self._is_alive(row.slot, owner)
            return row

        return self._in_transaction(work)

    def reserve(self, row: SlotRow, owner: str) -> bool:
        changed = self._insist(
            lambda: self._database.execute(
                "UPDATE semel_txn SET owner = ? WHERE slot = ? AND owner = ? AND owner_epoch = ?",
                (owner, row.slot, LEAVE_RELEASED, row.owner_epoch),
            )
        )
        return changed == 1

    def claim(self, slot: str, owner: str) -> Claim:
        def work() -> Claim:
            database = self._database
            rows = database.query(
                f"SELECT owner_epoch, prepared FROM semel_txn WHERE slot = ?{database.lock_rows}",  # noqa: S608
                (slot,),
            )
            if not rows:
                raise Fatal(
                    f"row {slot!r} of semel_txn is gone from {without_password(database.url)}: it was deleted, or the "
                    "database was restored. Nothing is decided about what Kafka holds open under this transactional "
                    "id: `semel doctor txn list` shows it."
                )
            claim = Claim(rows[0][0] + 1, rows[0][1])
            database.execute(
                "UPDATE semel_txn SET owner_epoch = ?, owner = ? WHERE slot = ?", (claim.owner_epoch, owner, slot)
            )
            self._is_alive(slot, owner)
            failpoint("dual.claim.before_fence")
            return claim

        return self._in_transaction(work)

    def decided(self, slot: str) -> Decision | None:
        return self._insist(lambda: read_decision(self._database, slot))

    def _is_alive(self, slot: str, owner: str) -> None:
        """From here on the slot's signs of life are this owner's; inside of the transaction that makes it his."""
        changed = self._database.execute(
            "UPDATE semel_txn_beat SET owner = ?, beat = beat + 1 WHERE slot = ?", (owner, slot)
        )
        if not changed:
            self._database.execute("INSERT INTO semel_txn_beat (slot, owner, beat) VALUES (?, ?, 0)", (slot, owner))

    def beat(self, owned: Mapping[str, str]) -> None:
        # One at a time: who holds several rows at once can meet somebody who claims one of them.
        for slot, owner in owned.items():
            self._change("UPDATE semel_txn_beat SET beat = beat + 1 WHERE slot = ? AND owner = ?", (slot, owner))

    def release(self, slot: str, owner: str) -> None:
        self._change(
            "UPDATE semel_txn SET owner = ? WHERE slot = ? AND owner = ?",
            (LEAVE_RELEASED, slot, owner),
        )

    # --- For the conditional recipe ---

    def resolved(self, slot: str) -> int:
        rows = self._insist(
            lambda: self._database.query("SELECT resolved_epoch FROM semel_txn WHERE slot = ?", (slot,))
        )
        return int(rows[0][0]) if rows else -1

    def mark_resolved(self, slot: str, owner: str, epoch: int) -> bool:
        sql = "UPDATE semel_txn SET resolved_epoch = ? WHERE slot = ? AND owner = ?"
        return self._changed(sql, (epoch, slot, owner))

    def replace_prepared(self, slot: str, owner: str, before: str, after: str) -> bool:
        sql = "UPDATE semel_txn SET prepared = ? WHERE slot = ? AND owner = ? AND (prepared = ? OR prepared = ?)"
        return self._changed(sql, (after, slot, owner, before, after))

    def retire(self, slot: str, owner: str, why: str) -> bool:
        sql = "UPDATE semel_txn SET owner = ? WHERE slot = ? AND owner = ?"
        return self._changed(sql, (f"{OUT_OF_USE}{why}", slot, owner))

    def close(self) -> None:
        self._database.close()

    # --- Statements ---

    def _changed(self, sql: str, parameters: tuple[Any, ...]) -> bool:
        return self._insist(lambda: self._database.execute(sql, parameters)) == 1

    def _change(self, sql: str, parameters: tuple[Any, ...]) -> None:
        self._insist(lambda: self._database.execute(sql, parameters))

    def _in_transaction(self, work: Callable[[], T]) -> T:
        def whole() -> T:
            self._database.begin()
            try:
                found = work()
                self._database.commit()
            finally:
                self._database.rollback()
            return found

        return self._insist(whole)

    def _insist(self, work: Callable[[], T]) -> T:
        """Run it on a connection that works. Every call may run again, so a COMMIT without an answer is tried again."""
        for attempt in range(_TRIES):
            try:
                if not self._database.connected:
                    self._database.connect()
                return work()
            except OutcomeUnknown as error:
                reason: Exception = error
            except Fatal:
                raise
            except Exception as error:
                reason, cause = error, self._database.cause(error)
                if self._database.driver_cause(error) is None:
                    raise
                if cause is Cause.DATA:
                    said = " ".join(str(error).split())
                    raise ConfigurationError(
                        f"{without_password(self._database.url)} refused a statement on semel_txn: {said}"
                    ) from error
                if cause is Cause.LOCKED and not self._end_stopped_writer():
                    break
                if cause is Cause.INFRASTRUCTURE:
                    self._database.close()
                    if attempt:  # A connection that stood idle may have been closed by the server: once is no news.
                        break
        said = " ".join(str(reason).split())
        raise Retriable(f"the slots in {without_password(self._database.url)} cannot be used now: {said}") from reason

    def _end_stopped_writer(self) -> bool:
        """End the process that holds SQLite's write lock, if it is stopped and owns slots here; whether it was ended.

        Nobody could write to the database before somebody lets it go on.
        """
        holder = self._database.write_lock_holder()
        if holder is None:
            return False
        owners = [owner for (owner,) in self._database.query("SELECT owner FROM semel_txn")]
        if not end_stopped(holder, owners):
            return False
        log.warning(
            "process %d was stopped while it held the write lock of %s, so nobody could write: killed it. Its "
            "unfinished transaction is rolled back, and its slots are recovered.",
            holder,
            self._database.url,
        )
        return True
