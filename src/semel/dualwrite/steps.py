"""A connection for transactions on a store that does everything in one step at the end (`dualwrite/target.py`).

1. Kafka has the records, prepared. 2. The step: effects and decision, guarded by the fence. 3. Kafka is told, in the
background. Nothing is locked while Kafka works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from semel.dualwrite.slots import Slot
from semel.dualwrite.target import Guard, LeftToAPerson, Target
from semel.dualwrite.thread import KeeperThread
from semel.dualwrite.writing import Outgoing
from semel.errors import Fenced, OutcomeUnknown, Retriable, SemelError
from semel.failpoints import failpoint

__all__ = ["StepSession"]

W = TypeVar("W")


class StepSession(Generic[W]):
    """A connection and its slot. Used by one thread at a time."""

    def __init__(self, target: Target[W], keeper: KeeperThread) -> None:
        self.target = target
        self._keeper = keeper
        self._slot: Slot | None = None
        self._no_slot = ""
        """Why there is none."""
        self._decision: str | None = None
        """The last one under this slot; None: not known."""
        self._number = 0

    def __repr__(self) -> str:
        return f"<StepSession {self._slot} transaction {self._number} on {self.target!r}>"

    @property
    def transaction_id(self) -> str:
        """Names the transaction that is open, or the last one, in errors: `slot/owner epoch/number`."""
        number = self._number + 1 if self.target.in_transaction else self._number
        slot = "-/-" if self._slot is None else f"{self._slot.name}/{self._slot.owner_epoch}"
        return f"{slot}/{number}"

    def begin(self) -> None:
        """Begin. A Kafka that is away is only told when records are sent.

        Raises `ConfigurationError` when the dual write cannot be done as things are set up, and `Retriable` when the
        store cannot be reached: nothing happened.
        """
        if self._slot is None or self._slot.is_lost:
            self._slot = self._decision = None
            try:
                self._slot = self._keeper.claim()
            except Retriable as error:
                self._no_slot = str(error)
        self.target.begin()

    def commit(self, work: W, records: Sequence[Outgoing]) -> None:
        """Do the step, with the records or, where there are none, alone. Raises what `Target.commit` raises, and
        `Retriable` or `Fatal` for records that Kafka does not take: then nothing happened."""
        if records:
            self._commit_both(work, records)
        else:
            self.target.commit(work, None)
        self._number += 1

    def _commit_both(self, work: W, records: Sequence[Outgoing]) -> None:
        slot = self._slot
        if slot is None:
            raise Retriable(f"{len(records)} records cannot be sent, nothing happened: {self._no_slot}")
        decision = self._keeper.write(slot, records)
        try:
            failpoint("dual.before_mark")
            self.target.commit(work, Guard(slot.name, slot.owner_epoch, slot.owner, decision, self._decision))
        except (OutcomeUnknown, LeftToAPerson):
            self._leave(slot)
            raise
        except Fenced:
            self._slot = None
            self._keeper.fenced(slot)
            raise
        except SemelError:
            self._decide(slot, commit=False)
            raise
        except BaseException:
            self._leave(slot)  # Interrupted, maybe in the middle of the step.
            raise
        self._decision = decision
        try:
            failpoint("dual.after_commit")
        finally:
            self._decide(slot, commit=True)

    def _decide(self, slot: Slot, *, commit: bool) -> None:
        self._keeper.decide(slot, commit=commit)
        if self.target.is_fence_raised:  # The next transaction has a slot with a fence that is known.
            self._slot = None
            self._keeper.release(slot)

    def _leave(self, slot: Slot) -> None:
        """What became of the transaction is for recovery to find out."""
        self._slot = None
        self._keeper.unknown(slot)

    def rollback(self) -> None:
        """Forget what was begun, without raising."""
        self.target.rollback()

    def close(self) -> None:
        """Close the connection, without raising, and give the slot back."""
        self.target.close()
        slot, self._slot = self._slot, None
        if slot is not None:
            self._keeper.release(slot)
