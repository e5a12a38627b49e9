"""Parked records: what could not be applied, and what waits behind it in order of its key.

They are written in the transaction that moves the position over them, so that none is lost and none is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from semel.databases.database import Database, is_missing_table
from semel.processing.faults import Fault
from semel.sinks.contract import PartitionsStopped, Stop, StopReason
from semel.sinks.sql.positions import PositionKey
from semel.types import Record, TopicPartition

__all__ = ["Parked", "ParkedRow", "Parking", "list_parked", "load_parked"]

_INSERT = """
INSERT INTO semel_parked (sink, cluster_id, topic_id, part, topic, record_offset, record_timestamp,
                          record_key, record_value, headers, parked_at,
                          error_class, error_message, error_frames, error_group, error_build)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

_LIST = """
SELECT sink, cluster_id, topic_id, part, topic, record_offset, record_key,
       error_class, error_message, error_frames, error_group, error_build
FROM semel_parked ORDER BY sink, topic, part, record_offset
"""


@dataclass(slots=True)
class Parked:
    """What is parked of one partition: keys that block their later records, and how many records wait."""

    keys: set[bytes] = field(default_factory=set)
    records: int = 0


def load_parked(database: Database, key: PositionKey) -> Parked:
    """What is parked of one partition, as it is committed."""
    where = "WHERE sink = ? AND cluster_id = ? AND topic_id = ? AND part = ?"
    keys = database.query(
        f"SELECT DISTINCT record_key FROM semel_parked {where} AND record_key IS NOT NULL",  # noqa: S608
        key,
    )
    [(count,)] = database.query(f"SELECT COUNT(*) FROM semel_parked {where}", key)  # noqa: S608
    return Parked({bytes(record_key) for (record_key,) in keys}, count)


class Parking:
    """What one transaction parks, over what is parked already. Nothing counts before `write` and the COMMIT.

    A record without a key blocks nobody: no order was promised for it.
    """

    def __init__(
        self, parked: Mapping[TopicPartition, Parked], *, keys_max: int, records_max: int, build: str = ""
    ) -> None:
        self._parked = parked
        self._limits = keys_max, records_max
        self._added: dict[TopicPartition, Parked] = {}
        self._rows: list[tuple[Record, Fault | None]] = []
        self._build = build
        self.copies = 0
        """Records that the transaction passes over, because their messages had been applied."""
        self.released: list[int] = []
        """Offsets that wait no longer with this transaction, which is about one partition then."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[tuple[Record, Fault | None]]:
        """What is to be written, in the order in which it was added."""
        return self._rows

    def offsets(self, partition: TopicPartition) -> list[int]:
        """What is parked of one partition, in the order in which it was added."""
        return [record.offset for record, *_ in self._rows if record[:2] == partition]

    def has_keys(self, partition: TopicPartition) -> bool:
        """Whether any key of the partition is parked: before this transaction, or in it."""
        return bool(self._parked[partition].keys) or partition in self._added

    def blocks(self, record: Record) -> bool:
        """Whether an earlier record of the same key is parked."""
        if record.key is None:
            return False
        partition = TopicPartition(record.topic, record.partition)
        added = self._added.get(partition)
        return record.key in self._parked[partition].keys or (added is not None and record.key in added.keys)

    def add(self, record: Record, error: Exception | None) -> None:
        """Park a record: because of `error`, or with None because it waits behind one. Raises `PartitionsStopped`."""
        partition = TopicPartition(record.topic, record.partition)
        before, added = self._parked[partition], self._added.setdefault(partition, Parked())
        if record.key is not None and record.key not in before.keys:
            added.keys.add(record.key)
        added.records += 1
        keys_max, records_max = self._limits
        keys, records = len(before.keys) + len(added.keys), before.records + added.records
        if keys > keys_max or records > records_max:
            raise PartitionsStopped({partition: _full(record, error, keys_max, records_max)})
        self._rows.append((record, Fault.of(error, self._build) if error else None))

    def write(self, database: Database, keys: Mapping[TopicPartition, PositionKey], now_ms: int) -> None:
        """Insert the rows, in the order in which they were added."""
        if self._rows:
            database.executemany(
                _INSERT,
                [
                    (
                        *keys[TopicPartition(record.topic, record.partition)],
                        record.topic,
                        record.offset,
                        record.timestamp_ms,
                        record.key,
                        record.value,
                        msgspec.json.encode(record.headers).decode(),
                        now_ms,
                        *((None,) * 5 if fault is None else _columns(fault)),
                    )
                    for record, fault in self._rows
                ],
            )

    def accept(self) -> None:
        """The transaction is committed: what it parked counts from now on."""
        for partition, added in self._added.items():
            parked = self._parked[partition]
            parked.keys |= added.keys
            parked.records += added.records


def _columns(fault: Fault) -> tuple[str, ...]:
    return fault.error, fault.message, fault.frames, fault.group, fault.build


def _full(record: Record, error: Exception | None, keys_max: int, records_max: int) -> Stop:
    why = f" ({type(error).__name__}: {Fault.of(error, '').message:.200})" if error else ""
    return Stop(
        StopReason.PARKING_FULL,
        f"offset {record.offset} would be parked{why}, but {keys_max} keys or {records_max} records are parked "
        "already, which is the limit. Look at semel park list: so many failures have one cause. Mend it and start "
        "again, or raise max_parked_keys and max_parked_records of the sink.",
    )


class ParkedRow(NamedTuple):
    """One parked record as it is listed; `fault` is None for one that waits behind an earlier one of its key."""

    key: PositionKey
    topic: str
    offset: int
    record_key: bytes | None
    fault: Fault | None


def list_parked(database: Database) -> list[ParkedRow]:
    """Every parked record of a database, in order of sink, topic, partition and offset.

    A database without Semel's tables has none. Raises the driver's error when it cannot be reached.
    """
    try:
        rows = database.query(_LIST)
    except Exception as error:
        if is_missing_table(error):
            return []
        raise
    return [_listed(*row) for row in rows]


def _listed(
    sink: str,
    cluster: str,
    topic_id: str,
    part: int,
    topic: str,
    offset: int,
    key: bytes | None,
    error: str | None,
    *said: str | None,
) -> ParkedRow:
    fault = None if error is None else Fault(error, *(text or "" for text in said))
    return ParkedRow(
        PositionKey(sink, cluster, topic_id, part), topic, offset, None if key is None else bytes(key), fault
    )
