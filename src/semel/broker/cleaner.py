"""Compacts the topics that ask for it, a few milliseconds at a time, in the broker's one thread.

What a pass does, and why that may be done between requests, is told in `semel.log.compaction`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator

from semel.broker.topics import Partition, Topics
from semel.env import Env
from semel.log.log import LogError

__all__ = ["Cleaner"]

log = logging.getLogger("semel.broker")

SLICE_SECONDS = 0.002
"""Requests wait no longer for the cleaner than this, or than one large batch takes."""
REST_SECONDS = 4 * SLICE_SECONDS
"""A fifth of the thread's time is compaction's at most, while there is something to compact."""
_SLICE_STEPS = 1000
"""Where time stands still (in a simulation) a slice ends all the same."""


class Cleaner:
    """Goes through the partitions, round by round, and compacts those where it is due."""

    def __init__(self, topics: Topics, env: Env) -> None:
        self._topics = topics
        self._env = env
        self._round: Generator[None, None, None] | None = None

    def __repr__(self) -> str:
        return f"<Cleaner {'at work' if self._round is not None else 'idle'}>"

    def work(self) -> bool:
        """Go on for a slice of time; False when the round is over."""
        if self._round is None:
            self._round = self._go_round()
        until = self._env.monotonic() + SLICE_SECONDS
        for _ in range(_SLICE_STEPS):
            if next(self._round, self) is self:
                self._round = None
                return False
            if self._env.monotonic() >= until:
                break
        return True

    def stop(self) -> None:
        """Give up what is under way; nothing of it counts yet."""
        if self._round is not None:
            self._round.close()
        self._round = None

    def _go_round(self) -> Generator[None, None, None]:
        for topic in list(self._topics):
            if topic.info.internal:
                continue  # The coordinators shorten their logs themselves: see `semel.broker.internal`.
            for partition in topic.partitions:
                if not partition.deleted and partition.log.config.is_compacted:
                    yield from self._clean(partition)
                yield

    def _clean(self, partition: Partition) -> Iterator[None]:
        source = partition.log
        try:
            now_ms = self._env.wall_ms()
            start = source.log_start_offset
            if source.tend(now_ms) != start:
                partition.advanced()
            steps = source.compactor.begin(now_ms)
            if steps is None:
                return
            for _ in steps:
                yield
                if partition.deleted:
                    return
            done = source.compactor.last
            if done is not None:
                log.info(
                    "%s-%d compacted from %d to %d bytes, %d records dropped",
                    *(source.topic, source.partition, done.bytes_before, done.bytes_after, done.records_dropped),
                )
        except LogError as error:
            log.error("%s", error)
