"""Compaction: of the records with one key, only the last one stays.

A *pass* reads the closed segments of a log twice. First it learns, from the part that no pass has seen yet, the offset
of each key's last record; then it writes every segment anew without the records that a later one replaces, and puts
the new file in the old one's place. Small neighbours become one segment. Offsets never move: a batch keeps its own and
its sequences, however many of its records are left.

What a pass leaves and takes (KIP-98, KIP-534; Kafka's LogCleaner does the same):

- It ends at the oldest open transaction and before the segment that grows, so every batch that it meets was committed
  or aborted. Records of aborted transactions go, and never replace anything.
- A record without value (a tombstone) stays until `delete.retention.ms` after the pass that first met it: the batch
  says when, in its *delete horizon*. Readers who began below it learn of the deletion in time.
- A marker goes in the same way, once nothing is left of its transaction. With it goes its line in the index of aborted
  transactions: without a marker, readers would take the producer's next transaction for the aborted one.
- The batches that the idempotence window remembers stay, empty if need be, so that producers are known by the log
  alone. So does the end of a segment: each ends where the next begins.
- Records without a key, from before the topic was compacted, go; the log file says how many.

*Ownership.* A pass runs in the thread of the log, a step at a time: `Compactor.begin` gives an iterator, and each
`next` reads at most `STEP_BYTES` or one batch, which costs no more than its append to this topic did. Between steps the
log is appended to, read, shortened and closed as if nothing were going on, because a pass touches only closed
segments, which never change, and files of its own. The one moment at which it changes the log is
`CompactedLog.replace`, a single step, which refuses when retention took one of the segments meanwhile.

*Crashes.* The new file is synced under a name that recovery deletes; then its index is written; then it is renamed
over the first segment that it replaces - from here on it counts - and the others are deleted. Recovery deletes a
segment that lies within the one before it. Readers hold the old files by their descriptors.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from semel.disk import disk
from semel.errors import ConfigurationError, CorruptBatch
from semel.failpoints import failpoint
from semel.log.errors import storage_error
from semel.log.files import CLEANED_SUFFIX, FileHandle, write_atomically
from semel.log.partition import AbortedTransaction, PartitionState
from semel.log.segments import Segment
from semel.log.validation import LogConfig
from semel.types import Record
from semel.wire.records import (
    BATCH_OVERHEAD,
    BatchHeader,
    check_crc,
    decode_records,
    empty_batch,
    iter_batches,
    read_header,
    rewrite_batch,
)

__all__ = ["CompactedLog", "Compactor", "Passed"]

STEP_BYTES = 64 << 10
"""Bytes of batches a step reads: one to three milliseconds of the event loop."""
READ_BYTES = 1 << 20
WRITE_BYTES = 256 << 10
SYNC_BYTES = 4 << 20
"""The new file is synced after so many bytes, so that no sync has to wait for a whole segment."""
KEY_MAP_BYTES = 64 << 20
"""Memory for the keys of one pass, about 350,000 of them; a log with more new keys takes several passes."""
KEY_OVERHEAD = 170
"""What a key costs beside its own bytes: two objects and a place in a dict that grows by doubling."""
_CHECKPOINT_FILE = "cleaner-checkpoint"
_log = logging.getLogger(__name__)


class CompactedLog(Protocol):
    """What a pass needs of its log."""

    directory: Path
    topic: str
    partition: int
    config: LogConfig

    @property
    def has_stopped(self) -> bool: ...

    @property
    def state(self) -> PartitionState: ...

    @property
    def segments(self) -> Sequence[Segment]:
        """From the first to the one that grows."""
        ...

    def loaded(self, segment: Segment) -> Segment:
        """The segment with its index in memory. Raises OSError, `LogError`."""
        ...

    def aborted_transactions(self, fetch_offset: int, upper_offset: int) -> list[tuple[int, int]]: ...

    def replace(self, old: Sequence[Segment], new: Segment, cleaned: Path) -> bool:
        """Put `new`, whose bytes are in `cleaned`, in the place of `old`; False when those are not all there any more.

        Raises OSError, `LogError`; `cleaned` is the caller's to delete then.
        """
        ...


class Passed(NamedTuple):
    """What a pass did, in bytes and records."""

    bytes_before: int
    bytes_after: int
    records_dropped: int


class Compactor:
    """Compacts one log, pass by pass. `last` is what the last pass did."""

    def __init__(self, log: CompactedLog) -> None:
        self._log = log
        self._checkpoint: tuple[int, int] | None = None
        self._given_up = False
        self.last: Passed | None = None

    def __repr__(self) -> str:
        return f"<Compactor of {self._log.topic}-{self._log.partition}, clean to {self.clean_to}>"

    @property
    def clean_to(self) -> int:
        """Below this offset passes have been; at it the part begins that none has seen."""
        offset, _ = self._read_checkpoint()
        segments = self._log.segments
        # A log that was begun anew after a loss of power is shorter than the checkpoint says.
        return offset if offset <= segments[-1].base_offset else segments[0].base_offset

    def begin(self, now_ms: int) -> Iterator[None] | None:
        """A pass, if one is due: it goes on by a step at every `next`, which may raise `LogError`. One at a time.

        Due is what Kafka's settings say: `min.cleanable.dirty.ratio`, `min.compaction.lag.ms`,
        `max.compaction.lag.ms` - and, unlike in Kafka, tombstones and markers whose time has come.
        """
        log = self._log
        if not log.config.is_compacted or self._given_up or log.has_stopped:
            return None
        closed = self._cleanable(now_ms)
        return self._run(closed, now_ms) if closed and self._is_due(closed, now_ms) else None

    def _cleanable(self, now_ms: int) -> list[Segment]:
        """The closed segments that a pass may touch, from the log's first on."""
        segments, state = self._log.segments, self._log.state
        if len(segments) > 1 and segments[1].base_offset <= state.log_start_offset:
            return []  # Records were deleted and their files could not be: they are, before anything is merged.
        stable = min(state.last_stable_offset, state.first_open_offset())
        youngest = now_ms - self._log.config.min_compaction_lag_ms
        cleanable: list[Segment] = []
        for segment in segments[:-1]:
            is_too_young = segment.end_offset > self.clean_to and segment.max_timestamp > youngest
            if segment.end_offset > stable or (is_too_young and self._log.config.min_compaction_lag_ms):
                break
            cleanable.append(segment)
        return cleanable

    def _is_due(self, closed: Sequence[Segment], now_ms: int) -> bool:
        config, clean_to = self._log.config, self.clean_to
        _, horizon_ms = self._read_checkpoint()
        dirty = [segment for segment in closed if segment.end_offset > clean_to]
        if dirty:
            total = sum(segment.size for segment in closed)
            if sum(segment.size for segment in dirty) > config.min_cleanable_dirty_ratio * total:
                return True
            since_ms = min(segment.created_ms or segment.max_timestamp for segment in dirty)
            if since_ms < now_ms - config.max_compaction_lag_ms:
                return True
        return 0 <= horizon_ms <= now_ms

    def _run(self, closed: Sequence[Segment], now_ms: int) -> Iterator[None]:
        log = self._log
        what = f"{log.topic}-{log.partition} cannot be compacted"
        work = _Pass(log, closed, self.clean_to, now_ms)
        try:
            yield from work.steps()
        except (CorruptBatch, ConfigurationError) as problem:
            self._given_up = True  # Another pass would find the same.
            raise storage_error(f"{what} until the broker is restarted", problem) from problem
        except OSError as problem:
            raise storage_error(what, problem) from problem
        if work.is_complete:
            self._write_checkpoint(work.mapped_to, work.horizon_ms)
            self.last = work.result
            if work.keyless:
                _log.warning(
                    "%s-%d: %d records without a key were removed: the topic is compacted by key",
                    *(log.topic, log.partition, work.keyless),
                )

    def _read_checkpoint(self) -> tuple[int, int]:
        """(offset, earliest delete horizon, -1 for none). Only time is lost when the file is."""
        if self._checkpoint is None:
            try:
                offset, horizon_ms = disk.read(self._log.directory / _CHECKPOINT_FILE).split()
                self._checkpoint = max(int(offset), 0), int(horizon_ms)
            except (OSError, ValueError):
                self._checkpoint = 0, -1
        return self._checkpoint

    def _write_checkpoint(self, offset: int, horizon_ms: int) -> None:
        self._checkpoint = offset, horizon_ms
        try:
            write_atomically(self._log.directory / _CHECKPOINT_FILE, f"{offset} {horizon_ms}\n".encode(), durable=False)
        except OSError as problem:
            _log.warning("%s-%d will be compacted from its start: %s", self._log.topic, self._log.partition, problem)


