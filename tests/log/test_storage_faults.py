"""A full disk and a failing sync: what was acknowledged stays, what was refused is nowhere."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from semel.disk import disk
from semel.errors import ErrorCode
from semel.log import log as log_module
from semel.log.log import LogError
from tests.log.builders import NOW, batch, log_file, open_log, seen, values


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses bytes past `limit` in any file: first with a short write, then with an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 61, 80])
def test_a_short_write_is_undone_and_the_log_goes_on_later(tmp_path: Path, room: int) -> None:
    log = open_log(tmp_path)
    log.append(batch(pid=1, txn=True), NOW)
    before, size = seen(log), log_file(tmp_path).stat().st_size
    with file_size_limit(size + room):
        for _ in range(2):
            with pytest.raises(LogError) as refused:
                log.append(batch(pid=1, seq=1, txn=True, value=bytes(100)), NOW)
            assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
        if room < 78:
            with pytest.raises(LogError):
                log.append_marker(1, 1, True, 0, NOW)
        with pytest.raises(LogError):
            log.append_internal([(b"k", bytes(100))], NOW)
        assert log_file(tmp_path).stat().st_size == size
    assert seen(log) == before
    assert seen(open_log(tmp_path)) == before
    # The client's retry, once there is room: the sequence was not used up.
    assert log.append(batch(pid=1, seq=1, txn=True, value=bytes(100)), NOW).base_offset == 1
    assert seen(open_log(tmp_path)) == seen(log)


def test_a_full_disk_when_a_segment_is_closed(tmp_path: Path) -> None:
    log = open_log(tmp_path, segment_bytes=1)
    log.append(batch(), NOW)
    with file_size_limit(0), pytest.raises(LogError) as refused:
        log.append(batch(), NOW)
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    assert log.append(batch(), NOW).base_offset == 1
    assert [offset for offset, _ in values(open_log(tmp_path))] == [0, 1]


def test_a_snapshot_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SNAPSHOT_BATCHES", 1)

    def no_space(*args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = open_log(tmp_path)
    monkeypatch.setattr(log_module, "write_snapshot", no_space)
    for seq in range(3):
        log.append(batch(pid=1, seq=seq), NOW)
    assert seen(open_log(tmp_path)) == seen(log)


def test_a_write_that_can_neither_be_made_nor_undone_stops_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    log.append(batch(), NOW)
    before = seen(log)

    def broken(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(disk, "truncate", broken)
        with file_size_limit(log_file(tmp_path).stat().st_size + 30), pytest.raises(LogError):
            log.append(batch(), NOW)
    with pytest.raises(LogError, match="stopped") as refused:
        log.append(batch(), NOW)
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    assert seen(log) == before
    again = open_log(tmp_path)
    assert again.recovery.cut_bytes == 30
    assert seen(again) == before


@pytest.mark.parametrize("where", ["append", "marker", "flush", "roll"])
def test_after_a_failed_sync_nothing_is_written_or_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The kernel drops what it could not write and reports it once: a second sync would lie (fsyncgate)."""
    log = open_log(tmp_path, fsync="always", segment_bytes=1 if where == "roll" else 1 << 30)
    log.append(batch(pid=1, txn=True), NOW)
    before = seen(log)
    syncs = []

    def failing(descriptor: int) -> None:
        syncs.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "sync", failing)
    step = {
        "append": lambda: log.append(batch(pid=1, seq=1, txn=True), NOW),
        "roll": lambda: log.append(batch(pid=1, seq=1, txn=True), NOW),
        "marker": lambda: log.append_marker(1, 1, True, 0, NOW),
        "flush": log.flush,
    }[where]
    with pytest.raises(LogError) as refused:
        step()
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    for _ in range(2):
        with pytest.raises(LogError) as refused:
            log.append(batch(), NOW)
        assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    with pytest.raises(LogError):
        log.append_marker(1, 1, True, 0, NOW)
    log.close()
    assert len(syncs) == 1
    assert seen(log) == before


def test_always_syncs_before_the_acknowledgement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = disk.sync
    log = open_log(tmp_path / "always", fsync="always")
    monkeypatch.setattr(disk, "sync", lambda file: (real(file), synced.append(os.fstat(file).st_size)))
    for _ in range(3):
        log.append(batch(), NOW)
        assert synced[-1] == log_file(tmp_path / "always").stat().st_size
    assert len(synced) == 3
    open_log(tmp_path / "os").append(batch(), NOW)
    assert len(synced) == 3


def test_a_closed_segment_is_on_the_disk_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that damage before the last segment can never be the work of a power failure."""
    synced: list[tuple[int, int]] = []
    real = disk.sync

    def noting(file: int) -> None:
        real(file)
        synced.append((os.fstat(file).st_size, len(list(tmp_path.glob("*.log")))))

    monkeypatch.setattr(log_module, "write_snapshot", lambda *_, **__: 0)  # Syncs files of its own.
    monkeypatch.setattr(disk, "sync", noting)
    log = open_log(tmp_path, segment_bytes=1)
    synced.clear()
    for _ in range(3):
        log.append(batch(), NOW)
    assert synced == [(len(batch()), 1), (len(batch()), 2)]


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("a file")
    with pytest.raises(LogError, match=str(tmp_path / "p")) as refused:
        open_log(tmp_path / "p")
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR


@contextmanager
def no_more_files() -> Iterator[None]:
    """The process has no file descriptor left; those that are open go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("fsync", ["os", "always"])
@pytest.mark.parametrize("file_open", [True, False])
def test_a_lack_of_file_descriptors_does_not_stop_the_log_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Literal["os", "always"], file_open: bool
) -> None:
    log = open_log(tmp_path, segment_bytes=1, fsync=fsync)
    log.append(batch(), NOW)
    if not file_open:
        log._segments[-1].close()  # As the bound on open files does when other logs are busier.
    with no_more_files(), pytest.raises(LogError) as refused:
        log.append(batch(), NOW)
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    log._segments[-1].close()
    with no_more_files(), pytest.raises(LogError):
        log.flush()
    assert log.append(batch(), NOW).base_offset == 1
    log.append(batch(), NOW)
    assert [offset for offset, _ in values(open_log(tmp_path))] == [0, 1, 2]


def test_a_first_batch_whose_file_name_could_not_be_synced_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, fsync="always")

    def no_descriptor(directory: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync_directory", no_descriptor)
        with pytest.raises(LogError):
            log.append(batch(value=bytes(500)), NOW)
    assert log_file(tmp_path).stat().st_size == 0
    assert log.append(batch(), NOW).base_offset == 0
