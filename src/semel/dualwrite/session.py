"""A connection for transactions that Kafka and the database commit together.

1. Kafka has the records, prepared. 2. Their transaction's name is written into the slot's row, as the last statement,
guarded by the fence. 3. COMMIT decides. 4. Kafka is told, in the background: the caller does not wait for it, because
nothing can change the decision any more.

A COMMIT whose answer does not come is looked for in the row, under its lock. Whatever else goes wrong between (1) and
(3), the slot is forsaken: recovery judges it by the row.
"""

from __future__ import annotations

from collections.abc import Sequence

from semel.databases.database import Database
from semel.databases.settling import SETTLE_SECONDS, begin, one_line, settled
from semel.dualwrite.agreement import PlanChanged
from semel.dualwrite.slots import Slot
from semel.dualwrite.sql import MARK, read_decision
from semel.dualwrite.store import ENDED, Decision
from semel.dualwrite.thread import KeeperThread
from semel.dualwrite.writing import Outgoing
from semel.errors import Fatal, Fenced, OutcomeUnknown, Retriable
from semel.failpoints import failpoint

__all__ = ["DualSession"]


class DualSession:
    """A connection and its slot. Used by one thread at a time; what it raises besides is the driver's."""

    def __init__(self, database: Database, keeper: KeeperThread, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self.database = database
        self._keeper = keeper
        self._settle_seconds = settle_seconds
        self._slot: Slot | None = None
        self._no_slot = ""
        """Why there is none."""
        self._is_undecided = False
        """Kafka may have something prepared for the open transaction, and COMMIT was not sent."""
        self._is_in_doubt = False
        """COMMIT was sent, and nobody has said how it ended."""
        self._number = 0

    def __repr__(self) -> str:
        return f"<DualSession {self._slot} transaction {self._number} on {self.database!r}>"

    @property
    def transaction_id(self) -> str:
        """Names the transaction that is open, or the last one, in errors: `slot/owner epoch/number`."""
        number = self._number + 1 if self.database.in_transaction else self._number
        slot = "-/-" if self._slot is None else f"{self._slot.name}/{self._slot.owner_epoch}"
        return f"{slot}/{number}"

    def begin(self) -> None:
        """Begin a transaction, on a new connection if need be.

        The slot is claimed here: later it would be in the way of the open transaction. A Kafka that is away is only
        told when records are sent. Raises `ConfigurationError` when the dual write cannot be done as things are set up,
        and `Retriable` when the database cannot be reached: nothing happened.
        """
        if self._slot is None or self._slot.is_lost:
            self._slot = None
            try:
                self._slot = self._keeper.claim()
            except PlanChanged:
                raise
            except Retriable as error:
                self._no_slot = str(error)
        if self._slot is not None:
            self._slot.in_use = True
        begin(self.database)

    def commit(self, records: Sequence[Outgoing]) -> None:
        """Commit, with the records or, where there are none, only here.

        Raises `Retriable` when nothing was committed and it may be tried again (Kafka away, or COMMIT was not answered
        and did not happen), `Fenced` when another process took the slot over (nothing was committed), `OutcomeUnknown`
        when nobody can tell within the limit, `Fatal` for records that Kafka refuses or when the transaction is not
        open any more; else what the database refuses.
        """
        if not self.database.in_transaction:
            raise Fatal(
                "the transaction was ended by other means than this block (tx.connection, or an error that the code "
                f"went on after), so {len(records)} records were not sent. Let the block commit, and raise what fails."
            )
        if records:
            self._commit_both(records)
        else:
            self.database.commit()
        self._number += 1

    def _commit_both(self, records: Sequence[Outgoing]) -> None:
        slot = self._slot
        if slot is None:
            raise Retriable(f"{len(records)} records cannot be sent, nothing was committed: {self._no_slot}")
        self.database.check_constraints_now()  # What would fail in COMMIT fails before Kafka has any work with it.
        self._is_undecided = True
        decision = self._keeper.write(slot, records)
        failpoint("dual.before_mark")
        if self.database.execute(MARK, (decision, slot.name, slot.owner_epoch, slot.owner)) != 1:
            self._is_undecided, self._slot = False, None
            self.database.rollback()
            self._keeper.fenced(slot)
            raise Fenced(
                f"slot {slot.name} belongs to another process now, which took this one for dead, or its row is gone. "
                f"Nothing was committed, here and in Kafka: the {len(records)} records were not sent. The next "
                "transaction has another slot."
            )
        failpoint("dual.before_commit")
        # From here on a Ctrl-C may fall between any two lines.
        self._is_in_doubt, self._is_undecided = True, False
        try:
            self.database.commit()
        except OutcomeUnknown as error:
            self._settle(slot, decision, error, records)
        except Exception as error:
            if self.database.driver_cause(error) is not None:
                # The database refused: nothing was committed.
                self._keeper.decide(slot, commit=False)
                self._is_in_doubt = False
            raise
        try:
            failpoint("dual.after_commit")
        finally:
            self._keeper.decide(slot, commit=True)
            self._is_in_doubt = False

    def rollback(self) -> None:
        """Roll back what is open, here and in Kafka, without raising."""
        self.database.rollback()
        slot = self._slot
        if slot is not None:
            slot.in_use = False
        if slot is not None and self._is_in_doubt:
            self._leave(slot)
        elif slot is not None and self._is_undecided:
            self._is_undecided = False
            self._keeper.decide(slot, commit=False)

    def close(self) -> None:
        """Close the connection, without raising, and give the slot back."""
        self.database.close()
        slot, self._slot = self._slot, None
        if slot is not None:
            self._keeper.release(slot)

    # --- A COMMIT without an answer ---

    def _leave(self, slot: Slot) -> None:
        """What became of the transaction is for recovery to find out."""
        self._keeper.unknown(slot)
        self._is_in_doubt = self._is_undecided = False
        self._slot = None

    def _settle(self, slot: Slot, decision: str, cause: OutcomeUnknown, records: Sequence[Outgoing]) -> None:
        """Return when the transaction is committed; raise `Retriable` when it is not, `OutcomeUnknown` otherwise: then
        `rollback` leaves the slot to recovery, as after every error here."""
        failpoint("dual.settle.before")
        found = self._read(slot, cause, decision, records)
        failpoint("dual.settle.after")
        if found is not None and found.prepared in (decision, f"{decision}{ENDED}"):
            return
        if found is None or (found.owner, found.owner_epoch) != (slot.owner, slot.owner_epoch):
            why = "its row is gone" if found is None else "its slot has another owner by now, who decided"
            raise self._unknown(why, cause, slot, decision, records)
        self._keeper.decide(slot, commit=False)
        self._is_in_doubt = False
        raise Retriable(
            f"{cause}. Nothing was committed: {decision} is not what slot {slot.name} holds in semel_txn. Run it again."
        ) from cause

    def _read(self, slot: Slot, cause: OutcomeUnknown, decision: str, records: Sequence[Outgoing]) -> Decision | None:
        try:
            return settled(self.database, lambda: read_decision(self.database, slot.name), self._settle_seconds)
        except Exception as error:
            raise self._unknown(f"it cannot be asked ({one_line(error)})", cause, slot, decision, records) from error

    # --- Errors ---

    def _unknown(
        self, why: str, cause: OutcomeUnknown, slot: Slot, decision: str, records: Sequence[Outgoing]
    ) -> OutcomeUnknown:
        ids = ", ".join(record.msg_id for record in records[:3]) + (", ..." if len(records) > 3 else "")
        look = f"SELECT prepared FROM semel_txn WHERE slot = '{slot.name}'"  # noqa: S608 - to be read
        return OutcomeUnknown(
            f"{cause}; {why}. The transaction of {len(records)} records ({ids}) is in the database and in Kafka, or in "
            f"neither: recovery decides it by the row, as soon as the database is there. Look before you repeat it: "
            f"{look} gives {decision} if it was committed, as long as nobody used the slot since; or look for your own "
            "rows."
        )
