"""Reading what sinks left in databases: audit ledgers, positions, parked records, prepared transactions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from semel.databases.database import Database, connect, is_missing_table, title_of
from semel.processing.parklog import Outcome
from semel.prove.check.evidence import InDoubt, LedgerRow, ParkedRow, Position
from semel.sinks.sql.audit import PASSED_OVER
from semel.types import TopicPartition

__all__ = ["read_ledger", "read_parked", "read_prepared", "read_sink_positions"]

ROWS_AT_ONCE = 5_000
"""Rows of a ledger in memory; one holds the offsets of one call, at most a thousand."""

_LEDGER = """
SELECT seq, sink, topic, part, owner_epoch, attempt, offsets FROM semel_audit WHERE seq > ? ORDER BY seq LIMIT ?
"""
_POSITIONS = "SELECT sink, topic, part, next_offset FROM semel_position ORDER BY sink, topic, part"
_PARKED = "SELECT sink, topic, part, record_offset FROM semel_parked ORDER BY sink, topic, part, record_offset"
_OUTCOMES = """
SELECT c.sink, p.topic, c.part, c.outcome FROM semel_park_command c
JOIN semel_position p ON p.sink = c.sink AND p.cluster_id = c.cluster_id AND p.topic_id = c.topic_id AND p.part = c.part
WHERE c.outcome IS NOT NULL
"""

_PASSED_OVER = "SELECT sink, topic, part, offsets FROM semel_audit WHERE sink LIKE ? ORDER BY seq"

_offsets = msgspec.json.Decoder(list[int]).decode


def read_ledger(url: str) -> Iterator[LedgerRow]:
    """Every row of a database's audit ledger, in the order of `seq`. Raises the driver's errors.

    Rows of one sink and partition were numbered under the lock of its position, so their order is that of the commits.
    A database without a ledger has no rows.
    """
    database = connect(url)
    try:
        last = -1
        while rows := _query(database, _LEDGER, (last, ROWS_AT_ONCE)):
            for last, sink, topic, partition, owner_epoch, attempt, offsets in rows:  # noqa: B007
                if sink.endswith(PASSED_OVER):
                    continue
                yield LedgerRow(sink, topic, partition, owner_epoch, attempt, _offsets(offsets))
            last = rows[-1][0]
    finally:
        database.close()


def read_sink_positions(url: str, begin: Mapping[tuple[str, TopicPartition], int] | None = None) -> list[Position]:
    """Every position row; `begin` says where a sink was before the run."""
    known = begin or {}
    return [
        Position(sink, topic, part, next_offset, known.get((sink, TopicPartition(topic, part)), 0), True)
        for sink, topic, part, next_offset in _once(url, _POSITIONS)
    ]


def read_parked(url: str) -> list[ParkedRow]:
    """Every record of the sinks that waits, was discarded visibly, or was passed over as a copy of another: nothing of
    it may be done."""
    waiting = [ParkedRow(*row) for row in _once(url, _PARKED)]
    discarded = [
        ParkedRow(sink, topic, part, offset)
        for sink, topic, part, outcome in _once(url, _OUTCOMES)
        for offset in msgspec.json.decode(outcome, type=Outcome).discarded
    ]
    database = connect(url)
    try:
        copies = [
            ParkedRow(sink.removesuffix(PASSED_OVER), topic, part, offset)
            for sink, topic, part, offsets in _query(database, _PASSED_OVER, ("%" + PASSED_OVER,))
            for offset in _offsets(offsets)
        ]
    finally:
        database.close()
    return waiting + discarded + copies


def read_prepared(url: str) -> list[InDoubt]:
    """Prepared transactions that a PostgreSQL still holds; Semel makes none elsewhere."""
    if title_of(url) != "PostgreSQL":
        return []
    rows = _once(url, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY gid")
    return [InDoubt("PostgreSQL", gid, "prepared", True) for (gid,) in rows]


def _once(url: str, sql: str) -> list[tuple[Any, ...]]:
    database = connect(url)
    try:
        return _query(database, sql, ())
    finally:
        database.close()


def _query(database: Database, sql: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    try:
        return database.query(sql, parameters)
    except Exception as error:
        if is_missing_table(error):
            return []
        raise
