"""What compaction takes and leaves, when it is due, and what a crash, a full disk or damage makes of it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semel.disk import Disk, disk
from semel.errors import ErrorCode
from semel.failpoints import arm_failpoints
from semel.log import compaction
from semel.log.log import LogError, PartitionLog
from semel.wire.records import BatchBuilder, BatchHeader, decode_records, iter_batches
from tests.log.builders import NOW, batch, open_log, read_all
from tests.log.test_compaction_model import committed
from tests.log.test_storage_faults import file_size_limit
from tests.simulation.disk import SimulatedDisk
from tests.simulation.loop import Crash

COMPACTED: dict[str, Any] = {
    "cleanup_policy": "compact",
    "segment_bytes": 1,
    "min_cleanable_dirty_ratio": 0.0,
    "delete_retention_ms": 1000,
}


def compact(log: PartitionLog, now_ms: int = NOW) -> bool:
    """One pass, if one is due."""
    steps = log.compactor.begin(now_ms)
    for _ in steps or ():
        pass
    return steps is not None


def keyed(log: PartitionLog) -> list[tuple[int, bytes | None, bytes | None]]:
    """(offset, key, value) of what a read_committed reader gets."""
    return [(record.offset, record.key, record.value) for record in committed(log, log.log_start_offset, 1 << 30)]


def headers(log: PartitionLog) -> list[BatchHeader]:
    return [header for _, header in iter_batches(read_all(log))]


def write(log: PartitionLog, *pairs: tuple[bytes, bytes | None], now_ms: int = NOW, **fields: Any) -> None:
    for key, value in pairs:
        log.append(batch(key=key, value=value, ts=now_ms, **fields), now_ms, transaction_version=2)  # type: ignore[arg-type]


def test_the_last_record_of_each_key_stays_where_it_is(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, (b"a", b"1"), (b"b", b"1"), (b"a", b"2"), (b"c", b"1"), (b"b", b"2"))
    assert compact(log)
    # b's last record is in the segment that grows, which no pass touches: until it is closed, the older one stays.
    assert keyed(log) == [(1, b"b", b"1"), (2, b"a", b"2"), (3, b"c", b"1"), (4, b"b", b"2")]
    write(log, (b"d", b"1"))
    assert compact(log)
    assert keyed(log) == [(2, b"a", b"2"), (3, b"c", b"1"), (4, b"b", b"2"), (5, b"d", b"1")]
    assert not compact(log)
    assert keyed(open_log(tmp_path, **COMPACTED)) == keyed(log)


def test_small_neighbours_become_one_segment(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"%d" % number, b"1") for number in range(6)))
    log.config = replace(log.config, segment_bytes=3 * len(batch(key=b"1", value=b"1")))
    before = keyed(log)
    assert compact(log)
    assert [segment.base_offset for segment in log.segments] == [0, 3, 5]
    assert sorted(int(path.stem) for path in tmp_path.glob("*.log")) == [0, 3, 5]
    assert keyed(log) == keyed(open_log(tmp_path, **COMPACTED)) == before


@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4])
def test_a_batch_keeps_its_codec_offsets_sequences_and_headers(tmp_path: Path, codec: int) -> None:
    log = open_log(tmp_path, **COMPACTED)
    whole = batch(3, pid=7, seq=10, codec=codec)
    log.append(bytearray(whole), NOW)
    write(log, (b"key", b"later"), (b"x", b"1"))
    assert compact(log)
    first, *_ = headers(log)
    assert (first.base_offset, first.last_offset, first.record_count) == (0, 2, 0)
    assert (first.producer_id, first.producer_epoch, first.base_sequence) == (7, 0, 10)
    log = open_log(tmp_path / "partly", **COMPACTED)
    builder = BatchBuilder(codec)
    for number, (key, value) in enumerate([(b"stays", b"1"), (b"goes", b"2"), (b"stays too", b"3")]):
        builder.append(key, value, NOW + number, (("h", b"v"), ("n", None)))
    log.append(bytearray(builder.build()), NOW)
    write(log, (b"goes", b"later"), (b"x", b"1"))
    assert compact(log)
    data = read_all(log)
    at, header = next(iter_batches(data))
    assert (header.codec, header.last_offset, header.max_timestamp) == (codec, 2, NOW + 2)
    assert [record[2:] for record in decode_records(data, at, header, "t", 0)] == [
        (0, NOW, b"stays", b"1", (("h", b"v"), ("n", None))),
        (2, NOW + 2, b"stays too", b"3", (("h", b"v"), ("n", None))),
    ]


def test_a_tombstone_stays_for_its_time_and_takes_what_it_deletes_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, (b"a", b"1"), (b"a", None), (b"x", b"1"))
    assert compact(log)
    assert keyed(log) == [(1, b"a", None), (2, b"x", b"1")]
    horizon = next(header.delete_horizon_ms for header in headers(log) if header.record_count)
    assert horizon == NOW + 1000
    assert not compact(log, NOW + 999)
    log = open_log(tmp_path, **COMPACTED)
    assert compact(log, NOW + 1000)  # Nothing new was written: the time that has come is reason enough.
    assert keyed(log) == [(2, b"x", b"1")]
    assert not compact(log, NOW + 10**9)


def test_a_record_keeps_its_time_beside_a_tombstone(tmp_path: Path) -> None:
    """The delete horizon takes the place of the base timestamp, which every record's time counts from."""
    builder = BatchBuilder()
    for number, value in enumerate((b"1", None, b"3")):
        builder.append(b"%d" % number, value, NOW - 5000 + number)
    log = open_log(tmp_path, **COMPACTED)
    log.append(bytearray(builder.build()), NOW)
    write(log, (b"x", b"1"))
    assert compact(log)
    assert [record.timestamp_ms for record in committed(log, 0, 1 << 20)][:3] == [NOW - 5000, NOW - 4999, NOW - 4998]
    assert log.offset_for_timestamp(NOW - 4998) == (2, NOW - 4998, 0)
    assert compact(log, NOW + 1000)
    assert [record.timestamp_ms for record in committed(log, 0, 1 << 20)][:2] == [NOW - 5000, NOW - 4998]


