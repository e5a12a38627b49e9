"""Transactions, reading, timestamps and deletion in one partition's log."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from semel.errors import ErrorCode
from semel.log import index
from semel.log.log import LogConfig, LogError, PartitionLog, ProducerInfo
from semel.wire.records import iter_batches
from tests.log.builders import NOW, TOPIC_ID, batch, log_file, open_log, read_all, values

# --- Transactions ---


def test_a_marker_is_the_bytes_that_kafka_writes(tmp_path: Path) -> None:
    """kafka_facts 2.8, captured on 4.3.1."""
    log = open_log(tmp_path)
    log.append(batch(2, pid=75, txn=True), NOW)
    log.append_marker(75, 1, True, 0, 0x1A1FD335B57)
    assert read_all(log)[-78:].hex() == (
        "00000000000000020000004200000000" + "02be7c36d20030" + "00000000" + "000001a1fd335b57" * 2
        + "000000000000004b" + "0001" + "ffffffff" + "00000001" + "200000000800000001" + "0c" + "000000000000" + "00"
    )  # fmt: skip


def test_the_last_stable_offset_waits_for_the_oldest_transaction(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(), NOW)
    log.append(batch(pid=1, txn=True), NOW)
    log.append(batch(pid=2, txn=True), NOW)
    assert (log.last_stable_offset, log.high_watermark) == (1, 3)
    assert log.open_transactions() == [(1, 0, 1), (2, 0, 2)]
    log.append_marker(2, 0, True, 0, NOW)
    assert log.last_stable_offset == 1
    log.append_marker(1, 0, False, 0, NOW)
    assert (log.last_stable_offset, log.high_watermark) == (5, 5)
    assert not log.is_transaction_open(1, 0)


def test_is_transaction_open_goes_by_epoch(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(pid=1, epoch=4, txn=True), NOW)
    assert log.is_transaction_open(1, 4)
    assert not log.is_transaction_open(1, 3)
    assert not log.is_transaction_open(2, 4)


def test_aborted_transactions_overlap_the_range_and_come_by_first_offset(tmp_path: Path) -> None:
    """Markers come in the other order than the first records; franz-go delivered aborted data on an unsorted list."""
    log = open_log(tmp_path)
    log.append(batch(pid=1, txn=True), NOW)  # 0
    log.append(batch(pid=2, txn=True), NOW)  # 1
    log.append_marker(2, 0, False, 0, NOW)  # 2
    log.append_marker(1, 0, False, 0, NOW)  # 3
    log.append(batch(pid=3, txn=True), NOW)  # 4
    log.append_marker(3, 0, True, 0, NOW)  # 5
    log.append(batch(pid=1, seq=1, txn=True), NOW)  # 6
    log.append_marker(1, 0, False, 0, NOW)  # 7
    assert log.aborted_transactions(0, 8) == [(1, 0), (2, 1), (1, 6)]
    assert log.aborted_transactions(0, 1) == [(1, 0)]
    assert log.aborted_transactions(0, 6) == [(1, 0), (2, 1)]
    assert log.aborted_transactions(3, 4) == [(1, 0)]  # From an abort marker on, its transaction is listed.
    assert log.aborted_transactions(4, 6) == []


def test_aborted_transactions_are_found_across_segments(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=1)
    log.append(batch(pid=1, txn=True), NOW)  # 0
    log.append(batch(), NOW)  # 1
    log.append(batch(pid=2, txn=True), NOW)  # 2
    log.append_marker(1, 0, False, 0, NOW)  # 3
    log.append(batch(), NOW)  # 4
    log.append_marker(2, 0, False, 0, NOW)  # 5
    log.close()
    for again in (log, open_log(tmp_path)):
        assert again.aborted_transactions(0, 6) == [(1, 0), (2, 2)]
        assert again.aborted_transactions(1, 2) == [(1, 0)]
        assert again.aborted_transactions(4, 5) == [(2, 2)]


def test_reading_an_old_segment_needs_no_index_of_later_ones(tmp_path: Path) -> None:
    """Else every fetch of a consumer that catches up would walk through the whole log."""
    log = open_log(tmp_path, segment_bytes=1)
    for _ in range(10):
        log.append(batch(), NOW)
    log.close()
    log = open_log(tmp_path)
    assert log.aborted_transactions(2, 3) == []
    assert [segment.base_offset for segment in log._segments if segment.index is not None] == [2, 9]


def test_a_marker_takes_an_offset_where_its_producer_wrote_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.append_marker(7, 1, False, 0, NOW) == 0
    assert (log.high_watermark, log.last_stable_offset) == (1, 1)
    assert log.aborted_transactions(0, 1) == []


@pytest.mark.parametrize("reopened", [False, True])
def test_a_repeated_marker_is_written_once(tmp_path: Path, reopened: bool) -> None:
    log = open_log(tmp_path)
    log.append(batch(pid=7, txn=True), NOW)
    log.append_marker(7, 1, True, 0, NOW)
    log.append_marker(8, 1, True, 0, NOW)  # No data here.
    if reopened:
        log = open_log(tmp_path)
    assert log.append_marker(7, 1, True, 0, NOW) == 1
    assert log.append_marker(8, 1, True, 0, NOW) == 2
    assert log.log_end_offset == 3
    # A V1 coordinator that knows it is a new transaction, with the same epoch and no data, gets its offset.
    assert log.append_marker(8, 1, True, 0, NOW, unless_written=False) == 3


def test_a_marker_ends_what_came_after_the_last_one(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(pid=7, txn=True), NOW)
    log.append_marker(7, 0, True, 0, NOW)
    log.append(batch(pid=7, seq=1, txn=True), NOW)
    assert log.append_marker(7, 0, False, 0, NOW) == 3
    assert log.aborted_transactions(0, 4) == [(7, 2)]


def test_a_marker_behind_other_records_of_its_producer_is_a_new_one(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append_marker(7, 0, True, 0, NOW)
    log.append(batch(pid=7), NOW)
    assert log.append_marker(7, 0, True, 0, NOW) == 2


@pytest.mark.parametrize(
    ("epoch", "coordinator_epoch", "version", "code"),
    [
        (4, 6, 1, ErrorCode.INVALID_PRODUCER_EPOCH),
        (5, 5, 1, ErrorCode.TRANSACTION_COORDINATOR_FENCED),
        (5, 6, 2, ErrorCode.INVALID_PRODUCER_EPOCH),  # V2: the marker has a higher epoch than the open transaction.
        (5, 6, 1, None),
        (6, 6, 2, None),
        (6, 7, 1, None),
    ],
)
def test_markers_are_fenced(
    tmp_path: Path, epoch: int, coordinator_epoch: int, version: int, code: ErrorCode | None
) -> None:
    log = open_log(tmp_path)
    log.append_marker(7, 5, True, 6, NOW)
    log.append(batch(pid=7, epoch=5, txn=True), NOW)
    if code is None:
        assert log.append_marker(7, epoch, True, coordinator_epoch, NOW, transaction_version=version) == 2
        assert log.last_stable_offset == 3
    else:
        with pytest.raises(LogError) as refused:
            log.append_marker(7, epoch, True, coordinator_epoch, NOW, transaction_version=version)
        assert refused.value.code == code
        assert log.last_stable_offset == 1


def test_a_v2_marker_again_is_a_retry(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append_marker(7, 5, True, 6, NOW, transaction_version=2)
    assert log.append_marker(7, 5, True, 6, NOW, transaction_version=2) == 0


def test_producers_are_described_as_kafka_does(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(3, pid=1, epoch=2, txn=True, ts=NOW - 50), NOW)
    assert log.producers() == [ProducerInfo(1, 2, 2, NOW - 48, -1, 0)]
    log.append_marker(1, 3, True, 4, NOW)
    assert log.producers() == [ProducerInfo(1, 3, -1, NOW, 4, -1)]


def test_internal_records_are_one_batch(tmp_path: Path) -> None:
    log = open_log(tmp_path, max_message_bytes=100)
    assert log.append_internal([(b"a", b"1"), (b"b", None)], NOW) == 0
    assert log.append_internal([(None, bytes(5000))], NOW) == 2
    assert [(offset, value) for offset, value in values(log)] == [(0, b"1"), (1, None), (2, bytes(5000))]
    assert open_log(tmp_path).log_end_offset == 3


# --- Reading ---


def offsets(data: bytes) -> list[tuple[int, int]]:
    return [(header.base_offset, header.last_offset) for _, header in iter_batches(data)]


@pytest.mark.parametrize("dense", [4096, 0])
@pytest.mark.parametrize("segment_bytes", [1 << 30, 700])
def test_reads_are_whole_batches_within_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: int, segment_bytes: int
) -> None:
    monkeypatch.setattr(index, "DENSE_BATCHES", max(dense, 1))
    log = open_log(tmp_path, segment_bytes=segment_bytes)
    ends, sizes = [], []
    for number in range(60):
        sent = batch(1 + number % 3, value=bytes(number))
        sizes.append(len(sent))
        ends.append(log.append(sent, NOW).last_offset + 1)
    starts = [0, *ends[:-1]]
    for at, start in enumerate(starts):
        for upper in (start, ends[at], ends[min(at + 3, 59)], ends[min(at + 3, 59)] - 1, ends[-1]):
            for max_bytes in (0, 1, sizes[at], sizes[at] + 1, 500, 1 << 20):
                for offset in {start, ends[at] - 1}:
                    for min_one in (True, False):
                        got = offsets(log.read_bytes(offset, max_bytes, upper, min_one))
                        check_read(got, at, starts, ends, sizes, upper, max_bytes, min_one)


def check_read(
    got: list[tuple[int, int]],
    at: int,
    starts: list[int],
    ends: list[int],
    sizes: list[int],
    upper: int,
    max_bytes: int,
    min_one: bool,
) -> None:
    """Batches from number `at` on without a hole, below `upper`, within `max_bytes`; at least one when it may be."""
    assert got == [(starts[n], ends[n] - 1) for n in range(at, at + len(got))]
    assert not got or got[-1][1] < upper
    assert sum(sizes[at : at + len(got)]) <= max_bytes or (min_one and len(got) == 1)
    if ends[at] <= upper and (min_one or sizes[at] <= max_bytes):
        assert got
    if max_bytes == 1 << 20:
        assert not [n for n in range(at + len(got), 60) if ends[n] <= upper]


def test_offsets_out_of_range(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(4), NOW)
    log.delete_before(2)
    assert log.read(4, 100, 4) == []
    for offset in (-1, 1, 5):
        with pytest.raises(LogError) as refused:
            log.read(offset, 100, 4)
        assert refused.value.code == ErrorCode.OFFSET_OUT_OF_RANGE
    assert offsets(log.read_bytes(2, 100, 4)) == [(0, 3)]  # The batch that holds the offset comes whole.


def test_a_slice_stays_readable_while_its_segment_is_deleted(tmp_path: Path) -> None:
    log = open_log(tmp_path / "p", segment_bytes=1)
    log.append(batch(value=b"first"), NOW)
    log.append(batch(value=b"second"), NOW)
    (piece,) = log.read(0, 1, 2)
    log.delete_before(1)
    assert not (tmp_path / "p" / "00000000000000000000.log").exists()
    assert b"first" in os.pread(piece.file, piece.length, piece.position)
    descriptor = int(piece.file)
    del piece
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def open_descriptors() -> int:
    gc.collect()  # Logs of earlier tests let go of theirs.
    return len(os.listdir("/proc/self/fd"))


def test_empty_partitions_hold_no_file(tmp_path: Path) -> None:
    before = open_descriptors()
    logs = [open_log(tmp_path / str(number)) for number in range(50)]
    assert all(log.read(0, 100, 0) == [] for log in logs)
    assert open_descriptors() == before
    assert not list(tmp_path.glob("*/*.log"))


def test_open_files_are_bounded(tmp_path: Path) -> None:
    before = open_descriptors()
    log = open_log(tmp_path, segment_bytes=1)
    for _ in range(400):
        log.append(batch(), NOW)
    assert len(log.read(0, 1 << 20, 400)) == 400
    assert open_descriptors() - before <= 256
    assert len(values(log)) == 400


# --- Timestamps ---


@pytest.mark.parametrize("segment_bytes", [1 << 30, 300])
def test_offsets_for_timestamps(tmp_path: Path, segment_bytes: int) -> None:
    log = open_log(tmp_path, segment_bytes=segment_bytes)
    assert log.offset_for_timestamp(0) is None
    assert log.max_timestamp_offset() is None
    times = [100, 50, 300, 200, 300, 10]
    for time in times:
        log.append(batch(2, ts=time), NOW)  # Records at `time` and `time` + 1.
    flat = [stamp for time in times for stamp in (time, time + 1)]
    for wanted in range(305):
        expected = next(((offset, stamp, 0) for offset, stamp in enumerate(flat) if stamp >= wanted), None)
        assert log.offset_for_timestamp(wanted) == expected
    assert log.max_timestamp_offset() == (5, 301, 0)
    log.delete_before(6)
    assert log.offset_for_timestamp(0) == (6, 200, 0)
    assert log.max_timestamp_offset() == (9, 301, 0)


def test_offset_for_a_timestamp_inside_a_compressed_batch(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(10, ts=100, codec=1), NOW)
    assert log.offset_for_timestamp(105) == (5, 105, 0)


# --- Deleting ---


def test_deleted_records_stay_deleted(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=300)
    for number in range(20):
        log.append(batch(value=b"%02d" % number), NOW)
    assert log.delete_before(11) == 11
    assert log.delete_before(3) == 11
    files = len(list(tmp_path.glob("*.log")))
    assert files < 7
    for again in (log, open_log(tmp_path, segment_bytes=300)):
        assert (again.log_start_offset, again.log_end_offset) == (11, 20)
        assert [value for offset, value in values(again) if offset >= 11] == [b"%02d" % n for n in range(11, 20)]
    with pytest.raises(LogError) as refused:
        log.delete_before(21)
    assert refused.value.code == ErrorCode.OFFSET_OUT_OF_RANGE
    assert log.delete_before(-1) == 20
    log.append(batch(), NOW)
    assert open_log(tmp_path).log_start_offset == 20
    assert open_log(tmp_path).log_end_offset == 21


def test_an_interrupted_deletion_is_finished(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=1)
    for _ in range(5):
        log.append(batch(), NOW)
    (tmp_path / "log-start-offset").write_text("3\n")  # The crash came before the files were removed.
    log = open_log(tmp_path)
    assert log.log_start_offset == 3
    assert sorted(int(path.stem) for path in tmp_path.glob("*.log")) == [3, 4]


def test_deleting_under_an_open_transaction_moves_the_stable_offset(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for seq in range(3):
        log.append(batch(pid=1, seq=seq, txn=True), NOW)
    assert log.last_stable_offset == 0
    log.delete_before(3)
    assert log.last_stable_offset == 3
    assert open_log(tmp_path).last_stable_offset == 3


def test_retention_by_time_drops_old_segments_and_ends_with_the_growing_one(tmp_path: Path) -> None:
    config = {"segment_bytes": 1, "retention_ms": 1000}
    log = open_log(tmp_path, **config)
    for time in (NOW - 5000, NOW - 4000, NOW, NOW - 900):
        log.append(batch(ts=time), NOW)
    assert log.tend(NOW) == 2
    assert log.tend(NOW + 500) == 2  # Segments go in their order: a newer one holds the older back.
    assert log.tend(NOW + 5000) == 4
    assert log.append(batch(), NOW).base_offset == 4
    assert values(open_log(tmp_path, **config)) == [(4, b"value")]
    forever = open_log(tmp_path / "other", segment_bytes=1, retention_ms=-1)
    forever.append(batch(ts=0), NOW)
    assert forever.tend(NOW) == 0


def test_records_without_a_time_are_as_old_as_their_segment(tmp_path: Path) -> None:
    log = open_log(tmp_path, retention_ms=1000)
    log.append(batch(ts=-1), NOW)
    assert [log.tend(NOW), log.tend(NOW + 900), log.tend(NOW + 1100)] == [0, 0, 1]


def test_retention_by_size_keeps_at_least_that_much(tmp_path: Path) -> None:
    size = len(batch())
    log = open_log(tmp_path, segment_bytes=1, retention_bytes=3 * size)
    for _ in range(5):
        log.append(batch(), NOW)
    assert log.tend(NOW) == 2
    assert log.tend(NOW) == 2
    log.config = replace(log.config, retention_bytes=2 * size - 1)
    assert log.tend(NOW) == 3
    log.config = replace(log.config, retention_bytes=0)
    assert log.tend(NOW) == 4  # The segment that grows stays.
    log.config = replace(log.config, retention_bytes=-1, cleanup_policy="compact", retention_ms=0)
    assert log.tend(NOW + 10**10) == 4


def test_a_segment_is_closed_by_its_age_also_over_a_restart(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_ms=1000)
    log.tend(NOW)
    log.append(batch(), NOW)
    log.tend(NOW)
    log.close()
    log = open_log(tmp_path, segment_ms=1000)
    log.tend(NOW + 999)
    assert len(log.segments) == 1
    log.tend(NOW + 1000)
    assert len(log.segments) == 2
    log.tend(NOW + 5000)
    assert len(log.segments) == 2  # An empty segment has nothing to close.


def test_delete_removes_the_directory_and_a_new_topic_starts_from_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path / "p")
    log.append(batch(pid=1, seq=0), NOW)
    log.delete()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LogError):
        log.append(batch(), NOW)
    again = PartitionLog.open(tmp_path / "p", "t", 0, uuid4(), LogConfig(), NOW)
    assert again.append(batch(pid=1, seq=0), NOW).base_offset == 0


def test_another_topics_directory_is_refused(tmp_path: Path) -> None:
    open_log(tmp_path).append(batch(), NOW)
    with pytest.raises(LogError, match=str(TOPIC_ID)) as refused:
        PartitionLog.open(tmp_path, "t", 0, uuid4(), LogConfig(), NOW)
    assert refused.value.code == ErrorCode.INCONSISTENT_TOPIC_ID
    assert log_file(tmp_path).stat().st_size
