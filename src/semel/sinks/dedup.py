"""How a sink knows what it has applied: what is declared, and the rules that need no database.

Three levels. The position row, which every sink has, covers everything that Kafka itself brings again. `Version`
passes over what is older than what a key has seen. `Inbox` keeps the ids of messages for a window of days, and covers
one message that stands in the topic twice: written again by an at-least-once producer, by another one, or by a redrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from semel.errors import ConfigurationError
from semel.processing.topics import DataError

__all__ = [
    "DAY_MS",
    "FUTURE_DAYS",
    "Dedup",
    "Inbox",
    "MessageId",
    "Unprovable",
    "Version",
    "check_window",
    "days_of",
    "message_id",
    "version_of",
]

DAY_MS = 86_400_000
WINDOW_DAYS_MAX = 400
"""A day is a partition of the table on PostgreSQL, and each of them is a few files and a place in every plan."""
FUTURE_DAYS = 1
"""How far ahead of ours a producer's clock may be. An id from later is not believed: ids could make any partition."""
ID_BYTES_MAX = 255
"""Room for any UUID or composite id; MariaDB indexes so much without a setting."""
_VERSION_MAX = 2**63 - 1

ID_HEADER = "semel-id"


class Unprovable(DataError):
    """The message is older than every id that is kept: nobody can say whether it was applied. It is parked."""


@dataclass(frozen=True, slots=True)
class Version:
    """Records of a key carry a version that grows; one that is not newer than what was applied is passed over.

    `of` is the name of a field of the value, or a function of the record. A version is an int of at most 64 bits.
    Semel keeps the highest version of each key beside the sink's position, so deleted rows are covered too.
    """

    of: str | Callable[[Any], int]

    def __post_init__(self) -> None:
        if not (callable(self.of) or (isinstance(self.of, str) and self.of.isidentifier())):
            raise ConfigurationError(
                f"Version({self.of!r}): give the name of a field of the value, or a function of the record."
            )


