"""Opening a log: find what is certain, read the rest, cut what is torn.

The newest snapshot that counts says how far the log is known; from there on every batch is checked and counted in. In
the last segment everything from the first bad batch on is cut: nobody was told that it is there. A bad batch before
that is damage to records that were acknowledged, and the log refuses to open.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from semel.disk import disk
from semel.errors import ErrorCode
from semel.failpoints import failpoint
from semel.log.errors import LogError
from semel.log.files import CLEANED_SUFFIX, TEMPORARY_SUFFIX, write_atomically
from semel.log.partition import PartitionState
from semel.log.segments import Segment, scan
from semel.log.snapshot import find_snapshot, remove_snapshots

__all__ = ["Recovered", "RecoveryReport", "rebuild_indexes", "recover", "write_log_start"]

_START_FILE = "log-start-offset"
_log = logging.getLogger(__name__)


class RecoveryReport(NamedTuple):
    """What opening a log cost and found."""

    snapshot_offset: int
    """Where reading began; -1 without a snapshot."""
    read_bytes: int
    batches: int
    """Batches checked."""
    cut_bytes: int
    """Bytes behind the last good batch, cut off."""


class Recovered(NamedTuple):
    """A log as it was found; the last segment is the one to append to."""

    state: PartitionState
    segments: list[Segment]
    report: RecoveryReport


def write_log_start(directory: Path, offset: int, *, durable: bool) -> None:
    """Remember that records below `offset` are deleted. Raises OSError."""
    write_atomically(directory / _START_FILE, f"{offset}\n".encode(), durable=durable)


def _read_log_start(directory: Path) -> int:
    try:
        return max(int(disk.read(directory / _START_FILE)), 0)
    except (OSError, ValueError):
        return 0


def recover(directory: Path, now_ms: int) -> Recovered:
    """Read the log in `directory`, which may be empty.

    Raises OSError, and `LogError` for damage before the last segment.
    """
    names = [Path(name) for name in disk.list(directory)]
    for left_over in [name for name in names if name.suffix in (TEMPORARY_SUFFIX, CLEANED_SUFFIX)]:
        disk.unlink(directory / left_over)
    start = _read_log_start(directory)
    bases = sorted(int(name.stem) for name in names if name.suffix == ".log" and name.stem.isdigit())
    bases = _drop_deleted(directory, bases, start)
    found = find_snapshot(directory, bases, start)
    if found is not None:
        state, segments = found
        known = state.log_end_offset
    else:
        first = bases[0] if bases else start
        state, segments = PartitionState(max(start, first), first), [Segment(directory, first)]
        known = -1
    _drop_merged(directory, bases, segments)
    later = [base for base in bases if base > segments[-1].base_offset]
    read, batches, cut = _read_on(state, segments, later, now_ms)
    if state.log_end_offset < start:
        _start_anew(state, segments, start)
    state.advance(state.log_end_offset)
    return Recovered(state, segments, RecoveryReport(known, read, batches, cut))


def _drop_deleted(directory: Path, bases: list[int], start: int) -> list[int]:
    """Finish an interrupted deletion of whole segments below the log's start."""
    while len(bases) > 1 and bases[1] <= start:
        Segment(directory, bases.pop(0)).remove()
    return bases


def _drop_merged(directory: Path, bases: list[int], segments: list[Segment]) -> None:
    """Finish an interrupted compaction: it merged these files into the segment before them, which is whole."""
    used = {segment.base_offset for segment in segments}
    for base in bases:
        if base < segments[-1].base_offset and base not in used:
            Segment(directory, base).remove()


def _read_on(state: PartitionState, segments: list[Segment], later: list[int], now_ms: int) -> tuple[int, int, int]:
    """Scan the active segment from where it is known, then the `later` ones. Returns bytes read, batches, bytes cut."""
    read = batches = cut = 0
    while True:
        segment = segments[-1]
        # An empty partition has no file, and looking must not make one.
        size = disk.size_at(segment.path) or 0
        if size > segment.size:
            failpoint("recovery.before_scan")
            found = scan(segment, state, now_ms, closed=bool(later))
            read += found.read_bytes
            batches += found.batches
        cut = max(size - segment.size, 0)
        while later and later[0] != state.log_end_offset and _is_empty(segment.directory, later[0]):
            # Made when a segment was to be closed, which then failed.
            Segment(segment.directory, later.pop(0)).remove()
        while state.log_end_offset in later and later[0] != state.log_end_offset:
            # This segment was compacted, and reaches up to a later one: those between are merged into it.
            Segment(segment.directory, later.pop(0)).remove()
        if not later:
            break
        if cut or later[0] != state.log_end_offset:
            raise LogError(
                ErrorCode.KAFKA_STORAGE_ERROR,
                f"{segment.path} is damaged at byte {segment.size} (offset {state.log_end_offset}), and "
                f"{later[0]:020}.log follows it. Restore the file from a backup, or delete it and all later ones to go "
                "on without their records.",
            )
        segment.seal(state.first_open_offset())
        segments.append(Segment(segment.directory, later.pop(0)))
    if cut:
        failpoint("recovery.before_cut")
        disk.truncate(segment.file, segment.size)
        failpoint("recovery.after_cut")
        _log.warning("%s: %d bytes behind offset %d cut", segment.path, cut, state.log_end_offset)
    return read, batches, cut


def _is_empty(directory: Path, base: int) -> bool:
    return disk.size_at(Segment(directory, base).path) == 0


def _start_anew(state: PartitionState, segments: list[Segment], start: int) -> None:
    """Records below the log's start were deleted, and a loss of power took the rest: go on behind them."""
    directory = segments[0].directory
    for segment in segments:
        segment.remove()
    remove_snapshots(directory)
    segments[:] = [Segment(directory, start)]
    state.log_end_offset = start


def rebuild_indexes(segments: list[Segment], now_ms: int) -> None:
    """Make the indexes of all closed segments anew by reading them. Raises OSError, `LogError` for damage.

    All, because an aborted transaction may begin in an earlier segment than its marker's.
    """
    failpoint("recovery.before_index")
    closed = segments[:-1]
    state = PartitionState(closed[0].base_offset, closed[0].base_offset)
    for segment in closed:
        fresh = Segment(segment.directory, segment.base_offset)
        scan(fresh, state, now_ms, closed=True)
        if fresh.size != segment.size:
            raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, f"{fresh.path} is damaged at byte {fresh.size}")
        fresh.created_ms = segment.created_ms
        fresh.max_timestamp = segment.max_timestamp
        fresh.seal(segment.stable_offset)
        segment.index = fresh.index
    failpoint("recovery.after_index")
