"""The end of a log as crashes leave it: an old file's bytes behind the new ones. How long repairing gigabytes takes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from semel.log import log as log_module
from semel.log.segments import Segment
from semel.wire.records import patch_base_offset
from tests.log.builders import NOW, batch, log_file, open_log, seen, values

BATCH_BYTES = [1_000, 16_000, 1_000_000]
GIGABYTES = 2


@pytest.mark.parametrize("lose_snapshots", [False, True])
def test_an_old_file_under_the_new_bytes_is_never_served(tmp_path: Path, lose_snapshots: bool) -> None:
    """File systems that reuse blocks: the new log's end is followed, at every possible byte, by a log of before.

    The old batches are whole and their checksums right. Only one that lies exactly where the next batch belongs and has
    the next offset could not be told from a new one; no file is reused or allocated beforehand, so there is none.
    """
    old = open_log(tmp_path / "old")
    for number in range(40):
        old.append(batch(value=b"old %02d" % number, pid=1, seq=number), NOW)
    stale = log_file(tmp_path / "old").read_bytes()
    size = len(stale) // 40
    new = open_log(tmp_path / "new")
    for number in range(10):
        new.append(batch(value=b"new %02d" % number, pid=1, seq=number), NOW)
    before, data = seen(new), log_file(tmp_path / "new").read_bytes()
    for shift in [*range(0, 2 * size, 7), 9 * size, 11 * size, 12 * size]:
        image = tmp_path / str(shift)
        shutil.copytree(tmp_path / "new", image)
        log_file(image).write_bytes(data + stale[shift:])
        if lose_snapshots:
            for path in image.glob("*.snapshot"):
                path.unlink()
        again = open_log(image)
        assert seen(again) == before, f"old bytes from {shift} on"
        assert log_file(image).stat().st_size == len(data)
        again.append(batch(value=b"next", pid=1, seq=10), NOW)
        assert values(open_log(image))[-1] == (10, b"next")


def test_a_file_that_was_made_larger_beforehand_is_cut_to_its_batches(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(batch(), NOW)
    before = seen(log)
    with log_file(tmp_path).open("r+b") as file:
        file.truncate(50_000_000)
    started = time.process_time()
    assert seen(open_log(tmp_path)) == before
    assert time.process_time() - started < 1
    assert log_file(tmp_path).stat().st_size == len(batch())


def _fill(directory: Path, size: int, total: int) -> None:
    """A log of one segment of `total` bytes, its batches written without going through the checks one by one."""
    open_log(directory).close()
    whole = bytes(batch(value=bytes(size - 80)))
    count = max(1, (8 << 20) // len(whole))
    chunk = bytearray(whole * count)
    with Segment(directory, 0).path.open("wb") as file:
        for turn in range(total // len(chunk)):
            for number in range(count):
                patch_base_offset(chunk, number * len(whole), turn * count + number, 0)
            file.write(chunk)


@pytest.mark.soak
@pytest.mark.parametrize("size", BATCH_BYTES)
def test_repairing_takes_less_than_a_second_a_gigabyte(tmp_path: Path, size: int) -> None:
    """After kill -9 what came since the last snapshot is read; without any snapshot everything is.

    In time of the processor: how long the bytes take from the disk is the disk's.
    """
    _fill(tmp_path, size, GIGABYTES << 30)
    half = bytes(batch())[:50]
    with log_file(tmp_path).open("ab") as file:
        file.write(half)
    started = time.process_time()
    log = open_log(tmp_path)
    everything = (time.process_time() - started) / GIGABYTES
    assert log.recovery.cut_bytes == len(half)
    assert log.recovery.read_bytes >= GIGABYTES * 0.99 * (1 << 30)
    for _ in range(log_module.SNAPSHOT_BATCHES + 1000):
        log.append(batch(value=bytes(min(size, 50_000))), NOW)
    with log_file(tmp_path).open("ab") as file:
        file.write(half)
    started = time.process_time()
    again = open_log(tmp_path)
    killed = (time.process_time() - started) / GIGABYTES
    assert again.recovery.cut_bytes == len(half)
    assert again.log_end_offset == log.log_end_offset
    print(f"\nbatches of {size} bytes: {everything:.2f} s a GB without a snapshot, {killed:.3f} s a GB after kill -9")
    assert killed < 1
    assert everything < 1 or size < 16_000  # Small batches are counted one by one.
