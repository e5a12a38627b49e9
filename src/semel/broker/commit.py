"""Group commit: whoever wrote while the disk was busy shares the next sync (`fsync="always"`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from semel.broker.topics import Partition
from semel.log.errors import LogError
from semel.log.sync import Sync

__all__ = ["Background", "GroupCommit", "at_once"]

log = logging.getLogger("semel.broker")

Background = Callable[[Callable[[], None], Callable[[], None]], None]
"""`background(work, done)` runs `work` aside and then `done` in the thread of the node. `work` never raises."""


def at_once(work: Callable[[], None], done: Callable[[], None]) -> None:
    """A background for a node without a shell: there is no aside."""
    work()
    done()


class GroupCommit:
    """At most one round of syncs is under way; the next one takes everything that came meanwhile."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._dirty: dict[Partition, None] = {}
        self._waiting: list[Callable[[], None]] = []
        self._is_busy = False

    def __repr__(self) -> str:
        return f"<GroupCommit {'busy' if self._is_busy else 'idle'}, {len(self._waiting)} waiting>"

    def wait(self, partitions: Iterable[Partition], done: Callable[[], None]) -> None:
        """Call `done` when a sync of these partitions has ended; their high watermarks say how it ended."""
        self._dirty.update(dict.fromkeys(partitions))
        self._waiting.append(done)
        if not self._is_busy:
            self._begin()

    def _begin(self) -> None:
        dirty, self._dirty = self._dirty, {}
        waiting, self._waiting = self._waiting, []
        syncs: list[tuple[Partition, Sync]] = []
        for partition in dirty:
            try:
                sync = partition.log.begin_sync()
            except LogError as error:
                log.error("no sync: %s", error)
            else:
                if sync is not None:
                    syncs.append((partition, sync))
        self._is_busy = True

        def work() -> None:
            for _, sync in syncs:
                sync.run()

        self._background(work, lambda: self._end(syncs, waiting))

    def _end(self, syncs: list[tuple[Partition, Sync]], waiting: list[Callable[[], None]]) -> None:
        for partition, sync in syncs:
            try:
                partition.log.end_sync(sync)
            except LogError as error:
                log.error("a sync failed: %s", error)
        self._is_busy = False
        try:
            for done in waiting:
                done()
            for partition, _ in syncs:
                if partition.waiters:
                    partition.advanced()
        finally:  # Whatever goes wrong for one reader, writers must not wait for ever.
            if self._waiting and not self._is_busy:
                self._begin()
