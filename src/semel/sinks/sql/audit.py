"""The audit ledger: which records each call of a handler was given, written in the transaction of its effects.

Only while a history is written. The table has no unique constraint, which would hide the very thing that it is there
to show: a record whose effects are in the database twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from semel import history
from semel.databases.database import Database
from semel.errors import OutcomeUnknown
from semel.history import Batch, BatchPart, Outcome
from semel.types import Record, TopicPartition

__all__ = ["PASSED_OVER", "Audit", "Given"]

PASSED_OVER = " (passed over)"
"""Behind the name of the sink, in rows of the ledger that tell of records without effects."""

_INSERT = """
INSERT INTO semel_audit (sink, topic, part, owner_epoch, attempt, offsets) VALUES (?, ?, ?, ?, ?, ?)
"""


class Given(NamedTuple):
    """What one call of the handler is given of one partition."""

    partition: TopicPartition
    owner_epoch: int
    offsets: list[int]


class Audit:
    """One database transaction as the ledger and the history tell of it."""

    def __init__(self, sink: str) -> None:
        self._sink = sink
        self._attempt = history.attempt()
        self._handed: dict[TopicPartition, list[int]] = {}
        self._outcome: Outcome = "invoke"
        self._is_told = False

    @contextmanager
    def call(self, database: Database, given: Sequence[Given]) -> Iterator[None]:
        """Around a call of the handler: one row for each partition that it is given records of."""
        rows = [
            (self._sink, *item.partition, item.owner_epoch, self._attempt, msgspec.json.encode(item.offsets).decode())
            for item in given
        ]
        database.executemany(_INSERT, rows)
        yield
        for item in given:
            self._handed.setdefault(item.partition, []).extend(item.offsets)

    def passed_over(self, database: Database, copies: Sequence[Record]) -> None:
        """Records whose message had been applied: the ledger has them apart, as having no effects of their own."""
        offsets: dict[TopicPartition, list[int]] = {}
        for record in copies:
            offsets.setdefault(TopicPartition(record.topic, record.partition), []).append(record.offset)
        name = self._sink + PASSED_OVER
        database.executemany(
            _INSERT,
            [(name, *at, 0, self._attempt, msgspec.json.encode(told).decode()) for at, told in offsets.items()],
        )

    def handed(self, partition: TopicPartition) -> list[int]:
        """Offsets of one partition whose effects are in the transaction."""
        return self._handed.get(partition, [])

    def begin(self, parts: list[BatchPart]) -> None:
        """Tell the history that effects are about to be committed; once, where that takes two transactions."""
        if not self._is_told:
            self._is_told = True
            history.note(Batch(type="invoke", a=self._attempt, component=self._sink, parts=parts))

    @contextmanager
    def told(self, parts: list[BatchPart]) -> Iterator[None]:
        """Around COMMIT: tell the history that it is tried, and how it ended."""
        self.begin(parts)
        try:
            yield
        except OutcomeUnknown:
            self.end("info")
            raise
        except Exception:
            self.end("fail")
            raise
        self.end("ok")

    def end(self, outcome: Outcome) -> None:
        """The transaction ended so, as far as is known now; said again only when more is known."""
        if outcome != self._outcome:
            self._outcome = outcome
            history.note(Batch(type=outcome, a=self._attempt))
