"""Committed offsets of all groups, and the pending ones of open transactions.

An offset is valid by its position in the log. A plain commit counts where it stands; a transactional one is pending
until the marker of its producer, and then counts where *it* stands, so a plain commit that was written after it wins
although the transaction ended later. A tombstone removes what stands before it, pending offsets too: a commit marker
does not bring back the offsets of a group or topic that was deleted meanwhile.

The same calls serve the running broker and the replay of the log at start-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from semel.coordinator.group_log import CommittedOffset
from semel.types import TopicPartition

__all__ = ["OffsetStore"]


class _Placed(NamedTuple):
    position: int
    value: CommittedOffset


class OffsetStore:
    """`position` is always an offset in the log of `__consumer_offsets`."""

    def __init__(self) -> None:
        self._stable: dict[str, dict[TopicPartition, _Placed]] = {}
        self._pending: dict[int, dict[tuple[str, TopicPartition], _Placed]] = {}
        """By producer id: a producer has one open transaction at most."""
        self._waiting: dict[tuple[str, TopicPartition], set[int]] = {}
        """Which producers have a pending offset for this partition of this group."""

    def __repr__(self) -> str:
        stable = sum(map(len, self._stable.values()))
        return f"<OffsetStore {stable} offsets, {len(self._pending)} transactions pending>"

    def put(self, group_id: str, partition: TopicPartition, value: CommittedOffset, position: int) -> None:
        placed = self._stable.setdefault(group_id, {})
        current = placed.get(partition)
        if current is None or current.position < position:
            placed[partition] = _Placed(position, value)

    def put_pending(
        self, producer_id: int, group_id: str, partition: TopicPartition, value: CommittedOffset, position: int
    ) -> None:
        """A retried commit overwrites the earlier one of the same transaction."""
        self._pending.setdefault(producer_id, {})[group_id, partition] = _Placed(position, value)
        self._waiting.setdefault((group_id, partition), set()).add(producer_id)

    def end_transaction(self, producer_id: int, commit: bool) -> None:
        """The marker of this producer: its pending offsets count now, or are gone."""
        for (group_id, partition), placed in self._pending.pop(producer_id, {}).items():
            self._forget_waiting(producer_id, group_id, partition)
            if commit:
                self.put(group_id, partition, placed.value, placed.position)

    def remove(self, group_id: str, partition: TopicPartition) -> None:
        """A tombstone: the committed offset and all pending ones."""
        placed = self._stable.get(group_id)
        if placed is not None:
            placed.pop(partition, None)
            if not placed:
                del self._stable[group_id]
        for producer_id in list(self._waiting.get((group_id, partition), ())):
            self._forget_waiting(producer_id, group_id, partition)
            entries = self._pending[producer_id]
            del entries[group_id, partition]
            if not entries:
                del self._pending[producer_id]

    def _forget_waiting(self, producer_id: int, group_id: str, partition: TopicPartition) -> None:
        producers = self._waiting[group_id, partition]
        producers.discard(producer_id)
        if not producers:
            del self._waiting[group_id, partition]

    def get(self, group_id: str, partition: TopicPartition) -> CommittedOffset | None:
        placed = self._stable.get(group_id, {}).get(partition)
        return None if placed is None else placed.value

    def is_pending(self, group_id: str, partition: TopicPartition) -> bool:
        return (group_id, partition) in self._waiting

    def partitions(self, group_id: str) -> list[TopicPartition]:
        """Every partition with a committed or pending offset of this group, sorted."""
        pending = {partition for group, partition in self._waiting if group == group_id}
        return sorted(pending.union(self._stable.get(group_id, ())))

    def of_topic(self, topic: str) -> list[tuple[str, TopicPartition]]:
        """Group and partition of every committed or pending offset of this topic, sorted."""
        stable = ((group_id, partition) for group_id, placed in self._stable.items() for partition in placed)
        return sorted({item for item in _both(stable, self._waiting) if item[1].topic == topic})

    def committed(self, group_id: str) -> Iterator[tuple[TopicPartition, CommittedOffset]]:
        for partition, placed in self._stable.get(group_id, {}).items():
            yield partition, placed.value

    def group_ids(self) -> set[str]:
        """Every group that has a committed or pending offset."""
        return {group_id for group_id, _ in self._waiting}.union(self._stable)


def _both(
    first: Iterable[tuple[str, TopicPartition]], second: Iterable[tuple[str, TopicPartition]]
) -> Iterator[tuple[str, TopicPartition]]:
    yield from first
    yield from second
