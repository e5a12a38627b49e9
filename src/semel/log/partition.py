"""Offsets and transactions of one partition, without its bytes. No IO.

`check_*` decides on an append, `apply_*` records it at the log's end, `advance` says how far the log can be read. On
one node the three come right after each other; a write in another thread may come between `apply` and `advance`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from semel.log.producer_state import ProducerEntry, Producers, RememberedBatch, last_sequence
from semel.wire.records import BatchHeader

__all__ = ["AbortedIndex", "AbortedTransaction", "PartitionState"]


class AbortedTransaction(NamedTuple):
    """An aborted transaction: from its first record to its marker. Kafka's .txnindex has the same fields."""

    producer_id: int
    first_offset: int
    last_offset: int
    last_stable_offset: int
    """The last stable offset once it had ended: every transaction that ended later starts there or after."""


class AbortedIndex:
    """Aborted transactions in the order of their markers; 32 bytes each."""

    __slots__ = ("first_offsets", "last_offsets", "last_stable_offsets", "producer_ids")

    def __init__(self) -> None:
        self.producer_ids = array("q")
        self.first_offsets = array("q")
        self.last_offsets = array("q")
        self.last_stable_offsets = array("q")

    def __len__(self) -> int:
        return len(self.last_offsets)

    def __repr__(self) -> str:
        return f"<AbortedIndex {len(self)}>"

    def columns(self) -> tuple[array[int], array[int], array[int], array[int]]:
        """The arrays, in the order of `AbortedTransaction`."""
        return self.producer_ids, self.first_offsets, self.last_offsets, self.last_stable_offsets

    def add(self, aborted: AbortedTransaction) -> None:
        for column, value in zip(self.columns(), aborted, strict=True):
            column.append(value)

    def ended_by(self, marker_offset: int) -> AbortedTransaction | None:
        """The transaction that the marker at this offset aborted."""
        at = bisect_left(self.last_offsets, marker_offset)
        if at == len(self) or self.last_offsets[at] != marker_offset:
            return None
        return AbortedTransaction(*(column[at] for column in self.columns()))

    def collect(self, fetch_offset: int, upper_offset: int, found: list[tuple[int, int]]) -> bool:
        """Add (producer id, first offset) of each that overlaps [fetch_offset, upper_offset) to `found`.

        True when no later transaction can overlap.
        """
        for at in range(bisect_left(self.last_offsets, fetch_offset), len(self)):
            if self.first_offsets[at] < upper_offset:
                found.append((self.producer_ids[at], self.first_offsets[at]))
            if self.last_stable_offsets[at] >= upper_offset:
                return True
        return False


class PartitionState:
    """One partition's offsets, producers and open transactions.

    `last_stable_offset` is where a read_committed reader stops: the first record of the oldest transaction that is
    open or whose marker is not below the high watermark, and never below the log's start.
    """

    __slots__ = (
        "_ending",
        "_open",
        "high_watermark",
        "last_stable_offset",
        "log_end_offset",
        "log_start_offset",
        "producers",
    )

    def __init__(self, log_start_offset: int, log_end_offset: int, producers: Iterable[ProducerEntry] = ()) -> None:
        self.log_start_offset = log_start_offset
        self.log_end_offset = log_end_offset
        self.high_watermark = log_end_offset
        self.producers = Producers(producers)
        started = [entry for entry in self.producers.entries.values() if entry.first_offset >= 0]
        started.sort(key=lambda entry: entry.first_offset)
        # By producer id; transactions start at the log's end, so the first one in the dict is the oldest.
        self._open: dict[int, int] = {entry.producer_id: entry.first_offset for entry in started}
        # (marker's offset, first offset) of transactions whose marker cannot be read yet.
        self._ending: deque[tuple[int, int]] = deque()
        self.last_stable_offset = log_end_offset
        self.advance(log_end_offset)

    def __repr__(self) -> str:
        return (
            f"<PartitionState {self.log_start_offset}..{self.log_end_offset} "
            f"high watermark {self.high_watermark} stable {self.last_stable_offset} open {len(self._open)}>"
        )

    def check_batch(self, header: BatchHeader, transaction_version: int) -> RememberedBatch | None:
        """None to append this data batch, or the earlier one that it repeats. Raises `LogError`: `Producers.check`."""
        if header.producer_id < 0:
            return None
        return self.producers.check(
            header.producer_id,
            header.producer_epoch,
            header.base_sequence,
            header.record_count,
            transactional=header.is_transactional,
            transaction_version=transaction_version,
        )

    def apply_batch(self, header: BatchHeader, timestamp_ms: int, now_ms: int) -> None:
        """A data batch is at the log's end; `timestamp_ms` is its largest timestamp.

        Compaction may have taken some of its records, or all: the offsets and sequences are those that it came with.
        """
        base_offset = self.log_end_offset
        last_offset = base_offset + header.last_offset_delta
        producer_id = header.producer_id
        if producer_id >= 0:
            first = header.base_sequence
            newest = last_sequence(first, header.last_offset_delta + 1)
            batch = RememberedBatch(first, newest, base_offset, last_offset, timestamp_ms)
            if self.producers.apply(
                producer_id, header.producer_epoch, batch, transactional=header.is_transactional, now_ms=now_ms
            ):
                self._open[producer_id] = base_offset
        self.log_end_offset = last_offset + 1

    def apply_marker(
        self, producer_id: int, epoch: int, commit: bool, coordinator_epoch: int, timestamp_ms: int, now_ms: int
    ) -> AbortedTransaction | None:
        """A marker is at the log's end. Returns the transaction that it aborted, if there was one with data here."""
        offset = self.log_end_offset
        first_offset = self.producers.apply_marker(producer_id, epoch, coordinator_epoch, offset, timestamp_ms, now_ms)
        self.log_end_offset = offset + 1
        if first_offset < 0:
            return None
        del self._open[producer_id]
        self._ending.append((offset, first_offset))
        if commit:
            return None
        return AbortedTransaction(producer_id, first_offset, offset, self.first_open_offset())

    def first_open_offset(self) -> int:
        """First offset of the oldest open transaction; the log's end when none is open."""
        return next(iter(self._open.values()), self.log_end_offset)

    def advance(self, high_watermark: int) -> None:
        """Everything below `high_watermark` is written and may be read."""
        self.high_watermark = high_watermark
        ending = self._ending
        while ending and ending[0][0] < high_watermark:
            ending.popleft()
        stable = high_watermark
        if self._open:
            stable = min(stable, next(iter(self._open.values())))
        for _, first_offset in ending:
            stable = min(stable, first_offset)
        self.last_stable_offset = max(stable, self.log_start_offset)

    def raise_log_start(self, offset: int) -> None:
        """Records below `offset` are gone, also from under an open transaction."""
        self.log_start_offset = max(self.log_start_offset, offset)
        self.last_stable_offset = max(self.last_stable_offset, self.log_start_offset)

    def is_transaction_open(self, producer_id: int, epoch: int) -> bool:
        """Whether this producer has a transaction open here, with this epoch."""
        return producer_id in self._open and self.producers.entries[producer_id].epoch == epoch

    def is_fenced(self, producer_id: int, epoch: int) -> bool:
        """Whether a later epoch of this producer is known here."""
        entry = self.producers.entries.get(producer_id)
        return entry is not None and entry.epoch > epoch

    def open_transactions(self) -> list[tuple[int, int, int]]:
        """(producer id, epoch, first offset) of each open transaction, oldest first."""
        entries = self.producers.entries
        return [(producer_id, entries[producer_id].epoch, first) for producer_id, first in self._open.items()]
