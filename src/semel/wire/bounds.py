"""Every length and count in a message is checked against the bytes that are there, before kio reads it.

kio reserves memory for as many elements as an array announces. One frame of thirty bytes that announces two thousand
million elements would end the process: the allocation fails outside Python, where nothing can be caught. So a message
is first walked over without building anything; the walk is made from kio's own schemas, one closure for each field.

Tagged fields that the schema does not know are cut out on the way: a newer peer may send them in any version
(KIP-482), and kio would refuse the message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, get_args

from kio.serial._introspect import (
    EntityField,
    EntityTupleField,
    classify_field,
    get_field_tag,
    get_schema_field_type,
    is_optional,
)

from semel.errors import ProtocolError

__all__ = ["checked", "skip_tags"]

Buffer = bytes | bytearray | memoryview
Cuts = list[tuple[int, int, bytes]]
"""Sections of tagged fields to replace: from, to, by what."""
Skip = Callable[[Buffer, int, Cuts], int]
"""From the position of a value to the position after it. IndexError: the buffer ends before."""

_SIZES = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "uint16": 2,
    "error_code": 2,
    "int32": 4,
    "timedelta_i32": 4,
    "int64": 8,
    "float64": 8,
    "timedelta_i64": 8,
    "datetime_i64": 8,
    "uuid": 16,
}
_LENGTH_BYTES = {"string": 2, "bytes": 4, "records": 4}
"""Bytes of a length before KIP-482; since then lengths are varints, one higher, and 0 is null."""


def checked(entity: Any, frame: Buffer, at: int) -> Buffer:
    """The frame for kio to read at `at`: the one given, or a copy without the tagged fields that are not known.

    Raises `ProtocolError` unless everything that a message of this schema announces is there.
    """
    cuts: Cuts = []
    try:
        end = _entity(entity)(frame, at, cuts)
    except IndexError:
        end = len(frame) + 1
    if end > len(frame):
        raise ProtocolError("it ends before its last field")
    return _without(frame, 0, len(frame), cuts) if cuts else frame


def _without(data: Buffer, start: int, end: int, cuts: Cuts) -> bytes:
    """`data[start:end]` with the cuts made."""
    pieces: list[Buffer] = []
    for cut, resume, instead in cuts:
        pieces += (data[start:cut], instead)
        start = resume
    return b"".join((*pieces, data[start:end]))


def skip_tags(frame: Buffer, at: int) -> int:
    """The position after the tagged fields of a header. Raises `ProtocolError` when they are cut short."""
    try:
        return _tags({})(frame, at, [])
    except IndexError:
        raise ProtocolError("tagged fields run past the end of the frame") from None


def _uvarint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 32:
                raise ProtocolError("a varint has more than 32 bits")
            return value, at
        shift += 7
        if shift > 28:
            raise ProtocolError("a varint has more than 5 bytes")


def _compact_bytes(data: Buffer, at: int, _cuts: Cuts) -> int:
    size = data[at]
    if size < 0x80:
        return at + (size or 1)
    size, at = _uvarint(data, at)
    return at + max(size - 1, 0)


def _plain_bytes(width: int) -> Skip:
    def skip(data: Buffer, at: int, _cuts: Cuts) -> int:
        size = int.from_bytes(data[at : at + width], "big", signed=True)
        return at + width + max(size, 0)

    return skip


def _compact_count(data: Buffer, at: int) -> tuple[int, int]:
    count = data[at]
    if count < 0x80:
        return count - 1, at + 1
    count, at = _uvarint(data, at)
    return count - 1, at


def _plain_count(data: Buffer, at: int) -> tuple[int, int]:
    return int.from_bytes(data[at : at + 4], "big", signed=True), at + 4


def _array(element: Skip | int, smallest: int, compact: bool, nullable: bool) -> Skip:
    """An array of elements that have a fixed size, or at least `smallest` bytes each.

    Null is refused where the schema has no null: kio would give None, and whoever reads the message a sequence.
    """
    read_count = _compact_count if compact else _plain_count

    def skip(data: Buffer, at: int, cuts: Cuts) -> int:
        count, at = read_count(data, at)
        if count <= 0:
            if count < 0 and not (nullable and count == -1):
                raise ProtocolError(f"an array of {count} elements is announced where there must be one")
            return at
        if count > (len(data) - at) // smallest:
            raise ProtocolError(f"an array of {count} elements is announced where {len(data) - at} bytes are left")
        if isinstance(element, int):
            return at + count * element
        for _ in range(count):
            at = element(data, at, cuts)
        return at

    return skip


def _nullable_entity(entity: Skip) -> Skip:
    def skip(data: Buffer, at: int, cuts: Cuts) -> int:
        marker = data[at]
        if marker == 0xFF:
            return at + 1
        if marker != 1:
            raise ProtocolError(f"a structure is announced by {marker}, neither null nor present")
        return entity(data, at + 1, cuts)

    return skip


def _tags(known: dict[int, Skip]) -> Skip:
    def skip(data: Buffer, at: int, cuts: Cuts) -> int:
        count = data[at]
        if count == 0:
            return at + 1
        section = at
        count, at = _uvarint(data, at)
        kept: list[bytes] = []
        changed = False
        last = -1
        for _ in range(count):
            start = at
            tag, at = _uvarint(data, at)
            if tag <= last:
                raise ProtocolError(f"tagged field {tag} comes after {last}")
            last = tag
            size, at = _uvarint(data, at)
            end = at + size
            if end > len(data):
                raise IndexError
            step = known.get(tag)
            if step is None:
                changed = True
            else:
                inner: Cuts = []
                if step(data, at, inner) != end:
                    raise ProtocolError(f"tagged field {tag} does not have the {size} bytes that it announces")
                kept.append(_without(data, start, end, inner))  # Its size may be wrong now; kio does not look at it.
                changed = changed or bool(inner)
            at = end
        if changed:
            # No schema knows 128 tagged fields: the number is one byte.
            cuts.append((section, at, bytes([len(kept)]) + b"".join(kept)))
        return at

    return skip


def _field(item: Any, flexible: bool) -> tuple[Skip | int, int]:
    """How to pass over a field: a fixed number of bytes or a function; and the fewest bytes that it can have."""
    kind = classify_field(item)
    nullable = is_optional(item) or type(None) in get_args(item.type)
    if isinstance(kind, EntityField):
        inner = _entity(kind.type_)
        return (_nullable_entity(inner), 1) if is_optional(item) else (inner, _smallest(kind.type_))
    if isinstance(kind, EntityTupleField):
        return _array(_entity(kind.type_), _smallest(kind.type_), flexible, nullable), 1 if flexible else 4
    name = get_schema_field_type(item)
    size = _SIZES.get(name)
    single: Skip | int
    if size is not None:
        single, smallest = size, size
    else:
        width = _LENGTH_BYTES[name]
        single, smallest = (_compact_bytes, 1) if flexible else (_plain_bytes(width), width)
    if kind.is_array:
        return _array(single, smallest, flexible, nullable), 1 if flexible else 4
    return single, smallest


@cache
def _smallest(entity: Any) -> int:
    flexible = bool(entity.__flexible__)
    untagged = [item for item in fields(entity) if get_field_tag(item) is None]
    return max(1, sum(_field(item, flexible)[1] for item in untagged) + flexible)


@cache
def _entity(entity: Any) -> Skip:
    """The walk over one structure: runs of fields with fixed sizes are one step."""
    flexible = bool(entity.__flexible__)
    steps: list[tuple[int, Skip]] = []
    tagged: dict[int, Skip] = {}
    fixed = 0
    for item in fields(entity):
        step, _ = _field(item, flexible)
        tag = get_field_tag(item)
        if tag is not None:
            tagged[int(tag)] = step if not isinstance(step, int) else _fixed(step)
        elif isinstance(step, int):
            fixed += step
        else:
            steps.append((fixed, step))
            fixed = 0
    if flexible:
        steps.append((fixed, _tags(tagged)))
        fixed = 0

    def skip(data: Buffer, at: int, cuts: Cuts) -> int:
        for gap, step in steps:
            at = step(data, at + gap, cuts)
        return at + fixed

    return skip


def _fixed(size: int) -> Skip:
    return lambda _data, at, _cuts: at + size
