"""Reading a log: offsets, whole batches, aborted transactions, times. Nothing here changes what is on the disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from semel.disk import disk
from semel.errors import ConfigurationError, CorruptBatch, ErrorCode
from semel.log.errors import LogError, storage_error
from semel.log.files import FileHandle
from semel.log.partition import PartitionState
from semel.log.recovery import rebuild_indexes
from semel.log.segments import Segment
from semel.wire.records import decode_records

__all__ = ["ProducerInfo", "ReadableLog", "Slice"]

_INDEXES_LOADED = 8
"""Closed segments whose index is in memory at once, 1-6 MB each."""


class Slice(NamedTuple):
    """Bytes of a file, to be copied to a socket. The file stays open and readable while a slice holds it."""

    file: FileHandle
    position: int
    length: int


class ProducerInfo(NamedTuple):
    """One producer as DescribeProducers shows it; -1 for none."""

    producer_id: int
    epoch: int
    last_sequence: int
    last_timestamp_ms: int
    coordinator_epoch: int
    first_offset: int
    """First offset of its open transaction."""


class ReadableLog:
    """One partition's log, as far as it is only looked at."""

    def __init__(self, topic: str, partition: int, state: PartitionState, segments: list[Segment]) -> None:
        self.topic = topic
        self.partition = partition
        self._state = state
        self._segments = segments
        self._loaded: list[Segment] = []

    # --- Offsets and transactions ---

    @property
    def state(self) -> PartitionState:
        """Offsets and producers, to be looked at only."""
        return self._state

    @property
    def segments(self) -> Sequence[Segment]:
        """From the first to the one that grows, to be looked at only."""
        return self._segments

    @property
    def log_start_offset(self) -> int:
        """The first offset that can be read."""
        return self._state.log_start_offset

    @property
    def log_end_offset(self) -> int:
        """The offset that the next record gets."""
        return self._state.log_end_offset

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self._segments)

    @property
    def high_watermark(self) -> int:
        """Where a read_uncommitted reader stops."""
        return self._state.high_watermark

    @property
    def last_stable_offset(self) -> int:
        """Where a read_committed reader stops."""
        return self._state.last_stable_offset

    def is_transaction_open(self, producer_id: int, producer_epoch: int) -> bool:
        """Whether this producer, with this epoch, has a transaction open here."""
        return self._state.is_transaction_open(producer_id, producer_epoch)

    def is_fenced(self, producer_id: int, producer_epoch: int) -> bool:
        """Whether a later epoch of this producer wrote here."""
        return self._state.is_fenced(producer_id, producer_epoch)

    def open_transactions(self) -> list[tuple[int, int, int]]:
        """(producer id, epoch, first offset) of each open transaction, oldest first."""
        return self._state.open_transactions()

    def producers(self) -> list[ProducerInfo]:
        """Every producer that this partition knows."""
        return [
            ProducerInfo(
                entry.producer_id,
                entry.epoch,
                entry.last_sequence,
                entry.last_timestamp_ms,
                entry.coordinator_epoch,
                entry.first_offset,
            )
            for entry in self._state.producers.entries.values()
        ]

    # --- Indexes ---

    def _remember_loaded(self, segment: Segment) -> None:
        """A closed segment's index is in memory; drop the one that came first when there are too many."""
        self._loaded.append(segment)
        if len(self._loaded) > _INDEXES_LOADED:
            self._loaded.pop(0).index = None

    def loaded(self, segment: Segment) -> Segment:
        """The segment with its index in memory, made anew if need be. Raises OSError, `LogError` for damage."""
        if segment.index is None:
            if not segment.load_index():
                rebuild_indexes(self._segments, 0)
                for other in self._segments[:-1]:
                    if other is not segment and other not in self._loaded:
                        other.index = None
            self._remember_loaded(segment)
        return segment

    # --- Reading ---

    def read(self, offset: int, max_bytes: int, upper_offset: int, min_one: bool = True) -> list[Slice]:
        """Whole batches from the one that holds `offset` on, all below `upper_offset`, of `max_bytes` at most.

        With `min_one` the first batch comes whatever its size. Nothing when `offset` is at the end, or at or above
        `upper_offset`. Raises `LogError`: OFFSET_OUT_OF_RANGE, KAFKA_STORAGE_ERROR.
        """
        state = self._state
        if not state.log_start_offset <= offset <= state.log_end_offset:
            raise self._out_of_range(offset)
        upper = min(upper_offset, state.high_watermark)
        slices: list[Slice] = []
        try:
            while offset < upper and (max_bytes > 0 or (min_one and not slices)):
                segment = self.loaded(self._segments[self._segment_at(offset)])
                position, length = segment.cut(offset, max(max_bytes, 0), upper, min_one and not slices)
                if length == 0:
                    break
                slices.append(Slice(segment.file, position, length))
                max_bytes -= length
                if position + length < segment.size:
                    break
                offset = segment.end_offset
        except (OSError, CorruptBatch) as problem:
            raise storage_error(f"{self.topic}-{self.partition} cannot be read", problem) from problem
        return slices

    def end_of(self, offset: int, slices: Sequence[Slice]) -> int:
        """The offset behind the last batch of what `read` has just given for `offset`. Raises `LogError`."""
        segment = self._segments[self._segment_at(offset) + len(slices) - 1]  # There is one slice a segment.
        file, position, length = slices[-1]
        if position + length >= segment.size:
            return segment.end_offset
        try:
            return int.from_bytes(disk.pread(file, 8, position + length), "big")  # The base offset of the next batch.
        except OSError as problem:
            raise storage_error(f"{self.topic}-{self.partition} cannot be read", problem) from problem

    def read_bytes(self, offset: int, max_bytes: int, upper_offset: int, min_one: bool = True) -> bytes:
        """The bytes of `read`."""
        slices = self.read(offset, max_bytes, upper_offset, min_one)
        try:
            return b"".join(disk.pread(file, length, position) for file, position, length in slices)
        except OSError as problem:
            raise storage_error(f"{self.topic}-{self.partition} cannot be read", problem) from problem

    def _segment_at(self, offset: int) -> int:
        """The segment that holds `offset`; the last one is the usual case."""
        segments = self._segments
        if offset >= segments[-1].base_offset:
            return len(segments) - 1
        return bisect_right(segments, offset, key=lambda segment: segment.base_offset) - 1

    def aborted_transactions(self, fetch_offset: int, upper_offset: int) -> list[tuple[int, int]]:
        """(producer id, first offset) of aborted transactions in [fetch_offset, upper_offset), by first offset.

        One whose marker is at `fetch_offset` is among them. Raises `LogError` KAFKA_STORAGE_ERROR.
        """
        found: list[tuple[int, int]] = []
        try:
            for at in range(max(self._segment_at(fetch_offset), 0), len(self._segments)):
                segment = self.loaded(self._segments[at])
                assert segment.index is not None
                if segment.index.aborted.collect(fetch_offset, upper_offset, found):
                    break
                if at + 1 < len(self._segments) and segment.stable_offset >= upper_offset:
                    break
        except (OSError, CorruptBatch) as problem:
            raise storage_error(f"{self.topic}-{self.partition} cannot be read", problem) from problem
        found.sort(key=lambda entry: entry[1])
        return found

    def offset_for_timestamp(self, timestamp_ms: int) -> tuple[int, int, int] | None:
        """(offset, timestamp, leader epoch) of the first record at or after a time, markers included; None for none.

        Raises `LogError` KAFKA_STORAGE_ERROR.
        """
        try:
            for segment in self._segments:
                if segment.max_timestamp >= timestamp_ms and segment.end_offset > self._state.log_start_offset:
                    found = self._search(self.loaded(segment), timestamp_ms)
                    if found is not None:
                        return found
        except (OSError, CorruptBatch) as problem:
            raise storage_error(f"{self.topic}-{self.partition} cannot be read", problem) from problem
        return None

    def max_timestamp_offset(self) -> tuple[int, int, int] | None:
        """(offset, timestamp, leader epoch) of the first record with the largest timestamp; None when empty."""
        newest = [segment.max_timestamp for segment in self._segments if segment.size]
        return self.offset_for_timestamp(max(newest)) if newest else None

    def _search(self, segment: Segment, timestamp_ms: int) -> tuple[int, int, int] | None:
        assert segment.index is not None
        start = segment.index.position_for_timestamp(timestamp_ms)
        if start is None:
            return None
        for position, header in segment.walk(start):
            if header.max_timestamp < timestamp_ms or header.last_offset < self._state.log_start_offset:
                continue
            batch = disk.pread(segment.file, header.size, position)
            try:
                records = decode_records(batch, 0, header, self.topic, self.partition)
            except (ConfigurationError, CorruptBatch):
                # Its codec is not installed here, or a client sent what is no record: the batch stands for the record.
                first = max(header.base_offset, self._state.log_start_offset)
                return first, header.max_timestamp, header.partition_leader_epoch
            for record in records:
                if record.timestamp_ms >= timestamp_ms and record.offset >= self._state.log_start_offset:
                    return record.offset, record.timestamp_ms, header.partition_leader_epoch
        return None

    def _out_of_range(self, offset: int) -> LogError:
        state = self._state
        return LogError(
            ErrorCode.OFFSET_OUT_OF_RANGE,
            f"offset {offset} of {self.topic}-{self.partition} is not in "
            f"{state.log_start_offset}..{state.log_end_offset}",
        )
