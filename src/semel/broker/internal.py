"""The broker's own topics: a log of (key, value) changes that rebuild a coordinator's state.

A log grows with every change, the state does not: from time to time the whole state is written as a checkpoint at the
log's end, and everything before it is deleted. A crash between the two leaves both, which rebuild the same state. A
checkpoint is one batch, so there is all of it or nothing: a part of it would put older changes behind newer ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from semel.broker.topics import Partition, Topics
from semel.failpoints import failpoint
from semel.log.log import LogError
from semel.wire.records import decode_records, iter_batches

__all__ = ["Change", "InternalLog"]

log = logging.getLogger("semel.broker")

Change = tuple[bytes, bytes | None]
"""Key and value; a value of None says that the key is gone."""

CHECKPOINT_BYTES = 4 * 1024 * 1024
"""Changes between checkpoints: about 15,000 transactions, which a restart reads in a tenth of a second."""
CHECKPOINT_RATIO = 4
"""A checkpoint is worth its bytes only when this many times its size was written since the last one."""
SEGMENT_BYTES = 16 * 1024 * 1024
READ_BYTES = 1024 * 1024
_BATCH_OVERHEAD = 80
"""Bytes of a batch and its records beside keys and values, roughly."""


class InternalLog:
    """One internal topic of one partition. `snapshot` gives the changes that rebuild the state as it is now."""

    def __init__(self, topics: Topics, name: str, snapshot: Callable[[], Sequence[Change]]) -> None:
        self._topics = topics
        self._name = name
        self._snapshot = snapshot
        self._partition: Partition | None = None
        self._bytes_since_checkpoint = 0
        self._checkpoint_bytes = 0

    def __repr__(self) -> str:
        return f"<InternalLog {self._name}, {self._bytes_since_checkpoint} bytes since its checkpoint>"

    def open(self) -> Iterator[Change]:
        """Make the topic if it is missing; give every change that the log still has, in order."""
        topic = self._topics.get(self._name)
        if topic is None:
            configs = {"cleanup.policy": "compact", "segment.bytes": str(SEGMENT_BYTES)}
            topic = self._topics.create(self._name, 1, configs)
        self._partition = topic.partitions[0]
        source = self._partition.log
        offset = source.log_start_offset
        while offset < source.log_end_offset:
            data = source.read_bytes(offset, READ_BYTES, source.log_end_offset)
            self._bytes_since_checkpoint += len(data)
            for at, header in iter_batches(data):
                offset = header.next_offset
                if header.is_control:
                    continue  # Not ours: a marker of a client's transaction, which earlier versions let in.
                for record in decode_records(data, at, header, self._name, 0):
                    if record.key is not None:
                        yield record.key, record.value

    def append(self, changes: Sequence[Change], now_ms: int) -> None:
        """Write changes as one batch: all of them or none. Raises `LogError` when nothing was written."""
        partition = self._opened()
        partition.log.append_internal(changes, now_ms)
        self._bytes_since_checkpoint += _size(changes)
        if partition.waiters:
            partition.advanced()

    @property
    def has_stopped(self) -> bool:
        """Whether nothing is written any more until a restart."""
        return self._opened().log.has_stopped

    def checkpoint_if_due(self, now_ms: int) -> None:
        """Write a checkpoint when enough changes have come since the last one. Call it between changes."""
        if self._bytes_since_checkpoint < max(CHECKPOINT_BYTES, CHECKPOINT_RATIO * self._checkpoint_bytes):
            return
        changes = self._snapshot()
        source = self._opened().log
        first = source.log_end_offset
        try:
            if changes:
                source.append_internal(changes, now_ms)
            failpoint("broker.after_checkpoint")
            source.delete_before(first)
        except LogError as error:
            log.warning("no checkpoint of %s: %s", self._name, error)
        self._bytes_since_checkpoint = 0
        self._checkpoint_bytes = _size(changes)

    def _opened(self) -> Partition:
        assert self._partition is not None, f"{self._name} is not open"
        return self._partition


def _size(changes: Sequence[Change]) -> int:
    return _BATCH_OVERHEAD + sum(len(key) + len(value or b"") for key, value in changes)
