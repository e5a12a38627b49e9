"""The log of one partition: check a batch, write it, count it in.

An append goes through three steps: *check* (validation, producers, offsets; nothing changes), *write* (bytes to the
file), *apply* (producers, offsets, index). When the write fails, nothing was applied and the file is as before.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from struct import pack_into
from typing import NamedTuple
from uuid import UUID

from crc32c import crc32c

from semel.disk import disk
from semel.errors import ErrorCode
from semel.failpoints import failpoint
from semel.log.compaction import Compactor
from semel.log.errors import LogError, storage_error
from semel.log.files import write_atomically
from semel.log.partition import PartitionState
from semel.log.reading import ProducerInfo, ReadableLog, Slice
from semel.log.recovery import RecoveryReport, recover, write_log_start
from semel.log.segments import Segment
from semel.log.snapshot import remove_older_snapshots, write_snapshot
from semel.log.sync import Sync
from semel.log.validation import LogConfig, validate
from semel.wire.records import (
    BatchBuilder,
    BatchHeader,
    control_batch,
    patch_base_offset,
    read_header,
    set_log_append_time,
)

__all__ = ["AppendResult", "LogConfig", "LogError", "PartitionLog", "ProducerInfo", "Slice"]

LEADER_EPOCH = 0
"""One node leads for ever."""
SNAPSHOT_BYTES = 64 << 20
SNAPSHOT_BATCHES = 4096
"""A snapshot after so many bytes or batches (and twice its own size in bytes): recovery reads no more than that."""
SYNC_AHEAD_BYTES = 32 << 20
"""In its second half a segment is synced whenever so much was added, so that its end makes nobody wait for long."""
_METADATA_FILE = "partition.metadata"
_log = logging.getLogger(__name__)


class AppendResult(NamedTuple):
    """Where a batch is. `log_append_time_ms` is -1 with CreateTime; a duplicate has its first copy's place."""

    base_offset: int
    last_offset: int
    log_append_time_ms: int
    log_start_offset: int
    duplicate: bool


