"""A slot that this process owns: its producer, its place in the row, and where its transaction stands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from semel.client.producer import TransactionalProducer
from semel.client.two_phase import NOTHING_PREPARED, PreparedState

__all__ = ["Slot", "SlotState"]


class SlotState(StrEnum):
    """Where a slot's transaction stands."""

    IDLE = "idle"
    """Nothing is open."""
    WRITING = "writing"
    """Records are on their way to Kafka; nothing is decided."""
    PREPARED = "prepared"
    """Kafka keeps the transaction open; the database is about to decide."""
    COMPLETING = "completing"
    """The decision is known, and Kafka is being told."""
    LOST = "lost"
    """It is not ours any more, or recovered by whoever comes first."""


@dataclass(slots=True, eq=False)
class Slot:
    """Changed in the keeper's loop, but for `in_use`. `owner` and `owner_epoch` are the guard of the decision."""

    name: str
    owner: str
    owner_epoch: int
    producer: TransactionalProducer
    state: SlotState = SlotState.IDLE
    prepared: PreparedState = NOTHING_PREPARED
    since: float = 0.0
    """When the open transaction was prepared, by the keeper's clock."""
    committed: str = ""
    """The last decision, while Kafka has committed it and the row does not say so."""
    in_use: bool = False
    """Whether a database transaction is open that will change the slot's row: its session says so."""
    ending: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def is_lost(self) -> bool:
        """Whether it can be used no more."""
        return self.state is SlotState.LOST
