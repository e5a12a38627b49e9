"""What a log is after kill -9, torn writes, damaged files and lost snapshots."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from semel.disk import disk
from semel.errors import ErrorCode
from semel.log import log as log_module
from semel.log.log import LogError, PartitionLog
from tests.log.builders import NOW, batch, log_file, open_log, seen, values


def history(log: PartitionLog, rounds: int = 3) -> None:
    """Some of everything: transactions that commit, abort and stay open; producers without transactions."""
    for turn in range(rounds):
        log.append(batch(2, value=b"plain %d" % turn), NOW)
        log.append(batch(pid=1, seq=turn, value=b"idempotent %d" % turn), NOW)
        log.append(batch(2, pid=2, epoch=turn, txn=True, value=b"aborted %d" % turn), NOW)
        log.append(batch(pid=3, seq=turn, txn=True, value=b"committed %d" % turn), NOW)
        log.append_marker(2, turn + 1, False, 0, NOW)
        log.append_marker(3, 0, True, 0, NOW)
    log.append(batch(pid=4, txn=True, value=b"open"), NOW)


def states(directory: Path) -> tuple[list[int], list[dict[str, Any]], bytes]:
    """A log of two rounds: where each batch ends in the file, what is seen after each, and the file."""
    log = open_log(directory)
    ends, after = [0], [seen(log)]

    def note(*_: object) -> None:
        after.append(seen(log))
        ends.append(log_file(directory).stat().st_size)

    append, append_marker = log.append, log.append_marker
    log.append = lambda *a, **k: (append(*a, **k), note())[0]  # type: ignore[method-assign]
    log.append_marker = lambda *a, **k: (append_marker(*a, **k), note())[0]  # type: ignore[method-assign]
    history(log, 2)
    return ends, after, log_file(directory).read_bytes()


def test_every_cut_of_the_last_batches_leaves_the_earlier_ones_whole(tmp_path: Path) -> None:
    ends, after, data = states(tmp_path)
    for size in range(ends[-4], ends[-1] + 1):  # A data batch and two markers before it.
        log_file(tmp_path).write_bytes(data[:size])
        log = open_log(tmp_path)
        whole = max(number for number, end in enumerate(ends) if end <= size)
        assert seen(log) == after[whole]
        assert log.recovery.cut_bytes == size - ends[whole]
        assert log_file(tmp_path).stat().st_size == ends[whole]
        log.append(batch(value=b"goes on"), NOW)
        assert values(open_log(tmp_path))[-1] == (log.log_end_offset - 1, b"goes on")


def test_every_cut_behind_a_clean_stop_is_noticed(tmp_path: Path) -> None:
    """The snapshot of `close` says more than the file holds: it must not be believed, also not later on."""
    ends, after, data = states(tmp_path)
    for size in range(ends[-3], ends[-1]):
        log_file(tmp_path).write_bytes(data)
        stopped = open_log(tmp_path)
        stopped.append(batch(pid=99), NOW)
        stopped.close()
        log_file(tmp_path).write_bytes(data[:size])
        log = open_log(tmp_path)
        assert seen(log) == after[max(number for number, end in enumerate(ends) if end <= size)]
        for _ in range(3):  # Past the size at which the old snapshot was made.
            log.append(batch(value=bytes(200)), NOW)
        assert seen(open_log(tmp_path)) == seen(log)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        bytes(60),
        bytes(61),
        bytes(5000),
        b"\xff" * 300,
        random.Random(1).randbytes(3_000_000),
        bytes(batch()),  # A whole batch of the wrong offset.
        bytes(batch())[:70],
    ],
    ids=["zero", "60 zeros", "61 zeros", "5000 zeros", "ones", "noise", "a batch with offset 0", "half a batch"],
)
@pytest.mark.parametrize("closed", [False, True])
def test_garbage_behind_the_log_is_cut(tmp_path: Path, garbage: bytes, closed: bool) -> None:
    log = open_log(tmp_path)
    history(log)
    before = seen(log)
    if closed:
        log.close()
    with log_file(tmp_path).open("ab") as file:
        file.write(garbage)
    log = open_log(tmp_path)
    assert seen(log) == before
    assert log.recovery.cut_bytes == len(garbage)


def test_the_last_batch_again_behind_itself_is_cut(tmp_path: Path) -> None:
    ends, after, data = states(tmp_path)
    log_file(tmp_path).write_bytes(data + data[ends[-2] :])
    assert seen(open_log(tmp_path)) == after[-1]


def test_every_flipped_bit_in_the_last_batches_cuts_there(tmp_path: Path) -> None:
    """Except in the leader epoch, which no checksum covers and nothing depends on."""
    ends, after, data = states(tmp_path)
    for at in range(ends[-3], ends[-1]):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        log_file(tmp_path).write_bytes(flipped)
        damaged = max(number for number, end in enumerate(ends) if end <= at)
        log = open_log(tmp_path)
        if 12 <= at - ends[damaged] < 16:
            assert log.log_end_offset == after[-1]["offsets"][1]
        else:
            assert seen(log) == after[damaged]


@pytest.mark.parametrize("segment_bytes", [1 << 30, 800, 1])
@pytest.mark.parametrize("end", ["killed", "closed"])
@pytest.mark.parametrize("lost", ["nothing", "newest", "all", "damaged", "not ours"])
def test_snapshots_only_save_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_bytes: int, end: str, lost: str
) -> None:
    monkeypatch.setattr(log_module, "SNAPSHOT_BATCHES", 4)
    log = open_log(tmp_path, segment_bytes=segment_bytes)
    history(log, 5)
    before = seen(log)
    if end == "closed":
        log.close()
    snapshots = sorted(tmp_path.glob("*.snapshot"))
    assert snapshots
    for path in [] if lost == "nothing" else snapshots[-1:] if lost == "newest" else snapshots:
        if lost == "damaged":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0x10
            path.write_bytes(data)
        elif lost == "not ours":
            path.write_bytes(b"SMLG" + bytes(500))
        else:
            path.unlink()
    again = open_log(tmp_path, segment_bytes=segment_bytes)
    assert seen(again) == before
    if (end, lost) == ("closed", "nothing"):
        assert again.recovery.read_bytes == 0
    if lost in ("all", "damaged", "not ours"):
        assert again.recovery.snapshot_offset == -1
    history_goes_on(again)
    assert seen(open_log(tmp_path, segment_bytes=segment_bytes)) == seen(again)


def history_goes_on(log: PartitionLog) -> None:
    """Duplicates are still known, and the open transaction can be ended."""
    assert log.append(batch(pid=1, seq=2), NOW).duplicate
    log.append_marker(4, 1, False, 0, NOW)
    assert log.last_stable_offset == log.log_end_offset


def test_after_a_restart_of_the_machine_only_synced_snapshots_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sync, bytes below a snapshot may be missing after a loss of power, so they are checked again."""
    monkeypatch.setattr(log_module, "SNAPSHOT_BATCHES", 4)
    log = open_log(tmp_path)
    history(log)
    before = seen(log)
    assert open_log(tmp_path).recovery.snapshot_offset > 0
    monkeypatch.setattr(disk, "boot_id", lambda: "another start")
    again = open_log(tmp_path)
    assert again.recovery.snapshot_offset == -1
    assert seen(again) == before
    again.append(batch(), NOW)
    again.close()
    monkeypatch.setattr(disk, "boot_id", lambda: "yet another start")
    assert open_log(tmp_path).recovery.read_bytes == 0


