"""The states of a transactional producer, their table, and its requests as values. Sans-IO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from semel.client.batches import Identity
from semel.types import GroupMetadata, TopicPartition

__all__ = ["MOVES", "Kind", "Request", "State", "TransactionView"]


class State(StrEnum):
    """Where the producer stands."""

    Uninitialized = "Uninitialized"
    """InitProducerId was never answered."""
    Ready = "Ready"
    """No transaction is open; `begin` may be called."""
    InTransaction = "InTransaction"
    Prepared = "Prepared"
    """All is written and acknowledged; a decision from outside comes next, and nothing else."""
    Committing = "Committing"
    Aborting = "Aborting"
    Abortable = "Abortable"
    """The transaction cannot be committed any more; `abort` comes next."""
    Suspect = "Suspect"
    """A broker refused our epoch; DescribeTransactions is being asked why."""
    Unknown = "Unknown"
    """EndTxn was written and never answered; `initialize` resolves it."""
    Fenced = "Fenced"
    Failed = "Failed"


MOVES: dict[State, frozenset[State]] = {
    State.Uninitialized: frozenset({State.Ready, State.Prepared, State.Suspect, State.Fenced, State.Failed}),
    State.Ready: frozenset({State.InTransaction, State.Suspect, State.Fenced, State.Failed}),
    State.InTransaction: frozenset(
        {
            State.Prepared,
            State.Committing,
            State.Aborting,
            State.Abortable,
            State.Suspect,
            State.Fenced,
            State.Failed,
        }
    ),
    State.Prepared: frozenset({State.Committing, State.Aborting}),
    State.Committing: frozenset({State.Ready, State.Abortable, State.Unknown, State.Suspect, State.Failed}),
    State.Aborting: frozenset({State.Ready, State.Unknown, State.Suspect, State.Failed}),
    State.Abortable: frozenset({State.Aborting, State.Suspect, State.Failed}),
    State.Suspect: frozenset({State.Abortable, State.Fenced, State.Failed}),
    State.Unknown: frozenset({State.Committing, State.Aborting, State.Ready, State.Suspect, State.Failed}),
    State.Fenced: frozenset(),
    State.Failed: frozenset({State.Uninitialized}),
}
"""Every allowed change of state; anything else is a bug here and stops the producer."""


class Kind(StrEnum):
    """The requests of a transaction, by their protocol names."""

    InitProducerId = "InitProducerId"
    AddPartitionsToTxn = "AddPartitionsToTxn"
    AddOffsetsToTxn = "AddOffsetsToTxn"
    Produce = "Produce"
    TxnOffsetCommit = "TxnOffsetCommit"
    EndTxn = "EndTxn"
    DescribeTransactions = "DescribeTransactions"


@dataclass(frozen=True, slots=True)
class Request:
    """One request to write; `identity` is what it must carry, `transaction_version` which of the two protocols."""

    kind: Kind
    identity: Identity
    transaction_version: int
    partitions: frozenset[TopicPartition] = frozenset()
    group: GroupMetadata | None = None
    offsets: Mapping[TopicPartition, int] = field(default_factory=dict)
    commit: bool = False
    two_phase: bool = False
    keep_prepared: bool = False


@dataclass(frozen=True, slots=True)
class TransactionView:
    """What DescribeTransactions says of our transactional id."""

    identity: Identity
    state: str
    timeout_ms: int
