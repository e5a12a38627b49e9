"""Where batches lie in one segment: offsets, positions, timestamps, and the transactions aborted there. No IO.

Dense at the tail, where consumers read small batches; one entry every 4 KB or more before that.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

import msgspec

from semel.log.partition import AbortedIndex

__all__ = ["IndexImage", "SegmentIndex"]

DENSE_BATCHES = 4096
"""Newest batches that keep an entry of their own; up to twice as many between two thinnings."""
SPARSE_BYTES = 4096


class IndexImage(msgspec.Struct, array_like=True, frozen=True):
    """An index as it is stored: its arrays as bytes, in this machine's byte order."""

    columns: tuple[bytes, bytes, bytes]
    dense_from: int
    aborted: tuple[bytes, bytes, bytes, bytes]


class SegmentIndex:
    """Entry n covers the bytes from its position to the next entry's; its timestamp is the largest up to its end."""

    __slots__ = ("aborted", "dense_from", "offsets", "positions", "timestamps")

    def __init__(self) -> None:
        self.offsets = array("q")
        self.positions = array("q")
        self.timestamps = array("q")
        self.dense_from = 0
        """From this entry on, each covers one batch."""
        self.aborted = AbortedIndex()

    def __len__(self) -> int:
        return len(self.offsets)

    def __repr__(self) -> str:
        return f"<SegmentIndex {len(self)} entries, {len(self) - self.dense_from} dense>"

    def add(self, base_offset: int, position: int, max_timestamp: int) -> None:
        """Add the batch at the segment's end; `max_timestamp` is the segment's largest so far."""
        self.offsets.append(base_offset)
        self.positions.append(position)
        self.timestamps.append(max_timestamp)
        if len(self.offsets) - self.dense_from >= 2 * DENSE_BATCHES:
            self.thin(DENSE_BATCHES)

    def thin(self, keep: int = 0) -> None:
        """Leave one entry every `SPARSE_BYTES`, except among the last `keep` batches."""
        start, stop = self.dense_from, len(self.offsets) - keep
        kept: list[int] = []
        last = -SPARSE_BYTES
        ends = array("q")
        for at in range(start, stop):
            position = self.positions[at]
            if position - last >= SPARSE_BYTES:
                kept.append(at)
                ends.append(self.timestamps[at])
                last = position
            else:
                ends[-1] = self.timestamps[at]
        self.offsets[start:stop] = array("q", [self.offsets[at] for at in kept])
        self.positions[start:stop] = array("q", [self.positions[at] for at in kept])
        self.timestamps[start:stop] = ends
        self.dense_from = start + len(kept)

    def before_offset(self, offset: int) -> int:
        """The entry whose stretch of the file holds `offset`."""
        return max(bisect_right(self.offsets, offset) - 1, 0)

    def before_position(self, position: int) -> int:
        """The position of the last entry at or before `position`."""
        return self.positions[max(bisect_right(self.positions, position) - 1, 0)]

    def position_for_timestamp(self, timestamp_ms: int) -> int | None:
        """Where to start looking for the first record that is not older than this; None when there is none."""
        at = bisect_left(self.timestamps, timestamp_ms)
        return self.positions[at] if at < len(self.positions) else None

    def image(self) -> IndexImage:
        columns = (self.offsets.tobytes(), self.positions.tobytes(), self.timestamps.tobytes())
        first, second, third, fourth = (column.tobytes() for column in self.aborted.columns())
        return IndexImage(columns, self.dense_from, (first, second, third, fourth))

    @classmethod
    def of(cls, image: IndexImage) -> SegmentIndex:
        """The index that `image` was made from."""
        index = cls()
        columns = (index.offsets, index.positions, index.timestamps, *index.aborted.columns())
        for column, data in zip(columns, (*image.columns, *image.aborted), strict=True):
            column.frombytes(data)
        index.dense_from = image.dense_from
        return index