@pytest.mark.parametrize("damage", ["missing", "flipped", "empty"])
def test_a_lost_index_of_a_closed_segment_is_made_anew(tmp_path: Path, damage: str) -> None:
    log = open_log(tmp_path, segment_bytes=700)
    history(log, 6)
    before = seen(log)
    log.close()
    indexes = sorted(tmp_path.glob("*.index"))
    assert len(indexes) > 3
    for path in indexes:
        if damage == "missing":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data if damage == "flipped" else b"")
    assert seen(open_log(tmp_path)) == before
    assert seen(open_log(tmp_path)) == before


def test_damage_in_the_middle_is_refused_and_named(tmp_path: Path) -> None:
    """Records behind it were acknowledged; to cut them all would lose them without a word."""
    log = open_log(tmp_path, segment_bytes=700)
    history(log, 6)
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    first = min(tmp_path.glob("*.log"))
    data = bytearray(first.read_bytes())
    data[100] ^= 1
    first.write_bytes(data)
    for path in tmp_path.glob("*.snapshot"):
        path.unlink()
    with pytest.raises(LogError, match=first.name) as refused:
        open_log(tmp_path)
    assert refused.value.code == ErrorCode.KAFKA_STORAGE_ERROR
    assert values(open_log(tmp_path.with_name("copy")))


