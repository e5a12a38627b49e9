"""What a poll gave, cut into what transactions take [sans-IO]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from semel.sinks.contract import Slice
from semel.types import Record, TopicPartition

__all__ = ["Cut", "cut"]


class Cut(NamedTuple):
    """A polled batch."""

    total: int
    """Records in it."""
    transactions: Sequence[Sequence[Slice]]
    """None of them is empty; each has a partition once."""
    ends: Mapping[TopicPartition, int]
    """Positions at the ends of partitions that were reached, behind every record."""

    def decoded(self, decode: Callable[[Sequence[Record]], Sequence[Any]]) -> Cut:
        """The same with the handler's views of the records, where all of a slice can be decoded."""
        return self._replace(transactions=[[_seen(piece, decode) for piece in each] for each in self.transactions])


def cut(records: Sequence[Record], ends: Mapping[TopicPartition, int], max_bytes: int) -> Cut:
    """The records in their order, in transactions of at most `max_bytes` of keys and values; a larger one is alone."""
    pieces: list[dict[TopicPartition, list[Record]]] = [{}]
    size = 0
    for place, run in groupby(records, itemgetter(0, 1)):
        at, found = TopicPartition(*place), list(run)
        weights = [len(record.key or b"") + len(record.value or b"") for record in found]
        if size + sum(weights) <= max_bytes:
            pieces[-1].setdefault(at, []).extend(found)
            size += sum(weights)
            continue
        for record, weight in zip(found, weights, strict=True):
            if size and size + weight > max_bytes:
                pieces.append({})
                size = 0
            pieces[-1].setdefault(at, []).append(record)
            size += weight
    full = [piece for piece in pieces if piece]
    transactions = [[Slice(at, found, found[-1].offset + 1) for at, found in piece.items()] for piece in full]
    return Cut(len(records), transactions, ends)


def _seen(piece: Slice, decode: Callable[[Sequence[Record]], Sequence[Any]]) -> Slice:
    try:
        return piece._replace(views=decode(piece.records))
    except Exception:  # Whose fault that is, the sink says.
        return piece
