"""The unit of work: everything that one Kafka transaction will hold, gathered before it is opened.

Each call of a handler, for a record or for a batch of them, gets a `RecordScope`, whose effects join the unit only when
the handler came to its end. A unit that is not committed is thrown away, and nothing of it is left anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from semel import history
from semel.errors import AbortTransaction
from semel.processing.effects import Write
from semel.processing.limits import (
    BATCH_BYTES_MAX,
    PARK_TOPIC_BYTES_MAX,
    UNIT_BYTES_MAX,
    UNIT_RECORDS_MAX,
)
from semel.processing.parking import BY_KEY, ParkedKeys, park_key
from semel.processing.provenance import Provenance
from semel.processing.scope import RecordScope, check_write, write_size
from semel.processing.stores import Changes
from semel.types import Record, TopicPartition
from semel.wire.pycodec import Output
from semel.wire.records import BatchBuilder, encode_batches

__all__ = ["UnitOfWork", "check_parked"]


class UnitOfWork:
    """Outputs, changes of state, parked and released records of what was worked on since the last commit."""

    def __init__(self, partitions: Mapping[str, int], now_ms: int, codecs: Mapping[str, int] | None = None) -> None:
        self._partitions = partitions
        self._codecs = codecs or {}
        self.now_ms = now_ms
        """Milliseconds since 1970: the timestamp of outputs."""
        self.outputs: dict[str, list[Output]] = {}
        """By topic, as they came; encoded all at once when the transaction begins."""
        self.changes: Changes = {}
        self.growth: dict[tuple[str, int], int] = {}
        """Bytes by which stores grow, where there is a limit."""
        self.parked: dict[tuple[str, int], ParkedKeys] = {}
        self.beneath: UnitOfWork | None = None
        """The unit that is on its way while this one is worked on: what it changes counts here already."""
        self.last: Record | None = None
        self.records = 0
        self.size = 0
        """Bytes of inputs and outputs, roughly."""
        self.began = 0.0
        """When its transaction began, in seconds since the machine's start."""
        self.ends: Mapping[TopicPartition, int] = {}
        """Where its records end, as far as the broker said; known when it is committed."""
        self.arrived: float | None = None
        """When its first record came, in monotonic seconds."""
        self.is_ending = False
        """Whether its commit was asked for: before that, nothing of it can be committed."""
        self.provenance = Provenance() if history.on() else None

    def __repr__(self) -> str:
        return f"<UnitOfWork {self.records} records, {self.size} bytes, outputs for {len(self.outputs)} topics>"

    @property
    def is_full(self) -> bool:
        """Whether it must be committed before it takes another record."""
        return self.records >= UNIT_RECORDS_MAX or self.size >= UNIT_BYTES_MAX

    @property
    def room(self) -> tuple[int, int]:
        """How many records and bytes it may still take."""
        return UNIT_RECORDS_MAX - self.records, UNIT_BYTES_MAX - self.size

    def add(self, records: Sequence[Record], scope: RecordScope) -> None:
        """Take in records of one partition that were worked on together, to the end."""
        partition = records[0].partition
        writes = scope.writes if self.provenance is None else self.provenance.worked_on(records, scope.writes)
        for write in writes:
            self._append(write, partition, self.now_ms)
        for store, changed in scope.changes.items():
            if self.provenance is not None:
                self.provenance.changed(store, partition, changed, scope.before)
            self.changes.setdefault((store, partition), {}).update(changed)
            self.size += sum(len(key) + (len(entry.value) if entry else 0) for key, entry in changed.items())
            grown = scope.growth.get(store)
            if grown is not None:
                self.growth[store, partition] = self.growth.get((store, partition), 0) + grown
        for record in records:
            self._passed(record)

    def holds_back(self, record: Record) -> bool:
        """Whether the record's key was parked in this unit or in the one beneath."""
        unit: UnitOfWork | None = self
        while unit is not None:
            if unit.parked:
                parked = unit.parked.get((record.topic, record.partition))
                if parked is not None and record.key in parked.keys:
                    return True
            unit = unit.beneath
        return False

    @property
    def has_parked(self) -> bool:
        """Whether anything was parked in this unit or in the one beneath."""
        return bool(self.parked) or (self.beneath is not None and self.beneath.has_parked)

    def parked_at(self, at: tuple[str, int]) -> ParkedKeys:
        """What this unit and the one beneath parked of a partition."""
        found = ParkedKeys()
        for unit in (self, self.beneath):
            if unit is not None and at in unit.parked:
                found.add(unit.parked[at])
        return found

    def park(self, record: Record, write: Write, error: BaseException | None) -> None:
        """Take in a record that is to wait; `write` is how it stands in the park topic."""
        if self.provenance is not None:
            write = self.provenance.parked(record, write)
        self._append(write, record.partition, record.timestamp_ms)
        self._count(record, record.key if park_key(record, error) == BY_KEY else None, 1)
        self._passed(record)

    def release(self, record: Record, lane: bytes | int, *, scope: RecordScope | None) -> None:
        """Take in a parked record that waits no longer: with what its handler did, or without a `scope` discarded."""
        if scope is not None:
            self.add((record,), scope)
        else:
            self._passed(record)
        if self.provenance is not None:
            self.provenance.released(record)
        self._count(record, lane if isinstance(lane, bytes) else None, -1)

    def note(self, at: TopicPartition, write: Write) -> None:
        """Take in what came of a command about parked records of a partition of the input."""
        self._append(write, at.partition, self.now_ms)
        self.parked.setdefault(at, ParkedKeys())

    def _count(self, record: Record, key: bytes | None, by: int) -> None:
        self.parked.setdefault((record.topic, record.partition), ParkedKeys()).count(key, by)

    def passed(self, count: int, size: int, last: Record | None) -> None:
        """So many records, with their outputs of so many bytes altogether, were taken in by another way."""
        self.records += count
        self.size += size
        self.last = last or self.last

    def seal(self, changelogs: Mapping[str, str]) -> Iterator[tuple[TopicPartition, BatchBuilder]]:
        """Every batch of the transaction: the outputs, and the last change of each key for its changelog."""
        for (store, partition), changed in self.changes.items():
            topic = changelogs[store]
            for key, entry in changed.items():
                value, written_ms = (None, self.now_ms) if entry is None else entry
                self._append(Write(topic, key, value, (), partition), partition, written_ms)
        for topic, outputs in self.outputs.items():
            # Whatever goes to a topic that no handler names (changelogs, park topics) says where it goes.
            count = self._partitions.get(topic) or 1 + max(output[0] or 0 for output in outputs)
            for partition, builder in encode_batches(outputs, count, BATCH_BYTES_MAX, self._codecs.get(topic, 0)):
                yield TopicPartition(topic, partition), builder

    def written(self, changelogs: Mapping[str, str]) -> dict[tuple[str, int], int]:
        """Where its changes end in the changelogs, by store and partition, as far as the broker said."""
        ends = {at: self.ends.get(TopicPartition(changelogs[at[0]], at[1])) for at in self.changes}
        return {at: end for at, end in ends.items() if end is not None}

    @contextmanager
    def told(self, component: str, transactional_id: str, *, is_atomic: bool = True) -> Iterator[None]:
        """Around the transaction: tell the history that it is tried, and how it ended.

        What is not atomic cannot be said to have failed once its end was asked for.
        """
        if self.provenance is None:
            yield
            return
        self.provenance.begin(component, transactional_id)
        try:
            yield
        except BaseException as error:
            is_certain = not self.is_ending or (is_atomic and isinstance(error, AbortTransaction))
            self.provenance.end("fail" if is_certain else "info")
            raise
        self.provenance.end("ok")

    def _passed(self, record: Record) -> None:
        self.records += 1
        self.size += len(record.key or b"") + len(record.value or b"")
        self.last = record

    def _append(self, write: Write, input_partition: int, timestamp_ms: int) -> None:
        topic, key, partition = write.topic, write.key, write.partition
        if partition is None and key is None:
            # Without a key there is no order to keep; the input's partition keeps the one there is.
            partition = input_partition % self._partitions[topic]
        output = (partition, key, write.value, timestamp_ms, write.headers)
        try:
            self.outputs[topic].append(output)
        except KeyError:
            self.outputs[topic] = [output]
        self.size += write_size(write)


def check_parked(write: Write) -> None:
    """Raise `DataError` for a record that the park topic would not take."""
    check_write(write, PARK_TOPIC_BYTES_MAX - 1_024)
