"""What a producer does about each error code of each transactional request. One table; sans-IO.

Sources: Apache Kafka 4.3.1's TransactionManager, KIP-588, KIP-890, and answers measured on 4.3.1 (docs: Kafka facts,
1.5 and 2.4-2.11). A code that no row names falls back on `errors.error_class`.
"""

from __future__ import annotations

from enum import IntEnum

from semel.errors import AbortTransaction, ErrorCode, Fenced, Retriable, error_class

__all__ = ["Reaction", "reaction_to"]


class Reaction(IntEnum):
    """What comes next, the graver the greater."""

    DONE = 0
    RETRY = 1
    """The same request again, after a short wait."""
    REFRESH = 2
    """Find the leader or the coordinator anew, then the same request again."""
    OUT_OF_ORDER = 3
    """Retry if an earlier batch is still to be written, else abort."""
    NOT_OPEN = 4
    """EndTxn: the coordinator has no such transaction open."""
    ABORT = 5
    FENCED = 6
    """Our epoch is old: find out why."""
    FATAL = 7


E = ErrorCode
_COORDINATOR = {
    E.COORDINATOR_LOAD_IN_PROGRESS: Reaction.RETRY,
    E.CONCURRENT_TRANSACTIONS: Reaction.RETRY,
    E.COORDINATOR_NOT_AVAILABLE: Reaction.REFRESH,
    E.NOT_COORDINATOR: Reaction.REFRESH,
    E.INVALID_PRODUCER_EPOCH: Reaction.FENCED,
    E.PRODUCER_FENCED: Reaction.FENCED,
    E.TRANSACTION_COORDINATOR_FENCED: Reaction.REFRESH,
    E.INVALID_PRODUCER_ID_MAPPING: Reaction.FENCED,
    E.INVALID_TXN_STATE: Reaction.ABORT,
}
_TABLE: dict[str, dict[ErrorCode, Reaction]] = {
    "InitProducerId": _COORDINATOR | {E.TRANSACTION_ABORTABLE: Reaction.RETRY},
    "AddPartitionsToTxn": _COORDINATOR | {E.UNKNOWN_TOPIC_OR_PARTITION: Reaction.REFRESH},
    "AddOffsetsToTxn": _COORDINATOR,
    "TxnOffsetCommit": _COORDINATOR
    | {
        # The offsets topic of a new cluster is still being made.
        E.UNKNOWN_TOPIC_OR_PARTITION: Reaction.RETRY,
        E.FENCED_INSTANCE_ID: Reaction.ABORT,
    },
    "Produce": {
        # Only Kafka before 3 sends it; the batch is in the log.
        E.DUPLICATE_SEQUENCE_NUMBER: Reaction.DONE,
        E.OUT_OF_ORDER_SEQUENCE_NUMBER: Reaction.OUT_OF_ORDER,
        E.CONCURRENT_TRANSACTIONS: Reaction.RETRY,
        E.COORDINATOR_LOAD_IN_PROGRESS: Reaction.RETRY,
        E.COORDINATOR_NOT_AVAILABLE: Reaction.RETRY,
        E.NOT_COORDINATOR: Reaction.RETRY,
        E.NOT_ENOUGH_REPLICAS: Reaction.RETRY,
        E.NOT_ENOUGH_REPLICAS_AFTER_APPEND: Reaction.RETRY,
        E.REQUEST_TIMED_OUT: Reaction.RETRY,
        E.INVALID_TXN_STATE: Reaction.ABORT,
        # A batch that is damaged in memory stays so; sending it again for 30 s helps nobody.
        E.CORRUPT_MESSAGE: Reaction.ABORT,
    },
    "EndTxn": _COORDINATOR | {E.INVALID_TXN_STATE: Reaction.NOT_OPEN},
}


def reaction_to(kind: str, code: int) -> Reaction:
    """The reaction to an error code in the answer of this kind of request."""
    if code == 0:
        return Reaction.DONE
    try:
        known = ErrorCode(code)
    except ValueError:
        return Reaction.FATAL
    found = _TABLE[kind].get(known)
    if found is not None:
        return found
    cls = error_class(known)
    if issubclass(cls, Retriable):
        return Reaction.REFRESH
    if issubclass(cls, Fenced):
        return Reaction.FENCED
    return Reaction.ABORT if issubclass(cls, AbortTransaction) else Reaction.FATAL
