"""Segments: the files of a log. `<base offset>.log` holds batches as they were sent, `<base offset>.index` finds them.

Only the last segment grows. A file is opened when it is first used and shares the process's bound on open files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from semel.disk import disk
from semel.errors import CorruptBatch
from semel.log.files import OPEN_FILES, FileHandle, read_checked, write_checked
from semel.log.index import IndexImage, SegmentIndex
from semel.log.partition import PartitionState
from semel.wire.records import BATCH_OVERHEAD, BatchHeader, check_crc, read_control, read_header

__all__ = ["ScanResult", "Segment", "SegmentSummary", "scan"]

SCAN_BYTES = 1 << 20
_WALK_BYTES = 8192


class SegmentSummary(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a segment without opening its files."""

    base_offset: int
    end_offset: int
    size: int
    max_timestamp: int
    stable_offset: int
    """Transactions that end after this segment start at this offset or later."""
    created_ms: int = 0
    """The broker's clock soon after its first batch; 0 when that is not known."""


class _ClosedIndex(msgspec.Struct, array_like=True, frozen=True):
    """The content of an .index file."""

    summary: SegmentSummary
    index: IndexImage


class Segment:
    """One file of batches, from `base_offset` up to `end_offset`.

    `index` is None for a closed segment whose index is not in memory.
    """

    __slots__ = (
        "__weakref__",
        "_file",
        "base_offset",
        "created_ms",
        "directory",
        "end_offset",
        "index",
        "max_timestamp",
        "size",
        "stable_offset",
    )

    def __init__(self, directory: Path, base_offset: int) -> None:
        self.directory = directory
        self.base_offset = base_offset
        self.end_offset = base_offset
        self.size = 0
        self.max_timestamp = -1
        self.stable_offset = base_offset
        self.created_ms = 0
        self.index: SegmentIndex | None = SegmentIndex()
        self._file: FileHandle | None = None

    def __repr__(self) -> str:
        return f"<Segment {self.base_offset}..{self.end_offset} {self.size} bytes>"

    @classmethod
    def closed(cls, directory: Path, summary: SegmentSummary) -> Segment:
        """A segment known by its summary; its index is loaded when it is needed."""
        segment = cls(directory, summary.base_offset)
        segment.end_offset = summary.end_offset
        segment.size = summary.size
        segment.max_timestamp = summary.max_timestamp
        segment.stable_offset = summary.stable_offset
        segment.created_ms = summary.created_ms
        segment.index = None
        return segment

    # --- Files ---

    @property
    def path(self) -> Path:
        return self.directory / f"{self.base_offset:020}.log"

    @property
    def index_path(self) -> Path:
        return self.directory / f"{self.base_offset:020}.index"

    @property
    def file(self) -> FileHandle:
        """The open file, created if it is not there. Raises OSError."""
        file = self._file
        if file is None:
            # A file that should have bytes must not be made anew.
            create = 0 if self.size else os.O_CREAT
            descriptor = disk.open(self.path, os.O_RDWR | os.O_CLOEXEC | create, 0o644)
            file = self._file = FileHandle(descriptor)
            OPEN_FILES.opened(self)
        return file

    def close(self) -> None:
        """Let go of the file; readers that hold it go on."""
        self._file = None

    def remove(self) -> None:
        """Delete the segment's files. Raises OSError."""
        self.close()
        disk.unlink(self.path)
        disk.unlink(self.index_path)

    # --- Index ---

    def added(self, size: int, end_offset: int, timestamp_ms: int) -> None:
        """A batch of `size` bytes was written at the segment's end.

        Its entry begins where the last batch ended: compaction leaves gaps, and a reader in one gets the next batch.
        """
        assert self.index is not None
        if timestamp_ms > self.max_timestamp:
            self.max_timestamp = timestamp_ms
        self.index.add(self.end_offset, self.size, self.max_timestamp)
        self.size += size
        self.end_offset = end_offset

    def summary(self) -> SegmentSummary:
        return SegmentSummary(
            self.base_offset, self.end_offset, self.size, self.max_timestamp, self.stable_offset, self.created_ms
        )

    def seal(self, stable_offset: int, *, durable: bool = False) -> None:
        """The segment grows no more: write its index. Raises OSError.

        An index that a loss of power damages is made anew, so it need not be `durable`.
        """
        assert self.index is not None
        self.stable_offset = stable_offset
        self.index.thin()
        content = _ClosedIndex(self.summary(), self.index.image())
        write_checked(self.index_path, msgspec.msgpack.encode(content), durable=durable)

    def load_index(self) -> bool:
        """Read a closed segment's index; False when it is missing or damaged."""
        content = self._read_index()
        if content is None or content.summary != self.summary():
            return False
        try:
            self.index = SegmentIndex.of(content.index)
        except ValueError:
            return False
        return True

    def _read_index(self) -> _ClosedIndex | None:
        payload = read_checked(self.index_path)
        if payload is None:
            return None
        try:
            return msgspec.msgpack.decode(payload, type=_ClosedIndex)
        except msgspec.DecodeError:
            return None

    @classmethod
    def from_index(cls, directory: Path, base_offset: int, size: int) -> Segment | None:
        """The closed segment of `size` bytes as its index file describes it; None when that speaks of another."""
        content = cls(directory, base_offset)._read_index()
        if content is None or (content.summary.base_offset, content.summary.size) != (base_offset, size):
            return None
        return cls.closed(directory, content.summary)

    # --- Reading ---

    def walk(self, position: int) -> Iterator[tuple[int, BatchHeader]]:
        """Position and header of each batch from `position` on. Raises OSError, `CorruptBatch`."""
        while position < self.size:
            chunk = disk.pread(self.file, _WALK_BYTES, position)
            at = 0
            while len(chunk) - at >= BATCH_OVERHEAD and position + at < self.size:
                header = read_header(chunk, at)
                yield position + at, header
                at += header.size
            if at == 0:
                raise CorruptBatch(f"{self.path} ends at {position + len(chunk)}, before its size of {self.size}")
            position += at

    def position_of(self, offset: int) -> int:
        """Position of the batch that holds `offset`; the segment's size when that is at its end or later."""
        if offset >= self.end_offset:
            return self.size
        assert self.index is not None
        entry = self.index.before_offset(offset)
        position = self.index.positions[entry]
        if entry >= self.index.dense_from:
            return position
        for at, header in self.walk(position):
            if header.last_offset >= offset:
                return at
        raise CorruptBatch(f"{self.path} has no batch with offset {offset}")

    def cut(self, offset: int, max_bytes: int, upper_offset: int, min_one: bool) -> tuple[int, int]:
        """Position and length of whole batches from the one with `offset` on, all below `upper_offset`.

        At most `max_bytes`, except that `min_one` gives the first batch whatever its size. Length 0: nothing fits.
        """
        start = self.position_of(offset)
        stop = self.position_of(upper_offset)
        if stop - start <= max_bytes:
            return start, max(stop - start, 0)
        assert self.index is not None
        wanted = start + max_bytes
        boundary = self.index.before_position(wanted)
        if boundary <= start:
            boundary = start
            for at, header in self.walk(start):
                after = at + header.size
                if after > wanted:
                    if min_one and boundary == start:
                        boundary = after
                    break
                boundary = after
        return start, boundary - start


