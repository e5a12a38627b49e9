"""What the simulation found about a loss of power, each again by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from semel.disk import disk
from semel.log.log import LogConfig, PartitionLog
from semel.wire.records import BatchBuilder
from tests.simulation.disk import SimulatedDisk

NOW = 1_700_000_000_000
DIRECTORY = Path("/data/topics/one/0")
SEEDS = range(60)


def open_log() -> PartitionLog:
    return PartitionLog.open(DIRECTORY, "orders", 0, UUID(int=1), LogConfig(fsync="always"), NOW)


def append(log: PartitionLog, *, sync: bool) -> None:
    batch = BatchBuilder()
    batch.append(b"k", b"v", NOW)
    log.append(bytearray(batch.build()), NOW, sync=sync)


def ends(course: Callable[[PartitionLog, SimulatedDisk], None]) -> set[int]:
    """Log ends after this course of events and a loss of power, for many outcomes of it."""
    found = set()
    for seed in SEEDS:
        simulated = SimulatedDisk(random.Random(seed), lambda *_: None, lambda: None)
        with disk.replaced_by(simulated):
            disk.make_directory("/data/topics")
            disk.sync_directory("/data")
            disk.sync_directory("/")
            log = open_log()
            course(log, simulated)
            simulated.lose_power()
            found.add(open_log().log_end_offset)
            del log
    return found


def test_an_acknowledged_record_keeps_its_directory() -> None:
    """A synced file in a directory whose own name was never synced goes with the directory."""
    assert ends(lambda log, _: append(log, sync=True)) == {1}


def test_what_a_restart_serves_stays() -> None:
    """A killed process had written it without a sync: readers see it after the restart, so it must be on the disk."""

    def killed_then_restarted(log: PartitionLog, simulated: SimulatedDisk) -> None:
        append(log, sync=True)
        append(log, sync=False)
        again = open_log()
        assert again.high_watermark == 2

    assert ends(killed_then_restarted) == {2}


def test_without_a_restart_it_may_go() -> None:
    """It was not acknowledged: that the two tests above can fail."""

    def written(log: PartitionLog, simulated: SimulatedDisk) -> None:
        append(log, sync=True)
        append(log, sync=False)
        assert log.high_watermark == 1

    assert ends(written) == {1, 2}
