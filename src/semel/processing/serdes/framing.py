"""How a value says which schema wrote it: the Confluent Schema Registry's wire format. Sans-IO.

In front of the data: a zero byte, the schema's id (int32, big-endian), and for Protobuf which message of the file it
is. Or in a header, `__value_schema_id`: a byte 1 and the schema's GUID, and the same for Protobuf; then the value is
only the data (Confluent Platform 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from semel.processing.topics import DataError
from semel.types import Header

__all__ = ["VALUE_HEADER", "Framed", "frame", "header", "message_indexes", "unframe"]

VALUE_HEADER = "__value_schema_id"
_BY_ID, _BY_GUID = 0, 1
_INDEXES_MAX = 100
"""Messages nested deeper than this are no messages."""


class Framed(NamedTuple):
    """What wrote a value, and its data."""

    schema: int | UUID
    """The schema's id or GUID."""
    indexes: tuple[int, ...]
    """Protobuf only: the message's way through the file, outermost first."""
    data: bytes


def frame(schema_id: int, indexes: Sequence[int] | None = None) -> bytes:
    """What stands in front of the data; `indexes` for Protobuf."""
    return b"\0" + schema_id.to_bytes(4, "big") + (b"" if indexes is None else message_indexes(indexes))


def header(guid: UUID, indexes: Sequence[int] | None = None) -> Header:
    """What says it in a header, where the value is only the data; `indexes` for Protobuf."""
    front = bytes((_BY_GUID,)) + guid.bytes
    return VALUE_HEADER, front + (b"" if indexes is None else message_indexes(indexes))


def message_indexes(indexes: Sequence[int]) -> bytes:
    """Count and indexes as zigzag varints; the first message of a file, which is nearly every one, is a single zero."""
    if list(indexes) == [0]:
        return b"\0"
    return b"".join(_varint(number << 1) for number in (len(indexes), *indexes))


def unframe(data: bytes, headers: Sequence[Header], what: str, *, is_protobuf: bool = False) -> Framed:
    """Take a value apart. Raises `DataError` for bytes that are not framed like this."""
    for name, value in headers:
        if name == VALUE_HEADER and value is not None:
            if len(value) < 17 or value[0] != _BY_GUID:
                raise DataError(f"{what}: its header {VALUE_HEADER} is not a 1 and a schema's GUID: {value[:20].hex()}")
            indexes, _ = _read_indexes(value, 17, what) if is_protobuf else ((), 17)
            return Framed(UUID(bytes=value[1:17]), indexes, data)
    if len(data) < 5 or data[0] != _BY_ID:
        raise DataError(
            f"{what} has no schema id: it begins with {data[:5].hex() or 'nothing'}, not with a zero byte and four of "
            "an id. It was not written by way of a schema registry."
        )
    indexes, at = _read_indexes(data, 5, what) if is_protobuf else ((), 5)
    return Framed(int.from_bytes(data[1:5], "big"), indexes, data[at:])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_indexes(data: bytes, at: int, what: str) -> tuple[tuple[int, ...], int]:
    count, at = _read_varint(data, at, what)
    if count == 0:
        return (0,), at
    if not 0 < count <= _INDEXES_MAX:
        raise DataError(f"{what} names no message: {count} indexes")
    found = []
    for _ in range(count):
        index, at = _read_varint(data, at, what)
        found.append(index)
    return tuple(found), at


def _read_varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 35:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at
        shift += 7
    raise DataError(f"{what} ends or errs within its message indexes")
