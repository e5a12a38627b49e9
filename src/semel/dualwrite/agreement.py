"""One way of records for a database, and not one for each process: where an app has an outbox and the dual write.

A record that waits in the outbox comes into Kafka after those that a dual write sent later. So the plan stands in the
database, and it changes in one transaction that lets nobody go on with the old one:

* To the dual write only while the outbox is empty, and with every row of `semel_commit` deleted: a transaction of the
  outbox that is under way does not find its row, and is rolled back.
* To the outbox with every fence of the slots raised: a dual write that is under way does not change its row.

Whoever begins with one of them looks at the plan behind the step that such a change undoes.
"""

from __future__ import annotations

from semel.databases.database import Database, without_password
from semel.dualwrite.plan import Plan
from semel.errors import Retriable

__all__ = ["PlanChanged", "agree", "agreed", "confirm"]


class PlanChanged(Retriable):
    """The records of this database go another way by now. Nothing happened; the next transaction takes that way."""


def agree(database: Database, wanted: Plan) -> Plan:
    """The plan that holds for the database from now on: the wanted one, or the outbox as long as it is not empty.

    Raises the driver's errors.
    """
    if _written(wanted) == _read(database):
        return wanted
    if wanted is not Plan.OUTBOX and _waiting(database):
        return Plan.OUTBOX  # Without a lock: who writes is not held up by every look.
    database.begin()
    try:
        if _read(database, database.lock_rows) != _written(wanted):
            if wanted is Plan.OUTBOX:
                database.execute("UPDATE semel_txn SET owner_epoch = owner_epoch + 1")
            else:
                database.execute("DELETE FROM semel_commit")  # It waits for whoever is about to commit.
                if _waiting(database):
                    return Plan.OUTBOX
            database.execute("UPDATE semel_txn_meta SET plan = ?", (_written(wanted),))
        database.commit()
    finally:
        database.rollback()
    return wanted


def agreed(database: Database) -> Plan | None:
    """The plan that holds now; None when nobody has agreed on one. Raises the driver's errors."""
    found = _read(database)
    return None if found is None else Plan(found)


def confirm(database: Database, plan: Plan, lock: str = "") -> None:
    """Raise `PlanChanged` when another plan holds by now."""
    found = _read(database, lock)
    if found != _written(plan):
        raise PlanChanged(
            f"the records of {without_password(database.url)} go by {found} now, and this process began with "
            f"{_written(plan)}. Nothing happened; run the transaction again."
        )


def _written(plan: Plan) -> str:
    return str(Plan.OUTBOX if plan is Plan.OUTBOX else Plan.DUAL_WRITE)


def _read(database: Database, lock: str = "") -> str | None:
    [(found,)] = database.query(f"SELECT plan FROM semel_txn_meta{lock}")  # noqa: S608
    return None if found is None else str(found)


def _waiting(database: Database) -> bool:
    return bool(database.query("SELECT 1 FROM semel_outbox LIMIT 1"))