def test_aborted_records_go_and_replace_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, (b"a", b"committed"))
    log.append(batch(key=b"a", value=b"aborted", pid=1, txn=True), NOW)
    log.append_marker(1, 1, False, 0, NOW)
    write(log, (b"x", b"1"))
    assert compact(log)
    assert keyed(log) == [(0, b"a", b"committed"), (3, b"x", b"1")]
    assert b"aborted" not in read_all(log)


def test_an_open_transaction_holds_compaction_back_and_its_end_lets_it_go_on(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, (b"a", b"1"), (b"a", b"2"))
    log.append(batch(key=b"a", value=b"open", pid=1, txn=True), NOW)
    write(log, (b"a", b"3"), (b"x", b"1"))
    assert compact(log)
    assert log.compactor.clean_to == 2
    assert not compact(log)
    assert keyed(log) == [(1, b"a", b"2")]
    log.append_marker(1, 1, True, 0, NOW)
    write(log, (b"y", b"1"))
    assert compact(log)
    assert keyed(log) == [(3, b"a", b"3"), (4, b"x", b"1"), (6, b"y", b"1")]


@pytest.mark.parametrize("commit", [True, False])
def test_a_marker_goes_when_its_transaction_is_gone_and_its_time_has_come(tmp_path: Path, commit: bool) -> None:
    """With the marker goes the index entry: readers would take the producer's next transaction for the aborted one."""
    log = open_log(tmp_path, **COMPACTED)
    log.append(batch(key=b"a", value=b"1", pid=1, txn=True), NOW)
    log.append_marker(1, 1, commit, 0, NOW)
    write(log, (b"a", b"2"))
    log.append(batch(key=b"b", value=b"1", pid=1, epoch=1, txn=True), NOW)
    log.append_marker(1, 2, True, 0, NOW)
    write(log, (b"x", b"1"))
    wanted = [(2, b"a", b"2"), (3, b"b", b"1"), (5, b"x", b"1")]
    assert compact(log)
    assert keyed(log) == wanted
    assert [header.base_offset for header in headers(log) if header.is_control] == [1, 4]
    assert compact(log, NOW + 1000)
    assert keyed(log) == wanted
    assert [header.base_offset for header in headers(log) if header.is_control] == [4]
    assert log.aborted_transactions(0, log.log_end_offset) == []
    again = open_log(tmp_path, **COMPACTED)
    assert keyed(again) == wanted
    assert sorted(again.producers()) == sorted(log.producers())


