"""Whose fault it is when a sink's handler fails in a way that says nothing about it: as processors judge (blame.py).

Such a failure counts as an outage of something that the handler needs, until the same record fails again while others
succeed. Many keys in a row that fail are an outage for certain, and then one record at a time is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from semel.databases.database import Cause
from semel.env import Env
from semel.errors import SemelError
from semel.processing.blame import Blame, Breaker, Kind, classify
from semel.processing.shortage import is_shortage
from semel.types import Record, TopicPartition

__all__ = ["Judgement", "Poison", "Undecided"]


class Poison(SemelError):
    """The data is at fault; nothing of it counts."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Undecided(SemelError):
    """Nobody knows yet whether these records are at fault, by partition the first of each; nothing is committed."""

    def __init__(self, offsets: dict[TopicPartition, int], error: Exception) -> None:
        places = ", ".join(f"{at}@{offset}" for at, offset in offsets.items())
        super().__init__(f"{error!r} at {places}; whether the record is at fault is not known yet")
        self.offsets = offsets


class Judgement:
    """Remembers failures of one sink. `driver_cause` knows the errors of the database's driver, which say enough."""

    def __init__(self, env: Env, driver_cause: Callable[[Exception], Cause | None]) -> None:
        self._blame = Blame(env.monotonic)
        self._breaker = Breaker(env)
        self._driver_cause = driver_cause

    def __repr__(self) -> str:
        return f"<Judgement {self._breaker!r}>"

    @property
    def is_outage(self) -> bool:
        """Whether so many keys failed in a row that only one record at a time is tried."""
        return self._breaker.is_open

    def is_the_records(self, record: Record, error: Exception) -> bool:
        """Whether the record is at fault for this error; otherwise it is to be tried again later."""
        if self._driver_cause(error) is not None or classify(error) is not Kind.UNKNOWN or is_shortage(error):
            return True  # A shortage that comes here has lasted longer than anybody waits for one.
        if self._blame.is_the_records(record[:3], error):
            return True
        self._breaker.failed(record.key, 0.0)
        return False

    def succeeded(self) -> None:
        """The handler came to its end with some record."""
        if self._blame.has_suspects:
            self._blame.succeeded()
            self._breaker.succeeded()

    def passed(self, records: Iterable[Record]) -> None:
        """These are dealt with."""
        if self._blame.has_suspects:
            for record in records:
                self._blame.passed(record[:3])
