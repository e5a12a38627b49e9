"""What a run left behind, as values for the checker: the history, raw logs, positions, ledgers, parked rows.

Everything large is given as something to read from the start again, a piece at a time, so that evidence of any size
is checked in memory of a few bytes an offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from semel.errors import CorruptBatch
from semel.history import Event
from semel.wire.compression import decompress
from semel.wire.records import BATCH_OVERHEAD, BatchHeader, read_header

__all__ = [
    "Evidence",
    "InDoubt",
    "Ingress",
    "LedgerRow",
    "Log",
    "LogBatch",
    "ParkedRow",
    "Position",
    "file_chunks",
]

LENGTH_FROM = 12
"""A batch's length counts the bytes from there on."""
CHUNK_BYTES = 4 << 20
"""How much of a log's file is in memory at once; it grows for a batch that is larger."""


_CODEC = 0x07


class LogBatch(NamedTuple):
    """One batch of a raw log: its header, and where it lies in `buffer`."""

    header: BatchHeader
    buffer: bytes
    at: int

    def data(self) -> bytes:
        """Its encoded records, decompressed. Raises `CorruptBatch`."""
        header, buffer, at = self
        data = buffer[at + BATCH_OVERHEAD : at + LENGTH_FROM + header.batch_length]
        return decompress(header.codec, data) if header.attributes & _CODEC else data


@dataclass(frozen=True, slots=True)
class Log:
    """The raw log of one partition, markers and aborted records included.

    `chunks` gives its bytes in pieces of any size, and may be called again. `stable` is the last stable offset.
    `begin` is the first offset that is judged: what stood there before the run is none of its business.
    """

    topic: str
    partition: int
    start: int
    stable: int
    end: int
    chunks: Callable[[], Iterable[bytes]]
    is_compacted: bool = False
    begin: int = 0

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"

    def batches(self) -> Iterator[LogBatch]:
        """Every batch in order of offsets. Raises `CorruptBatch` for bytes that are no whole batch."""
        rest, new = b"", tuple.__new__  # A named tuple's own constructor is Python, and takes three times as long.
        for piece in self.chunks():
            buffer = rest + piece if rest else piece
            at, size = 0, len(buffer)
            while size - at >= BATCH_OVERHEAD:
                header = read_header(buffer, at)
                end = at + LENGTH_FROM + header.batch_length
                if end > size:
                    break
                yield new(LogBatch, (header, buffer, at))
                at = end
            rest = buffer[at:]
        if rest:
            raise CorruptBatch(f"{len(rest)} bytes at the end of {self} are no whole batch")


def file_chunks(path: Path) -> Iterator[bytes]:
    """A file in pieces."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


class Position(NamedTuple):
    """Where one consumer is in one partition; `begin` is where it was before the run.

    One for each partition of its inputs, also where nothing was ever committed (then `next_offset` is `begin`).
    """

    component: str
    topic: str
    partition: int
    next_offset: int
    begin: int = 0
    is_sink: bool = False


class LedgerRow(NamedTuple):
    """One row of an audit ledger: one call of a sink's handler, written in the transaction of its effects."""

    sink: str
    topic: str
    partition: int
    owner_epoch: int
    attempt: str
    offsets: Sequence[int]


class ParkedRow(NamedTuple):
    """One record that a sink parked in its database."""

    sink: str
    topic: str
    partition: int
    offset: int


class InDoubt(NamedTuple):
    """A transaction that is not over: `system` is "Kafka" or a database; `prepared` ones end by no time-out."""

    system: str
    name: str
    state: str
    is_prepared: bool


class Ingress(NamedTuple):
    """The topics between HTTP and the owner of keys. `scope` gives the records' key for an event's route and key."""

    requests: str
    responses: str
    outcomes: str
    """The changelog of stored responses."""
    scope: Callable[[str, str], bytes]


def _nothing() -> Iterable[LedgerRow]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is judged. `events` and `ledger` may be called again; `ledger` gives rows in the order of `seq`."""

    events: Callable[[], Iterable[Event]]
    logs: Sequence[Log]
    positions: Sequence[Position] = ()
    ledger: Callable[[], Iterable[LedgerRow]] = _nothing
    parked: Sequence[ParkedRow] = ()
    in_doubt: Sequence[InDoubt] = ()
    ingress: Ingress | None = None
    changelogs: frozenset[str] = frozenset()
    """Topics of keyed state: their records belong to a transaction, but are no outputs of one input."""
    limits: Mapping[str, str] = field(default_factory=dict)
    """What the readers could not get, and why; becomes part of the findings' notes."""
