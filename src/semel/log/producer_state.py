"""What one partition remembers of each producer: epoch, last five batches, open transaction. No IO.

The rules are those of Kafka's ProducerStateManager (KIP-98, KIP-360, KIP-890), as measured on Apache Kafka 4.3.1. Two
differences, on purpose: all five batches are kept over a restart, and a producer's age is counted by the broker's
clock, not by the timestamps that it sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from semel.errors import ErrorCode
from semel.log.errors import LogError

__all__ = ["WINDOW", "ProducerEntry", "Producers", "RememberedBatch", "last_sequence"]

WINDOW = 5
"""Batches remembered per producer; clients keep at most so many in flight."""
_SEQUENCE_MASK = 0x7FFF_FFFF
"""Sequences run from 0 to 2^31-1 and start again."""


class RememberedBatch(NamedTuple):
    """One appended batch: its sequences and offsets, first and last, and its largest timestamp."""

    first_sequence: int
    last_sequence: int
    base_offset: int
    last_offset: int
    timestamp_ms: int


class ProducerEntry(msgspec.Struct, array_like=True):
    """One producer id as this partition knows it. -1 stands for "none" everywhere."""

    producer_id: int
    epoch: int
    coordinator_epoch: int = -1
    first_offset: int = -1
    """First offset of its open transaction."""
    marker_offset: int = -1
    """Its newest marker, as long as no batch of its current epoch follows."""
    last_timestamp_ms: int = -1
    last_append_ms: int = -1
    """The broker's clock at its last append."""
    batches: list[RememberedBatch] = msgspec.field(default_factory=list)
    """At most `WINDOW`, oldest first, all of the current epoch."""

    @property
    def last_sequence(self) -> int:
        return self.batches[-1].last_sequence if self.batches else -1


def last_sequence(first: int, count: int) -> int:
    """The sequence of the last of `count` records from `first` on."""
    return (first + count - 1) & _SEQUENCE_MASK


