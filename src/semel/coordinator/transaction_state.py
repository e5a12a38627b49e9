"""The states of a transaction and the value that stands for one transactional id.

`TRANSITIONS` is the whole life of a transaction; `transitions.mermaid` draws it. Names and rules are Apache Kafka's
(TransactionState, TransactionMetadata); what leads from one value to the next is in `transaction.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from semel.coordinator.transitions import Transitions
from semel.types import TopicPartition

__all__ = ["EPOCH_MAX", "NO_TIMEOUT_MS", "TRANSITIONS", "TransactionMetadata", "TransactionState"]

EPOCH_MAX = 32_766
"""The last epoch that a client may hold: one is left (32767) for the marker that ends its transaction."""
NO_TIMEOUT_MS = 2_147_483_647
"""A transaction with this timeout is never aborted by the sweep (KIP-939 stores it for prepared transactions)."""


class TransactionState(StrEnum):
    """Kafka's states, by the names that its tools print."""

    EMPTY = "Empty"
    ONGOING = "Ongoing"
    PREPARE_COMMIT = "PrepareCommit"
    PREPARE_ABORT = "PrepareAbort"
    COMPLETE_COMMIT = "CompleteCommit"
    COMPLETE_ABORT = "CompleteAbort"
    DEAD = "Dead"


EMPTY, ONGOING = TransactionState.EMPTY, TransactionState.ONGOING
PREPARE_COMMIT, PREPARE_ABORT = TransactionState.PREPARE_COMMIT, TransactionState.PREPARE_ABORT
COMPLETE_COMMIT, COMPLETE_ABORT = TransactionState.COMPLETE_COMMIT, TransactionState.COMPLETE_ABORT
DEAD = TransactionState.DEAD
PREPARED = frozenset({PREPARE_COMMIT, PREPARE_ABORT})
IDLE = frozenset({EMPTY, COMPLETE_COMMIT, COMPLETE_ABORT})

TRANSITIONS: Transitions[TransactionState] = {
    # From an idle state: a new owner (Empty), the first partition (Ongoing), TV2's abort of a transaction to which
    # perhaps nothing was added (PrepareAbort), expiry of the id (Dead).
    EMPTY: frozenset({EMPTY, ONGOING, PREPARE_ABORT, DEAD}),
    COMPLETE_COMMIT: frozenset({EMPTY, ONGOING, PREPARE_ABORT, DEAD}),
    COMPLETE_ABORT: frozenset({EMPTY, ONGOING, PREPARE_ABORT, DEAD}),
    # More partitions, or the decision. There is no way back and no third outcome.
    ONGOING: frozenset({ONGOING, PREPARE_COMMIT, PREPARE_ABORT}),
    PREPARE_COMMIT: frozenset({COMPLETE_COMMIT}),
    PREPARE_ABORT: frozenset({COMPLETE_ABORT}),
    DEAD: frozenset(),
}


@dataclass(frozen=True, slots=True)
class TransactionMetadata:
    """Everything that is known about one transactional id. Times are milliseconds since 1970, -1 for never."""

    transactional_id: str
    producer_id: int
    producer_epoch: int
    previous_producer_id: int = -1
    """The producer id before the last change; differs from `producer_id` only just after a rotation."""
    next_producer_id: int = -1
    """In PrepareX: the producer id that CompleteX rotates to, -1 if it does not."""
    last_producer_epoch: int = -1
    """The epoch whose owner may ask again for the current one; -1 when nobody may."""
    timeout_ms: int = 60_000
    state: TransactionState = EMPTY
    partitions: frozenset[TopicPartition] = frozenset()
    start_ms: int = -1
    """When the first partition was added; never moved by later ones."""
    last_update_ms: int = -1
    client_version: int = 0
    """2 when the last change came by TV2, 0 or 1 otherwise."""

    @property
    def identity(self) -> tuple[int, int]:
        return self.producer_id, self.producer_epoch

    @property
    def is_exhausted(self) -> bool:
        return self.producer_epoch >= EPOCH_MAX

    @property
    def ended_identity(self) -> tuple[int, int] | None:
        """The identity whose transaction TV2 has just decided: its EndTxn may be a retry. None where none can be."""
        if self.client_version < 2 or self.state in (EMPTY, ONGOING, DEAD):
            return None
        if self.producer_epoch == 0:
            return self.previous_producer_id, EPOCH_MAX
        return self.producer_id, self.producer_epoch - 1

    @property
    def identity_after(self) -> tuple[int, int]:
        """Of a PrepareX: the identity that CompleteX stores and EndTxn v5 answers."""
        if self.next_producer_id >= 0:
            return self.next_producer_id, 0
        return self.identity

    def is_overdue(self, now_ms: int) -> bool:
        """Open for longer than its timeout, measured from its first partition."""
        return self.state is ONGOING and self.timeout_ms != NO_TIMEOUT_MS and self.start_ms + self.timeout_ms < now_ms

    def open_for_ms(self, now_ms: int) -> int:
        """Age of the open transaction, -1 without one."""
        return now_ms - self.start_ms if self.state is ONGOING or self.state in PREPARED else -1
