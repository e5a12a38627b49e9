"""Rows of the outbox as values: which shard and lane a record belongs to, and how its headers are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from semel.types import Header
from semel.wire.partitioner import murmur2

__all__ = [
    "LANES",
    "MSG_ID_HEADER",
    "SHARDS",
    "OutboxRow",
    "decode_headers",
    "encode_headers",
    "lane_of",
    "shard_of",
]

SHARDS = 64
"""Fixed for ever: a key that changed its shard would overtake its own rows."""
LANES = 16
"""How many relays can work on one outbox at the same time; fixed in `semel_outbox_meta` when the tables are made."""
MSG_ID_HEADER = "semel-id"


class OutboxRow(NamedTuple):
    """One row as the relay reads it. `headers` is JSON as `encode_headers` writes it."""

    shard: int
    seq: int
    msg_id: str
    topic: str
    key: bytes | None
    value: bytes | None
    headers: str
    created_at: int
    """Milliseconds since 1970 in UTC, by the writer's clock: for people and metrics, nothing is decided by it."""
    size: int = 0
    """Bytes of key, value and headers."""
    is_ruled: int = 0
    """1 when somebody holds it back, and it is not marked yet."""
    address: str = ""
    """Where the database has it now, if it can tell (PostgreSQL's ctid): a hint, for a quick DELETE."""


def shard_of(key: bytes | None, msg_id: str) -> int:
    """The shard of a record: all records of one key share one; without a key the id decides."""
    return (murmur2(msg_id.encode() if key is None else key) & 0x7FFFFFFF) % SHARDS


def lane_of(shard: int, lanes: int) -> int:
    """The lane that publishes a shard. Shards that follow each other share one: rows are read in the order of shards,
    and so a SELECT of a backlog gives one lane much rather than many lanes little."""
    return shard * lanes // SHARDS


def encode_headers(headers: Iterable[Header]) -> str:
    """JSON of [name, base64 or null] pairs, as `semel_parked` has it."""
    return msgspec.json.encode(list(headers)).decode()


_HEADERS = msgspec.json.Decoder(tuple[tuple[str, bytes | None], ...])


def decode_headers(text: str) -> tuple[Header, ...]:
    """What `encode_headers` wrote. Raises `ValueError` for what is not that."""
    try:
        return _HEADERS.decode(text)
    except msgspec.MsgspecError as error:
        raise ValueError(f"headers {text!r:.200} are not pairs of name and base64: {error}") from error