class Producers:
    """The producers of one partition, by id. `check*` decides, `apply*` records what is in the log."""

    __slots__ = ("entries",)

    def __init__(self, entries: Iterable[ProducerEntry] = ()) -> None:
        self.entries: dict[int, ProducerEntry] = {entry.producer_id: entry for entry in entries}

    def __repr__(self) -> str:
        return f"<Producers {len(self.entries)}>"

    # --- Data batches ---

    def check(
        self,
        producer_id: int,
        epoch: int,
        first_sequence: int,
        count: int,
        *,
        transactional: bool,
        transaction_version: int,
    ) -> RememberedBatch | None:
        """Decide on a data batch: None to append it, or the earlier batch that it repeats exactly.

        Raises `LogError`: INVALID_PRODUCER_EPOCH for an old epoch, OUT_OF_ORDER_SEQUENCE_NUMBER for a gap or an
        overlap, INVALID_TXN_STATE for a batch outside the producer's open transaction.
        """
        entry = self.entries.get(producer_id)
        if entry is None:
            # Nothing is known, so any sequence goes (state expires). With transactions V2 every transaction
            # starts at 0, so anything else is a straggler of an older one (KIP-890).
            if transactional and transaction_version >= 2 and first_sequence != 0:
                raise _out_of_order(producer_id, epoch, first_sequence, "nothing; a transaction starts at 0")
            return None
        if entry.epoch == epoch and entry.batches:
            newest = entry.batches[-1]
            if (newest.last_sequence + 1) & _SEQUENCE_MASK != first_sequence:
                last = last_sequence(first_sequence, count)
                for batch in entry.batches:
                    if batch.first_sequence == first_sequence and batch.last_sequence == last:
                        return batch
                if epoch >= 0:  # Kafka puts no order on a producer without an epoch.
                    raise _out_of_order(producer_id, epoch, first_sequence, f"sequence {newest.last_sequence}")
        else:
            self._check_start(entry, epoch, first_sequence, transactional and transaction_version >= 2)
        if entry.first_offset >= 0 and not transactional:
            raise LogError(
                ErrorCode.INVALID_TXN_STATE,
                f"producer {producer_id} has a transaction open since offset {entry.first_offset}; "
                "it cannot append outside of it",
            )
        return None

    @staticmethod
    def _check_start(entry: ProducerEntry, epoch: int, first_sequence: int, must_be_zero: bool) -> None:
        """The first batch of an epoch (a client may raise its own epoch: KIP-360)."""
        if epoch < entry.epoch:
            raise LogError(
                ErrorCode.INVALID_PRODUCER_EPOCH,
                f"producer {entry.producer_id} sent epoch {epoch}, but epoch {entry.epoch} has been here",
            )
        # An entry without an epoch (-1) knows as little as no entry.
        if first_sequence != 0 and (entry.epoch >= 0 or must_be_zero):
            raise _out_of_order(entry.producer_id, epoch, first_sequence, "nothing in this epoch; it starts at 0")

    def apply(
        self,
        producer_id: int,
        epoch: int,
        batch: RememberedBatch,
        *,
        transactional: bool,
        now_ms: int,
    ) -> bool:
        """Remember an appended data batch. True when it opened a transaction."""
        entry = self._entry(producer_id, epoch)
        batches = entry.batches
        batches.append(batch)
        if len(batches) > WINDOW:
            del batches[0]
        entry.marker_offset = -1
        entry.last_timestamp_ms = batch.timestamp_ms
        entry.last_append_ms = now_ms
        if transactional and entry.first_offset < 0:
            entry.first_offset = batch.base_offset
            return True
        return False

    def _entry(self, producer_id: int, epoch: int) -> ProducerEntry:
        """What is known of a producer that now writes in this epoch; the batches of another one count no more."""
        entry = self.entries.get(producer_id)
        if entry is None:
            entry = self.entries[producer_id] = ProducerEntry(producer_id, epoch)
        elif entry.epoch != epoch:
            entry.epoch = epoch
            entry.batches.clear()
        return entry

    # --- Markers ---

    def check_marker(self, producer_id: int, epoch: int, coordinator_epoch: int, transaction_version: int) -> int:
        """Decide on a marker: the offset of the same one if it is there already, else -1.

        "The same" is: this producer's newest entry in the log is a marker of this epoch. With transactions V2 an epoch
        belongs to one transaction, so that is certain; with V1 it can also be the marker of an earlier transaction,
        when the current one wrote nothing here.

        Raises `LogError`: INVALID_PRODUCER_EPOCH for an old epoch (with V2 also for the epoch of an open transaction:
        its marker has the next one), TRANSACTION_COORDINATOR_FENCED for an old coordinator.
        """
        entry = self.entries.get(producer_id)
        if entry is None:
            return -1
        is_open = entry.first_offset >= 0
        if epoch < entry.epoch or (epoch == entry.epoch and is_open and transaction_version >= 2):
            raise LogError(
                ErrorCode.INVALID_PRODUCER_EPOCH,
                f"a marker of producer {producer_id} has epoch {epoch}, but epoch {entry.epoch} has been here",
            )
        if coordinator_epoch < entry.coordinator_epoch:
            raise LogError(
                ErrorCode.TRANSACTION_COORDINATOR_FENCED,
                f"a marker of producer {producer_id} comes from coordinator epoch {coordinator_epoch}, "
                f"but {entry.coordinator_epoch} has been here",
            )
        return entry.marker_offset if epoch == entry.epoch and not is_open else -1

    def apply_marker(
        self, producer_id: int, epoch: int, coordinator_epoch: int, offset: int, timestamp_ms: int, now_ms: int
    ) -> int:
        """Remember an appended marker. Returns the first offset of the transaction that it ended, -1 for none."""
        entry = self._entry(producer_id, epoch)
        first_offset, entry.first_offset = entry.first_offset, -1
        entry.coordinator_epoch = coordinator_epoch
        entry.marker_offset = offset
        entry.last_timestamp_ms = timestamp_ms
        entry.last_append_ms = now_ms
        return first_offset

    # --- Age ---

    def expire(self, before_ms: int) -> int:
        """Forget producers whose last append was before `before_ms`, except in a transaction. Returns how many."""
        old = [
            entry.producer_id
            for entry in self.entries.values()
            if entry.last_append_ms < before_ms and entry.first_offset < 0
        ]
        for producer_id in old:
            del self.entries[producer_id]
        return len(old)


def _out_of_order(producer_id: int, epoch: int, sequence: int, known: str) -> LogError:
    return LogError(
        ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER,
        f"producer {producer_id}, epoch {epoch}, sent sequence {sequence} after {known}",
    )