def test_producers_are_known_after_everything_but_the_segments_is_lost(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    for seq in range(7):
        log.append(batch(key=b"a", pid=1, epoch=3, seq=seq), NOW)
    log.append(batch(key=b"a", pid=2, txn=True), NOW)
    log.append_marker(2, 1, False, 0, NOW)
    write(log, (b"x", b"1"))
    assert compact(log)
    known = [producer[:3] for producer in sorted(log.producers())]
    for path in tmp_path.iterdir():
        if path.suffix != ".log":
            path.unlink()
    again = open_log(tmp_path, **COMPACTED)
    assert [producer[:3] for producer in sorted(again.producers())] == known == [(1, 3, 6), (2, 1, -1)]
    for seq in range(2, 7):  # The whole window.
        assert again.append(batch(key=b"a", pid=1, epoch=3, seq=seq), NOW).duplicate
    with pytest.raises(LogError) as refused:
        again.append(batch(key=b"a", pid=1, epoch=3, seq=8), NOW)
    assert refused.value.code == ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER
    assert again.open_transactions() == []


def test_records_without_a_key_go_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path, **COMPACTED | {"cleanup_policy": "delete"})
    write(log, (None, b"1"), (b"a", b"1"), (None, b"2"), (b"x", b"1"))  # type: ignore[arg-type]
    log.config = replace(log.config, cleanup_policy="compact")
    assert compact(log)
    assert keyed(log) == [(1, b"a", b"1"), (3, b"x", b"1")]
    assert "2 records without a key" in caplog.text


# --- When it is due ---


def test_the_dirty_ratio_is_waited_for(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED | {"min_cleanable_dirty_ratio": 0.5})
    write(log, *((b"%d" % number, b"1") for number in range(9)))
    assert compact(log)  # Eight segments, none of them clean.
    for number in range(7):
        write(log, (b"%d" % number, b"2"))
        assert not compact(log)
    write(log, (b"8", b"2"), (b"9", b"1"))
    assert compact(log)
    log = open_log(tmp_path, **COMPACTED | {"min_cleanable_dirty_ratio": 1.0})
    write(log, (b"a", b"1"), (b"a", b"2"))
    assert not compact(log)


def test_young_records_wait_and_old_ones_do_not(tmp_path: Path) -> None:
    lag = {"min_compaction_lag_ms": 1000, "max_compaction_lag_ms": 5000, "min_cleanable_dirty_ratio": 1.0}
    log = open_log(tmp_path, **COMPACTED | lag | {"segment_bytes": 1 << 20})
    write(log, (b"a", b"1"), (b"a", b"2"))
    log.tend(NOW)
    log.tend(NOW + 4999)
    assert len(log.segments) == 1
    log.tend(NOW + 5000)  # Closed by its age, or it could never be compacted.
    assert len(log.segments) == 2
    assert not compact(log, NOW + 5000)
    assert compact(log, NOW + 5001)
    assert keyed(log) == [(1, b"a", b"2")]
    log.config = replace(log.config, min_cleanable_dirty_ratio=0.0, segment_bytes=1)
    write(log, (b"a", b"3"), (b"a", b"4"), (b"x", b"1"), now_ms=NOW + 6000)
    assert not compact(log, NOW + 6999)
    assert compact(log, NOW + 7000)


def test_a_pass_with_more_keys_than_fit_is_the_first_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "KEY_MAP_BYTES", 3 * compaction.KEY_OVERHEAD)
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"%d" % (number % 6), b"%d" % number) for number in range(24)), (b"x", b"1"))
    passes = 0
    while compact(log):
        passes += 1
    assert passes >= 8
    assert keyed(log) == [(n, b"%d" % (n % 6), b"%d" % n) for n in range(18, 24)] + [(24, b"x", b"1")]


def test_only_the_topic_that_asks_for_it_is_compacted(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED | {"cleanup_policy": "delete"})
    write(log, (b"a", b"1"), (b"a", b"2"), (b"x", b"1"))
    assert not compact(log)


# --- Beside the life of the log ---


