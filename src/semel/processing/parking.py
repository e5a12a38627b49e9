"""Parking: a record that cannot be processed, and every later record of its key, wait in a topic of their own.

The park topic has the input's partitions, is kept for ever, and is written in the same Kafka transaction as the
position. Whoever takes over a partition reads from it which keys are parked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from semel.processing.effects import Write
from semel.processing.limits import PARKED_KEYS_MAX, PARKED_RECORDS_MAX
from semel.processing.topics import UndecodableKey
from semel.types import Header, Record

__all__ = ["ParkedKeys", "park", "park_key"]

COMPONENT: Final = "semel-park-component"
ERROR: Final = "semel-park-error"
MESSAGE: Final = "semel-park-message"
POSITION: Final = "semel-park-position"
TRIED: Final = "semel-park-tried"
LANE: Final = "semel-park-lane"

BY_KEY: Final = b"key"
UNDECODABLE: Final = b"undecodable"
NO_KEY: Final = b"none"

MESSAGE_BYTES_MAX = 2_000
"""An error message may quote the whole record; its beginning says what was wrong."""


def park_key(record: Record, error: BaseException | None) -> bytes:
    """Which later records a parked one holds up, as the lane's name: those of its key, or none but itself.

    A record without a key has no order to keep. One whose key cannot be read is of no key that anybody knows: every
    such record of the partition fails by itself, so one synthetic lane holds them all.
    """
    if record.key is None:
        return NO_KEY
    return UNDECODABLE if isinstance(error, UndecodableKey) else BY_KEY


def park(topic: str, component: str, record: Record, error: BaseException | None) -> Write:
    """The record as it goes to the park topic: its own bytes and headers, and why and from where it came.

    `error` is None for a record that was not tried because its key is parked.
    """
    reason = "" if error is None else str(error) or repr(error)
    position = f"{record.topic}-{record.partition}@{record.offset}"
    headers: tuple[Header, ...] = (
        *record.headers,
        (COMPONENT, component.encode()),
        (POSITION, position.encode()),
        (TRIED, b"0" if error is None else b"1"),
        (LANE, park_key(record, error)),
    )
    if error is not None:
        name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        message = reason.encode(errors="replace")[:MESSAGE_BYTES_MAX]
        headers += ((ERROR, name.encode(errors="replace")), (MESSAGE, message))
    return Write(topic, record.key, record.value, headers, record.partition)


class ParkedKeys:
    """The parked keys of one partition of one component, and how many records wait with them."""

    __slots__ = ("keys", "records")

    def __init__(self, keys: Iterable[bytes] = (), records: int = 0) -> None:
        self.keys = set(keys)
        self.records = records

    def __repr__(self) -> str:
        return f"<ParkedKeys {len(self.keys)} keys, {self.records} records>"

    def restore(self, record: Record, component: str) -> None:
        """Take in one record of the park topic, of whichever component it is."""
        headers = dict(record.headers)
        if headers.get(COMPONENT) != component.encode():
            return
        self.records += 1
        if headers.get(LANE) == BY_KEY and record.key is not None:
            self.keys.add(record.key)

    def add(self, other: ParkedKeys) -> None:
        """Take in what a committed unit of work parked."""
        self.keys |= other.keys
        self.records += other.records

    def full(self, more: ParkedKeys) -> str:
        """Why nothing more may be parked over this and `more`, or an empty string."""
        keys = len(self.keys) + len(more.keys)
        records = self.records + more.records
        if keys >= PARKED_KEYS_MAX:
            return f"{keys} keys are parked, and the limit is {PARKED_KEYS_MAX}"
        if records >= PARKED_RECORDS_MAX:
            return f"{records} records are parked, and the limit is {PARKED_RECORDS_MAX}"
        return ""
