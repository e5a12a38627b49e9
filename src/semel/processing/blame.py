"""Whose fault a failure is, and how long is waited when it is not the record's.

A handler that cannot reach something says so in a hundred ways. What is known to be the world's is waited for; what
is known to be the data's parks the key; everything else counts as the world's until the same record fails again while
others succeed: then it is the record.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import msgspec

from semel.env import Env
from semel.errors import Fenced, HandlerOverdue, OutcomeUnknown, Reject, Retriable, SemelError
from semel.processing.shortage import Shortages

__all__ = ["WAIT", "Blame", "Breaker", "Kind", "classify"]

WAIT = (Retriable, OutcomeUnknown, ConnectionError, TimeoutError)
"""The world is at fault, not the record: try again."""

_DATA = (
    Reject,
    SemelError,
    msgspec.MsgspecError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Decoding, validation, or a mistake in the handler: the same record would fail again."""

PLACES_MAX = 10_000
"""Records remembered as having failed for an unknown reason; above it the one longest known is forgotten."""

BREAKER_FAILURES = 5
BREAKER_KEYS = 3
"""So many failures without a success, over so many keys, are an outage and no coincidence."""
WAIT_SECONDS = (0.05, 10.0)
"""How long a partition waits after a failure of the world's, doubled from the first to the second."""

Place = tuple[str, int, int]
"""Topic, partition and offset."""


class Kind(Enum):
    """Whose fault an exception is by its class alone."""

    WORLD = "world"
    DATA = "data"
    FENCED = "fenced"
    UNKNOWN = "unknown"


def classify(error: BaseException) -> Kind:
    """By the class alone. Errors of libraries that are none of Python's own tell nothing."""
    if isinstance(error, Fenced):
        return Kind.FENCED
    if isinstance(error, WAIT):
        return Kind.WORLD
    if isinstance(error, HandlerOverdue):
        return Kind.UNKNOWN
    return Kind.DATA if isinstance(error, _DATA) else Kind.UNKNOWN


class Blame:
    """Remembers which records failed for an unknown reason, and whether others succeeded since."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._shortages = Shortages(monotonic)
        self._successes = 0
        self._failed: dict[Place, int] = {}
        """How many had succeeded when this record failed first."""

    def succeeded(self) -> None:
        """The handler came to its end with some record."""
        self._successes += 1

    def is_the_records(self, place: Place, error: BaseException) -> bool:
        """Whether the record at this place is at fault; otherwise it is to be tried again later."""
        if self._shortages.may_pass(place, error):
            return False
        kind = classify(error)
        if kind is not Kind.UNKNOWN:
            return kind is Kind.DATA
        if place not in self._failed:
            if len(self._failed) >= PLACES_MAX:
                del self._failed[next(iter(self._failed))]
            self._failed[place] = self._successes
            return False
        return self._successes > self._failed[place]

    @property
    def has_suspects(self) -> bool:
        """Whether some record failed for an unknown reason, and nobody knows yet whose that was."""
        return bool(self._failed)

    def is_suspected(self, place: Place) -> bool:
        """Whether it failed for an unknown reason, and nobody knows yet whose that was."""
        return place in self._failed

    def passed(self, place: Place) -> None:
        """The record is dealt with."""
        self._failed.pop(place, None)


class Breaker:
    """When to try again: each partition by itself, or after failures of many keys in a row one record in all."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._tries = 0
        self._keys: set[bytes | None] = set()
        self.open_until = 0.0
        """The moment before which nothing is tried while it is open."""

    def __repr__(self) -> str:
        return f"<Breaker {'open' if self.is_open else 'closed'}, {self._tries} failures>"

    @property
    def is_open(self) -> bool:
        """Whether nothing is tried but one record at a time, when its moment has come."""
        return self._tries >= BREAKER_FAILURES and len(self._keys) >= BREAKER_KEYS

    def failed(self, key: bytes | None, after: float) -> float:
        """A record of this key met an outage; the moment (monotonic seconds) before which it is not tried again.

        `after` is the least number of seconds to wait, where the handler named one.
        """
        first, largest = WAIT_SECONDS
        wait = min(largest, first * (1 << min(self._tries, 16))) * (0.8 + 0.4 * self._env.rng.random())
        self._tries += 1
        if len(self._keys) < BREAKER_KEYS:
            self._keys.add(key)
        self.open_until = self._env.monotonic() + max(wait, after)
        return self.open_until

    def succeeded(self) -> None:
        """The target does its work."""
        if self._tries:
            self._tries = 0
            self._keys.clear()

    def may_try(self) -> bool:
        """Whether a record may be tried now, as far as the whole component goes."""
        return not self.is_open or self._env.monotonic() >= self.open_until