class _Pass:
    """One pass over `closed`, which begin at the log's first segment."""

    def __init__(self, log: CompactedLog, closed: Sequence[Segment], clean_to: int, now_ms: int) -> None:
        self._log = log
        self._closed = closed
        self._clean_to = clean_to
        self._now_ms = now_ms
        self._offsets: dict[bytes, int] = {}
        self._key_bytes = 0
        self._since_step = 0
        self._with_records: set[int] = set()
        """Producers of whose current transaction something is left."""
        self._remembered: frozenset[int] = frozenset()
        self.mapped_to = closed[-1].end_offset
        """The key map speaks for all records below this offset."""
        self.horizon_ms = -1
        self.keyless = 0
        self.is_complete = False
        self._before = self._after = self._dropped = 0

    @property
    def result(self) -> Passed:
        return Passed(self._before, self._after, self._dropped)

    def steps(self) -> Iterator[None]:
        """Do the work. Raises OSError, `LogError`, `CorruptBatch`, `ConfigurationError`: what was replaced stays so."""
        yield from self._map_keys()
        for group in self._groups():
            output = _Output(self._log.directory, group)
            try:
                for segment in group:
                    if segment not in self._log.segments:
                        return  # Retention took it, and with it what the map was made of.
                    yield from self._copy(segment, output)
                if not self._put(group, output):
                    return
            finally:
                output.discard()
        self.is_complete = True

    # --- Where each key's last record is ---

    def _map_keys(self) -> Iterator[None]:
        for segment in self._closed:
            if segment.end_offset <= self._clean_to:
                continue
            if segment not in self._log.segments:
                return  # Retention took it; `steps` will see.
            aborted = _Aborted(self._log, segment)
            for chunk, at, header in self._batches(segment):
                if aborted.covers(header) or header.is_control or header.last_offset < self._clean_to:
                    pass
                elif self._key_bytes >= KEY_MAP_BYTES:
                    self.mapped_to = header.base_offset
                    return
                else:
                    self._map_batch(self._records(chunk, at, header))
                if self._is_step(header):
                    yield

    def _map_batch(self, records: list[Record]) -> None:
        offsets = self._offsets
        for record in records:
            if record.key is not None and record.offset >= self._clean_to:
                if record.key not in offsets:
                    self._key_bytes += len(record.key) + KEY_OVERHEAD
                offsets[record.key] = record.offset

    # --- What stays ---

    def _groups(self) -> Iterator[list[Segment]]:
        """Neighbours that fit into one segment together; those beyond the map are not touched."""
        group: list[Segment] = []
        size = 0
        for segment in self._closed:
            if segment.base_offset >= self.mapped_to:
                break
            if group and size + segment.size > self._log.config.segment_bytes:
                yield group
                group, size = [], 0
            group.append(segment)
            size += segment.size
        if group:
            yield group

    def _copy(self, segment: Segment, output: _Output) -> Iterator[None]:
        aborted = _Aborted(self._log, segment)
        index = self._log.loaded(segment).index
        assert index is not None
        self._remembered = _remembered(self._log.state)
        for chunk, at, header in self._batches(segment):
            if header.is_control:
                aborted.covers(header)
                data = self._marker(chunk, at, header)
                ended = index.aborted.ended_by(header.base_offset)
                if data is not None and ended is not None:
                    output.keep_aborted(ended)
            else:
                data = self._data(chunk, at, header, aborted.covers(header))
            if data is None:
                output.is_changed = True
            else:
                output.is_changed |= isinstance(data, bytearray)
                output.add(data)
            if self._is_step(header):
                yield

    def _data(self, chunk: bytes, at: int, header: BatchHeader, is_aborted: bool) -> memoryview | bytearray | None:
        """What stays of a data batch: all of it, a new batch, or nothing."""
        whole = memoryview(chunk)[at : at + header.size]
        if is_aborted:
            records, kept = [], []
            self._dropped += header.record_count
        elif header.base_offset >= self.mapped_to:
            self._keeps(header)
            return whole
        else:
            records = self._records(chunk, at, header)
            kept = [record for record in records if self._stays(record, header)]
            self._dropped += len(records) - len(kept)
        if not kept:
            if header.base_offset not in self._remembered:
                return None
            return empty_batch(header) if header.record_count or header.is_transactional else whole
        self._keeps(header)
        horizon_ms = header.delete_horizon_ms
        if any(record.value is None for record in kept):
            if horizon_ms is None:
                return self._with_horizon(header, kept)
            self._note_horizon(horizon_ms)
        return whole if len(kept) == len(records) else rewrite_batch(header, kept)

    def _stays(self, record: Record, header: BatchHeader) -> bool:
        if record.offset >= self.mapped_to:
            return True
        if record.key is None:
            self.keyless += 1
            return False
        if record.offset < self._offsets.get(record.key, -1):
            return False
        if record.value is not None:
            return True
        horizon_ms = header.delete_horizon_ms
        return horizon_ms is None or horizon_ms > self._now_ms

    def _marker(self, chunk: bytes, at: int, header: BatchHeader) -> memoryview | bytearray | None:
        whole = memoryview(chunk)[at : at + header.size]
        if header.producer_id in self._with_records or header.base_offset in self._remembered:
            self._with_records.discard(header.producer_id)
            return whole
        horizon_ms = header.delete_horizon_ms
        if horizon_ms is None:
            return self._with_horizon(header, self._records(chunk, at, header))
        if horizon_ms <= self._now_ms:
            return None
        self._note_horizon(horizon_ms)
        return whole

    def _keeps(self, header: BatchHeader) -> None:
        if header.is_transactional:
            self._with_records.add(header.producer_id)

    def _with_horizon(self, header: BatchHeader, records: Sequence[Record]) -> bytearray:
        horizon_ms = self._now_ms + self._log.config.delete_retention_ms
        try:
            batch = rewrite_batch(header, records, horizon_ms)
        except ValueError:
            # A timestamp of the year 292 million: its batch has no room for a horizon, and stays.
            return rewrite_batch(header, records)
        self._note_horizon(horizon_ms)
        return batch

    def _note_horizon(self, horizon_ms: int) -> None:
        self.horizon_ms = horizon_ms if self.horizon_ms < 0 else min(self.horizon_ms, horizon_ms)

    def _put(self, group: list[Segment], output: _Output) -> bool:
        """Put the new segment in the place of the old ones. False: the log was shortened, and the pass is over."""
        size = sum(segment.size for segment in group)
        self._before += size
        if len(group) == 1 and not output.is_changed:
            self._after += size
            return True
        output.finish()
        failpoint("compaction.after_write")
        self._after += output.segment.size
        return self._log.replace(group, output.segment, output.path)

    # --- Reading ---

    def _batches(self, segment: Segment) -> Iterator[tuple[bytes, int, BatchHeader]]:
        """Each batch: bytes, where in them it begins, and its header."""
        file = segment.file  # Held: the segment may be deleted, or its descriptor given up, before we are through.
        position, wanted = 0, READ_BYTES
        while position < segment.size:
            chunk = disk.pread(file, min(wanted, segment.size - position), position)
            used = 0
            for at, header in iter_batches(chunk):
                if not check_crc(chunk, at, header):
                    raise CorruptBatch(f"{segment.path} is damaged at byte {position + at}")
                yield chunk, at, header
                used = at + header.size
            if not used:
                wanted = read_header(chunk).size if len(chunk) >= BATCH_OVERHEAD else READ_BYTES
                if wanted <= len(chunk) or position + wanted > segment.size:
                    raise CorruptBatch(f"{segment.path} is damaged at byte {position}")
            else:
                wanted = READ_BYTES
            position += used

    def _records(self, chunk: bytes, at: int, header: BatchHeader) -> list[Record]:
        return decode_records(chunk, at, header, self._log.topic, self._log.partition)

    def _is_step(self, header: BatchHeader) -> bool:
        self._since_step += header.size
        if self._since_step < STEP_BYTES:
            return False
        self._since_step = 0
        return True


