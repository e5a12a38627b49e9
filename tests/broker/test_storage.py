"""A full disk and a disk that fails, as clients see them: refused, kept, and gone on with."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from semel.broker.broker import Broker
from semel.broker.config import BrokerConfig
from semel.disk import disk
from semel.errors import ConfigurationError, ErrorCode
from semel.log.log import LogError
from tests.broker.core import Core, batch
from tests.broker.test_transactions import Writer, committed_values, offset_of
from tests.conftest import unavailable

TRANSACTIONS, OFFSETS = "__transaction_state", "__consumer_offsets"


def log_files(core: Core, topic: str) -> str:
    """What the paths of a topic's files begin with."""
    found = core.node.topics.get(topic)
    assert found is not None
    return str(core.node.topics.directory / str(found.info.topic_id))


@contextmanager
def failing_syncs(monkeypatch: pytest.MonkeyPatch, under: str) -> Iterator[list[str]]:
    """Every sync of a file below `under` fails; gives the paths that were asked for."""
    asked: list[str] = []
    real = disk.sync

    def sync(file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{int(file)}")
        if path.startswith(under):
            asked.append(path)
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", sync)
        yield asked


def test_a_failed_sync_of_the_offsets_stops_them_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(tmp_path, BrokerConfig(fsync="always"))
    for topic in ("a", "z"):
        core.create(topic)
    writer = Writer(core, "w")
    for topic in ("a", "z"):
        assert writer.write(topic, b"1") == 0
    assert writer.commit_offset("g", "a", 1) == 0
    with failing_syncs(monkeypatch, log_files(core, OFFSETS)) as asked:
        assert writer.end(True) == 0, "the decision is durable, so it is answered"
        # Whoever reads records waits for no offset: their markers were written although an earlier log refused.
        assert committed_values(core, "a") == committed_values(core, "z") == [b"1"]
        core.node.sweep()
        assert len(asked) == 1, "a failed sync is never tried again"
    core.node.sweep()
    error, _ = offset_of(core, "g", "a")
    assert error == ErrorCode.UNSTABLE_OFFSET_COMMIT, "the offset is decided and not written: a reader has to wait"
    core.restart()
    assert offset_of(core, "g", "a") == (0, 1)
    assert writer.write("a", b"2") == 0
    assert writer.end(True) == 0


def test_a_failed_sync_of_the_transaction_log_decides_nothing_until_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(tmp_path, BrokerConfig(fsync="always"))
    core.create("a")
    writer = Writer(core, "w")
    assert writer.write("a", b"1") == 0
    with failing_syncs(monkeypatch, log_files(core, TRANSACTIONS)) as asked:
        assert writer.end(True) != 0
        assert writer.end(False) != 0, "the first decision may be on the disk: no other one is taken"
        assert len(asked) == 1
    assert writer.end(False) != 0
    assert core.fetch("a", 0, committed=True).last_stable_offset == 0
    core.restart()
    values = committed_values(core, "a")
    assert values in ([b"1"], []), "as it stands on the disk"
    assert writer.end(True) == 0 or values == []


def test_a_failed_sync_of_one_partition_lets_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(tmp_path, BrokerConfig(fsync="always"))
    for topic in ("a", "b"):
        core.create(topic)
    assert core.produce("a", batch(b"1")).error_code == 0
    with failing_syncs(monkeypatch, log_files(core, "a")) as asked:
        assert core.produce("a", batch(b"2")).error_code == ErrorCode.KAFKA_STORAGE_ERROR
        assert len(asked) == 1
    assert core.produce("a", batch(b"3")).error_code == ErrorCode.KAFKA_STORAGE_ERROR
    assert core.produce("b", batch(b"1")).error_code == 0
    assert core.fetch("a", 0).high_watermark == 1
    core.restart()
    assert core.fetch("a", 0).high_watermark in (1, 2)
    assert core.produce("a", batch(b"3")).error_code == 0


def test_a_transaction_that_cannot_be_aborted_holds_up_no_other_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = Core(tmp_path, BrokerConfig(fsync="always"))
    for topic in ("a", "b"):
        core.create(topic)
    first, second = Writer(core, "first"), Writer(core, "second")
    assert first.write("a", b"0") == 0
    with failing_syncs(monkeypatch, log_files(core, "a")):
        assert first.write("a", b"1") == ErrorCode.KAFKA_STORAGE_ERROR
    assert second.write("b", b"1") == 0
    core.pass_time(60_000)
    for _ in range(3):
        core.node.sweep()
    assert core.fetch("b", 0, committed=True).last_stable_offset == 2
    assert core.fetch("a", 0, committed=True).last_stable_offset == 0
    assert sum("tried again" in record.message for record in caplog.records) == 1, "said once, not with every sweep"
    core.restart()
    core.node.sweep()
    assert core.fetch("a", 0, committed=True).last_stable_offset == core.fetch("a", 0).high_watermark
    assert committed_values(core, "a") == []


def test_a_failed_sync_of_the_metadata_takes_no_change_any_more(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = str(core.data / "metadata.log")
    core.create("before")
    with failing_syncs(monkeypatch, metadata) as asked, pytest.raises(AssertionError, match="kafka_storage_error"):
        core.create("lost")
    with pytest.raises(AssertionError, match="kafka_storage_error"):
        core.create("lost")
    assert len(asked) == 1
    assert core.produce("before", batch(b"1")).error_code == 0
    core.restart()
    assert core.node.topics.get("lost") is None
    core.create("lost")


def test_a_transaction_of_nobody_is_aborted_with_an_epoch_that_fences_its_producer(core: Core) -> None:
    """Its producer may be alive: what it goes on to write would be the second half of a transaction cut in two."""
    core.create("a")
    core.create("b")
    writer = Writer(core, "w")
    assert writer.write("b", b"0") == 0
    assert writer.end(True) == 0
    partition = core.node.topics.partition("a", 0)
    assert partition is not None
    lost = batch(b"1", producer_id=writer.producer_id, producer_epoch=writer.epoch, base_sequence=0, transactional=True)
    partition.log.append(bytearray(lost), core.now_ms, transaction_version=2)
    writer.sequence["a", 0] = 1
    core.restart()
    assert writer.write("a", b"2") == ErrorCode.INVALID_PRODUCER_EPOCH
    assert writer.end(False) == 0
    assert writer.write("a", b"3") == 0
    assert writer.end(True) == 0
    assert committed_values(core, "a") == [b"3"]


def refusal(data: Path) -> str:
    async def start() -> None:
        broker = Broker(data)
        await broker.start()
        await broker.stop()

    with pytest.raises(ConfigurationError) as refused:
        asyncio.run(start())
    return str(refused.value)


def test_a_start_that_cannot_be_made_names_file_cause_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(tmp_path, BrokerConfig(segment_bytes=100))
    core.create("a")
    for number in range(3):
        assert core.produce("a", batch(b"%d" % number)).error_code == 0
    core.node.close()
    folder = Path(log_files(core, "a")) / "0"
    for snapshot in folder.glob("*.snapshot"):
        snapshot.unlink()
    damaged = folder / f"{1:020}.log"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    text = refusal(tmp_path)
    assert str(damaged) in text
    assert "Restore the file from a backup" in text
    data[-1] ^= 1
    damaged.write_bytes(data)

    def out_of_files(path: Any, *_: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(disk, "list", out_of_files)
        text = refusal(tmp_path)
    assert "ulimit -n" in text
    assert str(tmp_path / "topics") in text
    asyncio.run(_start_and_stop(tmp_path))


async def _start_and_stop(data: Path) -> None:
    broker = Broker(data)
    await broker.start()
    await broker.stop()


SCRIPT = """
    import sys, os
    from pathlib import Path
    from tests.broker.core import Core, batch
    from tests.broker.test_transactions import Writer, committed_values, offset_of
    from semel.errors import ErrorCode
    room = Path(sys.argv[1])
    (room / "data").mkdir()
    core = Core(room / "data")
    (room / "ballast").write_bytes(bytes(300_000))
    core.create("a")
    writer = Writer(core, "w")
    acknowledged, refused = [], 0
    number = 0
    while refused < 20:
        number += 1
        code = core.produce("a", batch(b"%d" % number + bytes(1000))).error_code
        if code == 0:
            acknowledged.append(number)
        else:
            assert code == ErrorCode.KAFKA_STORAGE_ERROR, code
            refused += 1
    print("full after", len(acknowledged))
    assert len(acknowledged) > 50
    # While the disk is full: everything is readable, nothing changes, and retriable errors say so.
    seen = [int(value.rstrip(bytes(1))) for value in committed_values(core, "a")]
    assert seen == acknowledged
    transactional = writer.write("a", bytes(5000))
    assert transactional in (ErrorCode.COORDINATOR_NOT_AVAILABLE, ErrorCode.KAFKA_STORAGE_ERROR), transactional
    for _ in range(5):
        core.now_ms += 1000
        try:
            core.node.sweep()
        except Exception as error:
            assert "No space left" in str(error) or "bytes were written" in str(error), error
        core.node.expire()
    (room / "ballast").unlink()
    # Room again, no restart.
    for _ in range(20):
        number += 1
        assert core.produce("a", batch(b"%d" % number)).error_code == 0
        acknowledged.append(number)
    if transactional == ErrorCode.COORDINATOR_NOT_AVAILABLE:
        writer.sequence.clear()
    assert writer.write("a", b"0") == 0
    assert writer.commit_offset("g", "a", 5) == 0
    assert writer.end(True) == 0
    core.create("b")
    core.restart()
    seen = [int(value.rstrip(bytes(1)) or b"0") for value in committed_values(core, "a")]
    assert seen == [*acknowledged, 0], (seen, acknowledged)
    assert offset_of(core, "g", "a") == (0, 5)
    print("recovered")
"""


def test_a_full_disk_refuses_and_room_makes_it_go_on_without_a_restart(tmp_path: Path) -> None:
    """On a file system of 600 KB of its own; where none may be mounted, by a limit on the size of files."""
    script = textwrap.dedent(SCRIPT)
    run = [sys.executable, "-c", script, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=600k none {tmp_path} && exec "$0" "$@"', *run]
    done = subprocess.run(mounted, capture_output=True, text=True, timeout=100, env=environment, check=False)
    if "recovered" not in done.stdout and "full after" not in done.stdout and "Error" not in done.stderr:
        unavailable("A file system of its own", done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recovered" in done.stdout


def test_a_file_that_may_not_grow_refuses_and_goes_on_later(core: Core) -> None:
    core.create("a")
    assert core.produce("a", batch(b"1")).error_code == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert core.produce("a", batch(b"2" * 500)).error_code == ErrorCode.KAFKA_STORAGE_ERROR
        with pytest.raises((AssertionError, LogError)):
            core.create("b")
        assert core.init("w").error_code == ErrorCode.COORDINATOR_NOT_AVAILABLE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert core.produce("a", batch(b"2" * 500)).error_code == 0
    core.create("b")
    core.restart()
    assert committed_values(core, "a") == [b"1", b"2" * 500]
    assert core.node.topics.get("b") is not None


def test_a_start_after_a_clean_stop_opens_no_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many partitions there are: their files are opened when somebody asks for them."""
    core = Core(tmp_path)
    core.create("a", 20)
    for index in range(20):
        for _ in range(20):
            assert core.produce("a", batch(bytes(5000)), partition=index).error_code == 0
    core.node.close()
    opened: list[str] = []
    read_bytes = 0
    real_open, real_read = disk.open, disk.read

    def noting(path: Any, *arguments: Any) -> int:
        opened.append(str(path))
        return real_open(path, *arguments)

    def counting(path: Any) -> bytes:
        nonlocal read_bytes
        data = real_read(path)
        read_bytes += len(data)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(disk, "open", noting)
        patch.setattr(disk, "read", counting)
        core.restart()
    ours = log_files(core, "a")
    assert [path for path in opened if path.startswith(ours) and path.endswith(".log")] == []
    assert read_bytes < 60_000, "of two megabytes"
    assert core.fetch("a", 0).high_watermark == 20
