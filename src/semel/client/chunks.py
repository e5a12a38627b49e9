"""Fetched bytes into committed records [sans-IO].

A read_committed fetch ends at the last stable offset, so every transaction in it has ended; the answer lists those
that were aborted (KIP-98). What they wrote, the markers themselves, and what lies below the position is left out, and
the position moves past all of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from semel.errors import CorruptBatch
from semel.types import Record, TopicPartition
from semel.wire.records import BatchHeader, check_crc, decode_records, iter_batches, read_control

__all__ = ["Chunk"]


class Chunk:
    """What one fetch gave for one partition. Batches are decoded when their records are asked for, one at a time."""

    __slots__ = ("_aborted", "_batches", "_data", "_next", "_rest", "_skipped", "at", "position", "size")

    def __init__(self, at: TopicPartition, position: int, data: bytes, aborted: Iterable[tuple[int, int]] = ()) -> None:
        """`position` is the first offset wanted, `aborted` pairs of first offset and producer id.

        Raises `CorruptBatch` when the batches' lengths are impossible; a last one that was cut off is left out.
        """
        self.at = at
        self.position = position
        """The next offset to be delivered."""
        self.size = len(data)
        self._data = data
        self._batches = [item for item in iter_batches(data) if item[1].next_offset > position]
        self._next = 0
        self._aborted = sorted(aborted, reverse=True)
        self._skipped: set[int] = set()
        self._rest: list[Record] = []

    def __repr__(self) -> str:
        return f"<Chunk {self.at} from {self.position}, {len(self._batches) - self._next} batches>"

    @property
    def last(self) -> BatchHeader | None:
        """The header of the last batch, None when there is none."""
        return self._batches[-1][1] if self._batches else None

    @property
    def is_empty(self) -> bool:
        """Whether everything was taken."""
        return not self._rest and self._next == len(self._batches)

    def take(self, count: int) -> list[Record]:
        """Up to `count` records, fewer only at the end. Raises `CorruptBatch`; the position then stands before it."""
        found: list[Record] = []
        while len(found) < count and not self.is_empty:
            if not self._rest:
                self._rest = self._next_batch()
                continue
            room = count - len(found)
            if len(self._rest) <= room:
                taken, self._rest = self._rest, []
            else:
                taken, self._rest = self._rest[:room], self._rest[room:]
            found += taken
            self.position = taken[-1].offset + 1
        if not self._rest and self._next:
            self.position = max(self.position, self._batches[self._next - 1][1].next_offset)
        return found

    def _next_batch(self) -> list[Record]:
        """The committed records of the next batch."""
        at, header = self._batches[self._next]
        if not check_crc(self._data, at, header):
            raise CorruptBatch(f"{self.at}: the checksum of the batch at offset {header.base_offset} is wrong")
        while self._aborted and self._aborted[-1][0] <= header.last_offset:
            self._skipped.add(self._aborted.pop()[1])
        records: list[Record] = []
        if header.is_control:
            committed, _ = read_control(self._data, at, header)
            if not committed:
                self._skipped.discard(header.producer_id)
        elif not (header.is_transactional and header.producer_id in self._skipped):
            records = decode_records(self._data, at, header, self.at.topic, self.at.partition)
            if header.base_offset < self.position:
                records = [record for record in records if record.offset >= self.position]
        self._next += 1
        return records