class PartitionLog(ReadableLog):
    """One partition. Made by `open`; not safe for use from two threads at once."""

    def __init__(
        self,
        directory: Path,
        topic: str,
        partition: int,
        topic_id: UUID,
        config: LogConfig,
        state: PartitionState,
        segments: list[Segment],
        recovery: RecoveryReport,
    ) -> None:
        super().__init__(topic, partition, state, segments)
        self.directory = directory
        self.topic_id = topic_id
        self.config = config
        self.recovery = recovery
        self._failure: str | None = None
        self._sync_always = config.fsync == "always"
        self._sync_pending: Sync | None = None
        self._is_sync_due = False
        self._sync_ahead_at = 0
        self._plan_sync_ahead()
        # Counted since the last snapshot; what recovery had to read counts, or every crash would read it again.
        self._new_bytes = recovery.read_bytes
        self._new_batches = recovery.batches
        self._snapshot_size = 0
        self.compactor = Compactor(self)

    def __repr__(self) -> str:
        failure = f" FAILED: {self._failure}" if self._failure else ""
        return f"<PartitionLog {self.topic}-{self.partition} {self._state!r} {len(self._segments)} segments{failure}>"

    @classmethod
    def open(
        cls, directory: Path, topic: str, partition: int, topic_id: UUID, config: LogConfig, now_ms: int
    ) -> PartitionLog:
        """Open the log in `directory`, made if it is missing, and recover it.

        Raises `LogError`: INCONSISTENT_TOPIC_ID when it is another topic's, KAFKA_STORAGE_ERROR when it cannot be read.
        """
        try:
            disk.make_directory(directory)
            _check_owner(directory, topic_id, durable=config.fsync == "always")
            state, segments, report = recover(directory, now_ms)
            if config.fsync == "always":
                _make_durable(directory, segments, report)
        except OSError as problem:
            raise storage_error(f"the log of {topic}-{partition} in {directory} cannot be opened", problem) from problem
        return cls(directory, topic, partition, topic_id, config, state, segments, report)

    @property
    def has_stopped(self) -> bool:
        """Whether nothing is written any more until a restart: a sync failed, or the log was deleted."""
        return self._failure is not None

    def expire_producers(self, now_ms: int, expiration_ms: int = 86_400_000) -> int:
        """Forget producers that appended nothing for so long and have no transaction open. Returns how many."""
        return self._state.producers.expire(now_ms - expiration_ms)

    # --- Appending ---

    def append(
        self,
        batch: bytearray | memoryview,
        now_ms: int,
        *,
        transaction_version: int = 1,
        sync: bool = True,
    ) -> AppendResult:
        """Append one batch as a client sent it. It is written into: place, leader epoch, time of append.

        A batch that is there already is not appended again: the result has its place. Raises `LogError` with Kafka's
        code; nothing changed then, except that `batch` may have been written into.

        With `fsync="always"` and without `sync` the disk is not waited for: the high watermark stays until
        `begin_sync` and `end_sync`, and nobody may hear of the batch before it has passed `last_offset`.
        """
        state = self._state
        header = validate(batch, self.config, now_ms)
        append_time = self.config.is_log_append_time
        earlier = state.check_batch(header, transaction_version)
        if earlier is not None:
            return AppendResult(
                earlier.base_offset,
                earlier.last_offset,
                earlier.timestamp_ms if append_time else -1,
                state.log_start_offset,
                True,
            )
        base_offset = state.log_end_offset
        timestamp_ms = header.max_timestamp
        patch_base_offset(batch, 0, base_offset, LEADER_EPOCH)
        if append_time:
            timestamp_ms = now_ms
            set_log_append_time(batch, 0, now_ms)
        elif header.log_append_time:
            _set_create_time(batch, header)
        size = header.size
        synced = self._write(batch if len(batch) == size else memoryview(batch)[:size], sync=sync)
        state.apply_batch(header, timestamp_ms, now_ms)
        self._applied(size, timestamp_ms, synced=synced)
        return AppendResult(
            base_offset,
            base_offset + header.last_offset_delta,
            now_ms if append_time else -1,
            state.log_start_offset,
            False,
        )

    def append_marker(
        self,
        producer_id: int,
        producer_epoch: int,
        commit: bool,
        coordinator_epoch: int,
        now_ms: int,
        *,
        transaction_version: int = 1,
        unless_written: bool = True,
    ) -> int:
        """End a producer's transaction here; returns the marker's offset.

        A marker that is there already (see `Producers.check_marker`) is not written again, so that a coordinator can
        repeat itself after a crash. With transactions V1 that cannot be told from a second transaction without data
        here: pass `unless_written=False` where a marker is known to be the first, to give each its offset as Kafka
        does. `transaction_version` 2 demands, as WriteTxnMarkers v2 does, a higher epoch than the transaction's.

        Raises `LogError`: INVALID_PRODUCER_EPOCH, TRANSACTION_COORDINATOR_FENCED, KAFKA_STORAGE_ERROR.
        """
        state = self._state
        written = state.producers.check_marker(producer_id, producer_epoch, coordinator_epoch, transaction_version)
        if written >= 0 and unless_written:
            return written
        offset = state.log_end_offset
        marker = bytearray(
            control_batch(
                producer_id=producer_id,
                producer_epoch=producer_epoch,
                commit=commit,
                coordinator_epoch=coordinator_epoch,
                timestamp_ms=now_ms,
            )
        )
        patch_base_offset(marker, 0, offset, LEADER_EPOCH)
        if self.config.is_log_append_time:
            set_log_append_time(marker, 0, now_ms)
        self._write(marker)
        aborted = state.apply_marker(producer_id, producer_epoch, commit, coordinator_epoch, now_ms, now_ms)
        if aborted is not None:
            index = self._segments[-1].index
            assert index is not None
            index.aborted.add(aborted)
        self._applied(len(marker), now_ms)
        return offset

    def append_internal(self, records: Sequence[tuple[bytes | None, bytes | None]], now_ms: int) -> int:
        """Append the broker's own (key, value) records as one batch, of any size; returns the first one's offset.

        Raises `LogError` KAFKA_STORAGE_ERROR, and ValueError when there is no record.
        """
        builder = BatchBuilder()
        for key, value in records:
            builder.append(key, value, now_ms)
        base_offset = self._state.log_end_offset
        batch = bytearray(builder.build())
        patch_base_offset(batch, 0, base_offset, LEADER_EPOCH)
        self._write(batch)
        self._state.apply_batch(read_header(batch), now_ms, now_ms)
        self._applied(len(batch), now_ms)
        return base_offset

    def begin_sync(self) -> Sync | None:
        """What has to be run (in any thread) before `end_sync`; None when there is no need, or never will be.

        Raises `LogError` when the file cannot be opened.
        """
        active = self._segments[-1]
        if self._failure is not None or self._sync_pending:
            return None
        if self.high_watermark == self.log_end_offset and active.size < self._sync_ahead_at:
            return None
        try:
            self._sync_pending = Sync(active.file, self.log_end_offset)
        except OSError as problem:
            raise storage_error(f"{active.path} cannot be synced", problem) from problem
        self._sync_ahead_at = max(self._sync_ahead_at, active.size + SYNC_AHEAD_BYTES)
        return self._sync_pending

    def take_sync_due(self) -> bool:
        """Whether a sync ahead of the segment's end is due; says so once. Nobody has to wait for that sync."""
        due, self._is_sync_due = self._is_sync_due, False
        return due

    def end_sync(self, sync: Sync) -> None:
        """`sync` was run: what it brought to the disk may be read now. Raises `LogError`; the log has stopped then."""
        if sync is self._sync_pending:
            self._await_sync()
            if self._sync_always and self._is_snapshot_due():
                self.settle()
                self._snapshot(durable=True)

    def settle(self) -> None:
        """Wait until everything that was appended is on the disk, with `fsync="always"`. Raises `LogError`."""
        if self.high_watermark < self.log_end_offset:
            self._check_running()
            self._await_sync()
        if self.high_watermark < self.log_end_offset:
            self._sync(self._segments[-1])
            self._state.advance(self.log_end_offset)

    def _await_sync(self) -> None:
        """Take the outcome of a sync that is under way."""
        sync, self._sync_pending = self._sync_pending, None
        if sync is not None:
            sync.run()
            if sync.problem is not None:
                self._stop(self._segments[-1].path, sync.problem)
            self._state.advance(max(sync.end_offset, self.high_watermark))

    def _check_running(self) -> None:
        if self._failure is not None:
            raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, f"{self.topic}-{self.partition} has stopped: {self._failure}")

    def _write(self, data: bytearray | memoryview, *, sync: bool = True) -> bool:
        """Bring `data` to the file behind the last batch, or leave the file as it is and raise `LogError`.

        Returns whether it may be read, which without `sync` the disk has still to allow.
        """
        self._check_running()
        active = self._segments[-1]
        if active.size and active.size + len(data) > self.config.segment_bytes:
            active = self._roll()
        position = active.size
        try:
            failpoint("log.before_write", active.file, data, position)
            written = disk.pwrite(active.file, data, position)
            failpoint("log.after_write")
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
        except OSError as problem:
            self._undo(active)
            raise storage_error(f"{active.path} cannot be written", problem) from problem
        if not self._sync_always:
            return True
        if not sync and position:
            return False
        try:
            self._sync(active)
            if position == 0:
                self._sync_name()
        except LogError:
            if self._failure is None:
                self._undo(active)
            raise
        return True

    def _undo(self, active: Segment) -> None:
        """Cut what a failed write left behind. When even that fails the log stops, or the rest might be read later."""
        try:
            if disk.exists(active.path):
                disk.truncate(active.path, active.size)
        except OSError as problem:
            self._failure = f"{active.path} could not be cut back to {active.size} bytes: {problem}"
            _log.error("%s-%d stops: %s", self.topic, self.partition, self._failure)

    def _sync(self, segment: Segment) -> None:
        """Bring a segment to the disk. After a failure the kernel may have dropped the bytes: never try again."""
        self._await_sync()
        try:
            failpoint("log.before_sync")
            disk.sync(segment.file)
            failpoint("log.after_sync")
        except OSError as problem:
            self._stop(segment.path, problem)

    def _sync_name(self) -> None:
        """Make a new segment's file name durable."""
        try:
            disk.sync_directory(self.directory)
        except OSError as problem:
            self._stop(self.directory, problem)

    def _stop(self, path: Path, problem: OSError) -> None:
        if problem.errno in (errno.EMFILE, errno.ENFILE):
            raise storage_error(f"{path} cannot be opened", problem) from problem  # The disk was not asked: no harm.
        self._failure = f"{path} could not be synced: {problem}. Restart the broker to recover what is on the disk"
        _log.error("%s-%d stops: %s", self.topic, self.partition, self._failure)
        raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, self._failure) from problem

    def _applied(self, size: int, timestamp_ms: int, *, synced: bool = True) -> None:
        """The batch of `size` bytes at the end of the active segment is in the state: index it, let it be read."""
        state = self._state
        active = self._segments[-1]
        active.added(size, state.log_end_offset, timestamp_ms)
        if active.size >= self._sync_ahead_at:
            self._is_sync_due = True
        self._new_bytes += size
        self._new_batches += 1
        if synced:
            state.advance(state.log_end_offset)
            if self._is_snapshot_due():
                self._snapshot(durable=self._sync_always)

    def _plan_sync_ahead(self) -> None:
        """For a new active segment: the first half is left to the kernel, as most topics never get further."""
        self._sync_ahead_at = max(self.config.segment_bytes // 2, SYNC_AHEAD_BYTES)

    def _is_snapshot_due(self) -> bool:
        enough = self._new_batches >= SNAPSHOT_BATCHES or self._new_bytes >= SNAPSHOT_BYTES
        return enough and self._new_bytes >= 2 * self._snapshot_size

    # --- Segments and snapshots ---

    def _roll(self) -> Segment:
        """Close the active segment and begin the next. What is closed is on the disk, whatever `fsync` says."""
        active = self._segments[-1]
        failpoint("log.before_roll")
        self._sync(active)
        segment = Segment(self.directory, self._state.log_end_offset)
        try:
            active.seal(self._state.first_open_offset())
            failpoint("log.after_seal")
            disk.truncate(segment.file, 0)
        except OSError as problem:
            raise storage_error(f"no new segment can be begun in {self.directory}", problem) from problem
        self._segments.append(segment)
        self._plan_sync_ahead()
        self._remember_loaded(active)
        self._sync_name()
        failpoint("log.after_roll")
        self._snapshot(durable=True)
        return segment

    def _snapshot(self, *, durable: bool, closing: bool = False) -> None:
        """Write a snapshot. It only saves time at the next start, so a failure is no more than noted."""
        try:
            if not durable and not disk.boot_id():
                disk.sync(self._segments[-1].file)
                durable = True
            self._snapshot_size = write_snapshot(
                self.directory, self._state, self._segments, durable=durable, sync=durable and not closing
            )
        except OSError as problem:
            _log.warning("no snapshot of %s-%d: %s", self.topic, self.partition, problem)
        self._new_bytes = self._new_batches = 0

    @property
    def _is_synced(self) -> bool:
        """Whether every byte is known to be on the disk."""
        return not self._segments[-1].size or (self._sync_always and self.high_watermark == self.log_end_offset)

    def flush(self) -> None:
        """Bring everything to the disk. Raises `LogError` KAFKA_STORAGE_ERROR; the log has stopped then."""
        if self._segments[-1].size:
            self._sync(self._segments[-1])

    def close(self) -> None:
        """Bring everything to the disk, with a snapshot, so that the next start reads nothing."""
        if self._failure is None and (self._new_batches or self._snapshot_size):
            self.flush()
            # The snapshot itself is left to the kernel: two syncs less for each of thousands of partitions, and what a
            # loss of power right after a clean stop costs is that the end of the log is read.
            self._snapshot(durable=True, closing=True)
        for segment in self._segments:
            segment.close()

    def delete(self) -> None:
        """Remove the log with its directory. Raises OSError. Slices that are being sent stay readable."""
        for segment in self._segments:
            segment.close()
        # Renamed first: half a log must never be found under a name that can be opened.
        doomed = self.directory.with_name(f"{self.directory.name}.{self.topic_id.hex}.deleted")
        disk.remove_tree(doomed)
        disk.rename(self.directory, doomed)
        disk.remove_tree(doomed)
        self._failure = "it was deleted"

    # --- Deleting records ---

    def delete_before(self, offset: int) -> int:
        """Delete the records below `offset` (-1: below the high watermark); returns the log's new start.

        The new start is remembered first; segments that lie below it wholly are removed from the disk. Raises
        `LogError`: OFFSET_OUT_OF_RANGE above the high watermark, KAFKA_STORAGE_ERROR.
        """
        state = self._state
        if offset == -1:
            offset = state.high_watermark
        if not 0 <= offset <= state.high_watermark:
            raise self._out_of_range(offset)
        offset = max(offset, state.log_start_offset)
        if offset > state.log_start_offset or self._has_segments_below(offset):
            self._check_running()
            try:
                failpoint("retention.before_start")
                write_log_start(self.directory, offset, durable=self._sync_always)
                failpoint("retention.after_start")
                state.raise_log_start(offset)
                self._drop_segments(offset)
            except OSError as problem:
                raise storage_error(f"records in {self.directory} cannot be deleted", problem) from problem
        return state.log_start_offset

    def _has_segments_below(self, offset: int) -> bool:
        return len(self._segments) > 1 and self._segments[1].base_offset <= offset

    def _drop_segments(self, offset: int) -> None:
        if self._has_segments_below(offset):
            # What producers did in the segments that go is known from snapshots alone, and the newest may be damaged.
            self._sync(self._segments[-1])
            self._snapshot(durable=True)
        while self._has_segments_below(offset):
            segment = self._segments.pop(0)
            if segment in self._loaded:
                self._loaded.remove(segment)
            segment.remove()
            failpoint("retention.between_deletions")

    def tend(self, now_ms: int) -> int:
        """Close the growing segment when its time has come, and delete what `retention_ms` and `retention_bytes` say.

        Returns the log's start. Raises `LogError` KAFKA_STORAGE_ERROR; what could not be done is tried again at the
        next call.
        """
        active = self._segments[-1]
        if self._failure is None and active.size:
            if not active.created_ms:
                active.created_ms = now_ms
            age_ms = now_ms - active.created_ms
            limit_ms = self.config.segment_ms
            if self.config.is_compacted:
                limit_ms = min(limit_ms, self.config.max_compaction_lag_ms)
            if age_ms >= limit_ms or self._is_expired(active, now_ms):
                self._roll()
        if self.config.is_deleting:
            self.delete_before(max(self._retained_from(now_ms), self._state.log_start_offset))
        return self._state.log_start_offset

    def _is_expired(self, segment: Segment, now_ms: int) -> bool:
        config = self.config
        newest_ms = segment.max_timestamp if segment.max_timestamp >= 0 else segment.created_ms or now_ms
        return config.is_deleting and config.retention_ms >= 0 and newest_ms < now_ms - config.retention_ms

    def _retained_from(self, now_ms: int) -> int:
        """The offset from which on the log is kept."""
        start = self._segments[0].base_offset
        surplus = sum(segment.size for segment in self._segments) - self.config.retention_bytes
        for segment in self._segments[:-1]:
            is_surplus = self.config.retention_bytes >= 0 and surplus >= segment.size
            if not is_surplus and not self._is_expired(segment, now_ms):
                break
            surplus -= segment.size
            start = segment.end_offset
        return min(start, self._state.high_watermark)

    def replace(self, old: Sequence[Segment], new: Segment, cleaned: Path) -> bool:
        """Compaction's one change: see `compaction.CompactedLog`."""
        at = self._segments.index(old[0]) if old[0] in self._segments else -1
        if self._failure is not None or at < 0 or self._segments[at : at + len(old)] != list(old):
            return False
        if not remove_older_snapshots(self.directory, self._segments[-1].base_offset):
            self._snapshot(durable=self._is_synced)
        new.seal(old[-1].stable_offset, durable=True)
        failpoint("compaction.before_swap")
        disk.rename(cleaned, new.path)
        self._segments[at : at + len(old)] = [new]
        for segment in old:
            segment.close()
            if segment in self._loaded:
                self._loaded.remove(segment)
        self._remember_loaded(new)
        try:
            disk.sync_directory(self.directory)
            failpoint("compaction.after_swap")
            for segment in old[1:]:
                segment.remove()
                failpoint("compaction.between_deletions")
            disk.sync_directory(self.directory)  # One that came back could be taken for the log's start.
        except OSError as problem:
            # The same danger: what is left has to go before anything is deleted from the log's start.
            self._failure = f"{self.directory} has segments left from compaction: {problem}. Restart the broker"
            raise
        self._snapshot(durable=self._is_synced)
        failpoint("compaction.after_snapshot")
        return True


def _make_durable(directory: Path, segments: Sequence[Segment], report: RecoveryReport) -> None:
    """Bring to the disk what was found: a process that was killed may have written it without a sync. Raises OSError.

    Readers get it now, and what a reader got may not go with the power. Nor may the names of the files and directories.
    """
    if report.read_bytes:
        disk.sync(segments[-1].file)
    for place in (directory, directory.parent, directory.parent.parent):
        disk.sync_directory(place)


def _check_owner(directory: Path, topic_id: UUID, *, durable: bool) -> None:
    """Refuse a directory that another topic of the same name left behind. Raises OSError, `LogError`."""
    path = directory / _METADATA_FILE
    try:
        owner = UUID(disk.read(path).decode().strip())
    except (FileNotFoundError, ValueError):
        write_atomically(path, f"{topic_id}\n".encode(), durable=durable)
        return
    if owner != topic_id:
        raise LogError(
            ErrorCode.INCONSISTENT_TOPIC_ID,
            f"{directory} holds topic {owner}, not {topic_id}; remove it or move it away",
        )


def _set_create_time(batch: bytearray | memoryview, header: BatchHeader) -> None:
    """Clear the LogAppendTime bit that a client set, as Kafka does; only brokers know the time of append."""
    pack_into(">h", batch, 21, header.attributes & ~0x08)
    with memoryview(batch) as view:
        pack_into(">I", batch, 17, crc32c(view[21 : header.size]))