def _remembered(state: PartitionState) -> frozenset[int]:
    """The batches and markers that the producers of this log are known by."""
    entries = state.producers.entries.values()
    batches = {batch.base_offset for entry in entries for batch in entry.batches}
    return frozenset(batches.union(entry.marker_offset for entry in entries))


class _Aborted:
    """Finds the batches of aborted transactions in one segment, as a read_committed reader does."""

    def __init__(self, log: CompactedLog, segment: Segment) -> None:
        self._coming = deque(log.aborted_transactions(segment.base_offset, segment.end_offset))
        self._inside: set[int] = set()

    def covers(self, header: BatchHeader) -> bool:
        """Whether a data batch was aborted; a marker ends what it ends. To be asked for every batch, in order."""
        while self._coming and self._coming[0][1] <= header.last_offset:
            self._inside.add(self._coming.popleft()[0])
        if header.is_control:
            self._inside.discard(header.producer_id)
            return False
        return header.is_transactional and header.producer_id in self._inside


class _Output:
    """The segment that takes the place of a group, in a file that does not count yet."""

    def __init__(self, directory: Path, group: Sequence[Segment]) -> None:
        self.segment = Segment(directory, group[0].base_offset)
        self.segment.created_ms = min((old.created_ms for old in group if old.created_ms), default=0)
        self.path = directory / f"{self.segment.base_offset:020}{CLEANED_SUFFIX}"
        self.is_changed = False
        self._end_offset = group[-1].end_offset
        self._last: BatchHeader | None = None
        self._file = FileHandle(disk.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
        self._written = 0
        self._parts: list[memoryview | bytearray] = []
        self._waiting = self._unsynced = 0

    def add(self, batch: memoryview | bytearray) -> None:
        """Append a batch."""
        header = read_header(batch)
        timestamp_ms = header.max_timestamp if header.record_count else -1
        self.segment.added(header.size, header.next_offset, timestamp_ms)
        self._parts.append(batch)
        self._waiting += header.size
        if self._waiting >= WRITE_BYTES:
            self._write()

    def keep_aborted(self, entry: AbortedTransaction) -> None:
        """The marker that comes next ends an aborted transaction."""
        assert self.segment.index is not None
        self.segment.index.aborted.add(entry)

    def finish(self) -> None:
        """Bring the segment to the disk, up to the offset where the next one begins. Raises OSError."""
        if self.segment.end_offset < self._end_offset:
            self.add(_filler(self._end_offset - 1))
        self._write()
        disk.sync(self._file)

    def _write(self) -> None:
        data = b"".join(self._parts)
        failpoint("compaction.before_write", self._file, data, self._written)
        if disk.pwrite(self._file, data, self._written) != len(data):
            raise OSError(f"only a part of {self.path} could be written")
        self._written += len(data)
        self._parts, self._waiting = [], 0
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            disk.sync(self._file)
            self._unsynced = 0

    def discard(self) -> None:
        """Delete the file, unless it took its place."""
        disk.unlink(self.path)


def _filler(offset: int) -> bytearray:
    """An empty batch of nobody: it says that the log has this offset, and no more."""
    return empty_batch(BatchHeader(offset, 0, 0, 2, 0, 0, 0, -1, -1, -1, -1, -1, 0))
