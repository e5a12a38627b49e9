"""The states of a transaction, the value that stands for one transactional id, and the three steps of its life.

`TRANSITIONS` is the whole life of a transaction; `transitions.mermaid` draws it. Names and rules are Apache Kafka's
(TransactionState, TransactionMetadata); who may ask for which step is in `transaction.py`.

An open transaction that a new owner took over without ending it (KIP-939, keepPreparedTxn) is *kept*. It has two
identities: `identity`, under which its data was written and its markers will be, and `client_identity`, the only one
that may end it. Everywhere else the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from semel.coordinator.transitions import Transitions
from semel.types import TopicPartition

__all__ = [
    "EPOCH_MAX",
    "NO_TIMEOUT_MS",
    "TRANSITIONS",
    "TransactionMetadata",
    "TransactionState",
    "completed",
    "decided",
    "kept",
]

EPOCH_MAX = 32_766
"""The last epoch that a client may hold: one is left (32767) for the marker that ends its transaction."""
NO_TIMEOUT_MS = 2_147_483_647
"""A transaction with this timeout is never aborted by the sweep (KIP-939: that of two-phase commit)."""


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
    # More partitions, a new owner that keeps it (KIP-939), or the decision. There is no third outcome.
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
    """Of a kept transaction: the client's producer id. In PrepareX: the one of CompleteX. -1 if it stays the same."""
    next_producer_epoch: int = -1
    """The epoch that goes with `next_producer_id`; -1 stands for 0 there, and elsewhere for none."""
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
    def client_identity(self) -> tuple[int, int]:
        """What the client holds: it may end the open transaction; in PrepareX, what CompleteX stores."""
        if self.next_producer_id < 0:
            return self.identity
        return self.next_producer_id, max(self.next_producer_epoch, 0)

    @property
    def is_kept(self) -> bool:
        """Open, and taken over by an InitProducerId that did not end it: it takes no more data."""
        return self.state is ONGOING and self.next_producer_id >= 0

    @property
    def ended_identity(self) -> tuple[int, int] | None:
        """The client identity that TV2 has just ended: its EndTxn may be a retry. None where none can be."""
        if self.client_version < 2 or self.state in (EMPTY, ONGOING, DEAD):
            return None
        producer_id, epoch = self.client_identity
        return (self.previous_producer_id, EPOCH_MAX) if epoch == 0 else (producer_id, epoch - 1)

    def is_overdue(self, now_ms: int) -> bool:
        """Open for longer than its timeout, measured from its first partition."""
        return self.state is ONGOING and self.timeout_ms != NO_TIMEOUT_MS and self.start_ms + self.timeout_ms < now_ms

    def open_for_ms(self, now_ms: int) -> int:
        """Age of the open transaction, -1 without one."""
        return now_ms - self.start_ms if self.state is ONGOING or self.state in PREPARED else -1


def kept(
    current: TransactionMetadata, now_ms: int, next_identity: tuple[int, int], *, endless: bool
) -> TransactionMetadata:
    """The open transaction in the hands of a new client; `endless` takes its time-out away, nothing shortens it."""
    return replace(
        current,
        next_producer_id=next_identity[0],
        next_producer_epoch=next_identity[1],
        timeout_ms=NO_TIMEOUT_MS if endless else current.timeout_ms,
        last_producer_epoch=-1,
        last_update_ms=now_ms,
    )


def decided(
    current: TransactionMetadata, commit: bool, now_ms: int, *, version: int, new_producer_id: Callable[[], int]
) -> TransactionMetadata:
    """The PrepareX of `current`. With TV2 the epoch rises here, so that the markers close the identity in the logs.

    The client's epoch rises too, also where it is another one (kept): an EndTxn of a moment ago that is still on its
    way must find nothing that it could end.
    """
    client_id, client_epoch = current.client_identity
    target = replace(
        current,
        state=PREPARE_COMMIT if commit else PREPARE_ABORT,
        previous_producer_id=client_id,
        start_ms=current.start_ms if current.state is ONGOING else now_ms,
        last_update_ms=now_ms,
        client_version=version,
    )
    if version < 2:
        return target
    if client_epoch >= EPOCH_MAX:
        following = new_producer_id(), -1
    else:
        following = (client_id, client_epoch + 1) if current.is_kept else (-1, -1)
    return replace(
        target,
        producer_epoch=current.producer_epoch + 1,
        last_producer_epoch=client_epoch,
        next_producer_id=following[0],
        next_producer_epoch=following[1],
    )


def completed(current: TransactionMetadata, now_ms: int) -> TransactionMetadata:
    """The CompleteX of a PrepareX."""
    producer_id, producer_epoch = current.client_identity
    return replace(
        current,
        state=COMPLETE_COMMIT if current.state is PREPARE_COMMIT else COMPLETE_ABORT,
        producer_id=producer_id,
        producer_epoch=producer_epoch,
        next_producer_id=-1,
        next_producer_epoch=-1,
        partitions=frozenset(),
        last_update_ms=now_ms,
    )