@dataclass(frozen=True, slots=True)
class Inbox:
    """Each message id is applied once, whichever record brings it.

    `id` is a function of the record; without it the header `semel-id` is the id. `at` gives the time of origin of the
    message in milliseconds since 1970, the same for every copy of it; without it the id has to be a UUIDv7, which
    carries its time. Ids are kept for `window_days` of that time. The window has to cover the topic's retention, the
    `parked_days` for which a message may lie parked or in a dead letter queue before somebody sends it again, and the
    `upstream_days` for which it may wait before it is first written (an outbox, a webhook that is repeated). What is
    older than the window is parked, and never applied twice. `since` says from when on ids are known, where a sink that
    has applied records already gets an inbox.
    """

    id: Callable[[Any], str] | None = None
    at: Callable[[Any], int] | None = None
    window_days: int = 14
    parked_days: int = 5
    upstream_days: int = 1
    since: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("window_days", "parked_days", "upstream_days"):
            days = getattr(self, name)
            least = 1 if name == "window_days" else 0
            if not isinstance(days, int) or isinstance(days, bool) or not least <= days <= WINDOW_DAYS_MAX:
                raise ConfigurationError(f"Inbox: {name}={days!r}, but it is {least} to {WINDOW_DAYS_MAX} days.")
        for name in ("id", "at"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigurationError(f"Inbox: {name}={getattr(self, name)!r} is not a function of the record.")
        if self.since is not None and (not isinstance(self.since, datetime) or self.since.tzinfo is None):
            raise ConfigurationError(f"Inbox: since={self.since!r} is not a datetime with its time zone.")
        if self.window_days < self.parked_days + self.upstream_days:
            check_window(self, "the inbox", "its topic", 0)


Dedup = Version | Inbox


class MessageId(NamedTuple):
    """An id, in the day that it belongs to for ever: copies of a message meet there. Days count from 1970 in UTC."""

    day: int
    text: str
    at_ms: int


# --- Reading a record ---


def version_of(dedup: Version, record: Any) -> int:
    """The version that a record carries. Raises `DataError` for none, and what the app's function raises."""
    if callable(dedup.of):
        version = dedup.of(record)
    else:
        value = record.value
        missing = DataError(f"the value has no {dedup.of!r}, which Version({dedup.of!r}) reads")
        if isinstance(value, Mapping):
            if dedup.of not in value:
                raise missing
            version = value[dedup.of]
        else:
            if not hasattr(value, dedup.of):
                raise missing
            version = getattr(value, dedup.of)
    if not isinstance(version, int) or isinstance(version, bool) or not -_VERSION_MAX <= version <= _VERSION_MAX:
        raise DataError(f"the version {version!r:.80} is not an int of at most 64 bits")
    return version


def message_id(inbox: Inbox, record: Any) -> MessageId:
    """The id of the message in a record, and its day. Raises `DataError`, and what the app's functions raise."""
    text = _header(record) if inbox.id is None else inbox.id(record)
    if not isinstance(text, str) or not 1 <= len(text.encode("utf-8", "surrogatepass")) <= ID_BYTES_MAX:
        raise DataError(f"the message id {text!r:.80} is not a text of 1 to {ID_BYTES_MAX} bytes")
    if not text.isprintable():  # A zero byte or a lone surrogate is what databases refuse, each in its own way.
        raise DataError(f"the message id {text!r:.80} has characters that cannot be printed")
    at_ms = _time_in(text) if inbox.at is None else inbox.at(record)
    if not isinstance(at_ms, int) or isinstance(at_ms, bool) or at_ms < 0:
        raise DataError(f"the time of origin {at_ms!r:.80} is not a number of milliseconds since 1970")
    return MessageId(at_ms // DAY_MS, text, at_ms)


def _header(record: Any) -> str:
    found = [value for name, value in record.headers if name == ID_HEADER]
    if len(found) != 1 or found[0] is None:
        count = "no" if not found or found == [None] else f"{len(found)}"
        raise DataError(f"the record has {count} header {ID_HEADER}; where the id is elsewhere, say so: Inbox(id=...)")
    try:
        return str(found[0], "ascii")
    except UnicodeDecodeError:
        raise DataError(f"the header {ID_HEADER} is {found[0]!r:.80}, which is no text") from None


def _time_in(text: str) -> int:
    """The milliseconds in a UUIDv7 (RFC 9562, section 5.7)."""
    try:
        found = UUID(text)
    except ValueError:
        found = None
    if found is None or found.version != 7:
        raise DataError(
            f"the message id {text!r:.80} is no UUIDv7, so it does not tell when the message was made, and nobody "
            "could say whether its id was kept that long. Give the time of origin: Inbox(at=...)"
        )
    return found.int >> 80


# --- The window ---


def check_window(inbox: Inbox, sink: str, topic: str, retention_ms: int) -> None:
    """Raise `ConfigurationError` when a message may come again after its id was dropped.

    `retention_ms` is -1 where records are kept for ever.
    """
    if retention_ms < 0:
        raise ConfigurationError(
            f"{sink}: topic {topic} keeps its records for ever (retention.ms=-1 or compacted), so no window of days "
            f"covers it. Give the topic a retention, or use dedup=Version(...), which needs no window."
        )
    parts = (retention_ms / DAY_MS, inbox.parked_days, inbox.upstream_days)
    if inbox.window_days < sum(parts):
        raise ConfigurationError(
            f"{sink}: ids are kept for window_days={inbox.window_days}, but a message may come again after "
            f"{days_of(inbox, retention_ms)}. A copy that comes later would be parked as unprovable. Raise "
            "window_days, or lower what it has to cover."
        )


def days_of(inbox: Inbox, retention_ms: int | None) -> str:
    """The sum that a window has to cover, in words."""
    parked, upstream = inbox.parked_days, inbox.upstream_days
    if retention_ms is None:
        return f"the topic's retention + {parked} parked + {upstream} upstream days"
    total = retention_ms / DAY_MS + parked + upstream
    return f"{retention_ms / DAY_MS:g} retention.ms + {parked} parked + {upstream} upstream = {total:g} days"
