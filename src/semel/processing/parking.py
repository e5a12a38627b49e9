"""Parking: a record that cannot be processed, and every later record of its key, wait in a topic of their own.

The park topic has the input's partitions, is kept for ever, and is written in the same Kafka transaction as the
position. Whoever takes over a partition reads from it which keys are parked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from semel.processing.effects import Write
from semel.processing.faults import Fault
from semel.processing.limits import PARKED_KEYS_MAX, PARKED_RECORDS_MAX
from semel.processing.topics import UndecodableKey
from semel.types import Header, Record

__all__ = ["ParkedKeys", "as_it_came", "park", "park_key"]

PREFIX: Final = "semel-park-"
COMPONENT: Final = "semel-park-component"
KIND: Final = "semel-park-kind"
"""What a record of the park topic is: absent for a parked one, else `command` or `outcome` (`parklog`)."""
ERROR: Final = "semel-park-error"
MESSAGE: Final = "semel-park-message"
POSITION: Final = "semel-park-position"
TRIED: Final = "semel-park-tried"
LANE: Final = "semel-park-lane"
GROUP: Final = "semel-park-group"
FRAMES: Final = "semel-park-frames"
BUILD: Final = "semel-park-build"

BY_KEY: Final = b"key"
UNDECODABLE: Final = b"undecodable"
NO_KEY: Final = b"none"


def park_key(record: Record, error: BaseException | None) -> bytes:
    """Which later records a parked one holds up, as the lane's name: those of its key, or none but itself.

    A record without a key has no order to keep. One whose key cannot be read is of no key that anybody knows: every
    such record of the partition fails by itself, so one synthetic lane holds them all.
    """
    if record.key is None:
        return NO_KEY
    return UNDECODABLE if isinstance(error, UndecodableKey) else BY_KEY


def park(topic: str, component: str, record: Record, error: BaseException | None, build: str = "") -> Write:
    """The record as it goes to the park topic: its own bytes and headers, and why and from where it came.

    `error` is None for a record that was not tried because its key is parked.
    """
    position = f"{record.topic}-{record.partition}@{record.offset}"
    headers: tuple[Header, ...] = (
        *record.headers,
        (COMPONENT, component.encode()),
        (POSITION, position.encode()),
        (TRIED, b"0" if error is None else b"1"),
        (LANE, park_key(record, error)),
    )
    if error is not None:
        fault = Fault.of(error, build)
        said = ((ERROR, fault.error), (MESSAGE, fault.message), (GROUP, fault.group), (FRAMES, fault.frames))
        headers += tuple((name, text.encode(errors="replace")) for name, text in (*said, (BUILD, build)))
    return Write(topic, record.key, record.value, headers, record.partition)


def as_it_came(parked: Record) -> Record | None:
    """A parked record as it stood in the input, to be handled again; None when its position cannot be read."""
    headers = dict(parked.headers)
    topic, dash, at = (headers.get(POSITION) or b"").decode(errors="replace").rpartition("-")
    number, sign, offset = at.partition("@")
    if not (dash and sign and number.isdecimal() and offset.isdecimal()):
        return None
    own = tuple(header for header in parked.headers if not header[0].startswith(PREFIX))
    return Record(topic, int(number), int(offset), parked.timestamp_ms, parked.key, parked.value, own)


class ParkedKeys:
    """How many records of each key of a partition wait, and how many in all.

    For a unit of work it says by how much that changes: what is released counts below zero.
    """

    __slots__ = ("keys", "records")

    def __init__(self, keys: Mapping[bytes, int] | None = None, records: int = 0) -> None:
        self.keys = dict(keys or {})
        self.records = records

    def __repr__(self) -> str:
        return f"<ParkedKeys {len(self.keys)} keys, {self.records} records>"

    def count(self, key: bytes | None, by: int) -> None:
        """So many records more, or less; `key` is None where they hold up nothing else."""
        self.records += by
        if key is not None:
            self.keys[key] = self.keys.get(key, 0) + by

    def add(self, other: ParkedKeys) -> None:
        """Take in what a committed unit of work parked and released."""
        self.records += other.records
        for key, by in other.keys.items():
            left = self.keys.get(key, 0) + by
            if left > 0:
                self.keys[key] = left
            else:
                self.keys.pop(key, None)

    def full(self, more: ParkedKeys) -> str:
        """Why nothing more may be parked over this and `more`, or an empty string."""
        keys = len(self.keys) + len(more.keys)
        records = self.records + more.records
        if keys >= PARKED_KEYS_MAX:
            return f"{keys} keys are parked, and the limit is {PARKED_KEYS_MAX}"
        if records >= PARKED_RECORDS_MAX:
            return f"{records} records are parked, and the limit is {PARKED_RECORDS_MAX}"
        return ""
