"""Committed offsets of all groups, and the pending ones of open transactions.

One rule makes a running broker and the replay of its log agree: nothing changes here but by `apply`, with the records
of the log in the order of the log. What a request wants is first written as records.

An offset is valid by its place in the log. A plain commit counts where it stands. A transactional one is pending until
its transaction ends; it then counts for the place where *it* stands, so a plain commit that came after it wins although
the transaction ended later. A tombstone removes what came before it, pending offsets too: a commit does not bring back
the offsets of a group or topic that was deleted meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from semel.coordinator.group_log import (
    CommittedOffset,
    LogRecord,
    OffsetKey,
    PendingKey,
    decode_offset,
    encode_offset,
    encode_pending,
    encode_pending_key,
)
from semel.types import TopicPartition

__all__ = ["OffsetStore"]


class _Placed(NamedTuple):
    """A value and its place: how many records had been applied before it."""

    place: int
    value: CommittedOffset


_Pending = dict[int, _Placed]
"""By producer id, which has one open transaction at most."""


class OffsetStore:
    """Offsets by group and partition. Empty parts are not kept, so memory follows what is committed."""

    def __init__(self) -> None:
        self._stable: dict[str, dict[TopicPartition, _Placed]] = {}
        self._pending: dict[str, dict[TopicPartition, _Pending]] = {}
        self._transactions: dict[int, set[tuple[str, TopicPartition]]] = {}
        """Where each producer has a pending offset."""
        self._place = count()

    def __repr__(self) -> str:
        stable = sum(map(len, self._stable.values()))
        return f"<OffsetStore {stable} offsets, {len(self._transactions)} transactions pending>"

    # -- The log ------------------------------------------------------------------------------------------------

    def apply(self, key: OffsetKey | PendingKey, value: bytes | None) -> None:
        """The next record of the log. Raises `CorruptBatch` when its value cannot be read."""
        if isinstance(key, OffsetKey):
            if value is None:
                self._remove(key.group_id, key.partition)
            else:
                placed = _Placed(next(self._place), decode_offset(value))
                self._stable.setdefault(key.group_id, {})[key.partition] = placed
        elif value is None:
            self._remove_pending(key.producer_id, key.group_id, key.partition)
        else:
            placed = _Placed(next(self._place), decode_offset(value))
            self._pending.setdefault(key.group_id, {}).setdefault(key.partition, {})[key.producer_id] = placed
            self._transactions.setdefault(key.producer_id, set()).add((key.group_id, key.partition))

    def end_transaction(self, producer_id: int, commit: bool) -> list[LogRecord]:
        """Records that end the pending offsets of this producer; they have to be appended in one batch."""
        records: list[LogRecord] = []
        for group_id, partition in sorted(self._transactions.get(producer_id, ())):
            pending = self._pending[group_id][partition]
            mine = pending[producer_id]
            stable = self._stable.get(group_id, {}).get(partition)
            if commit and (stable is None or stable.place < mine.place):
                records.append(encode_offset(group_id, partition, mine.value))
                # Other producers' offsets that came after ours must still come after it.
                later = sorted((item.place, other) for other, item in pending.items() if item.place > mine.place)
                records += [encode_pending(other, group_id, partition, pending[other].value) for _, other in later]
            records.append((encode_pending_key(producer_id, group_id, partition), None))
        return records

    def snapshot(self) -> list[LogRecord]:
        """Records that rebuild this store, in an order that keeps what came after what."""
        records: list[tuple[int, LogRecord]] = []
        for group_id, placed in self._stable.items():
            records += [
                (item.place, encode_offset(group_id, partition, item.value)) for partition, item in placed.items()
            ]
        for group_id, partitions in self._pending.items():
            for partition, pending in partitions.items():
                records += [
                    (item.place, encode_pending(producer_id, group_id, partition, item.value))
                    for producer_id, item in pending.items()
                ]
        return [record for _, record in sorted(records, key=lambda item: item[0])]

    def _remove(self, group_id: str, partition: TopicPartition) -> None:
        placed = self._stable.get(group_id, {})
        if placed.pop(partition, None) is not None and not placed:
            del self._stable[group_id]
        for producer_id in list(self._pending.get(group_id, {}).get(partition, ())):
            self._remove_pending(producer_id, group_id, partition)

    def _remove_pending(self, producer_id: int, group_id: str, partition: TopicPartition) -> None:
        partitions = self._pending.get(group_id, {})
        pending = partitions.get(partition, {})
        if pending.pop(producer_id, None) is None:
            return
        if not pending:
            del partitions[partition]
        if not partitions:
            del self._pending[group_id]
        places = self._transactions[producer_id]
        places.discard((group_id, partition))
        if not places:
            del self._transactions[producer_id]

    # -- Looking in ---------------------------------------------------------------------------------------------

    def get(self, group_id: str, partition: TopicPartition) -> CommittedOffset | None:
        placed = self._stable.get(group_id, {}).get(partition)
        return None if placed is None else placed.value

    def is_pending(self, group_id: str, partition: TopicPartition) -> bool:
        return partition in self._pending.get(group_id, {})

    def pending_producers(self) -> set[int]:
        return set(self._transactions)

    def partitions(self, group_id: str) -> list[TopicPartition]:
        """Every partition with a committed or pending offset of this group, sorted."""
        return sorted({*self._stable.get(group_id, ()), *self._pending.get(group_id, ())})

    def group_ids(self) -> set[str]:
        """Every group with a committed or pending offset."""
        return {*self._stable, *self._pending}

    def committed(self, group_id: str) -> Iterator[tuple[TopicPartition, CommittedOffset]]:
        for partition, placed in self._stable.get(group_id, {}).items():
            yield partition, placed.value