def test_files_that_a_crash_left_behind_do_not_matter(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    history(log)
    before = seen(log)
    (tmp_path / "00000000000000000009.snapshot.tmp").write_bytes(b"half")
    (tmp_path / "00000000000000000005.log").touch()  # A segment that was begun when the disk was full.
    (tmp_path / "00000000000000000005.snapshot").write_bytes(b"")
    assert seen(open_log(tmp_path)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000000000000000000.log", "partition.metadata"]


def test_a_log_that_lost_its_end_below_its_start_goes_on_behind_it(tmp_path: Path) -> None:
    """Offsets must not be used again: consumers remember them."""
    log = open_log(tmp_path)
    for _ in range(9):
        log.append(batch(), NOW)
    log.delete_before(7)
    log_file(tmp_path).write_bytes(log_file(tmp_path).read_bytes()[:300])
    again = open_log(tmp_path)
    assert (again.log_start_offset, again.log_end_offset, again.high_watermark) == (7, 7, 7)
    again.append(batch(value=b"new"), NOW)
    assert values(open_log(tmp_path)) == [(7, b"new")]


def test_opening_a_large_log_reads_only_what_came_after_the_last_snapshot(tmp_path: Path) -> None:
    """200 MB of 16 KB batches; without snapshots all of it would be read."""
    log = open_log(tmp_path)
    sent = batch(value=bytes(16_000))
    copies = 200_000_000 // len(sent)
    for _ in range(copies):
        log.append(bytearray(sent), NOW)
    before = (log.log_end_offset, log.high_watermark, log.last_stable_offset)
    again = open_log(tmp_path)
    assert (again.log_end_offset, again.high_watermark, again.last_stable_offset) == before == (copies,) * 3
    assert again.recovery.read_bytes <= log_module.SNAPSHOT_BYTES + (1 << 20)
    assert again.recovery.batches <= log_module.SNAPSHOT_BATCHES
    again.close()
    assert open_log(tmp_path).recovery.read_bytes == 0


def test_opening_a_log_of_small_batches_checks_few_of_them(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for number in range(30_000):
        log.append(batch(pid=1, seq=number), NOW)
    again = open_log(tmp_path)
    assert again.log_end_offset == 30_000
    assert again.recovery.batches <= 3 * log_module.SNAPSHOT_BATCHES
    assert again.append(batch(pid=1, seq=29_996), NOW).duplicate


WRITER = """
import sys
from pathlib import Path
from semel.log.log import LogConfig, PartitionLog
from tests.log.builders import NOW, TOPIC_ID, batch
log = PartitionLog.open(Path(sys.argv[1]), "t", 0, TOPIC_ID, LogConfig(segment_bytes=60_000), NOW)
start = log.log_end_offset
for number in range(start, start + 1_000_000):
    result = log.append(batch(value=b"%d" % number * 50), NOW)
    assert result.base_offset == number
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(7)
    acknowledged = -1
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(rng.randrange(200, 3000)):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
        log = open_log(tmp_path)
        assert log.log_end_offset > acknowledged
        assert values(log) == [(number, b"%d" % number * 50) for number in range(log.log_end_offset)]
    assert acknowledged > 1000
    assert len(list(tmp_path.glob("*.log"))) > 3


def test_producers_are_known_after_their_records_were_deleted_though_a_snapshot_was_damaged(tmp_path: Path) -> None:
    """Found by the model test: what only the damaged snapshot and the deleted segments knew must be written anew."""
    log = open_log(tmp_path, segment_bytes=1)
    for pid in (2, 1):
        log.append(batch(pid=pid, epoch=0, seq=0), NOW)
    newest = max(tmp_path.glob("*.snapshot"))
    newest.write_bytes(newest.read_bytes()[:-1])
    log = open_log(tmp_path, segment_bytes=1)
    known = sorted(log.producers())
    log.delete_before(-1)
    again = open_log(tmp_path, segment_bytes=1)
    assert [producer.producer_id for producer in known] == [1, 2]
    assert sorted(again.producers()) == known
