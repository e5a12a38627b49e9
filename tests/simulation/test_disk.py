"""The simulated disk: a kill loses nothing, a loss of power everything that was not synced, if the dice say so."""

from __future__ import annotations

import errno
import os
import random
from pathlib import PurePosixPath

import pytest

from semel.disk import Disk
from tests.simulation.disk import SimulatedDisk

DIRECTORY = PurePosixPath("/d")
FILE = DIRECTORY / "f"


def new_disk(seed: int) -> SimulatedDisk:
    disk = SimulatedDisk(random.Random(seed), lambda *_: None, lambda: None)
    disk.make_directory(DIRECTORY)
    disk.sync_directory("/")
    return disk


def write(disk: SimulatedDisk, data: bytes, position: int = 0, *, sync: bool) -> None:
    file = disk.open(FILE, os.O_RDWR | os.O_CREAT, 0o644)
    assert disk.pwrite(file, data, position) == len(data)
    if sync:
        disk.sync(file)


def test_no_operation_reaches_the_real_disk() -> None:
    operations = {name for name in vars(Disk) if not name.startswith("_") and name != "replaced_by"}
    assert operations <= set(vars(SimulatedDisk))


def test_what_was_synced_survives_a_loss_of_power_and_of_the_rest_any_part() -> None:
    found = set()
    for seed in range(300):
        disk = new_disk(seed)
        write(disk, b"safe", sync=True)
        disk.sync_directory(DIRECTORY)
        write(disk, b"0123", 4, sync=False)
        write(disk, b"4567", 8, sync=False)
        disk.lose_power()
        data = disk.read(FILE)
        assert data[:4] == b"safe"
        found.add(data[4:])
    assert {b"", b"0123", b"01234567", b"012345", b"0123\0\0\0\0", b"\0\0\0\0" + b"4567"} <= found


def test_a_name_that_was_not_synced_may_be_gone_with_its_bytes() -> None:
    found = set()
    for seed in range(50):
        disk = new_disk(seed)
        write(disk, b"synced", sync=True)
        disk.lose_power()
        found.add(disk.exists(FILE))
    assert found == {True, False}


def test_a_rename_is_there_or_not_and_never_half() -> None:
    found = set()
    for seed in range(50):
        disk = new_disk(seed)
        write(disk, b"old", sync=True)
        disk.sync_directory(DIRECTORY)
        file = disk.open(DIRECTORY / "new", os.O_RDWR | os.O_CREAT, 0o644)
        disk.pwrite(file, b"new", 0)
        disk.sync(file)
        disk.rename(DIRECTORY / "new", FILE)
        disk.lose_power()
        found.add(disk.read(FILE))
    assert found == {b"old", b"new"}


def test_a_failed_sync_loses_what_it_should_have_kept() -> None:
    """The kernel marks the pages clean: a second sync succeeds and brings nothing to the disk."""
    disk = new_disk(1)
    write(disk, b"safe", sync=True)
    disk.sync_directory(DIRECTORY)
    file = disk.open(FILE, os.O_RDWR, 0o644)
    disk.pwrite(file, b"lost", 4)
    disk.sync_fails = 1
    with pytest.raises(OSError, match="Input/output"):
        disk.sync(file)
    assert disk.read(FILE) == b"safelost"
    disk.lose_power()
    assert disk.read(FILE) == b"safe"


def test_a_full_disk_writes_less_or_nothing() -> None:
    disk = new_disk(3)
    file = disk.open(FILE, os.O_RDWR | os.O_CREAT, 0o644)
    disk.full = True
    outcomes = set()
    for _ in range(50):
        try:
            outcomes.add(disk.pwrite(file, b"0123", 0) < 4)
        except OSError as problem:
            outcomes.add(problem.errno)
    assert outcomes == {True, errno.ENOSPC}