def test_a_reader_goes_on_with_the_bytes_that_it_was_given(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"a", b"%d" % number) for number in range(5)), (b"x", b"1"))
    slices = log.read(0, 1 << 20, log.high_watermark)
    before = read_all(log)
    log.config = replace(log.config, segment_bytes=1 << 20)
    assert compact(log)
    assert b"".join(os.pread(part.file, part.length, part.position) for part in slices) == before
    assert read_all(log) != before


def test_the_log_lives_on_between_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "STEP_BYTES", 1)
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"a", b"%d" % number) for number in range(5)))
    steps = log.compactor.begin(NOW)
    assert steps is not None
    count = 0
    for _ in steps:
        count += 1
        write(log, (b"new", b"%d" % count))
        assert keyed(log)[-1][2] == b"%d" % count
    assert count >= 8
    assert keyed(log)[0] == (3, b"a", b"3")


def test_a_pass_that_retention_overtakes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "STEP_BYTES", 1)
    for stop_after in range(12):
        directory = tmp_path / str(stop_after)
        log = open_log(directory, **COMPACTED | {"cleanup_policy": "compact,delete"})
        write(log, *((b"a", b"%d" % number) for number in range(6)))
        steps = log.compactor.begin(NOW)
        assert steps is not None
        for _ in range(stop_after):
            next(steps, None)
        log.delete_before(3)
        for _ in steps:
            pass
        assert keyed(log)[-1] == (5, b"a", b"5")
        assert all(offset >= 3 for offset, _, _ in keyed(log))
        assert keyed(open_log(directory, **COMPACTED)) == keyed(log)
        assert list(directory.glob("*.cleaned")) == []
        while compact(log):
            pass
        assert keyed(log) == [(4, b"a", b"4"), (5, b"a", b"5")]


# --- Damage, full disks, crashes ---


def test_damage_is_named_and_nothing_is_rewritten(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"a", b"%d" % number) for number in range(4)))
    path = tmp_path / f"{1:020}.log"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogError, match=str(path)):
        compact(log)
    assert not compact(log)  # The next pass would find the same.
    assert path.read_bytes() == data
    assert list(tmp_path.glob("*.cleaned")) == []


def test_a_full_disk_ends_the_pass_and_room_lets_the_next_one_through(tmp_path: Path) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"%d" % number, b"1") for number in range(6)), (b"x", b"1"))
    log.config = replace(log.config, segment_bytes=1 << 20)
    before = keyed(log)
    with file_size_limit(200), pytest.raises(LogError) as refused:
        compact(log)
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    assert list(tmp_path.glob("*.cleaned")) == []
    assert keyed(log) == keyed(open_log(tmp_path, **COMPACTED)) == before
    log.append(batch(key=b"y"), NOW)
    assert compact(log)
    assert len(log.segments) == 2


def test_a_log_that_has_stopped_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, (b"a", b"1"), (b"a", b"2"), (b"a", b"3"))

    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", failing)
        with pytest.raises(LogError):
            log.flush()
    files = sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir())
    assert not compact(log)
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.iterdir()) == files


