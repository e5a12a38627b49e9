"""What one transaction of a sink does: a move for each partition, from where to where, with its records on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from semel.history import BatchPart
from semel.sinks.sql.audit import Audit
from semel.sinks.sql.parking import Parked, Parking
from semel.sinks.sql.positions import PositionKey
from semel.types import Record, TopicPartition

__all__ = ["Item", "Move", "Owned", "all_stay", "parts_of"]


@dataclass(slots=True)
class Owned:
    """A partition that is ours: what the row says, as this owner last read or wrote it."""

    key: PositionKey
    next_offset: int
    owner_epoch: int
    parked: Parked


class Item(NamedTuple):
    """A record with its decoded view, or with the error that decoding gave."""

    record: Record
    view: Any
    error: Exception | None
    mark: Any = None
    """What the guard knows it by, where there is one."""


@dataclass(frozen=True, slots=True)
class Move:
    """One partition's part of a transaction: from where to where, and what is handled on the way."""

    partition: TopicPartition
    key: PositionKey
    owner_epoch: int
    from_offset: int
    to_offset: int
    items: Sequence[Item]
    stays_at: int | None = None
    """Where the row stands and stays, when another transaction moves it; None when this one does."""

    def up_to(self, offset: int | None) -> Move | None:
        """The way as far as this offset, where there is anything to do on it; None for the offset is the whole way."""
        if offset is None:
            return self
        items = [item for item in self.items if item.record.offset < offset]
        return replace(self, to_offset=offset, items=items) if items else None

    def singles(self) -> Iterable[Move]:
        """The same way in steps of one record."""
        at = self.from_offset
        for number, item in enumerate(self.items, 1):
            to = self.to_offset if number == len(self.items) else item.record.offset + 1
            yield replace(self, from_offset=at, to_offset=to, items=(item,))
            at = to


def all_stay(moves: Sequence[Move]) -> bool:
    """Whether the transaction moves no position: a release, or effects whose position another one moves."""
    return all(move.stays_at is not None or move.from_offset == move.to_offset for move in moves)


def parts_of(moves: Sequence[Move], parking: Parking, audit: Audit) -> list[BatchPart]:
    """The transaction as the history tells of it."""
    return [
        BatchPart(
            *move.partition,
            move.owner_epoch,
            move.from_offset,
            move.to_offset,
            audit.handed(move.partition),
            parking.offsets(move.partition),
            tuple(parking.released),
        )
        for move in moves
    ]
