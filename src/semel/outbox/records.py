"""Records on their way into `semel_outbox`: what can be wrong with one is found before anything is changed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from random import SystemRandom
from typing import Any, NamedTuple

from semel.env import wall_ms
from semel.errors import ConfigurationError
from semel.outbox.rows import encode_headers, shard_of
from semel.processing.effects import Produce, Write, lower
from semel.processing.limits import OUTPUT_BYTES_MAX
from semel.processing.topics import DataError, Topic

__all__ = ["BYTES_MAX", "INSERT_ROWS_MAX", "RECORDS_MAX", "NewRow", "Outgoing", "inserts", "new_message_id", "row_of"]

RECORDS_MAX = 10_000
"""Records of one database transaction: they wait in memory for its end, and are written while it holds its locks."""
BYTES_MAX = 16 * 1_048_576
"""Keys, values and headers of one database transaction together, for the same reason."""
INSERT_ROWS_MAX = 500
"""Rows of one INSERT: seven parameters each, far below SQLite's 32,766 and PostgreSQL's 65,535."""

_RESERVED = "semel-"
"""Headers of this name are Semel's own: a reader tells duplicates by them."""
_random = SystemRandom()


class NewRow(NamedTuple):
    """A row of `semel_outbox` that is to be written; `seq` is the database's. Times are milliseconds since 1970."""

    shard: int
    msg_id: str
    topic: str
    record_key: bytes | None
    record_value: bytes | None
    headers: str
    created_at: int

    @property
    def size(self) -> int:
        """Bytes in memory, as good as."""
        return len(self.record_key or b"") + len(self.record_value or b"") + len(self.headers)


COLUMNS = NewRow._fields
_ONE = f"({', '.join('?' * len(COLUMNS))})"


def inserts(rows: Sequence[NewRow]) -> Iterator[tuple[str, list[Any]]]:
    """The statements that write the rows in their order, with `?` placeholders, and their parameters."""
    for start in range(0, len(rows), INSERT_ROWS_MAX):
        part = rows[start : start + INSERT_ROWS_MAX]
        sql = f"INSERT INTO semel_outbox ({', '.join(COLUMNS)}) VALUES {', '.join([_ONE] * len(part))}"  # noqa: S608
        yield sql, [field for row in part for field in row]


def new_message_id(now_ms: int) -> uuid.UUID:
    """A UUIDv7 (RFC 9562): by its time an inbox keeps ids by day."""
    number = now_ms << 80 | 0x7 << 76 | _random.getrandbits(12) << 64 | 0b10 << 62 | _random.getrandbits(62)
    return uuid.UUID(int=number)


def row_of(record: Any, msg_id: uuid.UUID | str | None = None) -> NewRow:
    """The row of a record that `topic.record(...)` made.

    Raises `DataError` for a key, value or header that cannot be written, and for more bytes than Kafka takes;
    `ConfigurationError` for what is no record or has an id that is no UUID; `Retriable` while the topic's schema
    registry was not asked.
    """
    if not isinstance(record, Produce) or not isinstance(record.topic, Topic):
        raise ConfigurationError(
            f"{type(record).__name__} {record!r:.80} is not a record: send what topic.record(key, value) gives."
        )
    now = wall_ms()
    identity = str(new_message_id(now) if msg_id is None else _checked_id(msg_id))
    name = record.topic.name
    _check_headers(name, record.headers)
    written = lower(record)
    assert isinstance(written, Write)
    key, value, headers = written.key, written.value, written.headers
    size = len(key or b"") + len(value or b"") + sum(len(n.encode()) + len(v or b"") for n, v in headers)
    size += len("semel-id") + len(identity)
    if size > OUTPUT_BYTES_MAX:
        raise DataError(
            f"a record for topic {name} with key {record.key!r:.80} has {size} bytes, and Kafka takes "
            f"{OUTPUT_BYTES_MAX} (max.message.bytes). Nothing was sent. Put the large part where the reader can fetch "
            "it, and send where."
        )
    return NewRow(shard_of(key, identity), identity, name, key, value, encode_headers(headers), now)


def _checked_id(msg_id: uuid.UUID | str) -> uuid.UUID:
    try:
        return msg_id if isinstance(msg_id, uuid.UUID) else uuid.UUID(msg_id)
    except (ValueError, AttributeError, TypeError):
        raise ConfigurationError(
            f"{msg_id!r:.80} cannot be the id of a record: it is a UUID, for example uuid.uuid5(NAMESPACE, name), so "
            "that the same business event has the same id whenever it is sent."
        ) from None


def _check_headers(topic: str, headers: Any) -> None:
    for header in headers:
        if not (isinstance(header, tuple) and len(header) == 2 and isinstance(header[0], str)) or not (
            header[1] is None or isinstance(header[1], bytes)
        ):
            raise DataError(f"a header of a record for topic {topic} is {header!r:.80}, and not a pair (str, bytes).")
        if header[0].startswith(_RESERVED):
            raise DataError(
                f"a record for topic {topic} has a header {header[0]!r}: names with {_RESERVED!r} are Semel's own."
            )
        try:
            header[0].encode()
        except UnicodeEncodeError:
            raise DataError(f"a header of a record for topic {topic} has the name {header[0]!r}: no text.") from None


class Outgoing:
    """The records of one database transaction, in the order in which they were sent."""

    def __init__(self) -> None:
        self.rows: list[NewRow] = []
        self._bytes = 0

    def add(self, row: NewRow) -> None:
        """Take one more. Raises `DataError`, with the row not taken, when the transaction has too many."""
        if len(self.rows) >= RECORDS_MAX or self._bytes + row.size > BYTES_MAX:
            raise DataError(
                f"a database transaction sends at most {RECORDS_MAX} records of {BYTES_MAX} bytes together, and this "
                f"one has {len(self.rows)} with {self._bytes} bytes. Commit earlier, in more transactions."
            )
        self.rows.append(row)
        self._bytes += row.size

    def keep(self, count: int) -> None:
        """Forget all but the first `count`."""
        del self.rows[count:]
        self._bytes = sum(row.size for row in self.rows)
