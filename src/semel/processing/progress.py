"""How far a restore is: a line now and then for whoever waits for it, and two metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Self

from semel.processing.measures import Measures
from semel.types import TopicPartition

__all__ = ["Progress"]

log = logging.getLogger("semel.state")

REPEAT_SECONDS = 2.0
"""Between two lines; a restore that is over before the first is told in one line."""


class Progress:
    """The restore of some partitions of changelogs and park topics. `clock` gives seconds."""

    def __init__(
        self,
        component: str,
        starts: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        measures: Measures,
        clock: Callable[[], float],
    ) -> None:
        self._component = component
        self._positions = dict(starts)
        self._ends = {at: ends[at] for at in starts}
        self._total = self._left()
        self._measures = measures
        self._clock = clock
        self._began = self._told = clock()
        self._records = 0

    def __repr__(self) -> str:
        return f"<Progress of {self._component}: {self._left()} of {self._total} offsets left>"

    def _left(self) -> int:
        return sum(max(0, end - self._positions[at]) for at, end in self._ends.items())

    def __enter__(self) -> Self:
        log.info("%s restores %d partitions: %d offsets to read", self._component, len(self._ends), self._total)
        self._measures.restoring(self._total)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._measures.restoring(0)
        if kind is None:
            seconds = self._clock() - self._began
            log.info("%s restored %d records in %.1f s", self._component, self._records, seconds)

    def reached(self, positions: Mapping[TopicPartition, int], records: int) -> None:
        """So many more records were read, up to these positions."""
        self._positions.update(positions)
        self._records += records
        self._measures.restored(records)
        left, now = self._left(), self._clock()
        self._measures.restoring(left)
        if now - self._told < REPEAT_SECONDS:
            return
        self._told = now
        rate = (self._total - left) / (now - self._began)
        log.info(
            "%s restores: %d of %d offsets (%d %%), %.0f a second, some %.0f s to go",
            self._component,
            self._total - left,
            self._total,
            100 * (self._total - left) // self._total,
            rate,
            left / rate if rate else 0,
        )
