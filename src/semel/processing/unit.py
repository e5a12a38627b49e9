"""The unit of work: everything that one Kafka transaction will hold, gathered before it is opened.

Each call of a handler, for a record or for a batch of them, gets a `RecordScope`, whose effects join the unit only when
the handler came to its end. A unit that is not committed is thrown away, and nothing of it is left anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from semel import history
from semel.errors import AbortTransaction
from semel.processing.effects import Change, Effect, Write, lower
from semel.processing.limits import (
    BATCH_BYTES_MAX,
    OUTPUT_BYTES_MAX,
    PARK_TOPIC_BYTES_MAX,
    RECORD_EFFECTS_MAX,
    UNIT_BYTES_MAX,
    UNIT_RECORDS_MAX,
)
from semel.processing.parking import BY_KEY, ParkedKeys, park_key
from semel.processing.provenance import Provenance
from semel.processing.stores import Changes, Stores
from semel.processing.topics import DataError
from semel.types import Record, TopicPartition
from semel.wire.partitioner import partition_for
from semel.wire.records import BatchBuilder

__all__ = ["RecordScope", "UnitOfWork", "check_parked"]

_RECORD_OVERHEAD = 32
"""Lengths, deltas and attributes of one record in a batch, at their largest."""


class UnitOfWork:
    """Outputs, changes of state, parked and released records of what was worked on since the last commit."""

    def __init__(self, partitions: Mapping[str, int], now_ms: int) -> None:
        self._partitions = partitions
        self.now_ms = now_ms
        """Milliseconds since 1970: the timestamp of outputs."""
        self.outputs: dict[tuple[str, int], list[BatchBuilder]] = {}
        self.changes: Changes = {}
        self.parked: dict[tuple[str, int], ParkedKeys] = {}
        self.beneath: UnitOfWork | None = None
        """The unit that is on its way while this one is worked on: what it changes counts here already."""
        self.last: Record | None = None
        self.records = 0
        self.size = 0
        """Bytes of inputs and outputs, roughly."""
        self.is_ending = False
        """Whether its commit was asked for: before that, nothing of it can be committed."""
        self.provenance = Provenance() if history.on() else None

    def __repr__(self) -> str:
        return f"<UnitOfWork {self.records} records, {self.size} bytes, {len(self.outputs)} output partitions>"

    @property
    def is_full(self) -> bool:
        """Whether it must be committed before it takes another record."""
        return self.records >= UNIT_RECORDS_MAX or self.size >= UNIT_BYTES_MAX

    def add(self, records: Sequence[Record], scope: RecordScope) -> None:
        """Take in records of one partition that were worked on together, to the end."""
        partition = records[0].partition
        writes = scope.writes if self.provenance is None else self.provenance.worked_on(records, scope.writes)
        for write in writes:
            self._append(write, partition, self.now_ms)
        for store, changed in scope.changes.items():
            self.changes.setdefault((store, partition), {}).update(changed)
            self.size += sum(len(key) + len(value or b"") for key, value in changed.items())
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

    def seal(self, changelogs: Mapping[str, str]) -> Iterator[tuple[TopicPartition, BatchBuilder]]:
        """Every batch of the transaction: the outputs, and the last change of each key for its changelog."""
        for (store, partition), changed in self.changes.items():
            for key, value in changed.items():
                self._append(Write(changelogs[store], key, value, (), partition), partition, self.now_ms)
        for (topic, partition), builders in self.outputs.items():
            for builder in builders:
                yield TopicPartition(topic, partition), builder

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
        topic = write.topic
        partition = write.partition
        if partition is None:
            # Without a key there is no order to keep; the input's partition keeps the one there is.
            count = self._partitions[topic]
            partition = partition_for(write.key, count) if write.key is not None else input_partition % count
        builders = self.outputs.get((topic, partition))
        if builders is None:
            builders = self.outputs[topic, partition] = [BatchBuilder()]
        builder = builders[-1]
        if builder.count and builder.size + _size(write) > BATCH_BYTES_MAX:
            builder = BatchBuilder()
            builders.append(builder)
        before = builder.size
        builder.append(write.key, write.value, timestamp_ms, write.headers)
        self.size += builder.size - before


class RecordScope:
    """What one call of a handler sees of the stores, and where its effects gather until it is done."""

    def __init__(self, stores: Stores, names: frozenset[str]) -> None:
        self._stores = stores
        self._names = names
        self._layers: tuple[Changes, ...] = ()
        self._partition = 0
        self._effects = 0
        self.writes: list[Write] = []
        self.changes: dict[str, dict[bytes, bytes | None]] = {}

    def begin(self, unit: UnitOfWork, partition: int) -> None:
        """Start with another call: forget the effects of the one before."""
        self._layers = (unit.changes,) if unit.beneath is None else (unit.changes, unit.beneath.changes)
        self._partition = partition
        self._effects = 0
        self.writes = []
        self.changes = {}

    def get(self, store: str, key: bytes) -> bytes | None:
        """The value of a key: what this call changed, else the units of work, else what is committed."""
        changed = self.changes.get(store)
        if changed is not None and key in changed:
            return changed[key]
        for layer in self._layers:
            changed = layer.get((store, self._partition))
            if changed is not None and key in changed:
                return changed[key]
        return self._stores.table(store, self._partition).get(key)

    def items(self, store: str) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value, those that were written longest ago first."""
        changed: dict[bytes, bytes | None] = {}
        for layer in reversed(self._layers):
            changed |= layer.get((store, self._partition), {})
        changed |= self.changes.get(store, {})
        for key, value in self._stores.table(store, self._partition).items():
            if key not in changed:
                yield key, value
        for key, new in changed.items():
            if new is not None:
                yield key, new

    def emit(self, effect: Effect) -> None:
        """Take one effect. Raises `DataError` for one that cannot be written."""
        self._effects += 1
        if self._effects > RECORD_EFFECTS_MAX:
            raise DataError(f"one call has more than {RECORD_EFFECTS_MAX} effects; split the work over records")
        lowered = lower(effect)
        if isinstance(lowered, Write):
            _check(lowered, OUTPUT_BYTES_MAX)
            self.writes.append(lowered)
            return
        self._change(lowered)

    def _change(self, change: Change) -> None:
        if change.store not in self._names:
            raise DataError(f"the handler changes state {change.store}, which is not its own: declare it with state=")
        size = len(change.key) + len(change.value or b"")
        if size > OUTPUT_BYTES_MAX:
            raise DataError(f"a value of state {change.store} has {size} bytes; the limit is {OUTPUT_BYTES_MAX}")
        self.changes.setdefault(change.store, {})[change.key] = change.value

    def check_partitions(self, partitions: Mapping[str, int]) -> None:
        """Raise `DataError` for an output to a partition that its topic does not have."""
        for write in self.writes:
            if write.partition is not None and not 0 <= write.partition < partitions[write.topic]:
                raise DataError(
                    f"topic {write.topic} has {partitions[write.topic]} partitions and no number {write.partition}"
                )


def check_parked(write: Write) -> None:
    """Raise `DataError` for a record that the park topic would not take."""
    _check(write, PARK_TOPIC_BYTES_MAX - 1_024)


def _check(write: Write, limit: int) -> None:
    for name, value in write.headers:
        if not isinstance(name, str) or not (value is None or isinstance(value, bytes)):
            raise DataError(f"a header of a record for topic {write.topic} is not a (str, bytes) pair: {name!r:.80}")
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"the header name {name!r:.80} is not valid text") from error
    size = _size(write)
    if size > limit:
        raise DataError(f"a record for topic {write.topic} has {size} bytes; the limit is {limit}")


def _size(write: Write) -> int:
    """Bytes in a batch, or a few more."""
    size = len(write.key or b"") + len(write.value or b"") + _RECORD_OVERHEAD
    for name, value in write.headers:
        size += 4 * len(name) + len(value or b"") + 8
    return size
