"""Batches on their way to one partition: sequence numbers, order, and what is known about each copy. Sans-IO.

A broker accepts a producer's batches of a partition only in the order of their sequence numbers and remembers the
last five. So at most five are in flight, all to one broker; when one comes back undone, nothing more is sent until
all of them came back, and then they are sent again in order with the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple, Protocol

from semel.types import TopicPartition

__all__ = ["Batch", "Identity", "Lane", "Payload"]

SEQUENCES = 1 << 31
"""Sequence numbers run from 0 to 2,147,483,647 and start again at 0."""


class Identity(NamedTuple):
    """Who writes: a producer id and its epoch, which fences older owners of the id."""

    producer_id: int = -1
    epoch: int = -1

    def __str__(self) -> str:
        return f"{self.producer_id}:{self.epoch}"


class Payload(Protocol):
    """What `wire.records.BatchBuilder` gives: records that can be stamped with an identity late, and again."""

    @property
    def count(self) -> int: ...
    @property
    def size(self) -> int: ...
    def build(
        self,
        *,
        producer_id: int = -1,
        producer_epoch: int = -1,
        base_sequence: int = -1,
        transactional: bool = False,
        base_offset: int = 0,
    ) -> bytes: ...


class Batch:
    """Records of one partition that are written together; `deadline` is in the caller's seconds."""

    __slots__ = (
        "_encoded",
        "base_sequence",
        "count",
        "deadline",
        "identity",
        "in_flight",
        "partition",
        "payload",
        "reason",
        "size",
        "unanswered",
    )

    def __init__(self, partition: TopicPartition, payload: Payload, deadline: float) -> None:
        self.partition = partition
        self.payload = payload
        self.count = payload.count
        self.size = payload.size
        self.deadline = deadline
        self.identity: Identity | None = None
        """Stamped when it is first sent; a copy sent again carries the same identity and sequence."""
        self.base_sequence = -1
        self.in_flight = False
        self.unanswered = False
        """Whether any copy of it was written and got no answer: it may be in the log."""
        self.reason = "it was not sent yet"
        self._encoded: bytes | None = None

    def __repr__(self) -> str:
        return f"<Batch {self.partition} {self.count} records sequence={self.base_sequence} as {self.identity}>"

    def stamp(self, identity: Identity, base_sequence: int) -> None:
        """Give it the identity and sequence that every copy will carry."""
        assert not self.unanswered, "a batch that may be in the log must keep its sequence"
        self.identity = identity
        self.base_sequence = base_sequence
        self._encoded = None

    def encode(self, *, transactional: bool) -> bytes:
        """The bytes to send; the same bytes for every copy."""
        assert self.identity is not None
        if self._encoded is None:
            self._encoded = self.payload.build(
                producer_id=self.identity.producer_id,
                producer_epoch=self.identity.epoch,
                base_sequence=self.base_sequence,
                transactional=transactional,
            )
        return self._encoded


class Lane:
    """The batches of one partition, oldest first; those in flight are the first `in_flight` of them."""

    def __init__(self, max_in_flight: int) -> None:
        self.batches: deque[Batch] = deque()
        self.next_sequence = 0
        self.in_flight = 0
        self._max_in_flight = max_in_flight
        self._node: Hashable = None
        self._mending = False

    def __repr__(self) -> str:
        mending = ", sending again" if self._mending else ""
        return f"<Lane {len(self.batches)} batches, {self.in_flight} in flight, next {self.next_sequence}{mending}>"

    def add(self, batch: Batch) -> None:
        """Queue a batch behind the others."""
        self.batches.append(batch)

    def peek(self, node: Hashable) -> Batch | None:
        """The batch that may go to `node` now, if any."""
        if self.in_flight and (self._mending or self._node != node or self.in_flight >= self._max_in_flight):
            return None
        return self.batches[self.in_flight] if self.in_flight < len(self.batches) else None

    def send(self, batch: Batch, node: Hashable, identity: Identity) -> None:
        """Note that `batch`, which `peek` gave, is being sent to `node`; stamps it if it is new."""
        assert self.batches[self.in_flight] is batch
        if batch.identity is None:
            batch.stamp(identity, self.next_sequence)
            self.next_sequence = (self.next_sequence + batch.count) % SEQUENCES
        batch.in_flight = True
        self.in_flight += 1
        self._node = node

    def is_first(self, batch: Batch) -> bool:
        """Whether every batch before this one is known to be in the log."""
        return bool(self.batches) and self.batches[0] is batch

    def written(self, batch: Batch) -> None:
        """It is in the log."""
        self._landed(batch)
        self.batches.remove(batch)

    def undone(self, batch: Batch, reason: str, *, unanswered: bool = False) -> None:
        """It came back without being written, or its answer was lost: it will be sent again, in order."""
        self._landed(batch)
        batch.reason = reason
        batch.unanswered = batch.unanswered or unanswered
        self._mending = self.in_flight > 0

    def drop(self, batch: Batch) -> None:
        """Give a batch up that is not in flight; its sequence numbers stay used."""
        assert not batch.in_flight
        self.batches.remove(batch)

    def restart(self) -> None:
        """A new identity begins at sequence 0. What is queued and may not be in the log is stamped again."""
        assert self.in_flight == 0, "batches in flight carry the old identity"
        self.next_sequence = 0
        for batch in self.batches:
            batch.identity = None

    def _landed(self, batch: Batch) -> None:
        assert batch.in_flight
        batch.in_flight = False
        self.in_flight -= 1
        if self.in_flight == 0:
            self._mending = False
