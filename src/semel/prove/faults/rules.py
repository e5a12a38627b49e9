"""What shall happen to which request: rules for the Kafka proxy.

A rule counts the requests that it is about, and acts on the `on`-th and the `times` - 1 behind it. Over TCP nothing
overtakes and nothing is missing in the middle: a dropped frame takes everything behind it with it, as a cut wire
does, and a held one holds what comes after it. `Reorder` and `Duplicate` do what TCP cannot: they stand for a client's
copy on another connection, and for a broker that takes requests of one connection in another order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from semel.prove.faults.pipe import Direction
from semel.wire.messages import RequestHeader

__all__ = ["Action", "Cut", "Drop", "Duplicate", "Hold", "Reorder", "Rule"]


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the request, or its response, for so many seconds, or until the rule is released."""

    of: Direction = "request"
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Reorder:
    """Let the next requests of the connection overtake this one; alone, it goes after `seconds`.

    The client still gets its answers in the order in which it asked.
    """

    behind: int = 1
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Deliver the request, and a copy of it after so many seconds, or when the rule is released.

    The copy's answer stays here: nobody waits for it.
    """

    seconds: float | None = 0.0


@dataclass(frozen=True, slots=True)
class Drop:
    """Drop the request, or carry it out and drop the response; that direction of the connection stays silent."""

    of: Direction = "request"


@dataclass(frozen=True, slots=True)
class Cut:
    """Let `at` bytes of the frame through, length prefix included, and close both connections.

    At 0 the request is lost before it, or its answer behind it. With `reset` by RST.
    """

    of: Direction = "request"
    at: int = 0
    reset: bool = False


Action = Hold | Reorder | Duplicate | Drop | Cut


@dataclass(slots=True, eq=False)
class Rule:
    """An action for the `on`-th matching request and `times` - 1 more behind it."""

    action: Action
    api_key: int | None = None
    """Of which API; None is every one."""
    version: int | None = None
    on: int = 1
    times: int = 1
    when: Callable[[RequestHeader, bytes], bool] | None = None
    """Counts only requests for which this is true; it gets the frame without its length prefix."""
    seen: int = 0
    hits: int = 0
    struck: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """A request was taken."""
    answered: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """The broker answered what was taken (of a duplicate: the copy), or its connection is gone."""
    answer: bytes | None = field(default=None, repr=False)
    """That answer without its length prefix; None when the connection ended instead."""
    released: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def may_take(self, api_key: int, version: int) -> bool:
        """Whether a request with this head could be meant."""
        return self.api_key in (None, api_key) and self.version in (None, version)

    def takes(self, header: RequestHeader, frame: bytes) -> bool:
        """Count this request; whether the action is for it."""
        if self.when is not None and not self.when(header, frame):
            return False
        self.seen += 1
        if not self.on <= self.seen < self.on + self.times:
            return False
        self.hits += 1
        self.struck.set()
        return True

    def release(self) -> None:
        """Let go what is held, and hold no more."""
        self.released.set()

    def settle(self, answer: bytes | None) -> None:
        """The broker answered what was taken, or never will."""
        if not self.answered.is_set():
            self.answer = answer
            self.answered.set()
