"""Compaction against a model: what a read_committed reader learns of each key is the same before and after."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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

from semel.log import compaction, index, reading
from semel.log import log as log_module
from semel.log.log import PartitionLog
from semel.types import Record
from semel.wire.records import BatchBuilder, decode_records, iter_batches
from tests.log.builders import NOW, open_log

KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
VALUES = st.one_of(st.none(), st.binary(min_size=1, max_size=40))
RETENTION_MS = 1000
OPERATIONS = st.tuples(
    st.integers(0, 3),
    st.sampled_from(["append", "commit", "abort"]),
    st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3),
    st.sampled_from([0, 0, 1, 4]),
)
"""Producer (0: none), what it does, its records, their codec."""


class Written(NamedTuple):
    offset: int
    timestamp_ms: int
    key: bytes
    value: bytes | None


class Producer:
    """One transactional producer, which obeys the protocol (version 2: every transaction has its own epoch)."""

    def __init__(self) -> None:
        self.epoch = 0
        self.sequence = 0
        self.last: tuple[int, bytearray] | None = None
        self.pending: list[Written] = []
        self.is_open = False


def committed(log: PartitionLog, offset: int, max_bytes: int) -> Iterator[Record]:
    """What a read_committed consumer gets from `offset` on, fetch by fetch."""
    while offset < log.last_stable_offset:
        slices = log.read(offset, max_bytes, log.last_stable_offset)
        data = log.read_bytes(offset, max_bytes, log.last_stable_offset)
        assert data, f"a consumer at {offset} gets nothing"
        coming = log.aborted_transactions(offset, log.end_of(offset, slices))
        inside: set[int] = set()
        start = offset
        for at, header in iter_batches(data):
            while coming and coming[0][1] <= header.last_offset:
                inside.add(coming.pop(0)[0])
            if header.is_control:
                inside.discard(header.producer_id)
            elif not (header.is_transactional and header.producer_id in inside):
                for record in decode_records(data, at, header, "t", 0):
                    if record.offset >= start:
                        yield record
            offset = header.next_offset
        assert offset > start, f"a consumer at {start} does not get on"


class CompactionMachine(RuleBasedStateMachine):
    @initialize(segment_bytes=st.sampled_from([1, 400, 1500]), policy=st.sampled_from(["compact", "compact,delete"]))
    def start(self, segment_bytes: int, policy: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="semel-compaction-"))
        self.config = {
            "segment_bytes": segment_bytes,
            "cleanup_policy": policy,
            "delete_retention_ms": RETENTION_MS,
            "min_cleanable_dirty_ratio": 0.0,
            "retention_ms": -1,
        }
        self.now = NOW
        self.end = self.begin = 0
        self.ended: list[Written] = []
        """Records outside of transactions and of committed ones."""
        self.producers = {pid: Producer() for pid in range(1, 4)}
        self.passing: Iterator[None] | None = None
        self.log = self.open()

    def open(self) -> PartitionLog:
        self.passing = None
        return open_log(self.directory, self.now, **self.config)

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.passing = None
            shutil.rmtree(self.directory)

    # --- Appends ---

    def build(self, records: list[tuple[bytes, bytes | None]], codec: int) -> tuple[BatchBuilder, list[Written]]:
        builder, written = BatchBuilder(codec), []
        for key, value in records:
            builder.append(key, value, self.now)
            written.append(Written(self.end + len(written), self.now, key, value))
        return builder, written

    @rule(burst=st.lists(OPERATIONS, min_size=1, max_size=12))
    def write(self, burst: list[tuple[int, str, list[tuple[bytes, bytes | None]], int]]) -> None:
        for pid, action, records, codec in burst:
            if pid == 0:
                self.append(records, codec)
            elif action == "append" or not self.producers[pid].is_open:
                self.append_in_transaction(pid, records, codec)
            else:
                self.end_transaction(pid, action == "commit")

    def append(self, records: list[tuple[bytes, bytes | None]], codec: int) -> None:
        builder, written = self.build(records, codec)
        assert self.log.append(bytearray(builder.build()), self.now).base_offset == self.end
        self.end += len(written)
        self.ended += written

    def append_in_transaction(self, pid: int, records: list[tuple[bytes, bytes | None]], codec: int) -> None:
        producer = self.producers[pid]
        builder, written = self.build(records, codec)
        batch = builder.build(
            producer_id=pid, producer_epoch=producer.epoch, base_sequence=producer.sequence, transactional=True
        )
        assert self.log.append(bytearray(batch), self.now, transaction_version=2).base_offset == self.end
        producer.last = self.end, bytearray(batch)
        producer.sequence += len(written)
        producer.pending += written
        producer.is_open = True
        self.end += len(written)

    def end_transaction(self, pid: int, commit: bool) -> None:
        producer = self.producers[pid]
        assert self.log.append_marker(pid, producer.epoch + 1, commit, 0, self.now) == self.end
        self.end += 1
        if commit:
            self.ended += producer.pending
        self.producers[pid] = Producer()
        self.producers[pid].epoch = producer.epoch + 1

    @rule(pid=st.integers(1, 3))
    def append_again(self, pid: int) -> None:
        """A retry of what the log has already, whatever compaction made of it."""
        last = self.producers[pid].last
        if last is not None:
            result = self.log.append(last[1][:], self.now, transaction_version=2)
            assert (result.base_offset, result.duplicate) == (last[0], True)

    # --- Time, retention, restarts ---

    @rule(ms=st.sampled_from([1, RETENTION_MS // 2, 2 * RETENTION_MS]))
    def wait(self, ms: int) -> None:
        self.now += ms

    @precondition(lambda self: self.config["cleanup_policy"] == "compact,delete")
    @rule(share=st.floats(0, 0.3))
    def delete_records(self, share: float) -> None:
        self.begin = max(self.begin, int(self.end * share))
        assert self.log.delete_before(self.begin) == self.begin

    @rule(stop=st.booleans())
    def restart(self, stop: bool) -> None:
        before = self.described()
        if stop:
            self.log.close()
        self.log = self.open()
        assert self.described() == before

    @rule(data=st.data())
    def lose_anything_but_the_log(self, data: st.DataObject) -> None:
        if self.begin:
            return  # Only a snapshot knows producers whose records are deleted.
        before = self.described()
        names = sorted(path.name for path in self.directory.iterdir() if path.suffix != ".log")
        for name in data.draw(st.lists(st.sampled_from(names), unique=True)):
            (self.directory / name).unlink()
        self.log = self.open()
        assert self.described() == before

    def described(self) -> object:
        # A marker that is gone takes the coordinator's epoch along, and an empty batch the time of its records.
        return sorted(producer[:3] for producer in self.log.producers()), self.log.open_transactions()

    # --- Compaction ---

    @rule(steps=st.integers(1, 12))
    def compact_a_little(self, steps: int) -> None:
        if self.passing is None:
            self.passing = self.log.compactor.begin(self.now)
        for _ in range(steps):
            if self.passing is not None and next(self.passing, "over") == "over":
                self.passing = None

    @rule(passes=st.integers(1, 3), ms=st.sampled_from([0, 2 * RETENTION_MS]))
    def compact(self, passes: int, ms: int) -> None:
        self.passing = None
        for _ in range(passes):
            for _ in self.log.compactor.begin(self.now) or ():
                pass
            self.now += ms

    # --- What must hold ---

    @invariant()
    def readers_learn_the_same(self) -> None:
        if not hasattr(self, "log"):
            return
        log, stable = self.log, self.log.last_stable_offset
        truth = sorted(record for record in self.ended if self.begin <= record.offset < stable)
        found = [Written(*record[2:6]) for record in committed(log, self.begin, 1 << 30)]
        assert set(found) <= set(truth)
        assert found == sorted(found)
        untouched = log.segments[-1].base_offset
        assert [record for record in found if record.offset >= untouched] == [
            record for record in truth if record.offset >= untouched
        ]
        last = {record.key: record for record in truth}
        seen = {record.key: record for record in found}
        for key, record in last.items():
            # A tombstone may be gone, and then nothing older than it may be there.
            assert seen.get(key) == record or (record.value is None and key not in seen)

    @rule(data=st.data(), max_bytes=st.sampled_from([1, 200, 1000]))
    def readers_from_anywhere_get_the_same(self, data: st.DataObject, max_bytes: int) -> None:
        offset = data.draw(st.integers(self.begin, self.end))
        expected = [record for record in committed(self.log, self.begin, 1 << 30) if record.offset >= offset]
        assert list(committed(self.log, offset, max_bytes)) == expected


@pytest.mark.parametrize("key_map_bytes", [1 << 20, 1])
def test_compaction_keeps_what_readers_learn(monkeypatch: pytest.MonkeyPatch, key_map_bytes: int) -> None:
    """Steps, reads and writes of a few bytes, indexes that thin out at once, a key map that is full at once."""
    monkeypatch.setattr(compaction, "STEP_BYTES", 100)
    monkeypatch.setattr(compaction, "READ_BYTES", 150)
    monkeypatch.setattr(compaction, "WRITE_BYTES", 200)
    monkeypatch.setattr(compaction, "SYNC_BYTES", 300)
    monkeypatch.setattr(compaction, "KEY_MAP_BYTES", key_map_bytes)
    monkeypatch.setattr(log_module, "SNAPSHOT_BATCHES", 5)
    monkeypatch.setattr(reading, "_INDEXES_LOADED", 2)
    monkeypatch.setattr(index, "DENSE_BATCHES", 2)
    monkeypatch.setattr(index, "SPARSE_BYTES", 300)
    run_state_machine_as_test(
        CompactionMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
