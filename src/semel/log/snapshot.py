"""Snapshots: what recovery would learn from reading the log up to some offset, so that it need not read it.

`<offset>.snapshot` holds the producers, the closed segments, and the last segment's index. One is written now and then
while a segment grows, one when a segment is closed, one at `close`. A snapshot only saves time: one that is missing,
damaged, or does not match the files is passed over, and the log is read instead.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from semel.disk import disk
from semel.failpoints import failpoint
from semel.log.files import read_checked, write_checked
from semel.log.index import IndexImage, SegmentIndex
from semel.log.partition import PartitionState
from semel.log.producer_state import ProducerEntry
from semel.log.segments import Segment, SegmentSummary

__all__ = ["Snapshot", "find_snapshot", "remove_older_snapshots", "remove_snapshots", "write_snapshot"]

SUFFIX = ".snapshot"


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The state of a log whose end offset was `active.end_offset`."""

    boot_id: str
    durable: bool
    """Whether the log was synced up to here; if not, the snapshot counts until the machine restarts."""
    closed: list[SegmentSummary]
    active: SegmentSummary
    index: IndexImage
    producers: list[ProducerEntry]

    @property
    def is_trusted(self) -> bool:
        """Whether the bytes that it speaks of are certain to have reached the file."""
        return self.durable or (self.boot_id != "" and self.boot_id == disk.boot_id())

    def restore(self, directory: Path, bases: list[int], log_start_offset: int) -> tuple[PartitionState, list[Segment]]:
        """The state and the segments, the last of which is active up to where the snapshot was made.

        `bases` are the base offsets of the files there are. Raises `_DoesNotFit` when they are not those it speaks of,
        or what retention and compaction have made of those since.
        """
        active = Segment.closed(directory, self.active)
        if _size(directory, active.base_offset) < active.size:
            raise _DoesNotFit
        active.index = SegmentIndex.of(self.index)
        segments = self._closed_segments(directory, [base for base in bases if base < active.base_offset])
        if segments and segments[-1].end_offset != active.base_offset:
            raise _DoesNotFit
        segments.append(active)
        start = max(log_start_offset, segments[0].base_offset)
        return PartitionState(start, active.end_offset, self.producers), segments

    def _closed_segments(self, directory: Path, bases: list[int]) -> list[Segment]:
        """The closed segments; one that was compacted after the snapshot is described by its index file."""
        known = {summary.base_offset: summary for summary in self.closed}
        segments: list[Segment] = []
        for base in bases:
            if segments and base < segments[-1].end_offset:
                continue  # Compaction merged it into the segment before; `recover` deletes it.
            summary = known.get(base)
            size = _size(directory, base)
            if summary is not None and summary.size == size:
                segment = Segment.closed(directory, summary)
            else:
                found = Segment.from_index(directory, base, size)
                if found is None:
                    raise _DoesNotFit
                segment = found
            if segments and segments[-1].end_offset != base:
                raise _DoesNotFit
            segments.append(segment)
        return segments


class _DoesNotFit(Exception):
    """A snapshot speaks of other files than those that are there."""


def _size(directory: Path, base_offset: int) -> int:
    """Bytes of a segment's file; -1 when there is none."""
    size = disk.size_at(Segment(directory, base_offset).path)
    return -1 if size is None else size


def write_snapshot(
    directory: Path, state: PartitionState, segments: list[Segment], *, durable: bool, sync: bool
) -> int:
    """Write a snapshot at the log's end and delete those that it makes useless. Returns its size. Raises OSError.

    `durable` says that every byte of the log has been synced; with `sync` the snapshot's own file is, too.
    """
    active = segments[-1]
    assert active.index is not None
    snapshot = Snapshot(
        disk.boot_id(),
        durable,
        [segment.summary() for segment in segments[:-1]],
        active.summary(),
        active.index.image(),
        list(state.producers.entries.values()),
    )
    payload = msgspec.msgpack.encode(snapshot)
    failpoint("log.before_snapshot")
    write_checked(_path(directory, state.log_end_offset), payload, durable=sync)
    failpoint("log.after_snapshot")
    # The one at the start of the active segment stays: it is the next best should the newest not count.
    keep = {_path(directory, state.log_end_offset), _path(directory, active.base_offset)}
    for path in _snapshots(directory):
        if path not in keep:
            with contextlib.suppress(OSError):
                disk.unlink(path)
    return len(payload)


def find_snapshot(
    directory: Path, bases: list[int], log_start_offset: int
) -> tuple[PartitionState, list[Segment]] | None:
    """What the newest snapshot that counts says of the log whose files have these base offsets. Raises OSError.

    Others are deleted: when the log is cut below one and grows again, it would fit by size and be wrong.
    """
    for path in reversed(_snapshots(directory)):
        snapshot = _read(path)
        if snapshot is not None and snapshot.is_trusted:
            with contextlib.suppress(_DoesNotFit):
                return snapshot.restore(directory, bases, log_start_offset)
        disk.unlink(path)
    return None


def remove_older_snapshots(directory: Path, active_base_offset: int) -> int:
    """Delete the snapshots in which another segment was the one that grew; returns how many are left. Raises OSError.

    Such a one says where batches lie in a segment that is closed by now, and that compaction is about to rewrite.
    """
    left = 0
    for path in _snapshots(directory):
        snapshot = _read(path)
        if snapshot is not None and snapshot.active.base_offset == active_base_offset:
            left += 1
        else:
            disk.unlink(path)
    return left


def remove_snapshots(directory: Path) -> None:
    """Delete every snapshot. Raises OSError."""
    for path in _snapshots(directory):
        disk.unlink(path)


def _snapshots(directory: Path) -> list[Path]:
    """Every snapshot, by offset."""
    return [directory / name for name in disk.list(directory) if name.endswith(SUFFIX)]


def _read(path: Path) -> Snapshot | None:
    payload = read_checked(path)
    if payload is None:
        return None
    try:
        return msgspec.msgpack.decode(payload, type=Snapshot)
    except msgspec.DecodeError:
        return None


def _path(directory: Path, offset: int) -> Path:
    return directory / f"{offset:020}{SUFFIX}"
