"""What shall happen to which request: rules for the proxies.

Over TCP nothing
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

__all__ = ["Action", "Cut", "Drop", "Duplicate", "Hold", "Reorder", "Rule", "Trap"]


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
class Trap:
    """An action for the `on`-th occasion and `times` - 1 more behind it."""

    action: Action
    on: int = field(default=1, kw_only=True)
    times: int = field(default=1, kw_only=True)
    seen: int = field(default=0, kw_only=True)
    hits: int = field(default=0, kw_only=True)
    struck: asyncio.Event = field(default_factory=asyncio.Event, repr=False, kw_only=True)
    """An occasion was taken."""
    answered: asyncio.Event = field(default_factory=asyncio.Event, repr=False, kw_only=True)
    """The server answered what was taken (of a duplicate: the copy), or its connection is gone."""
    answer: bytes | None = field(default=None, repr=False, kw_only=True)
    """That answer; None when the connection ended instead. Kafka's is without its length prefix."""
    released: asyncio.Event = field(default_factory=asyncio.Event, repr=False, kw_only=True)

    def count(self) -> bool:
        """Count this occasion; whether the action is for it."""
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
        """The server answered what was taken, or never will."""
        if not self.answered.is_set():
            self.answer = answer
            self.answered.set()


@dataclass(slots=True, eq=False)
class Rule(Trap):
    """A trap for requests to Kafka."""

    api_key: int | None = None
    """Of which API; None is every one."""
    version: int | None = None
    when: Callable[[RequestHeader, bytes], bool] | None = None
    """Counts only requests for which this is true; it gets the frame without its length prefix."""
    header: RequestHeader | None = field(default=None, repr=False, kw_only=True)
    """The head of the request that was taken last."""

    def may_take(self, api_key: int, version: int) -> bool:
        """Whether a request with this head could be meant."""
        return self.api_key in (None, api_key) and self.version in (None, version)

    def takes(self, header: RequestHeader, frame: bytes) -> bool:
        """Count this request, if it is meant; whether the action is for it."""
        if (self.when is not None and not self.when(header, frame)) or not self.count():
            return False
        self.header = header
        return True
