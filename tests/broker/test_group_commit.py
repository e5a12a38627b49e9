"""`fsync=always`: who is answered had everything on the disk, and syncs are shared. The disk is in the test's hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semel.broker.config import BrokerConfig
from semel.disk import disk as kernel_disk
from semel.errors import ErrorCode
from semel.log import log as log_module
from tests.broker.core import Core, Pending, batch
from tests.broker.test_transactions import Writer, committed_values


class Disk:
    """Syncs wait for `step`; remembers which bytes of which file are safe from a loss of power."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self.safe: dict[str, int] = {}
        self.order: list[str] = []
        self.problem: OSError | None = None

    def submit(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        self.waiting.append((work, done))

    def step(self) -> None:
        work, done = self.waiting.pop(0)
        work()
        done()

    def sync(self, file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{int(file)}")
        if not Path(path).stem.isdigit():
            return  # Not a segment.
        self.order.append(path)
        if self.problem is not None:
            problem, self.problem = self.problem, None  # The kernel says it once.
            raise problem
        self.safe[path] = os.fstat(file).st_size

    def lose_power(self) -> None:
        """What no sync brought to the disk is gone."""
        for path, size in self.safe.items():
            os.truncate(path, size)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(kernel_disk, "sync", disk.sync)
    return disk


@pytest.fixture
def core(tmp_path: Path, disk: Disk) -> Core:
    core = Core(tmp_path, BrokerConfig(fsync="always"), disk.submit)
    core.create("orders", 2)
    core.produce("orders", batch(b"first"))  # The first batch of a file syncs its name too and is answered at once.
    core.produce("orders", batch(b"first"), partition=1)
    disk.order.clear()
    return core


def send(core: Core, data: bytes, *, acks: int = -1, **fields: Any) -> Pending:
    topic = {"name": "orders", "partition_data": [{"index": fields.pop("partition", 0), "records": data}]}
    answer = core.send(0, 9, transactional_id=None, acks=acks, timeout=9, topic_data=[topic], **fields)
    assert isinstance(answer, Pending)
    return answer


def result(pending: Pending) -> tuple[int, int]:
    """(error code, base offset)"""
    answer = pending.response.responses[0].partition_responses[0]
    return answer.error_code, answer.base_offset


def test_nobody_hears_of_a_batch_before_it_is_on_the_disk(core: Core, disk: Disk) -> None:
    first = send(core, batch(b"a"))
    parked = core.fetch("orders", 1, wait_ms=100)
    assert isinstance(parked, Pending)
    assert not first.answered
    assert not parked.answered
    assert core.fetch("orders", 0).high_watermark == 1
    disk.step()
    assert result(first) == (0, 1)
    assert parked.response.responses[0].partitions[0].high_watermark == 2


def test_all_who_come_during_a_sync_share_the_next(core: Core, disk: Disk) -> None:
    pending = [send(core, batch(b"%d" % number), partition=number % 2) for number in range(50)]
    disk.step()
    assert [item.answered for item in pending] == [True] + [False] * 49
    disk.step()
    assert all(result(item)[0] == 0 for item in pending)
    assert not disk.waiting
    assert len(disk.order) == 3, "one sync for the first, one for each partition of the others"
    assert len({(number % 2, result(item)[1]) for number, item in enumerate(pending)}) == 50


def test_a_copy_of_a_batch_that_waits_is_answered_after_it(core: Core, disk: Disk) -> None:
    ids = {"producer_id": core.init(None).producer_id, "producer_epoch": 0, "base_sequence": 0}
    first = send(core, batch(b"a", **ids))
    copy = send(core, batch(b"a", **ids))
    assert not copy.answered
    disk.step()
    assert result(first) == (0, 1)
    if not copy.answered:
        disk.step()
    assert result(copy) == (0, 1)


def test_a_failed_sync_refuses_all_who_waited_and_shows_nothing(core: Core, disk: Disk) -> None:
    ids = {"producer_id": core.init(None).producer_id, "producer_epoch": 0, "base_sequence": 0}
    pending = [send(core, batch(b"a", **ids)), send(core, batch(b"b")), send(core, batch(b"c"), partition=1)]
    disk.problem = OSError(errno.EIO, "Input/output error")
    disk.step()
    disk.step()
    assert [result(item)[0] for item in pending] == [
        ErrorCode.KAFKA_STORAGE_ERROR,
        ErrorCode.KAFKA_STORAGE_ERROR,
        ErrorCode.NONE,
    ]
    assert core.fetch("orders", 0).high_watermark == 1
    again = send(core, batch(b"a", **ids))
    disk.step()
    assert result(again)[0] == ErrorCode.KAFKA_STORAGE_ERROR, "the copy of a lost batch must not be a success"
    assert len(disk.order) == 2, "a file whose sync failed is never synced again"
    disk.lose_power()
    core.restart()
    assert core.fetch("orders", 0).high_watermark == 1


def test_a_marker_does_not_overtake_a_sync_that_fails(core: Core, disk: Disk) -> None:
    """The marker's own sync would succeed, because the kernel has told the error to the thread already."""
    writer = Writer(core, "t")
    begun = core.send(0, 12, transactional_id="t", acks=-1, timeout=9, topic_data=[_transactional(writer)])
    assert isinstance(begun, Pending)
    disk.problem = OSError(errno.EIO, "Input/output error")
    answer = core.end("t", writer.producer_id, writer.epoch, True)
    assert answer.error_code != 0
    disk.step()
    assert begun.response.responses[0].partition_responses[0].error_code == ErrorCode.KAFKA_STORAGE_ERROR
    assert committed_values(core, "orders") == [b"first"]
    disk.lose_power()
    core.restart()
    assert committed_values(core, "orders") == [b"first"]


def test_a_decision_is_not_on_the_disk_before_its_records(core: Core, disk: Disk) -> None:
    """A client that sends EndTxn without waiting for its last Produce."""
    writer = Writer(core, "t")
    begun = core.send(0, 12, transactional_id="t", acks=-1, timeout=9, topic_data=[_transactional(writer)])
    assert isinstance(begun, Pending)
    assert not begun.answered
    disk.order.clear()
    assert core.end("t", writer.producer_id, writer.epoch, True).error_code == 0
    orders = str(core.node.topics.get("orders").info.topic_id)  # type: ignore[union-attr]
    assert orders in disk.order[0]
    assert orders not in disk.order[1]
    disk.step()
    assert begun.response.responses[0].partition_responses[0].error_code == 0
    disk.lose_power()
    core.restart()
    assert committed_values(core, "orders") == [b"first", b"in"]


@pytest.mark.parametrize("steps", range(4))
def test_what_was_acknowledged_survives_a_loss_of_power(core: Core, disk: Disk, steps: int) -> None:
    pending = []
    for number in range(12):
        pending.append((b"%d" % number, send(core, batch(b"%d" % number))))
        if number % 4 == 3 and number // 4 < steps:
            disk.step()
    acknowledged = {value for value, item in pending if item.answered}
    assert len(acknowledged) == (0, 1, 4, 8)[steps]
    disk.lose_power()
    core.restart()
    assert acknowledged <= set(committed_values(core, "orders"))


def test_a_reader_that_fails_does_not_hold_up_the_writers(core: Core, disk: Disk) -> None:
    class Broken:
        def wake(self) -> None:
            raise RuntimeError("a bug")

    partition = core.node.topics.partition("orders", 0)
    assert partition is not None
    partition.waiters[Broken()] = None
    first, second = send(core, batch(b"a")), send(core, batch(b"b"), partition=1)
    with pytest.raises(RuntimeError):
        disk.step()
    assert result(first) == (0, 1)
    disk.step()
    assert result(second) == (0, 1)


def test_a_topic_deleted_while_its_batches_wait(core: Core, disk: Disk) -> None:
    pending = send(core, batch(b"a"))
    core.ask(20, 6, topics=[{"name": "orders", "topic_id": None}], timeout=1000)
    disk.step()
    assert pending.answered


def test_no_acks_are_synced_too(core: Core, disk: Disk) -> None:
    topic = {"name": "orders", "partition_data": [{"index": 0, "records": batch(b"a")}]}
    assert core.send(0, 9, transactional_id=None, acks=0, timeout=9, topic_data=[topic]) is None
    disk.step()
    assert core.fetch("orders", 0).high_watermark == 2


def test_the_last_batches_before_a_snapshot_and_a_new_segment_are_counted(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "SNAPSHOT_BATCHES", 3)
    core = Core(tmp_path, BrokerConfig(fsync="always", segment_bytes=400), disk.submit)
    core.create("orders")
    core.produce("orders", batch(b"first"))
    fields = {"transactional_id": None, "acks": -1, "timeout": 9}
    answers = []
    for number in range(30):
        topic = {"name": "orders", "partition_data": [{"index": 0, "records": batch(b"%d" % number)}]}
        answers.append(core.send(0, 9, topic_data=[topic], **fields))
    while disk.waiting:
        disk.step()
    pending = [answer for answer in answers if isinstance(answer, Pending)]
    assert 10 < len(pending) < 30, "the first batch of each segment is synced with its name, and not waited for"
    assert all(result(item)[0] == 0 for item in pending)
    disk.lose_power()
    core.restart()
    assert committed_values(core, "orders") == [b"first"] + [b"%d" % number for number in range(30)]


def _transactional(writer: Writer) -> dict[str, Any]:
    data = batch(
        b"in", producer_id=writer.producer_id, producer_epoch=writer.epoch, base_sequence=0, transactional=True
    )
    return {"name": "orders", "partition_data": [{"index": 0, "records": data}]}


def _fill(core: Core, disk: Disk, count: int) -> None:
    for number in range(count):
        assert core.produce("orders", batch(b"%d" % number)).error_code == 0, "nobody waits for a sync ahead"


def test_the_end_of_a_segment_finds_little_that_is_not_on_the_disk(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fsync=os a full segment is synced before the next begins; of a gigabyte everybody would wait a second."""
    monkeypatch.setattr(log_module, "SYNC_AHEAD_BYTES", 200)
    core = Core(tmp_path, BrokerConfig(segment_bytes=4000), disk.submit)
    core.create("orders")
    _fill(core, disk, 20)
    assert not disk.waiting, "the first half is left to the kernel"
    _fill(core, disk, 25)
    directory = core.node.topics.get("orders").partitions[0].log.directory  # type: ignore[union-attr]
    (path,) = (str(name) for name in directory.glob("*.log"))
    while disk.waiting:
        disk.step()
    assert 0 <= os.path.getsize(path) - disk.safe[path] <= 300
    before = len(disk.order)
    _fill(core, disk, 15)
    assert len(list(directory.glob("*.log"))) == 2
    assert disk.safe[path] == os.path.getsize(path)
    assert path in disk.order[before:], "the rest was synced when the segment ended"
    while disk.waiting:
        disk.step()
    assert committed_values(core, "orders")[-1] == b"14"


def test_a_sync_ahead_that_fails_stops_the_log(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SYNC_AHEAD_BYTES", 200)
    core = Core(tmp_path, BrokerConfig(segment_bytes=4000), disk.submit)
    core.create("orders")
    _fill(core, disk, 45)
    disk.problem = OSError(errno.EIO, "Input/output error")
    disk.step()
    assert core.produce("orders", batch(b"a")).error_code == ErrorCode.KAFKA_STORAGE_ERROR
    assert len(disk.order) == 1, "a file whose sync failed is never synced again"
