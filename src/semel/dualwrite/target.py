"""Stores that are no SQL database: everything that a transaction does there is one step at its end.

So there is no transaction to keep open while Kafka works: the block gathers what is to be done, Kafka prepares the
records, and then the store does all of it, together with the decision, or nothing.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

from semel.errors import Fatal

__all__ = ["Guard", "LeftToAPerson", "Target"]

W = TypeVar("W", contravariant=True)


class Guard(NamedTuple):
    """The slot, whose it must be, and the decision that it gets. `before` is the last one; None: not known."""

    slot: str
    owner_epoch: int
    owner: str
    decision: str
    before: str | None = None


class LeftToAPerson(Fatal):
    """The step was done in part. Its Kafka transaction stays open until somebody decides it."""


class Target(Protocol, Generic[W]):
    """A connection to such a store. Used by one thread at a time; every call blocks."""

    is_fence_raised: bool
    """Whether an answer was lost, and so the fence of the slot raised: this owner writes under it no more."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and its connection is still there."""

    def begin(self) -> None:
        """Begin. Raises `Retriable` when the store is away."""

    def commit(self, work: W, guard: Guard | None) -> None:
        """The one step; without a guard there is no decision, because no record is sent.

        Raises `OutcomeUnknown` when nobody can tell within the limit whether it was done, and `LeftToAPerson`. After
        every other error of Semel's nothing happened, and nothing of it will.
        """

    def rollback(self) -> None:
        """Forget what was begun, without raising."""

    def close(self) -> None:
        """Close the connection, without raising."""