class _Images:
    """Copies of a log's directory before every operation on its files: what a kill at that moment leaves behind."""

    def __init__(self, directory: Path, into: Path) -> None:
        self.found: list[Path] = []
        self._directory = directory
        self._into = into

    def take(self) -> None:
        copy = self._into / str(len(self.found))
        shutil.copytree(self._directory, copy)
        self.found.append(copy)

    @contextmanager
    def taken(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name in ("pwrite", "rename", "unlink", "truncate", "sync"):
                real = getattr(Disk, name)

                def operation(*arguments: Any, real: Any = real) -> Any:
                    self.take()
                    return real(*arguments)

                patch.setattr(disk, name, operation, raising=False)
            yield


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
@pytest.mark.parametrize("lose", ["nothing", pytest.param("snapshots", marks=pytest.mark.soak), "all but the log"])
def test_a_kill_at_every_operation_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_bytes: int, lose: str
) -> None:
    log = open_log(tmp_path / "log", **COMPACTED)
    for turn in range(3):
        write(log, (b"a", b"%d" % turn), (b"b", b"%d" % turn))
        log.append(batch(key=b"c", value=b"%d" % turn, pid=1, epoch=turn, txn=True), NOW)
        log.append_marker(1, turn + 1, turn != 1, 0, NOW)
    write(log, (b"d", None), (b"x", b"1"))
    latest = {b"a": b"2", b"b": b"2", b"c": b"2", b"d": None, b"x": b"1"}
    assert {key: value for _, key, value in keyed(log)} == latest
    known = [producer[:3] for producer in sorted(log.producers())]
    log.config = replace(log.config, segment_bytes=segment_bytes)
    images = _Images(tmp_path / "log", tmp_path)
    with images.taken(monkeypatch):
        assert compact(log)
    images.take()
    assert len(images.found) > 10
    for image in images.found:
        for path in image.iterdir():
            if path.suffix in {"snapshots": (".snapshot",), "all but the log": (".snapshot", ".index", "")}.get(
                lose, ()
            ):
                path.unlink()
        again = open_log(image, **COMPACTED)
        assert {key: value for _, key, value in keyed(again)} == latest, image
        assert [producer[:3] for producer in sorted(again.producers())] == known, image
        assert again.log_end_offset == log.log_end_offset
        again.append(batch(key=b"a", value=b"next"), NOW)
        while compact(again):
            pass
        assert {key: value for _, key, value in keyed(again)} == latest | {b"a": b"next"}, image
        assert list(image.glob("*.cleaned")) == []
        assert keyed(open_log(image, **COMPACTED)) == keyed(again)


@pytest.mark.parametrize("where", ["before_swap", "after_swap", "between_deletions", "after_snapshot"])
def test_kill_9_at_every_failpoint(tmp_path: Path, where: str) -> None:
    log = open_log(tmp_path, **COMPACTED)
    write(log, *((b"%d" % (number % 3), b"%d" % number) for number in range(9)), (b"x", b"1"))
    child = os.fork()
    if child == 0:
        try:
            arm_failpoints(f"compaction.{where}:kill")
            compact(open_log(tmp_path, **COMPACTED | {"segment_bytes": 1 << 20}))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = open_log(tmp_path, **COMPACTED)
    assert again.recovery.read_bytes <= len(batch(key=b"x", value=b"1"))  # The snapshot from before still counts.
    while compact(again):
        pass
    assert keyed(again) == [(6, b"0", b"6"), (7, b"1", b"7"), (8, b"2", b"8"), (9, b"x", b"1")]


@pytest.mark.parametrize(("fsync", "segment_bytes"), [("os", 1), ("os", 1 << 20), ("always", 1 << 20)])
def test_a_loss_of_power_at_every_operation_of_a_pass(fsync: str, segment_bytes: int) -> None:
    """Of what was not synced any part may be there. What a pass replaces was on the disk; what replaces it is, too."""
    directory = Path("/data/log")
    crashes = 0
    for at in range(1, 400):
        simulated = SimulatedDisk(random.Random(at), lambda *_: None, lambda: None)
        with disk.replaced_by(simulated):
            disk.make_directory(directory)
            disk.sync_directory("/data")
            disk.sync_directory("/")
            log = open_log(directory, **COMPACTED, fsync=fsync)
            for turn in range(2):
                write(log, (b"a", b"%d" % turn), (b"b", b"%d" % turn))
                log.append(batch(key=b"c", value=b"%d" % turn, pid=1, epoch=turn, txn=True), NOW)
                log.append_marker(1, turn + 1, turn != 0, 0, NOW)
            write(log, (b"x", b"1"))  # The segment that grows; all others are on the disk, whatever `fsync` says.
            log.config = replace(log.config, segment_bytes=segment_bytes)
            simulated.crash_in = at
            try:
                assert compact(log)
            except Crash:
                crashes += 1
            else:
                break
            finally:
                simulated.crash_in = 0
            simulated.lose_power()
            del log
            again = open_log(directory, **COMPACTED, fsync=fsync)
            latest = {key: value for _, key, value in keyed(again) if key != b"x"}
            assert latest == {b"a": b"1", b"b": b"1", b"c": b"1"}, at
            assert [producer[:2] for producer in again.producers()] == [(1, 2)], at
            while compact(again):
                pass
            assert {key: value for _, key, value in keyed(again) if key != b"x"} == latest, at
    else:
        pytest.fail("the pass does not end")
    assert crashes > 20
