"""Which rows are asked for next: one way through the outbox after the other, in the order of shard and number. Sans-IO.

Within a way a SELECT begins with the shard in which the one before ended, so that it steps neither over the rows in
hand of all the others nor over those just deleted. It reads this shard from its front again, without what is in hand,
and not on from the row where the last one stopped: a row may have been committed since under a number that was passed
already, and then a later one of its key. Every way begins at the front. A lane is read to its end only by a SELECT that
covered all of it.

Rows of one key lie in one shard in their order. So a lane whose rows were read and put back, or which came anew, begins
a new way: else later rows of its keys would be read before those.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from semel.outbox.rows import SHARDS, lane_of

__all__ = ["Ask", "Sweep", "shards_of"]


def shards_of(lanes: Iterable[int], count: int) -> list[int]:
    """The shards of some of `count` lanes, in order."""
    wanted = set(lanes)
    return [shard for shard in range(SHARDS) if lane_of(shard, count) in wanted]


class Ask(NamedTuple):
    """One SELECT."""

    lanes: set[int]
    shards: list[int]
    is_all: bool
    """Whether these are all shards of the lanes; else the way has passed some of them."""
    way: int


class Sweep:
    """The lanes that may have rows which were not read, and how far the present way is."""

    def __init__(self) -> None:
        self._unread: set[int] = set()
        self._shard = 0
        self._way = 0

    def __repr__(self) -> str:
        return f"<Sweep {len(self._unread)} lanes unread, way {self._way} at shard {self._shard}>"

    def add(self, lanes: Iterable[int]) -> None:
        """These lanes may have rows that were not read."""
        self._unread.update(lanes)

    def restart(self, lanes: Iterable[int]) -> None:
        """Rows of these lanes are to be read that lie behind: begin at the front, whatever a SELECT under way says."""
        self._unread.update(lanes)
        self._shard = 0
        self._way += 1

    def ask(self, ready: Iterable[int], count: int) -> Ask | None:
        """What to ask for, for those of the `ready` lanes that are unread; None when there is nothing.

        Whoever adds a lane from now on may mean rows that this SELECT does not see.
        """
        lanes = self._unread.intersection(ready)
        if not lanes:
            return None
        shards = shards_of(lanes, count)
        ahead = [shard for shard in shards if shard >= self._shard] or shards
        self._unread -= lanes
        return Ask(lanes, ahead, len(ahead) == len(shards), self._way)

    def failed(self, ask: Ask) -> None:
        """The SELECT gave nothing."""
        self.restart(ask.lanes)

    def answered(self, ask: Ask, last: int, *, is_full: bool, is_whole: bool) -> None:
        """The SELECT's rows went to their lanes; it ended in shard `last`, and there may be more (`is_full`).

        `is_whole` is False when some of the rows went nowhere.
        """
        if is_full or not is_whole or not ask.is_all:
            self._unread |= ask.lanes
        if ask.way == self._way:
            self._shard = last if is_full and is_whole else 0