class ScanResult(NamedTuple):
    """What a scan read and found to be good."""

    read_bytes: int
    batches: int


def scan(segment: Segment, state: PartitionState, now_ms: int, *, closed: bool) -> ScanResult:
    """Check the segment's bytes from its `size` on, and add each good batch to it and to `state`.

    Stops at the first that is cut short, out of order, or fails its checksum: `segment.size` is where. A `closed`
    segment may have been compacted, so offsets and records may be missing in it; in one that grows, a gap is the
    rest of an older file. Raises OSError.
    """
    file = segment.file
    end = disk.size(file)
    buffer = bytearray(min(SCAN_BYTES, max(end - segment.size, BATCH_OVERHEAD)))
    read = batches = 0
    while segment.size + BATCH_OVERHEAD <= end:
        count = disk.preadv(file, [buffer], segment.size)
        read += count
        with memoryview(buffer)[:count] as view:
            used, added, needed = _scan_buffer(view, segment, state, now_ms, closed)
        batches += added
        if needed <= 0 or needed > end - segment.size:
            break
        if used == 0 and needed > len(buffer):
            buffer = bytearray(needed)
        elif used == 0:
            break  # The file became shorter under us.
    return ScanResult(read, batches)


def _scan_buffer(
    view: memoryview, segment: Segment, state: PartitionState, now_ms: int, closed: bool
) -> tuple[int, int, int]:
    """Take the good batches at the start of `view`.

    Returns how many bytes they have, how many they are, and how many bytes the next one needs; 0: it is bad.
    """
    at = batches = 0
    while True:
        if len(view) - at < BATCH_OVERHEAD:
            return at, batches, BATCH_OVERHEAD
        try:
            header = read_header(view, at)
            if not _fits(header, state.log_end_offset, closed):
                return at, batches, 0
            if at + header.size > len(view):
                return at, batches, header.size
            if not check_crc(view, at, header):
                return at, batches, 0
            state.log_end_offset = header.base_offset
            if header.is_control:
                _apply_marker(view, at, header, segment, state, now_ms)
            else:
                state.apply_batch(header, header.max_timestamp, now_ms)
        except CorruptBatch:
            return at, batches, 0
        segment.added(header.size, state.log_end_offset, header.max_timestamp if header.record_count else -1)
        at += header.size
        batches += 1


def _fits(header: BatchHeader, offset: int, closed: bool) -> bool:
    if header.magic != 2:
        return False
    if closed:
        return header.base_offset >= offset and 0 <= header.record_count <= header.last_offset_delta + 1
    return header.base_offset == offset and 0 < header.record_count == header.last_offset_delta + 1


def _apply_marker(
    view: memoryview, at: int, header: BatchHeader, segment: Segment, state: PartitionState, now_ms: int
) -> None:
    commit, coordinator_epoch = read_control(view, at, header)
    aborted = state.apply_marker(
        header.producer_id, header.producer_epoch, commit, coordinator_epoch, header.max_timestamp, now_ms
    )
    if aborted is not None:
        assert segment.index is not None
        segment.index.aborted.add(aborted)
