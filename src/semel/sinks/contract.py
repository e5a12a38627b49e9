"""The seam between the engine and a target: what every sink, SQL or not, promises.

A sink keeps its position with its effects: both become visible in one atomic step, and that step checks a fence, the
owner epoch, which a new owner raises before it reads the position. A sink is called from one thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from semel.errors import Fatal, Fenced, Retriable
from semel.types import Record, TopicPartition

__all__ = [
    "Applied",
    "Claim",
    "PartitionsLost",
    "PartitionsStopped",
    "Sink",
    "Slice",
    "Stop",
    "StopReason",
    "Unavailable",
    "total",
]


class StopReason(StrEnum):
    """Why a partition stands still until a person has looked. Going on would be a guess."""

    TOPIC_RECREATED = "TOPIC_RECREATED"
    DATA_GAP = "DATA_GAP"
    OFFSET_AHEAD = "OFFSET_AHEAD"
    PARKING_FULL = "PARKING_FULL"
    EFFECTS_TORN = "EFFECTS_TORN"
    PARTITIONS_ADDED = "PARTITIONS_ADDED"


class Stop(NamedTuple):
    """A partition that must not go on: `detail` names the numbers and what to do."""

    reason: StopReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Claim(NamedTuple):
    """A partition that we were assigned, with what the cluster says about it."""

    partition: TopicPartition
    topic_id: UUID
    log_start_offset: int
    partitions: int = 0
    """How many the topic has; 0 where nobody said."""


class Slice(NamedTuple):
    """What is next in one partition: its records in order, and the offset behind everything that was read.

    `end` lies behind the last record; markers, aborted and compacted records leave gaps before it.
    """

    partition: TopicPartition
    records: Sequence[Record]
    end: int
    views: Sequence[Any] | None = None
    """What the handler sees of each record, where that is decoded already; else the sink does so."""


class Applied(NamedTuple):
    """What one call of `apply` made durable. Each of `records` was handled, parked, or one of the `copies`: records
    whose message had been applied already, which were passed over."""

    records: int = 0
    parked: int = 0
    transactions: int = 0
    copies: int = 0


def total(parts: Iterable[Applied]) -> Applied:
    """What several calls made durable together."""
    return Applied(*map(sum, zip(*parts, strict=True)))


class Unavailable(Retriable):
    """The target cannot do its work now, and the data is not to blame. Call again later with the same arguments."""


class PartitionsLost(Fenced):
    """These partitions are not ours any more; nothing was applied behind their positions. Try the others again."""

    def __init__(self, reasons: Mapping[TopicPartition, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = dict(reasons)


class PartitionsStopped(Fatal):
    """These partitions must not go on; nothing was applied behind their positions. Try the others again."""

    def __init__(self, stops: Mapping[TopicPartition, Stop]) -> None:
        super().__init__("; ".join(f"{partition}: {stop}" for partition, stop in stops.items()))
        self.stops = dict(stops)


class Sink(Protocol):
    """A target of effects. Every method may block and may raise `Unavailable`; no call leaves anything half done."""

    def open(self) -> None:
        """Connect, and check that the target is fit for use. Raises `ConfigurationError` when it cannot become so."""

    def take_over(self, claims: Sequence[Claim]) -> dict[TopicPartition, int | Stop]:
        """Fence the owners before us, then read where to go on: the next offset, or why the partition must stop.

        A partition that the sink has never seen starts at its log start offset; where a store may have lost its data,
        and the log does not begin at 0 any more, it stops until a person says so.
        """

    def apply(self, slices: Sequence[Slice]) -> Applied:
        """Make the effects of each slice and the position behind it durable together; a database does so for all slices
        at once, a cache for each of them. A search index makes the documents durable first, each with its version.

        Partitions that are not taken over and records before the position are passed over, so a call that raised
        can be repeated as it was. Raises `PartitionsLost` and `PartitionsStopped`.
        """

    def carry_out(self) -> Applied:
        """Do what is asked for about parked records, one transaction for each step: `records` were handled again.

        Raises `PartitionsLost`; what was not done then is still asked for.
        """

    def position(self, partition: TopicPartition) -> int | None:
        """The next offset of a partition that is ours; None when it is not."""

    def parked_keys(self, partition: TopicPartition) -> int:
        """How many keys of a partition wait for a person."""

    def release(self, partitions: Iterable[TopicPartition]) -> None:
        """Forget partitions; whoever owns them next fences us anyway."""

    def close(self) -> None:
        """Let go of the connection. An unfinished transaction is rolled back."""
