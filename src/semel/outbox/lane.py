"""What a lane publishes, deletes, and when: the rules of the manifest protocol. Sans-IO.

One relay owns a lane at a time, and Kafka's producer fence is what makes that true. Its life:

1. take over: raise `owner_epoch`, fence the predecessor (InitProducerId), read the lane's last manifest up to the high
   watermark seen after that, and `take_over` says what to delete or that the database went back;
2. `read` takes rows that a SELECT gave, in any order of numbers and without a cursor: what is not in hand is new;
3. `begin` makes the manifest of the next transaction, which lists every batch that is not deleted;
4. `committed` or `aborted` says how it ended. Not knowing is neither: the lane is taken over anew;
5. `settled` forgets batches whose rows the database has deleted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from semel.outbox.manifest import VERSION, Manifest, Published, RowId
from semel.outbox.rows import OutboxRow

__all__ = ["DEPTH", "Batch", "Lane", "LaneRow", "Takeover", "take_over"]

DEPTH = 2
"""Batches of a lane in hand: one in its transaction, one read from the database meanwhile or being deleted there."""


class LaneRow(NamedTuple):
    """A lane as the database has it, just after its new owner raised the epoch."""

    lane: int
    owner_epoch: int
    batch: int
    """The last batch whose rows were deleted."""
    positions: str | None


class Takeover(NamedTuple):
    """What a new owner has to do first."""

    delete: list[RowId]
    """Rows that a predecessor published."""
    batch: int
    """The last batch that is known to be in Kafka."""
    reconcile: str
    """Why rows in the table may have been published long ago; empty when they cannot have been."""


def take_over(row: LaneRow, incarnation: str, last: Manifest | None, *, is_lost: bool = False) -> Takeover:
    """What to do about the lane's last manifest, None when there is none above the lane's noted position.

    `is_lost` says that there has to be one, and Kafka does not have it. A database is known to have gone back when the
    manifest lists only batches above the next one: those between were deleted in a life of it that is over.
    """
    if last is None:
        return Takeover([], row.batch, f"the manifest of batch {row.batch} is not in Kafka any more" if is_lost else "")
    batch = max(row.batch, last.last)
    if last.incarnation != incarnation:
        return Takeover(last.rows, batch, "the database was declared restored, or is on another server")
    if last.owner_epoch >= row.owner_epoch:
        why = f"the manifest was written by owner {last.owner_epoch}, the database is at {row.owner_epoch}"
        return Takeover(last.rows, batch, why)
    if last.first > row.batch + 1:
        why = f"batches {row.batch + 1} to {last.first - 1} were deleted once, and the database does not know it"
        return Takeover(last.rows, batch, why)
    if last.last < row.batch or is_lost:
        return Takeover(last.rows, batch, f"batch {row.batch} was deleted, but Kafka's last is {last.last}")
    return Takeover(last.rows if last.last > row.batch else [], batch, "")


@dataclass
class Batch:
    """Rows that go into one transaction, in the order of their places; `number` is given when it begins."""

    rows: list[OutboxRow]
    size: int
    number: int = 0

    @cached_property
    def ids(self) -> list[RowId]:
        """Its rows, exactly."""
        return [RowId(*row[:3]) for row in self.rows]


@dataclass(slots=True)
class Lane:
    """A lane that is ours."""

    number: int
    database_id: str
    incarnation: str
    owner_epoch: int
    batch: int
    """The last batch that was committed."""
    waiting: deque[Batch] = field(default_factory=deque)
    """Read, and in no transaction."""
    under_way: Batch | None = None
    undeleted: deque[Batch] = field(default_factory=deque)
    """Committed, and perhaps still in the table."""
    aborts: int = 0
    """Rows that were read before the last abort came back are of no use: earlier ones of their keys wait again."""

    @property
    def in_hand(self) -> int:
        """Batches that are not done with."""
        return len(self.waiting) + len(self.undeleted) + (self.under_way is not None)

    @property
    def has_room(self) -> bool:
        """Whether rows may be read for it."""
        return self.in_hand < DEPTH

    def numbers(self, shard: int = 0) -> set[int]:
        """The numbers (seq) of the rows in hand: the table still has them, and they are not to be read again.

        Those of batches that lie whole before `shard` are left out.
        """
        batches = [*self.waiting, *self.undeleted, *([] if self.under_way is None else [self.under_way])]
        return {row.seq for batch in batches if batch.rows and batch.rows[-1].shard >= shard for row in batch.rows}

    @property
    def size(self) -> int:
        """Bytes of what is not committed."""
        return sum(batch.size for batch in self.waiting) + (0 if self.under_way is None else self.under_way.size)

    def read(self, rows: Sequence[OutboxRow], size: int) -> None:
        """Take in rows of the table, in the order of their places."""
        known = self.numbers(rows[0].shard) if rows else set()
        new = [row for row in rows if row.seq not in known] if known else list(rows)
        if new:
            self.waiting.append(Batch(new, size))

    def begin(self) -> tuple[Batch, Manifest] | None:
        """The next transaction; None when there is nothing to publish or one is under way."""
        if self.under_way is not None or not self.waiting:
            return None
        batch = self.under_way = self.waiting.popleft()
        batch.number = self.batch + 1
        return batch, self._manifest(batch)

    def begin_empty(self) -> Manifest:
        """The transaction without rows that ends a reconciliation: from now on the manifest is of this incarnation."""
        assert not self.in_hand
        self.under_way = Batch([], 0, self.batch + 1)
        return self._manifest(self.under_way)

    def _manifest(self, batch: Batch) -> Manifest:
        listed = [Published(item.number, item.ids) for item in (*self.undeleted, batch)]
        return Manifest(VERSION, self.database_id, self.incarnation, self.number, self.owner_epoch, listed)

    def committed(self) -> None:
        """Kafka said so."""
        assert self.under_way is not None
        self.batch = self.under_way.number
        self.undeleted.append(self.under_way)
        self.under_way = None

    def aborted(self, *, is_refused: bool = False) -> Batch | None:
        """Kafka said that nothing of it is there; its rows, and what was read behind them, are read again.

        With `is_refused` the data of one of its rows is at fault: its halves are tried apart, in their order, until
        one row is left, which is returned.
        """
        assert self.under_way is not None
        batch, self.under_way = self.under_way, None
        self.waiting.clear()
        self.aborts += 1
        if not is_refused or len(batch.rows) == 1:
            return batch if is_refused else None
        middle = len(batch.rows) // 2
        self.waiting.extend(Batch(part, batch.size // 2) for part in (batch.rows[:middle], batch.rows[middle:]))
        return None

    def settled(self, number: int) -> None:
        """The database has deleted every batch up to this one."""
        while self.undeleted and self.undeleted[0].number <= number:
            self.undeleted.popleft()
