"""Random appends, markers, restarts and losses against a model that is a plain list of batches."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from semel.errors import ErrorCode
from semel.log import index, reading
from semel.log import log as log_module
from semel.log.log import LogError, PartitionLog
from semel.wire.records import iter_batches
from tests.log.builders import NOW, batch, open_log

PIDS = st.integers(1, 4)


class Producer:
    """What a producer that obeys the protocol knows of itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.epoch = 0
        self.next_sequence = 0
        self.sent: list[tuple[int, int, int]] = []  # (sequence, count, offset) in this epoch
        self.first_offset = -1


class LogMachine(RuleBasedStateMachine):
    @initialize(segment_bytes=st.sampled_from([1, 400, 2000, 1 << 30]), version=st.sampled_from([1, 2]))
    def start(self, segment_bytes: int, version: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="semel-log-"))
        self.segment_bytes = segment_bytes
        self.version = version
        self.producers = {pid: Producer(pid) for pid in range(1, 5)}
        self.batches: list[tuple[int, int, int]] = []  # first offset, last offset, producer
        self.aborted: list[tuple[int, int, int]] = []  # producer, first offset, marker
        self.end = self.begin = 0
        self.log = self.open()

    def open(self) -> PartitionLog:
        return open_log(self.directory, segment_bytes=self.segment_bytes)

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)

    def added(self, count: int, pid: int) -> int:
        offset = self.end
        self.batches.append((offset, offset + count - 1, pid))
        self.end += count
        return offset

    # --- Appends ---

    @rule(count=st.integers(1, 3), size=st.integers(0, 300))
    def append(self, count: int, size: int) -> None:
        assert self.log.append(batch(count, value=bytes(size)), NOW).base_offset == self.added(count, -1)

    @rule(pid=PIDS, count=st.integers(1, 3), size=st.integers(0, 300), transactional=st.booleans())
    def append_with_producer(self, pid: int, count: int, size: int, transactional: bool) -> None:
        producer = self.producers[pid]
        sequence = producer.next_sequence
        sent = batch(count, pid=pid, epoch=producer.epoch, seq=sequence, txn=transactional, value=bytes(size))
        if producer.first_offset >= 0 and not transactional:
            self.refused(sent, ErrorCode.INVALID_TXN_STATE)
            return
        result = self.log.append(sent, NOW, transaction_version=self.version)
        offset = self.added(count, pid)
        assert (result.base_offset, result.duplicate) == (offset, False)
        producer.next_sequence += count
        producer.sent.append((sequence, count, offset))
        if transactional and producer.first_offset < 0:
            producer.first_offset = offset

    @rule(pid=PIDS, back=st.integers(1, 7))
    def append_again(self, pid: int, back: int) -> None:
        producer = self.producers[pid]
        if back > len(producer.sent):
            return
        sequence, count, offset = producer.sent[-back]
        sent = batch(count, pid=pid, epoch=producer.epoch, seq=sequence, txn=True)
        if back <= 5:
            assert self.log.append(sent, NOW, transaction_version=self.version)[:2] == (offset, offset + count - 1)
        else:
            self.refused(sent, ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER)

    @rule(pid=PIDS, gap=st.integers(1, 5))
    def append_with_gap(self, pid: int, gap: int) -> None:
        producer = self.producers[pid]
        if producer.sent:
            sent = batch(pid=pid, epoch=producer.epoch, seq=producer.next_sequence + gap, txn=True)
            self.refused(sent, ErrorCode.OUT_OF_ORDER_SEQUENCE_NUMBER)

    @rule(pid=PIDS)
    def append_with_old_epoch(self, pid: int) -> None:
        producer = self.producers[pid]
        if producer.epoch:
            sent = batch(pid=pid, epoch=producer.epoch - 1, seq=producer.next_sequence, txn=True)
            self.refused(sent, ErrorCode.INVALID_PRODUCER_EPOCH)

    def refused(self, sent: bytearray, code: ErrorCode) -> None:
        with pytest.raises(LogError) as refusal:
            self.log.append(sent, NOW, transaction_version=self.version)
        assert refusal.value.code == code

    @rule(pid=PIDS, commit=st.booleans(), again=st.booleans())
    def end_transaction(self, pid: int, commit: bool, again: bool) -> None:
        producer = self.producers[pid]
        epoch = producer.epoch + (self.version == 2)
        written = self.log.append_marker(pid, epoch, commit, 0, NOW, unless_written=False)
        assert written == self.added(1, pid)
        if producer.first_offset >= 0 and not commit:
            self.aborted.append((pid, producer.first_offset, written))
        producer.first_offset = -1
        if self.version == 2:
            producer.epoch = epoch
            producer.next_sequence = 0
            producer.sent = []
        if again:
            self.restart()
            assert self.log.append_marker(pid, epoch, commit, 0, NOW) == written

    # --- Restarts ---

    @rule()
    def restart(self) -> None:
        before = self.described()
        self.log = self.open()
        assert self.described() == before

    @rule()
    def stop_and_start(self) -> None:
        before = self.described()
        self.log.close()
        self.log = self.open()
        assert self.log.recovery.read_bytes == 0
        assert self.described() == before

    @rule(rubbish=st.binary(min_size=1, max_size=200))
    def torn_write(self, rubbish: bytes) -> None:
        before = self.described()
        newest = max(self.directory.glob("*.log"), default=None)
        if newest is not None:
            with newest.open("ab") as file:
                file.write(rubbish)
        self.log = self.open()
        assert self.described() == before

    @rule()
    def lose_newest_snapshot(self) -> None:
        before = self.described()
        snapshots = sorted(self.directory.glob("*.snapshot"))
        # With records deleted, one snapshot must stay: it alone knows producers whose records are gone.
        if snapshots and (self.begin == 0 or len(snapshots) > 1):
            snapshots[-1].write_bytes(snapshots[-1].read_bytes()[:-1])
        self.log = self.open()
        assert self.described() == before

    @precondition(lambda self: self.begin == 0)
    @rule(data=st.data())
    def lose_anything_but_the_log(self, data: st.DataObject) -> None:
        before = self.described()
        names = sorted(path.name for path in self.directory.iterdir() if path.suffix != ".log")
        for name in data.draw(st.lists(st.sampled_from(names), unique=True)):
            (self.directory / name).unlink()
        self.log = self.open()
        assert self.described() == before

    @rule(share=st.floats(0, 1))
    def delete_records(self, share: float) -> None:
        offset = self.begin + int((self.end - self.begin) * share)
        self.begin = max(self.begin, offset)
        assert self.log.delete_before(offset) == self.begin

    # --- What must hold ---

    def described(self) -> dict[str, Any]:
        return {"producers": sorted(self.log.producers()), "open": self.log.open_transactions()}

    @invariant()
    def offsets_and_transactions_are_the_models(self) -> None:
        if not hasattr(self, "log"):
            return
        log = self.log
        opened = sorted(
            (producer.first_offset, producer.pid, producer.epoch)
            for producer in self.producers.values()
            if producer.first_offset >= 0
        )
        stable = max(min([self.end, *(first for first, _, _ in opened)]), self.begin)
        assert (log.log_start_offset, log.log_end_offset) == (self.begin, self.end)
        assert (log.high_watermark, log.last_stable_offset) == (self.end, stable)
        assert log.open_transactions() == [(pid, epoch, first) for first, pid, epoch in opened]
        assert log.aborted_transactions(self.begin, self.end) == self.aborted_between(self.begin, self.end)

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(self.begin, self.end))
        upper = data.draw(st.integers(self.begin, self.end))
        got = self.log.read_bytes(offset, data.draw(st.sampled_from([1, 300, 1 << 20])), upper)
        batches = [(header.base_offset, header.last_offset, header.producer_id) for _, header in iter_batches(got)]
        expected = [entry for entry in self.batches if entry[1] >= offset and entry[1] < upper]
        assert batches == expected[: len(batches)]
        assert bool(batches) == bool(expected)
        assert self.log.aborted_transactions(offset, upper) == self.aborted_between(offset, upper)

    def aborted_between(self, offset: int, upper: int) -> list[tuple[int, int]]:
        found = [(first, pid) for pid, first, marker in self.aborted if marker >= offset and first < upper]
        return [(pid, first) for first, pid in sorted(found)]

    @rule()
    def read_everything(self) -> None:
        got = self.log.read_bytes(self.begin, 1 << 30, self.end)
        assert [(header.base_offset, header.last_offset, header.producer_id) for _, header in iter_batches(got)] == [
            entry for entry in self.batches if entry[1] >= self.begin
        ]


def test_the_log_does_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots every few batches, and indexes that thin out at once, so that each path is taken."""
    monkeypatch.setattr(log_module, "SNAPSHOT_BATCHES", 3)
    monkeypatch.setattr(log_module, "SNAPSHOT_BYTES", 500)
    monkeypatch.setattr(index, "DENSE_BATCHES", 2)
    monkeypatch.setattr(index, "SPARSE_BYTES", 300)
    monkeypatch.setattr(reading, "_INDEXES_LOADED", 2)

    run_state_machine_as_test(
        LogMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
