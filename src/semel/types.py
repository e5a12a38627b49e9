"""Values that every room shares. They hold data and know no rule."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GroupMetadata", "Header", "Record", "TopicPartition"]

Header = tuple[str, bytes | None]
"""One record header: its key and its value."""


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"


class Record(NamedTuple):
    """One record as it stands in a log: undecoded, at its position.

    `offset` is the record's position in its partition; `timestamp_ms` is milliseconds since 1970 in UTC.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...] = ()


class GroupMetadata(NamedTuple):
    """Who we are in a consumer group; TxnOffsetCommit sends it so that the broker can fence us (KIP-447)."""

    group_id: str
    generation_id: int = -1
    member_id: str = ""
    group_instance_id: str | None = None
