"""What a lane published and may not have deleted yet: the record that goes into the Kafka transaction of the rows.

Sans-IO. A manifest names rows one by one, by number and message id: a range would also name a row with a lower number
that was committed after the SELECT and never published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

__all__ = ["Manifest", "Published", "RowId", "manifest_key"]

VERSION = 1


class RowId(NamedTuple):
    """One row, exactly. The id belongs to it: after a restore the database may give a number a second time."""

    shard: int
    seq: int
    msg_id: str


class Published(NamedTuple):
    """One batch of a lane: its number, and its rows."""

    number: int
    rows: Sequence[RowId]


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """Every batch of a lane that was in Kafka and perhaps still in the table when the transaction was written.

    The last one is the transaction's own; it has no rows when the transaction only ends a reconciliation.
    """

    version: int
    database_id: str
    incarnation: str
    lane: int
    owner_epoch: int
    batches: list[Published]

    @property
    def first(self) -> int:
        """The number of the oldest batch that it lists."""
        return self.batches[0].number

    @property
    def last(self) -> int:
        """The number of its own batch."""
        return self.batches[-1].number

    @property
    def rows(self) -> list[RowId]:
        """Every row that it lists."""
        return [row for batch in self.batches for row in batch.rows]

    def encode(self) -> bytes:
        """The value of the record."""
        return _ENCODER.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> Manifest:
        """What `encode` wrote. Raises `ValueError` for anything else, and for another version of it."""
        try:
            found = _DECODER.decode(value)
        except msgspec.MsgspecError as error:
            raise ValueError(f"this is no manifest of an outbox: {error}") from error
        if found.version != VERSION or not found.batches:
            raise ValueError(
                f"the manifest has version {found.version} and {len(found.batches)} batches; this version of Semel "
                f"reads version {VERSION}."
            )
        return found


def manifest_key(database_id: str, lane: int) -> bytes:
    """The key of a lane's manifests: of several outboxes that share the topic, each keeps its last one."""
    return f"{database_id}/{lane}".encode()


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Manifest)
